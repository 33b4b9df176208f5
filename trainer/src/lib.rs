//! The trainer: an explicit block executor, data-parallel training, checkpoints, evaluation.
//!
//! A worker reads one configuration ([`setup`]), comes into its group ([`join`]), resumes ([`checkpoint`]), and runs steps
//! ([`train`]): a batch ([`batch`]) goes forward and backward block by block ([`executor`]), each block's flat gradient
//! ([`flat`]) is averaged over the ranks once it is whole ([`exchange`]), and AdamW updates it ([`optimizer`]). Losses live
//! in [`task`]. Afterwards rank 0 exports the network as an artifact ([`publish`]). [`launch`] starts several workers in one
//! pod. How a process ended is told by its [`exit_code`].
//!
//! Same layout, same bits: batches, starting weights and updates are functions of the spec and the step, so a run that
//! was killed and resumed ends with the weights of one that was not.
//!
//! Not here: what a network computes (model), how ranks talk (dist), how data is stored (data).

pub mod batch;
pub mod checkpoint;
mod error;
pub mod evaluate;
pub mod exchange;
pub mod executor;
pub mod exit_code;
pub mod flat;
pub mod history;
pub mod join;
pub mod launch;
pub mod optimizer;
pub mod progress;
pub mod publish;
pub mod result;
pub mod setup;
pub mod stop;
pub mod task;
pub mod train;

pub use error::TrainError;

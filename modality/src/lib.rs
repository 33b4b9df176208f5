//! What turns a request's parts, or a training sample, into the tensors a model reads.
//!
//! Trainer and server call this one crate, so a model meets the same numbers in both: a text goes through
//! [`TextProcessor`], an encoded image through [`ImageProcessor`], and the [`PipelineSpec`] written into the model's
//! artifact says how each was set up. Everything that arrives from outside is measured against a limit *before* it is
//! worked on, and a refusal names the limit.
//!
//! A modality is a [`Modality`]: its name, what an item costs and takes, and how an item becomes one row of a model input. The
//! [`Registry`] holds those that a pipeline uses; adding audio means one more implementation, not a change elsewhere.
//!
//! [`Tensor`] is a plain array in host memory: just enough to stack items into batches and to take rows out again.
//! It does no arithmetic; engines and libtorch do.
//!
//! ```
//! use sensorium_modality::{TextConfig, TextProcessor};
//!
//! let text = TextProcessor::train(["What color is the circle?", "Is it red?"], TextConfig { max_length: 8 })?;
//! let ids = text.encode("is the CIRCLE purple?")?;
//! assert_eq!(ids.len(), 5); // four words and a question mark
//! assert_eq!(ids[3], 1); // "purple" was not in the training texts
//! assert_eq!(text.encode_batch(&["what?", "is it?"])?.shape(), [2, 8]);
//! # Ok::<(), sensorium_modality::ModalityError>(())
//! ```

mod error;
mod image;
mod jpeg;
mod modality;
mod spec;
mod tensor;
mod text;
mod webp;

pub use self::error::{ModalityError, Unit};
pub use self::image::{ImageConfig, ImageLimits, ImageProcessor, Resize, RgbImage, decode_image, flip_horizontal};
pub use self::modality::{Cost, CostUnit, Limits, Modality, Opened, Registry};
pub use self::spec::{PipelineSpec, TaskHead, TextSpec};
pub use self::tensor::{DType, Element, Tensor, TensorData, TensorError};
pub use self::text::{PADDING_ID, TextConfig, TextLimits, TextProcessor, UNKNOWN_ID};

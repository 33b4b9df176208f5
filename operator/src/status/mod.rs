//! From what a cluster shows to what is done next and what is said about it. Pure: the time is an argument.

mod artifact;
pub mod backoff;
pub mod conditions;
mod failure;
mod refusal;
mod retention;
mod run;
mod serving;

pub use artifact::{ARTIFACT_LABEL, FINALIZER, References, Resolution, removal, resolve, verification};
pub(crate) use artifact::{is_verified, names_of};
pub(crate) use failure::index;
pub use failure::{Cause, Failure};
pub use refusal::{Refusal, RefusalCause};
pub use retention::{Reader, reader_of, removes_files, surplus};
pub(crate) use run::JOB_LABEL;
pub use run::{Action, Decision, Observed, decide, is_to_be_judged, refused};
pub use serving::{
    Awaited, Measured, Observed as ServingObserved, Plan as ServingPlan, TrackLoad, last_crash, rollout, serving_notes,
    serving_status,
};
pub(crate) use serving::{available, has_ended, is_late, is_rolled_out, revision, wanted};

/// Something that happened, for a person who reads the object's events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whether somebody should look.
    pub warning: bool,
    /// One word in CamelCase.
    pub reason: &'static str,
    /// One sentence.
    pub message: String,
}

impl Note {
    /// All as it should be.
    pub fn normal(reason: &'static str, message: impl Into<String>) -> Self {
        Self { warning: false, reason, message: message.into() }
    }

    /// Somebody should look.
    pub fn warning(reason: &'static str, message: impl Into<String>) -> Self {
        Self { warning: true, reason, message: message.into() }
    }
}

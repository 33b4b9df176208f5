//! What a process says by its exit code to whoever started it, be it the launcher here, `sensorium up` or the operator.

use sensorium_compress::CompressError;

use crate::error::TrainError;

/// As a shell reports a process that SIGTERM ended; the job goes on from its checkpoint when it is started again.
pub const STOPPED: u8 = 143;
/// The job, or what it names, has to be changed: starting it again as it is can't help.
pub const USAGE: u8 = 2;
/// This worker only lost the others: what another one of them ended with says more. `EX_TEMPFAIL` of sysexits.h.
pub const WAKE: u8 = 75;
/// Anything else; starting it again may help.
pub const FAILURE: u8 = 1;

/// Of a job that ended with `error`.
pub fn of(error: &anyhow::Error) -> u8 {
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(TrainError::Stopped { .. }), _) | (_, Some(CompressError::Cancelled)) => STOPPED,
        (Some(error), _) if error.is_users() => USAGE,
        (_, Some(error)) if error.is_users() => USAGE,
        (Some(error), _) if error.is_wake() => WAKE,
        _ => FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sensorium_dist::DistError;

    use super::*;

    #[test]
    fn a_worker_that_only_lost_its_peers_says_so() {
        let host = "trainer-0".to_owned();
        let alone = DistError::Connect { host, port: 29500, timeout: Duration::ZERO, cause: "refused".to_owned() };
        assert_eq!(of(&TrainError::from(alone).into()), WAKE);
        let expected = "a whole number".to_owned();
        let own = DistError::Environment { variable: "RANK", value: "one".to_owned(), expected };
        assert_eq!(of(&TrainError::from(own).into()), FAILURE);
    }

    #[test]
    fn what_has_to_be_changed_and_what_was_asked_for_are_told_from_failures() {
        let spec = TrainError::Spec { field: "spec.tasks", reason: String::new() };
        assert_eq!(of(&spec.into()), USAGE);
        assert_eq!(of(&CompressError::NoQuestions { uri: String::new() }.into()), USAGE);
        assert_eq!(of(&TrainError::Stopped { step: 3, unsaved: None }.into()), STOPPED);
        assert_eq!(of(&CompressError::Cancelled.into()), STOPPED);
        assert_eq!(of(&TrainError::LoaderGone.into()), FAILURE);
        assert_eq!(of(&anyhow::anyhow!("of neither")), FAILURE);
    }
}

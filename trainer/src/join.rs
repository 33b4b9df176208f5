//! How a worker comes into its group.

use std::time::Duration;

use sensorium_dist::{Launch, Patience, ProcessGroup};

use crate::error::TrainError;
use crate::stop::Stop;

/// How long ranks wait for each other in a collective.
const OPERATION: Duration = Duration::from_mins(5);
/// How much longer than its job has for that a worker waits for all to run: whoever started them decides first, and not
/// by how a worker failed.
const MARGIN: Duration = Duration::from_mins(1);

/// Meets the other ranks, which all run within `pre_running_deadline_seconds` or are taken down, and then read their data first, as
/// this one has.
///
/// # Errors
/// [`TrainError::Stopped`] where any of them was asked to stop before all had met.
pub fn join(launch: &Launch, pre_running_deadline_seconds: u64, stop: &Stop) -> Result<ProcessGroup, TrainError> {
    stop.check()?;
    let patience = Patience {
        joining: Duration::from_secs(pre_running_deadline_seconds).max(OPERATION) + MARGIN,
        operation: OPERATION,
        cancelled: &|| stop.is_requested(),
    };
    // One that was asked may also find that others were, and have left.
    let group = launch.connect(&patience).map_err(|error| stop.check().err().unwrap_or_else(|| error.into()))?;
    stop.check_together(&group)?;
    Ok(group)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// The second of two ranks, of which the first never comes.
    fn left_alone() -> Launch {
        let master_port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let master_addr = "127.0.0.1".to_owned();
        Launch { rank: 1, world_size: 2, local_rank: 0, master_addr, master_port, interface: None }
    }

    #[test]
    fn a_worker_that_was_asked_to_stop_does_not_wait_for_the_others() {
        let stop = Stop::default();
        stop.request();
        let ended = join(&left_alone(), 600, &stop);
        assert!(matches!(ended, Err(TrainError::Stopped { step: 0, unsaved: None })), "{ended:?}");
    }

    #[test]
    fn a_worker_that_is_asked_to_stop_while_it_waits_for_the_others_stops() {
        let stop = Stop::default();
        let asked = stop.clone();
        let asking = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            asked.request();
        });
        let ended = join(&left_alone(), 600, &stop);
        asking.join().unwrap();
        assert!(matches!(ended, Err(TrainError::Stopped { step: 0, unsaved: None })), "{ended:?}");
    }
}

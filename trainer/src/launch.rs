//! Starts the workers of one pod, as torchrun does on one machine: they succeed, fail and end together.
//!
//! Each worker is this program again, with a rank of its own. None outlives the launcher: it holds the read end of a pipe
//! as its standard input, and stops when the other end goes (see [`EXIT_WITH_PARENT`]).

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use sensorium_lifecycle::{EXIT_WITH_PARENT, asked_to_end};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::exit_code::{STOPPED, USAGE, WAKE};

/// From SIGTERM to SIGKILL for workers whose sibling has failed: enough for the step at hand and a checkpoint.
const GRACE: Duration = Duration::from_secs(20);

/// What [`exit_code`] makes of SIGKILL.
const KILLED: u8 = 128 + 9;

/// Starts `processes` workers with `args` and waits for them all. Returns 0, or the exit code of the first that failed, or of
/// a later one that says more; 128 and the signal's number for one that was killed.
///
/// `GROUP_RANK` (0 if unset) is the index of this pod, so the ranks here are `GROUP_RANK * processes` and on. `WORLD_SIZE`
/// (if unset, the workers here are all there are), `MASTER_ADDR` and `MASTER_PORT` go to the workers as they are.
///
/// # Errors
/// When `GROUP_RANK` is not a number, or a worker can't be started; none is left then.
pub async fn launch(processes: NonZeroU32, args: &[OsString]) -> anyhow::Result<u8> {
    let asked = asked_to_end().context("could not listen for signals")?;
    let program = std::env::current_exe().context("could not find this program's file")?;
    let group_rank = match std::env::var("GROUP_RANK") {
        Ok(value) => value.parse::<u32>().with_context(|| format!("GROUP_RANK={value:?} is not a whole number"))?,
        Err(_) => 0,
    };
    let processes = processes.get();
    let (order, orders) = watch::channel(None);
    let mut workers = JoinSet::new();
    for local_rank in 0..processes {
        let rank = u64::from(group_rank) * u64::from(processes) + u64::from(local_rank);
        let mut command = Command::new(&program);
        command
            .args(args)
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", local_rank.to_string())
            .env("LOCAL_WORLD_SIZE", processes.to_string())
            .env(EXIT_WITH_PARENT, "1")
            .stdin(Stdio::piped())
            .kill_on_drop(true);
        if std::env::var_os("WORLD_SIZE").is_none() {
            command.env("WORLD_SIZE", processes.to_string());
        }
        let child = command.spawn().with_context(|| format!("could not start {}", program.display()))?;
        let orders = orders.clone();
        workers.spawn(async move { (rank, wait(child, orders).await) });
    }
    supervise(workers, &order, asked).await
}

async fn supervise(
    mut workers: JoinSet<(u64, std::io::Result<ExitStatus>)>,
    order: &watch::Sender<Option<Signal>>,
    asked: impl Future<Output = ()>,
) -> anyhow::Result<u8> {
    let mut failure = None;
    let mut was_asked = false;
    let mut patience = None;
    tokio::pin!(asked);
    loop {
        let patience_ends = async { sleep_until(patience.unwrap_or_else(Instant::now)).await };
        tokio::select! {
            // Whoever asks decides how long it takes: a pod's grace period, for one.
            () = &mut asked, if !was_asked => {
                was_asked = true;
                order.send_replace(Some(Signal::TERM));
            }
            () = patience_ends, if patience.is_some() => {
                patience = None;
                tracing::warn!("workers did not end in time and are killed");
                order.send_replace(Some(Signal::KILL));
            }
            ended = workers.join_next() => {
                let Some(ended) = ended else { return Ok(failure.unwrap_or(0)) };
                let (rank, status) = ended.context("lost sight of a worker")?;
                let status = status.with_context(|| format!("could not wait for rank {rank}"))?;
                if status.success() {
                    continue;
                }
                let code = exit_code(status);
                if let Some(first) = failure {
                    failure = Some(telling(first, code));
                    continue;
                }
                failure = Some(code);
                if !was_asked {
                    tracing::error!(rank, %status, "a worker failed; the others are stopped");
                    order.send_replace(Some(Signal::TERM));
                    patience = Some(Instant::now() + GRACE);
                }
            }
        }
    }
}

/// Waits for a worker and passes orders on to it. Only here, where it is waited for, is its id surely its own.
async fn wait(mut child: Child, mut orders: watch::Receiver<Option<Signal>>) -> std::io::Result<ExitStatus> {
    let _lifeline = child.stdin.take(); // `Child::wait` would close it
    loop {
        tokio::select! {
            status = child.wait() => return status,
            Ok(()) = orders.changed() => {
                let signal = *orders.borrow_and_update();
                let pid = child.id().and_then(|id| Pid::from_raw(id as i32));
                if let (Some(pid), Some(signal)) = (pid, signal) {
                    kill_process(pid, signal)?;
                }
            }
        }
    }
}

/// Of the exit codes of two workers the one that tells more of what failed; `first` where they tell as much. Which of two
/// workers ends first, the one that fails or the one that loses it, is a matter of chance.
fn telling(first: u8, later: u8) -> u8 {
    match (first, later) {
        (_, USAGE) => USAGE,
        // Those that end because we ask them to tell nothing.
        (WAKE, later) if later != STOPPED && later != KILLED => later,
        (first, _) => first,
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_says_the_job_is_wrong_is_believed_whenever_it_ends() {
        for first in [1, WAKE, STOPPED, KILLED, USAGE] {
            assert_eq!(telling(first, USAGE), USAGE);
            assert_eq!(telling(USAGE, first), USAGE);
        }
    }

    #[test]
    fn a_worker_that_only_lost_the_others_does_not_hide_why() {
        assert_eq!(telling(WAKE, 1), 1);
        assert_eq!(telling(1, WAKE), 1);
    }

    #[test]
    fn workers_that_were_stopped_do_not_hide_the_first_failure() {
        for first in [1, WAKE, 128 + 11] {
            assert_eq!(telling(first, STOPPED), first);
            assert_eq!(telling(first, KILLED), first);
        }
    }
}

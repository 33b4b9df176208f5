//! Child processes that never outlive the command that started them.
//!
//! Every child leads a process group of its own, so that Ctrl-C in a terminal reaches only us and we decide how the
//! children end. Four things can end a run, and each of them leaves no process behind:
//!
//! * all children succeed: [`Workers::finish`] returns;
//! * one child fails: the others are stopped, and the first failure is reported, or the one that says the job is wrong;
//! * the caller stops them ([`Workers::stop`]): SIGTERM, a grace period, SIGKILL;
//! * we die, be it by SIGKILL: each child holds the read end of a pipe on its standard input, whose write end dies with
//!   us. Programs that see [`EXIT_WITH_PARENT`] treat the end of that input as SIGTERM. (`PR_SET_PDEATHSIG` would do the
//!   same for any program, but needs `unsafe` between fork and exec, and follows the thread, not the process.)

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, ChildStdin, Command};
use tokio_util::sync::CancellationToken;

use crate::local::job::EXIT_USAGE;

/// Environment variable that asks a program to exit when its standard input ends.
pub const EXIT_WITH_PARENT: &str = "SENSORIUM_EXIT_WITH_PARENT";

/// One process to start.
#[derive(Debug, Clone)]
pub struct ProcessSpec {
    /// How messages call it, such as `worker-0`.
    pub name: String,
    /// The executable.
    pub program: PathBuf,
    /// Its arguments, without the program's own name.
    pub args: Vec<String>,
    /// Variables on top of the environment it inherits.
    pub env: BTreeMap<String, String>,
    /// File that its output and errors are appended to.
    pub log: PathBuf,
}

/// Why a group of processes ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The log of a process could not be opened.
    #[error("cannot open the log {}", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A process could not be started; those started before it are killed.
    #[error("cannot start {name} ({})", program.display())]
    Start {
        /// The process.
        name: String,
        /// Its executable.
        program: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A process could not be waited for.
    #[error("cannot wait for {name}")]
    Wait {
        /// The process.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A process failed; the rest of its group has been stopped.
    #[error("{name} {}", describe(*status))]
    Failed {
        /// The process to blame.
        name: String,
        /// Its position among the specs that the group was started with.
        index: usize,
        /// How it ended.
        status: ExitStatus,
    },
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(9)) => "was killed by signal 9 (out of memory?)".to_owned(),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => format!("ended with {status}"),
    }
}

struct Member {
    name: String,
    child: Child,
    group: Option<Pid>,
    exited: bool,
    /// Held open for as long as the child may live, see the module's documentation.
    lifeline: Option<ChildStdin>,
}

impl Member {
    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            // The only failure is "no such group": it ended by itself, which is what we want.
            let _ = kill_process_group(group, signal);
        }
    }

    /// Waits for the leader, then kills what it may have left in its group. Dropping the future loses nothing.
    async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        if !self.exited {
            self.exited = true;
            drop(self.lifeline.take());
            self.signal(Signal::KILL);
        }
        Ok(status)
    }
}

/// A group of processes that succeed, fail and end together. Dropping it kills what is left.
pub struct Workers {
    members: Vec<Member>,
    grace: Duration,
}

impl Workers {
    /// Starts one process per spec. `grace` is the time between SIGTERM and SIGKILL whenever the group is stopped.
    ///
    /// Must be called inside a Tokio runtime.
    ///
    /// # Errors
    /// When a log cannot be opened or a program cannot be started; no process is left then.
    pub fn start(specs: &[ProcessSpec], grace: Duration) -> Result<Self, ProcessError> {
        let mut workers = Self { members: Vec::with_capacity(specs.len()), grace };
        for spec in specs {
            workers.members.push(start(spec)?);
        }
        Ok(workers)
    }

    /// Waits until all processes have succeeded, or one has failed and the others have been stopped.
    ///
    /// Dropping the future loses nothing: it can be called again, or [`Workers::stop`] instead.
    ///
    /// # Errors
    /// [`ProcessError::Failed`] names the process that failed first, unless another one ended with [`EXIT_USAGE`].
    pub async fn finish(&mut self) -> Result<(), ProcessError> {
        let Some(failure) = self.first_failure().await else { return Ok(()) };
        self.stop(&CancellationToken::new()).await;
        Err(self.usage_failure().unwrap_or(failure))
    }

    async fn first_failure(&mut self) -> Option<ProcessError> {
        let mut exits: FuturesUnordered<_> = self
            .members
            .iter_mut()
            .enumerate()
            .map(|(index, member)| async move {
                let status = member.wait().await;
                (index, member.name.clone(), status)
            })
            .collect();
        while let Some((index, name, status)) = exits.next().await {
            match status {
                Ok(status) if status.success() => {}
                Ok(status) => return Some(ProcessError::Failed { name, index, status }),
                Err(source) => return Some(ProcessError::Wait { name, source }),
            }
        }
        None
    }

    /// Of processes that have ended, the one that says that another attempt would fail in the same way. Which ends first, that
    /// one or those that lose it, is a matter of chance.
    fn usage_failure(&mut self) -> Option<ProcessError> {
        self.members.iter_mut().enumerate().find_map(|(index, member)| {
            let status = member.child.try_wait().ok()??;
            let name = member.name.clone();
            (status.code() == Some(EXIT_USAGE)).then_some(ProcessError::Failed { name, index, status })
        })
    }

    /// Asks every process to end, and kills those that are still there after the grace period or once `hurry` fires.
    pub async fn stop(&mut self, hurry: &CancellationToken) {
        self.signal(Signal::TERM);
        let grace = self.grace;
        tokio::select! {
            () = self.all_exited() => return,
            () = tokio::time::sleep(grace) => {}
            () = hurry.cancelled() => {}
        }
        self.signal(Signal::KILL);
        self.all_exited().await;
    }

    async fn all_exited(&mut self) {
        futures::future::join_all(self.members.iter_mut().map(Member::wait)).await;
    }

    fn signal(&self, signal: Signal) {
        self.members.iter().filter(|member| !member.exited).for_each(|member| member.signal(signal));
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

fn start(spec: &ProcessSpec) -> Result<Member, ProcessError> {
    let log_error = |source| ProcessError::Log { path: spec.log.clone(), source };
    let log = OpenOptions::new().create(true).append(true).open(&spec.log).map_err(log_error)?;
    let errors = log.try_clone().map_err(log_error)?;
    let mut child = Command::new(&spec.program)
        .args(&spec.args)
        .envs(&spec.env)
        .env(EXIT_WITH_PARENT, "1")
        .stdin(Stdio::piped())
        .stdout(log)
        .stderr(errors)
        .process_group(0)
        .spawn()
        .map_err(|source| ProcessError::Start { name: spec.name.clone(), program: spec.program.clone(), source })?;
    // Taken, because `Child::wait` would close it, and the child would take that for our death.
    let lifeline = child.stdin.take();
    let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    Ok(Member { name: spec.name.clone(), child, group, exited: false, lifeline })
}

/// The last `lines` lines of a log, read from its end; empty when there is no such file.
pub fn log_tail(path: &Path, lines: usize) -> Vec<String> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    /// More than any error message needs, and nothing to a disk.
    const WINDOW_BYTES: u64 = 64 * 1024;
    let mut bytes = Vec::new();
    let mut read = || -> std::io::Result<()> {
        let mut file = std::fs::File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(WINDOW_BYTES);
        file.seek(SeekFrom::Start(start))?;
        file.read_to_end(&mut bytes)?;
        Ok(())
    };
    if read().is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..].iter().map(|line| (*line).to_owned()).collect()
}

#[cfg(test)]
mod tests;

//! Everything a command can fail with: what, where, why, and what to do about it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use sensorium_api::manifest::ManifestError;
use sensorium_artifact::ArtifactError;
use sensorium_data::DataError;
use sensorium_operator::plan::{OrderError, PlanError};
use sensorium_telemetry::error_line;

use crate::local::job::JobFailure;
use crate::local::ports::Holder;
use crate::local::process::ProcessError;
use crate::local::state_dir::StateError;
use crate::text::shorten;

/// Why a command failed. [`Error::hint`] says what to do, [`Error::exit_code`] what scripts are told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be used.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Standard output could not be written to.
    #[error("cannot write to standard output")]
    Output(#[source] std::io::Error),
    /// The state folder could not be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// A manifest is wrong.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// There is no job in what was given.
    #[error("no job in {}", listed(paths))]
    NothingToRun {
        /// Where we looked.
        paths: Vec<PathBuf>,
    },
    /// The cluster was not reached, or refused.
    #[error("cannot ask the cluster")]
    Cluster(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No ModelArtifact of this name or digest.
    #[error("no artifact {reference} in namespace {namespace}{}", known(names))]
    NoSuchArtifact {
        /// What was asked for.
        reference: String,
        /// Where.
        namespace: String,
        /// What is there.
        names: Vec<String>,
    },
    /// A data set cannot be read or written.
    #[error("cannot use the data {uri}")]
    Data {
        /// The data set.
        uri: String,
        /// Why.
        source: DataError,
    },
    /// It is not known where a data set's own files are.
    #[error("where are the files of {dataset}?")]
    NoSource {
        /// The data set.
        dataset: &'static str,
    },
    /// An artifact or a storage location.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// Processes of a job.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A job failed for good.
    #[error(transparent)]
    Job(Box<JobFailure>),
    /// A program that a job needs is not installed.
    #[error("cannot find the program {program}; looked in {}", listed(looked_in))]
    ProgramMissing {
        /// Its name.
        program: &'static str,
        /// Where we looked.
        looked_in: Vec<PathBuf>,
    },
    /// A port that was asked for is taken.
    #[error("port {port} for {name} is taken by {}", holder.as_ref().map_or("another program".to_owned(), Holder::to_string))]
    PortTaken {
        /// What the port is for, such as `grpc`.
        name: String,
        /// The port.
        port: u16,
        /// Who has it, where the system tells us.
        holder: Option<Holder>,
    },
    /// The async runtime does not start.
    #[error("cannot start the async runtime")]
    Runtime(#[source] std::io::Error),
    /// Ctrl-C cannot be caught.
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
    /// The system has no port left.
    #[error("cannot find a free port")]
    NoFreePort(#[source] std::io::Error),
    /// A manifest has no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The jobs cannot be put in order.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// Nobody answers at an address.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        source: tonic::transport::Error,
    },
    /// A server refused a question.
    #[error("{address} refused the question ({code:?}): {message}")]
    Ask {
        /// The server.
        address: String,
        /// The gRPC status code.
        code: tonic::Code,
        /// The server's words.
        message: String,
    },
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

fn known(names: &[String]) -> String {
    if names.is_empty() { " (there is none)".to_owned() } else { format!(" (there are {})", names.join(", ")) }
}

impl Error {
    /// A cluster that could not be asked.
    pub fn cluster(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Cluster(source.into())
    }

    /// For `map_err`: the failure of `action` on `path`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// What the user can do about it, if there is something that the message does not already say.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Cluster(_) => "check that kubectl get modelartifacts works, and KUBECONFIG".to_owned(),
            Self::NoSuchArtifact { .. } => "kubectl get modelartifacts --all-namespaces lists them".to_owned(),
            Self::State(StateError::Locked { .. }) => {
                "wait for it, stop it, or use another folder with --state-dir".to_owned()
            }
            Self::NothingToRun { .. } => {
                "a job is a YAML document of kind TrainingJob, CompressionJob or ServingJob".to_owned()
            }
            Self::Data { uri, source: DataError::NotADataset { .. } } => {
                match uri.strip_prefix("pvc://datasets/easy-vqa") {
                    Some(_) => "sensorium data import easy-vqa".to_owned(),
                    None => return None,
                }
            }
            Self::NoSource { dataset } => format!("sensorium data import {dataset} --from DIR"),
            Self::Artifact(ArtifactError::NotFound { store, .. }) => {
                format!("sensorium artifact ls --store {store} --all")
            }
            Self::Artifact(ArtifactError::Corrupt { .. }) => {
                "it cannot be repaired: remove its folder and run the job that made it again".to_owned()
            }
            Self::Job(failure) => match &failure.log {
                Some(log) => format!("the whole log is {}", shorten(log).display()),
                None => return None,
            },
            Self::ProgramMissing { .. } => {
                "build it with `make build`, or set SENSORIUM_BIN_DIR to the folder it is in".to_owned()
            }
            Self::PortTaken { name, .. } => format!("stop that program, or leave out --{name}-port to get a free port"),
            Self::Connect { .. } => {
                "start a server with `sensorium up MANIFEST --keep`, or name it with --addr HOST:PORT".to_owned()
            }
            Self::Ask { code: tonic::Code::NotFound, .. } => {
                "name the model with --model: it is the name of its ServingJob".to_owned()
            }
            Self::Ask { .. }
            | Self::Data { .. }
            | Self::State(_)
            | Self::Artifact(_)
            | Self::Manifest(_)
            | Self::Plan(_)
            | Self::Order(_)
            | Self::Process(_)
            | Self::NoFreePort(_)
            | Self::Signals(_)
            | Self::Runtime(_)
            | Self::Io { .. }
            | Self::Output(_)
            | Self::Interrupted => return None,
        };
        Some(hint)
    }

    /// The exit code, as `sensorium --help` documents it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Interrupted => 130,
            _ => 1,
        }
    }

    /// All that is printed about it: what, where and why; the failed worker's last words; what to do.
    pub fn report(&self) -> String {
        let mut text = error_line(self);
        text.push('\n');
        if let Self::Job(failure) = self {
            text.extend(failure.tail.iter().flat_map(|line| ["  | ", line, "\n"]));
        }
        if let Some(hint) = self.hint() {
            let _ = writeln!(text, "hint: {hint}");
        }
        text
    }
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_taken_names_who_has_it_and_the_way_out() {
        let holder = Holder { pid: 4711, name: "python3".to_owned() };
        let error = Error::PortTaken { name: "grpc".to_owned(), port: 8001, holder: Some(holder) };
        assert_eq!(
            error.report(),
            "port 8001 for grpc is taken by process 4711 (python3)\n\
             hint: stop that program, or leave out --grpc-port to get a free port\n"
        );
    }

    #[test]
    fn a_failed_job_shows_the_last_lines_of_its_log_and_where_the_rest_is() {
        let error = Error::Job(Box::new(JobFailure {
            job: "TrainingJob/vqa".to_owned(),
            attempts: 4,
            reason: "worker-1 exited with code 1".to_owned(),
            tail: vec!["ERROR no such shard".to_owned()],
            log: Some("/state/worker-1.log".into()),
            result: None,
        }));
        assert_eq!(
            error.report(),
            "TrainingJob/vqa failed after 4 attempts: worker-1 exited with code 1\n  | ERROR no such shard\n\
             hint: the whole log is /state/worker-1.log\n"
        );
    }

    #[test]
    fn missing_data_says_how_to_get_it() {
        let source = DataError::NotADataset { folder: "/d".into() };
        let error = Error::Data { uri: "pvc://datasets/easy-vqa/train".to_owned(), source };
        assert_eq!(error.hint().as_deref(), Some("sensorium data import easy-vqa"));
    }

    #[test]
    fn an_interrupted_run_exits_with_130_and_a_failed_one_with_1() {
        assert_eq!(Error::Interrupted.exit_code(), 130);
        assert_eq!(Error::NothingToRun { paths: Vec::new() }.exit_code(), 1);
    }
}

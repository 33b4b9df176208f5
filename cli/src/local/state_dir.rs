//! The state folder of `sensorium up`: where things lie, who may write, and what earlier runs left.
//!
//! ```text
//! .sensorium/
//!   lock                          held by the `up` that runs here, with its process id
//!   report.json report.html       the last finished run
//!   questions/JOB/                images that the served model was asked about
//!   volumes/CLAIM/                what a manifest calls pvc://CLAIM
//!   jobs/KIND-NAME/
//!     config/                     configuration files, mounted as "config"
//!     logs/ROLE-RANK.log          output of each process
//!     result.json                 written by the job itself when it ends
//!     state.json                  our record of the last run, for reuse
//! ```

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use sensorium_api::run::{ArtifactResult, GateResult, JobKey, RunResult};
use sensorium_artifact::{ArtifactError, Location, Volume, Volumes, atomic};
use serde::{Deserialize, Serialize};

/// The namespace whose jobs need no prefix in folder names.
const DEFAULT_NAMESPACE: &str = "default";

/// Why the state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another `sensorium up` works in it.
    #[error("another `sensorium up` (process {pid}) is running in {}", folder.display())]
    Locked {
        /// The state folder.
        folder: PathBuf,
        /// Who holds the lock; `?` in the instant before it has written its id.
        pid: String,
    },
    /// A file in it could not be replaced.
    #[error(transparent)]
    Write(#[from] ArtifactError),
    /// A file or folder in it could not be used.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl StateError {
    /// For `map_err`: the failure of `action` on `path`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// A state folder. Paths below it are absolute, so that programs can be given them.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

/// The right to run jobs in a state folder. The kernel gives it back when we end, however we end.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl StateDir {
    /// The folder at `path`, which need not exist yet.
    ///
    /// # Errors
    /// When the path is relative and the working directory is gone.
    pub fn new(path: &Path) -> Result<Self, StateError> {
        let root = std::path::absolute(path).map_err(StateError::io("locate", path))?;
        Ok(Self { root })
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder behind `pvc://CLAIM`.
    pub fn volume(&self, claim: &str) -> PathBuf {
        self.root.join("volumes").join(claim)
    }

    /// The folders behind the claims of these storage URIs.
    ///
    /// # Errors
    /// When one is not a storage URI.
    pub fn volumes_of<S: AsRef<str>>(&self, uris: &[S]) -> Result<Volumes, ArtifactError> {
        let mut volumes = Volumes::default();
        for uri in uris {
            if let Location::Claim { claim, .. } = Location::parse(uri.as_ref())? {
                let folder = self.volume(&claim);
                volumes.insert(Volume { claim, folder });
            }
        }
        Ok(volumes)
    }

    /// Where images of questions go.
    pub fn questions(&self) -> PathBuf {
        self.root.join("questions")
    }

    /// The folder of one job.
    pub fn job(&self, key: &JobKey) -> JobDir {
        let kind = key.kind.to_string().to_lowercase();
        // A kind has no dot, so a namespace before one cannot be mistaken for anything else.
        let prefix = match key.namespace.as_str() {
            DEFAULT_NAMESPACE => String::new(),
            namespace => format!("{namespace}."),
        };
        JobDir { root: self.root.join("jobs").join(format!("{prefix}{kind}-{}", key.name)) }
    }

    /// Takes the folder for this process, creating it where needed.
    ///
    /// # Errors
    /// [`StateError::Locked`] when another process has it.
    pub fn lock(&self) -> Result<Lock, StateError> {
        create_folder(&self.root)?;
        let path = self.root.join("lock");
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(StateError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // Not knowing who holds it is no reason to say anything else than that it is held.
                let _ = file.read_to_string(&mut pid);
                let pid = pid.trim();
                return Err(StateError::Locked {
                    folder: self.root.clone(),
                    pid: if pid.is_empty() { "?" } else { pid }.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(StateError::Io { action: "lock", path, source }),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(StateError::io("write", &path))?;
        Ok(Lock { _file: file })
    }
}

/// The folder of one job.
#[derive(Debug, Clone)]
pub struct JobDir {
    root: PathBuf,
}

impl JobDir {
    /// Configuration files, mounted as "config".
    pub fn config(&self) -> PathBuf {
        self.root.join("config")
    }

    /// The temporary folder of one process.
    pub fn scratch(&self, process: &str) -> PathBuf {
        self.root.join("scratch").join(process)
    }

    /// Removes the temporary folders of all processes. Leaving some is harmless: the next run removes them.
    pub fn clear_scratch(&self) {
        let _ = std::fs::remove_dir_all(self.root.join("scratch"));
    }

    /// The log of one process.
    pub fn log(&self, process: &str) -> PathBuf {
        self.root.join("logs").join(format!("{process}.log"))
    }

    /// Where the job writes its result.
    pub fn result(&self) -> PathBuf {
        self.root.join("result.json")
    }

    fn record_path(&self) -> PathBuf {
        self.root.join("state.json")
    }

    /// Empties the logs and the temporary folders, and writes the configuration files.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn prepare(&self, files: &BTreeMap<String, String>) -> Result<(), StateError> {
        let (config, logs) = (self.config(), self.root.join("logs"));
        self.clear_scratch();
        for folder in [&config, &logs] {
            if folder.exists() {
                std::fs::remove_dir_all(folder).map_err(StateError::io("empty", folder))?;
            }
            create_folder(folder)?;
        }
        for (name, text) in files {
            atomic::write(config.join(name), text)?;
        }
        Ok(())
    }

    /// The record of the last run, if there is one that this version understands.
    pub fn record(&self) -> Option<JobRecord> {
        serde_json::from_slice(&std::fs::read(self.record_path()).ok()?).ok()
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn set_record(&self, record: &JobRecord) -> Result<(), StateError> {
        let path = self.record_path();
        let bytes = serde_json::to_vec_pretty(record).map_err(|error| StateError::io("write", &path)(error.into()))?;
        Ok(atomic::write(path, bytes)?)
    }
}

/// What is remembered of a job's last run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobRecord {
    /// How far the run came.
    pub phase: Phase,
    /// What the run depended on; see [`crate::local::reuse`].
    pub inputs: BTreeMap<String, String>,
    /// Attempts that were made, one when nothing failed.
    pub attempts: u32,
    /// Wall time of the run.
    pub seconds: f64,
    /// Final measurements.
    pub metrics: BTreeMap<String, f64>,
    /// The artifact it wrote.
    pub artifact: Option<ArtifactResult>,
    /// The gate's verdict.
    pub gate: Option<GateResult>,
}

impl JobRecord {
    /// The record of a run that begins.
    pub fn started(inputs: BTreeMap<String, String>) -> Self {
        let (metrics, artifact, gate) = Default::default();
        Self { phase: Phase::Running, inputs, attempts: 0, seconds: 0.0, metrics, artifact, gate }
    }

    /// Notes how the run ended.
    pub fn finish(&mut self, phase: Phase, attempts: u32, result: Option<&RunResult>) {
        (self.phase, self.attempts) = (phase, attempts);
        if let Some(result) = result.cloned() {
            self.seconds = result.seconds;
            self.metrics = result.metrics;
            self.artifact = result.artifact;
            self.gate = result.gate;
        }
    }
}

/// How far a run came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// It was started, and has not been seen to end.
    Running,
    /// It did what it should.
    Succeeded,
    /// It did not.
    Failed,
}

/// Creates a folder and those above it.
///
/// # Errors
/// When the system refuses.
pub fn create_folder(path: &Path) -> Result<(), StateError> {
    std::fs::create_dir_all(path).map_err(StateError::io("create", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_folder_belongs_to_one_run_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(&dir.path().join("state")).unwrap();
        let lock = state.lock().unwrap();
        let error = state.lock().unwrap_err();
        let me = std::process::id().to_string();
        assert!(matches!(&error, StateError::Locked { pid, .. } if *pid == me), "{error}");
        assert!(error.to_string().contains(&format!("(process {me})")));
        drop(lock);
        state.lock().unwrap();
    }

    #[test]
    fn a_lock_file_of_a_dead_run_does_not_lock() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("lock"), "4194304000\n").unwrap();
        let _lock = StateDir::new(dir.path()).unwrap().lock().unwrap();
        let pid = std::fs::read_to_string(dir.path().join("lock")).unwrap();
        assert_eq!(pid.trim(), std::process::id().to_string());
    }

    #[test]
    fn a_record_survives_a_round_trip_and_garbage_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let job = JobDir { root: dir.path().join("trainingjob-vqa") };
        assert_eq!(job.record(), None);
        let record = JobRecord {
            phase: Phase::Succeeded,
            inputs: [("spec".to_owned(), "abc".to_owned())].into(),
            attempts: 2,
            seconds: 1.5,
            metrics: [("vqa_accuracy".to_owned(), 0.98)].into(),
            artifact: None,
            gate: None,
        };
        job.set_record(&record).unwrap();
        assert_eq!(job.record(), Some(record));
        std::fs::write(job.record_path(), "{").unwrap();
        assert_eq!(job.record(), None);
    }

    #[test]
    fn preparing_a_job_leaves_nothing_of_the_run_before() {
        let dir = tempfile::tempdir().unwrap();
        let job = JobDir { root: dir.path().join("job") };
        job.prepare(&[("old.json".to_owned(), "1".to_owned())].into()).unwrap();
        std::fs::write(job.log("worker-0"), "old").unwrap();
        job.prepare(&[("new.json".to_owned(), "2".to_owned())].into()).unwrap();
        assert!(!job.config().join("old.json").exists());
        assert!(!job.log("worker-0").exists());
        assert_eq!(std::fs::read_to_string(job.config().join("new.json")).unwrap(), "2");
    }
}

//! Checkpoints: a folder per saved step that appears whole or not at all.
//!
//! `ROOT/step-000000250/{state.safetensors,index.json}`. The index holds the digest of every file and is checked before
//! anything is used. Parameters and optimiser moments are stored by name and whole, so a checkpoint does not depend on
//! how many workers wrote it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use sensorium_artifact::{ArtifactError, Digest, atomic};
use sensorium_model::{HostTensor, Weights};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

const STATE: &str = "state.safetensors";
const INDEX: &str = "index.json";

/// Everything that a run needs to go on as if it had never stopped. Data order and augmentation are functions of the
/// step, so the step is their cursor.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingState {
    /// Updates that are done.
    pub step: u64,
    /// Time spent training so far, in seconds.
    pub seconds: f64,
    /// Parameters.
    pub values: Weights,
    /// AdamW's running mean of the gradient.
    pub mean: Weights,
    /// AdamW's running mean of the gradient's square.
    pub square: Weights,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    step: u64,
    spec_hash: String,
    seconds: f64,
    files: Vec<IndexedFile>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IndexedFile {
    path: String,
    bytes: u64,
    digest: Digest,
}

/// The checkpoints of one run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    root: PathBuf,
    /// Of the job with this spec, whatever it works with.
    vocabularies: PathBuf,
    spec_hash: String,
    keep: usize,
}

impl Checkpoints {
    /// Those of the job with this spec, under `folder`. A job whose spec has changed starts anew beside the old ones.
    pub fn new(folder: &Path, spec_hash: &str, keep: u32) -> Self {
        let root = folder.join(short(spec_hash));
        Self { vocabularies: root.clone(), root, spec_hash: spec_hash.to_owned(), keep: keep.max(1) as usize }
    }

    /// Those of a run that works with `inputs`, which a spec only names: data that was imported anew, or a model that was trained again, is
    /// another run beside the old one.
    #[must_use]
    pub fn of(self, inputs: &Digest) -> Self {
        let own = short(&inputs.to_string());
        let root = self.root.with_file_name(format!("{}-{own}", short(&self.spec_hash)));
        Self { root, ..self }
    }

    /// What tells these from those of runs that work with something else: a whole number.
    pub fn inputs(&self) -> f64 {
        let own = self.root.file_name().and_then(|name| name.to_str()?.rsplit_once('-')).map_or("", |(_, own)| own);
        u64::from_str_radix(own, 16).map_or(0.0, |number| number as f64)
    }

    /// Where the vocabulary of the data set with this digest is kept.
    pub fn vocabulary(&self, data: &str) -> PathBuf {
        self.vocabularies.join(format!("vocabulary-{}.json", short(data)))
    }

    /// Writes a checkpoint and removes the oldest beyond the number to keep. Saving a step twice changes nothing.
    ///
    /// # Errors
    /// A full disk, among others; every earlier checkpoint is then as it was.
    pub fn save(&self, state: &TrainingState) -> Result<PathBuf, TrainError> {
        let name = format!("step-{:09}", state.step);
        let dir = match atomic::Dir::create(&self.root, &name) {
            // One that was found to be damaged, and could not be put aside, is no checkpoint of this step.
            Err(ArtifactError::AlreadyExists { path }) => match self.load(&path) {
                Ok(_) => return Ok(path),
                Err(error) if !error.is_damage() => return Err(error),
                Err(_) => {
                    self.set_aside(state.step, &path)?;
                    atomic::Dir::create(&self.root, &name)?
                }
            },
            dir => dir?,
        };
        let bytes = encode(state).map_err(|reason| broken(&self.root.join(&name), reason))?;
        let index = Index {
            schema_version: 1,
            step: state.step,
            spec_hash: self.spec_hash.clone(),
            seconds: state.seconds,
            files: vec![IndexedFile { path: STATE.to_owned(), bytes: bytes.len() as u64, digest: Digest::of(&bytes) }],
        };
        let index = serde_json::to_vec_pretty(&index).map_err(|e| broken(dir.path(), e.to_string()))?;
        atomic::write(dir.file(STATE)?, &bytes)?;
        atomic::write(dir.file(INDEX)?, &index)?;
        let path = dir.commit()?;
        self.prune();
        Ok(path)
    }

    /// The newest checkpoint that is whole. A damaged one is reported and put aside, so that its step can be saved again.
    ///
    /// # Errors
    /// The system's, where it does not say what there is: what was reached is not given up for a disk that is away for a moment.
    pub fn newest(&self) -> Result<Option<TrainingState>, TrainError> {
        for (step, folder) in self.folders()?.into_iter().rev() {
            match self.load(&folder) {
                Ok(state) => return Ok(Some(state)),
                Err(error) if !error.is_damage() => return Err(error),
                Err(error) => {
                    tracing::warn!(step, error = &error as &dyn std::error::Error, "checkpoint not usable");
                    if let Err(error) = self.set_aside(step, &folder) {
                        tracing::warn!(step, error = &error as &dyn std::error::Error, "could not put it aside");
                    }
                }
            }
        }
        Ok(None)
    }

    /// Keeps a damaged checkpoint for whoever wants to know what became of it; the last one only.
    fn set_aside(&self, step: u64, folder: &Path) -> Result<(), TrainError> {
        let failed = |source| TrainError::CheckpointRead { path: folder.to_owned(), source };
        let aside = self.root.join("damaged");
        match fs::remove_dir_all(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => fs::create_dir(&aside).map_err(failed)?,
        }
        fs::rename(folder, aside.join(format!("step-{step:09}"))).map_err(failed)
    }

    fn load(&self, folder: &Path) -> Result<TrainingState, TrainError> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read(&path).map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => broken(folder, format!("{name} is missing")),
                _ => TrainError::CheckpointRead { path, source },
            })
        };
        let index: Index = serde_json::from_slice(&read(INDEX)?).map_err(|e| broken(folder, e.to_string()))?;
        if index.schema_version != 1 || index.spec_hash != self.spec_hash {
            let reason = format!("it is of spec {} (schema {})", index.spec_hash, index.schema_version);
            return Err(broken(folder, reason));
        }
        let mut state = None;
        for file in &index.files {
            let bytes = read(&file.path)?;
            let found = Digest::of(&bytes);
            if found != file.digest {
                let (folder, file) = (folder.to_owned(), file);
                return Err(TrainError::DigestMismatch {
                    folder,
                    file: file.path.clone(),
                    found,
                    expected: file.digest,
                });
            }
            if file.path == STATE {
                state = Some(decode(&bytes, &index).map_err(|reason| broken(folder, reason))?);
            }
        }
        state.ok_or_else(|| broken(folder, format!("its index names no {STATE}")))
    }

    /// Committed checkpoints, oldest first.
    fn folders(&self) -> Result<Vec<(u64, PathBuf)>, TrainError> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.and_then(Iterator::collect::<io::Result<Vec<_>>>),
        };
        let entries = entries.map_err(|source| TrainError::CheckpointRead { path: self.root.clone(), source })?;
        let mut folders: Vec<_> = entries
            .into_iter()
            .filter_map(|entry| {
                let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
                Some((step, entry.path()))
            })
            .collect();
        folders.sort();
        Ok(folders)
    }

    /// Failing to remove an old checkpoint costs space only, so it is reported and no more.
    fn prune(&self) {
        let folders = self.folders().unwrap_or_default();
        for (step, folder) in &folders[..folders.len().saturating_sub(self.keep)] {
            if let Err(error) = fs::remove_dir_all(folder) {
                tracing::warn!(step, %error, "could not remove an old checkpoint");
            }
        }
    }
}

fn broken(folder: &Path, reason: impl Into<String>) -> TrainError {
    TrainError::Checkpoint { folder: folder.to_owned(), reason: reason.into() }
}

/// Enough of a digest to tell a few apart, and short enough for a file name.
fn short(digest: &str) -> String {
    digest.trim_start_matches("sha256:").chars().take(12).collect()
}

const PARTS: [&str; 3] = ["values", "mean", "square"];

fn encode(state: &TrainingState) -> Result<Vec<u8>, String> {
    let mut buffers = Vec::new();
    for (part, weights) in PARTS.iter().zip([&state.values, &state.mean, &state.square]) {
        for (name, tensor) in weights {
            let bytes: Vec<u8> = tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect();
            let shape: Vec<usize> = tensor.shape.iter().map(|&n| n as usize).collect();
            buffers.push((format!("{part}/{name}"), shape, bytes));
        }
    }
    let views = buffers
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|error| error.to_string())?;
    serialize(views, &None::<HashMap<String, String>>).map_err(|error| error.to_string())
}

fn decode(bytes: &[u8], index: &Index) -> Result<TrainingState, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let mut parts = [Weights::new(), Weights::new(), Weights::new()];
    for (key, view) in file.tensors() {
        let (part, name) = key.split_once('/').ok_or_else(|| format!("unexpected tensor {key}"))?;
        let at = PARTS.iter().position(|known| *known == part).ok_or_else(|| format!("unexpected tensor {key}"))?;
        let data = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let shape = view.shape().iter().map(|&n| n as i64).collect();
        parts[at].insert(name.to_owned(), HostTensor { shape, data });
    }
    let [values, mean, square] = parts;
    Ok(TrainingState { step: index.step, seconds: index.seconds, values, mean, square })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(step: u64) -> TrainingState {
        let tensor = |x: f32| HostTensor { shape: vec![2, 2], data: vec![x, f32::MIN_POSITIVE, -0.0, 1e30] };
        let weights = |x| Weights::from([("a.weight".to_owned(), tensor(x)), ("b".to_owned(), tensor(-x))]);
        TrainingState { step, seconds: 1.5, values: weights(1.0), mean: weights(2.0), square: weights(3.0) }
    }

    #[test]
    fn what_was_saved_comes_back_to_the_bit_and_the_oldest_goes() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), "sha256:abc", 2);
        for step in [10, 20, 30] {
            checkpoints.save(&state(step)).unwrap();
        }
        assert_eq!(checkpoints.newest().unwrap(), Some(state(30)));
        assert_eq!(checkpoints.folders().unwrap().iter().map(|(step, _)| *step).collect::<Vec<_>>(), [20, 30]);
    }

    #[test]
    fn a_damaged_checkpoint_is_passed_over_for_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), "sha256:abc", 5);
        checkpoints.save(&state(10)).unwrap();
        let newest = checkpoints.save(&state(20)).unwrap();
        let mut bytes = fs::read(newest.join(STATE)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(newest.join(STATE), bytes).unwrap();
        let error = checkpoints.load(&newest).unwrap_err();
        assert!(matches!(error, TrainError::DigestMismatch { .. }), "{error}");
        assert_eq!(checkpoints.newest().unwrap(), Some(state(10)));
        checkpoints.save(&state(20)).unwrap();
        assert_eq!(checkpoints.newest().unwrap(), Some(state(20)));
    }

    #[test]
    fn a_disk_that_does_not_answer_is_no_damage_and_takes_nothing_away() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), "sha256:abc", 5);
        let saved = checkpoints.save(&state(10)).unwrap();
        // A folder in a file's place is not read, whoever asks.
        fs::rename(saved.join(STATE), saved.join("elsewhere")).unwrap();
        fs::create_dir(saved.join(STATE)).unwrap();
        let error = checkpoints.newest().unwrap_err();
        assert!(matches!(error, TrainError::CheckpointRead { .. }) && !error.is_users(), "{error}");
        fs::remove_dir(saved.join(STATE)).unwrap();
        fs::rename(saved.join("elsewhere"), saved.join(STATE)).unwrap();
        assert_eq!(checkpoints.newest().unwrap(), Some(state(10)));
        let file = Checkpoints { root: saved.join(STATE), ..checkpoints };
        assert!(matches!(file.newest().unwrap_err(), TrainError::CheckpointRead { .. }));
    }

    #[test]
    fn a_damaged_step_is_saved_again_and_the_last_damaged_one_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), "sha256:abc", 5);
        for _ in 0..2 {
            let saved = checkpoints.save(&state(10)).unwrap();
            fs::write(saved.join(STATE), b"damaged").unwrap();
        }
        checkpoints.save(&state(10)).unwrap();
        assert_eq!(checkpoints.newest().unwrap(), Some(state(10)));
        assert_eq!(fs::read(checkpoints.root.join("damaged/step-000000010").join(STATE)).unwrap(), b"damaged");
    }

    #[test]
    fn a_run_with_other_data_does_not_go_on_from_it() {
        let folder = tempfile::tempdir().unwrap();
        let of = |data: &[u8]| Checkpoints::new(folder.path(), "sha256:abc", 2).of(&Digest::of(data));
        of(b"one").save(&state(10)).unwrap();
        assert_eq!(of(b"other").newest().unwrap(), None);
        assert_eq!(of(b"one").newest().unwrap(), Some(state(10)));
        assert_eq!(of(b"one").vocabulary("d"), of(b"other").vocabulary("d"), "which is called after the data itself");
    }

    #[test]
    fn a_job_with_another_spec_does_not_go_on_from_it() {
        let folder = tempfile::tempdir().unwrap();
        Checkpoints::new(folder.path(), "sha256:abc", 2).save(&state(10)).unwrap();
        assert_eq!(Checkpoints::new(folder.path(), "sha256:def", 2).newest().unwrap(), None);
    }

    #[test]
    fn saving_a_step_twice_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), "sha256:abc", 2);
        assert_eq!(checkpoints.save(&state(10)).unwrap(), checkpoints.save(&state(10)).unwrap());
    }
}

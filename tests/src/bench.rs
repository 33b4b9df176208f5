//! A work bench: an empty folder with a little data, a state folder and the built programs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::command::{Finished, Running};

/// An empty folder to work in; it is removed with everything in it when this is dropped.
pub struct Bench {
    folder: TempDir,
    programs: PathBuf,
}

impl Bench {
    /// A new bench.
    ///
    /// # Errors
    /// When the programs have not been built.
    pub fn new() -> Result<Self> {
        let programs = std::env::var_os("SENSORIUM_BIN_DIR")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release"), PathBuf::from);
        for name in ["sensorium", "sensorium-trainer", "sensorium-server"] {
            let path = programs.join(name);
            ensure!(
                path.is_file(),
                "{} is not there: run `cargo build --release` first, or set SENSORIUM_BIN_DIR to where it is",
                path.display()
            );
        }
        Ok(Self { folder: TempDir::new()?, programs: programs.canonicalize()? })
    }

    /// The folder itself: the working directory of what is run.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The state folder.
    pub fn state(&self) -> PathBuf {
        self.path().join(".sensorium")
    }

    /// `sensorium ARGS...` in this folder, ready to be started.
    pub fn sensorium(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join("sensorium"));
        command.args(args).current_dir(self.path()).env("SENSORIUM_BIN_DIR", &self.programs);
        command.env_remove("SENSORIUM_STATE_DIR");
        command
    }

    /// Runs `sensorium ARGS...` to its end.
    ///
    /// # Errors
    /// When it cannot be started or takes longer than `limit`.
    pub fn run(&self, args: &[&str], limit: Duration) -> Result<Finished> {
        Running::start(self.sensorium(args))?.finish(limit)
    }

    /// Writes a file below the folder.
    ///
    /// # Errors
    /// When the disk says no.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().context("a path below the folder")?)?;
        Ok(fs::write(path, text)?)
    }

    /// Imports the first `train` and `test` images of easy-VQA, with all their questions, as pvc://datasets/easy-vqa.
    ///
    /// # Errors
    /// When the data is not there or the import fails.
    pub fn import_easy_vqa(&self, train: u64, test: u64) -> Result<()> {
        self.import_easy_vqa_where(train, test, |_| true)
    }

    /// The same with those questions that `keep` keeps.
    ///
    /// # Errors
    /// As [`Self::import_easy_vqa`].
    pub fn import_easy_vqa_where(&self, train: u64, test: u64, keep: impl Fn(&str) -> bool) -> Result<()> {
        let source = easy_vqa()?;
        let subset = self.path().join("easy-vqa");
        for (split, images) in [("train", train), ("test", test)] {
            fs::create_dir_all(subset.join(split))?;
            symlink(source.join(split).join("images"), subset.join(split).join("images"))?;
            let kept: Vec<Value> = rows(&source, split)?
                .into_iter()
                .filter(|row| row[2].as_u64().is_some_and(|id| id < images) && row[0].as_str().is_some_and(&keep))
                .collect();
            ensure!(!kept.is_empty(), "no such questions on the first {images} images of {split}");
            fs::write(subset.join(split).join("questions.json"), serde_json::to_vec(&kept)?)?;
        }
        fs::copy(source.join("answers.txt"), subset.join("answers.txt"))?;
        let from = subset.display().to_string();
        let finished = self.run(&["data", "import", "easy-vqa", "--from", &from], Duration::from_mins(1))?;
        finished.success().map(|_| ())
    }

    /// `count` of a split's questions that `keep` keeps, one per image: the image's file, the question, its answer.
    ///
    /// # Errors
    /// When the data is not there.
    pub fn easy_vqa_questions(
        &self,
        split: &str,
        count: usize,
        keep: impl Fn(&str) -> bool,
    ) -> Result<Vec<(PathBuf, String, String)>> {
        let source = easy_vqa()?;
        let mut found: Vec<(PathBuf, String, String)> = Vec::new();
        for row in rows(&source, split)? {
            let (Some(question), Some(answer), Some(id)) = (row[0].as_str(), row[1].as_str(), row[2].as_u64()) else {
                bail!("{row} is not a question, its answer and its image");
            };
            let image = source.join(split).join("images").join(format!("{id}.png"));
            if keep(question) && found.last().is_none_or(|(last, ..)| *last != image) {
                found.push((image, question.to_owned(), answer.to_owned()));
            }
            if found.len() == count {
                return Ok(found);
            }
        }
        bail!("{split} has only {} such questions", found.len())
    }

    /// The report of the last run.
    ///
    /// # Errors
    /// When there is none or it is not JSON.
    pub fn report(&self) -> Result<Value> {
        let path = self.state().join("report.json");
        Ok(serde_json::from_slice(&fs::read(&path).with_context(|| path.display().to_string())?)?)
    }

    /// Ids of all processes whose command line names this folder, which is all that were started for it. Zombies have
    /// no command line.
    pub fn processes(&self) -> Vec<u32> {
        let folder = self.path().display().to_string();
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let ids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        ids.filter(|id| {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&folder)
        })
        .collect()
    }

    /// Waits until `condition` holds.
    ///
    /// # Errors
    /// When it does not within `limit`; `what` says what was waited for.
    pub fn wait_for(&self, what: &str, limit: Duration, mut condition: impl FnMut(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !condition(self) {
            if Instant::now() > deadline {
                bail!("not within {} s: {what}", limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Names of the entries of a folder below the state folder; none when it is not there.
    pub fn entries(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.state().join(folder)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// Where `scripts/setup` put the data.
fn easy_vqa() -> Result<PathBuf> {
    let source = std::env::var("SENSORIUM_EASY_VQA").ok().or(option_env!("SENSORIUM_EASY_VQA").map(str::to_owned));
    Ok(PathBuf::from(source.context("SENSORIUM_EASY_VQA is not set: run scripts/setup")?))
}

fn rows(source: &Path, split: &str) -> Result<Vec<Value>> {
    Ok(serde_json::from_slice(&fs::read(source.join(split).join("questions.json"))?)?)
}

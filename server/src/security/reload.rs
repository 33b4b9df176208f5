//! Files that are read again when they change: certificates are renewed and tokens rotated without a restart.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sensorium_engine::FileStamp;
use sensorium_telemetry::error_line;
use tokio::sync::watch;

/// How often files are looked at. Renewals leave days of overlap.
const INTERVAL: Duration = Duration::from_secs(5);

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be used", path.display())]
pub struct ReloadError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl ReloadError {
    /// `path` cannot be used because of `source`.
    pub fn new(path: &Path, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { path: path.to_owned(), source: source.into() }
    }
}

/// What files say, as of lately. Clones are the same.
#[derive(Debug)]
pub struct Reloaded<T>(watch::Receiver<Arc<T>>);

impl<T> Clone for Reloaded<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Send + Sync + 'static> Reloaded<T> {
    /// Reads `files` with `read`, and again whenever one of them has another time of change. What cannot be read then is
    /// reported, and what was read before stays. Needs a Tokio runtime, whose task ends with the last clone.
    ///
    /// # Errors
    /// [`ReloadError`] when the first reading fails.
    pub fn watch(
        files: Vec<PathBuf>,
        read: impl Fn() -> Result<T, ReloadError> + Send + Sync + 'static,
    ) -> Result<Self, ReloadError> {
        Self::watch_every(INTERVAL, files, read)
    }

    fn watch_every(
        interval: Duration,
        files: Vec<PathBuf>,
        read: impl Fn() -> Result<T, ReloadError> + Send + Sync + 'static,
    ) -> Result<Self, ReloadError> {
        // Before reading: a change in between is then seen once too often, not missed.
        let mut seen = changes(&files);
        let (sender, receiver) = watch::channel(Arc::new(read()?));
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = sender.closed() => return,
                    () = tokio::time::sleep(interval) => {}
                }
                let now = changes(&files);
                if now == seen {
                    continue;
                }
                match read() {
                    Ok(value) => {
                        tracing::info!(?files, "read again after a change");
                        sender.send_replace(Arc::new(value));
                        seen = now;
                    }
                    // Perhaps half-written: tried again at the next look.
                    Err(error) => {
                        tracing::warn!(error = error_line(&error), "the files before stay in use");
                    }
                }
            }
        });
        Ok(Self(receiver))
    }

    /// What the files say now.
    pub fn get(&self) -> Arc<T> {
        self.0.borrow().clone()
    }
}

fn changes(files: &[PathBuf]) -> Vec<Option<FileStamp>> {
    files.iter().map(|file| FileStamp::at(file)).collect()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[tokio::test]
    async fn a_changed_file_is_read_again_and_a_broken_one_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("number");
        let write = |text: &str, age: u64| {
            std::fs::write(&file, text).unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(age);
            std::fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
        };
        write("1", 1);
        let path = file.clone();
        let read = move || {
            let text = std::fs::read_to_string(&path).map_err(|error| ReloadError::new(&path, error))?;
            text.parse::<u32>().map_err(|error| ReloadError::new(&path, error))
        };
        let number = Reloaded::watch_every(Duration::from_millis(2), vec![file.clone()], read).unwrap();
        assert_eq!(*number.get(), 1);
        write("x", 2);
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert_eq!(*number.get(), 1);
        write("3", 3);
        while *number.get() != 3 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        write("4", 3);
        while *number.get() != 4 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

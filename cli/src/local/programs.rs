//! Where the programs that jobs run are.

use std::path::PathBuf;

use sensorium_operator::plan::Program;

use crate::error::Error;

/// Folders with programs, the first match wins.
#[derive(Debug, Clone)]
pub struct Programs {
    folders: Vec<PathBuf>,
}

impl Programs {
    /// `SENSORIUM_BIN_DIR`; the folder of this very program, where a build or a package has put them all; `PATH`.
    pub fn from_env() -> Self {
        let chosen = std::env::var_os("SENSORIUM_BIN_DIR").map(PathBuf::from);
        let beside = std::env::current_exe().ok().and_then(|path| path.parent().map(PathBuf::from));
        let path = std::env::var_os("PATH").unwrap_or_default();
        Self::new(chosen.into_iter().chain(beside).chain(std::env::split_paths(&path)))
    }

    /// These folders.
    pub fn new(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { folders: folders.into_iter().collect() }
    }

    /// The path of a program.
    ///
    /// # Errors
    /// [`Error::ProgramMissing`] with the folders that were searched.
    pub fn find(&self, program: Program) -> Result<PathBuf, Error> {
        let name = program.binary();
        let found = self.folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
        found.ok_or_else(|| Error::ProgramMissing { program: name, looked_in: self.folders.clone() })
    }
}

//! What lies in a folder of Triton's layout: `REPOSITORY/MODEL/[config.pbtxt]/VERSION/FILE`.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use sensorium_engine::FileStamp;
use sensorium_proto::inference::model_version_policy::PolicyChoice;
use sensorium_proto::inference::{ModelConfig, model_version_policy::Latest};

use crate::files;

/// A model's folder, looked at without opening any model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
    /// Folders of versions by number.
    pub(super) versions: BTreeMap<u64, PathBuf>,
    /// The text of `config.pbtxt`, where there is one.
    pub(super) config: Option<String>,
}

/// The configuration's file.
const CONFIG: &str = "config.pbtxt";

/// The models in a repository, by name: its folders, but not hidden ones.
pub(super) fn models(repository: &Path) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut models = BTreeMap::new();
    for entry in fs::read_dir(repository)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // Through links, as a mounted ConfigMap has them.
        if !name.starts_with('.') && fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_dir()) {
            models.insert(name, entry.path());
        }
    }
    Ok(models)
}

/// Names of what lies in a folder, sorted; none where it cannot be read.
pub(super) fn contents(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Whether a client may call a model so: a name is one folder, and nothing else.
pub(super) fn is_model_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

impl Folder {
    /// Reads the configuration and lists the versions: folders whose name is a number without leading zeros.
    pub(super) fn read(path: &Path) -> io::Result<Self> {
        let config = match files::read_text(&path.join(CONFIG)) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(io::Error::new(error.kind(), format!("{CONFIG}: {error}"))),
        };
        let mut versions = BTreeMap::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let name = entry.file_name();
            let number = name.to_str().filter(|name| !name.starts_with('0')).and_then(|name| name.parse().ok());
            if let Some(number) = number.filter(|_| fs::metadata(entry.path()).is_ok_and(|found| found.is_dir())) {
                versions.insert(number, entry.path());
            }
        }
        Ok(Self { path: path.to_owned(), versions, config })
    }

    /// The versions that the policy chooses.
    ///
    /// # Errors
    /// None of the versions that the policy names is there.
    pub(super) fn chosen(&self, config: &ModelConfig) -> Result<BTreeMap<u64, PathBuf>, String> {
        let latest = PolicyChoice::Latest(Latest { num_versions: 1 });
        let policy = config.version_policy.as_ref().and_then(|policy| policy.policy_choice.as_ref()).unwrap_or(&latest);
        let found = &self.versions;
        match policy {
            PolicyChoice::All(_) => Ok(found.clone()),
            PolicyChoice::Latest(Latest { num_versions }) => {
                let count = (*num_versions).max(1) as usize;
                Ok(found.iter().rev().take(count).map(|(number, path)| (*number, path.clone())).collect())
            }
            PolicyChoice::Specific(specific) => {
                let entry = |version: &i64| found.get_key_value(&u64::try_from(*version).ok()?);
                let there = specific.versions.iter().filter_map(entry);
                let there: BTreeMap<u64, PathBuf> = there.map(|(number, path)| (*number, path.clone())).collect();
                let missing: Vec<_> =
                    specific.versions.iter().filter(|version| entry(version).is_none()).map(i64::to_string).collect();
                if !missing.is_empty() {
                    let known: Vec<_> = found.keys().map(u64::to_string).collect();
                    let (missing, known) = (missing.join(", "), known.join(", "));
                    let reason = format!(
                        "its version_policy names version {missing}, which is not in the folder; it has {known}"
                    );
                    if there.is_empty() {
                        return Err(reason);
                    }
                    // The others serve, as with Triton.
                    tracing::warn!(folder = %self.path.display(), reason);
                }
                Ok(there)
            }
        }
    }
}

/// A number that changes when a file below `path` comes, goes, or is written to. It is stable over restarts of nothing:
/// only values of one process compare.
pub(super) fn fingerprint(path: &Path) -> io::Result<u64> {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    fn visit(path: &Path, above: &[(u64, u64)], hasher: &mut DefaultHasher) -> io::Result<()> {
        let mut entries = fs::read_dir(path)?.collect::<Result<Vec<_>, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            entry.file_name().hash(hasher);
            let metadata = match fs::metadata(entry.path()) {
                Ok(metadata) => metadata,
                // A link that leads nowhere, such as the lock of an editor, or a file that went since the folder was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    "nothing".hash(hasher);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let own = (metadata.dev(), metadata.ino());
            if metadata.is_dir() && above.contains(&own) {
                // A link that leads back up.
                "loop".hash(hasher);
            } else if metadata.is_dir() {
                visit(&entry.path(), &[above, &[own]].concat(), hasher)?;
            } else {
                FileStamp::from(&metadata).hash(hasher);
            }
        }
        "end".hash(hasher);
        Ok(())
    }
    let mut hasher = DefaultHasher::new();
    let own = fs::metadata(path)?;
    visit(path, &[(own.dev(), own.ino())], &mut hasher)?;
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use sensorium_proto::inference::{
        ModelVersionPolicy,
        model_version_policy::{All, Specific},
    };

    use super::*;

    fn folder(versions: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for version in versions {
            fs::create_dir(folder.path().join(version)).unwrap();
        }
        folder
    }

    fn chosen(folder: &Folder, policy: Option<PolicyChoice>) -> Result<Vec<u64>, String> {
        let version_policy = policy.map(|policy| ModelVersionPolicy { policy_choice: Some(policy) });
        let config = ModelConfig { version_policy, ..ModelConfig::default() };
        folder.chosen(&config).map(|chosen| chosen.into_keys().collect())
    }

    #[test]
    fn versions_are_folders_with_plain_numbers() {
        let folder = folder(&["1", "10", "007", "0", "two", "2"]);
        fs::write(folder.path().join("3"), "a file").unwrap();
        let found = Folder::read(folder.path()).unwrap();
        assert_eq!(found.versions.keys().copied().collect::<Vec<_>>(), [1, 2, 10]);
        assert_eq!(found.config, None);
    }

    #[test]
    fn a_configuration_that_is_no_text_is_named() {
        let folder = folder(&["1"]);
        fs::write(folder.path().join(CONFIG), b"\xff\xfen\0").unwrap();
        assert_eq!(Folder::read(folder.path()).unwrap_err().to_string(), "config.pbtxt: it is not UTF-8");
    }

    #[test]
    fn the_policy_chooses_versions_and_the_latest_is_the_default() {
        let folder = folder(&["1", "2", "10"]);
        let found = Folder::read(folder.path()).unwrap();
        assert_eq!(chosen(&found, None).unwrap(), [10]);
        assert_eq!(chosen(&found, Some(PolicyChoice::Latest(Latest { num_versions: 2 }))).unwrap(), [2, 10]);
        assert_eq!(chosen(&found, Some(PolicyChoice::All(All {}))).unwrap(), [1, 2, 10]);
        let specific = |versions: &[i64]| Some(PolicyChoice::Specific(Specific { versions: versions.to_vec() }));
        assert_eq!(chosen(&found, specific(&[2])).unwrap(), [2]);
        assert_eq!(chosen(&found, specific(&[2, 3])).unwrap(), [2], "those that are there serve");
        let error = chosen(&found, specific(&[3, 4])).unwrap_err();
        assert_eq!(error, "its version_policy names version 3, 4, which is not in the folder; it has 1, 2, 10");
    }

    #[test]
    fn the_fingerprint_changes_with_any_file() {
        let folder = folder(&["1"]);
        let file = folder.path().join("1/model.onnx");
        let empty = fingerprint(folder.path()).unwrap();
        fs::write(&file, "a").unwrap();
        let one = fingerprint(folder.path()).unwrap();
        fs::write(&file, "ab").unwrap();
        let two = fingerprint(folder.path()).unwrap();
        assert_eq!(two, fingerprint(folder.path()).unwrap());
        assert!(empty != one && one != two);
        // Weights that were trained anew, which keep their size, and their time where they are copied with it.
        let time = fs::metadata(&file).unwrap().modified().unwrap();
        fs::write(&file, "cd").unwrap();
        fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
        let written = fingerprint(folder.path()).unwrap();
        assert_ne!(written, two, "written to");
        let new = folder.path().join("1/new");
        fs::write(&new, "ef").unwrap();
        fs::File::options().write(true).open(&new).unwrap().set_modified(time).unwrap();
        fs::rename(&new, &file).unwrap();
        let two = fingerprint(folder.path()).unwrap();
        assert_ne!(two, written, "replaced");
        std::os::unix::fs::symlink("nowhere", folder.path().join(".#config.pbtxt")).unwrap();
        assert_ne!(fingerprint(folder.path()).unwrap(), two, "a link to nothing is no error");
        for name in ["up", "up too"] {
            std::os::unix::fs::symlink("..", folder.path().join("1").join(name)).unwrap();
        }
        fingerprint(folder.path()).expect("links that lead back up are no end of folders");
    }

    #[test]
    fn a_name_is_one_folder() {
        assert!(is_model_name("resnet-50.v2"));
        for name in ["", "..", ".hidden", "a/b", "a\\b"] {
            assert!(!is_model_name(name), "{name:?}");
        }
    }
}

//! Which claims a job's locations live on, and how its programs are told.

use std::collections::BTreeMap;

use super::template::{Part, Template};
use super::workload::{Mount, MountSource};

/// The claims that a role touches, and whether it only reads them.
#[derive(Debug, Default)]
pub(super) struct Claims(BTreeMap<String, Access>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Access {
    Read,
    Write,
}

impl Claims {
    /// The role reads from `location`. Only `pvc://CLAIM/PATH` needs a mount.
    pub(super) fn read(mut self, location: &str) -> Self {
        self.touch(location, Access::Read);
        self
    }

    /// The role writes to `location`.
    pub(super) fn write(mut self, location: &str) -> Self {
        self.touch(location, Access::Write);
        self
    }

    fn touch(&mut self, location: &str, access: Access) {
        if let Some(claim) = claim(location) {
            let entry = self.0.entry(claim.to_owned()).or_insert(access);
            *entry = access.max(*entry);
        }
    }

    /// What to mount: the claims, the plan's files, and a place for temporary files.
    pub(super) fn mounts(&self) -> Vec<Mount> {
        let fixed = [("config", MountSource::Config, true), ("scratch", MountSource::Scratch, false)]
            .map(|(name, source, read_only)| Mount { name: name.to_owned(), source, read_only });
        let claims = self.0.iter().map(|(claim, access)| Mount {
            name: mount_name(claim),
            source: MountSource::Claim(claim.clone()),
            read_only: *access == Access::Read,
        });
        fixed.into_iter().chain(claims).collect()
    }

    /// `--volume CLAIM=DIR` for each claim.
    pub(super) fn volume_args(&self) -> impl Iterator<Item = Template> {
        self.0.keys().flat_map(|claim| {
            let value = [Part::Text(format!("{claim}=")), Part::MountPath(mount_name(claim))];
            [Template::text("--volume"), Template::new(value)]
        })
    }
}

/// In a folder of their own, so that a claim called `config` is not mistaken for the plan's files.
fn mount_name(claim: &str) -> String {
    format!("volumes/{claim}")
}

fn claim(location: &str) -> Option<&str> {
    location.strip_prefix("pvc://")?.split('/').next().filter(|claim| !claim.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_read_only_unless_something_is_written_to_it() {
        let claims = Claims::default()
            .read("pvc://datasets/a")
            .read("pvc://artifacts")
            .write("pvc://artifacts/b")
            .read("pvc://artifacts/c");
        let read_only: Vec<_> = claims.mounts().into_iter().map(|mount| (mount.name, mount.read_only)).collect();
        assert_eq!(
            read_only,
            [
                ("config".to_owned(), true),
                ("scratch".to_owned(), false),
                ("volumes/artifacts".to_owned(), false),
                ("volumes/datasets".to_owned(), true),
            ]
        );
    }

    #[test]
    fn only_claims_are_mounted() {
        let claims = Claims::default().read("s3://bucket/prefix").write("file:///tmp/out");
        assert_eq!(claims.mounts().len(), 2);
        assert_eq!(claims.volume_args().count(), 0);
    }
}

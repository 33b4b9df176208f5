//! How files of the node appear in a pod: bind mounts.
//!
//! The kernel's table of mounts also tells which artifacts are in use, whoever made the mounts and however often this process
//! was started since.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

use crate::Failure;

/// The table of this process's mounts.
const TABLE: &str = "/proc/self/mountinfo";
/// Nothing of an artifact is to be run, or to be a device.
const FLAGS: MountFlags =
    MountFlags::RDONLY.union(MountFlags::NOSUID).union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Shows artifacts to pods.
#[derive(Clone, Debug)]
pub struct Mounts {
    /// The artifacts' folder once more, read-only.
    pub(crate) view: PathBuf,
    /// Where the kubelet keeps what belongs to pods.
    pub(crate) pods: PathBuf,
}

/// One line of the table.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// The folder that is seen, within its file system.
    root: PathBuf,
    /// Where.
    target: PathBuf,
}

impl Mounts {
    /// Shows folders of `artifacts` at places below `pods`.
    ///
    /// A mount is made read-only after it was made, and the kubelet, to which a mount here is copied as it appears, would
    /// keep a writable one. So there is a read-only view of all artifacts first, and copies of a part of it are what it is.
    ///
    /// # Errors
    /// [`Failure::Node`]: mostly because this is not root, or not in a mount namespace of its own.
    pub fn prepare(artifacts: &Path, view: &Path, pods: &Path) -> Result<Self, Failure> {
        let failed = |error| Failure::io("mount", view, &error);
        fs::create_dir_all(view).map_err(failed)?;
        let (view, pods) = (view.canonicalize().map_err(failed)?, pods.to_owned());
        while table().map_err(failed)?.iter().any(|mount| mount.target == view) {
            unmount(&view, UnmountFlags::DETACH).map_err(|error| failed(error.into()))?;
        }
        mount_bind(artifacts, &view).map_err(|error| failed(error.into()))?;
        mount_remount(&view, MountFlags::BIND.union(FLAGS), c"").map_err(|error| failed(error.into()))?;
        Ok(Self { view, pods })
    }

    /// Shows the artifact `key` at `target`. Blocks.
    ///
    /// # Errors
    /// [`Failure::Invalid`] for a target that is not a pod's, [`Failure::Node`].
    pub fn publish(&self, key: &str, target: &Path) -> Result<(), Failure> {
        self.check(target)?;
        let failed = |error| Failure::io("mount", target, &error);
        if let Some(mount) = table().map_err(failed)?.into_iter().rfind(|mount| mount.target == target) {
            if mount.root.ends_with(key) {
                return Ok(()); // asked for a second time
            }
            unmount(target, UnmountFlags::NOFOLLOW).map_err(|error| failed(error.into()))?;
        }
        fs::create_dir_all(target).map_err(failed)?;
        mount_bind(self.view.join(key), target).map_err(|error| failed(error.into()))?;
        let flags = statvfs(target).map_err(|error| failed(error.into()))?.f_flag;
        if !flags.contains(StatVfsMountFlags::RDONLY) {
            self.unpublish(target)?;
            return Err(Failure::Node(format!("the mount at {} would be writable", target.display())));
        }
        Ok(())
    }

    /// Takes what is shown at `target` away, and the target. What is not there is no error. Blocks.
    ///
    /// # Errors
    /// As [`Mounts::publish`].
    pub fn unpublish(&self, target: &Path) -> Result<(), Failure> {
        self.check(target)?;
        let failed = |error| Failure::io("unmount", target, &error);
        match unmount(target, UnmountFlags::NOFOLLOW) {
            // Not mounted; not there.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(failed(error.into())),
        }
        match fs::remove_dir(target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }

    fn check(&self, target: &Path) -> Result<(), Failure> {
        let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
        let below = target.strip_prefix(&self.pods).ok();
        if below.is_some_and(|below| below.components().next().is_some() && below.components().all(plain)) {
            return Ok(());
        }
        Err(Failure::Invalid(format!("{} is not below {}", target.display(), self.pods.display())))
    }
}

/// Names of the artifacts that are shown somewhere below `pods`.
///
/// # Errors
/// When the table cannot be read.
pub fn in_use(pods: &Path) -> io::Result<HashSet<String>> {
    let shown = table()?.into_iter().filter(|mount| mount.target.starts_with(pods));
    let names = shown.filter_map(|mount| Some(mount.root.file_name()?.to_str()?.to_owned()));
    Ok(names.collect())
}

fn table() -> io::Result<Vec<Mount>> {
    Ok(fs::read_to_string(TABLE)?.lines().filter_map(parse).collect())
}

/// proc(5): id, parent, device, root, target, and more.
fn parse(line: &str) -> Option<Mount> {
    let mut fields = line.split(' ').skip(3);
    Some(Mount { root: unescaped(fields.next()?).into(), target: unescaped(fields.next()?).into() })
}

/// Spaces and the like are written as `\040`.
fn unescaped(field: &str) -> String {
    let mut text = String::new();
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        text.push_str(before);
        if let Some(code) = after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            text.push(char::from(code));
            rest = &after[3..];
        } else {
            text.push('\\');
            rest = after;
        }
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_table_has_a_folder_and_a_place() {
        let line = r"613 29 254:1 /var/lib/cache/artifacts/ab /var/lib/my\040pods/x/mount ro,nosuid shared:1 - ext4 /dev/vda rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.root, Path::new("/var/lib/cache/artifacts/ab"));
        assert_eq!(mount.target, Path::new("/var/lib/my pods/x/mount"));
        assert_eq!(unescaped(r"a\b"), r"a\b");
        assert!(!table().unwrap().is_empty());
    }

    #[test]
    fn only_places_of_pods_are_touched() {
        let mounts = Mounts { view: "/view".into(), pods: "/pods".into() };
        for target in ["/etc", "/pods", "/pods/../etc", "pods/a", "/podsx/a", ""] {
            assert!(matches!(mounts.unpublish(Path::new(target)), Err(Failure::Invalid(_))), "{target}");
        }
    }
}

//! How much memory this process may use.

use std::{fs, path::Path};

/// Where control groups are mounted.
const GROUPS: &str = "/sys/fs/cgroup";
/// What is assumed where the system does not say.
const UNKNOWN: u64 = 4 << 30;

/// Bytes that the machine has, or less where a control group bounds this process.
pub(super) fn available() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limits(&groups, Path::new(GROUPS));
    machine.into_iter().chain(limits).min().unwrap_or(UNKNOWN)
}

/// `MemTotal` of `/proc/meminfo`.
fn total(meminfo: &str) -> Option<u64> {
    let kilobytes = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix(" kB")?;
    kilobytes.parse::<u64>().ok()?.checked_mul(1024)
}

/// The bounds of the groups that `/proc/self/cgroup` names, and of those above them; both versions of control groups.
fn limits(groups: &str, mount: &Path) -> Vec<u64> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => (mount.to_owned(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => (mount.join("memory"), "memory.limit_in_bytes"),
            _ => continue,
        };
        // In a container the path may be that of the host, and only the root is there.
        let own = root.join(path.trim_start_matches('/'));
        for folder in own.ancestors().take_while(|folder| folder.starts_with(&root)) {
            // "max" is no number, and no bound.
            found.extend(fs::read_to_string(folder.join(file)).ok().and_then(|text| text.trim().parse::<u64>().ok()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_of_all_groups_above_are_found() {
        let mount = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = mount.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("pods/memory.max", "3000\n");
        write("pods/one/memory.max", "max\n");
        write("memory/old/memory.limit_in_bytes", "2000\n");
        assert_eq!(limits("0::/pods/one\n", mount.path()), [3000]);
        assert_eq!(limits("4:cpu,memory:/old\n3:pids:/old\n", mount.path()), [2000]);
        assert_eq!(limits("0::/../elsewhere\nnonsense", mount.path()), [0; 0]);
        assert_eq!(total("MemTotal:       16 kB\nMemFree: 1 kB"), Some(16384));
        assert!(available() > 1 << 20);
    }
}

//! How many files this process may have open: each connection is one.

use std::{io, num::NonZeroU32};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files that are left for everything else at least: models that are read, shared memory, other servers that are called.
const OTHERS: u64 = 64;

/// Connections that leave an eighth of what may be open, and [`OTHERS`] at least, for everything else.
pub(super) fn connections() -> NonZeroU32 {
    share(getrlimit(Resource::Nofile).current)
}

/// The most connections that this process can be let have by [`make_room_for`].
pub(super) fn most_connections() -> NonZeroU32 {
    share(getrlimit(Resource::Nofile).maximum)
}

/// Lets this process open as many files as so many connections take with everything else. The limit that others find is a
/// low one for the sake of programs that still call select(); this is none of them.
///
/// # Errors
/// What the system says, which it does for more than [`most_connections`].
pub(super) fn make_room_for(connections: NonZeroU32) -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let needed = files(connections);
    if current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum })?)
}

/// Of a limit on open files; `None` is no limit.
fn share(files: Option<u64>) -> NonZeroU32 {
    let files = files.unwrap_or(u64::MAX);
    let share = files - (files / 8).max(OTHERS).min(files);
    u32::try_from(share).map_or(NonZeroU32::MAX, |share| NonZeroU32::new(share).unwrap_or(NonZeroU32::MIN))
}

/// The least limit on open files whose share is so many connections.
fn files(connections: NonZeroU32) -> u64 {
    let connections = u64::from(connections.get());
    // An eighth of the files is a seventh of the connections, and the eighth is rounded down.
    connections + (connections.saturating_sub(1) / 7).max(OTHERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eighth_of_the_files_is_left_for_other_things() {
        let shares = [Some(1024), Some(100), Some(3), Some(1 << 20), None].map(|files| share(files).get());
        assert_eq!(shares, [896, 36, 1, 917_504, u32::MAX]);
    }

    #[test]
    fn the_files_of_some_connections_are_just_enough_for_them() {
        for connections in (1..2000).chain([917_504, u32::MAX - 1]).filter_map(NonZeroU32::new) {
            let files = files(connections);
            assert_eq!(share(Some(files)), connections, "{files} files");
            assert!(connections == NonZeroU32::MIN || share(Some(files - 1)) < connections, "{files} files are enough");
        }
    }
}

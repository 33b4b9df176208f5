//! How many files this process may have open: each connection is one.

use std::num::NonZeroU32;

use rustix::process::{Resource, getrlimit};

/// Connections that leave room for everything else: models that are read, shared memory, other servers that are called. An
/// eighth of what may be open, and 64 at least.
pub(super) fn connections() -> NonZeroU32 {
    share(getrlimit(Resource::Nofile).current)
}

/// Of a limit on open files; `None` is no limit.
fn share(files: Option<u64>) -> NonZeroU32 {
    let files = files.unwrap_or(u64::MAX);
    let share = files - (files / 8).max(64).min(files);
    u32::try_from(share).map_or(NonZeroU32::MAX, |share| NonZeroU32::new(share).unwrap_or(NonZeroU32::MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eighth_of_the_files_is_left_for_other_things() {
        let shares = [Some(1024), Some(100), Some(3), Some(1 << 20), None].map(|files| share(files).get());
        assert_eq!(shares, [896, 36, 1, 917_504, u32::MAX]);
    }
}

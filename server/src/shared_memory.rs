//! Regions of POSIX shared memory that clients on this machine register, and tensors in them.
//!
//! On Linux, shared memory by name is a file in `/dev/shm`, which is read and written here as any file is: a copy, as a
//! message would be, but without the wire. A client that changes or truncates its region at a bad moment gets a wrong
//! answer or an error, and harms nothing else, which a mapping could not promise.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;

use crate::{
    blocking::in_place,
    budget::{Budget, Spent, Taken},
};

/// Regions at most, each an open file.
const MAX_REGIONS: usize = 1024;
/// Bytes of a region's name at most.
const MAX_NAME: usize = 255;

/// A part of a registered region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The name that the region was registered under.
    pub name: String,
    /// Where the part begins in it, in bytes.
    pub offset: u64,
    /// Its size in bytes.
    pub byte_size: u64,
}

/// What a client said when it registered a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// What requests call it.
    pub name: String,
    /// The name of the shared memory object, as given to `shm_open`.
    pub key: String,
    /// Where the region begins in the object, in bytes.
    pub offset: u64,
    /// Its size in bytes.
    pub byte_size: u64,
}

/// Why shared memory could not be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SharedMemoryError {
    /// The operator does not allow it.
    #[error("this server does not use shared memory; start it with --shared-memory true, or send tensors in messages")]
    Off,
    /// No region of that name.
    #[error("there is no shared memory region {name:?}; register it first")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The name is taken.
    #[error("there is a shared memory region {name:?} already; unregister it first")]
    Exists {
        /// The name.
        name: String,
    },
    /// A name that none may have: it is kept for as long as the region.
    #[error("{name:?} is no name of a region; it has 1 to {MAX_NAME} bytes")]
    Name {
        /// As the client says.
        name: String,
    },
    /// No more regions.
    #[error("{MAX_REGIONS} shared memory regions are registered, which is the limit; unregister one")]
    Full,
    /// A tensor of more bytes than all requests may hold.
    #[error("the tensor has {size} bytes, and all requests together may hold {limit} (--max-inflight-bytes)")]
    TooLarge {
        /// Its bytes.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// Requests hold as many bytes as they may.
    #[error(transparent)]
    Spent(#[from] Spent),
    /// A key that names no shared memory.
    #[error("{key:?} is no name of shared memory; it is one file name, with or without a `/` before it")]
    Key {
        /// As the client says.
        key: String,
    },
    /// The object cannot be opened, read or written.
    #[error("shared memory {key:?}: {reason}")]
    Access {
        /// The object.
        key: String,
        /// The system's answer.
        reason: String,
    },
    /// A region that is not inside its object, or a tensor that is not inside its region.
    #[error("bytes {offset} to {offset} + {byte_size} are not inside {within}, which has {size} bytes")]
    Outside {
        /// First byte.
        offset: u64,
        /// How many.
        byte_size: u64,
        /// "shared memory KEY" or "region NAME".
        within: String,
        /// Its bytes.
        size: u64,
    },
}

/// All registered regions. Clones share them.
#[derive(Clone, Debug)]
pub struct SharedMemory {
    allowed: bool,
    /// What tensors are taken from while they are in this process.
    budget: Budget,
    folder: PathBuf,
    regions: Arc<RwLock<BTreeMap<String, Arc<Open>>>>,
}

/// What was read of a region.
struct Read {
    bytes: Vec<u8>,
    _taken: Taken,
}

impl AsRef<[u8]> for Read {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A part of a region, whatever becomes of the region's name meanwhile.
#[derive(Clone, Debug)]
pub struct Held {
    region: Region,
    open: Arc<Open>,
    /// Where it begins in the object.
    at: u64,
}

impl Held {
    /// As it was asked for.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Puts `bytes` at its start.
    ///
    /// # Errors
    /// [`SharedMemoryError`].
    pub fn write(&self, bytes: &[u8]) -> Result<(), SharedMemoryError> {
        let Self { region, open, at } = self;
        let size = bytes.len() as u64;
        check(0, size, region.byte_size, || format!("region {:?}", region.name))?;
        // Writing past a file's end would make it larger, and take memory from the machine.
        let end = open.file.metadata().map_err(|error| access(&open.registration.key, &error))?.len();
        check(*at, size, end, || format!("shared memory {:?}", open.registration.key))?;
        in_place(bytes.len(), || open.file.write_all_at(bytes, *at))
            .map_err(|error| access(&open.registration.key, &error))
    }
}

#[derive(Debug)]
struct Open {
    registration: Registration,
    file: File,
}

impl SharedMemory {
    /// Without any region yet. Unless it is `allowed`, there will be none. What is read of them takes its part of `budget`.
    pub fn new(allowed: bool, budget: Budget) -> Self {
        Self { allowed, budget, folder: PathBuf::from("/dev/shm"), regions: Arc::default() }
    }

    /// With objects in a folder of a test's own.
    #[cfg(test)]
    pub(crate) fn in_folder(folder: &std::path::Path, budget: Budget) -> Self {
        Self { folder: folder.to_owned(), ..Self::new(true, budget) }
    }

    /// Whether clients may use it.
    pub fn is_allowed(&self) -> bool {
        self.allowed
    }

    /// Opens an object for requests to use.
    ///
    /// # Errors
    /// [`SharedMemoryError`].
    pub fn register(&self, registration: Registration) -> Result<(), SharedMemoryError> {
        if !self.allowed {
            return Err(SharedMemoryError::Off);
        }
        if registration.name.is_empty() || registration.name.len() > MAX_NAME {
            return Err(SharedMemoryError::Name { name: crate::wire::excerpt(&registration.name) });
        }
        let file = self.open(&registration)?;
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        if regions.contains_key(&registration.name) {
            return Err(SharedMemoryError::Exists { name: crate::wire::excerpt(&registration.name) });
        }
        if regions.len() == MAX_REGIONS {
            return Err(SharedMemoryError::Full);
        }
        regions.insert(registration.name.clone(), Arc::new(Open { registration, file }));
        Ok(())
    }

    fn open(&self, registration: &Registration) -> Result<File, SharedMemoryError> {
        let &Registration { ref key, offset, byte_size, .. } = registration;
        let file = key.strip_prefix('/').unwrap_or(key);
        // A path could lead out of the folder.
        if file.is_empty() || file.len() > 255 || file.contains(['/', '\0']) || file == "." || file == ".." {
            return Err(SharedMemoryError::Key { key: crate::wire::excerpt(key) });
        }
        let mut options = OpenOptions::new();
        // A link could, too; and a pipe would block.
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        options.read(true).write(true).custom_flags(flags.bits() as i32);
        let file = options.open(self.folder.join(file)).map_err(|error| access(key, &error))?;
        let metadata = file.metadata().map_err(|error| access(key, &error))?;
        if !metadata.is_file() {
            return Err(SharedMemoryError::Access { key: key.clone(), reason: "it is no shared memory".to_owned() });
        }
        check(offset, byte_size, metadata.len(), || format!("shared memory {key:?}"))?;
        Ok(file)
    }

    /// Forgets a region, or all of them without a name. One that does not exist is forgotten already.
    pub fn unregister(&self, name: Option<&str>) {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        match name {
            Some(name) => drop(regions.remove(name)),
            None => regions.clear(),
        }
    }

    /// The regions, or the one of that name.
    ///
    /// # Errors
    /// [`SharedMemoryError::Unknown`].
    pub fn status(&self, name: Option<&str>) -> Result<Vec<Registration>, SharedMemoryError> {
        if let Some(name) = name {
            return Ok(vec![self.find(name)?.registration.clone()]);
        }
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        Ok(regions.values().map(|open| open.registration.clone()).collect())
    }

    fn find(&self, name: &str) -> Result<Arc<Open>, SharedMemoryError> {
        if !self.allowed {
            return Err(SharedMemoryError::Off);
        }
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let unknown = || SharedMemoryError::Unknown { name: crate::wire::excerpt(name) };
        regions.get(name).cloned().ok_or_else(unknown)
    }

    /// Where `region` is, for something that will be written there later: its name may be another's by then.
    ///
    /// # Errors
    /// [`SharedMemoryError`].
    pub fn hold(&self, region: Region) -> Result<Held, SharedMemoryError> {
        let (open, at) = self.locate(&region)?;
        Ok(Held { region, open, at })
    }

    /// The bytes of `region` as they are now. They are held against the budget as long as anybody has them.
    ///
    /// # Errors
    /// [`SharedMemoryError`].
    pub fn read(&self, region: &Region) -> Result<Bytes, SharedMemoryError> {
        let (open, at) = self.locate(region)?;
        // Not larger than the object was when it was registered.
        let size = region.byte_size as usize;
        if size > self.budget.limit() {
            return Err(SharedMemoryError::TooLarge { size, limit: self.budget.limit() });
        }
        let taken = self.budget.claim(size)?;
        let bytes = in_place(size, || {
            let mut bytes = vec![0; size];
            open.file.read_exact_at(&mut bytes, at).map(|()| bytes)
        });
        let bytes = bytes.map_err(|error| access(&open.registration.key, &error))?;
        Ok(Bytes::from_owner(Read { bytes, _taken: taken }))
    }

    /// The open object, and where in it the bytes of `region` are.
    fn locate(&self, region: &Region) -> Result<(Arc<Open>, u64), SharedMemoryError> {
        let open = self.find(&region.name)?;
        check(region.offset, region.byte_size, open.registration.byte_size, || format!("region {:?}", region.name))?;
        let at = open.registration.offset + region.offset; // the sum of two offsets inside one file
        Ok((open, at))
    }
}

fn check(offset: u64, byte_size: u64, size: u64, within: impl FnOnce() -> String) -> Result<(), SharedMemoryError> {
    match offset.checked_add(byte_size) {
        Some(end) if end <= size => Ok(()),
        _ => Err(SharedMemoryError::Outside { offset, byte_size, within: within(), size }),
    }
}

fn access(key: &str, error: &io::Error) -> SharedMemoryError {
    SharedMemoryError::Access { key: key.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_empty_or_long_is_refused_in_few_words() {
        let memory = SharedMemory::new(true, Budget::new(1, crate::metrics::Metrics::new().budget()));
        for name in [String::new(), "n".repeat(MAX_NAME + 1), "n".repeat(1 << 20)] {
            let registration = Registration { name, key: "k".to_owned(), offset: 0, byte_size: 1 };
            let error = memory.register(registration).unwrap_err();
            assert!(matches!(error, SharedMemoryError::Name { .. }) && error.to_string().len() < 400, "{error}");
        }
    }

    /// For twenty bytes.
    fn budget() -> Budget {
        Budget::new(20, crate::metrics::Metrics::new().budget())
    }

    /// Shared memory in a folder of its own, with one object of 16 bytes.
    fn memory() -> (tempfile::TempDir, SharedMemory) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("object"), [7; 16]).unwrap();
        let memory = SharedMemory::in_folder(folder.path(), budget());
        (folder, memory)
    }

    fn registration(key: &str, offset: u64, byte_size: u64) -> Registration {
        Registration { name: "r".to_owned(), key: key.to_owned(), offset, byte_size }
    }

    fn part(offset: u64, byte_size: u64) -> Region {
        Region { name: "r".to_owned(), offset, byte_size }
    }

    #[test]
    fn tensors_are_read_and_written_at_the_offsets_of_region_and_tensor() {
        let (folder, memory) = memory();
        memory.register(registration("/object", 4, 8)).unwrap();
        memory.hold(part(2, 3)).unwrap().write(&[1, 2, 3]).unwrap();
        assert_eq!(std::fs::read(folder.path().join("object")).unwrap()[5..10], [7, 1, 2, 3, 7]);
        assert_eq!(memory.read(&part(1, 5)).unwrap()[..], [7, 1, 2, 3, 7]);
        assert_eq!(memory.status(None).unwrap(), [registration("/object", 4, 8)]);
        memory.unregister(Some("r"));
        memory.unregister(Some("r"));
        assert_eq!(memory.read(&part(0, 1)), Err(SharedMemoryError::Unknown { name: "r".to_owned() }));
    }

    #[test]
    fn what_is_read_takes_its_part_of_the_budget_as_long_as_anybody_has_it() {
        let (_folder, memory) = memory();
        memory.register(registration("object", 0, 16)).unwrap();
        let first = memory.read(&part(0, 16)).unwrap();
        let tensor = first.slice(4..8);
        drop(first);
        assert_eq!(memory.read(&part(0, 5)), Err(SharedMemoryError::Spent(Spent { held: 16, limit: 20 })));
        drop(tensor);
        memory.read(&part(0, 5)).unwrap();
    }

    #[test]
    fn nothing_outside_of_a_region_or_its_object_is_touched() {
        let (_folder, memory) = memory();
        for (offset, byte_size) in [(0, 17), (16, 1), (u64::MAX, 1), (1, u64::MAX)] {
            let error = memory.register(registration("object", offset, byte_size)).unwrap_err();
            assert!(matches!(error, SharedMemoryError::Outside { size: 16, .. }), "{error}");
        }
        memory.register(registration("object", 8, 4)).unwrap();
        for (offset, byte_size) in [(0, 5), (4, 1), (u64::MAX, 1), (1, u64::MAX)] {
            let error = memory.read(&part(offset, byte_size)).unwrap_err();
            assert!(matches!(error, SharedMemoryError::Outside { size: 4, .. }), "{error}");
        }
        assert!(memory.hold(part(2, 2)).unwrap().write(&[0; 3]).is_err());
    }

    #[test]
    fn only_names_of_shared_memory_are_opened() {
        let (folder, memory) = memory();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link")).unwrap();
        std::fs::create_dir(folder.path().join("folder")).unwrap();
        for key in ["", "/", ".", "..", "/../etc/passwd", "folder/object", "a\0b", &"x".repeat(300)] {
            let error = memory.register(registration(key, 0, 1)).unwrap_err();
            assert!(matches!(error, SharedMemoryError::Key { .. }), "{key}: {error}");
        }
        for key in ["link", "folder", "nothing"] {
            let error = memory.register(registration(key, 0, 1)).unwrap_err();
            assert!(matches!(error, SharedMemoryError::Access { .. }), "{key}: {error}");
        }
    }

    #[test]
    fn an_object_that_shrinks_is_an_error_and_does_not_grow_again() {
        let (folder, memory) = memory();
        memory.register(registration("object", 0, 16)).unwrap();
        File::options().write(true).open(folder.path().join("object")).unwrap().set_len(4).unwrap();
        assert!(matches!(memory.read(&part(0, 8)), Err(SharedMemoryError::Access { .. })));
        let held = memory.hold(part(0, 8)).unwrap();
        assert!(matches!(held.write(&[0; 8]), Err(SharedMemoryError::Outside { size: 4, .. })));
        assert_eq!(std::fs::metadata(folder.path().join("object")).unwrap().len(), 4);
    }

    #[test]
    fn what_is_held_stays_where_it_is_whatever_its_name_means_by_then() {
        let (folder, memory) = memory();
        std::fs::write(folder.path().join("other"), [7; 16]).unwrap();
        memory.register(registration("object", 0, 16)).unwrap();
        let held = memory.hold(part(0, 2)).unwrap();
        memory.unregister(None);
        memory.register(registration("other", 0, 16)).unwrap();
        held.write(&[1, 2]).unwrap();
        let content = |name| std::fs::read(folder.path().join(name)).unwrap();
        assert_eq!((content("object")[..3].to_vec(), content("other")), (vec![1, 2, 7], vec![7; 16]));
    }

    #[test]
    fn names_are_unique_and_the_operator_can_forbid_it_all() {
        let (_folder, memory) = memory();
        memory.register(registration("object", 0, 1)).unwrap();
        let again = memory.register(registration("object", 0, 1));
        assert_eq!(again, Err(SharedMemoryError::Exists { name: "r".to_owned() }));
        let off = SharedMemory::new(false, budget());
        assert_eq!(off.register(registration("object", 0, 1)), Err(SharedMemoryError::Off));
    }
}

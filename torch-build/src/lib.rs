//! How the build scripts of crates with a C++ shim compile it against libtorch and link it: once for all of them, so that
//! no two agree with different releases, and none is compiled against one that it was not written for.
//!
//! ```no_run
//! use sensorium_torch_build::Libtorch;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let libtorch = Libtorch::from_env()?;
//! libtorch.shim().try_compile("my_shim")?; // cpp/shim.cpp of the crate whose build script this is
//! libtorch.link();
//! # Ok(())
//! # }
//! ```
//!
//! Beside its own headers a shim finds `guarded.h` of this crate: no C++ exception may reach Rust, and what one said is kept
//! for the thread that asks.
//!
//! This is for build scripts only, and knows of no shim in particular.

use std::path::PathBuf;
use std::{env, fs};

/// The release whose headers the shims were written for; tch 0.24 wants the same.
const VERSION: &str = "2.11.0";

/// Headers that all shims share.
const SHARED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/cpp");

/// Why nothing can be built against libtorch.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum LibtorchError {
    /// Nobody said where it is.
    #[error(
        "LIBTORCH is not set; it names the folder of libtorch {VERSION} that holds include/ and lib/ (scripts/setup writes it)"
    )]
    Unset,
    /// The folder does not say which release it is.
    #[error("LIBTORCH={} has neither version.py nor build-version", folder.display())]
    Unknown {
        /// As `LIBTORCH` names it.
        folder: PathBuf,
    },
    /// Headers of c10d and TorchScript change from release to release.
    #[error("LIBTORCH={} is libtorch {found}, {VERSION} is needed", folder.display())]
    OtherVersion {
        /// As `LIBTORCH` names it.
        folder: PathBuf,
        /// What it says of itself.
        found: String,
    },
}

/// A libtorch of the right release.
#[derive(Debug)]
pub struct Libtorch {
    folder: PathBuf,
    /// The file that says its release.
    version_file: PathBuf,
}

impl Libtorch {
    /// The libtorch in `LIBTORCH`. The build script runs again when that becomes another one.
    ///
    /// # Errors
    /// All of [`LibtorchError`].
    pub fn from_env() -> Result<Self, LibtorchError> {
        println!("cargo:rerun-if-env-changed=LIBTORCH");
        let folder = env::var_os("LIBTORCH").ok_or(LibtorchError::Unset)?;
        let libtorch = Self::open(PathBuf::from(folder))?;
        println!("cargo:rerun-if-changed={}", libtorch.version_file.display());
        Ok(libtorch)
    }

    fn open(folder: PathBuf) -> Result<Self, LibtorchError> {
        // Of a wheel, and of a plain archive.
        let files = ["version.py", "build-version"].map(|name| folder.join(name));
        let read = |file: PathBuf| fs::read_to_string(&file).ok().map(|text| (file, text));
        let Some((version_file, text)) = files.into_iter().find_map(read) else {
            return Err(LibtorchError::Unknown { folder });
        };
        let found = release(&text);
        if found == VERSION {
            Ok(Self { folder, version_file })
        } else {
            let found = found.to_owned();
            Err(LibtorchError::OtherVersion { folder, found })
        }
    }

    /// What compiles `cpp/shim.cpp` of the crate whose build script calls it.
    pub fn shim(&self) -> cc::Build {
        println!("cargo:rerun-if-changed=cpp");
        println!("cargo:rerun-if-changed={SHARED}");
        let include = self.folder.join("include");
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++17")
            .file("cpp/shim.cpp")
            .include("cpp")
            .include(SHARED)
            // libtorch's own headers are not warning-free.
            .flag("-isystem")
            .flag(&include)
            .flag("-isystem")
            .flag(include.join("torch/csrc/api/include"))
            .flag("-Wno-unused-parameter")
            // How the wheel was built: the C++11 ABI of libstdc++.
            .define("_GLIBCXX_USE_CXX11_ABI", "1");
        build
    }

    /// Links the crate with libtorch, and gives its tests the path to find it when they run. To be called once the shim is
    /// compiled: a linker takes from a library what those before it want.
    pub fn link(&self) {
        let lib = self.folder.join("lib");
        println!("cargo:rustc-link-search=native={}", lib.display());
        println!("cargo:rustc-link-lib=dylib=torch_cpu");
        println!("cargo:rustc-link-lib=dylib=c10");
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
}

/// The release in a version file; what it was built for, behind a plus, is another matter.
fn release(text: &str) -> &str {
    let written = text.lines().find_map(|line| line.strip_prefix("__version__ = ")).unwrap_or(text);
    let version = written.trim().trim_matches(['\'', '"']);
    version.split_once('+').map_or(version, |(release, _)| release)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A folder with one file.
    fn folder_with(name: &str, text: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(name), text).unwrap();
        folder
    }

    fn open(folder: &Path) -> Result<PathBuf, LibtorchError> {
        Libtorch::open(folder.to_owned()).map(|libtorch| libtorch.version_file)
    }

    #[test]
    fn a_wheel_and_an_archive_of_the_release_are_taken_whatever_they_were_built_for() {
        for (name, text) in [
            ("version.py", "from typing import Optional\n__version__ = '2.11.0+cpu'\ndebug = False\n"),
            ("version.py", "__version__ = \"2.11.0\"\ncuda: Optional[str] = None\n"),
            ("build-version", "2.11.0+cu128\n"),
        ] {
            let folder = folder_with(name, text);
            assert_eq!(open(folder.path()), Ok(folder.path().join(name)), "{text}");
        }
    }

    #[test]
    fn another_release_is_refused_by_its_number() {
        for (name, text) in [("version.py", "__version__ = '2.11.1+cpu'\n"), ("build-version", "2.11.1")] {
            let folder = folder_with(name, text);
            let refused = LibtorchError::OtherVersion { folder: folder.path().to_owned(), found: "2.11.1".to_owned() };
            assert_eq!(open(folder.path()), Err(refused), "{text}");
        }
    }

    #[test]
    fn a_folder_that_is_no_libtorch_is_refused() {
        let folder = folder_with("README.md", "2.11.0");
        assert_eq!(open(folder.path()), Err(LibtorchError::Unknown { folder: folder.path().to_owned() }));
    }
}

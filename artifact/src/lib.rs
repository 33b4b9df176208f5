//! Model artifacts: immutable, content-addressed, traceable; stored in a folder or on S3.
//!
//! An artifact is a folder of files with a [`Manifest`], named by the digest of the manifest's bytes. The manifest has
//! the digest of every file, so the name covers everything: what was measured is what is served. A [`Store`] holds
//! artifacts and *names*, which point to one artifact each and may be moved ([`Store::promote`]).
//!
//! An artifact is either committed whole or not there: files are prepared aside, flushed, then renamed (a folder) or
//! sealed by a manifest that is uploaded last (S3). The module [`atomic`] has the same for single files and for folders
//! such as checkpoints.
//!
//! ```
//! use sensorium_artifact::{Format, Lineage, ManifestParts, Store, Volumes};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! # let folder = tempfile::tempdir()?;
//! let uri = format!("file://{}", folder.path().display());
//! let store = Store::open(&uri, &Volumes::default())?;
//!
//! let draft = store.draft()?;
//! std::fs::write(draft.path("graphs/fusion.onnx")?, b"...")?;
//! let parts = ManifestParts {
//!     name: "vqa".to_owned(),
//!     format: Format::Onnx,
//!     graphs: Vec::new(),
//!     pipeline: None,
//!     modalities: vec!["text".to_owned()],
//!     metrics: [("vqa_accuracy".to_owned(), 0.99)].into(),
//!     lineage: Lineage::default(),
//! };
//! let artifact = store.commit(draft, parts).await?;
//! store.promote("vqa", &artifact.digest).await?;
//!
//! let found = store.resolve("vqa").await?;
//! assert_eq!(found.digest, artifact.digest);
//! let files = store.fetch(&found, folder.path()).await?;
//! assert_eq!(std::fs::read(files.join("graphs/fusion.onnx"))?, b"...");
//! # Ok(()) })
//! # }
//! ```
//!
//! What this is not: a registry. There is no search and no access control; names are last-writer-wins.
//! Given up: sharing equal files between artifacts. They are small next to the data that made them, and a folder that
//! holds everything can be copied, mounted and inspected with ordinary tools.

pub mod atomic;
mod digest;
mod error;
mod location;
mod manifest;
mod mirror;
mod path;
mod store;

pub use digest::Digest;
pub use error::{ArtifactError, Mismatch};
pub use location::{Location, Volume, Volumes};
pub use manifest::{
    DType, FileEntry, Format, Graph, Lineage, LineageJob, MANIFEST_FILE, Manifest, ManifestParts, SCHEMA_VERSION,
    TensorSpec,
};
pub use mirror::Mirror;
pub use path::validate_name;
pub use store::{Artifact, Draft, Store};

//! A store under a prefix of an S3 bucket.
//!
//! S3 has no rename, so an artifact's manifest is uploaded last: before it is there, nothing else counts. Each request's
//! signature covers a digest of its body, so the server refuses bytes that were damaged on the way up.

use std::fmt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::aws::AmazonS3;
use object_store::path::Path as Key;
use object_store::{GetResult, ObjectStore, ObjectStoreExt, WriteMultipart};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::digest::Hasher;
use crate::error::Mismatch;
use crate::manifest::MANIFEST_FILE;
use crate::store::client::client;
use crate::store::local::LocalStore;
use crate::store::transfer::Transfer;
use crate::store::{Artifact, NAMES, OBJECTS, blocking, object_key};
use crate::{ArtifactError, Digest, FileEntry};

/// Size of one part of a multipart upload, in bytes. S3 wants 5 MiB at least and 10,000 parts at most: up to 80 GiB a file.
const PART_BYTES: usize = 8 * 1024 * 1024;

/// Bytes of a manifest, or of a name's record, at most: they are held in memory.
const LARGEST_RECORD: u64 = 16 * 1024 * 1024;

/// Parts under way at once: enough to fill a link of one Gbit/s, and 32 MiB of memory.
const PARTS_IN_FLIGHT: usize = 4;

#[derive(Clone)]
pub(crate) struct S3Store {
    client: AmazonS3,
    bucket: String,
    prefix: Key,
}

impl S3Store {
    /// `environment` gives the `AWS_*` variables: credentials, region, endpoint and the rest.
    pub(crate) fn new(
        bucket: String,
        prefix: &str,
        environment: impl Iterator<Item = (String, String)>,
    ) -> Result<Self, ArtifactError> {
        let (client, prefix) = client(&bucket, prefix, environment)?;
        Ok(Self { client, bucket, prefix })
    }

    pub(crate) async fn read(&self, key: &str) -> Result<Option<Vec<u8>>, ArtifactError> {
        let Some(result) = self.get(key).await? else { return Ok(None) };
        let size = result.meta.size;
        if size > LARGEST_RECORD {
            let reason = format!("it has {size} bytes, and a record may have {LARGEST_RECORD}");
            let error = object_store::Error::Generic { store: "S3", source: reason.into() };
            return Err(self.failed("download", &self.key(key), error));
        }
        let bytes = result.bytes().await.map_err(|source| self.failed("download", &self.key(key), source))?;
        Ok(Some(bytes.into()))
    }

    pub(crate) async fn write(&self, key: &str, bytes: Vec<u8>) -> Result<(), ArtifactError> {
        let key = self.key(key);
        let put = self.client.put(&key, bytes.into()).await;
        put.map(drop).map_err(|source| self.failed("upload", &key, source))
    }

    pub(crate) async fn delete(&self, key: &str) -> Result<(), ArtifactError> {
        self.delete_object(&self.key(key)).await
    }

    async fn delete_object(&self, key: &Key) -> Result<(), ArtifactError> {
        match self.client.delete(key).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.failed("remove", key, source)),
        }
    }

    /// Whether there is anything of an artifact.
    pub(crate) async fn has(&self, digest: &Digest) -> Result<bool, ArtifactError> {
        Ok(!self.objects(&self.key(&format!("{OBJECTS}/{}", digest.hex()))).await?.is_empty())
    }

    /// Removes the manifest, and then all that is left of an artifact.
    pub(crate) async fn remove(&self, digest: &Digest) -> Result<(), ArtifactError> {
        self.delete(&object_key(digest, MANIFEST_FILE)).await?;
        for object in self.objects(&self.key(&format!("{OBJECTS}/{}", digest.hex()))).await? {
            self.delete_object(&object).await?;
        }
        Ok(())
    }

    /// Uploads `files` from `folder`, then the manifest.
    ///
    /// Dropping the future leaves some files without a manifest, which no other call sees; the same commit overwrites
    /// them.
    pub(crate) async fn publish(
        &self,
        folder: &Path,
        digest: &Digest,
        files: &[FileEntry],
        bytes: Vec<u8>,
    ) -> Result<(), ArtifactError> {
        let manifest = object_key(digest, MANIFEST_FILE);
        let damaged = match self.get(&manifest).await? {
            None => None,
            Some(_) => Some(self.check(digest, files).await?),
        };
        if let Some(damaged) = &damaged {
            if damaged.is_empty() {
                return Ok(());
            }
            tracing::warn!(artifact = %digest, damaged = damaged.len(), "replacing what is damaged of an artifact by the same content");
        }
        let is_there = |file: &FileEntry| {
            damaged.as_ref().is_some_and(|damaged| damaged.iter().all(|mismatch| mismatch.path != file.path))
        };
        for file in files.iter().filter(|file| !is_there(file)) {
            self.upload(&folder.join(&file.path), &object_key(digest, &file.path), file.bytes).await?;
        }
        self.write(&manifest, bytes).await
    }

    async fn upload(&self, path: &Path, key: &str, size: u64) -> Result<(), ArtifactError> {
        let read_failed = |source| ArtifactError::io("read", path, source);
        if size <= PART_BYTES as u64 {
            let bytes = tokio::fs::read(path).await.map_err(read_failed)?;
            return self.write(key, bytes).await;
        }
        let key = self.key(key);
        let failed = |source| self.failed("upload", &key, source);
        let mut file = File::open(path).await.map_err(read_failed)?;
        let upload = self.client.put_multipart(&key).await.map_err(failed)?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        loop {
            let mut part = Vec::with_capacity(PART_BYTES);
            let sent = match (&mut file).take(PART_BYTES as u64).read_to_end(&mut part).await {
                Ok(0) => return upload.finish().await.map(drop).map_err(failed),
                Ok(_) => upload.wait_for_capacity(PARTS_IN_FLIGHT).await.map_err(failed),
                Err(source) => Err(read_failed(source)),
            };
            if let Err(error) = sent {
                if let Err(abort) = upload.abort().await {
                    tracing::warn!(%key, error = %abort, "parts of a failed upload stay in the bucket until its lifecycle rule removes them");
                }
                return Err(error);
            }
            upload.put(Bytes::from(part));
        }
    }

    /// The files, and the manifest, whose stored bytes are not those that were committed. Downloads them all.
    pub(crate) async fn check(&self, digest: &Digest, files: &[FileEntry]) -> Result<Vec<Mismatch>, ArtifactError> {
        let mut mismatches = Vec::new();
        let files = files.iter().map(|file| (file.path.as_str(), file.digest, file.bytes));
        for (path, expected, bytes) in files.chain([(MANIFEST_FILE, *digest, LARGEST_RECORD)]) {
            let found = self.download(&object_key(digest, path), bytes, None).await?;
            if found != Some(expected) {
                mismatches.push(Mismatch { path: path.to_owned(), expected, found });
            }
        }
        Ok(mismatches)
    }

    /// The folder of `artifact` in `cache`, downloaded unless it is there and whole.
    pub(crate) async fn fetch(&self, artifact: &Artifact, cache: PathBuf) -> Result<PathBuf, ArtifactError> {
        let Artifact { digest, manifest, .. } = artifact.clone();
        let cache = LocalStore::new(cache);
        let folder = cache.folder(&digest);
        let (cached, known) = (cache.clone(), manifest.clone());
        if blocking(move || cached.check(&digest, &known)).await?.is_empty() {
            return Ok(folder);
        }
        let opened = cache.clone();
        let scratch = blocking(move || opened.scratch()).await?;
        let mut mismatches = Vec::new();
        for file in &manifest.files {
            let target = scratch.file(&file.path)?;
            let found = self.download(&object_key(&digest, &file.path), file.bytes, Some(&target)).await?;
            if found != Some(file.digest) {
                mismatches.push(Mismatch { path: file.path.clone(), expected: file.digest, found });
            }
        }
        let bytes = self.read(&object_key(&digest, MANIFEST_FILE)).await?;
        let found = bytes.as_deref().map(Digest::of);
        let bytes = match bytes {
            Some(bytes) if found == Some(digest) => bytes,
            _ => {
                mismatches.push(Mismatch { path: MANIFEST_FILE.to_owned(), expected: digest, found });
                Vec::new()
            }
        };
        if !mismatches.is_empty() {
            return Err(ArtifactError::Corrupt { artifact: digest, mismatches });
        }
        blocking(move || cache.publish(scratch, &digest, &manifest, &bytes)).await?;
        Ok(folder)
    }

    /// Streams an object, into the file `to` if there is one; its digest, or `None` when there is no such object. Of one that has
    /// more than `most` bytes, a little more than that, and the digest of these.
    async fn download(&self, key: &str, most: u64, to: Option<&Path>) -> Result<Option<Digest>, ArtifactError> {
        let key = self.key(key);
        let failed = |source| self.failed("download", &key, source);
        let Some(mut transfer) = Transfer::begin(&self.client, &key).await.map_err(failed)? else { return Ok(None) };
        let mut file = match to {
            None => None,
            Some(path) => {
                Some((path, File::create(path).await.map_err(|source| ArtifactError::io("create", path, source))?))
            }
        };
        let (mut hasher, mut received) = (Hasher::default(), 0);
        while received <= most
            && let Some(piece) = transfer.next().await.map_err(failed)?
        {
            received += piece.len() as u64;
            hasher.update(&piece);
            if let Some((path, file)) = &mut file {
                file.write_all(&piece).await.map_err(|source| ArtifactError::io("write", *path, source))?;
            }
        }
        if let Some((path, file)) = &mut file {
            // tokio writes behind the caller's back: only a flush tells that the last piece arrived.
            file.flush().await.map_err(|source| ArtifactError::io("write", *path, source))?;
        }
        Ok(Some(hasher.finish().0))
    }

    pub(crate) async fn digests(&self) -> Result<Vec<Digest>, ArtifactError> {
        let keys = self.list(OBJECTS).await?;
        Ok(keys.iter().filter_map(|key| Digest::from_hex(key.strip_suffix(&format!("/{MANIFEST_FILE}"))?)).collect())
    }

    pub(crate) async fn names(&self) -> Result<Vec<String>, ArtifactError> {
        Ok(self.list(NAMES).await?.iter().filter_map(|key| key.strip_suffix(".json")).map(str::to_owned).collect())
    }

    /// The keys under `folder`, relative to it.
    async fn list(&self, folder: &str) -> Result<Vec<String>, ArtifactError> {
        let prefix = self.key(folder);
        let relative = |key: &Key| key.as_ref().strip_prefix(prefix.as_ref())?.strip_prefix('/').map(str::to_owned);
        Ok(self.objects(&prefix).await?.iter().filter_map(relative).collect())
    }

    /// The keys under `prefix`.
    async fn objects(&self, prefix: &Key) -> Result<Vec<Key>, ArtifactError> {
        let found = self.client.list(Some(prefix)).map_ok(|object| object.location).try_collect().await;
        found.map_err(|source| self.failed("list", prefix, source))
    }

    async fn get(&self, key: &str) -> Result<Option<GetResult>, ArtifactError> {
        let key = self.key(key);
        match self.client.get(&key).await {
            Ok(result) => Ok(Some(result)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.failed("download", &key, source)),
        }
    }

    /// Where `key` of this store is in its bucket. The store's own keys have no character that would be encoded; the prefix is
    /// anybody's, so it stays as it is.
    fn key(&self, key: &str) -> Key {
        self.prefix.parts().chain(Key::from(key).parts()).collect()
    }

    fn failed(&self, action: &'static str, key: &Key, error: object_store::Error) -> ArtifactError {
        ArtifactError::Remote { action, uri: format!("s3://{}/{key}", self.bucket), error }
    }
}

impl fmt::Debug for S3Store {
    // The client knows the credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix.as_ref())
            .finish_non_exhaustive()
    }
}

//! The cache, against a real S3 server.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sensorium_artifact::{Artifact, Store, Volumes};
use sensorium_node_cache::Failure;
use sensorium_node_cache::cache::{ARTIFACTS, Cache, Held};
use sensorium_node_cache::volume::{DIGEST, STORE, Wanted};
use sensorium_tests::{S3Server, S3User};
use tempfile::TempDir;

const STORE_URI: &str = "s3://models/team-a";
/// Bytes of each artifact's files.
const BYTES: usize = 1000;

/// A server with artifacts, and a cache that is told which of them pods use.
struct Case {
    server: S3Server,
    reader: S3User,
    folder: TempDir,
    used: Arc<Mutex<HashSet<String>>>,
    _buckets: TempDir,
}

impl Case {
    async fn start() -> Self {
        Self::start_slow(Duration::ZERO).await
    }

    async fn start_slow(pause: Duration) -> Self {
        let buckets = tempfile::tempdir().unwrap();
        let users = [S3User::new("reader", "models"), S3User::new("stranger", "other")];
        let tell = move |_: &str| std::thread::sleep(pause);
        let server = S3Server::start(buckets.path(), "127.0.0.1:0", &users, tell).await.unwrap();
        let [reader, _] = users;
        Self { server, reader, folder: tempfile::tempdir().unwrap(), used: Arc::default(), _buckets: buckets }
    }

    fn cache(&self, capacity: u64) -> Cache {
        let used = Arc::clone(&self.used);
        Cache::open(self.folder.path(), capacity, Box::new(move || Ok(used.lock().unwrap().clone()))).unwrap()
    }

    fn environment(&self) -> Vec<(String, String)> {
        self.server.environment(&self.reader)
    }

    /// An artifact of [`BYTES`] in two files.
    async fn artifact(&self, content: u8) -> Artifact {
        let store = Store::open_with(STORE_URI, &Volumes::default(), self.environment()).unwrap();
        let draft = store.draft().unwrap();
        fs::write(draft.path("graphs/fusion.onnx").unwrap(), vec![content; BYTES - 2]).unwrap();
        fs::write(draft.path("processor/tokenizer.json").unwrap(), b"{}").unwrap();
        let artifact = store.commit(draft, crate::parts()).await.unwrap();
        self.server.requests();
        artifact
    }

    fn wanted(&self, artifact: &Artifact) -> Wanted {
        self.wanted_by(&self.reader, STORE_URI, artifact).unwrap()
    }

    fn wanted_by(&self, user: &S3User, store: &str, artifact: &Artifact) -> Result<Wanted, Failure> {
        let attributes = [(STORE, store.to_owned()), (DIGEST, artifact.digest.to_string())];
        let attributes: HashMap<String, String> = attributes.map(|(name, value)| (name.to_owned(), value)).into();
        let secret: HashMap<String, String> = self.server.environment(user).into_iter().collect();
        Wanted::read(&attributes, &secret, &[self.server.endpoint().to_owned()])
    }

    /// How often each file of artifacts was downloaded since the last call, manifests left out.
    fn downloads(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for line in self.server.requests() {
            let file = line.strip_prefix("reader GET ").filter(|rest| rest.ends_with(" 200"));
            if let Some(file) = file.filter(|file| !file.contains("manifest.json")) {
                *counts.entry(file.rsplit('/').next().unwrap_or_default().to_owned()).or_default() += 1;
            }
        }
        counts
    }

    fn graph(&self, held: &Held, artifact: &Artifact) -> Vec<u8> {
        let object = self.folder.path().join(ARTIFACTS).join(held.key()).join("objects").join(artifact.digest.hex());
        fs::read(object.join("graphs/fusion.onnx")).unwrap()
    }

    fn kept(&self) -> BTreeSet<String> {
        names(&self.folder.path().join(ARTIFACTS))
    }
}

fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn once() -> BTreeMap<String, usize> {
    [("fusion.onnx 200".to_owned(), 1), ("tokenizer.json 200".to_owned(), 1)].into()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_come_at_once_or_later_share_one_download() {
    let case = Case::start().await;
    let artifact = case.artifact(1).await;
    let cache = case.cache(10_000);
    let wanted = case.wanted(&artifact);
    let all = futures::future::join_all((0..8).map(|_| cache.take(&wanted))).await;
    for held in all {
        assert_eq!(case.graph(&held.unwrap(), &artifact), vec![1; BYTES - 2]);
    }
    assert_eq!(case.downloads(), once());
    let held = cache.take(&wanted).await.unwrap();
    assert_eq!(case.downloads(), BTreeMap::new());
    let volume = case.folder.path().join(ARTIFACTS).join(held.key());
    assert_eq!(names(&volume), ["objects".to_owned()].into(), "a volume has the artifact and nothing else");

    // The next process finds it, and looks at it before it relies on it.
    let next = case.cache(10_000);
    assert_eq!(next.bytes(), cache.bytes() + fs::metadata(manifest(&volume)).unwrap().len());
    next.take(&wanted).await.unwrap();
    assert_eq!(case.downloads(), BTreeMap::new());
    let graph = manifest(&volume).with_file_name("graphs").join("fusion.onnx");
    fs::write(&graph, b"damaged").unwrap();
    let held = case.cache(10_000).take(&wanted).await.unwrap();
    assert_eq!(case.graph(&held, &artifact), vec![1; BYTES - 2], "what the disk lost is fetched again");
    fs::remove_dir_all(&volume).unwrap();
    let held = next.take(&wanted).await.unwrap();
    assert_eq!(case.graph(&held, &artifact), vec![1; BYTES - 2], "also when all of it is lost");
}

fn manifest(volume: &Path) -> std::path::PathBuf {
    let objects = volume.join("objects");
    objects.join(names(&objects).pop_first().unwrap()).join("manifest.json")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_when_nobody_waits_for_it_any_more() {
    let case = Case::start_slow(Duration::from_millis(100)).await;
    let artifact = case.artifact(1).await;
    let (cache, wanted) = (case.cache(10_000), case.wanted(&artifact));
    // Long enough for the manifest, not for the files.
    tokio::time::timeout(Duration::from_millis(150), cache.take(&wanted)).await.map(drop).unwrap_err();
    cache.take(&wanted).await.unwrap();
    assert_eq!(case.downloads(), once());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_unused_longest_makes_room_and_what_pods_use_stays() {
    let case = Case::start().await;
    let cache = case.cache(2 * BYTES as u64);
    let mut keys = Vec::new();
    for content in [1, 2] {
        let wanted = case.wanted(&case.artifact(content).await);
        keys.push(cache.take(&wanted).await.unwrap().key().to_owned());
    }
    // The first one is used again, so the second is the older.
    let first = case.wanted(&case.artifact(1).await);
    cache.take(&first).await.unwrap();
    let third = case.wanted(&case.artifact(3).await);
    keys.push(cache.take(&third).await.unwrap().key().to_owned());
    assert_eq!(case.kept(), [keys[0].clone(), keys[2].clone()].into());

    // In use by pods, the oldest stays; and where all are in use, the next one is told so.
    case.used.lock().unwrap().insert(keys[0].clone());
    let fourth = case.wanted(&case.artifact(4).await);
    let held = cache.take(&fourth).await.unwrap();
    assert_eq!(case.kept(), [keys[0].clone(), held.key().to_owned()].into());
    let fifth = case.wanted(&case.artifact(5).await);
    let failure = cache.take(&fifth).await.map(drop).unwrap_err();
    assert!(matches!(&failure, Failure::Full(text) if text.contains("nodeCache.capacity")), "{failure}");
    drop(held);
    cache.take(&fifth).await.unwrap();

    // Which one is the older is known after a restart as well.
    assert_eq!(case.cache(2 * BYTES as u64).bytes(), sizes(&case.folder.path().join(ARTIFACTS)));
    assert_eq!(names(&case.folder.path().join("trash")), BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_tidied_up_or_could_not_remove_is_in_nobodys_way() {
    let case = Case::start().await;
    let cache = case.cache(BYTES as u64);
    let first = cache.take(&case.wanted(&case.artifact(1).await)).await.unwrap().key().to_owned();
    fs::remove_dir_all(case.folder.path().join(ARTIFACTS).join(&first)).unwrap();
    let second = cache.take(&case.wanted(&case.artifact(2).await)).await.unwrap().key().to_owned();
    fs::create_dir_all(case.folder.path().join("trash").join(&second).join("left")).unwrap();
    let third = cache.take(&case.wanted(&case.artifact(3).await)).await.unwrap().key().to_owned();
    assert_eq!(case.kept(), [third].into());
    assert_eq!(names(&case.folder.path().join("trash")), BTreeSet::new());
}

fn sizes(folder: &Path) -> u64 {
    let size = |entry: fs::DirEntry| {
        if entry.path().is_dir() { sizes(&entry.path()) } else { entry.metadata().unwrap().len() }
    };
    fs::read_dir(folder).unwrap().map(|entry| size(entry.unwrap())).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_may_not_read_an_artifact_gets_nothing_though_it_is_here() {
    let case = Case::start().await;
    let artifact = case.artifact(1).await;
    let cache = case.cache(10_000);
    cache.take(&case.wanted(&artifact)).await.unwrap();

    let stranger = S3User::new("stranger", "other");
    let wanted = case.wanted_by(&stranger, STORE_URI, &artifact).unwrap();
    let failure = cache.take(&wanted).await.map(drop).unwrap_err();
    assert!(matches!(failure, Failure::Denied(_)), "{failure}");
    let liar = S3User { secret: "guessed".to_owned(), ..case.reader.clone() };
    let wanted = case.wanted_by(&liar, STORE_URI, &artifact).unwrap();
    let failure = cache.take(&wanted).await.map(drop).unwrap_err();
    assert!(matches!(&failure, Failure::Denied(text) if !text.contains("guessed")), "{failure}");

    // A manifest that he came by does not bring him the files.
    let (from, to) = ("models/team-a", "other/mine");
    let manifest = format!("objects/{}/manifest.json", artifact.digest.hex());
    let (from, to) = (case.server.bucket(from).join(&manifest), case.server.bucket(to).join(&manifest));
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, to).unwrap();
    let wanted = case.wanted_by(&stranger, "s3://other/mine", &artifact).unwrap();
    let failure = cache.take(&wanted).await.map(drop).unwrap_err();
    assert!(matches!(failure, Failure::Damaged(_)), "{failure}");
    assert_eq!(case.kept().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_not_what_their_digests_say_are_not_kept() {
    let case = Case::start().await;
    let artifact = case.artifact(1).await;
    let graph = case.server.bucket("models/team-a/objects").join(artifact.digest.hex()).join("graphs/fusion.onnx");
    fs::write(&graph, b"something else").unwrap();
    let cache = case.cache(10_000);
    let failure = cache.take(&case.wanted(&artifact)).await.map(drop).unwrap_err();
    assert!(matches!(&failure, Failure::Damaged(text) if text.contains("graphs/fusion.onnx")), "{failure}");
    assert_eq!((case.kept(), cache.bytes()), (BTreeSet::new(), 0));

    // One that is far larger than its manifest says is not fetched to its end.
    fs::File::create(&graph).unwrap().set_len(1 << 40).unwrap();
    let failure = cache.take(&case.wanted(&artifact)).await.map(drop).unwrap_err();
    assert!(matches!(&failure, Failure::Damaged(text) if text.contains("graphs/fusion.onnx")), "{failure}");
    let manifest = graph.parent().unwrap().with_file_name("manifest.json");
    let written = fs::read(&manifest).unwrap();
    fs::File::options().write(true).open(&manifest).unwrap().set_len(1 << 40).unwrap();
    let failure = cache.take(&case.wanted(&artifact)).await.map(drop).unwrap_err();
    assert!(failure.to_string().contains("manifest.json"), "{failure}");
    fs::write(&manifest, written).unwrap();

    fs::write(&graph, vec![1; BYTES - 2]).unwrap();
    cache.take(&case.wanted(&artifact)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_process_left_is_removed_and_fetched_again() {
    let case = Case::start().await;
    let artifact = case.artifact(1).await;
    let wanted = case.wanted(&artifact);
    let folder = case.folder.path().join(ARTIFACTS).join(wanted.key());
    // In the middle of a download, in the middle of a removal, and a folder that is none of ours.
    fs::create_dir_all(folder.join("tmp/draft-x/content/graphs")).unwrap();
    fs::write(folder.join("tmp/draft-x/content/graphs/fusion.onnx"), b"half").unwrap();
    fs::create_dir_all(case.folder.path().join("trash/y/objects")).unwrap();
    fs::create_dir_all(case.folder.path().join(ARTIFACTS).join("z/objects/w")).unwrap();
    let cache = case.cache(10_000);
    assert_eq!((case.kept(), cache.bytes()), (BTreeSet::new(), 0));
    assert_eq!(names(&case.folder.path().join("trash")), BTreeSet::new());
    let held = cache.take(&wanted).await.unwrap();
    assert_eq!(case.graph(&held, &artifact), vec![1; BYTES - 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_none_is_told_without_what_it_said() {
    let case = Case::start().await;
    let artifact = case.artifact(1).await;
    let mut wanted = case.wanted(&artifact);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    wanted.environment.insert("AWS_ENDPOINT_URL".to_owned(), format!("http://{}", listener.local_addr().unwrap()));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 400 No\r\ncontent-length: 6\r\n\r\nhidden").await;
        }
    });
    let failure = case.cache(10_000).take(&wanted).await.map(drop).unwrap_err();
    assert!(matches!(&failure, Failure::Store(text) if !text.contains("hidden")), "{failure}");
}

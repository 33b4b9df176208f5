//! The store on S3, over the real protocol: an S3 server on the loopback interface that keeps its buckets in a folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::common::{commit, flip_a_bit, mismatch};
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use sensorium_artifact::{Artifact, ArtifactError, Digest, Mirror, Store, Volumes};
use tempfile::TempDir;
use tower::Service;

const SECRET: &str = "not-a-secret-but-a-test";

struct Server {
    folder: TempDir,
    endpoint: String,
    traffic: Arc<Mutex<Traffic>>,
}

/// What was asked of the server, what it must refuse, and what it must pretend.
#[derive(Default)]
struct Traffic {
    requests: Vec<String>,
    refused: Option<&'static str>,
    /// Keys and sizes that every list has besides its own, though there are no such objects.
    listed: &'static [(&'static str, u64)],
}

impl Server {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("models")).unwrap();
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder.path()).unwrap());
        builder.set_auth(SimpleAuth::from_single("tester", SECRET));
        let service = builder.build();
        let traffic = Arc::new(Mutex::new(Traffic::default()));
        let seen = traffic.clone();
        let app = Router::new().fallback(move |request: Request| answer(service.clone(), seen.clone(), request));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        // Ends with the test's runtime.
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { folder, endpoint, traffic }
    }

    fn store(&self) -> Store {
        self.store_with_secret(SECRET)
    }

    fn store_with_secret(&self, secret: &str) -> Store {
        Store::open_with("s3://models/team-a", &Volumes::default(), self.environment(secret)).unwrap()
    }

    fn environment(&self, secret: &str) -> Vec<(String, String)> {
        let environment = [
            ("AWS_ENDPOINT_URL", self.endpoint.as_str()),
            ("AWS_ACCESS_KEY_ID", "tester"),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_REGION", "us-east-1"),
            ("AWS_SOMETHING_ELSE", "ignored"),
            ("HOME", "ignored"),
        ];
        environment.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    }

    /// Refuse requests whose `METHOD /path` contains `part`.
    fn refuse(&self, part: Option<&'static str>) {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner).refused = part;
    }

    /// List these keys and sizes, too.
    fn list(&self, listed: &'static [(&'static str, u64)]) {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner).listed = listed;
    }

    /// Writes an object, as the file that the server keeps it in.
    fn write(&self, key: &str, content: &str) {
        let path = self.folder.path().join("models").join(key);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Removes an object, or all below a prefix.
    fn remove(&self, key: &str) {
        let path = self.folder.path().join("models").join(key);
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }

    fn mirror(&self, prefix: &str, cache: &Path) -> Mirror {
        Mirror::open_with(&format!("s3://models/{prefix}"), cache, self.environment(SECRET)).unwrap()
    }

    /// The requests since the last call, as `METHOD /path`.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.traffic.lock().unwrap_or_else(PoisonError::into_inner).requests)
    }

    fn object(&self, artifact: &Artifact, path: &str) -> PathBuf {
        self.folder.path().join("models/team-a/objects").join(artifact.digest.hex()).join(path)
    }
}

async fn answer(mut service: S3Service, traffic: Arc<Mutex<Traffic>>, request: Request) -> Response {
    let line = format!("{} {}", request.method(), request.uri().path());
    let is_list = request.uri().query().is_some_and(|query| query.contains("list-type"));
    let (refused, listed) = {
        let mut traffic = traffic.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = traffic.refused.is_some_and(|part| line.contains(part));
        traffic.requests.push(line);
        (refused, traffic.listed)
    };
    if refused {
        return StatusCode::FORBIDDEN.into_response();
    }
    let response = Service::call(&mut service, request).await.unwrap().map(Body::new);
    if !is_list || listed.is_empty() {
        return response;
    }
    let answer = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
    let object = |(key, size): &(&str, u64)| {
        let modified = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>";
        format!("<Contents><Key>{key}</Key><Size>{size}</Size>{modified}</Contents>")
    };
    let end = "</ListBucketResult>";
    let listed: String = listed.iter().map(object).collect();
    String::from_utf8_lossy(&answer).replace(end, &format!("{listed}{end}")).into_response()
}

#[tokio::test]
async fn a_bucket_keeps_names_and_finds_artifacts() {
    let server = Server::start().await;
    let cache = tempfile::tempdir().unwrap();
    crate::common::a_store_keeps_names_and_finds_artifacts(&server.store(), cache.path()).await;
}

#[tokio::test]
async fn a_file_of_many_parts_makes_the_round_trip() {
    let server = Server::start().await;
    let store = server.store();
    // Two whole parts of 8 MiB and a rest; no two parts are equal.
    let content: Vec<u8> = (0..17_000_000_u32).map(|i| (i >> 12) as u8 ^ i as u8).collect();
    let artifact = commit(&store, "large", &content).await.unwrap();
    assert!(server.requests().iter().any(|line| line.starts_with("POST")), "not uploaded in parts");
    let cache = tempfile::tempdir().unwrap();
    let folder = store.fetch(&artifact, cache.path()).await.unwrap();
    assert!(fs::read(folder.join("graphs/fusion.onnx")).unwrap() == content);
    store.verify(&artifact.digest).await.unwrap();
}

#[tokio::test]
async fn the_manifest_is_uploaded_after_all_other_files() {
    let server = Server::start().await;
    let artifact = commit(&server.store(), "vqa", b"weights").await.unwrap();
    let requests = server.requests();
    let uploads: Vec<_> =
        requests.iter().filter_map(|line| line.strip_prefix("PUT ")?.rsplit_once(&artifact.digest.hex())).collect();
    let paths: Vec<_> = uploads.iter().map(|(_, path)| *path).collect();
    assert_eq!(paths, ["/graphs/fusion.onnx", "/processor/tokenizer.json", "/manifest.json"]);
}

#[tokio::test]
async fn an_upload_that_fails_in_the_middle_is_invisible_and_can_be_repeated() {
    let server = Server::start().await;
    let store = server.store();
    server.refuse(Some("/processor/"));
    let error = commit(&store, "vqa", b"weights").await.unwrap_err();
    let ArtifactError::Remote { action: "upload", uri, .. } = &error else { panic!("{error:?}") };
    assert!(uri.starts_with("s3://models/team-a/objects/") && uri.ends_with("/processor/tokenizer.json"), "{uri}");
    assert!(store.list().await.unwrap().is_empty());
    let digest = uri.split('/').nth(5).unwrap();
    let error = store.resolve(&format!("sha256:{digest}")).await.unwrap_err();
    assert!(matches!(error, ArtifactError::NotFound { .. }), "{error}");

    server.refuse(None);
    let artifact = commit(&store, "vqa", b"weights").await.unwrap();
    assert_eq!(artifact.digest.hex(), digest);
    store.verify(&artifact.digest).await.unwrap();
}

#[tokio::test]
async fn a_second_fetch_downloads_nothing_unless_the_cache_is_damaged() {
    let server = Server::start().await;
    let (store, cache) = (server.store(), tempfile::tempdir().unwrap());
    let artifact = commit(&store, "vqa", b"weights").await.unwrap();
    let folder = store.fetch(&artifact, cache.path()).await.unwrap();
    assert_eq!(folder, cache.path().join("objects").join(artifact.digest.hex()));
    server.requests();

    assert_eq!(store.fetch(&artifact, cache.path()).await.unwrap(), folder);
    assert_eq!(server.requests(), [""; 0]);

    flip_a_bit(&folder.join("graphs/fusion.onnx"));
    assert_eq!(store.fetch(&artifact, cache.path()).await.unwrap(), folder);
    assert_eq!(fs::read(folder.join("graphs/fusion.onnx")).unwrap(), b"weights");
}

#[tokio::test]
async fn a_changed_object_is_refused_with_both_digests_and_does_not_enter_the_cache() {
    let server = Server::start().await;
    let (store, cache) = (server.store(), tempfile::tempdir().unwrap());
    let artifact = commit(&store, "vqa", b"weights").await.unwrap();
    let object = server.object(&artifact, "graphs/fusion.onnx");
    flip_a_bit(&object);
    let expected =
        ("graphs/fusion.onnx".to_owned(), Digest::of(b"weights"), Some(Digest::of(&fs::read(object).unwrap())));
    assert_eq!(mismatch(&store.fetch(&artifact, cache.path()).await.unwrap_err()), expected);
    assert_eq!(mismatch(&store.verify(&artifact.digest).await.unwrap_err()), expected);
    assert!(!cache.path().join("objects").exists());
}

#[tokio::test]
async fn committing_the_content_of_a_damaged_artifact_repairs_it() {
    let server = Server::start().await;
    let store = server.store();
    let artifact = commit(&store, "vqa", b"weights").await.unwrap();
    for file in ["graphs/fusion.onnx", "manifest.json"] {
        flip_a_bit(&server.object(&artifact, file));
        store.verify(&artifact.digest).await.unwrap_err();
        assert_eq!(commit(&store, "vqa", b"weights").await.unwrap(), artifact);
        store.verify(&artifact.digest).await.unwrap();
    }
    fs::remove_file(server.object(&artifact, "processor/tokenizer.json")).unwrap();
    commit(&store, "vqa", b"weights").await.unwrap();
    store.verify(&artifact.digest).await.unwrap();
    server.requests();
    commit(&store, "vqa", b"weights").await.unwrap();
    let uploads = server.requests().into_iter().filter(|line| line.starts_with("PUT ") && line.contains("/objects/"));
    assert_eq!(uploads.count(), 0, "what is whole is not sent again");
}

#[tokio::test]
async fn a_changed_manifest_object_is_refused_with_both_digests() {
    let server = Server::start().await;
    let (store, cache) = (server.store(), tempfile::tempdir().unwrap());
    let artifact = commit(&store, "vqa", b"weights").await.unwrap();
    let object = server.object(&artifact, "manifest.json");
    flip_a_bit(&object);
    let expected = ("manifest.json".to_owned(), artifact.digest, Some(Digest::of(&fs::read(object).unwrap())));
    assert_eq!(mismatch(&store.resolve(&artifact.digest.to_string()).await.unwrap_err()), expected);
    assert_eq!(mismatch(&store.fetch(&artifact, cache.path()).await.unwrap_err()), expected);
}

#[tokio::test]
async fn wrong_credentials_are_an_error_that_does_not_show_them() {
    let server = Server::start().await;
    let store = server.store_with_secret("wrong-secret");
    let error = store.list().await.unwrap_err();
    assert!(matches!(&error, ArtifactError::Remote { action: "list", .. }), "{error}");
    assert!(!format!("{store:?} {error:?}").contains("wrong-secret"));
    assert_eq!(error.to_string().matches("SignatureDoesNotMatch").count(), 1, "{error}");
}

#[tokio::test]
async fn a_mirror_follows_its_prefix_and_downloads_what_changed() {
    let server = Server::start().await;
    server.write("repository/a/1/model.onnx", "one");
    server.write("repository/b/config.pbtxt", "two");
    server.write("elsewhere/c", "three");
    let cache = tempfile::tempdir().unwrap();
    let mirror = server.mirror("repository", cache.path());
    mirror.refresh().await.unwrap();
    let read = |path: &str| fs::read_to_string(mirror.folder().join(path)).ok();
    assert_eq!((read("a/1/model.onnx").as_deref(), read("b/config.pbtxt").as_deref()), (Some("one"), Some("two")));
    assert_eq!(fs::read_dir(mirror.folder()).unwrap().count(), 2, "and nothing else");

    server.requests();
    mirror.refresh().await.unwrap();
    assert_eq!(server.requests().iter().filter(|request| request.contains("model.onnx")).count(), 0);

    server.write("repository/a/1/model.onnx", "changed");
    server.remove("repository/b");
    server.mirror("repository/", cache.path()).refresh().await.unwrap();
    assert_eq!(read("a/1/model.onnx").as_deref(), Some("changed"));
    assert!(!mirror.folder().join("b").exists());
    assert!(Mirror::open_with("file:///models", cache.path(), []).is_err());
}

/// The files in `folder`, as `PATH=CONTENT`.
fn contents(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                found.push(format!("{name}={}", fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn objects_that_are_no_files_do_not_stop_a_mirror() {
    let server = Server::start().await;
    server.write("repository/plus/1/model.onnx", "one");
    server.write("repository/second/1/model.onnx", "two");
    // Folders as consoles make them, an object that went away meanwhile, and one whose name is a folder's, too.
    server.list(&[
        ("repository/", 0),
        ("repository/plus/", 0),
        ("repository/plus/1/", 0),
        ("repository/empty/", 0),
        ("repository/gone/1/model.onnx", 7),
        ("repository/second", 7),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let mirror = server.mirror("repository", cache.path());
    for _ in 0..2 {
        mirror.refresh().await.unwrap();
        assert_eq!(contents(mirror.folder()), ["plus/1/model.onnx=one", "second/1/model.onnx=two"]);
    }
}

#[tokio::test]
async fn a_file_may_become_a_folder_and_a_folder_a_file() {
    let server = Server::start().await;
    let cache = tempfile::tempdir().unwrap();
    let mirror = server.mirror("repository", cache.path());
    server.write("repository/a", "file");
    server.write("repository/b/1/model.onnx", "folder");
    mirror.refresh().await.unwrap();
    for object in ["repository/a", "repository/b"] {
        server.remove(object);
    }
    server.write("repository/a/1/model.onnx", "folder");
    server.write("repository/b", "file");
    mirror.refresh().await.unwrap();
    assert_eq!(contents(mirror.folder()), ["a/1/model.onnx=folder", "b=file"]);
}

#[tokio::test]
async fn a_mirror_mends_what_a_killed_process_left() {
    let server = Server::start().await;
    let cache = tempfile::tempdir().unwrap();
    let mirror = server.mirror("repository", cache.path());
    server.write("repository/a/1/model.onnx", "whole");
    mirror.refresh().await.unwrap();
    fs::write(mirror.folder().join("a/1/model.onnx"), "who").unwrap();
    fs::write(mirror.folder().join("unknown"), "").unwrap();
    let scratch = mirror.folder().with_file_name("scratch");
    let mut living = Vec::new();
    for (name, age, is_locked) in [(".tmpDead", 60, false), (".tmpLiving", 60, true), (".tmpNew", 0, false)] {
        let file = fs::File::create(scratch.join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        if is_locked {
            file.lock().unwrap();
            living.push(file);
        }
    }
    mirror.refresh().await.unwrap();
    assert_eq!(contents(mirror.folder()), ["a/1/model.onnx=whole"]);
    assert_eq!(contents(&scratch), [".tmpLiving=", ".tmpNew="]);
}

#[tokio::test]
async fn what_cannot_be_had_keeps_no_other_folder_from_being_whole() {
    let server = Server::start().await;
    let cache = tempfile::tempdir().unwrap();
    let mirror = server.mirror("repository", cache.path());
    for model in ["a", "b", "c"] {
        server.write(&format!("repository/{model}/config.pbtxt"), "new");
        server.write(&format!("repository/{model}/1/model.onnx"), model);
    }
    server.refuse(Some("GET /models/repository/b/1/model.onnx"));
    let missing = mirror.refresh().await.unwrap();
    assert_eq!(missing.keys().collect::<Vec<_>>(), ["b"]);
    assert!(missing["b"].to_string().contains("b/1/model.onnx"), "{}", missing["b"]);
    let here =
        ["a/1/model.onnx=a", "a/config.pbtxt=new", "b/config.pbtxt=new", "c/1/model.onnx=c", "c/config.pbtxt=new"];
    assert_eq!(contents(mirror.folder()), here);
    let next = server.mirror("repository", cache.path());
    assert_eq!(next.partial(), ["b".to_owned()].into(), "the next process knows it, too");
    server.refuse(Some("GET /models"));
    next.refresh().await.unwrap_err();
    assert_eq!(next.partial(), ["b".to_owned()].into());
    server.refuse(None);
    assert!(next.refresh().await.unwrap().is_empty() && next.partial().is_empty());
}

#[tokio::test]
async fn a_prefix_may_have_any_characters() {
    let server = Server::start().await;
    for prefix in ["~prod", "100%", "a/b/c d/e+ü"] {
        let cache = tempfile::tempdir().unwrap();
        server.write(&format!("{prefix}/~a ü%20/1/model.onnx"), "one");
        let mirror = server.mirror(prefix, cache.path());
        mirror.refresh().await.unwrap();
        assert_eq!(contents(mirror.folder()), ["~a ü%20/1/model.onnx=one"], "{prefix}");

        let uri = format!("s3://models/{prefix}");
        let store = Store::open_with(&uri, &Volumes::default(), server.environment(SECRET)).unwrap();
        let artifact = commit(&store, "vqa", b"weights").await.unwrap();
        assert_eq!(store.list().await.unwrap(), std::slice::from_ref(&artifact), "{prefix}");
        let object = format!("{prefix}/objects/{}", artifact.digest.hex());
        assert!(server.folder.path().join("models").join(&object).is_dir(), "{prefix}");
        // What others put there goes with the rest.
        server.write(&format!("{object}/~notes"), "");
        store.remove(&artifact.digest).await.unwrap();
        assert!(!server.folder.path().join("models").join(&object).join("~notes").exists(), "{prefix}");
    }
}

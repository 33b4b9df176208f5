//! The store in a folder.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use crate::common::{child, commit, fill, flip_a_bit, mismatch, parts};
use sensorium_artifact::{ArtifactError, Digest, Store, Volume, Volumes};
use tempfile::TempDir;

const STORE: &str = "SENSORIUM_TEST_STORE";

fn store() -> (TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = at(folder.path());
    (folder, store)
}

fn at(folder: &Path) -> Store {
    Store::open(&format!("file://{}", folder.display()), &Volumes::default()).unwrap()
}

/// Names in a folder, without the hidden ones.
fn entries(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with('.')).collect()
}

#[tokio::test]
async fn a_folder_keeps_names_and_finds_artifacts() {
    let (folder, store) = store();
    crate::common::a_store_keeps_names_and_finds_artifacts(&store, Path::new("/nowhere")).await;
    assert_eq!(entries(&folder.path().join("tmp")), [""; 0]);
}

#[tokio::test]
async fn a_claim_is_found_through_its_volume() {
    let folder = tempfile::tempdir().unwrap();
    let volume = Volume { claim: "artifacts".into(), folder: folder.path().to_owned() };
    let store = Store::open("pvc://artifacts/team-a/", &[volume].into_iter().collect()).unwrap();
    let artifact = commit(&store, "vqa", b"weights").await.unwrap();
    assert_eq!(artifact.uri, format!("pvc://artifacts/team-a/objects/{}", artifact.digest.hex()));
    let files = store.fetch(&artifact, Path::new("/nowhere")).await.unwrap();
    assert_eq!(files, folder.path().join("team-a/objects").join(artifact.digest.hex()));
}

#[tokio::test]
async fn a_store_that_is_not_there_is_empty_and_stays_away_when_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("absent");
    let store = at(&path);
    assert!(store.list().await.unwrap().is_empty());
    assert!(matches!(store.resolve("vqa").await.unwrap_err(), ArtifactError::NotFound { .. }));
    assert!(!path.exists());
}

#[tokio::test]
async fn a_changed_file_is_refused_with_both_digests() {
    let (folder, store) = store();
    let artifact = commit(&store, "vqa", b"some weights").await.unwrap();
    let path = folder.path().join("objects").join(artifact.digest.hex()).join("graphs/fusion.onnx");
    flip_a_bit(&path);
    let expected =
        ("graphs/fusion.onnx".to_owned(), Digest::of(b"some weights"), Some(Digest::of(&fs::read(path).unwrap())));
    assert_eq!(mismatch(&store.verify(&artifact.digest).await.unwrap_err()), expected);
    assert_eq!(mismatch(&store.fetch(&artifact, folder.path()).await.unwrap_err()), expected);
}

#[tokio::test]
async fn a_missing_file_is_refused_with_its_digest() {
    let (folder, store) = store();
    let artifact = commit(&store, "vqa", b"weights").await.unwrap();
    fs::remove_file(folder.path().join("objects").join(artifact.digest.hex()).join("graphs/fusion.onnx")).unwrap();
    let error = store.fetch(&artifact, folder.path()).await.unwrap_err();
    assert_eq!(mismatch(&error), ("graphs/fusion.onnx".to_owned(), Digest::of(b"weights"), None));
}

#[tokio::test]
async fn a_changed_manifest_is_refused_with_both_digests_and_hides_no_other_artifact() {
    let (folder, store) = store();
    let good = commit(&store, "good", b"1").await.unwrap();
    let bad = commit(&store, "bad", b"2").await.unwrap();
    let path = folder.path().join("objects").join(bad.digest.hex()).join("manifest.json");
    flip_a_bit(&path);
    let expected = ("manifest.json".to_owned(), bad.digest, Some(Digest::of(&fs::read(path).unwrap())));
    assert_eq!(mismatch(&store.resolve(&bad.digest.to_string()).await.unwrap_err()), expected);
    assert_eq!(mismatch(&store.fetch(&bad, folder.path()).await.unwrap_err()), expected);
    assert_eq!(store.list().await.unwrap(), [good]);
}

#[tokio::test]
async fn committing_the_content_of_a_damaged_artifact_repairs_it() {
    let (folder, store) = store();
    let artifact = commit(&store, "vqa", b"weights").await.unwrap();
    flip_a_bit(&folder.path().join("objects").join(artifact.digest.hex()).join("graphs/fusion.onnx"));
    assert_eq!(commit(&store, "vqa", b"weights").await.unwrap(), artifact);
    store.verify(&artifact.digest).await.unwrap();
}

#[tokio::test]
async fn a_name_whose_record_is_none_hides_no_other() {
    let (folder, store) = store();
    let artifact = commit(&store, "vqa", b"weights").await.unwrap();
    store.promote("vqa", &artifact.digest).await.unwrap();
    std::fs::write(folder.path().join("names/broken.json"), b"").unwrap();
    std::fs::write(folder.path().join("names/newer.json"), br#"{"schemaVersion": 99}"#).unwrap();
    let names = store.names().await.unwrap();
    assert_eq!(names.into_iter().collect::<Vec<_>>(), [("vqa".to_owned(), artifact.digest)]);
    assert!(store.has(&artifact.digest).await.unwrap());
    store.remove(&artifact.digest).await.unwrap();
    assert!(!store.has(&artifact.digest).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn commits_of_the_same_content_at_the_same_time_all_succeed() {
    let (folder, store) = store();
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { commit(&store, "vqa", &vec![7; 100_000]).await })
        })
        .collect();
    let mut digests = Vec::new();
    for task in tasks {
        digests.push(task.await.unwrap().unwrap().digest);
    }
    digests.dedup();
    assert_eq!(digests.len(), 1);
    store.verify(&digests[0]).await.unwrap();
    assert_eq!(entries(&folder.path().join("tmp")), [""; 0]);
}

#[tokio::test]
async fn a_draft_is_invisible_and_goes_away_when_dropped() {
    let (folder, store) = store();
    let draft = store.draft().unwrap();
    fill(&draft, b"half");
    assert!(store.list().await.unwrap().is_empty());
    assert!(store.names().await.unwrap().is_empty());
    assert_eq!(entries(&folder.path().join("tmp")).len(), 1);
    drop(draft);
    assert_eq!(entries(&folder.path().join("tmp")), [""; 0]);
}

#[tokio::test]
async fn a_draft_that_contradicts_its_manifest_is_refused_and_removed() {
    let (folder, store) = store();
    let without_graph = store.draft().unwrap();
    let error = store.commit(without_graph, parts("vqa")).await.unwrap_err();
    assert!(
        error.to_string().contains("graph `fusion` is in file `graphs/fusion.onnx`, which is not listed"),
        "{error}"
    );

    let with_nan = store.draft().unwrap();
    fill(&with_nan, b"weights");
    let mut nan = parts("vqa");
    nan.metrics.insert("loss".into(), f64::NAN);
    let error = store.commit(with_nan, nan).await.unwrap_err();
    assert!(
        matches!(&error, ArtifactError::InvalidManifest { reason, .. } if reason.contains("`loss` is NaN")),
        "{error}"
    );

    let with_link = store.draft().unwrap();
    fill(&with_link, b"weights");
    std::os::unix::fs::symlink("/etc/passwd", with_link.folder().join("link")).unwrap();
    let error = store.commit(with_link, parts("vqa")).await.unwrap_err();
    assert!(matches!(&error, ArtifactError::InvalidPath { path, .. } if path == "link"), "{error}");

    let named_badly = store.draft().unwrap();
    fill(&named_badly, b"weights");
    let error = store.commit(named_badly, parts("../vqa")).await.unwrap_err();
    assert!(matches!(&error, ArtifactError::InvalidName { name, .. } if name == "../vqa"), "{error}");

    assert!(store.list().await.unwrap().is_empty());
    assert_eq!(entries(&folder.path().join("tmp")), [""; 0]);
}

#[tokio::test]
async fn a_draft_hands_out_no_path_outside_itself() {
    let (_folder, store) = store();
    let draft = store.draft().unwrap();
    for bad in ["../x", "/etc/x", "a\\..\\x", "a/../../x", "", "manifest.json"] {
        assert!(matches!(draft.path(bad).unwrap_err(), ArtifactError::InvalidPath { .. }), "{bad}");
    }
}

#[tokio::test]
async fn an_artifact_of_a_killed_process_is_invisible_and_its_rubbish_is_swept() {
    let (folder, store) = store();
    let good = commit(&store, "vqa", b"good").await.unwrap();
    let mut process =
        child("folder::child_that_drafts_and_waits").env(STORE, folder.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("drafted")));
    let tmp = folder.path().join("tmp");

    // As long as it lives, nobody touches its draft.
    drop(store.draft().unwrap());
    assert_eq!(entries(&tmp).len(), 1);

    process.kill().unwrap();
    process.wait().unwrap();
    assert_eq!(store.list().await.unwrap(), [good]);
    assert_eq!(entries(&tmp).len(), 1);
    drop(store.draft().unwrap());
    assert_eq!(entries(&tmp), [""; 0]);
}

#[test]
#[ignore = "the other process of a test, which starts it"]
fn child_that_drafts_and_waits() {
    let Some(folder) = std::env::var_os(STORE) else { return };
    let draft = at(Path::new(&folder)).draft().unwrap();
    fill(&draft, &vec![1; 100_000]);
    println!("drafted");
    // Longer than the test takes; the parent kills this process.
    std::thread::sleep(std::time::Duration::from_mins(1));
}

//! A full disk: nothing that was committed changes, and the message says what happened.
//!
//! The file-size limit of a process stands for the disk. It is an error of the same kind at the same calls, and needs no
//! rights; it holds for a whole process, so the writes happen in another one.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::{commit, fill, parts};
use sensorium_artifact::{ArtifactError, Store, Volumes, atomic};

const STORE: &str = "SENSORIUM_TEST_STORE";

fn at(folder: &Path) -> Store {
    Store::open(&format!("file://{}", folder.display()), &Volumes::default()).unwrap()
}

/// Runs the ignored test `name` where no file may grow beyond a few ten kilobytes.
fn run_on_a_full_disk(name: &str, folder: &Path) {
    let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact \"$1\" --ignored --nocapture";
    let output = Command::new("sh")
        .args(["-c", script, std::env::current_exe().unwrap().to_str().unwrap(), name])
        .env(STORE, folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[tokio::test]
async fn a_commit_on_a_full_disk_leaves_the_last_good_artifact_and_says_what_happened() {
    let folder = tempfile::tempdir().unwrap();
    let store = at(folder.path());
    let good = commit(&store, "vqa", b"good").await.unwrap();
    store.promote("vqa", &good.digest).await.unwrap();
    run_on_a_full_disk("full_disk::child_that_commits", folder.path());
    assert_eq!(store.resolve("vqa").await.unwrap(), good);
    store.verify(&good.digest).await.unwrap();
    assert_eq!(store.list().await.unwrap(), [good]);
    let left: Vec<_> =
        fs::read_dir(folder.path().join("tmp")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [".lock"]);
}

#[test]
#[ignore = "the other process of a test, which starts it"]
fn child_that_commits() {
    let Some(folder) = std::env::var_os(STORE) else { return };
    let store = at(Path::new(&folder));
    let draft = store.draft().unwrap();
    fill(&draft, b"new");
    // The files fit, the manifest that lists them does not.
    for number in 0..1000 {
        fs::write(draft.path(&format!("shards/{number}.bin")).unwrap(), [0]).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let error = runtime.block_on(store.commit(draft, parts("vqa"))).unwrap_err();
    assert!(matches!(&error, ArtifactError::NoSpace { path, .. } if path.ends_with("manifest.json")), "{error:?}");
    assert!(error.to_string().starts_with("no space left to write `"), "{error}");
}

#[test]
fn an_atomic_write_on_a_full_disk_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.json");
    atomic::write(&path, b"old").unwrap();
    run_on_a_full_disk("full_disk::child_that_writes", folder.path());
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left");
}

#[test]
#[ignore = "the other process of a test, which starts it"]
fn child_that_writes() {
    let Some(folder) = std::env::var_os(STORE) else { return };
    let path = Path::new(&folder).join("state.json");
    let error = atomic::write(&path, vec![1; 1 << 20]).unwrap_err();
    assert!(matches!(&error, ArtifactError::NoSpace { path: named, .. } if *named == path), "{error:?}");
}

//! Real mounts and a real full disk, in a mount namespace of their own. Root only; where there can be none they say so and end.

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sensorium_artifact::{Store, Volumes};
use sensorium_node_cache::Failure;
use sensorium_node_cache::cache::{ARTIFACTS, Cache};
use sensorium_node_cache::mounts::{Mounts, in_use};
use sensorium_node_cache::volume::{DIGEST, STORE, Wanted};
use sensorium_tests::{S3Server, S3User};

/// Runs the ignored test `name` of this program in a mount namespace of its own.
fn in_a_namespace(name: &str) {
    if !rustix::process::geteuid().is_root() {
        println!("not run: mounts need root");
        return;
    }
    let unshare = |program: &Path, arguments: &[&str]| {
        let mut command = Command::new("unshare");
        let output =
            command.args(["--mount", "--propagation", "private"]).arg(program).args(arguments).output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.success(), said)
    };
    // Root of a container may have no right to it.
    let (may, said) = unshare(Path::new("true"), &[]);
    if !may {
        // Past the test runner, which shows nothing of tests that pass.
        let _ = writeln!(std::io::stderr(), "not run: for mounts root needs CAP_SYS_ADMIN: {}", said.trim_end());
        return;
    }
    let (passed, said) = unshare(&std::env::current_exe().unwrap(), &["--exact", name, "--ignored", "--nocapture"]);
    assert!(passed && said.contains("1 passed"), "{said}");
}

#[test]
fn an_artifact_appears_in_a_pod_read_only_and_is_in_use_until_it_is_taken_away() {
    in_a_namespace("mounts::publish_and_unpublish");
}

#[test]
#[ignore = "run in a namespace of its own"]
fn publish_and_unpublish() {
    let folder = tempfile::tempdir().unwrap();
    let at = |path: &str| folder.path().join(path);
    let (artifacts, view, pods) = (at("artifacts"), at("view"), at("kubelet/pods"));
    for path in ["artifacts/one/objects", "artifacts/two", "kubelet/pods/p/volumes"] {
        fs::create_dir_all(at(path)).unwrap();
    }
    fs::write(artifacts.join("one/objects/file"), b"content").unwrap();
    let mounts = Mounts::prepare(&artifacts, &view, &pods).unwrap();
    let target = pods.join("p/volumes/mount");
    for _ in 0..2 {
        mounts.publish("one", &target).unwrap(); // asked for twice, it is there once
    }
    assert_eq!(fs::read(target.join("objects/file")).unwrap(), b"content");
    let written = fs::File::options().write(true).open(target.join("objects/file"));
    assert_eq!(written.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(in_use(&pods).unwrap(), ["one".to_owned()].into());

    // Another process of the plugin, after this one: the mount is there, and known.
    let next = Mounts::prepare(&artifacts, &view, &pods).unwrap();
    assert_eq!(fs::read(target.join("objects/file")).unwrap(), b"content");
    assert_eq!(in_use(&pods).unwrap(), ["one".to_owned()].into());
    // Something else in its place is replaced.
    next.publish("two", &target).unwrap();
    assert_eq!(in_use(&pods).unwrap(), ["two".to_owned()].into());
    for _ in 0..2 {
        next.unpublish(&target).unwrap();
        assert!(!target.exists());
    }
    assert!(in_use(&pods).unwrap().is_empty());
    // An artifact that is not there is an error, and leaves nothing mounted.
    assert!(matches!(next.publish("three", &target), Err(Failure::Node(_))));
    assert!(in_use(&pods).unwrap().is_empty());
    unmount(&view, UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_full_disk_is_told_and_what_nobody_uses_makes_room() {
    in_a_namespace("mounts::a_small_disk");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run in a namespace of its own"]
async fn a_small_disk() {
    let (disk, buckets) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    mount("tmpfs", disk.path(), "tmpfs", MountFlags::empty(), Some(c"size=1m")).unwrap();
    let user = S3User::new("reader", "models");
    let server = S3Server::start(buckets.path(), "127.0.0.1:0", std::slice::from_ref(&user), |_| {}).await.unwrap();
    let capacity = 100_000_000; // more than there is: others fill disks too
    let cache = Cache::open(disk.path(), capacity, Box::new(|| Ok([].into()))).unwrap();
    let wanted = async |bytes: usize| {
        let digest = artifact(&server, &user, bytes).await;
        let attributes = [(STORE, "s3://models".to_owned()), (DIGEST, digest)];
        let attributes: HashMap<String, String> = attributes.map(|(name, value)| (name.to_owned(), value)).into();
        let secret = server.environment(&user).into_iter().collect();
        Wanted::read(&attributes, &secret, &[server.endpoint().to_owned()]).unwrap()
    };
    let first = cache.take(&wanted(600_000).await).await.unwrap();
    let failure = cache.take(&wanted(500_000).await).await.map(drop).unwrap_err();
    assert_eq!(failure, Failure::Full("the disk of the node's cache is full".to_owned()));
    assert_eq!(count(&disk.path().join(ARTIFACTS)), 1, "nothing is left of it");
    drop(first);
    cache.take(&wanted(500_000).await).await.unwrap();
    assert_eq!(count(&disk.path().join(ARTIFACTS)), 1, "the first one made room");
}

fn count(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

/// Commits an artifact of so many bytes; its digest.
async fn artifact(server: &S3Server, user: &S3User, bytes: usize) -> String {
    let store = Store::open_with("s3://models", &Volumes::default(), server.environment(user)).unwrap();
    let draft = store.draft().unwrap();
    fs::write(draft.path("graphs/fusion.onnx").unwrap(), vec![7; bytes]).unwrap();
    store.commit(draft, crate::parts()).await.unwrap().digest.to_string()
}

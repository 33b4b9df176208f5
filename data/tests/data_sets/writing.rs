//! Writing: WebDataset's format, whole or not at all.

use std::fs;
use std::io::Read;

use sensorium_data::{DataError, Dataset, ShardWriter};

use crate::common::{data_set, names, options, sample};

#[test]
fn a_shard_is_an_ordinary_tar_file_of_image_and_json_pairs() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("train");
    data_set(&target, 25);
    assert_eq!(names(&target), ["index.json", "shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]);
    let mut number = 0;
    for shard in ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"] {
        let mut archive = tar::Archive::new(fs::File::open(target.join(shard)).unwrap());
        let mut files = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            assert!(entry.header().as_ustar().is_some());
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (entry.path().unwrap().to_str().unwrap().to_owned(), bytes)
        });
        while let (Some((image_name, image)), Some((json_name, json))) = (files.next(), files.next()) {
            let expected = sample(number);
            assert_eq!((image_name, json_name), (format!("{}.png", expected.key), format!("{}.json", expected.key)));
            assert_eq!(image, expected.image);
            let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
            assert_eq!(json["questions"][0]["question"], expected.questions[0].question);
            assert_eq!(json["caption"].as_str(), expected.caption.as_deref());
            number += 1;
        }
    }
    assert_eq!(number, 25);
}

#[test]
fn the_same_samples_make_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    assert_eq!(data_set(&a, 25).digest(), data_set(&b, 25).digest());
    for name in names(&a) {
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name}");
    }
}

#[test]
fn a_data_set_is_not_there_before_it_is_finished_and_leaves_nothing_when_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("train");
    let mut writer = ShardWriter::create(&target, options()).unwrap();
    for number in 0..15 {
        writer.append(&sample(number)).unwrap();
    }
    assert!(!target.exists());
    drop(writer);
    assert_eq!(names(folder.path()), [".train.lock"]);
}

#[test]
fn an_earlier_data_set_stays_until_the_new_one_replaces_it() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("train");
    data_set(&target, 5);
    let mut writer = ShardWriter::create(&target, options()).unwrap();
    writer.append(&sample(0)).unwrap();
    assert_eq!(Dataset::open(&target).unwrap().len(), 5);
    assert_eq!(writer.finish().unwrap().len(), 1);
    assert_eq!(names(folder.path()), [".train.lock", "train"]);
}

#[test]
fn a_folder_with_other_things_is_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("thesis.txt"), b"important").unwrap();
    for target in [folder.path().to_owned(), folder.path().join("thesis.txt")] {
        let error = ShardWriter::create(&target, options()).unwrap_err();
        assert!(matches!(&error, DataError::Occupied { path } if *path == target), "{error}");
    }
    assert_eq!(fs::read(folder.path().join("thesis.txt")).unwrap(), b"important");
}

#[test]
fn two_writers_of_one_target_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("train");
    let _first = ShardWriter::create(&target, options()).unwrap();
    let error = ShardWriter::create(&target, options()).unwrap_err();
    assert!(matches!(&error, DataError::Busy { path } if *path == target), "{error}");
}

#[test]
fn a_sample_that_readers_could_not_tell_apart_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(&folder.path().join("train"), options()).unwrap();
    writer.append(&sample(1)).unwrap();
    let mut refused = |change: fn(&mut sensorium_data::Sample), reason: &str| {
        let mut sample = sample(2);
        change(&mut sample);
        let error = writer.append(&sample).unwrap_err();
        assert!(matches!(&error, DataError::InvalidSample { key, .. } if *key == sample.key), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    };
    refused(|sample| sample.key = "0001".into(), "another sample has the same key");
    refused(|sample| sample.key = "a.b".into(), "its key must be");
    refused(|sample| sample.key = "../a".into(), "its key must be");
    refused(|sample| sample.key = String::new(), "its key must be");
    refused(|sample| sample.key = "a".repeat(91), "its key must be");
    refused(|sample| sample.image = b"GIF89a".to_vec(), "not PNG, JPEG or WebP");
    assert_eq!(writer.finish().unwrap().len(), 1);
}

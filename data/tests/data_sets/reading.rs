//! Reading: any sample, from any thread, and every damage found and named.

use std::fs;

use proptest::prelude::*;
use sensorium_data::{DataError, Dataset};
use serde_json::{Value, json};

use crate::common::{data_set, flip_a_bit, sample};

#[test]
fn every_sample_reads_as_it_was_written_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("train");
    data_set(&target, 25);
    let dataset = Dataset::open(&target).unwrap();
    dataset.verify().unwrap();
    assert_eq!((dataset.len(), dataset.question_count(), dataset.index().captions), (25, 49, 13));
    assert_eq!(dataset.answers(), ["yes", "no"]);
    for number in (0..25).rev() {
        assert_eq!(dataset.sample(number).unwrap(), sample(number));
    }
    let error = dataset.sample(25).unwrap_err();
    assert!(matches!(error, DataError::OutOfRange { index: 25, len: 25 }), "{error}");
}

#[test]
fn the_questions_of_all_samples_come_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = data_set(&folder.path().join("train"), 12);
    let questions: Vec<_> = dataset.questions().map(Result::unwrap).collect();
    let expected: Vec<_> = (0..12).flat_map(|number| sample(number).questions).collect();
    assert_eq!(questions, expected);
}

#[test]
fn many_threads_read_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = data_set(&folder.path().join("train"), 25);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let dataset = &dataset;
            scope.spawn(move || {
                for i in 0..500 {
                    let number = (i * 7 + thread * 3) % 25;
                    assert_eq!(dataset.sample(number).unwrap(), sample(number));
                }
            });
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_flipped_bit_anywhere_in_a_sample_is_found_and_named(number in 0_usize..25, place in 0.0..1.0_f64, in_image: bool) {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("train");
        let dataset = data_set(&target, 25);
        let entry = &dataset.index().shards[number / 10].samples[number % 10];
        let (offset, bytes) =
            if in_image { (entry.image_offset, entry.image_bytes) } else { (entry.annotation_offset, entry.annotation_bytes) };
        let shard = target.join(format!("shard-0000{}.tar", number / 10));
        flip_a_bit(&shard, offset + (place * bytes as f64) as u64);

        let error = dataset.sample(number).unwrap_err();
        let expected_key = format!("{number:04}");
        assert!(matches!(&error, DataError::CorruptSample { key, shard: named, .. } if *key == expected_key && *named == shard));
        assert!(error.to_string().contains(&entry.digest));
        // The others are as good as before.
        let other = (number + 1) % 25;
        assert_eq!(dataset.sample(other).unwrap(), sample(other));
        assert!(matches!(dataset.verify().unwrap_err(), DataError::ShardDigest { path, .. } if path == shard));
    }
}

#[test]
fn a_shard_of_another_size_is_refused_when_opening() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("train");
    data_set(&target, 15);
    let shard = target.join("shard-00001.tar");
    let size = fs::metadata(&shard).unwrap().len();
    fs::File::options().write(true).open(&shard).unwrap().set_len(size - 512).unwrap();
    let error = Dataset::open(&target).unwrap_err();
    assert!(
        matches!(&error, DataError::ShardSize { path, expected, found } if *path == shard && *expected == size && *found == size - 512),
        "{error}"
    );
}

#[test]
fn a_shard_that_shrinks_while_it_is_open_is_a_damaged_sample() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("train");
    let dataset = data_set(&target, 5);
    fs::File::options().write(true).open(target.join("shard-00000.tar")).unwrap().set_len(600).unwrap();
    let error = dataset.sample(4).unwrap_err();
    assert!(matches!(&error, DataError::CorruptSample { key, .. } if key == "0004"), "{error}");
}

#[test]
fn a_missing_shard_and_a_missing_index_are_different_errors() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("train");
    data_set(&target, 5);
    fs::remove_file(target.join("shard-00000.tar")).unwrap();
    let error = Dataset::open(&target).unwrap_err();
    assert!(
        matches!(&error, DataError::Io { action: "open", path, .. } if path.ends_with("shard-00000.tar")),
        "{error}"
    );
    let error = Dataset::open(folder.path()).unwrap_err();
    assert!(matches!(error, DataError::NotADataset { .. }), "{error}");
}

#[test]
fn an_index_that_contradicts_itself_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("train");
    data_set(&target, 5);
    let path = target.join("index.json");
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let changes = [
        ("/shards/0/file", json!("../shard-00000.tar"), "is not the name of a .tar file"),
        ("/shards/0/samples/1/key", json!("0000"), "sample `0000` of shard `shard-00000.tar` is listed twice"),
        ("/shards/0/samples/1/key", json!("a/b"), "its key must be"),
        ("/shards/0/samples/1/imageBytes", json!(1_u64 << 40), "sample `0001` does not lie within the"),
        ("/shards/0/samples/1/annotationOffset", json!(u64::MAX), "sample `0001` does not lie within the"),
        ("/shards/0/samples/1/annotationOffset", json!(0), "sample `0001` does not lie within the"),
        ("/questions", json!("many"), "invalid type"),
    ];
    for (pointer, value, reason) in changes {
        let mut index = good.clone();
        *index.pointer_mut(pointer).unwrap() = value;
        fs::write(&path, index.to_string()).unwrap();
        let error = Dataset::open(&target).unwrap_err();
        assert!(matches!(error, DataError::InvalidIndex { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    fs::write(&path, r#"{"schemaVersion": 2, "novel": 1}"#).unwrap();
    let error = Dataset::open(&target).unwrap_err();
    assert!(matches!(error, DataError::UnknownSchema { found: 2, supported: 1, .. }), "{error}");
}

//! Importing easy-VQA: the real data, and sources and moments that are not right.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sensorium_data::import::{Progress, easy_vqa};
use sensorium_data::{DataError, Dataset};

use crate::common::{self, flip_a_bit, names, sample};

const OUT: &str = "SENSORIUM_TEST_OUT";

#[test]
fn the_real_data_has_all_images_and_questions_and_a_second_import_does_nothing() {
    let source = common::easy_vqa();
    let out = tempfile::tempdir().unwrap();
    let mut last = BTreeMap::new();
    let summary = easy_vqa(&source, out.path(), |Progress { split, done, total }| {
        assert_eq!(last.insert(split, done).unwrap_or(0) + 1, done);
        assert!(done <= total);
    })
    .unwrap();
    assert_eq!(last, [("test", 1000), ("train", 4000)].into());
    let counts: Vec<_> = summary
        .splits
        .iter()
        .map(|split| (split.split, split.samples, split.questions, split.captions, split.written))
        .collect();
    assert_eq!(counts, [("train", 4000, 38575, 3542, true), ("test", 1000, 9673, 880, true)]);

    // Every byte of every image, and every question in its order, against the source.
    for (split, len) in [("train", 4000), ("test", 1000)] {
        let dataset = Dataset::open(&out.path().join(split)).unwrap();
        assert_eq!(dataset.answers().len(), 13);
        let rows = fs::read(source.join(split).join("questions.json")).unwrap();
        let rows: Vec<(String, String, usize)> = serde_json::from_slice(&rows).unwrap();
        let mut rows = rows.into_iter().peekable();
        for number in 0..len {
            let sample = dataset.sample(number).unwrap();
            assert_eq!(sample.key, format!("{number:06}"));
            assert!(
                sample.image == fs::read(source.join(format!("{split}/images/{number}.png"))).unwrap(),
                "{split} {number}"
            );
            for found in &sample.questions {
                let (question, answer, image) = rows.next().unwrap();
                assert_eq!((&found.question, &found.answer, number), (&question, &answer, image));
                assert!(dataset.answers().contains(&answer));
                // The caption is in agreement with what is asked directly.
                if let Some(caption) = &sample.caption
                    && question.starts_with("what")
                {
                    assert!(
                        caption.ends_with(&answer) || caption.starts_with(&format!("a {answer} ")),
                        "{caption}: {question} {answer}"
                    );
                }
            }
        }
        assert!(rows.next().is_none());
    }

    let started = Instant::now();
    let again = easy_vqa(&source, out.path(), |progress| panic!("{progress:?}")).unwrap();
    let elapsed = started.elapsed();
    assert!(again.splits.iter().all(|split| !split.written && split.samples >= 1000));
    assert!(elapsed < Duration::from_secs(2), "a second import took {elapsed:?}");
}

/// A source of `images` images with one question each.
fn small_source(folder: &Path, images: usize) {
    fs::write(folder.join("answers.txt"), "red\nblue\n").unwrap();
    for split in ["train", "test"] {
        fs::create_dir_all(folder.join(split).join("images")).unwrap();
        let rows: Vec<_> = (0..images).map(|image| ("what color is the circle?", "blue", image)).collect();
        fs::write(folder.join(split).join("questions.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
        for image in 0..images {
            fs::write(folder.join(split).join(format!("images/{image}.png")), sample(image).image).unwrap();
        }
    }
}

#[test]
fn a_split_that_is_damaged_or_from_other_questions_is_written_again() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    small_source(source.path(), 3);
    let written = || -> Vec<bool> {
        let summary = easy_vqa(source.path(), out.path(), |_| {}).unwrap();
        summary.splits.iter().map(|split| split.written).collect()
    };
    assert_eq!(written(), [true, true]);
    assert_eq!(written(), [false, false]);

    flip_a_bit(&out.path().join("test/shard-00000.tar"), 515);
    assert_eq!(written(), [false, true]);
    Dataset::open(&out.path().join("test")).unwrap().verify().unwrap();

    fs::write(source.path().join("train/questions.json"), r#"[["what shape is present?", "red", 1]]"#).unwrap();
    assert_eq!(written(), [true, false]);
    assert_eq!(Dataset::open(&out.path().join("train")).unwrap().len(), 1);
}

#[test]
fn a_data_set_that_somebody_else_has_made_stays() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    small_source(source.path(), 3);
    easy_vqa(source.path(), out.path(), |_| {}).unwrap();
    let path = out.path().join("test/index.json");
    let own = fs::read_to_string(&path).unwrap();
    for other in [own.replace("easy-vqa ", "my pictures "), own.replace("\"schemaVersion\":1", "\"schemaVersion\":9")] {
        assert_ne!(other, own);
        fs::write(&path, &other).unwrap();
        let error = easy_vqa(source.path(), out.path(), |_| {}).unwrap_err();
        assert!(matches!(error, DataError::Foreign { .. } | DataError::UnknownSchema { .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), other);
    }
}

#[test]
fn a_source_that_lacks_a_part_is_refused_with_a_hint_and_nothing_is_written() {
    for part in ["answers.txt", "train/questions.json", "train/images", "test/questions.json", "test/images"] {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        small_source(source.path(), 1);
        let path = source.path().join(part);
        if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.unwrap();
        let error = easy_vqa(source.path(), out.path(), |_| {}).unwrap_err();
        assert!(matches!(&error, DataError::InvalidSource { path: named, .. } if *named == path), "{error}");
        assert!(error.to_string().contains("give the folder `data` of the easy_vqa Python package"), "{error}");
        assert_eq!(names(out.path()), [""; 0]);
    }
}

#[test]
fn a_source_that_contradicts_itself_is_refused_with_the_place() {
    let cases = [
        ("answers.txt", "red\nred\n", "`red` is listed twice"),
        ("answers.txt", "\n", "it lists no answers"),
        (
            "train/questions.json",
            r#"[["why?", "because", 0]]"#,
            "`why?` of image 0 has answer `because`, which answers.txt lacks",
        ),
        ("train/questions.json", r#"{"questions": []}"#, "expected [[question, answer, image], ...]"),
    ];
    for (file, content, reason) in cases {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        small_source(source.path(), 1);
        fs::write(source.path().join(file), content).unwrap();
        let error = easy_vqa(source.path(), out.path(), |_| {}).unwrap_err();
        assert!(matches!(&error, DataError::InvalidSource { path, .. } if path.ends_with(file)), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn an_image_that_is_missing_is_named_and_leaves_no_split() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    small_source(source.path(), 3);
    fs::remove_file(source.path().join("train/images/2.png")).unwrap();
    let error = easy_vqa(source.path(), out.path(), |_| {}).unwrap_err();
    assert!(matches!(&error, DataError::Io { path, .. } if path.ends_with("train/images/2.png")), "{error}");
    assert_eq!(names(out.path()), [".train.lock"]);
}

#[test]
fn an_import_killed_in_the_middle_leaves_no_data_set_and_the_next_one_succeeds() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    small_source(source.path(), 40);
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "easy_vqa::child_that_imports_and_waits", "--ignored", "--nocapture"])
        .env(OUT, out.path())
        .env("SENSORIUM_TEST_SOURCE", source.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("in the middle")));
    let error = easy_vqa(source.path(), out.path(), |_| {}).unwrap_err();
    assert!(matches!(error, DataError::Busy { .. }), "{error}");
    process.kill().unwrap();
    process.wait().unwrap();

    assert!(out.path().join(".train.partial").exists());
    assert!(matches!(Dataset::open(&out.path().join("train")).unwrap_err(), DataError::NotADataset { .. }));
    // What is left behind does not pass for a data set either.
    assert!(matches!(Dataset::open(&out.path().join(".train.partial")).unwrap_err(), DataError::NotADataset { .. }));

    let summary = easy_vqa(source.path(), out.path(), |_| {}).unwrap();
    assert!(summary.splits.iter().all(|split| split.written && split.samples == 40));
    assert_eq!(names(out.path()), [".test.lock", ".train.lock", "test", "train"]);
}

#[test]
#[ignore = "the other process of a test, which starts it"]
fn child_that_imports_and_waits() {
    let (Some(out), Some(source)) = (std::env::var_os(OUT), std::env::var_os("SENSORIUM_TEST_SOURCE")) else { return };
    easy_vqa(Path::new(&source), Path::new(&out), |progress| {
        if progress.done == 20 {
            println!("in the middle");
            // Longer than the test takes; the parent kills this process.
            std::thread::sleep(Duration::from_mins(1));
        }
    })
    .unwrap();
}

#[test]
fn an_import_on_a_full_disk_says_so_and_leaves_the_last_good_data_set() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    small_source(source.path(), 3);
    easy_vqa(source.path(), out.path(), |_| {}).unwrap();
    small_source(source.path(), 200);
    // The file-size limit stands for the disk: the same kind of error at the same calls, and it needs no rights.
    let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact easy_vqa::child_that_finds_the_disk_full --ignored --nocapture";
    let output = Command::new("sh")
        .args(["-c", script, std::env::current_exe().unwrap().to_str().unwrap()])
        .env(OUT, out.path())
        .env("SENSORIUM_TEST_SOURCE", source.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    let dataset = Dataset::open(&out.path().join("train")).unwrap();
    dataset.verify().unwrap();
    assert_eq!(dataset.len(), 3);
    assert!(!out.path().join(".train.partial").exists());
}

#[test]
#[ignore = "the other process of a test, which starts it"]
fn child_that_finds_the_disk_full() {
    let (Some(out), Some(source)) = (std::env::var_os(OUT), std::env::var_os("SENSORIUM_TEST_SOURCE")) else { return };
    let error = easy_vqa(Path::new(&source), Path::new(&out), |_| {}).unwrap_err();
    assert!(matches!(&error, DataError::NoSpace { path, .. } if path.ends_with("shard-00000.tar")), "{error:?}");
}

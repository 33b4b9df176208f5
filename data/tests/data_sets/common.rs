//! What the tests share.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sensorium_data::{Dataset, QuestionAnswer, Sample, ShardWriter, WriterOptions};

/// Sample `number`, with an image of `number` bytes after the PNG signature.
pub(crate) fn sample(number: usize) -> Sample {
    let mut image = b"\x89PNG\r\n\x1a\n".to_vec();
    image.extend((0..number).map(|i| (i * 7) as u8));
    let questions = (0..=number % 3)
        .map(|q| QuestionAnswer { question: format!("what is {number} plus {q}?"), answer: (number + q).to_string() })
        .collect();
    Sample {
        key: format!("{number:04}"),
        image,
        questions,
        caption: number.is_multiple_of(2).then(|| format!("the number {number}")),
    }
}

/// A data set of `len` samples in shards of 10.
pub(crate) fn data_set(target: &Path, len: usize) -> Dataset {
    let mut writer = ShardWriter::create(target, options()).unwrap();
    for number in 0..len {
        writer.append(&sample(number)).unwrap();
    }
    writer.finish().unwrap()
}

pub(crate) fn options() -> WriterOptions {
    WriterOptions { samples_per_shard: 10, answers: vec!["yes".into(), "no".into()], source: None }
}

/// Changes one bit of the byte at `offset`.
pub(crate) fn flip_a_bit(path: &Path, offset: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The real easy-VQA data, which the set-up of the project installs.
pub(crate) fn easy_vqa() -> PathBuf {
    let folder = std::env::var_os("SENSORIUM_EASY_VQA").expect("SENSORIUM_EASY_VQA is not set: run `make setup`");
    PathBuf::from(folder)
}

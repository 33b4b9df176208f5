//! `sensorium data`: getting data sets in, and looking at them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use sensorium_data::import::{self, Progress as ImportProgress};
use sensorium_data::{DataError, Dataset};

use crate::args::{DataCommand, DatasetName};
use crate::error::Error;
use crate::local::state_dir::StateDir;
use crate::output::{self, indent, table};
use crate::text::size;

/// Where set-up has put easy-VQA on the machine that built this program.
const EASY_VQA_AT_BUILD: Option<&str> = option_env!("SENSORIUM_EASY_VQA");

/// Runs one of the commands.
///
/// # Errors
/// When the data cannot be read or written.
pub fn run(command: &DataCommand, state: &StateDir) -> Result<(), Error> {
    match command {
        DataCommand::Import { dataset, from, out } => {
            let default = format!("pvc://datasets/{}", dataset.as_str());
            import_dataset(*dataset, from.as_deref(), out.as_deref().unwrap_or(&default), state)
        }
        DataCommand::Ls { uri, samples } => {
            let dataset = open(state, uri)?;
            output::print(&listing(uri, &dataset, *samples)?)
        }
    }
}

/// Opens the data set that `uri` names.
///
/// # Errors
/// [`Error::Data`], whose hint says how to get the data where it is missing.
pub fn open(state: &StateDir, uri: &str) -> Result<Dataset, Error> {
    let folder = state.volumes_of(&[uri])?.local_path(uri)?;
    Dataset::open(&folder).map_err(|source| Error::Data { uri: uri.to_owned(), source })
}

fn import_dataset(dataset: DatasetName, from: Option<&Path>, out: &str, state: &StateDir) -> Result<(), Error> {
    let DatasetName::EasyVqa = dataset;
    let source = from
        .map(PathBuf::from)
        .or_else(|| EASY_VQA_AT_BUILD.map(PathBuf::from))
        .ok_or(Error::NoSource { dataset: dataset.as_str() })?;
    let folder = state.volumes_of(&[out])?.local_path(out)?;
    let failed = |source| Error::Data { uri: out.to_owned(), source };
    let bar = indicatif::ProgressBar::new(0).with_style(bar_style());
    let show = |progress: ImportProgress| {
        bar.set_message(progress.split);
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    };
    let summary = import::easy_vqa(&source, &folder, show).map_err(failed)?;
    bar.finish_and_clear();
    for split in &summary.splits {
        let uri = format!("{}/{}", out.trim_end_matches('/'), split.split);
        let verb = if split.written { "written" } else { "there already" };
        output::print(&format!("{uri}: {} images, {} questions, {verb}\n", split.samples, split.questions))?;
    }
    Ok(())
}

fn bar_style() -> indicatif::ProgressStyle {
    indicatif::ProgressStyle::with_template("importing {msg}  {bar:23}  {pos}/{len}")
        .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar())
        .progress_chars("##-")
}

fn listing(uri: &str, dataset: &Dataset, samples: usize) -> Result<String, Error> {
    let index = dataset.index();
    let bytes = index.shards.iter().map(|shard| shard.bytes).sum();
    let mut text = table(&[
        vec!["data".to_owned(), uri.to_owned()],
        vec!["digest".to_owned(), dataset.digest().to_owned()],
        vec!["samples".to_owned(), dataset.len().to_string()],
        vec!["questions".to_owned(), dataset.question_count().to_string()],
        vec!["answers".to_owned(), dataset.answers().join(", ")],
        vec!["shards".to_owned(), format!("{}, {}", index.shards.len(), size(bytes))],
    ]);
    for number in 0..samples.min(dataset.len()) {
        let sample = dataset.sample(number).map_err(|source: DataError| Error::Data { uri: uri.to_owned(), source })?;
        let _ = writeln!(text, "\n{}  {}", sample.key, sample.caption.unwrap_or_default());
        let rows: Vec<_> = sample.questions.into_iter().map(|q| vec![q.question, q.answer]).collect();
        text.push_str(&indent(&table(&rows)));
    }
    Ok(text)
}

//! What the benchmarks share: rows of figures, printed as a table and kept in `bench/results/NAME.json`.
//!
//! Each benchmark is a program in `src/bin/` that measures the released programs, not this workspace's libraries, and
//! sets each figure beside a peer measured on the same machine, or beside a limit that was set beforehand.

pub mod attack;
pub mod fuzz;
pub mod until_refused;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;
use tempfile::NamedTempFile;

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// One figure.
#[derive(Debug, Serialize)]
struct Row {
    case: String,
    ours: f64,
    peer: f64,
    peer_name: &'static str,
    unit: &'static str,
    better: Better,
    /// Above 1 means that ours is better; null where a division by zero says nothing.
    ratio: Option<f64>,
}

/// All figures of one benchmark, and where they come from.
#[derive(Debug, Serialize)]
pub struct Report {
    #[serde(skip)]
    name: String,
    date: String,
    commit: String,
    cpu: String,
    cores: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<String>,
    command: String,
    rows: Vec<Row>,
}

impl Report {
    /// An empty report of the benchmark `name`, on this machine, now.
    ///
    /// # Errors
    /// When the machine cannot be told.
    pub fn new(name: &'static str) -> Result<Self> {
        let arguments = std::env::args().skip(1);
        let command = std::iter::once(format!("bench-{name}")).chain(arguments).collect::<Vec<_>>().join(" ");
        Ok(Self {
            name: name.to_owned(),
            date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
            commit: commit()?,
            cpu: cpu()?,
            cores: std::thread::available_parallelism()?.get(),
            gpu: None,
            command,
            rows: Vec::new(),
        })
    }

    /// The same, kept in `bench/results/NAME.json`.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// The same, of what runs on this machine's first GPU.
    ///
    /// # Errors
    /// When that cannot be told.
    pub fn on_gpu(self) -> Result<Self> {
        Ok(Self { gpu: Some(gpu()?), ..self })
    }

    /// Adds a figure `ours` beside that of the peer `(name, figure)`.
    pub fn row(&mut self, case: String, unit: &'static str, better: Better, ours: f64, peer: (&'static str, f64)) {
        let (peer_name, peer) = peer;
        self.rows.push(Row { case, ours, peer, peer_name, unit, better, ratio: ratio(better, ours, peer) });
    }

    /// Prints the table and writes `bench/results/NAME.json`, whole or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&self) -> Result<()> {
        print!("{}", self.table());
        self.save()?;
        let gpu = self.gpu.as_ref().map_or_else(String::new, |gpu| format!(" and {gpu}"));
        println!(
            "\n{} on {} ({} cores){gpu}, written to bench/results/{}.json",
            self.commit, self.cpu, self.cores, self.name
        );
        Ok(())
    }

    /// Writes `bench/results/NAME.json`, whole or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self) -> Result<()> {
        let folder = repository().join("bench/results");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let path = folder.join(&self.name).with_extension("json");
        let mut file = NamedTempFile::new_in(&folder)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        writeln!(file)?;
        file.persist(&path).with_context(|| path.display().to_string())?;
        Ok(())
    }

    fn table(&self) -> String {
        let head = ["case", "ours", "peer", "", "unit", "better", "ratio"].map(str::to_owned);
        let line = |row: &Row| {
            let ratio = row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            let better = if row.better == Better::Higher { "higher" } else { "lower" };
            let (ours, peer) = (figure(row.ours), figure(row.peer));
            [row.case.clone(), ours, peer, row.peer_name.to_owned(), row.unit.to_owned(), better.to_owned(), ratio]
        };
        let lines: Vec<_> = std::iter::once(head).chain(self.rows.iter().map(line)).collect();
        let mut text = String::new();
        for line in &lines {
            for (column, cell) in line.iter().enumerate() {
                let width = lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
                // Figures are aligned to the right.
                let cell =
                    if [1, 2, 6].contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
                text.push_str(&cell);
                text.push_str("  ");
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        text
    }
}

/// Three digits that say something.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// How many times better ours is.
#[expect(clippy::float_cmp, reason = "two zeros have no quotient; near figures do")]
fn ratio(better: Better, ours: f64, peer: f64) -> Option<f64> {
    let ratio = match better {
        _ if ours == peer => 1.0,
        Better::Higher => ours / peer,
        Better::Lower => peer / ours,
    };
    ratio.is_finite().then_some(ratio)
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn commit() -> Result<String> {
    let mut command = Command::new("git");
    command.args(["describe", "--always", "--dirty", "--exclude=*"]).current_dir(repository());
    let output = command.output().context("git")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn cpu() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    Ok(model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, model)| model.to_owned()))
}

fn gpu() -> Result<String> {
    let output = Command::new("nvidia-smi").args(["--query-gpu=name", "--format=csv,noheader"]).output();
    let output = output.context("nvidia-smi, which tells the name of the GPU")?;
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    names.lines().next().map(str::to_owned).context("nvidia-smi names no GPU")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_above_one_means_that_ours_is_better() {
        assert_eq!(ratio(Better::Higher, 20.0, 10.0), Some(2.0));
        assert_eq!(ratio(Better::Lower, 5.0, 10.0), Some(2.0));
        assert_eq!(ratio(Better::Lower, 0.0, 0.0), Some(1.0));
        assert_eq!(ratio(Better::Lower, 3.0, 0.0), Some(0.0));
        assert_eq!(ratio(Better::Lower, 0.0, 3.0), None);
    }
}

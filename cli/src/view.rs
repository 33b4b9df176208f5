//! What a run shows: progress bars in a terminal, plain lines elsewhere.
//!
//! Every job has one line. In a terminal it is redrawn in place; elsewhere a line is printed when the job's state
//! changes, and every few seconds at most while it does not.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use sensorium_api::run::Progress;

use crate::text::duration;

/// Time between two plain lines of a job whose state does not change.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
/// Room for `KIND/NAME`, so that what follows lines up.
const NAME_WIDTH: usize = 24;
/// Room for `2 workers`.
const WORKERS_WIDTH: usize = 9;
const BAR_WIDTH: usize = 23;

/// Where lines go.
#[derive(Debug, Clone)]
pub enum View {
    /// Bars that are redrawn in place.
    Terminal(MultiProgress),
    /// A line per change.
    Plain,
}

impl View {
    /// Bars where standard output is a terminal, unless `plain` asks for lines.
    pub fn new(plain: bool) -> Self {
        if plain || !std::io::stdout().is_terminal() {
            Self::Plain
        } else {
            Self::Terminal(MultiProgress::with_draw_target(ProgressDrawTarget::stdout()))
        }
    }

    /// Prints a line, above the bars.
    pub fn line(&self, text: &str) {
        // A run outlives its reader: `sensorium up | head` must not stop training half way.
        let _ = match self {
            Self::Terminal(bars) => bars.suspend(|| writeln!(std::io::stdout(), "{text}")),
            Self::Plain => writeln!(std::io::stdout(), "{text}"),
        };
    }

    /// Prints a line about `job`, above the bars.
    pub fn job_line(&self, job: &str, text: &str) {
        self.line(&format!("{job:NAME_WIDTH$} {text}"));
    }

    /// The moving line of `job`, of which `workers` says in a few words what runs.
    pub fn start(&self, job: &str, workers: &str) -> JobView {
        let bar = match self {
            Self::Terminal(bars) => {
                let bar = bars.add(ProgressBar::new(1)).with_style(style());
                bar.set_prefix(format!("{job:NAME_WIDTH$} {workers:WORKERS_WIDTH$}"));
                bar.set_message("starting");
                bar.enable_steady_tick(Duration::from_millis(250));
                Some(bar)
            }
            Self::Plain => None,
        };
        JobView { view: self.clone(), job: job.to_owned(), bar, printed: None, resumed: false }
    }
}

fn style() -> ProgressStyle {
    let template = format!("{{prefix}}  {{bar:{BAR_WIDTH}}}  {{msg}}");
    ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("##-")
}

/// The moving line of one job. Dropping it removes the bar.
#[derive(Debug)]
pub struct JobView {
    view: View,
    job: String,
    bar: Option<ProgressBar>,
    /// The last plain line's state and time.
    printed: Option<(String, Instant)>,
    /// Whether it was said from where the job goes on.
    resumed: bool,
}

impl JobView {
    /// Shows how far the job is.
    pub fn update(&mut self, progress: &Progress) {
        if let Some(step) = progress.resumed_from.filter(|_| !self.resumed) {
            self.resumed = true;
            self.note(&format!("goes on from step {step}"));
        }
        let text = status(progress);
        if let Some(bar) = &self.bar {
            // A bar of length 0 would be drawn full.
            bar.set_length(progress.steps.max(1));
            bar.set_position(progress.step);
            bar.set_message(text);
        } else if self.is_due(&progress.state, Instant::now()) {
            self.view.job_line(&self.job, &text);
        }
    }

    /// Prints a line that stays, such as a restart.
    pub fn note(&self, text: &str) {
        self.view.job_line(&self.job, text);
    }

    fn is_due(&mut self, state: &str, now: Instant) -> bool {
        let due =
            self.printed.as_ref().is_none_or(|(last, at)| last != state || now.duration_since(*at) >= PLAIN_INTERVAL);
        if due {
            self.printed = Some((state.to_owned(), now));
        }
        due
    }
}

impl Drop for JobView {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// One line of progress: `step 900/1500  loss 0.170  accuracy 0.920  eta 1m50s`.
fn status(progress: &Progress) -> String {
    let mut parts = Vec::new();
    if progress.steps > 0 {
        // While it trains, the steps say so; other states need their name.
        let label = if progress.state == "training" { "step" } else { progress.state.as_str() };
        parts.push(format!("{label} {}/{}", progress.step, progress.steps));
    } else {
        parts.push(progress.state.clone());
    }
    parts.extend(progress.loss.map(|loss| format!("loss {loss:.3}")));
    parts.extend(progress.accuracy.map(|accuracy| format!("accuracy {accuracy:.3}")));
    if progress.state == "training" {
        parts.extend(progress.eta_seconds.map(eta));
    } else {
        parts.extend(progress.message.clone());
    }
    parts.join("  ")
}

/// The time left, without the tenths of a second that would only flicker.
fn eta(seconds: f64) -> String {
    if seconds < 59.5 { format!("eta {seconds:.0}s") } else { format!("eta {}", duration(seconds)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn training() -> Progress {
        Progress {
            state: "training".to_owned(),
            step: 900,
            steps: 1500,
            loss: Some(0.17),
            accuracy: Some(0.92),
            eta_seconds: Some(110.0),
            ..Progress::default()
        }
    }

    #[test]
    fn training_shows_step_loss_accuracy_and_the_time_left() {
        assert_eq!(status(&training()), "step 900/1500  loss 0.170  accuracy 0.920  eta 1m50s");
        let nearly = Progress { eta_seconds: Some(7.3), ..training() };
        assert_eq!(status(&nearly), "step 900/1500  loss 0.170  accuracy 0.920  eta 7s");
    }

    #[test]
    fn another_state_is_named_and_what_is_unknown_is_left_out() {
        let calibrating = Progress { state: "calibrating".to_owned(), step: 12, steps: 512, ..Progress::default() };
        assert_eq!(status(&calibrating), "calibrating 12/512");
        let starting =
            Progress { state: "starting".to_owned(), message: Some("reading data".into()), ..Progress::default() };
        assert_eq!(status(&starting), "starting  reading data");
    }

    #[test]
    fn a_plain_line_comes_on_a_change_of_state_and_otherwise_every_few_seconds() {
        let mut view = View::Plain.start("TrainingJob/vqa", "1 worker");
        let start = Instant::now();
        assert!(view.is_due("training", start));
        assert!(!view.is_due("training", start + Duration::from_secs(4)));
        assert!(view.is_due("evaluating", start + Duration::from_secs(4)));
        assert!(!view.is_due("evaluating", start + Duration::from_secs(8)));
        assert!(view.is_due("evaluating", start + Duration::from_secs(9)));
    }
}

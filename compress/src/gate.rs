//! The acceptance gate: what was measured of parent and candidate, and what follows from it. Pure.

use std::time::Duration;

use sensorium_api::Acceptance;
use sensorium_api::run::GateResult;

/// What was measured on held-out questions, asked of both models in turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Questions that were asked.
    pub questions: u64,
    /// Of these, answered rightly by the parent.
    pub parent_right: u64,
    /// And by the candidate.
    pub candidate_right: u64,
    /// Times that one batch took: parent, candidate.
    pub batches: Vec<(Duration, Duration)>,
    /// Times that a single question took: parent, candidate.
    pub singles: Vec<(Duration, Duration)>,
    /// Bytes of all files of the parent.
    pub parent_bytes: u64,
    /// And of the candidate.
    pub candidate_bytes: u64,
}

impl Measured {
    /// Fraction of questions that the parent answered rightly.
    pub fn parent_accuracy(&self) -> f64 {
        self.parent_right as f64 / self.questions as f64
    }

    /// Fraction of questions that the candidate answered rightly.
    pub fn candidate_accuracy(&self) -> f64 {
        self.candidate_right as f64 / self.questions as f64
    }

    /// How many times as fast as the parent the candidate answered batches.
    pub fn speedup(&self) -> f64 {
        speedup(&self.batches)
    }

    /// The same for single questions.
    pub fn speedup_single(&self) -> f64 {
        speedup(&self.singles)
    }
}

/// The median over pairs of how many times as fast the second was; 1 when nothing was timed.
///
/// Of pairs, because both halves of one ran within milliseconds of each other: a machine that is busy for a while slows
/// both. The median, because an interruption falls into one half only and would carry a mean away.
fn speedup(pairs: &[(Duration, Duration)]) -> f64 {
    let ratio = |(parent, candidate): &(Duration, Duration)| {
        // A clock tick, so that a division by nothing cannot happen.
        parent.as_secs_f64().max(1e-9) / candidate.as_secs_f64().max(1e-9)
    };
    median(pairs.iter().map(ratio).collect()).unwrap_or(1.0)
}

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len() % 2 == 1 { upper } else { f64::midpoint(values[middle - 1], upper) })
}

/// Promotes or refuses, with the numbers it rests on.
pub fn decide(measured: &Measured, acceptance: &Acceptance) -> GateResult {
    let (parent, candidate) = (measured.parent_accuracy(), measured.candidate_accuracy());
    let drop = parent - candidate;
    let speedup = measured.speedup();
    let size_ratio = measured.candidate_bytes as f64 / measured.parent_bytes as f64;
    // A drop of exactly what is allowed passes, whatever the last bit of the subtraction says.
    let too_much = drop > acceptance.max_drop + 1e-9;
    let too_slow = acceptance.min_speedup.filter(|&wanted| speedup < wanted);
    let mut reasons = Vec::new();
    if too_much {
        reasons.push(format!("{:.3} points are lost, {:.3} are allowed", drop * 100.0, acceptance.max_drop * 100.0));
    }
    if let Some(wanted) = too_slow {
        reasons.push(format!("it is {speedup:.2} times as fast, {wanted:.2} is asked for"));
    }
    let promoted = reasons.is_empty();
    let verdict = if promoted { "promoted".to_owned() } else { format!("refused: {}", reasons.join("; ")) };
    let metric = acceptance.metric.as_str();
    let message = format!(
        "{metric} {candidate:.4} against {parent:.4} ({:+.3} points) on {} questions, {size_ratio:.2} of the size, \
         {speedup:.2} times as fast: {verdict}",
        -drop * 100.0,
        measured.questions,
    );
    GateResult { metric: metric.to_owned(), parent, candidate, drop, speedup, size_ratio, promoted, message }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "where these tests ask for equality they mean it")]
mod tests {
    use sensorium_api::Metric;

    use super::*;

    fn acceptance(max_drop: f64, min_speedup: Option<f64>) -> Acceptance {
        let data = "pvc://datasets/easy-vqa/test".to_owned();
        Acceptance { data, metric: Metric::VqaAccuracy, max_drop, min_speedup, samples: None }
    }

    fn measured(parent_right: u64, candidate_right: u64) -> Measured {
        let ms = Duration::from_millis;
        Measured {
            questions: 1000,
            parent_right,
            candidate_right,
            batches: vec![(ms(30), ms(20)), (ms(30), ms(300)), (ms(45), ms(30))],
            parent_bytes: 900,
            candidate_bytes: 300,
            ..Measured::default()
        }
    }

    #[test]
    fn a_candidate_within_its_limits_is_promoted_with_the_numbers() {
        let result = decide(&measured(990, 985), &acceptance(0.01, Some(1.5)));
        assert!(result.promoted);
        assert_eq!(
            result.message,
            "vqa_accuracy 0.9850 against 0.9900 (-0.500 points) on 1000 questions, 0.33 of the size, 1.50 times as fast: \
             promoted"
        );
    }

    #[test]
    fn a_drop_of_exactly_what_is_allowed_passes() {
        assert!(decide(&measured(990, 980), &acceptance(0.01, None)).promoted);
        assert!(!decide(&measured(990, 979), &acceptance(0.01, None)).promoted);
    }

    #[test]
    fn a_candidate_that_lost_too_much_is_refused_with_both_numbers() {
        let result = decide(&measured(990, 900), &acceptance(0.01, None));
        assert!(!result.promoted);
        assert!(result.message.ends_with("refused: 9.000 points are lost, 1.000 are allowed"), "{}", result.message);
    }

    #[test]
    fn a_candidate_that_is_too_slow_is_refused_only_if_speed_was_asked_for() {
        assert!(decide(&measured(990, 990), &acceptance(0.01, None)).promoted);
        let result = decide(&measured(990, 990), &acceptance(0.01, Some(2.0)));
        assert!(!result.promoted);
        assert!(result.message.ends_with("refused: it is 1.50 times as fast, 2.00 is asked for"), "{}", result.message);
    }

    #[test]
    fn a_candidate_that_is_better_has_a_negative_drop() {
        let result = decide(&measured(980, 990), &acceptance(0.0, None));
        assert!(result.promoted && result.drop < 0.0);
    }

    #[test]
    fn one_interruption_does_not_move_the_speedup() {
        assert_eq!(measured(1, 1).speedup(), 1.5);
    }

    #[test]
    fn the_median_of_an_even_number_of_values_lies_between_the_middle_two() {
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
    }
}

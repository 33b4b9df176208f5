use sensorium_modality::Tensor;

use crate::error::PipelineError;

/// The answer to one question.
#[derive(Clone, Debug, PartialEq)]
pub struct VqaAnswer {
    /// The likeliest answer.
    pub answer: String,
    /// Its probability, `0..=1`, as the model sees it.
    pub score: f32,
    /// Every answer with its probability, likeliest first; equals in the order of the model's answers.
    pub ranked: Vec<(String, f32)>,
}

/// Softmax over the answers of each row of `logits`, f32 `[N, answers]`.
///
/// # Errors
/// [`PipelineError::BadOutput`] for another type or shape, or a logit that is not a finite number.
pub fn rank_answers(logits: &Tensor, answers: &[String]) -> Result<Vec<VqaAnswer>, PipelineError> {
    let bad = |reason: String| PipelineError::BadOutput {
        graph: super::FUSION.to_owned(),
        output: super::LOGITS.to_owned(),
        reason,
    };
    let (values, width) = match (logits.as_slice::<f32>(), logits.shape()) {
        (Ok(values), &[_, width]) if width == answers.len() && width > 0 => (values, width),
        (_, shape) => {
            return Err(bad(format!("is {}{shape:?}, not f32[N, {}]", logits.dtype(), answers.len())));
        }
    };
    if let Some(position) = values.iter().position(|value| !value.is_finite()) {
        return Err(bad(format!("is {} in row {}", values[position], position / width)));
    }
    Ok(values.chunks_exact(width).map(|row| rank(row, answers)).collect())
}

fn rank(logits: &[f32], answers: &[String]) -> VqaAnswer {
    // Relative to the largest logit, no exponential overflows and the sum is at least 1.
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f32> = logits.iter().map(|logit| (logit - largest).exp()).collect();
    let sum: f32 = exponentials.iter().sum();
    let mut ranked: Vec<(String, f32)> =
        answers.iter().cloned().zip(exponentials.iter().map(|exponential| exponential / sum)).collect();
    ranked.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let (answer, score) = ranked.first().cloned().unwrap_or_default();
    VqaAnswer { answer, score, ranked }
}

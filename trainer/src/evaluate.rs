//! Evaluation on held-out data, shared out over the ranks.

use std::collections::BTreeMap;

use sensorium_api::run::Evaluation;
use sensorium_data::Dataset;
use sensorium_dist::{ProcessGroup, ReduceOp};
use sensorium_model::{Acts, Network, Slot, Task};
use tch::{Kind, Tensor};

use crate::batch::Preparation;
use crate::error::TrainError;
use crate::executor::Executor;

/// Images per forward pass. It changes memory and speed, not results.
const CHUNK: usize = 48;

/// Answers every question about the first `limit` images and compares: the same result on every rank.
///
/// `by_kind` groups questions as VQA benchmarks do, by the right answer: `yes/no`, `number`, `other`. A question whose right answer is none
/// that the network knows is one that it answers wrongly.
pub fn vqa(
    executor: &Executor<'_>,
    network: &Network,
    preparation: &Preparation,
    dataset: &Dataset,
    limit: usize,
    group: &ProcessGroup,
    labels: &[String],
) -> Result<Evaluation, TrainError> {
    let path = network.path(Task::Vqa);
    let classes = labels.len();
    // Behind the answers that are known, how many of each kind are not.
    let mut confusion = vec![0i64; classes * classes + KINDS.len()];
    let (rank, ranks) = (group.rank() as usize, group.size() as usize);
    let own: Vec<usize> = (0..dataset.len().min(limit)).skip(rank).step_by(ranks).collect();
    for chunk in own.chunks(CHUNK) {
        let (mut pixels, mut ids, mut index, mut targets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (row, &at) in chunk.iter().enumerate() {
            let sample = dataset.sample(at)?;
            pixels.push(preparation.image(&sample)?);
            for question in &sample.questions {
                let Ok(target) = preparation.target(&sample, &question.answer) else {
                    confusion[classes * classes + kind(&question.answer)] += 1;
                    continue;
                };
                ids.extend(preparation.ids(&sample, &question.question)?);
                targets.push(target);
                index.push(row as i64);
            }
        }
        if targets.is_empty() {
            continue;
        }
        let acts = Acts::from([
            (Slot::Pixels, preparation.stack_pixels(&pixels)?),
            (Slot::TextIds, preparation.stack_ids(&ids)?),
            (Slot::ImageIndex, Tensor::f_from_slice(&index)?),
        ]);
        let acts = executor.infer(&path, acts)?;
        let logits = &acts[&Slot::Logits];
        if logits.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            let reason =
                "the network gives numbers that are none; lower spec.training.optimizer.learningRate".to_owned();
            return Err(TrainError::Spec { field: "spec.training", reason });
        }
        let answers = Vec::<i64>::try_from(logits.f_argmax(-1, false)?)?;
        for (target, answer) in targets.iter().zip(answers) {
            confusion[*target as usize * classes + answer as usize] += 1;
        }
    }
    let total = Tensor::f_from_slice(&confusion)?;
    group.all_reduce(&total, ReduceOp::Sum)?.wait()?;
    let total = Vec::<i64>::try_from(total)?;
    let (known, unknown) = total.split_at(classes * classes);
    let rows: Vec<Vec<u64>> = known.chunks(classes).map(|row| row.iter().map(|&n| n as u64).collect()).collect();
    Ok(summarise(labels, rows, unknown))
}

fn summarise(labels: &[String], confusion: Vec<Vec<u64>>, unknown: &[i64]) -> Evaluation {
    let mut kinds: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for (kind, count) in KINDS.into_iter().zip(unknown) {
        kinds.entry(kind.to_owned()).or_default().1 += *count as u64;
    }
    for (class, row) in confusion.iter().enumerate() {
        let (right, asked) = kinds.entry(KINDS[kind(&labels[class])].to_owned()).or_default();
        *right += row[class];
        *asked += row.iter().sum::<u64>();
    }
    let (right, asked) = kinds.values().fold((0, 0), |(r, a), (right, asked)| (r + right, a + asked));
    let share = |right: u64, asked: u64| if asked == 0 { 0.0 } else { right as f64 / asked as f64 };
    let by_kind = kinds
        .into_iter()
        .filter(|(_, (_, asked))| *asked > 0)
        .map(|(kind, (right, asked))| (kind, share(right, asked)))
        .collect();
    Evaluation { labels: labels.to_vec(), confusion, accuracy: share(right, asked), by_kind }
}

const KINDS: [&str; 3] = ["yes/no", "number", "other"];

/// Which of [`KINDS`] an answer is of.
fn kind(answer: &str) -> usize {
    if answer == "yes" || answer == "no" {
        0
    } else if answer.parse::<f64>().is_ok() {
        1
    } else {
        2
    }
}

/// Recall at 1 of the right caption for each of the first `limit` images; captions that read the same count as the same.
/// Every rank computes it all, which needs no communication.
pub fn recall_at_1(
    executor: &Executor<'_>,
    network: &Network,
    preparation: &Preparation,
    dataset: &Dataset,
    limit: usize,
) -> Result<f64, TrainError> {
    let path = network.path(Task::Contrastive);
    let (mut texts, mut images, mut captions) = (Vec::new(), Vec::new(), Vec::new());
    let all: Vec<usize> = (0..dataset.len().min(limit)).collect();
    for chunk in all.chunks(CHUNK) {
        let (mut pixels, mut ids) = (Vec::new(), Vec::new());
        for &at in chunk {
            let sample = dataset.sample(at)?;
            let Some(caption) = &sample.caption else { continue };
            pixels.push(preparation.image(&sample)?);
            ids.extend(preparation.ids(&sample, caption)?);
            captions.push(caption.clone());
        }
        if ids.is_empty() {
            continue;
        }
        let acts = Acts::from([
            (Slot::Pixels, preparation.stack_pixels(&pixels)?),
            (Slot::TextIds, preparation.stack_ids(&ids)?),
        ]);
        let acts = executor.infer(&path, acts)?;
        texts.push(acts[&Slot::TextEmbedding].shallow_clone());
        images.push(acts[&Slot::ImageEmbedding].shallow_clone());
    }
    if captions.is_empty() {
        return Ok(0.0);
    }
    let scores = Tensor::f_cat(&images, 0)?.f_matmul(&Tensor::f_cat(&texts, 0)?.f_transpose(0, 1)?)?;
    let best = Vec::<i64>::try_from(scores.f_argmax(-1, false)?.f_to_kind(Kind::Int64)?)?;
    let right = best.iter().zip(&captions).filter(|(at, caption)| captions[**at as usize] == **caption).count();
    Ok(right as f64 / captions.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_is_the_share_of_the_diagonal_overall_and_by_kind() {
        let labels = ["yes", "no", "red", "7"].map(str::to_owned);
        let confusion = vec![vec![8, 2, 0, 0], vec![1, 9, 0, 0], vec![0, 0, 3, 1], vec![0, 0, 0, 0]];
        let found = summarise(&labels, confusion.clone(), &[0; 3]);
        assert!((found.accuracy - 20.0 / 24.0).abs() < 1e-12);
        assert_eq!(found.by_kind, BTreeMap::from([("other".to_owned(), 0.75), ("yes/no".to_owned(), 0.85)]));
        let found = summarise(&labels, confusion, &[0, 2, 4]);
        assert!((found.accuracy - 20.0 / 30.0).abs() < 1e-12, "what it does not know counts as wrong");
        assert_eq!((found.by_kind["number"], found.by_kind["other"]), (0.0, 0.375));
    }
}

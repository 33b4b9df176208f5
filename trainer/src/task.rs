//! Losses: what each task makes of the activations its path leaves, and the gradients it sends back.

use sensorium_dist::{ProcessGroup, ReduceOp};
use sensorium_model::{Acts, Slot};
use tch::{Kind, Reduction, Tensor};

use crate::error::TrainError;
use crate::executor::Gradients;

/// A task's loss on this rank's share of the batch, and the gradient at the end of its path.
pub struct LossAndGradients {
    /// Mean over this rank's share, in nats, before the task's weight.
    pub loss: f64,
    /// Of the weighted loss.
    pub gradients: Gradients,
}

fn slot(acts: &Acts<Tensor>, slot: Slot) -> Result<Tensor, TrainError> {
    let value = acts.get(&slot).ok_or_else(|| TrainError::MissingInput { block: "loss".to_owned(), slot })?;
    Ok(value.f_detach()?.f_set_requires_grad(true)?)
}

/// A target that takes no part in the loss.
const IGNORED: i64 = -100;

/// Sum over the rows that are not ignored, divided by the number of all rows: then the mean over ranks with equally many
/// rows is that of the whole batch, wherever the ignored ones are.
fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor, TrainError> {
    let sum = logits.f_cross_entropy_loss(targets, None::<&Tensor>, Reduction::Sum, IGNORED, 0.0)?;
    Ok(sum.f_div_scalar(targets.size()[0])?)
}

/// Visual question answering: cross-entropy of the answers' scores `[N, A]` against `targets` `[N]`.
pub fn vqa(acts: &Acts<Tensor>, targets: &Tensor, weight: f64) -> Result<LossAndGradients, TrainError> {
    let logits = slot(acts, Slot::Logits)?;
    let loss = cross_entropy(&logits, targets)?;
    loss.f_mul_scalar(weight)?.f_backward()?;
    Ok(LossAndGradients {
        loss: loss.f_double_value(&[])?,
        gradients: Gradients::from([(Slot::Logits, logits.f_grad()?)]),
    })
}

/// CLIP's symmetric contrastive loss (Radford et al. 2021, figure 3) over the images and captions of all ranks.
///
/// Each rank scores its own rows against everybody's columns. The columns are gathered, and their gradients go back to
/// the ranks they came from: one all-gather and one reduce-scatter per side. Every rank has the same number of rows.
/// Rows that are not `present` `[B]` (bool) are columns to tell apart from, and nothing more.
pub fn contrastive(
    acts: &Acts<Tensor>,
    present: &Tensor,
    group: &ProcessGroup,
    weight: f64,
) -> Result<LossAndGradients, TrainError> {
    let (text, image) = (slot(acts, Slot::TextEmbedding)?, slot(acts, Slot::ScaledImageEmbedding)?);
    let (all_text, all_image) = (gather(&text, group)?, gather(&image, group)?);
    let rows = text.size()[0];
    let first = i64::from(group.rank()) * rows;
    let targets = Tensor::f_arange_start(first, first + rows, (Kind::Int64, text.device()))?;
    let targets = targets.f_masked_fill(&present.f_logical_not()?, IGNORED)?;
    let by_image = cross_entropy(&image.f_matmul(&all_text.f_transpose(0, 1)?)?, &targets)?;
    let by_text = cross_entropy(&text.f_matmul(&all_image.f_transpose(0, 1)?)?, &targets)?;
    let loss = by_image.f_add(&by_text)?.f_mul_scalar(0.5)?;
    loss.f_mul_scalar(weight)?.f_backward()?;
    let mut gradients = Gradients::new();
    for (slot, own, all) in [(Slot::TextEmbedding, text, all_text), (Slot::ScaledImageEmbedding, image, all_image)] {
        // What the other ranks' rows make of this rank's columns.
        let from_others = own.f_zeros_like()?;
        group.reduce_scatter_into(&from_others, &all.f_grad()?.f_contiguous()?, ReduceOp::Sum)?.wait()?;
        gradients.insert(slot, own.f_grad()?.f_add(&from_others)?);
    }
    Ok(LossAndGradients { loss: loss.f_double_value(&[])?, gradients })
}

/// Everybody's rows, in the order of ranks, as a leaf of its own.
fn gather(rows: &Tensor, group: &ProcessGroup) -> Result<Tensor, TrainError> {
    let rows = rows.f_detach()?.f_contiguous()?;
    let mut shape = rows.size();
    shape[0] *= i64::from(group.size());
    let all = Tensor::f_empty(shape, (rows.kind(), rows.device()))?;
    group.all_gather_into(&all, &rows)?.wait()?;
    Ok(all.f_set_requires_grad(true)?)
}

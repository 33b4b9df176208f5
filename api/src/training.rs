//! How a network is trained: length, batch, optimiser, precision.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// How the network is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainingParams {
    /// Number of optimiser steps.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub steps: u64,
    /// What one step sees, over all data-parallel ranks together.
    pub batch: BatchSpec,
    /// AdamW, its learning-rate schedule and gradient clipping.
    #[serde(default)]
    pub optimizer: OptimizerSpec,
    /// Number format of weights, activations and gradients: `fp32`, 32-bit floating point everywhere.
    #[serde(default)]
    pub precision: Precision,
    /// Keep only each block's input and compute the rest again in the backward pass: less memory, about a third more
    /// time.
    #[serde(default)]
    pub activation_checkpointing: bool,
    /// Seed of the initial weights, the order of the samples and the augmentation. The same spec and seed give the
    /// same weights.
    #[serde(default)]
    #[schemars(range(max = 4_294_967_295_u64))]
    pub seed: u64,
    /// Steps between evaluations on `data.evaluation`. The last step is always evaluated, and no other when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub evaluate_every_steps: Option<u64>,
    /// Random changes to the samples that leave their labels true.
    #[serde(default)]
    pub augment: Augmentation,
}

/// What one step sees, over all data-parallel ranks together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BatchSpec {
    /// Images per step, over all ranks; a multiple of `parallelism.data`.
    #[schemars(range(min = 1, max = 16_777_216))]
    pub images: u32,
    /// Different questions asked about each image, whose features are computed once for all of them.
    #[serde(default = "default_questions_per_image")]
    #[schemars(range(min = 1, max = 1024))]
    pub questions_per_image: u32,
}

fn default_questions_per_image() -> u32 {
    1
}

/// AdamW with a linear warm-up and a cosine decay. Weight decay applies to tensors of two or more dimensions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OptimizerSpec {
    /// Learning rate at the end of the warm-up.
    #[serde(default = "default_learning_rate")]
    #[x_kube(validation = Rule::new("self > 0.0").message("must be above 0"))]
    pub learning_rate: f64,
    /// AdamW's two betas: decay of the running means of the gradient and of its square.
    #[serde(default = "default_betas")]
    #[x_kube(
        validation = Rule::new("self.all(beta, beta >= 0.0 && beta < 1.0)")
            .message("both must be at least 0 and below 1, such as [0.9, 0.999]")
    )]
    pub betas: [f64; 2],
    /// AdamW's epsilon: added to the denominator of an update.
    #[serde(default = "default_eps")]
    #[x_kube(validation = Rule::new("self > 0.0").message("must be above 0"))]
    pub eps: f64,
    /// Decoupled weight decay.
    #[serde(default = "default_weight_decay")]
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm, taken over all parameters, when theirs is larger.
    #[serde(default = "default_clip_norm")]
    #[x_kube(validation = Rule::new("self > 0.0").message("must be above 0"))]
    pub clip_norm: f64,
    /// Steps over which the learning rate rises from 0 to `learningRate`.
    #[serde(default)]
    #[schemars(range(max = 1_000_000_000))]
    pub warmup_steps: u64,
    /// Learning rate of the last step, as a fraction of `learningRate`.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub final_learning_rate_fraction: f64,
}

impl Default for OptimizerSpec {
    fn default() -> Self {
        Self {
            learning_rate: default_learning_rate(),
            betas: default_betas(),
            eps: default_eps(),
            weight_decay: default_weight_decay(),
            clip_norm: default_clip_norm(),
            warmup_steps: 0,
            final_learning_rate_fraction: 0.0,
        }
    }
}

fn default_learning_rate() -> f64 {
    1e-3
}

fn default_betas() -> [f64; 2] {
    [0.9, 0.999]
}

fn default_eps() -> f64 {
    1e-8
}

fn default_weight_decay() -> f64 {
    0.01
}

fn default_clip_norm() -> f64 {
    1.0
}

/// Number format of weights, activations and gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Precision {
    /// 32-bit floating point everywhere.
    #[default]
    Fp32,
}

/// Random changes to training samples.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Augmentation {
    /// Mirror every other image, at random. Only for data whose labels do not tell left from right.
    #[serde(default)]
    pub horizontal_flip: bool,
}

use serde::{Deserialize, Serialize};

use crate::image::ImageConfig;
use crate::text::TextConfig;

/// How a model's inputs were prepared and what its outputs mean; stored in its artifact's manifest.
///
/// The trainer writes it, every later reader prepares inputs by it: nothing about preprocessing is known elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PipelineSpec {
    /// Present when the model reads text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextSpec>,
    /// Present when the model reads images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageConfig>,
    /// What the model can do.
    pub tasks: Vec<TaskHead>,
}

impl PipelineSpec {
    /// The answers a VQA head chooses from, in the order of its logits.
    pub fn vqa_answers(&self) -> Option<&[String]> {
        self.tasks.iter().find_map(|task| match task {
            TaskHead::Vqa { answers } => Some(answers.as_slice()),
            TaskHead::Contrastive { .. } => None,
        })
    }

    /// Width of the contrastive embeddings.
    pub fn contrastive_dim(&self) -> Option<usize> {
        self.tasks.iter().find_map(|task| match task {
            TaskHead::Contrastive { dim } => Some(*dim),
            TaskHead::Vqa { .. } => None,
        })
    }
}

/// Text preparation of one model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TextSpec {
    /// The `tokenizer.json`, as a path inside the artifact.
    pub tokenizer: String,
    /// Length limits.
    pub config: TextConfig,
}

/// One thing a model was trained to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "type", deny_unknown_fields)]
pub enum TaskHead {
    /// Choose the answer to a question about an image.
    Vqa {
        /// Text of each class, in the order of the logits.
        answers: Vec<String>,
    },
    /// Embed texts and images in one space, where a pair that belongs together is close.
    Contrastive {
        /// Width of the embeddings.
        dim: usize,
    },
}

//! The shape of a multimodal network: one encoder per modality, and the fusion Transformer that reads both.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// A network described from scratch. Every modality's features are projected to `width`, marked with their modality
/// and read by one fusion Transformer; the tasks' heads sit on top.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("self.width % self.fusion.heads == 0")
        .field_path(".width")
        .message("must be a multiple of fusion.heads")
)]
pub struct Architecture {
    /// Width of the shared sequence, in features per token; a multiple of `fusion.heads`.
    #[serde(default = "default_width")]
    #[schemars(range(min = 1, max = 65_536))]
    pub width: u32,
    /// The text encoder: learned positions and bidirectional Transformer layers over word tokens.
    pub text: TextArchitecture,
    /// The image encoder: a convolutional stem that makes a grid of tokens, and Transformer layers over them.
    pub image: ImageArchitecture,
    /// The Transformer over the tokens of all modalities.
    pub fusion: FusionArchitecture,
    /// Length of the vectors that a `contrastive` task compares; needed by that task only.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_536))]
    pub embedding_dim: Option<u32>,
}

/// The text encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("self.width % self.heads == 0")
        .field_path(".width")
        .message("must be a multiple of heads")
)]
pub struct TextArchitecture {
    /// Number of Transformer layers.
    #[schemars(range(min = 1, max = 1024))]
    pub layers: u32,
    /// Features per token; a multiple of `heads`.
    #[schemars(range(min = 1, max = 65_536))]
    pub width: u32,
    /// Attention heads per layer.
    #[schemars(range(min = 1, max = 1024))]
    pub heads: u32,
    /// Width of a layer's hidden feed-forward features, as a multiple of `width`.
    #[serde(default = "default_mlp_ratio")]
    #[schemars(range(min = 1, max = 64))]
    pub mlp_ratio: u32,
    /// The longest text, in tokens; a longer one is refused.
    #[schemars(range(min = 1, max = 131_072))]
    pub max_length: u32,
}

/// The image encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("self.width % self.heads == 0")
        .field_path(".width")
        .message("must be a multiple of heads"),
    validation = Rule::new("self.stem[size(self.stem) - 1].channels == self.width")
        .field_path(".stem")
        .message("the channels of the last layer become the tokens, so there must be as many as width")
)]
pub struct ImageArchitecture {
    /// Height and width of the images that the network sees, in pixels; others are resized.
    #[schemars(range(min = 1, max = 16_384))]
    pub size: u32,
    /// Convolutions from pixels to the grid of tokens, in order, each but the last followed by GELU. The last one's
    /// `channels` equal `width`. A single layer with `kernel` equal to `stride` is ViT's patch embedding.
    #[schemars(length(min = 1, max = 16))]
    pub stem: Vec<StemLayer>,
    /// Number of Transformer layers.
    #[schemars(range(min = 1, max = 1024))]
    pub layers: u32,
    /// Features per token; a multiple of `heads`.
    #[schemars(range(min = 1, max = 65_536))]
    pub width: u32,
    /// Attention heads per layer.
    #[schemars(range(min = 1, max = 1024))]
    pub heads: u32,
    /// Width of a layer's hidden feed-forward features, as a multiple of `width`.
    #[serde(default = "default_mlp_ratio")]
    #[schemars(range(min = 1, max = 64))]
    pub mlp_ratio: u32,
}

/// One convolution of the image encoder's stem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StemLayer {
    /// Output channels.
    #[schemars(range(min = 1, max = 65_536))]
    pub channels: u32,
    /// Height and width of the kernel, in pixels.
    #[schemars(range(min = 1, max = 256))]
    pub kernel: u32,
    /// Pixels from one position of the kernel to the next.
    #[schemars(range(min = 1, max = 256))]
    pub stride: u32,
    /// Rows and columns of zeros added on each side.
    #[serde(default)]
    #[schemars(range(max = 256))]
    pub padding: u32,
}

/// The fusion Transformer; its width is the architecture's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FusionArchitecture {
    /// Number of Transformer layers.
    #[schemars(range(min = 1, max = 1024))]
    pub layers: u32,
    /// Attention heads per layer.
    #[schemars(range(min = 1, max = 1024))]
    pub heads: u32,
    /// Width of a layer's hidden feed-forward features, as a multiple of the architecture's `width`.
    #[serde(default = "default_mlp_ratio")]
    #[schemars(range(min = 1, max = 64))]
    pub mlp_ratio: u32,
}

fn default_width() -> u32 {
    768
}

fn default_mlp_ratio() -> u32 {
    4
}

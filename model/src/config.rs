//! What a network looks like, checked before anything is built.

use serde::{Deserialize, Serialize};

/// A multimodal network: one encoder per modality, a fusion Transformer, and heads for the tasks that are asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Width that every modality is projected to, and of the fusion Transformer.
    pub width: i64,
    /// BERT-style text encoder.
    pub text: TextConfig,
    /// ViT image encoder with a convolutional stem.
    pub image: ImageConfig,
    /// Fusion Transformer over the joint token sequence.
    pub fusion: FusionConfig,
    /// Number of answers of the VQA classifier; none without that task.
    pub answers: Option<i64>,
    /// Width of the contrastive embeddings; none without that task.
    pub embedding_dim: Option<i64>,
}

/// Text encoder: token and position embeddings, pre-LN Transformer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// Number of token ids; 0 is padding.
    pub vocabulary: i64,
    /// Longest sequence, in tokens.
    pub max_length: i64,
    /// Width of a token.
    pub width: i64,
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads; divide `width`.
    pub heads: i64,
    /// Hidden width of the feed-forward layer, in multiples of `width`.
    pub mlp_ratio: i64,
}

/// Image encoder: a convolutional stem makes the patches, then a pre-LN Transformer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// Side of the square input, in pixels.
    pub size: i64,
    /// Convolutions, GELU between them; one layer with `kernel == stride` is ViT's patch embedding.
    pub stem: Vec<StemLayer>,
    /// Width of a patch token; the last stem layer's channels.
    pub width: i64,
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads; divide `width`.
    pub heads: i64,
    /// Hidden width of the feed-forward layer, in multiples of `width`.
    pub mlp_ratio: i64,
}

/// One convolution of the image stem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StemLayer {
    /// Output channels.
    pub channels: i64,
    /// Side of the kernel.
    pub kernel: i64,
    /// Step of the kernel.
    pub stride: i64,
    /// Zeros added on each side.
    pub padding: i64,
}

/// Fusion Transformer; its width is [`NetworkConfig::width`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FusionConfig {
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads; divide the width.
    pub heads: i64,
    /// Hidden width of the feed-forward layer, in multiples of the width.
    pub mlp_ratio: i64,
}

/// A network that can't be built: which field, what it is, what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: {expected}")]
pub struct ConfigError {
    /// Path of the field, such as `text.heads`.
    pub field: &'static str,
    /// What was found.
    pub value: i64,
    /// What would be right.
    pub expected: String,
}

impl NetworkConfig {
    /// Checks every field against the others.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = |field, value: i64| {
            if value >= 1 { Ok(()) } else { Err(error(field, value, "must be at least 1")) }
        };
        positive("width", self.width)?;
        positive("text.vocabulary", self.text.vocabulary)?;
        positive("text.maxLength", self.text.max_length)?;
        positive("image.size", self.image.size)?;
        if let Some(answers) = self.answers {
            positive("answers", answers)?;
        }
        if let Some(dim) = self.embedding_dim {
            positive("embeddingDim", dim)?;
        }
        heads("text.heads", self.text.heads, self.text.width)?;
        heads("image.heads", self.image.heads, self.image.width)?;
        heads("fusion.heads", self.fusion.heads, self.width)?;
        positive("text.mlpRatio", self.text.mlp_ratio)?;
        positive("image.mlpRatio", self.image.mlp_ratio)?;
        positive("fusion.mlpRatio", self.fusion.mlp_ratio)?;
        for layer in &self.image.stem {
            positive("image.stem.channels", layer.channels)?;
            positive("image.stem.kernel", layer.kernel)?;
            positive("image.stem.stride", layer.stride)?;
            if layer.padding < 0 {
                return Err(error("image.stem.padding", layer.padding, "must not be negative"));
            }
        }
        self.image.grid()?;
        let channels = self.image.stem.last().map_or(0, |layer| layer.channels);
        if channels != self.image.width {
            let expected = format!("must equal the last stem layer's channels, {channels}");
            return Err(error("image.width", self.image.width, expected));
        }
        Ok(())
    }
}

impl ImageConfig {
    /// Side of the grid of patches that the stem leaves.
    ///
    /// # Errors
    /// When a stem layer's kernel is larger than what reaches it, or there is no layer.
    pub fn grid(&self) -> Result<i64, ConfigError> {
        if self.stem.is_empty() {
            return Err(error("image.stem", 0, "needs at least one layer"));
        }
        self.stem.iter().try_fold(self.size, |side, layer| {
            let room = side + 2 * layer.padding - layer.kernel;
            if room < 0 {
                let expected = format!("must be at most {}, what reaches this layer", side + 2 * layer.padding);
                return Err(error("image.stem.kernel", layer.kernel, expected));
            }
            Ok(room / layer.stride + 1)
        })
    }
}

fn heads(field: &'static str, heads: i64, width: i64) -> Result<(), ConfigError> {
    if heads >= 1 && width >= 1 && width % heads == 0 {
        return Ok(());
    }
    Err(error(field, heads, format!("must divide the width, {width}")))
}

fn error(field: &'static str, value: i64, expected: impl Into<String>) -> ConfigError {
    ConfigError { field, value, expected: expected.into() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The easy-VQA recipe: 27 words, padding and the unknown word; small enough for every test.
    pub(crate) fn quickstart() -> NetworkConfig {
        let stem = [(24, 5, 2, 2), (48, 3, 2, 1), (64, 5, 4, 1)];
        NetworkConfig {
            width: 64,
            text: TextConfig { vocabulary: 29, max_length: 10, width: 64, layers: 1, heads: 4, mlp_ratio: 2 },
            image: ImageConfig {
                size: 64,
                stem: stem
                    .map(|(channels, kernel, stride, padding)| StemLayer { channels, kernel, stride, padding })
                    .to_vec(),
                width: 64,
                layers: 2,
                heads: 4,
                mlp_ratio: 2,
            },
            fusion: FusionConfig { layers: 1, heads: 4, mlp_ratio: 2 },
            answers: Some(13),
            embedding_dim: None,
        }
    }

    #[test]
    fn the_quickstart_network_sees_a_grid_of_four_by_four_patches() {
        assert_eq!(quickstart().image.grid(), Ok(4));
        assert_eq!(quickstart().validate(), Ok(()));
    }

    #[test]
    fn heads_that_do_not_divide_the_width_are_refused_by_name() {
        let mut config = quickstart();
        config.fusion.heads = 5;
        let found = config.validate().unwrap_err();
        assert_eq!(found.to_string(), "fusion.heads is 5: must divide the width, 64");
    }

    #[test]
    fn a_kernel_larger_than_its_input_is_refused() {
        let mut config = quickstart();
        config.image.size = 8;
        assert_eq!(config.validate().unwrap_err().field, "image.stem.kernel");
    }

    #[test]
    fn a_width_that_is_not_the_stems_is_refused() {
        let mut config = quickstart();
        config.image.width = 32;
        assert_eq!(config.validate().unwrap_err().field, "image.width");
    }
}

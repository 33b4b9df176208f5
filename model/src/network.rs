//! A network: which blocks there are, and which of them each task runs.

use crate::block::{Block, CONV_WEIGHTS, Stream};
use crate::config::{ConfigError, NetworkConfig};

/// What a network is trained for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Task {
    /// Visual question answering: a class per answer.
    Vqa,
    /// Image-text alignment as in CLIP (Radford et al. 2021).
    Contrastive,
}

/// Blocks in the order in which they run.
#[derive(Clone, Debug)]
pub struct Network {
    config: NetworkConfig,
    blocks: Vec<Block>,
}

impl Network {
    /// Builds the blocks that `config` asks for.
    ///
    /// # Errors
    /// The field of `config` that can't be right.
    pub fn new(config: NetworkConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        if config.image.stem.len() > CONV_WEIGHTS.len() {
            return Err(ConfigError {
                field: "image.stem",
                value: config.image.stem.len() as i64,
                expected: format!("must have at most {} layers", CONV_WEIGHTS.len()),
            });
        }
        let (text, image, fusion) = (&config.text, &config.image, &config.fusion);
        let grid = image.grid()?;
        let stem: Vec<_> = image.stem.iter().map(|l| (l.channels, l.kernel, l.stride, l.padding)).collect();

        let mut blocks = vec![Block::text_embedding(text.vocabulary, text.max_length, text.width)];
        for layer in 0..text.layers {
            blocks.push(Block::transformer(Stream::Text, layer, text.width, text.heads, text.mlp_ratio));
        }
        blocks.push(Block::project(Stream::Text, text.width, config.width));
        blocks.extend(config.embedding_dim.map(|dim| Block::text_pool(config.width, dim)));

        blocks.push(Block::stem(&stem, grid * grid));
        for layer in 0..image.layers {
            blocks.push(Block::transformer(Stream::Image, layer, image.width, image.heads, image.mlp_ratio));
        }
        blocks.push(Block::project(Stream::Image, image.width, config.width));
        if let Some(dim) = config.embedding_dim {
            blocks.push(Block::image_pool(config.width, dim));
            blocks.push(Block::temperature());
        }

        if let Some(answers) = config.answers {
            blocks.push(Block::join(config.width));
            for layer in 0..fusion.layers {
                let block = Block::transformer(Stream::Fused, layer, config.width, fusion.heads, fusion.mlp_ratio);
                // The answer is read off the class token.
                let is_last = layer + 1 == fusion.layers;
                blocks.push(if is_last { block.first_token_only() } else { block });
            }
            blocks.push(Block::answers(config.width, answers));
        }
        Ok(Self { config, blocks })
    }

    /// What it was built from.
    pub fn config(&self) -> &NetworkConfig {
        &self.config
    }

    /// All blocks, in the order in which they run.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Which blocks `task` runs, as indices into [`Network::blocks`]; empty when the network has no head for it.
    pub fn path(&self, task: Task) -> Vec<usize> {
        let has_head = match task {
            Task::Vqa => self.config.answers.is_some(),
            Task::Contrastive => self.config.embedding_dim.is_some(),
        };
        let runs = |block: &Block| {
            let contrastive = matches!(block.name(), "text.pool" | "image.pool" | "contrastive");
            let fusion = block.section() == crate::Section::Fusion;
            match task {
                Task::Vqa => !contrastive,
                Task::Contrastive => !fusion,
            }
        };
        (0..self.blocks.len()).filter(|&at| has_head && runs(&self.blocks[at])).collect()
    }

    /// How many numbers all parameters hold.
    pub fn parameter_count(&self) -> i64 {
        self.blocks.iter().flat_map(Block::params).map(crate::ParamSpec::numel).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::tests::quickstart;

    #[test]
    fn the_quickstart_network_has_the_recipes_size() {
        assert_eq!(Network::new(quickstart()).unwrap().parameter_count(), 236_511);
    }

    #[test]
    fn every_parameter_has_a_name_of_its_own() {
        let config = NetworkConfig { embedding_dim: Some(32), ..quickstart() };
        let network = Network::new(config).unwrap();
        let names: Vec<_> = network.blocks().iter().flat_map(|b| b.params().iter().map(|p| b.full_name(p))).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }

    #[test]
    fn a_task_without_a_head_runs_nothing() {
        assert!(Network::new(quickstart()).unwrap().path(Task::Contrastive).is_empty());
    }

    #[test]
    fn every_slot_a_path_reads_was_written_before_or_comes_from_outside() {
        use crate::Slot::{ImageIndex, Pixels, TextIds};
        let config = NetworkConfig { embedding_dim: Some(32), ..quickstart() };
        let network = Network::new(config).unwrap();
        for task in [Task::Vqa, Task::Contrastive] {
            let mut known = BTreeSet::from([TextIds, Pixels, ImageIndex]);
            for at in network.path(task) {
                let block = &network.blocks()[at];
                for (slot, _) in block.reads() {
                    assert!(known.contains(&slot), "{} reads {slot:?} too early", block.name());
                }
                known.extend(block.writes());
            }
        }
    }
}

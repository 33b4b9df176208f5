//! Blocks: the units that the trainer runs, shards and recomputes, and that the exporter joins into graphs.

use std::collections::BTreeMap;

use crate::ops::{Ops, Size};
use crate::params::{Init, ParamSpec, ParamView};

/// Standard deviation of embeddings, positions and the class token at the start.
const EMBEDDING_STD: f64 = 0.1;
/// Convolutions start wider than linear layers; the value is from the easy-VQA recipe.
const CONV_GAIN: f64 = 1.7;
/// `ln(1 / 0.07)`, CLIP's starting temperature (Radford et al. 2021, section 2.5).
const LOGIT_SCALE: f64 = 2.659_260_036_932_778;

/// A named place for an activation. A block reads some and writes some; the rest pass it by untouched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// Token ids `[N, L]`, i64, 0 is padding.
    TextIds,
    /// 1.0 for a token and 0.0 for padding, `[N, L]`.
    TextMask,
    /// Text tokens `[N, L, D]`.
    Text,
    /// Pixels `[M, 3, S, S]`, normalised.
    Pixels,
    /// Image tokens `[M, P, D]`.
    Image,
    /// Row of `Image` that belongs to each row of `Text`, `[N]`, i64; absent when they pair up one to one.
    ImageIndex,
    /// Joint sequence `[N, 1 + L + P, D]`, the class token first; after the last layer only that one, `[N, 1, D]`.
    Fused,
    /// Mask of the joint sequence `[N, 1 + L + P]`.
    FusedMask,
    /// Scores of the answers `[N, A]`.
    Logits,
    /// Unit-length text embedding `[N, E]`.
    TextEmbedding,
    /// Unit-length image embedding `[M, E]`.
    ImageEmbedding,
    /// Image embedding times the contrastive temperature `[M, E]`.
    ScaledImageEmbedding,
}

impl Slot {
    /// Whether gradients flow through it: it holds floats that parameters have shaped.
    pub fn is_differentiable(self) -> bool {
        !matches!(self, Slot::TextIds | Slot::TextMask | Slot::Pixels | Slot::ImageIndex | Slot::FusedMask)
    }
}

/// Activations by slot.
pub type Acts<V> = BTreeMap<Slot, V>;

/// Which exported graph a block belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// From token ids to text tokens.
    TextEncoder,
    /// From pixels to image tokens.
    ImageEncoder,
    /// From both to the task's answer.
    Fusion,
    /// Needed by a loss only; not exported.
    Loss,
}

/// One unit of a network.
#[derive(Clone, Debug)]
pub struct Block {
    name: String,
    section: Section,
    kind: Kind,
    params: Vec<ParamSpec>,
}

/// What a block computes.
#[derive(Clone, Debug)]
enum Kind {
    TextEmbedding,
    Stem { layers: Vec<(i64, i64)>, patches: i64 },
    Transformer { stream: Stream, heads: i64, keeps: Keeps },
    Project { stream: Stream },
    TextPool,
    ImagePool,
    Join,
    Answers,
    Temperature,
}

/// Which tokens a Transformer layer is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keeps {
    All,
    /// Nobody reads the others: they are keys and values of this one, and nothing else is computed for them.
    First,
}

/// The token sequence a block works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Text,
    Image,
    Fused,
}

impl Stream {
    fn tokens(self) -> Slot {
        match self {
            Stream::Text => Slot::Text,
            Stream::Image => Slot::Image,
            Stream::Fused => Slot::Fused,
        }
    }

    fn mask(self) -> Option<Slot> {
        match self {
            Stream::Text => Some(Slot::TextMask),
            Stream::Image => None,
            Stream::Fused => Some(Slot::FusedMask),
        }
    }

    fn section(self) -> Section {
        match self {
            Stream::Text => Section::TextEncoder,
            Stream::Image => Section::ImageEncoder,
            Stream::Fused => Section::Fusion,
        }
    }
}

fn weight(name: &'static str, inputs: i64, outputs: i64) -> ParamSpec {
    ParamSpec::new(name, &[inputs, outputs], Init::Uniform { fan_in: inputs, gain: 1.0 })
}

fn zeros(name: &'static str, size: i64) -> ParamSpec {
    ParamSpec::new(name, &[size], Init::Constant(0.0))
}

fn ones(name: &'static str, size: i64) -> ParamSpec {
    ParamSpec::new(name, &[size], Init::Constant(1.0))
}

fn embedding(name: &'static str, shape: &[i64]) -> ParamSpec {
    ParamSpec::new(name, shape, Init::Normal(EMBEDDING_STD))
}

/// Constructors: each declares its parameters once, in the order of use.
impl Block {
    fn new(name: impl Into<String>, section: Section, kind: Kind, params: Vec<ParamSpec>) -> Self {
        Self { name: name.into(), section, kind, params }
    }

    pub(crate) fn text_embedding(vocabulary: i64, max_length: i64, width: i64) -> Self {
        let params = vec![embedding("table", &[vocabulary, width]), embedding("positions", &[max_length, width])];
        Self::new("text.embedding", Section::TextEncoder, Kind::TextEmbedding, params)
    }

    /// `layers` are `(channels, kernel, stride, padding)`.
    pub(crate) fn stem(layers: &[(i64, i64, i64, i64)], patches: i64) -> Self {
        // Parameter names are static, so the stem has a fixed set of them; more layers than that are refused by `Network`.
        let mut params = Vec::new();
        let mut inputs = 3;
        for (at, &(channels, kernel, ..)) in layers.iter().enumerate() {
            let fan_in = kernel * kernel * inputs;
            let init = Init::Uniform { fan_in, gain: CONV_GAIN };
            params.push(ParamSpec::new(CONV_WEIGHTS[at], &[channels, inputs, kernel, kernel], init));
            params.push(zeros(CONV_BIASES[at], channels));
            inputs = channels;
        }
        params.push(embedding("positions", &[patches, inputs]));
        let layers = layers.iter().map(|&(_, _, stride, padding)| (stride, padding)).collect();
        Self::new("image.stem", Section::ImageEncoder, Kind::Stem { layers, patches }, params)
    }

    pub(crate) fn transformer(stream: Stream, layer: usize, width: i64, heads: i64, mlp_ratio: i64) -> Self {
        let hidden = width * mlp_ratio;
        let params = vec![
            ones("norm1.gain", width),
            zeros("norm1.bias", width),
            weight("qkv.weight", width, 3 * width),
            zeros("qkv.bias", 3 * width),
            weight("out.weight", width, width),
            zeros("out.bias", width),
            ones("norm2.gain", width),
            zeros("norm2.bias", width),
            weight("up.weight", width, hidden),
            zeros("up.bias", hidden),
            weight("down.weight", hidden, width),
            zeros("down.bias", width),
        ];
        let prefix = match stream {
            Stream::Text => "text",
            Stream::Image => "image",
            Stream::Fused => "fusion",
        };
        let kind = Kind::Transformer { stream, heads, keeps: Keeps::All };
        Self::new(format!("{prefix}.layer{layer}"), stream.section(), kind, params)
    }

    /// The same layer for a sequence of which only the first token is read afterwards.
    pub(crate) fn first_token_only(mut self) -> Self {
        if let Kind::Transformer { keeps, .. } = &mut self.kind {
            *keeps = Keeps::First;
        }
        self
    }

    /// Brings a modality to the shared width, with its type embedding and learned scale.
    pub(crate) fn project(stream: Stream, from: i64, to: i64) -> Self {
        let params = vec![
            ones("norm.gain", from),
            zeros("norm.bias", from),
            weight("weight", from, to),
            zeros("bias", to),
            embedding("type", &[to]),
            ones("joint_norm.gain", to),
            zeros("joint_norm.bias", to),
            ones("scale", 1),
        ];
        let name = if stream == Stream::Text { "text.project" } else { "image.project" };
        Self::new(name, stream.section(), Kind::Project { stream }, params)
    }

    pub(crate) fn text_pool(width: i64, dim: i64) -> Self {
        Self::new("text.pool", Section::TextEncoder, Kind::TextPool, vec![weight("weight", width, dim)])
    }

    pub(crate) fn image_pool(width: i64, dim: i64) -> Self {
        Self::new("image.pool", Section::ImageEncoder, Kind::ImagePool, vec![weight("weight", width, dim)])
    }

    pub(crate) fn join(width: i64) -> Self {
        Self::new("fusion.join", Section::Fusion, Kind::Join, vec![embedding("class_token", &[width])])
    }

    pub(crate) fn answers(width: i64, answers: i64) -> Self {
        let params = vec![
            ones("norm.gain", width),
            zeros("norm.bias", width),
            weight("weight", width, answers),
            zeros("bias", answers),
        ];
        Self::new("answer", Section::Fusion, Kind::Answers, params)
    }

    pub(crate) fn temperature() -> Self {
        let scale = ParamSpec::new("logit_scale", &[1], Init::Constant(LOGIT_SCALE));
        Self::new("contrastive", Section::Loss, Kind::Temperature, vec![scale])
    }
}

/// Names of the stem's convolutions; their number is the deepest stem there can be.
pub(crate) const CONV_WEIGHTS: [&str; 6] =
    ["conv0.weight", "conv1.weight", "conv2.weight", "conv3.weight", "conv4.weight", "conv5.weight"];
const CONV_BIASES: [&str; 6] = ["conv0.bias", "conv1.bias", "conv2.bias", "conv3.bias", "conv4.bias", "conv5.bias"];

impl Block {
    /// Unique in its network; prefix of its parameters' full names.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The graph it is exported in.
    pub fn section(&self) -> Section {
        self.section
    }

    /// Its parameters, in the order that [`Block::forward`] wants their values.
    pub fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    /// Full name of one of its parameters.
    pub fn full_name(&self, param: &ParamSpec) -> String {
        format!("{}.{}", self.name, param.name)
    }

    /// Slots it takes; one that is marked `false` may be absent.
    pub fn reads(&self) -> Vec<(Slot, bool)> {
        match &self.kind {
            Kind::TextEmbedding => vec![(Slot::TextIds, true)],
            Kind::Stem { .. } => vec![(Slot::Pixels, true)],
            Kind::Transformer { stream, .. } => {
                let mut slots = vec![(stream.tokens(), true)];
                slots.extend(stream.mask().map(|mask| (mask, true)));
                slots
            }
            Kind::Project { stream } => vec![(stream.tokens(), true)],
            Kind::TextPool => vec![(Slot::Text, true), (Slot::TextMask, true)],
            Kind::ImagePool => vec![(Slot::Image, true)],
            Kind::Join => {
                vec![(Slot::Text, true), (Slot::TextMask, true), (Slot::Image, true), (Slot::ImageIndex, false)]
            }
            Kind::Answers => vec![(Slot::Fused, true)],
            Kind::Temperature => vec![(Slot::ImageEmbedding, true)],
        }
    }

    /// Slots it writes.
    pub fn writes(&self) -> Vec<Slot> {
        match &self.kind {
            Kind::TextEmbedding => vec![Slot::Text, Slot::TextMask],
            Kind::Stem { .. } => vec![Slot::Image],
            Kind::Transformer { stream, .. } | Kind::Project { stream } => vec![stream.tokens()],
            Kind::TextPool => vec![Slot::TextEmbedding],
            Kind::ImagePool => vec![Slot::ImageEmbedding],
            Kind::Join => vec![Slot::Fused, Slot::FusedMask],
            Kind::Answers => vec![Slot::Logits],
            Kind::Temperature => vec![Slot::ScaledImageEmbedding],
        }
    }

    /// Runs the block. `acts` holds at least the slots that [`Block::reads`] demands; the result holds what it writes.
    ///
    /// # Panics
    /// When a slot it reads is missing: the network's order is checked when it is built.
    pub fn forward<O: Ops>(
        &self,
        ops: &mut O,
        params: ParamView<'_, O::Value>,
        acts: &Acts<O::Value>,
    ) -> Result<Acts<O::Value>, O::Error> {
        let p = params;
        let outputs = match &self.kind {
            Kind::TextEmbedding => {
                let ids = &acts[&Slot::TextIds];
                let tokens = ops.embedding(&p["table"], ids)?;
                let tokens = ops.add_positions(&tokens, &p["positions"])?;
                vec![(Slot::Text, tokens), (Slot::TextMask, ops.keep_mask(ids)?)]
            }
            Kind::Stem { layers, patches } => {
                let mut x = ops.share(&acts[&Slot::Pixels]);
                for (at, &(stride, padding)) in layers.iter().enumerate() {
                    if at > 0 {
                        x = ops.gelu(&x)?;
                    }
                    x = ops.conv2d(&x, &p[CONV_WEIGHTS[at]], &p[CONV_BIASES[at]], stride, padding)?;
                }
                let x = ops.reshape(&x, &[Size::Same, Size::Same, Size::Fixed(*patches)])?;
                let tokens = ops.transpose(&x, &[0, 2, 1])?;
                vec![(Slot::Image, ops.add_positions(&tokens, &p["positions"])?)]
            }
            Kind::Transformer { stream, heads, keeps } => {
                let keep = stream.mask().map(|slot| &acts[&slot]);
                let x = transformer(ops, &p, &acts[&stream.tokens()], keep, *heads, *keeps)?;
                vec![(stream.tokens(), x)]
            }
            Kind::Project { stream } => {
                let x = ops.layer_norm(&acts[&stream.tokens()], &p["norm.gain"], &p["norm.bias"])?;
                let x = ops.linear(&x, &p["weight"], Some(&p["bias"]))?;
                let x = ops.add(&x, &p["type"])?;
                let x = ops.layer_norm(&x, &p["joint_norm.gain"], &p["joint_norm.bias"])?;
                vec![(stream.tokens(), ops.mul(&x, &p["scale"])?)]
            }
            Kind::TextPool => {
                let x = ops.masked_mean(&acts[&Slot::Text], &acts[&Slot::TextMask])?;
                let x = ops.linear(&x, &p["weight"], None)?;
                vec![(Slot::TextEmbedding, ops.l2_normalise(&x)?)]
            }
            Kind::ImagePool => {
                let keep = ops.ones_mask(&acts[&Slot::Image])?;
                let x = ops.masked_mean(&acts[&Slot::Image], &keep)?;
                let x = ops.linear(&x, &p["weight"], None)?;
                vec![(Slot::ImageEmbedding, ops.l2_normalise(&x)?)]
            }
            Kind::Join => {
                let text = &acts[&Slot::Text];
                let image = match acts.get(&Slot::ImageIndex) {
                    Some(index) => ops.gather_rows(&acts[&Slot::Image], index)?,
                    None => ops.share(&acts[&Slot::Image]),
                };
                let class = ops.repeat_row(&p["class_token"], text)?;
                let masks = [ops.ones_mask(&class)?, ops.share(&acts[&Slot::TextMask]), ops.ones_mask(&image)?];
                let tokens = ops.concat(&[class, ops.share(text), image], 1)?;
                vec![(Slot::Fused, tokens), (Slot::FusedMask, ops.concat(&masks, 1)?)]
            }
            Kind::Answers => {
                let class = ops.first_token(&acts[&Slot::Fused])?;
                let class = ops.layer_norm(&class, &p["norm.gain"], &p["norm.bias"])?;
                vec![(Slot::Logits, ops.linear(&class, &p["weight"], Some(&p["bias"]))?)]
            }
            Kind::Temperature => {
                let scale = ops.exp(&p["logit_scale"])?;
                vec![(Slot::ScaledImageEmbedding, ops.mul(&acts[&Slot::ImageEmbedding], &scale)?)]
            }
        };
        Ok(outputs.into_iter().collect())
    }
}

/// A pre-LN Transformer layer (Xiong et al. 2020): `x + attention(norm(x))`, then `x + mlp(norm(x))`.
fn transformer<O: Ops>(
    ops: &mut O,
    p: &ParamView<'_, O::Value>,
    x: &O::Value,
    keep: Option<&O::Value>,
    heads: i64,
    keeps: Keeps,
) -> Result<O::Value, O::Error> {
    let normed = ops.layer_norm(x, &p["norm1.gain"], &p["norm1.bias"])?;
    let qkv = ops.linear(&normed, &p["qkv.weight"], Some(&p["qkv.bias"]))?;
    let mut parts = ops.split_last(&qkv, 3)?;
    let x = match keeps {
        Keeps::All => ops.share(x),
        Keeps::First => {
            parts[0] = first_token(ops, &parts[0])?;
            first_token(ops, x)?
        }
    };
    let mut by_head = Vec::with_capacity(3);
    for part in &parts {
        let part = ops.reshape(part, &[Size::Same, Size::Same, Size::Fixed(heads), Size::Rest])?;
        by_head.push(ops.transpose(&part, &[0, 2, 1, 3])?);
    }
    let width = p.len_of("out.bias");
    let scale = ((width / heads) as f64).sqrt().recip();
    let mixed = ops.attention(&by_head[0], &by_head[1], &by_head[2], keep, scale)?;
    let mixed = ops.transpose(&mixed, &[0, 2, 1, 3])?;
    let mixed = ops.reshape(&mixed, &[Size::Same, Size::Same, Size::Fixed(width)])?;
    let mixed = ops.linear(&mixed, &p["out.weight"], Some(&p["out.bias"]))?;
    let x = ops.add(&x, &mixed)?;
    let hidden = ops.layer_norm(&x, &p["norm2.gain"], &p["norm2.bias"])?;
    let hidden = ops.linear(&hidden, &p["up.weight"], Some(&p["up.bias"]))?;
    let hidden = ops.gelu(&hidden)?;
    let hidden = ops.linear(&hidden, &p["down.weight"], Some(&p["down.bias"]))?;
    ops.add(&x, &hidden)
}

/// `[B, T, D]` to `[B, 1, D]`.
fn first_token<O: Ops>(ops: &mut O, x: &O::Value) -> Result<O::Value, O::Error> {
    let first = ops.first_token(x)?;
    ops.reshape(&first, &[Size::Same, Size::Fixed(1), Size::Rest])
}

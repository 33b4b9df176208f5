use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::ModalityError;
use crate::image::{ImageLimits, ImageProcessor};
use crate::spec::PipelineSpec;
use crate::tensor::Tensor;
use crate::text::{TextLimits, TextProcessor};

/// A kind of input: text, image, and whatever is added next.
///
/// Methods are called from many threads at once and hold no state between calls.
pub trait Modality: Send + Sync {
    /// Name in requests, metrics and manifests. The graph that encodes it is `{name}_encoder`, and that graph's
    /// per-token output is `{name}_features`.
    fn name(&self) -> &'static str;

    /// Name of the encoder graph's input that [`Modality::process`] produces rows of.
    fn input_name(&self) -> &'static str;

    /// Looks at an item without doing the work (of an image, only its header is read), so that admission can come first.
    ///
    /// # Errors
    /// The item is beyond a limit or plainly not of this modality.
    fn open<'a>(&'a self, item: &'a [u8]) -> Result<Opened<'a>, ModalityError>;

    /// One row of the encoder's input, without the batch axis. Rows of one modality always have equal shapes.
    ///
    /// # Errors
    /// The item is beyond a limit or cannot be decoded.
    fn process(&self, item: &[u8]) -> Result<Tensor, ModalityError> {
        self.open(item)?.process()
    }
}

/// An item that was looked at, and not worked on yet.
pub struct Opened<'a> {
    cost: Cost,
    memory: u64,
    work: Box<dyn FnOnce() -> Result<Tensor, ModalityError> + 'a>,
}

impl<'a> Opened<'a> {
    /// An item of which `work` makes a row.
    pub fn new(cost: Cost, memory: u64, work: impl FnOnce() -> Result<Tensor, ModalityError> + 'a) -> Self {
        Self { cost, memory, work: Box::new(work) }
    }

    /// What its modality counts.
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// Bytes that [`Opened::process`] takes on its way at most, beside the item, so that they can be set aside before.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// As [`Modality::process`].
    ///
    /// # Errors
    /// The item cannot be decoded.
    pub fn process(self) -> Result<Tensor, ModalityError> {
        (self.work)()
    }
}

impl fmt::Debug for Opened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").field("cost", &self.cost).field("memory", &self.memory).finish_non_exhaustive()
    }
}

/// How much work an item is, in its modality's own unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// What is counted.
    pub unit: CostUnit,
    /// How many.
    pub amount: u64,
}

/// Unit of a [`Cost`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CostUnit {
    /// Text tokens.
    Tokens,
    /// Pixels of the image as it arrived.
    Pixels,
}

/// What is accepted from outside, per modality.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of texts.
    pub text: TextLimits,
    /// Of images.
    pub image: ImageLimits,
}

/// The modalities of one pipeline, by name.
#[derive(Clone, Default)]
pub struct Registry {
    modalities: BTreeMap<&'static str, Arc<dyn Modality>>,
}

impl Registry {
    /// The processors a model was trained with: text and image where `spec` has them. Files that `spec` names are
    /// read from `artifact_dir`.
    ///
    /// # Errors
    /// A tokenizer file that cannot be read, or a setting that cannot work.
    pub fn from_spec(spec: &PipelineSpec, artifact_dir: &Path, limits: Limits) -> Result<Self, ModalityError> {
        let mut registry = Self::default();
        if let Some(text) = &spec.text {
            let processor = TextProcessor::load(&artifact_dir.join(&text.tokenizer), text.config)?;
            registry.insert(Arc::new(processor.with_limits(limits.text)));
        }
        if let Some(image) = &spec.image {
            registry.insert(Arc::new(ImageProcessor::new(*image)?.with_limits(limits.image)));
        }
        Ok(registry)
    }

    /// Adds a modality; one of the same name is replaced.
    pub fn insert(&mut self, modality: Arc<dyn Modality>) {
        self.modalities.insert(modality.name(), modality);
    }

    /// The modality of that name.
    ///
    /// # Errors
    /// [`ModalityError::UnknownModality`], which lists those there are.
    pub fn get(&self, name: &str) -> Result<&Arc<dyn Modality>, ModalityError> {
        self.modalities.get(name).ok_or_else(|| ModalityError::UnknownModality {
            name: name.to_owned(),
            known: self.modalities.keys().map(|&name| name.to_owned()).collect(),
        })
    }

    /// All modalities, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Modality>> {
        self.modalities.values()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.modalities.keys()).finish()
    }
}

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer,
};

use crate::error::{ModalityError, Unit};
use crate::modality::{Cost, CostUnit, Modality, Opened};
use crate::tensor::Tensor;

/// Token id that fills a row up to its fixed length; models mask it.
pub const PADDING_ID: i64 = 0;
/// Token id of every word outside a trained vocabulary.
pub const UNKNOWN_ID: i64 = 1;

const PADDING_TOKEN: &str = "[PAD]";
const UNKNOWN_TOKEN: &str = "[UNK]";

/// Text preparation that is part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TextConfig {
    /// Row length of the model's input, in tokens. A longer text is refused, never cut.
    pub max_length: usize,
}

/// What is accepted from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextLimits {
    /// Unicode scalar values per text, checked before any of it is split.
    pub max_characters: usize,
}

impl Default for TextLimits {
    /// 16,384 characters: more than any text model here reads.
    fn default() -> Self {
        Self { max_characters: 16_384 }
    }
}

/// Turns text into token ids.
#[derive(Clone, Debug)]
pub struct TextProcessor {
    tokenizer: Tokenizer,
    config: TextConfig,
    limits: TextLimits,
}

impl TextProcessor {
    /// Builds a vocabulary from training texts: lower-cased words and single punctuation characters, sorted, so that
    /// the same set of texts gives the same ids in whatever order they come. Id 0 is padding, 1 the unknown word.
    ///
    /// # Errors
    /// A `max_length` of zero, or texts without any word.
    pub fn train<T: AsRef<str>>(texts: impl IntoIterator<Item = T>, config: TextConfig) -> Result<Self, ModalityError> {
        let mut words = BTreeSet::new();
        for text in texts {
            words.extend(split_words(text.as_ref())?);
        }
        if words.is_empty() {
            return Err(unusable("trained on these texts", "they hold no words"));
        }
        let vocabulary: serde_json::Map<_, _> = [PADDING_TOKEN, UNKNOWN_TOKEN]
            .into_iter()
            .map(str::to_owned)
            .chain(words)
            .enumerate()
            .map(|(id, word)| (word, id.into()))
            .collect();
        // The padding and unknown tokens are words that `split_words` never yields, so no text can spell them.
        let json = serde_json::json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [],
            "normalizer": normalizer(),
            "pre_tokenizer": BertPreTokenizer,
            "post_processor": null,
            "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN_TOKEN },
        });
        Self::from_json(json.to_string().as_bytes(), "trained on these texts", config)
    }

    /// Reads a `tokenizer.json`: one that [`TextProcessor::save`] wrote, or that of any model whose padding id is 0.
    ///
    /// # Errors
    /// The file cannot be read, is not a tokenizer, or gives id 0 to something other than padding.
    pub fn load(path: &Path, config: TextConfig) -> Result<Self, ModalityError> {
        let json =
            fs::read(path).map_err(|source| ModalityError::File { action: "read", path: path.to_owned(), source })?;
        Self::from_json(&json, &path.display().to_string(), config)
    }

    fn from_json(json: &[u8], origin: &str, config: TextConfig) -> Result<Self, ModalityError> {
        if config.max_length == 0 {
            return Err(ModalityError::BadConfig {
                field: "text.config.maxLength",
                value: "0".to_owned(),
                wanted: "at least 1",
            });
        }
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(|error| unusable(origin, &error.to_string()))?;
        match tokenizer.id_to_token(PADDING_ID as u32) {
            Some(token) if token == PADDING_TOKEN => {}
            token => {
                let reason = format!("id {PADDING_ID} is {token:?}, it must be {PADDING_TOKEN:?}");
                return Err(unusable(origin, &reason));
            }
        }
        // Length is this type's business, and special tokens spelled out in a text are only text.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| unusable(origin, &error.to_string()))?;
        tokenizer.set_encode_special_tokens(true);
        Ok(Self { tokenizer, config, limits: TextLimits::default() })
    }

    /// Replaces the limits on what is accepted.
    #[must_use]
    pub fn with_limits(self, limits: TextLimits) -> Self {
        Self { limits, ..self }
    }

    /// Writes the `tokenizer.json` that [`TextProcessor::load`] reads; the same vocabulary gives the same bytes.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), ModalityError> {
        let json = self.tokenizer.to_string(true).map_err(|error| unusable("to save", &error.to_string()))?;
        fs::write(path, json).map_err(|source| ModalityError::File { action: "write", path: path.to_owned(), source })
    }

    /// Length of a row, in tokens.
    pub fn config(&self) -> TextConfig {
        self.config
    }

    /// Number of ids, padding and unknown included.
    pub fn vocabulary_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Token ids of one text, without padding: between 1 and `max_length` of them.
    ///
    /// # Errors
    /// Too many characters or tokens, or none.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, ModalityError> {
        let limit = self.limits.max_characters;
        // Bytes bound characters, so an ordinary text is not even counted.
        if text.len() > limit {
            let got = text.chars().count();
            if got > limit {
                return Err(too_large(Unit::Characters, got, limit));
            }
        }
        let encoding =
            self.tokenizer.encode_fast(text, true).map_err(|error| unusable("in use", &error.to_string()))?;
        let ids = encoding.get_ids();
        if ids.is_empty() {
            return Err(ModalityError::NoTokens);
        }
        if ids.len() > self.config.max_length {
            return Err(too_large(Unit::Tokens, ids.len(), self.config.max_length));
        }
        Ok(ids.iter().map(|&id| i64::from(id)).collect())
    }

    /// Token ids of one text as an i64 row `[max_length]`, padded.
    ///
    /// # Errors
    /// As [`TextProcessor::encode`].
    pub fn encode_row(&self, text: &str) -> Result<Tensor, ModalityError> {
        self.row(self.encode(text)?)
    }

    fn row(&self, mut ids: Vec<i64>) -> Result<Tensor, ModalityError> {
        ids.resize(self.config.max_length, PADDING_ID);
        Ok(Tensor::from_vec([ids.len()], ids)?)
    }

    /// Token ids of several texts, i64 `[N, max_length]`, padded.
    ///
    /// # Errors
    /// As [`TextProcessor::encode`], for the first text that fails; an empty slice has nothing to stack.
    pub fn encode_batch<T: AsRef<str>>(&self, texts: &[T]) -> Result<Tensor, ModalityError> {
        let rows = texts.iter().map(|text| self.encode_row(text.as_ref())).collect::<Result<Vec<_>, _>>()?;
        Ok(Tensor::stack(&rows)?)
    }

    /// Words of token ids, padding left out: for people who look at what the model sees.
    pub fn words(&self, ids: &[i64]) -> Vec<String> {
        ids.iter()
            .filter(|&&id| id != PADDING_ID)
            .map(|&id| u32::try_from(id).ok().and_then(|id| self.tokenizer.id_to_token(id)))
            .map(|token| token.unwrap_or_else(|| UNKNOWN_TOKEN.to_owned()))
            .collect()
    }
}

impl Modality for TextProcessor {
    fn name(&self) -> &'static str {
        "text"
    }

    fn input_name(&self) -> &'static str {
        "input_ids"
    }

    /// Its cost is its tokens: splitting is the whole work of a text, and it takes microseconds. Makes i64 `[max_length]`.
    fn open<'a>(&'a self, item: &'a [u8]) -> Result<Opened<'a>, ModalityError> {
        let ids = self.encode(utf8(item)?)?;
        let cost = Cost { unit: CostUnit::Tokens, amount: ids.len() as u64 };
        let bytes = self.config.max_length * size_of::<i64>();
        Ok(Opened::new(cost, bytes as u64, move || self.row(ids)))
    }
}

/// Cleans control characters, splits CJK characters, lower-cases; accents carry meaning and stay.
fn normalizer() -> BertNormalizer {
    BertNormalizer::new(true, true, Some(false), true)
}

fn split_words(text: &str) -> Result<Vec<String>, ModalityError> {
    let mut normalized = NormalizedString::from(text);
    let failed = |error: tokenizers::Error| unusable("in training", &error.to_string());
    normalizer().normalize(&mut normalized).map_err(failed)?;
    let mut pieces = PreTokenizedString::from(normalized);
    BertPreTokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
    let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).filter(|word| !word.is_empty()).collect())
}

fn utf8(item: &[u8]) -> Result<&str, ModalityError> {
    std::str::from_utf8(item).map_err(|error| ModalityError::NotUtf8 { valid_up_to: error.valid_up_to() })
}

fn too_large(unit: Unit, got: usize, limit: usize) -> ModalityError {
    ModalityError::TooLarge { modality: "text", unit, got: got as u64, limit: limit as u64 }
}

fn unusable(origin: &str, reason: &str) -> ModalityError {
    ModalityError::Tokenizer { origin: origin.to_owned(), reason: reason.to_owned() }
}

//! What the vocabulary promises to the model, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use sensorium_modality::{
    CostUnit, Modality, ModalityError, PADDING_ID, TextConfig, TextLimits, TextProcessor, UNKNOWN_ID, Unit,
};

const CONFIG: TextConfig = TextConfig { max_length: 8 };

fn processor() -> TextProcessor {
    TextProcessor::train(["What color is the circle?", "Is there a red shape?", "It isn't."], CONFIG).unwrap()
}

#[test]
fn words_are_lower_cased_and_punctuation_stands_alone() {
    let text = processor();
    let ids = text.encode("IS the Circle?!").unwrap();
    assert_eq!(text.words(&ids), ["is", "the", "circle", "?", "[UNK]"]);
    assert_eq!(text.words(&text.encode("isn't").unwrap()), ["isn", "'", "t"]);
}

#[test]
fn ids_are_padding_then_unknown_then_sorted_words() {
    let text = processor();
    assert_eq!(text.encode("zebra").unwrap(), [UNKNOWN_ID]);
    let words = text.words(&(2..text.vocabulary_size() as i64).collect::<Vec<_>>());
    assert!(words.is_sorted(), "{words:?}");
    assert_eq!(words.first().map(String::as_str), Some("'"));
}

#[test]
fn the_order_of_training_texts_does_not_matter_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one.json"), folder.path().join("two.json"));
    TextProcessor::train(["a b c", "d ? a"], CONFIG).unwrap().save(&one).unwrap();
    TextProcessor::train(["d ? a", "c", "b c a", "a"], CONFIG).unwrap().save(&two).unwrap();
    assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());
}

#[test]
fn the_saved_file_is_reviewed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    TextProcessor::train(["Red?"], CONFIG).unwrap().save(&path).unwrap();
    insta::assert_snapshot!(std::fs::read_to_string(path).unwrap());
}

#[test]
fn a_batch_is_padded_to_the_models_length() {
    let batch = processor().encode_batch(&["is it", "red"]).unwrap();
    assert_eq!(batch.shape(), [2, 8]);
    let ids = batch.as_slice::<i64>().unwrap();
    assert!(ids[2..8].iter().all(|&id| id == PADDING_ID) && ids[0] > UNKNOWN_ID && ids[8] > UNKNOWN_ID, "{ids:?}");
}

#[test]
fn a_text_cannot_spell_the_padding_token() {
    let text = processor();
    for hostile in ["[PAD]", "[pad] [UNK]", "[\u{ad}PAD]"] {
        assert!(text.encode(hostile).unwrap().iter().all(|&id| id != PADDING_ID), "{hostile}");
    }
}

#[test]
fn too_many_tokens_are_refused_not_cut() {
    let error = processor().encode("is is is is is is is is is").unwrap_err();
    assert!(matches!(error, ModalityError::TooLarge { unit: Unit::Tokens, got: 9, limit: 8, .. }), "{error:?}");
    assert_eq!(error.to_string(), "the text has 9 tokens, the limit is 8");
    assert!(error.is_callers_fault());
}

#[test]
fn characters_are_counted_before_anything_is_split() {
    let text = processor().with_limits(TextLimits { max_characters: 4 });
    assert!(text.encode("éééé").is_ok(), "four characters of two bytes each");
    let error = text.encode("ééééé").unwrap_err();
    assert_eq!(error.to_string(), "the text has 5 characters, the limit is 4");
}

#[test]
fn a_text_without_words_is_refused() {
    for empty in ["", "  \t\n", "\u{200b}\u{7}"] {
        let error = processor().encode(empty).unwrap_err();
        assert!(matches!(error, ModalityError::NoTokens), "{empty:?}: {error}");
    }
}

#[test]
fn bytes_that_are_not_utf8_say_where() {
    let error = Modality::process(&processor(), b"is \xff").unwrap_err();
    assert!(matches!(error, ModalityError::NotUtf8 { valid_up_to: 3 }), "{error:?}");
}

#[test]
fn the_cost_of_a_text_is_its_tokens_without_padding() {
    let cost = processor().open(b"is it red?").unwrap().cost();
    assert_eq!((cost.unit, cost.amount), (CostUnit::Tokens, 4));
}

#[test]
fn training_on_no_words_is_refused() {
    let error = TextProcessor::train(["", "  "], CONFIG).unwrap_err();
    assert!(matches!(error, ModalityError::Tokenizer { .. }) && !error.is_callers_fault(), "{error:?}");
}

#[test]
fn a_length_of_zero_is_refused() {
    let error = TextProcessor::train(["a"], TextConfig { max_length: 0 }).unwrap_err();
    assert_eq!(error.to_string(), "text.config.maxLength is 0, it must be at least 1");
}

#[test]
fn a_tokenizer_whose_first_id_is_no_padding_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    processor().save(&path).unwrap();
    let edited = std::fs::read_to_string(&path).unwrap().replace("[PAD]", "pad");
    std::fs::write(&path, edited).unwrap();
    let message = TextProcessor::load(&path, CONFIG).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json") && message.contains(r#"it must be "[PAD]""#), "{message}");
}

#[test]
fn a_tokenizer_file_that_is_missing_or_broken_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.json");
    assert!(TextProcessor::load(&missing, CONFIG).unwrap_err().to_string().contains("missing.json"));
    let broken = folder.path().join("broken.json");
    std::fs::write(&broken, "{").unwrap();
    assert!(TextProcessor::load(&broken, CONFIG).unwrap_err().to_string().contains("broken.json"));
}

proptest! {
    #[test]
    fn any_text_encodes_within_bounds_or_is_refused_as_the_callers_fault(text in any::<String>()) {
        let processor = processor();
        match processor.encode(&text) {
            Ok(ids) => {
                prop_assert!((1..=CONFIG.max_length).contains(&ids.len()));
                prop_assert!(ids.iter().all(|&id| id > PADDING_ID && id < processor.vocabulary_size() as i64));
            }
            Err(error) => prop_assert!(error.is_callers_fault(), "{error}"),
        }
    }

    #[test]
    fn known_words_survive_encoding_and_back(words in prop::collection::vec(
        prop::sample::select(vec!["what", "color", "red", "?", "circle"]), 1..=8)) {
        let processor = processor();
        let ids = processor.encode(&words.join(" ")).unwrap();
        prop_assert_eq!(processor.words(&ids), words);
    }

    #[test]
    fn a_saved_processor_encodes_as_the_trained_one(text in "[a-zA-Z ?!.]{1,40}") {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let trained = processor();
        trained.save(&path).unwrap();
        let loaded = TextProcessor::load(&path, CONFIG).unwrap();
        prop_assert_eq!(loaded.encode(&text).ok(), trained.encode(&text).ok());
    }
}

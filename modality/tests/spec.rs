//! What the manifest says about preparation, and the registry that it opens.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use sensorium_modality::{
    Cost, CostUnit, ImageConfig, Limits, Modality, ModalityError, Opened, PipelineSpec, Registry, Resize, TaskHead,
    Tensor, TextConfig, TextProcessor, TextSpec,
};

fn spec() -> PipelineSpec {
    PipelineSpec {
        text: Some(TextSpec {
            tokenizer: "processor/tokenizer.json".to_owned(),
            config: TextConfig { max_length: 16 },
        }),
        image: Some(ImageConfig { size: 64, mean: [0.5; 3], std: [0.5; 3], resize: Resize::Exact }),
        tasks: vec![
            TaskHead::Vqa { answers: vec!["blue".to_owned(), "yes".to_owned()] },
            TaskHead::Contrastive { dim: 32 },
        ],
    }
}

#[test]
fn the_written_form_is_reviewed_and_reads_back() {
    let json = serde_json::to_string_pretty(&spec()).unwrap();
    insta::assert_snapshot!(json);
    assert_eq!(serde_json::from_str::<PipelineSpec>(&json).unwrap(), spec());
}

#[test]
fn a_field_nobody_knows_is_refused() {
    let json = r#"{"tasks": [], "audio": {}}"#;
    assert!(serde_json::from_str::<PipelineSpec>(json).unwrap_err().to_string().contains("audio"));
}

#[test]
fn tasks_answer_for_themselves() {
    assert_eq!(spec().vqa_answers().map(<[String]>::len), Some(2));
    assert_eq!(spec().contrastive_dim(), Some(32));
    assert_eq!(PipelineSpec { tasks: vec![], ..spec() }.vqa_answers(), None);
}

#[test]
fn a_registry_has_the_modalities_of_its_spec() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("processor")).unwrap();
    let text = TextProcessor::train(["is it red?"], TextConfig { max_length: 16 }).unwrap();
    text.save(&folder.path().join("processor/tokenizer.json")).unwrap();

    let registry = Registry::from_spec(&spec(), folder.path(), Limits::default()).unwrap();
    assert_eq!(registry.iter().map(|modality| modality.name()).collect::<Vec<_>>(), ["image", "text"]);
    assert_eq!(registry.get("text").unwrap().process(b"is it red?").unwrap().shape(), [16]);
    assert_eq!(registry.get("image").unwrap().input_name(), "pixel_values");
    let Err(error) = registry.get("audio") else { panic!("there is no audio") };
    assert_eq!(error.to_string(), "there is no modality `audio` here, only image, text");
}

struct Smell;

impl Modality for Smell {
    fn name(&self) -> &'static str {
        "smell"
    }

    fn input_name(&self) -> &'static str {
        "molecules"
    }

    fn open<'a>(&'a self, item: &'a [u8]) -> Result<Opened<'a>, ModalityError> {
        let cost = Cost { unit: CostUnit::Tokens, amount: item.len() as u64 };
        Ok(Opened::new(cost, 0, || Ok(Tensor::from_vec([item.len()], item.to_vec())?)))
    }
}

#[test]
fn a_new_modality_plugs_in_without_a_change_elsewhere() {
    let mut registry = Registry::default();
    registry.insert(Arc::new(Smell));
    assert_eq!(registry.get("smell").unwrap().process(b"rose").unwrap().shape(), [4]);
}

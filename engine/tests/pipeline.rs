//! From images and questions to answers, on a tiny artifact with known answers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use proptest::prelude::*;
use sensorium_artifact::{Artifact, Manifest, Store, Volumes};
use sensorium_engine::fixture::{self, ANSWERS, QUESTION};
use sensorium_engine::{GraphRunner, LocalPipeline, Named, Options, Pipeline, PipelineError, open_graph, rank_answers};
use sensorium_modality::{Limits, ModalityError, Tensor};
use tempfile::TempDir;

const RED: [u8; 3] = [200, 20, 30];
const GREEN: [u8; 3] = [20, 220, 30];
const BLUE: [u8; 3] = [10, 20, 240];

struct Tiny {
    _folder: TempDir,
    files: PathBuf,
    artifact: Artifact,
}

impl Tiny {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("file://{}", folder.path().display()), &Volumes::default()).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let artifact = runtime.block_on(fixture::commit(&store, "tiny-vqa")).unwrap();
        let files = runtime.block_on(store.fetch(&artifact, folder.path())).unwrap();
        Self { _folder: folder, files, artifact }
    }

    fn open(&self) -> LocalPipeline {
        LocalPipeline::open(&self.files, &self.artifact.manifest, Options::default()).unwrap()
    }

    /// The message with which a changed manifest is refused.
    fn refusal(&self, change: impl FnOnce(&mut Manifest)) -> String {
        let mut manifest = self.artifact.manifest.clone();
        change(&mut manifest);
        let Err(error) = LocalPipeline::open(&self.files, &manifest, Options::default()) else {
            panic!("the manifest was accepted")
        };
        assert!(!error.is_callers_fault());
        error.to_string()
    }
}

#[test]
fn each_question_is_answered_about_its_own_image() {
    let pipeline = Tiny::new().open();
    let [red, green, blue] = [RED, GREEN, BLUE].map(fixture::png);
    let answers = pipeline
        .vqa(&[
            (&red, QUESTION),
            (&green, QUESTION),
            (&red, "What shape is it?"),
            (&blue, QUESTION),
            (&red, "is it red?"),
        ])
        .unwrap();
    let texts: Vec<&str> = answers.iter().map(|answer| answer.answer.as_str()).collect();
    assert_eq!(texts, ["red", "green", "unsure", "blue", "red"]);
}

#[test]
fn scores_are_probabilities_ranked_and_the_first_is_the_answer() {
    let pipeline = Tiny::new().open();
    let answer = pipeline.vqa(&[(&fixture::png(RED), QUESTION)]).unwrap().remove(0);
    assert_eq!((answer.answer.as_str(), answer.score), (answer.ranked[0].0.as_str(), answer.ranked[0].1));
    assert!(answer.ranked.is_sorted_by(|a, b| a.1 >= b.1), "{:?}", answer.ranked);
    assert!((answer.ranked.iter().map(|(_, score)| score).sum::<f32>() - 1.0).abs() < 1e-6);
    // Logits are ten times the colour in -1..=1.
    let logits = RED.map(|channel| 10.0 * (f32::from(channel) / 127.5 - 1.0));
    let wanted = 1.0 / (1.0 + (logits[1] - logits[0]).exp() + (logits[2] - logits[0]).exp() + (-logits[0]).exp());
    assert!((answer.score - wanted).abs() < 1e-5, "{} is not {wanted}", answer.score);
}

#[test]
fn a_batch_gives_what_its_questions_give_alone() {
    let pipeline = Tiny::new().open();
    let images: Vec<Vec<u8>> = (0..12).map(|i| fixture::png([i * 20, 255 - i * 20, i * i])).collect();
    let questions: Vec<(&[u8], &str)> =
        images.iter().map(|image| (image.as_slice(), "what color is the image")).collect();
    let together = pipeline.vqa(&questions).unwrap();
    for (question, together) in questions.iter().zip(&together) {
        let alone = &pipeline.vqa(&[*question]).unwrap()[0];
        assert_eq!(alone.answer, together.answer);
        assert!((alone.score - together.score).abs() < 1e-5);
    }
}

#[test]
fn a_pair_that_belongs_together_is_closest_among_embeddings() {
    let pipeline = Tiny::new().open();
    let images = [RED, GREEN, BLUE].map(fixture::png);
    let images = pipeline.embed("image", &images.each_ref().map(Vec::as_slice)).unwrap();
    let texts = pipeline.embed("text", &[b"a red image", b"a green image", b"a blue image"]).unwrap();
    assert_eq!((images.shape(), texts.shape()), (&[3, 3][..], &[3, 3][..]));
    let (images, texts) = (images.as_slice::<f32>().unwrap(), texts.as_slice::<f32>().unwrap());
    for (i, image) in images.chunks(3).enumerate() {
        let similarity = |text: &[f32]| image.iter().zip(text).map(|(a, b)| a * b).sum::<f32>();
        let closest =
            (0..3).max_by(|&a, &b| similarity(&texts[a * 3..][..3]).total_cmp(&similarity(&texts[b * 3..][..3])));
        assert_eq!(closest, Some(i));
    }
}

/// Writes down which graphs ran with how many rows, and passes them on.
struct Recorder<'a> {
    local: &'a LocalPipeline,
    runs: Mutex<Vec<(String, usize)>>,
}

impl GraphRunner for Recorder<'_> {
    type Error = PipelineError;

    async fn run(&self, graph: &str, inputs: Named) -> Result<Named, PipelineError> {
        self.runs.lock().unwrap().push((graph.to_owned(), inputs[0].1.row_count().unwrap()));
        tokio::task::yield_now().await; // as a runner with a queue does
        GraphRunner::run(self.local, graph, inputs).await
    }
}

#[test]
fn the_pieces_run_over_anybodys_runner() {
    let local = Tiny::new().open();
    let pipeline = local.pipeline();
    let recorder = Recorder { local: &local, runs: Mutex::default() };
    let batch = [RED, BLUE].map(|color| pipeline.prepare_vqa(&fixture::png(color), QUESTION).unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let answers = runtime.block_on(pipeline.vqa(&recorder, &batch)).unwrap();
    assert_eq!(answers.iter().map(|answer| answer.answer.as_str()).collect::<Vec<_>>(), ["red", "blue"]);
    let runs = recorder.runs.into_inner().unwrap();
    assert_eq!(
        runs,
        [("text_encoder", 2), ("image_encoder", 2), ("fusion", 2)].map(|(graph, rows)| (graph.to_owned(), rows))
    );
}

#[test]
fn questions_share_an_image_that_was_encoded_once() {
    let local = Tiny::new().open();
    let recorder = Recorder { local: &local, runs: Mutex::default() };
    let pipeline = local.pipeline();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let input = pipeline.prepare_vqa(&fixture::png(RED), QUESTION).unwrap();
    let answers = runtime.block_on(async {
        let image = pipeline.encode(&recorder, "image", Tensor::stack(&[&input.image]).unwrap()).await?;
        let text = pipeline.encode(&recorder, "text", Tensor::stack(&[&input.text; 3]).unwrap()).await?;
        assert_eq!(
            (image.features().unwrap().shape(), text.embedding().unwrap().shape()),
            (&[1, 1, 4][..], &[3, 3][..])
        );
        pipeline.answer(&recorder, text, image.select(&[0, 0, 0])?).await
    });
    assert_eq!(answers.unwrap().iter().map(|answer| answer.answer.as_str()).collect::<Vec<_>>(), ["red"; 3]);
    let runs = recorder.runs.into_inner().unwrap();
    assert_eq!(
        runs,
        [("image_encoder", 1), ("text_encoder", 3), ("fusion", 3)].map(|(graph, rows)| (graph.to_owned(), rows))
    );
}

#[test]
fn a_bad_item_is_the_callers_fault_and_the_next_good_one_succeeds() {
    let pipeline = Tiny::new().open();
    let red = fixture::png(RED);
    for (image, question) in
        [(&b"junk"[..], QUESTION), (&red[..20], QUESTION), (&red[..], ""), (&red[..], "is is is is is is is is is")]
    {
        let error = pipeline.vqa(&[(&red, QUESTION), (image, question)]).unwrap_err();
        assert!(matches!(error, PipelineError::Modality(_)) && error.is_callers_fault(), "{error:?}");
    }
    assert_eq!(pipeline.vqa(&[(&red, QUESTION)]).unwrap()[0].answer, "red");
    let error = pipeline.embed("audio", &[b"la"]).unwrap_err();
    assert!(matches!(error, PipelineError::Modality(ModalityError::UnknownModality { .. })), "{error:?}");
}

#[test]
fn limits_reach_the_processors() {
    let tiny = Tiny::new();
    let mut limits = Limits::default();
    limits.image.max_pixels = 10;
    let pipeline = Pipeline::new(&tiny.files, &tiny.artifact.manifest, limits).unwrap();
    let error = pipeline.prepare("image", &fixture::png(RED)).unwrap_err();
    assert_eq!(error.to_string(), "the image has 192 pixels, the limit is 10");
}

#[test]
fn a_manifest_that_does_not_describe_its_graphs_is_refused_at_open() {
    let tiny = Tiny::new();
    let graph =
        |manifest: &mut Manifest, name: &str| manifest.graphs.iter().position(|graph| graph.name == name).unwrap();

    let message = tiny.refusal(|manifest| manifest.pipeline = None);
    assert!(message.ends_with("its manifest has no `pipeline`"), "{message}");

    let message = tiny.refusal(|manifest| {
        let at = graph(manifest, "image_encoder");
        manifest.graphs.remove(at);
    });
    assert!(message.ends_with("there is no graph `image_encoder`"), "{message}");

    let message = tiny.refusal(|manifest| {
        let at = graph(manifest, "image_encoder");
        manifest.graphs[at].inputs[0].shape[2] = Some(64);
    });
    assert!(
        message.starts_with("graph `image_encoder` is not what the manifest says: input `pixel_values`"),
        "{message}"
    );

    let message = tiny.refusal(|manifest| {
        let at = graph(manifest, "text_encoder");
        manifest.graphs[at].outputs.remove(1);
    });
    assert!(message.ends_with("no encoder gives `text_mask`, which graph `fusion` takes"), "{message}");

    let message = tiny.refusal(|manifest| {
        manifest.pipeline.as_mut().unwrap()["tasks"][0]["answers"].as_array_mut().unwrap().pop();
    });
    assert!(message.ends_with("graph `fusion` must give only `logits`, one for each of 3 answers"), "{message}");

    let message = tiny.refusal(|manifest| manifest.pipeline.as_mut().unwrap()["tasks"][1]["dim"] = 7.into());
    assert!(message.ends_with("must be there with 7 values per row"), "{message}");
}

#[test]
fn files_that_were_swapped_are_noticed_at_open() {
    let tiny = Tiny::new();
    let message = tiny.refusal(|manifest| {
        let file = manifest.graph("text_encoder").unwrap().file.clone();
        manifest.graphs.iter_mut().for_each(|graph| graph.file.clone_from(&file));
    });
    assert!(message.contains("is not what the manifest says: its inputs are input_ids"), "{message}");
}

#[test]
fn a_graph_that_cannot_be_opened_is_named_with_its_cause() {
    let tiny = Tiny::new();
    let mut graph = tiny.artifact.manifest.graphs[0].clone();
    graph.file = "graphs/nowhere.onnx".to_owned();
    let error = open_graph(Path::new(&tiny.files), &graph, Options::default()).err().unwrap();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(error.to_string().contains("text_encoder") && cause.contains("graphs/nowhere.onnx"), "{error}: {cause}");
}

#[test]
fn a_model_without_a_head_says_which() {
    let tiny = Tiny::new();
    let mut manifest = tiny.artifact.manifest.clone();
    manifest.pipeline.as_mut().unwrap()["tasks"].as_array_mut().unwrap().remove(0);
    let pipeline = LocalPipeline::open(&tiny.files, &manifest, Options::default()).unwrap();
    let error = pipeline.vqa(&[(&fixture::png(RED), QUESTION)]).unwrap_err();
    assert_eq!(error.to_string(), "this model has no VQA head");
    assert!(error.is_callers_fault());
}

#[test]
fn the_same_fixture_has_the_same_digest() {
    assert_eq!(Tiny::new().artifact.digest, Tiny::new().artifact.digest);
}

#[test]
fn logits_that_are_no_numbers_are_an_error_not_an_answer() {
    let answers = ANSWERS.map(str::to_owned);
    for (logits, reason) in [
        (Tensor::from_vec([1, 4], vec![0.0, f32::NAN, 0.0, 0.0]).unwrap(), "is NaN in row 0"),
        (Tensor::from_vec([2, 2], vec![0.0_f32; 4]).unwrap(), "is f32[2, 2], not f32[N, 4]"),
        (Tensor::from_vec([1, 4], vec![0_i64; 4]).unwrap(), "is i64[1, 4], not f32[N, 4]"),
    ] {
        let error = rank_answers(&logits, &answers).unwrap_err();
        assert!(matches!(&error, PipelineError::BadOutput { reason: found, .. } if found == reason), "{error}");
    }
}

proptest! {
    #[test]
    fn any_finite_logits_rank_to_probabilities(logits in prop::collection::vec(-1e30_f32..1e30, 4..=40)) {
        let rows = logits.len() / 4;
        let logits = Tensor::from_vec([rows, 4], logits[..rows * 4].to_vec()).unwrap();
        let ranked = rank_answers(&logits, &ANSWERS.map(str::to_owned)).unwrap();
        prop_assert_eq!(ranked.len(), rows);
        for (row, answer) in logits.as_slice::<f32>().unwrap().chunks(4).zip(ranked) {
            prop_assert!((answer.ranked.iter().map(|(_, score)| score).sum::<f32>() - 1.0).abs() < 1e-5);
            let chosen = ANSWERS.iter().position(|text| *text == answer.answer).unwrap();
            prop_assert!(row.iter().all(|logit| *logit <= row[chosen]));
        }
    }
}

//! A tiny artifact with known answers, for tests of what serves, compresses or evaluates artifacts (cargo feature
//! `fixture`).
//!
//! The model looks at the average colour of an image of any size (it works on 8 x 8 pixels) and at the words of a
//! text of at most 8 tokens:
//!
//! * Any question gets the image's strongest channel as its answer, `red`, `green` or `blue` ([`QUESTION`]), but one
//!   with the word `shape` gets `unsure`.
//! * Embeddings have three values, red, green and blue: a text's point where the colours it names are, an image's where
//!   its average colour is, both of length 1.
//!
//! Its graphs have the names, inputs and outputs of every VQA model.
//!
//! ```
//! use sensorium_artifact::{Store, Volumes};
//! use sensorium_engine::{LocalPipeline, Options, fixture};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let runtime = tokio::runtime::Runtime::new()?;
//! # let folder = tempfile::tempdir()?;
//! let store = Store::open(&format!("file://{}", folder.path().display()), &Volumes::default())?;
//! let artifact = runtime.block_on(fixture::commit(&store, "tiny-vqa"))?; // promoted to that name, too
//! let files = runtime.block_on(store.fetch(&artifact, folder.path()))?;
//!
//! let pipeline = LocalPipeline::open(&files, &artifact.manifest, Options::default())?;
//! let answers = pipeline.vqa(&[(&fixture::png([200, 30, 30]), fixture::QUESTION)])?;
//! assert_eq!(answers[0].answer, "red");
//! # Ok(())
//! # }
//! ```

use std::path::Path;

use sensorium_artifact::{
    Artifact, ArtifactError, DType as ArtifactDType, Format, Graph, Lineage, ManifestParts, Store, TensorSpec,
};
use sensorium_modality::{
    ImageConfig, ModalityError, PipelineSpec, Resize, RgbImage, TaskHead, TextConfig, TextProcessor, TextSpec,
    UNKNOWN_ID,
};
use sensorium_onnx::{Attribute, DType, Dim, GraphBuilder, Model, OnnxError};

/// A question that the model answers with a colour.
pub const QUESTION: &str = "What color is it?";

/// What the model can answer, in the order of its logits.
pub const ANSWERS: [&str; 4] = ["red", "green", "blue", "unsure"];

/// Height and width of the model's input, in pixels.
pub const IMAGE_SIZE: u32 = 8;

/// Row length of the model's text input, in tokens.
pub const MAX_LENGTH: usize = 8;

/// Width of features: red, green, blue, and whether the text asks for a shape.
const WIDTH: i64 = 4;

/// Width of embeddings.
const EMBEDDING: i64 = 3;

/// Why the artifact could not be written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant is named like the crate it comes from")]
pub enum FixtureError {
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Modality(#[from] ModalityError),
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Commits the artifact to `store` and promotes it to `name`.
///
/// # Errors
/// The store cannot be written.
pub async fn commit(store: &Store, name: &str) -> Result<Artifact, FixtureError> {
    let draft = store.draft()?;
    let tokenizer = draft.path("processor/tokenizer.json")?;
    draft.path("graphs/fusion.onnx")?; // makes the folder
    let parts = write(draft.folder(), &tokenizer, name)?;
    let artifact = store.commit(draft, parts).await?;
    store.promote(name, &artifact.digest).await?;
    Ok(artifact)
}

/// An image of one colour, as a PNG.
#[expect(clippy::expect_used, reason = "an image of bytes is written to memory, which does not fail")]
pub fn png(color: [u8; 3]) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    RgbImage::from_pixel(16, 12, color.into())
        .write_to(&mut bytes, image::ImageFormat::Png)
        .expect("PNG writes any RGB image");
    bytes.into_inner()
}

fn write(folder: &Path, tokenizer: &Path, name: &str) -> Result<ManifestParts, FixtureError> {
    let text = TextProcessor::train(
        [QUESTION, "What shape is it?", "a red green blue image"],
        TextConfig { max_length: MAX_LENGTH },
    )?;
    text.save(tokenizer)?;
    text_encoder(&text)?.save(&folder.join("graphs/text_encoder.onnx"))?;
    image_encoder()?.save(&folder.join("graphs/image_encoder.onnx"))?;
    fusion()?.save(&folder.join("graphs/fusion.onnx"))?;
    let spec = PipelineSpec {
        text: Some(TextSpec { tokenizer: "processor/tokenizer.json".to_owned(), config: text.config() }),
        image: Some(ImageConfig { size: IMAGE_SIZE, mean: [0.5; 3], std: [0.5; 3], resize: Resize::Exact }),
        tasks: vec![
            TaskHead::Vqa { answers: ANSWERS.map(str::to_owned).to_vec() },
            TaskHead::Contrastive { dim: EMBEDDING as usize },
        ],
    };
    Ok(ManifestParts {
        name: name.to_owned(),
        format: Format::Onnx,
        graphs: graphs(),
        pipeline: Some(serde_json::to_value(spec)?),
        modalities: vec!["text".to_owned(), "image".to_owned()],
        metrics: [("vqa_accuracy".to_owned(), 1.0)].into(),
        lineage: Lineage::default(),
    })
}

fn graphs() -> Vec<Graph> {
    let f32s = |name: &str, shape: &[Option<u64>]| spec(name, ArtifactDType::Fp32, shape);
    let size = Some(u64::from(IMAGE_SIZE));
    let (width, embedding) = (Some(WIDTH as u64), Some(EMBEDDING as u64));
    let text_features = f32s("text_features", &[None, None, width]);
    let text_mask = f32s("text_mask", &[None, None]);
    let image_features = f32s("image_features", &[None, Some(1), width]);
    let graph = |name: &str, inputs: Vec<TensorSpec>, outputs: Vec<TensorSpec>| Graph {
        name: name.to_owned(),
        file: format!("graphs/{name}.onnx"),
        inputs,
        outputs,
    };
    vec![
        graph(
            "text_encoder",
            vec![spec("input_ids", ArtifactDType::Int64, &[None, None])],
            vec![text_features.clone(), text_mask.clone(), f32s("text_embedding", &[None, embedding])],
        ),
        graph(
            "image_encoder",
            vec![f32s("pixel_values", &[None, Some(3), size, size])],
            vec![image_features.clone(), f32s("image_embedding", &[None, embedding])],
        ),
        graph(
            "fusion",
            vec![text_features, text_mask, image_features],
            vec![f32s("logits", &[None, Some(ANSWERS.len() as u64)])],
        ),
    ]
}

fn spec(name: &str, dtype: ArtifactDType, shape: &[Option<u64>]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

const BATCH: Dim<'static> = Dim::Symbol("batch");
const LENGTH: Dim<'static> = Dim::Symbol("length");

/// Each word's features are looked up in a table; the embedding is the sum of its colours.
fn text_encoder(text: &TextProcessor) -> Result<Model, FixtureError> {
    let words = text.vocabulary_size();
    let mut table = vec![0.0; words * WIDTH as usize];
    for (feature, word) in ["red", "green", "blue", "shape"].into_iter().enumerate() {
        for id in text.encode(word)? {
            debug_assert!(id > UNKNOWN_ID, "`{word}` is one of the training texts' words");
            table[id as usize * WIDTH as usize + feature] = 1.0;
        }
    }
    let mut graph = GraphBuilder::new("text_encoder");
    let ids = graph.input("input_ids", DType::I64, &[BATCH, LENGTH]);
    let table = graph.initializer_f32("words.weight", &[words as i64, WIDTH], table);
    let features = graph.node("Gather", &[&table, &ids], vec![]);
    let padding = graph.scalar_i64(0);
    let kept = graph.node("Greater", &[&ids, &padding], vec![]);
    let mask = graph.node("Cast", &[&kept], vec![Attribute::int("to", i64::from(DType::F32.code()))]);
    let axis = graph.vector_i64(&[1]);
    let sum = graph.node("ReduceSum", &[&features, &axis], vec![Attribute::int("keepdims", 0)]);
    let embedding = embedding(&mut graph, &sum);
    graph.output("text_features", &features, DType::F32, &[BATCH, LENGTH, Dim::Fixed(WIDTH)]);
    graph.output("text_mask", &mask, DType::F32, &[BATCH, LENGTH]);
    graph.output("text_embedding", &embedding, DType::F32, &[BATCH, Dim::Fixed(EMBEDDING)]);
    Ok(graph.finish(20)?)
}

/// The average of each channel, as one vector of features.
fn image_encoder() -> Result<Model, FixtureError> {
    let size = Dim::Fixed(i64::from(IMAGE_SIZE));
    let mut graph = GraphBuilder::new("image_encoder");
    let pixels = graph.input("pixel_values", DType::F32, &[BATCH, Dim::Fixed(3), size, size]);
    let axes = graph.vector_i64(&[2, 3]);
    let color = graph.node("ReduceMean", &[&pixels, &axes], vec![Attribute::int("keepdims", 0)]);
    let identity = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0];
    let weight = graph.initializer_f32("color.weight", &[3, WIDTH], identity);
    let vector = graph.node("MatMul", &[&color, &weight], vec![]);
    let embedding = embedding(&mut graph, &vector);
    let axis = graph.vector_i64(&[1]);
    let features = graph.node("Unsqueeze", &[&vector, &axis], vec![]);
    graph.output("image_features", &features, DType::F32, &[BATCH, Dim::Fixed(1), Dim::Fixed(WIDTH)]);
    graph.output("image_embedding", &embedding, DType::F32, &[BATCH, Dim::Fixed(EMBEDDING)]);
    Ok(graph.finish(20)?)
}

/// Ten times the image's colour, and twenty for the last answer when a kept word asks for a shape.
fn fusion() -> Result<Model, FixtureError> {
    let mut graph = GraphBuilder::new("fusion");
    let text = graph.input("text_features", DType::F32, &[BATCH, LENGTH, Dim::Fixed(WIDTH)]);
    let mask = graph.input("text_mask", DType::F32, &[BATCH, LENGTH]);
    let image = graph.input("image_features", DType::F32, &[BATCH, Dim::Fixed(1), Dim::Fixed(WIDTH)]);
    let axis = graph.vector_i64(&[1]);
    let last = graph.vector_i64(&[-1]);
    let mask = graph.node("Unsqueeze", &[&mask, &last], vec![]);
    let kept = graph.node("Mul", &[&text, &mask], vec![]);
    let asked = graph.node("ReduceSum", &[&kept, &axis], vec![Attribute::int("keepdims", 0)]);
    let seen = graph.node("Squeeze", &[&image, &axis], vec![]);
    let read = graph.node("Concat", &[&asked, &seen], vec![Attribute::int("axis", -1)]);
    let mut weight = [[0.0; 4]; 8];
    weight[3][3] = 20.0;
    for color in 0..3 {
        weight[4 + color][color] = 10.0;
    }
    let weight = graph.initializer_f32("classifier.weight", &[2 * WIDTH, ANSWERS.len() as i64], weight.as_flattened());
    let logits = graph.node("MatMul", &[&read, &weight], vec![]);
    graph.output("logits", &logits, DType::F32, &[BATCH, Dim::Fixed(ANSWERS.len() as i64)]);
    Ok(graph.finish(20)?)
}

/// The colours of `vector`, `[N, WIDTH]`, at length 1.
fn embedding(graph: &mut GraphBuilder, vector: &str) -> String {
    let (start, end, axis) = (graph.vector_i64(&[0]), graph.vector_i64(&[EMBEDDING]), graph.vector_i64(&[1]));
    let colors = graph.node("Slice", &[vector, &start, &end, &axis], vec![]);
    graph.node("LpNormalization", &[&colors], vec![Attribute::int("axis", -1), Attribute::int("p", 2)])
}

//! The models that are measured, and what they are asked.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sensorium_engine::{DType, Device, RawTensor};

/// What a request brings, by name.
pub(crate) type Inputs = Vec<(&'static str, RawTensor)>;

/// Tokens of a text where all are of one length.
const TOKENS: usize = 32;
/// Words that texts are made of: ids of ordinary words in the vocabulary of BERT begin at about 2000.
const FIRST_WORD: usize = 2000;
const WORDS: usize = 20_000;

/// One model with requests to it.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Name of its file in the folder of models.
    file: &'static str,
    inputs: &'static [Input],
    /// Whether the first axis of every tensor is the batch.
    pub(crate) batches: bool,
    /// Inputs and outputs in the words of config.pbtxt.
    interface: &'static str,
}

/// An input as a request has it.
struct Input {
    name: &'static str,
    dtype: DType,
    /// Without the batch axis, where the model batches.
    shape: &'static [i64],
    /// The element at an index.
    value: fn(usize) -> f64,
}

/// Everything that is measured.
pub(crate) const CASES: [Case; 7] = [
    Case {
        name: "minilm-int8",
        file: "minilm-int8.onnx",
        inputs: &[
            Input { name: "input_ids", dtype: DType::Int64, shape: &[TOKENS as i64], value: word },
            Input { name: "attention_mask", dtype: DType::Int64, shape: &[TOKENS as i64], value: |_| 1.0 },
            Input { name: "token_type_ids", dtype: DType::Int64, shape: &[TOKENS as i64], value: |_| 0.0 },
        ],
        batches: true,
        interface: r#"
            input [
                { name: "input_ids" data_type: TYPE_INT64 dims: [-1] },
                { name: "attention_mask" data_type: TYPE_INT64 dims: [-1] },
                { name: "token_type_ids" data_type: TYPE_INT64 dims: [-1] }
            ]
            output [ { name: "last_hidden_state" data_type: TYPE_FP32 dims: [-1, 384] } ]
        "#,
    },
    Case {
        name: "efficientnet-lite0",
        file: "efficientnet-lite0.onnx",
        inputs: &[Input { name: "pixels", dtype: DType::Fp32, shape: &[3, 224, 224], value: pixel }],
        batches: true,
        interface: r#"
            input [ { name: "pixels" data_type: TYPE_FP32 dims: [3, 224, 224] } ]
            output [ { name: "logits" data_type: TYPE_FP32 dims: [1000] } ]
        "#,
    },
    Case {
        name: "tiny-mlp",
        file: "tiny-mlp.onnx",
        inputs: &[Input { name: "x", dtype: DType::Fp32, shape: &[64], value: wave }],
        batches: true,
        interface: r#"
            input [ { name: "x" data_type: TYPE_FP32 dims: [64] } ]
            output [ { name: "y" data_type: TYPE_FP32 dims: [64] } ]
        "#,
    },
    // Its state is in the second axis, so requests do not batch; 576 samples are 32 ms of sound and 4 ms before them.
    Case {
        name: "silero-vad",
        file: "silero-vad.onnx",
        inputs: &[
            Input { name: "input", dtype: DType::Fp32, shape: &[1, 576], value: wave },
            Input { name: "state", dtype: DType::Fp32, shape: &[2, 1, 128], value: |_| 0.0 },
            Input { name: "sr", dtype: DType::Int64, shape: &[1], value: |_| 16_000.0 },
        ],
        batches: false,
        interface: r#"
            input [
                { name: "input" data_type: TYPE_FP32 dims: [-1, 576] },
                { name: "state" data_type: TYPE_FP32 dims: [2, -1, 128] },
                { name: "sr" data_type: TYPE_INT64 dims: [1] reshape: { shape: [] } }
            ]
            output [
                { name: "output" data_type: TYPE_FP32 dims: [-1, 1] },
                { name: "stateN" data_type: TYPE_FP32 dims: [-1, -1, -1] }
            ]
        "#,
    },
    Case {
        name: "efficientnet-lite0-torch",
        file: "efficientnet-lite0.pt",
        inputs: &[Input { name: "x", dtype: DType::Fp32, shape: &[3, 224, 224], value: pixel }],
        batches: true,
        interface: r#"
            input [ { name: "x" data_type: TYPE_FP32 dims: [3, 224, 224] } ]
            output [ { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [1000] } ]
        "#,
    },
    Case {
        name: "tiny-mlp-torch",
        file: "tiny-mlp.pt",
        inputs: &[Input { name: "x", dtype: DType::Fp32, shape: &[64], value: wave }],
        batches: true,
        interface: r#"
            input [ { name: "x" data_type: TYPE_FP32 dims: [64] } ]
            output [ { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [64] } ]
        "#,
    },
    // A second of sound in each request. The module keeps its state inside while it hears one, and begins anew with the next:
    // the state of a voice that goes on from request to request is nothing that KServe's runtime could keep apart.
    Case {
        name: "silero-vad-torch",
        file: "silero-vad.pt",
        inputs: &[Input { name: "x", dtype: DType::Fp32, shape: &[16_000], value: wave }],
        batches: true,
        interface: r#"
            input [ { name: "x" data_type: TYPE_FP32 dims: [16000] } ]
            output [ { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [32] } ]
        "#,
    },
];

fn word(index: usize) -> f64 {
    (FIRST_WORD + index * 7919 % WORDS) as f64
}

fn pixel(index: usize) -> f64 {
    (index * 31 % 255) as f64 / 127.5 - 1.0
}

fn wave(index: usize) -> f64 {
    (index as f64 * 0.17).sin() * 0.3
}

impl Case {
    /// Its file.
    pub(crate) fn path(&self, models: &Path) -> PathBuf {
        models.join(self.file)
    }

    /// Whether it is TorchScript; ONNX, otherwise.
    pub(crate) fn is_torchscript(&self) -> bool {
        Path::new(self.file).extension().is_some_and(|extension| extension == "pt")
    }

    /// The name of its file in a repository.
    pub(crate) fn served_as(&self) -> &'static str {
        if self.is_torchscript() { "model.pt" } else { "model.onnx" }
    }

    /// A request of `rows` rows.
    pub(crate) fn request(&self, rows: usize) -> Result<Inputs> {
        let tensor = |input: &Input| {
            let shape: Vec<i64> =
                self.batches.then_some(rows as i64).into_iter().chain(input.shape.iter().copied()).collect();
            let values = (0..shape.iter().product::<i64>() as usize).map(input.value);
            Ok((input.name, tensor(input.dtype, shape, values)?))
        };
        self.inputs.iter().map(tensor).collect()
    }

    /// The same as the graph takes it: a size that the configuration takes away is not there.
    pub(crate) fn graph_inputs(&self, rows: usize) -> Result<Vec<RawTensor>> {
        let input = |(name, tensor): (&str, RawTensor)| {
            if name == "sr" { Ok(tensor.reshaped(Vec::new())?) } else { Ok(tensor) }
        };
        self.request(rows)?.into_iter().map(input).collect()
    }

    /// A config.pbtxt for a server that runs up to `max_batch` rows at a time by `backend` on `device`.
    pub(crate) fn config(&self, backend: &str, device: Device, max_batch: usize) -> String {
        let kind = if device == Device::Cpu { "KIND_CPU" } else { "KIND_GPU" };
        let batching = if self.batches { "dynamic_batching { }" } else { "" };
        let max_batch = if self.batches { max_batch } else { 0 };
        format!(
            "backend: {backend:?}\nmax_batch_size: {max_batch}\n{}\n{batching}\ninstance_group [ {{ kind: {kind} count: 1 }} ]\n",
            self.interface
        )
    }
}

/// Texts of unequal lengths for a model that takes token ids: most are short, a few long. `padded_to` makes all of them as
/// long as that, as a client must whose server does not pad. Each comes with the number of its own tokens.
pub(crate) fn texts(count: usize, padded_to: Option<usize>) -> Result<Vec<(usize, Inputs)>> {
    let text = |index: usize| {
        // The same lengths in every run: squares of a low-discrepancy sequence between 4 and 128.
        let share = (index as f64 * 0.618_033_988_75).fract();
        let length = 4 + (share * share * 124.0) as usize;
        let size = padded_to.unwrap_or(length);
        let row = |value: &dyn Fn(usize) -> f64| {
            tensor(DType::Int64, vec![1, size as i64], (0..size).map(|at| if at < length { value(at) } else { 0.0 }))
        };
        let inputs = vec![
            ("input_ids", row(&|at| word(index + at))?),
            ("attention_mask", row(&|_| 1.0)?),
            ("token_type_ids", row(&|_| 0.0)?),
        ];
        Ok((length, inputs))
    };
    (0..count).map(text).collect()
}

/// The longest of [`texts`].
pub(crate) const LONGEST_TEXT: usize = 128;

/// What a server has to know to pad texts: the values that the model ignores.
pub(crate) const PADDING: &str = r#"
    parameters [
        { key: "padding" value: { string_value: "input_ids=0,attention_mask=0,token_type_ids=0" } },
        { key: "max_batch_elements" value: { string_value: "2048" } }
    ]
"#;

fn tensor(dtype: DType, shape: Vec<i64>, values: impl Iterator<Item = f64>) -> Result<RawTensor> {
    let tensor = match dtype {
        DType::Fp32 => RawTensor::from_vec(dtype, shape, values.map(|value| value as f32).collect::<Vec<_>>()),
        DType::Int64 => RawTensor::from_vec(dtype, shape, values.map(|value| value as i64).collect::<Vec<_>>()),
        other => return Err(anyhow::anyhow!("no request has {other:?}")),
    };
    tensor.context("a request of a case")
}

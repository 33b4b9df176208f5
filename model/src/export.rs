//! The interpreter that exports: every operation becomes ONNX nodes, every parameter an initializer of the same name.
//!
//! A network becomes one graph per encoder and one for fusion and answer, so that encoders can be served apart and their
//! outputs cached. The graphs are the weights too: [`import`] reads them back.

use std::convert::Infallible;

use sensorium_onnx::{Attribute, DType, Dim, GraphBuilder, Model, OnnxError};

use crate::block::{Acts, Section, Slot};
use crate::network::Network;
use crate::ops::{LAYER_NORM_EPS, MASKED_SCORE, Ops, Size};
use crate::params::{HostTensor, ParamView, Weights};

/// The first with `Gelu`; `LayerNormalization` came with 17.
const OPSET: i64 = 20;

/// A graph that is not asked for by the network is absent.
#[derive(Debug)]
pub struct Exported {
    /// Name (`text_encoder`, `image_encoder`, `fusion`) and graph, in the order in which they run.
    pub graphs: Vec<(&'static str, Model)>,
}

/// Why a network could not be written as ONNX, or read back.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The weights lack one of the network's parameters.
    #[error("the weights lack {name}, which the network needs with shape {shape:?}")]
    Missing {
        /// Full name.
        name: String,
        /// What the network declares.
        shape: Vec<i64>,
    },
    /// A parameter has another shape than the network declares.
    #[error("{name} has shape {found:?}, the network needs {expected:?}")]
    Shape {
        /// Full name.
        name: String,
        /// As found.
        found: Vec<i64>,
        /// What the network declares.
        expected: Vec<i64>,
    },
    /// The graph was refused.
    #[error("graph {graph} is not valid ONNX")]
    Onnx {
        /// Its name.
        graph: String,
        /// Why.
        source: OnnxError,
    },
}

/// Writes `network` with `weights` as ONNX graphs.
///
/// # Errors
/// When a parameter is missing or has another shape.
pub fn export(network: &Network, weights: &Weights) -> Result<Exported, ExportError> {
    let config = network.config();
    let width = config.width;
    let grid = config.image.grid().unwrap_or_default();
    let size = config.image.size;
    let (batch, length) = (Dim::Symbol("batch"), Dim::Symbol("length"));
    let text = Port {
        slot: Slot::Text,
        name: "text_features",
        dtype: DType::F32,
        dims: vec![batch, length, Dim::Fixed(width)],
    };
    let mask = Port { slot: Slot::TextMask, name: "text_mask", dtype: DType::F32, dims: vec![batch, length] };
    let patches = vec![batch, Dim::Fixed(grid * grid), Dim::Fixed(width)];
    let image = Port { slot: Slot::Image, name: "image_features", dtype: DType::F32, dims: patches };
    let ids = Port { slot: Slot::TextIds, name: "input_ids", dtype: DType::I64, dims: vec![batch, length] };
    let side = Dim::Fixed(size);
    let pixels = Port {
        slot: Slot::Pixels,
        name: "pixel_values",
        dtype: DType::F32,
        dims: vec![batch, Dim::Fixed(3), side, side],
    };
    let mut text_outputs = vec![text.clone(), mask.clone()];
    let mut image_outputs = vec![image.clone()];
    if let Some(dim) = config.embedding_dim {
        let dims = vec![batch, Dim::Fixed(dim)];
        text_outputs.push(Port {
            slot: Slot::TextEmbedding,
            name: "text_embedding",
            dtype: DType::F32,
            dims: dims.clone(),
        });
        image_outputs.push(Port { slot: Slot::ImageEmbedding, name: "image_embedding", dtype: DType::F32, dims });
    }
    let mut graphs = vec![
        ("text_encoder", section(network, weights, "text_encoder", Section::TextEncoder, &[ids], &text_outputs)?),
        (
            "image_encoder",
            section(network, weights, "image_encoder", Section::ImageEncoder, &[pixels], &image_outputs)?,
        ),
    ];
    if let Some(answers) = config.answers {
        let dims = vec![batch, Dim::Fixed(answers)];
        let logits = Port { slot: Slot::Logits, name: "logits", dtype: DType::F32, dims };
        graphs.push(("fusion", section(network, weights, "fusion", Section::Fusion, &[text, mask, image], &[logits])?));
    }
    Ok(Exported { graphs })
}

/// Reads the parameters of `network` back out of graphs that [`export`] wrote.
///
/// Parameters that only a loss needs are not in any graph; they come from `fallback`.
///
/// # Errors
/// When a parameter is in neither, or has another shape.
pub fn import(network: &Network, graphs: &[Model], fallback: &Weights) -> Result<Weights, ExportError> {
    let mut weights = Weights::new();
    for block in network.blocks() {
        for spec in block.params() {
            let name = block.full_name(spec);
            let tensor = match graphs.iter().find_map(|graph| graph.initializer(&name)) {
                Some(found) => {
                    let shape = found.shape().iter().map(|&n| n as i64).collect();
                    let data = found.f32s().map_err(|source| ExportError::Onnx { graph: name.clone(), source })?;
                    HostTensor { shape, data }
                }
                None => fallback
                    .get(&name)
                    .cloned()
                    .ok_or_else(|| ExportError::Missing { name: name.clone(), shape: spec.shape.clone() })?,
            };
            check_shape(&name, &tensor, &spec.shape)?;
            weights.insert(name, tensor);
        }
    }
    Ok(weights)
}

/// An input or output of a graph, and the slot it stands for.
#[derive(Clone)]
struct Port {
    slot: Slot,
    name: &'static str,
    dtype: DType,
    dims: Vec<Dim<'static>>,
}

fn section(
    network: &Network,
    weights: &Weights,
    name: &str,
    section: Section,
    inputs: &[Port],
    outputs: &[Port],
) -> Result<Model, ExportError> {
    let mut onnx = Onnx { graph: GraphBuilder::new(name) };
    let mut acts: Acts<String> =
        inputs.iter().map(|port| (port.slot, onnx.graph.input(port.name, port.dtype, &port.dims))).collect();
    for block in network.blocks().iter().filter(|block| block.section() == section) {
        let mut values = Vec::with_capacity(block.params().len());
        for spec in block.params() {
            let name = block.full_name(spec);
            let Some(tensor) = weights.get(&name) else {
                return Err(ExportError::Missing { name, shape: spec.shape.clone() });
            };
            check_shape(&name, tensor, &spec.shape)?;
            values.push(onnx.graph.initializer_f32(&name, &tensor.shape, &tensor.data));
        }
        let Ok(written) = block.forward(&mut onnx, ParamView::new(block.params(), &values), &acts);
        acts.extend(written);
    }
    for port in outputs {
        onnx.graph.output(port.name, &acts[&port.slot], port.dtype, &port.dims);
    }
    onnx.graph.finish(OPSET).map_err(|source| ExportError::Onnx { graph: name.to_owned(), source })
}

fn check_shape(name: &str, tensor: &HostTensor, expected: &[i64]) -> Result<(), ExportError> {
    if tensor.shape == expected {
        return Ok(());
    }
    Err(ExportError::Shape { name: name.to_owned(), found: tensor.shape.clone(), expected: expected.to_vec() })
}

/// Writes nodes; a value is its name.
struct Onnx {
    graph: GraphBuilder,
}

type Result1 = Result<String, Infallible>;

impl Onnx {
    fn node(&mut self, op: &str, inputs: &[&str]) -> String {
        self.graph.node(op, inputs, Vec::new())
    }

    /// One entry of the run-time shape of `x`, as a vector of length one.
    fn size_of(&mut self, x: &str, dim: i64) -> String {
        self.graph.node("Shape", &[x], vec![Attribute::int("start", dim), Attribute::int("end", dim + 1)])
    }
}

impl Ops for Onnx {
    type Value = String;
    type Error = Infallible;

    fn share(&self, x: &String) -> String {
        x.clone()
    }

    fn embedding(&mut self, table: &String, ids: &String) -> Result1 {
        Ok(self.node("Gather", &[table, ids]))
    }

    fn linear(&mut self, x: &String, weight: &String, bias: Option<&String>) -> Result1 {
        let product = self.node("MatMul", &[x, weight]);
        Ok(match bias {
            Some(bias) => self.node("Add", &[&product, bias]),
            None => product,
        })
    }

    fn conv2d(&mut self, x: &String, weight: &String, bias: &String, stride: i64, padding: i64) -> Result1 {
        let attributes = vec![Attribute::ints("strides", &[stride, stride]), Attribute::ints("pads", &[padding; 4])];
        Ok(self.graph.node("Conv", &[x, weight, bias], attributes))
    }

    fn layer_norm(&mut self, x: &String, gain: &String, bias: &String) -> Result1 {
        let attributes = vec![Attribute::int("axis", -1), Attribute::float("epsilon", LAYER_NORM_EPS as f32)];
        Ok(self.graph.node("LayerNormalization", &[x, gain, bias], attributes))
    }

    fn gelu(&mut self, x: &String) -> Result1 {
        Ok(self.graph.node("Gelu", &[x], vec![Attribute::string("approximate", "tanh")]))
    }

    fn attention(&mut self, q: &String, k: &String, v: &String, keep: Option<&String>, scale: f64) -> Result1 {
        let scale = self.graph.scalar_f32(scale as f32);
        let q = self.node("Mul", &[q, &scale]);
        let k = self.transpose(k, &[0, 1, 3, 2])?;
        let mut scores = self.node("MatMul", &[&q, &k]);
        if let Some(keep) = keep {
            let (one, masked) = (self.graph.scalar_f32(1.0), self.graph.scalar_f32(MASKED_SCORE));
            let dropped = self.node("Sub", &[&one, keep]);
            let bias = self.node("Mul", &[&dropped, &masked]);
            let axes = self.graph.vector_i64(&[1, 2]);
            let bias = self.node("Unsqueeze", &[&bias, &axes]);
            scores = self.node("Add", &[&scores, &bias]);
        }
        let weights = self.graph.node("Softmax", &[&scores], vec![Attribute::int("axis", -1)]);
        Ok(self.node("MatMul", &[&weights, v]))
    }

    fn add(&mut self, a: &String, b: &String) -> Result1 {
        Ok(self.node("Add", &[a, b]))
    }

    fn mul(&mut self, a: &String, b: &String) -> Result1 {
        Ok(self.node("Mul", &[a, b]))
    }

    fn exp(&mut self, x: &String) -> Result1 {
        Ok(self.node("Exp", &[x]))
    }

    fn reshape(&mut self, x: &String, shape: &[Size]) -> Result1 {
        let target: Vec<i64> = shape
            .iter()
            .map(|size| match size {
                Size::Same => 0, // ONNX: copied from the input's dimension at this position
                Size::Fixed(n) => *n,
                Size::Rest => -1,
            })
            .collect();
        let target = self.graph.vector_i64(&target);
        Ok(self.node("Reshape", &[x, &target]))
    }

    fn transpose(&mut self, x: &String, perm: &[i64]) -> Result1 {
        Ok(self.graph.node("Transpose", &[x], vec![Attribute::ints("perm", perm)]))
    }

    fn split_last(&mut self, x: &String, parts: usize) -> Result<Vec<String>, Infallible> {
        let attributes = vec![Attribute::int("axis", -1), Attribute::int("num_outputs", parts as i64)];
        Ok(self.graph.node_multi("Split", &[x], parts, attributes))
    }

    fn concat(&mut self, parts: &[String], dim: i64) -> Result1 {
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        Ok(self.graph.node("Concat", &parts, vec![Attribute::int("axis", dim)]))
    }

    fn gather_rows(&mut self, x: &String, index: &String) -> Result1 {
        Ok(self.node("Gather", &[x, index]))
    }

    fn first_token(&mut self, x: &String) -> Result1 {
        let first = self.graph.scalar_i64(0);
        Ok(self.graph.node("Gather", &[x, &first], vec![Attribute::int("axis", 1)]))
    }

    fn add_positions(&mut self, x: &String, table: &String) -> Result1 {
        let length = self.size_of(x, 1);
        let start = self.graph.vector_i64(&[0]);
        let positions = self.node("Slice", &[table, &start, &length, &start]);
        Ok(self.node("Add", &[x, &positions]))
    }

    fn keep_mask(&mut self, ids: &String) -> Result1 {
        let padding = self.graph.scalar_i64(0);
        let is_padding = self.node("Equal", &[ids, &padding]);
        let is_token = self.node("Not", &[&is_padding]);
        Ok(self.graph.node("Cast", &[&is_token], vec![Attribute::int("to", i64::from(DType::F32.code()))]))
    }

    fn ones_mask(&mut self, x: &String) -> Result1 {
        let shape = self.graph.node("Shape", &[x], vec![Attribute::int("end", 2)]);
        let one = self.graph.scalar_f32(1.0);
        Ok(self.node("Expand", &[&one, &shape]))
    }

    fn repeat_row(&mut self, row: &String, like: &String) -> Result1 {
        let batch = self.size_of(like, 0);
        let ones = self.graph.vector_i64(&[1, 1]);
        let shape = self.concat(&[batch, ones], 0)?;
        Ok(self.node("Expand", &[row, &shape]))
    }

    fn masked_mean(&mut self, x: &String, keep: &String) -> Result1 {
        let last = self.graph.vector_i64(&[-1]);
        let weights = self.node("Unsqueeze", &[keep, &last]);
        let kept = self.node("Mul", &[x, &weights]);
        let tokens = self.graph.vector_i64(&[1]);
        let no_dims = || vec![Attribute::int("keepdims", 0)];
        let sum = self.graph.node("ReduceSum", &[&kept, &tokens], no_dims());
        let count = self.graph.node("ReduceSum", &[&weights, &tokens], no_dims());
        Ok(self.node("Div", &[&sum, &count]))
    }

    fn l2_normalise(&mut self, x: &String) -> Result1 {
        let last = self.graph.vector_i64(&[-1]);
        let length = self.node("ReduceL2", &[x, &last]);
        Ok(self.node("Div", &[x, &length]))
    }
}

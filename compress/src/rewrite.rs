//! Rewrites a graph in Q/DQ form.
//!
//! The form is what ONNX Runtime's CPU fusions look for and what explicitly quantised TensorRT networks are:
//! * `MatMul`: the activation passes a `QuantizeLinear`/`DequantizeLinear` pair, the weight is INT8 behind a
//!   `DequantizeLinear` with one scale per output column. The product stays f32, so it costs no second rounding; ONNX
//!   Runtime makes one integer kernel with a float result of it.
//! * `Conv`: the same with one scale per output channel; in addition its result is quantised and its bias is i32 with
//!   scale `activation * weight`, because the only integer kernel there is takes and gives integers.
//! * `Gather`: the table is INT8 with one scale, and what was looked up is dequantised.
//!
//! Everything between (normalisation, softmax, activation functions, residual sums) stays in f32 and reads the f32 value.

use std::collections::{BTreeMap, HashMap};

use sensorium_onnx::{Attribute, Model, Names, NodeProto, TensorProto};

use crate::affine::{ActivationType, Affine, Range, WeightRange, quantize_weight};
use crate::error::CompressError;
use crate::plan::{GraphPlan, Target};

/// How numbers are represented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Representation {
    /// Activations.
    pub activations: ActivationType,
    /// Weights.
    pub weights: WeightRange,
}

/// The largest magnitude of an i32 bias; the accumulator needs the other half for the products.
const BIAS_LIMIT: f32 = 1_073_741_824.0; // 2^30

/// The graph with every target of `plan` in Q/DQ form. The same arguments give the same bytes.
/// # Errors
/// `NoRange` for an activation that `ranges` lacks, `NotFinite` for a weight with a NaN or an infinity in it; `Onnx` when
/// the result breaks a rule of the format, which is a bug.
pub fn rewrite(
    model: &Model,
    plan: &GraphPlan,
    ranges: &BTreeMap<String, Range>,
    representation: Representation,
) -> Result<Model, CompressError> {
    let mut rewriter = Rewriter {
        model,
        ranges,
        representation,
        names: Names::of(model.graph()),
        nodes: Vec::new(),
        replaced: HashMap::new(),
        added: Vec::new(),
        scalars: HashMap::new(),
        dequantized: HashMap::new(),
    };
    for (position, node) in model.graph().node.iter().enumerate() {
        match plan.targets.get(&position) {
            Some(target) => rewriter.quantize(node, target)?,
            None => rewriter.nodes.push(node.clone()),
        }
    }
    let Rewriter { nodes, mut replaced, added, .. } = rewriter;
    let mut proto = model.clone().into_proto();
    if let Some(graph) = &mut proto.graph {
        graph.node = nodes;
        for tensor in &mut graph.initializer {
            if let Some(integers) = replaced.remove(&tensor.name) {
                *tensor = integers;
            }
        }
        graph.initializer.extend(added);
    }
    Ok(Model::try_from(proto)?)
}

struct Rewriter<'a> {
    model: &'a Model,
    ranges: &'a BTreeMap<String, Range>,
    representation: Representation,
    names: Names,
    nodes: Vec<NodeProto>,
    /// Integer tensors that take the place and the name of an f32 one.
    replaced: HashMap<String, TensorProto>,
    /// Scales and zero points.
    added: Vec<TensorProto>,
    /// Those of them that are scalars, by type and bytes: equal ones are stored once.
    scalars: HashMap<(i32, Vec<u8>), String>,
    /// Dequantised form of activations and `MatMul` weights that have one already.
    dequantized: HashMap<String, String>,
}

impl Rewriter<'_> {
    fn quantize(&mut self, node: &NodeProto, target: &Target) -> Result<(), CompressError> {
        let mut node = node.clone();
        match target {
            Target::MatMul { activation, weight } => {
                node.input = vec![self.activation(activation)?, self.matmul_weight(weight)?];
                self.nodes.push(node);
            }
            Target::Conv { activation, weight, bias, output } => {
                node.input = self.conv_inputs(activation, weight, bias.as_deref())?;
                let product = self.names.fresh();
                node.output = vec![product.clone()];
                self.nodes.push(node);
                let affine = self.affine(output)?;
                self.pair(product, affine, output.clone());
            }
            Target::Gather { weight } => {
                let (values, dims) = self.constant(weight)?;
                // A lookup multiplies nothing, so nothing can saturate: all 8 bits are used.
                let quantized = quantize_weight(&values, &dims, None, &[], WeightRange::Full);
                self.replace(TensorProto::from_i8(weight, &sizes(&dims), &quantized.values));
                let rows = self.names.fresh();
                let result = std::mem::replace(&mut node.output[0], rows.clone());
                self.nodes.push(node);
                let scale = self.scalar(TensorProto::from_f32("", &[], &quantized.scales));
                self.dequantize_into(vec![rows, scale], None, result);
            }
        }
        Ok(())
    }

    /// The activation behind one Q/DQ pair, shared by all that read it quantised.
    fn activation(&mut self, value: &str) -> Result<String, CompressError> {
        if let Some(name) = self.dequantized.get(value) {
            return Ok(name.clone());
        }
        let affine = self.affine(value)?;
        let name = self.names.fresh();
        self.pair(value.to_owned(), affine, name.clone());
        self.dequantized.insert(value.to_owned(), name.clone());
        Ok(name)
    }

    fn matmul_weight(&mut self, weight: &str) -> Result<String, CompressError> {
        if let Some(name) = self.dequantized.get(weight) {
            return Ok(name.clone());
        }
        let (values, dims) = self.constant(weight)?;
        let quantized = quantize_weight(&values, &dims, Some(1), &[], self.representation.weights);
        self.replace(TensorProto::from_i8(weight, &sizes(&dims), &quantized.values));
        let name = self.dequantize(weight, &quantized.scales, 1);
        self.dequantized.insert(weight.to_owned(), name.clone());
        Ok(name)
    }

    fn conv_inputs(
        &mut self,
        activation: &str,
        weight: &str,
        bias: Option<&str>,
    ) -> Result<Vec<String>, CompressError> {
        let step = self.affine(activation)?.scale;
        let (values, dims) = self.constant(weight)?;
        let biases = bias.map(|bias| self.constant(bias)).transpose()?.map_or_else(Vec::new, |(biases, _)| biases);
        // The bias counts in steps of activation times weight, so a channel of tiny weights needs a larger scale than its
        // weights ask for, or its bias would not fit an i32.
        let smallest: Vec<f32> = biases.iter().map(|bias| bias.abs() / step / BIAS_LIMIT).collect();
        let quantized = quantize_weight(&values, &dims, Some(0), &smallest, self.representation.weights);
        self.replace(TensorProto::from_i8(weight, &sizes(&dims), &quantized.values));
        let mut inputs = vec![self.activation(activation)?, self.dequantize(weight, &quantized.scales, 0)];
        if let Some(bias) = bias {
            let scales: Vec<f32> = quantized.scales.iter().map(|scale| scale * step).collect();
            let integers: Vec<i32> =
                biases.iter().zip(&scales).map(|(bias, scale)| (bias / scale).round_ties_even() as i32).collect();
            self.replace(TensorProto::from_i32(bias, &[integers.len() as i64], &integers));
            inputs.push(self.dequantize(bias, &scales, 0));
        }
        Ok(inputs)
    }

    fn affine(&self, activation: &str) -> Result<Affine, CompressError> {
        let range = self.ranges.get(activation).ok_or_else(|| CompressError::NoRange {
            graph: self.model.graph().name.clone(),
            value: activation.to_owned(),
        })?;
        Ok(Affine::activation(*range, self.representation.activations))
    }

    /// `QuantizeLinear` and `DequantizeLinear` from `value` to `result`.
    fn pair(&mut self, value: String, affine: Affine, result: String) {
        let scale = self.scalar(TensorProto::from_f32("", &[], &[affine.scale]));
        // Zero points are spelled out even where they are 0: without one the type would be u8, and ONNX Runtime's
        // fusions ask for them.
        let zero_point = self.scalar(match self.representation.activations {
            ActivationType::AsymmetricU8 => TensorProto::from_u8("", &[], &[affine.zero_point as u8]),
            ActivationType::SymmetricI8 => TensorProto::from_i8("", &[], &[affine.zero_point as i8]),
        });
        let integers = self.names.fresh();
        self.nodes.push(NodeProto {
            op_type: "QuantizeLinear".to_owned(),
            input: vec![value, scale.clone(), zero_point.clone()],
            output: vec![integers.clone()],
            ..NodeProto::default()
        });
        self.dequantize_into(vec![integers, scale, zero_point], None, result);
    }

    /// A constant of integers behind its `DequantizeLinear` with one scale per index of `axis`. The zero point is left
    /// out: it is 0, and the type is the constant's.
    fn dequantize(&mut self, integers: &str, scales: &[f32], axis: i64) -> String {
        let scale = self.names.fresh();
        self.added.push(TensorProto::from_f32(&scale, &[scales.len() as i64], scales));
        let result = self.names.fresh();
        self.dequantize_into(vec![integers.to_owned(), scale], Some(axis), result.clone());
        result
    }

    fn dequantize_into(&mut self, input: Vec<String>, axis: Option<i64>, result: String) {
        self.nodes.push(NodeProto {
            op_type: "DequantizeLinear".to_owned(),
            input,
            output: vec![result],
            attribute: axis.map(|axis| Attribute::int("axis", axis)).into_iter().collect(),
            ..NodeProto::default()
        });
    }

    fn scalar(&mut self, mut tensor: TensorProto) -> String {
        let key = (tensor.data_type, tensor.raw_data.clone());
        if let Some(name) = self.scalars.get(&key) {
            return name.clone();
        }
        let name = self.names.fresh();
        name.clone_into(&mut tensor.name);
        self.added.push(tensor);
        self.scalars.insert(key, name.clone());
        name
    }

    fn replace(&mut self, integers: TensorProto) {
        self.replaced.insert(integers.name.clone(), integers);
    }

    /// Elements and shape of an f32 constant.
    fn constant(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>), CompressError> {
        let graph = || self.model.graph().name.clone();
        // A plan for another graph is the only way to get here without the constant.
        let tensor = self
            .model
            .initializer(name)
            .ok_or_else(|| CompressError::NoConstant { graph: graph(), name: name.to_owned() })?;
        let values = tensor.f32s()?;
        match values.iter().find(|value| !value.is_finite()) {
            Some(&found) => Err(CompressError::NotFinite { graph: graph(), value: name.to_owned(), found }),
            None => Ok((values, tensor.shape())),
        }
    }
}

fn sizes(dims: &[usize]) -> Vec<i64> {
    dims.iter().map(|&dim| dim as i64).collect()
}

use std::collections::BTreeMap;

use crate::proto::{
    AttributeProto, DimensionProto, DimensionValue, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};
use crate::{DType, Model, Names, OnnxError};

/// File format version that goes with opset 20; every reader of that opset knows it.
const IR_VERSION: i64 = 9;

/// Size of one axis of a graph's input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim<'a> {
    /// Always this size.
    Fixed(i64),
    /// Any size, the same wherever this symbol stands.
    Symbol(&'a str),
}

/// Writes a graph node by node. Values are named by strings; those it makes up are short, because names count in the
/// size of small models.
///
/// Nothing fails until [`GraphBuilder::finish`], which checks the whole graph.
#[derive(Debug)]
pub struct GraphBuilder {
    graph: GraphProto,
    constants: BTreeMap<(i32, Vec<i64>, Vec<u8>), String>,
    names: Names,
    /// Graph outputs that wait for their value to be renamed: (value, name).
    outputs: Vec<(String, String)>,
}

impl GraphBuilder {
    /// An empty graph.
    pub fn new(name: &str) -> Self {
        Self {
            graph: GraphProto { name: name.to_owned(), ..GraphProto::default() },
            constants: BTreeMap::new(),
            names: Names::default(),
            outputs: Vec::new(),
        }
    }

    /// Declares an input; returns its name.
    pub fn input(&mut self, name: &str, dtype: DType, dims: &[Dim<'_>]) -> String {
        self.names.take(name);
        self.graph.input.push(ValueInfoProto::tensor(name, dtype, dims));
        name.to_owned()
    }

    /// Declares that `value` is the graph's output `name`. The value is renamed when the graph is finished; until then it
    /// keeps the name under which it was made, so it can still be read by later nodes.
    pub fn output(&mut self, name: &str, value: &str, dtype: DType, dims: &[Dim<'_>]) {
        self.names.take(name);
        self.graph.output.push(ValueInfoProto::tensor(name, dtype, dims));
        self.outputs.push((value.to_owned(), name.to_owned()));
    }

    /// Adds a constant tensor; returns its name.
    pub fn initializer(&mut self, tensor: TensorProto) -> String {
        let name = tensor.name.clone();
        self.names.take(&name);
        self.graph.initializer.push(tensor);
        name
    }

    /// Adds an f32 constant of shape `dims`, row-major; returns its name.
    pub fn initializer_f32(&mut self, name: &str, dims: &[i64], values: impl AsRef<[f32]>) -> String {
        self.initializer(TensorProto::from_f32(name, dims, values.as_ref()))
    }

    /// Adds an i64 constant of shape `dims`, row-major; returns its name.
    pub fn initializer_i64(&mut self, name: &str, dims: &[i64], values: impl AsRef<[i64]>) -> String {
        self.initializer(TensorProto::from_i64(name, dims, values.as_ref()))
    }

    /// Adds an i32 constant of shape `dims`, row-major; returns its name.
    pub fn initializer_i32(&mut self, name: &str, dims: &[i64], values: impl AsRef<[i32]>) -> String {
        self.initializer(TensorProto::from_i32(name, dims, values.as_ref()))
    }

    /// Adds an i8 constant of shape `dims`, row-major; returns its name.
    pub fn initializer_i8(&mut self, name: &str, dims: &[i64], values: impl AsRef<[i8]>) -> String {
        self.initializer(TensorProto::from_i8(name, dims, values.as_ref()))
    }

    /// A nameless constant, stored once however often it is asked for; returns its name.
    pub fn constant(&mut self, mut tensor: TensorProto) -> String {
        let key = (tensor.data_type, tensor.dims.clone(), tensor.raw_data.clone());
        if let Some(name) = self.constants.get(&key) {
            return name.clone();
        }
        let name = self.names.fresh();
        name.clone_into(&mut tensor.name);
        self.graph.initializer.push(tensor);
        self.constants.insert(key, name.clone());
        name
    }

    /// A shared f32 scalar.
    pub fn scalar_f32(&mut self, value: f32) -> String {
        self.constant(TensorProto::from_f32("", &[], &[value]))
    }

    /// A shared i64 scalar.
    pub fn scalar_i64(&mut self, value: i64) -> String {
        self.constant(TensorProto::from_i64("", &[], &[value]))
    }

    /// A shared i64 vector: a shape, axes, starts or ends.
    pub fn vector_i64(&mut self, values: &[i64]) -> String {
        self.constant(TensorProto::from_i64("", &[values.len() as i64], values))
    }

    /// Adds a node with one output; returns the output's name. An empty input name is an optional input left out.
    pub fn node(&mut self, op_type: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let output = self.names.fresh();
        self.push(op_type, inputs, vec![output.clone()], attributes);
        output
    }

    /// Adds a node with one output of the given name.
    pub fn node_named(
        &mut self,
        op_type: &str,
        inputs: &[&str],
        output: &str,
        attributes: Vec<AttributeProto>,
    ) -> String {
        self.names.take(output);
        self.push(op_type, inputs, vec![output.to_owned()], attributes);
        output.to_owned()
    }

    /// Adds a node with several outputs, `Split` for example; returns their names.
    pub fn node_multi(
        &mut self,
        op_type: &str,
        inputs: &[&str],
        outputs: usize,
        attributes: Vec<AttributeProto>,
    ) -> Vec<String> {
        let outputs: Vec<String> = (0..outputs).map(|_| self.names.fresh()).collect();
        self.push(op_type, inputs, outputs.clone(), attributes);
        outputs
    }

    /// The checked model, written against ONNX's operator set `opset`.
    /// # Errors
    /// `Invalid` or `WrongLength`, naming the value that breaks a rule.
    pub fn finish(mut self, opset: i64) -> Result<Model, OnnxError> {
        // A value may be exposed twice: the second output copies the first, under the name that it has by then.
        let mut renamed: BTreeMap<String, String> = BTreeMap::new();
        for (value, name) in std::mem::take(&mut self.outputs) {
            self.expose(renamed.get(&value).unwrap_or(&value), &name);
            renamed.entry(value).or_insert(name);
        }
        Model::try_from(ModelProto {
            ir_version: IR_VERSION,
            producer_name: "sensorium".to_owned(),
            graph: Some(self.graph),
            opset_import: vec![OperatorSetIdProto { domain: String::new(), version: opset }],
            ..ModelProto::default()
        })
    }

    fn push(&mut self, op_type: &str, inputs: &[&str], output: Vec<String>, attribute: Vec<AttributeProto>) {
        self.graph.node.push(NodeProto {
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output,
            op_type: op_type.to_owned(),
            attribute,
            ..NodeProto::default()
        });
    }

    /// Gives `value` the name of a graph output. A value that has a fixed name already (an input, an initializer, another
    /// output) is copied by an `Identity` instead.
    fn expose(&mut self, value: &str, name: &str) {
        if value == name {
            return;
        }
        let is_output = self.graph.output.iter().any(|output| output.name == value);
        let made = self.graph.node.iter().any(|node| node.output.iter().any(|output| output == value));
        if is_output || !made {
            self.push("Identity", &[value], vec![name.to_owned()], Vec::new());
            return;
        }
        for node in &mut self.graph.node {
            for used in node.input.iter_mut().chain(&mut node.output).filter(|used| *used == value) {
                name.clone_into(used);
            }
        }
    }
}

impl ValueInfoProto {
    /// A dense tensor's name and type.
    pub fn tensor(name: &str, dtype: DType, dims: &[Dim<'_>]) -> Self {
        let dim = dims
            .iter()
            .map(|dim| match dim {
                Dim::Fixed(size) => DimensionValue::DimValue(*size),
                Dim::Symbol(symbol) => DimensionValue::DimParam((*symbol).to_owned()),
            })
            .map(|value| DimensionProto { value: Some(value) })
            .collect();
        let tensor_type = TensorTypeProto { elem_type: dtype.code(), shape: Some(TensorShapeProto { dim }) };
        Self { name: name.to_owned(), r#type: Some(TypeProto { tensor_type: Some(tensor_type) }) }
    }

    /// Element type, if it is one that Sensorium reads.
    pub fn dtype(&self) -> Option<DType> {
        DType::from_code(self.r#type.as_ref()?.tensor_type.as_ref()?.elem_type)
    }

    /// Shape with `None` for sizes that vary; `None` when the rank is unknown.
    pub fn shape(&self) -> Option<Vec<Option<u64>>> {
        let shape = self.r#type.as_ref()?.tensor_type.as_ref()?.shape.as_ref()?;
        Some(shape.dim.iter().map(DimensionProto::size).collect())
    }
}

impl DimensionProto {
    fn size(&self) -> Option<u64> {
        match self.value {
            Some(DimensionValue::DimValue(size)) => u64::try_from(size).ok(),
            Some(DimensionValue::DimParam(_)) | None => None,
        }
    }
}

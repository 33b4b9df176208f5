use std::collections::HashSet;

use crate::OnnxError;
use crate::proto::{AttributeProto, AttributeType, GraphProto, ModelProto, TensorProto};
use crate::tensor::element_count;

/// Takes the graph out of a model after checking it: names are unique, each node reads what exists before it, outputs
/// exist, tensors fill their shapes, and nothing is used that the types in [`crate::proto`] would lose.
pub(crate) fn check(model: &mut ModelProto) -> Result<GraphProto, OnnxError> {
    let Some(graph) = model.graph.take() else {
        return Err(OnnxError::Invalid { graph: String::new(), rule: "the model has no graph".to_owned() });
    };
    let checker = Checker { graph: &graph };
    if !model.functions.is_empty() {
        return Err(checker.unsupported("model-local functions".to_owned()));
    }
    if !model.opset_import.iter().any(|opset| matches!(opset.domain.as_str(), "" | "ai.onnx")) {
        return Err(checker.invalid("the model imports no ONNX operator set".to_owned()));
    }
    checker.run()?;
    Ok(graph)
}

struct Checker<'a> {
    graph: &'a GraphProto,
}

impl<'a> Checker<'a> {
    fn run(&self) -> Result<(), OnnxError> {
        let graph = self.graph;
        if !graph.sparse_initializer.is_empty() {
            return Err(self.unsupported("sparse initializers".to_owned()));
        }
        let mut known: HashSet<&str> = HashSet::new();
        for input in &graph.input {
            self.define(&mut known, &input.name, "input")?;
        }
        let inputs = known.clone();
        for tensor in &graph.initializer {
            self.tensor(tensor)?;
            // Older writers list initializers among the inputs too; that is one value, not two.
            if !inputs.contains(tensor.name.as_str()) {
                self.define(&mut known, &tensor.name, "initializer")?;
            }
        }
        for node in &graph.node {
            for input in node.input.iter().filter(|input| !input.is_empty()) {
                if !known.contains(input.as_str()) {
                    let rule = format!("{} reads {input:?}, which nothing before it makes", node.op_type);
                    return Err(self.invalid(rule));
                }
            }
            for attribute in &node.attribute {
                self.attribute(&node.op_type, attribute)?;
            }
            for output in node.output.iter().filter(|output| !output.is_empty()) {
                self.define(&mut known, output, &node.op_type)?;
            }
        }
        let mut outputs = HashSet::new();
        for output in &graph.output {
            if !known.contains(output.name.as_str()) {
                return Err(self.invalid(format!("output {:?} is made by no node", output.name)));
            }
            self.define(&mut outputs, &output.name, "output")?;
        }
        if outputs.is_empty() {
            return Err(self.invalid("there is no output".to_owned()));
        }
        Ok(())
    }

    fn define(&self, known: &mut HashSet<&'a str>, name: &'a str, what: &str) -> Result<(), OnnxError> {
        if name.is_empty() {
            return Err(self.invalid(format!("an {what} has no name")));
        }
        if known.insert(name) {
            Ok(())
        } else {
            Err(self.invalid(format!("{name:?} is defined twice, again by {what}")))
        }
    }

    fn attribute(&self, op_type: &str, attribute: &AttributeProto) -> Result<(), OnnxError> {
        let name = &attribute.name;
        if attribute.g.is_some() {
            return Err(self.unsupported(format!("control flow ({op_type} with subgraph {name:?})")));
        }
        match AttributeType::try_from(attribute.r#type) {
            Ok(AttributeType::Tensor) => match &attribute.t {
                Some(tensor) => self.tensor(tensor),
                None => Err(self.invalid(format!("attribute {name:?} of {op_type} has no tensor"))),
            },
            // Numbers and strings may be absent: writers of the proto3 flavour leave a zero out.
            Ok(
                AttributeType::Float
                | AttributeType::Int
                | AttributeType::String
                | AttributeType::Floats
                | AttributeType::Ints
                | AttributeType::Strings,
            ) => Ok(()),
            Ok(AttributeType::Undefined) | Err(_) => {
                Err(self.unsupported(format!("attribute {name:?} of {op_type} with type number {}", attribute.r#type)))
            }
        }
    }

    fn tensor(&self, tensor: &TensorProto) -> Result<(), OnnxError> {
        let name = &tensor.name;
        if !tensor.external_data.is_empty() || tensor.data_location != 0 {
            return Err(self.unsupported(format!("external data for {name:?}")));
        }
        let Some(dtype) = tensor.dtype() else {
            return Err(self.unsupported(format!("data type {} for {name:?}", tensor.data_type)));
        };
        let Some(expected) = element_count(&tensor.dims) else {
            return Err(self.invalid(format!("tensor {name:?} has the shape {:?}", tensor.dims)));
        };
        let typed =
            tensor.float_data.len() + tensor.int32_data.len() + tensor.int64_data.len() + tensor.double_data.len();
        let found = if tensor.raw_data.is_empty() { typed } else { tensor.raw_data.len() / dtype.bytes() };
        if found == expected && tensor.raw_data.len().is_multiple_of(dtype.bytes()) {
            return Ok(());
        }
        Err(OnnxError::WrongLength { name: name.clone(), dims: tensor.dims.clone(), expected, found })
    }

    fn unsupported(&self, what: String) -> OnnxError {
        OnnxError::Unsupported { graph: self.graph.name.clone(), what }
    }

    fn invalid(&self, rule: String) -> OnnxError {
        OnnxError::Invalid { graph: self.graph.name.clone(), rule }
    }
}

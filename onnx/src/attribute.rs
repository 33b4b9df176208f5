use crate::proto::{AttributeProto, AttributeType, NodeProto, TensorProto};

/// Constructors of node attributes.
///
/// A namespace rather than a type, so that a built attribute is the protobuf message itself.
#[derive(Debug)]
pub enum Attribute {}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto { name: name.to_owned(), r#type: kind as i32, ..AttributeProto::default() }
}

impl Attribute {
    /// An integer, `axis` for example.
    pub fn int(name: &str, value: i64) -> AttributeProto {
        AttributeProto { i: Some(value), ..attribute(name, AttributeType::Int) }
    }

    /// A float, `epsilon` for example.
    pub fn float(name: &str, value: f32) -> AttributeProto {
        AttributeProto { f: Some(value), ..attribute(name, AttributeType::Float) }
    }

    /// A string, `approximate` for example.
    pub fn string(name: &str, value: &str) -> AttributeProto {
        AttributeProto { s: Some(value.as_bytes().to_vec()), ..attribute(name, AttributeType::String) }
    }

    /// A list of integers, `perm` for example.
    pub fn ints(name: &str, values: &[i64]) -> AttributeProto {
        AttributeProto { ints: values.to_vec(), ..attribute(name, AttributeType::Ints) }
    }

    /// A list of floats.
    pub fn floats(name: &str, values: &[f32]) -> AttributeProto {
        AttributeProto { floats: values.to_vec(), ..attribute(name, AttributeType::Floats) }
    }

    /// A tensor, `value` of a `Constant` for example.
    pub fn tensor(name: &str, value: TensorProto) -> AttributeProto {
        AttributeProto { t: Some(value), ..attribute(name, AttributeType::Tensor) }
    }
}

impl NodeProto {
    /// The attribute of this name.
    pub fn attribute_named(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute.iter().find(|attribute| attribute.name == name)
    }

    /// The integer attribute of this name, or the operator's default where it is not set.
    pub fn int_or(&self, name: &str, default: i64) -> i64 {
        self.attribute_named(name).map_or(default, |attribute| attribute.i.unwrap_or(0))
    }

    /// Whether this is the ONNX operator `op_type` (and not another domain's of the same name).
    pub fn is(&self, op_type: &str) -> bool {
        self.op_type == op_type && matches!(self.domain.as_str(), "" | "ai.onnx")
    }
}

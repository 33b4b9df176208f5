//! ONNX files: the protobuf types, a graph builder and a small reader.
//!
//! * [`proto`] holds the messages of the ONNX format that Sensorium uses, with the field numbers of the specification.
//! * [`GraphBuilder`] writes a graph: fresh short names, shared constants, one check at the end.
//! * [`external_files`] says which other files a model needs, of any model.
//! * [`Model`] is a model that passed the check; it loads, saves and gives typed access to nodes and initializers.
//!
//! What it is not: an ONNX implementation. There is no shape inference and no operator schema; the engine that runs a
//! graph knows those. Control flow, model-local functions, sparse and external tensors are refused by name, because a
//! reader that drops what it does not know would write back a different model.
//!
//! ```
//! use sensorium_onnx::{Attribute, DType, Dim, GraphBuilder, Model};
//!
//! let mut graph = GraphBuilder::new("classifier");
//! let x = graph.input("x", DType::F32, &[Dim::Symbol("batch"), Dim::Fixed(2)]);
//! let w = graph.initializer_f32("weight", &[2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
//! let logits = graph.node("MatMul", &[&x, &w], vec![]);
//! let y = graph.node("Softmax", &[&logits], vec![Attribute::int("axis", -1)]);
//! graph.output("y", &y, DType::F32, &[Dim::Symbol("batch"), Dim::Fixed(3)]);
//! let model = graph.finish(20)?;
//!
//! let again = Model::from_bytes(&model.to_bytes())?;
//! assert_eq!(again.initializer("weight").unwrap().f32s()?[5], 5.0);
//! # Ok::<(), sensorium_onnx::OnnxError>(())
//! ```

mod attribute;
mod builder;
mod check;
mod dtype;
mod error;
mod external;
mod model;
mod names;
pub mod proto;
mod tensor;

pub use attribute::Attribute;
pub use builder::{Dim, GraphBuilder};
pub use dtype::DType;
pub use error::OnnxError;
pub use external::external_files;
pub use model::Model;
pub use names::Names;
pub use proto::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};

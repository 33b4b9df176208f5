use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use prost::Message;

use crate::check::check;
use crate::proto::{GraphProto, ModelProto, TensorProto, ValueInfoProto};
use crate::{DType, OnnxError};

/// A model whose graph passed the check: unique names, topological order, no unknown values, tensors that fill their
/// shapes, and nothing that Sensorium does not read.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    proto: ModelProto,
    /// The same as in `proto`; kept apart so that reading it needs no `Option`.
    graph: GraphProto,
}

impl TryFrom<ModelProto> for Model {
    type Error = OnnxError;

    fn try_from(mut proto: ModelProto) -> Result<Self, OnnxError> {
        let graph = check(&mut proto)?;
        Ok(Self { proto, graph })
    }
}

impl Model {
    /// Reads and checks a model.
    /// # Errors
    /// `Decode` when the bytes are something else, `Unsupported` or `Invalid` when the graph is.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, OnnxError> {
        Self::try_from(ModelProto::decode(bytes)?)
    }

    /// Reads and checks a file.
    /// # Errors
    /// As [`Self::from_bytes`], and `Read`.
    pub fn load(path: &Path) -> Result<Self, OnnxError> {
        let bytes = std::fs::read(path).map_err(|source| OnnxError::Read { path: path.to_owned(), source })?;
        Self::from_bytes(&bytes)
    }

    /// The file's bytes. The same model gives the same bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.clone().into_proto().encode_to_vec()
    }

    /// Writes the file so that a reader sees the old one or the new one, whole: temporary file, fsync, rename.
    /// # Errors
    /// `Write`; the temporary file is removed and what was there before is untouched.
    pub fn save(&self, path: &Path) -> Result<(), OnnxError> {
        let bytes = self.to_bytes();
        write_atomically(path, &bytes).map_err(|source| OnnxError::Write { path: path.to_owned(), source })
    }

    /// The graph.
    pub fn graph(&self) -> &GraphProto {
        &self.graph
    }

    /// The constant tensor of this name.
    pub fn initializer(&self, name: &str) -> Option<&TensorProto> {
        self.graph.initializer.iter().find(|tensor| tensor.name == name)
    }

    /// What a caller must feed: the inputs that no initializer fills.
    pub fn inputs(&self) -> impl Iterator<Item = &ValueInfoProto> {
        self.graph.input.iter().filter(|input| self.initializer(&input.name).is_none())
    }

    /// What a caller can read.
    pub fn outputs(&self) -> &[ValueInfoProto] {
        &self.graph.output
    }

    /// Version of ONNX's own operator set that the graph is written against.
    pub fn opset(&self) -> i64 {
        let onnx = |domain: &str| matches!(domain, "" | "ai.onnx");
        self.proto.opset_import.iter().find(|opset| onnx(&opset.domain)).map_or(0, |opset| opset.version)
    }

    /// The protobuf message, to be changed and checked again with `Model::try_from`.
    pub fn into_proto(self) -> ModelProto {
        ModelProto { graph: Some(self.graph), ..self.proto }
    }

    /// The same model with these values as additional f32 outputs of unknown shape, in this order: how calibration looks
    /// inside a graph.
    /// # Errors
    /// `Invalid` when a value does not exist or is an output already.
    pub fn with_outputs(&self, values: &[&str]) -> Result<Self, OnnxError> {
        let mut model = self.clone();
        for value in values {
            let mut info = ValueInfoProto::tensor(value, DType::F32, &[]);
            // No shape at all, as opposed to the shape of a scalar: the engine infers it.
            if let Some(tensor) = info.r#type.as_mut().and_then(|kind| kind.tensor_type.as_mut()) {
                tensor.shape = None;
            }
            model.graph.output.push(info);
        }
        Self::try_from(model.into_proto())
    }
}

fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| std::io::Error::from(std::io::ErrorKind::InvalidInput))?;
    let temporary = folder.join(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, path))
        .and_then(|()| File::open(folder)?.sync_all());
    if written.is_err() {
        // The first error is the one to report; after a rename there is nothing left to remove.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

//! An inference response as REST sends it: JSON, and behind it the tensors that were asked for as bytes.

use bytes::Bytes;
use sensorium_proto::inference::{InferParameter, ModelInferResponse, infer_parameter::ParameterChoice};
use serde::Serialize;
use serde_json::{Value, json};

use super::tensor;

/// Which outputs a request wants as bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Unless it says otherwise for one.
    pub(super) all: bool,
    pub(super) outputs: Vec<(String, bool)>,
}

impl Wanted {
    fn binary(&self, output: &str) -> bool {
        self.outputs.iter().find(|(name, _)| name == output).map_or(self.all, |(_, wanted)| *wanted)
    }
}

/// A body: its JSON and the tensors behind it, which are not copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) json: Vec<u8>,
    pub(super) tensors: Vec<Bytes>,
}

/// Writes `response`, with the outputs of `wanted` as bytes.
///
/// # Errors
/// A message for the client, when an output has no form in JSON.
pub(super) fn write(response: ModelInferResponse, wanted: &Wanted) -> Result<Written, String> {
    let mut json = Vec::with_capacity(512);
    let mut tensors = Vec::new();
    json.push(b'{');
    if !response.id.is_empty() {
        field(&mut json, "id", &response.id);
    }
    field(&mut json, "model_name", &response.model_name);
    field(&mut json, "model_version", &response.model_version);
    if !response.parameters.is_empty() {
        field(&mut json, "parameters", &parameters(response.parameters));
    }
    json.extend_from_slice(b"\"outputs\":[");
    let mut raw = response.raw_output_contents.into_iter();
    for (index, output) in response.outputs.into_iter().enumerate() {
        json.extend_from_slice(if index > 0 { b",{" } else { b"{" });
        let name = output.name;
        field(&mut json, "name", &name);
        field(&mut json, "datatype", &output.datatype);
        field(&mut json, "shape", &output.shape);
        // The only parameters of an output are those of its place in shared memory. They stay here: the C++ client takes an output
        // with any for a binary one, and knows where it wanted this one.
        let shared = output.parameters.contains_key("shared_memory_region");
        // Each output has an entry; that of one in shared memory is empty.
        let elements = raw.next().unwrap_or_default();
        if !shared && wanted.binary(&name) {
            let size = elements.len();
            json.extend_from_slice(format!("\"parameters\":{{\"binary_data_size\":{size}}},").as_bytes());
            tensors.push(elements);
        } else if !shared {
            json.extend_from_slice(b"\"data\":");
            let written = tensor::dtype(&output.datatype).ok_or("its datatype is unknown");
            written
                .and_then(|dtype| tensor::write(&mut json, dtype, &elements))
                .map_err(|reason| format!("output {name:?} cannot be sent: {reason}"))?;
            json.push(b',');
        }
        close(&mut json);
    }
    json.extend_from_slice(b"]}");
    Ok(Written { json, tensors })
}

fn field(json: &mut Vec<u8>, key: &str, value: &impl Serialize) {
    // Keys are plain words.
    for part in ["\"", key, "\":"] {
        json.extend_from_slice(part.as_bytes());
    }
    // Into memory, so it cannot fail.
    let _ = serde_json::to_writer(&mut *json, value);
    json.push(b',');
}

/// Ends an object, whose last field left a comma behind.
fn close(json: &mut Vec<u8>) {
    if json.last() == Some(&b',') {
        json.pop();
    }
    json.push(b'}');
}

/// Parameters by name, as JSON.
pub(super) fn parameters(parameters: impl IntoIterator<Item = (String, InferParameter)>) -> Value {
    let value = |parameter: InferParameter| match parameter.parameter_choice {
        None => Value::Null,
        Some(ParameterChoice::BoolParam(value)) => value.into(),
        Some(ParameterChoice::Int64Param(value)) => value.into(),
        Some(ParameterChoice::Uint64Param(value)) => value.into(),
        Some(ParameterChoice::DoubleParam(value)) => json!(value),
        Some(ParameterChoice::StringParam(value)) => value.into(),
    };
    let mut sorted: Vec<_> = parameters.into_iter().map(|(name, parameter)| (name, value(parameter))).collect();
    sorted.sort_by(|(one, _), (other, _)| one.cmp(other));
    Value::Object(sorted.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use sensorium_proto::inference::model_infer_response::InferOutputTensor;

    use super::*;

    fn output(name: &str, datatype: &str) -> InferOutputTensor {
        InferOutputTensor { name: name.to_owned(), datatype: datatype.to_owned(), shape: vec![2], ..Default::default() }
    }

    fn response() -> ModelInferResponse {
        ModelInferResponse {
            model_name: "m\"".to_owned(),
            model_version: "1".to_owned(),
            id: "7".to_owned(),
            outputs: vec![output("a", "INT8"), output("h", "FP16"), output("b", "FP32")],
            raw_output_contents: vec![vec![1, 255].into(), vec![0; 4].into(), vec![0; 8].into()],
            ..Default::default()
        }
    }

    #[test]
    fn outputs_go_where_the_request_wants_them() {
        let wanted = Wanted { all: true, outputs: vec![("a".to_owned(), false)] };
        let written = write(response(), &wanted).unwrap();
        let json: Value = serde_json::from_slice(&written.json).unwrap();
        assert_eq!(
            json,
            json!({"id": "7", "model_name": "m\"", "model_version": "1", "outputs": [
                {"name": "a", "datatype": "INT8", "shape": [2], "data": [1, -1]},
                {"name": "h", "datatype": "FP16", "shape": [2], "parameters": {"binary_data_size": 4}},
                {"name": "b", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
            ]})
        );
        assert_eq!(written.tensors, [vec![0; 4], vec![0; 8]]);
    }

    #[test]
    fn an_output_without_a_form_in_json_is_named() {
        let error = write(response(), &Wanted::default()).unwrap_err();
        assert!(error.starts_with("output \"h\" cannot be sent: FP16"), "{error}");
    }

    #[test]
    fn an_output_in_shared_memory_has_neither_data_nor_parameters() {
        let mut response = response();
        response.outputs.truncate(2);
        response.raw_output_contents.truncate(2);
        response.raw_output_contents[0] = Bytes::new();
        let region = InferParameter { parameter_choice: Some(ParameterChoice::StringParam("r".to_owned())) };
        response.outputs[0].parameters.insert("shared_memory_region".to_owned(), region);
        let written = write(response, &Wanted { all: true, ..Wanted::default() }).unwrap();
        let json: Value = serde_json::from_slice(&written.json).unwrap();
        assert_eq!(json["outputs"][0], json!({"name": "a", "datatype": "INT8", "shape": [2]}));
        assert_eq!(json["outputs"][1]["parameters"], json!({"binary_data_size": 4}));
    }
}

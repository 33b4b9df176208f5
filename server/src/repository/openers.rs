//! Which engine opens a model's file.

use std::path::Path;

use sensorium_engine::{Declared, DeclaredTensor, ELSEWHERE, Opener};
use sensorium_proto::inference::{
    DataType, ModelConfig, ModelTensorReshape,
    model_config::SchedulingChoice,
    model_sequence_batching::{Control, State, control::Kind},
};

use super::{complete, folder};

/// What Triton serves and no program of this project does, and what to do instead: by backend, platform and file.
const NOWHERE: [(&str, &str, &str, &str); 2] = [
    (
        "tensorrt",
        "tensorrt_plan",
        "model.plan",
        "TensorRT engines are not served yet by this program; export the model as ONNX",
    ),
    ("python", "python", "model.py", "Triton's python backend is not here"),
];

/// The engines of this program.
#[derive(Clone, Debug)]
pub struct Openers(Vec<Opener>);

impl Default for Openers {
    /// onnxruntime alone.
    fn default() -> Self {
        Self::with(&[])
    }
}

impl Openers {
    /// onnxruntime and `more`.
    pub fn with(more: &[Opener]) -> Self {
        Self([&[Opener::ONNXRUNTIME], more].concat())
    }

    /// The engine that a configuration names, or that opens the file which is there.
    ///
    /// # Errors
    /// That there is none, as a sentence about the model; it names the program that has it, where one has.
    pub(super) fn find(&self, config: &ModelConfig, path: &Path) -> Result<Opener, String> {
        let is_asked = |backend: &str, platform: &str| {
            (config.backend.is_empty() || config.backend == backend)
                && (config.platform.is_empty() || config.platform == platform)
        };
        if !config.backend.is_empty() || !config.platform.is_empty() {
            if let Some(named) = self.0.iter().find(|opener| is_asked(opener.backend, opener.platform)) {
                return Ok(*named);
            }
            let asked = match (&*config.backend, &*config.platform) {
                (backend, "") => format!("backend {backend:?}"),
                ("", platform) => format!("platform {platform:?}"),
                (backend, platform) => format!("backend {backend:?} and platform {platform:?} at once"),
            };
            let known = self.0.iter().map(|opener| format!("{} (platform {})", opener.backend, opener.platform));
            let known = known.collect::<Vec<_>>().join(", ");
            if let Some(other) = ELSEWHERE.iter().find(|other| is_asked(other.backend, other.platform)) {
                return Err(format!(
                    "its configuration asks for {asked}, which {} has; run that instead, this program has {known}",
                    other.program
                ));
            }
            let advice = NOWHERE.iter().find(|(backend, platform, ..)| is_asked(backend, platform));
            let advice = advice.map_or(String::new(), |(.., advice)| format!("; {advice}"));
            return Err(format!("its configuration asks for {asked}; this server has {known}{advice}"));
        }
        let is_there = |file: &str| {
            path.join(file).exists()
                || !config.default_model_filename.is_empty() && suffix(&config.default_model_filename) == suffix(file)
        };
        if let Some(found) = self.0.iter().find(|opener| is_there(opener.file)) {
            return Ok(*found);
        }
        if let Some(other) = ELSEWHERE.iter().find(|other| is_there(other.file)) {
            return Err(format!(
                "its file is for backend {:?}, which {} has; run that instead of this program",
                other.backend, other.program
            ));
        }
        let files: Vec<_> = self.0.iter().map(|opener| opener.file).collect();
        Err(self.lacks(path, &files.join(" or ")))
    }

    /// That a version's folder lacks its file, and what it has instead.
    pub(super) fn lacks(&self, path: &Path, file: &str) -> String {
        const MOST: usize = 8; // enough to see what it is
        let lack = format!("{} has no {file}", path.display());
        if let Some(file) = self.model_file(path) {
            return format!("{lack}; it has {file}: rename it, or write default_model_filename: {file:?}");
        }
        let is_no_file = |name: &&String| self.0.iter().any(|opener| *name == opener.file);
        let found = folder::contents(path);
        if let Some(name) = found.iter().find(is_no_file) {
            return format!(
                "{lack} that is a file: what has that name is a folder, or a link that leads nowhere ({name})"
            );
        }
        if let Some((.., file, advice)) = NOWHERE.iter().find(|(.., file, _)| found.iter().any(|found| found == file)) {
            return format!("{lack}; it has {file}: {advice}");
        }
        match &found[..found.len().min(MOST)] {
            [] => format!("{lack}; it is empty"),
            some => format!("{lack}; it has {}", some.join(", ")),
        }
    }

    /// The first file of a folder that an engine of this program may open, by its name.
    pub(super) fn model_file(&self, folder: &Path) -> Option<String> {
        let is_one = |name: &String| {
            self.0.iter().any(|opener| suffix(opener.file) == suffix(name)) && folder.join(name).is_file()
        };
        folder::contents(folder).into_iter().find(is_one)
    }
}

fn suffix(file: &str) -> Option<&str> {
    file.rsplit_once('.').map(|(_, suffix)| suffix)
}

/// What a configuration says about the graph behind it, for files that leave it open. Pure.
pub(super) fn declared(config: &ModelConfig) -> Declared {
    let batches = config.max_batch_size > 0;
    let graph_shape = |dims: &[i64], reshape: Option<&ModelTensorReshape>| {
        let seen = reshape.map_or(dims, |reshape| &reshape.shape);
        shape(batches, seen, reshape.is_none())
    };
    let tensor = |name: &str, data_type: i32, shape| DeclaredTensor {
        name: name.to_owned(),
        dtype: DataType::try_from(data_type).ok().and_then(complete::dtype),
        shape,
    };
    let mut inputs: Vec<_> = config
        .input
        .iter()
        .map(|input| tensor(&input.name, input.data_type, graph_shape(&input.dims, input.reshape.as_ref())))
        .collect();
    let mut outputs: Vec<_> = config
        .output
        .iter()
        .map(|output| tensor(&output.name, output.data_type, graph_shape(&output.dims, output.reshape.as_ref())))
        .collect();
    if let Some(SchedulingChoice::SequenceBatching(sequence)) = &config.scheduling_choice {
        for input in &sequence.control_input {
            let data_type = input.control.first().map_or(DataType::TypeInvalid, control_type);
            inputs.push(tensor(&input.name, data_type.into(), shape(batches, &[1], false)));
        }
        for State { input_name, output_name, data_type, dims, .. } in &sequence.state {
            inputs.push(tensor(input_name, *data_type, shape(batches, dims, true)));
            // Clients may see it, too.
            if outputs.iter().all(|output| output.name != *output_name) {
                outputs.push(tensor(output_name, *data_type, shape(batches, dims, true)));
            }
        }
    }
    let parameters = config.parameters.iter();
    let parameters = parameters.map(|(name, value)| (name.clone(), value.string_value.trim().to_owned())).collect();
    let accelerators = config.optimization.as_ref().and_then(|own| own.execution_accelerators.as_ref());
    let gpu = accelerators.into_iter().flat_map(|accelerators| &accelerators.gpu_execution_accelerator);
    let cuda = gpu.filter(|accelerator| accelerator.name == "cuda").flat_map(|cuda| cuda.parameters.clone()).collect();
    Declared { inputs, outputs, parameters, cuda }
}

/// Sizes with the batch before them; `None` where there are none although some must be written.
fn shape(batches: bool, dims: &[i64], must_be_written: bool) -> Option<Vec<Option<u64>>> {
    let batch = std::iter::repeat_n(None, usize::from(batches));
    let sizes = dims.iter().map(|&size| u64::try_from(size).ok());
    (!dims.is_empty() || !must_be_written).then(|| batch.chain(sizes).collect())
}

fn control_type(control: &Control) -> DataType {
    if control.kind() == Kind::ControlSequenceCorrid {
        return control.data_type();
    }
    match (&*control.int32_false_true, &*control.fp32_false_true, &*control.bool_false_true) {
        ([_, ..], [], []) => DataType::TypeInt32,
        ([], [_, ..], []) => DataType::TypeFp32,
        ([], [], [_, ..]) => DataType::TypeBool,
        _ => DataType::TypeInvalid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(backend: &str, platform: &str, file: &str) -> ModelConfig {
        ModelConfig {
            backend: backend.to_owned(),
            platform: platform.to_owned(),
            default_model_filename: file.to_owned(),
            ..ModelConfig::default()
        }
    }

    #[test]
    fn an_engine_is_found_by_backend_platform_or_file() {
        let folder = tempfile::tempdir().unwrap();
        let find = |config| Openers::default().find(&config, folder.path()).map(|opener| opener.backend);
        assert_eq!(find(config("onnxruntime", "", "")), Ok("onnxruntime"));
        assert_eq!(find(config("", "onnxruntime_onnx", "")), Ok("onnxruntime"));
        assert_eq!(find(config("", "", "other.onnx")), Ok("onnxruntime"));
        assert!(find(config("", "", "")).unwrap_err().ends_with("has no model.onnx; it is empty"));
        std::fs::write(folder.path().join("model.onnx"), "").unwrap();
        assert_eq!(find(config("", "", "")), Ok("onnxruntime"));
    }

    #[test]
    fn an_engine_that_another_program_has_is_named_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let find = |config| Openers::default().find(&config, folder.path()).unwrap_err();
        for config in [config("pytorch", "", ""), config("", "pytorch_libtorch", ""), config("", "", "a.pt")] {
            let reason = find(config);
            assert!(reason.contains("which sensorium-server-torch has; run that instead"), "{reason}");
        }
        let known = "; this server has onnxruntime (platform onnxruntime_onnx)";
        for (config, words) in [
            (config("tensorflow", "", ""), "asks for backend \"tensorflow\""),
            (config("", "onnxruntime", ""), "asks for platform \"onnxruntime\""),
            (
                config("onnxruntime", "tensorrt_plan", ""),
                "asks for backend \"onnxruntime\" and platform \"tensorrt_plan\" at once",
            ),
        ] {
            let reason = find(config);
            assert!(reason.ends_with(&format!("{words}{known}")), "{reason}");
        }
        let reason = find(config("", "tensorrt_plan", ""));
        assert!(reason.ends_with("export the model as ONNX"), "{reason}");
    }

    #[test]
    fn a_folder_without_the_file_says_what_it_has_instead() {
        let folder = tempfile::tempdir().unwrap();
        let find = || Openers::default().find(&config("", "", ""), folder.path()).unwrap_err();
        for (file, words) in [
            ("weights.bin", "; it has weights.bin"),
            ("model.py", "; it has model.py: Triton's python backend is not here"),
            ("resnet.onnx", "; it has resnet.onnx: rename it, or write default_model_filename: \"resnet.onnx\""),
        ] {
            std::fs::write(folder.path().join(file), "").unwrap();
            let reason = find();
            assert!(reason.ends_with(&format!("has no model.onnx{words}")), "{reason}");
        }
    }

    #[test]
    fn what_a_configuration_declares_has_the_batch_the_controls_and_the_state() {
        let written = super::super::config::from_text(
            r#"
            max_batch_size: 4
            input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }
            input { name: "n" data_type: TYPE_INT64 dims: 1 reshape { shape: [ ] } }
            output { name: "y" dims: 2 }
            sequence_batching {
              control_input { name: "start" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
              control_input { name: "id" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
              state { input_name: "s" output_name: "t" data_type: TYPE_FP32 dims: 8 }
            }
            parameters { key: "reset_method" value { string_value: "reset" } }
            "#,
        );
        let declared = declared(&written.unwrap().config);
        let lines = |tensors: &[DeclaredTensor]| {
            let line = |tensor: &DeclaredTensor| format!("{} {:?} {:?}", tensor.name, tensor.dtype, tensor.shape);
            tensors.iter().map(line).collect::<Vec<_>>()
        };
        let inputs = [
            "x Some(Fp32) Some([None, None, Some(3)])",
            "n Some(Int64) Some([None])",
            "start Some(Int32) Some([None, Some(1)])",
            "id Some(Uint64) Some([None, Some(1)])",
            "s Some(Fp32) Some([None, Some(8)])",
        ];
        assert_eq!(lines(&declared.inputs), inputs);
        assert_eq!(lines(&declared.outputs), ["y None Some([None, Some(2)])", "t Some(Fp32) Some([None, Some(8)])"]);
        assert_eq!(declared.parameters["reset_method"], "reset");
    }
}

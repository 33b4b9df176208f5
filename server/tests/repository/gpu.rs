//! What is done for engines on a GPU, shown by one that only says that it is on one.

use std::{path::Path, sync::Mutex};

use sensorium_engine::{Declared, Device, Engine, EngineError, Opener, Options, RawTensor, Signature};
use sensorium_server::repository::Openers;

use crate::bench::{Bench, f32s, infer, request, scale};

/// Rows of all runs, in order.
static SEEN: Mutex<Vec<i64>> = Mutex::new(Vec::new());

/// Notes what it is given.
struct Noting(Box<dyn Engine>);

impl Engine for Noting {
    fn signature(&self) -> &Signature {
        self.0.signature()
    }

    fn run_raw(&mut self, inputs: &[RawTensor], outputs: &[usize]) -> Result<Vec<RawTensor>, EngineError> {
        SEEN.lock().unwrap().push(inputs[0].shape()[0]);
        self.0.run_raw(inputs, outputs)
    }
}

fn open(path: &Path, options: Options, declared: &Declared) -> Result<Box<dyn Engine>, EngineError> {
    let here = Options { device: Device::Cpu, ..options };
    Ok(Box::new(Noting((Opener::ONNXRUNTIME.open)(path, here, declared)?)))
}

const NOTING: Opener = Opener { backend: "noting", platform: "noting", file: "model.onnx", open };

fn seen() -> Vec<i64> {
    std::mem::take(&mut SEEN.lock().unwrap())
}

#[tokio::test]
async fn batches_on_a_gpu_have_few_sizes_all_of_which_ran_before_anybody_asked() {
    let bench = Bench::new();
    for (model, kind) in [("here", "KIND_CPU"), ("there", "KIND_GPU")] {
        bench.write(model, "1/model.onnx", scale(2.0, None));
        let config =
            format!("backend: \"noting\" max_batch_size: 6 dynamic_batching {{ }} instance_group {{ kind: {kind} }}");
        bench.write(model, "config.pbtxt", config);
    }
    let registry = bench.open_with(Openers::with(&[NOTING])).await;
    let before = seen();
    for rows in [1, 2, 4, 6] {
        assert!(before.iter().filter(|seen| **seen == rows).count() >= 2, "{rows} of {before:?}");
    }
    assert!(before.iter().all(|rows| [1, 2, 4, 6].contains(rows)), "{before:?}");
    for (model, ran) in [("here", 3), ("there", 4)] {
        let answer = infer(&registry, model, request(f32s(&[3, 1], &[1.0, 2.0, 3.0]))).await.unwrap();
        assert_eq!(answer.outputs[0].tensor.shape(), [3, 1]);
        assert_eq!(answer.outputs[0].tensor.numbers::<f32>().to_vec(), [2.0, 4.0, 6.0]);
        assert_eq!(seen(), [ran], "{model}");
    }
}

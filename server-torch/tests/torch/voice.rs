//! Whether somebody speaks: silero-vad as published, an ONNX model whose state travels with the requests, and a
//! TorchScript module that keeps it inside. Answers are held against those of the model run without a server.

use std::{path::PathBuf, process::Command};

use futures::future::join_all;
use sensorium_engine::{DType, Engine as _, OnnxRuntime, Options, RawTensor};
use sensorium_server::repository::Registry;
use tch::{CModule, IValue, Tensor};

use crate::bench::{Bench, answer, f32s, named, reason, step};

/// Samples of a second, of a chunk, and of the chunk before that the ONNX model wants again.
const RATE: i64 = 16_000;
const CHUNK: usize = 512;
const CONTEXT: usize = 64;

/// Python with the pinned packages: `SENSORIUM_TEST_PYTHON`, or what `scripts/test-env` prints.
pub(crate) fn python() -> String {
    if let Ok(python) = std::env::var("SENSORIUM_TEST_PYTHON") {
        return python;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/test-env");
    let output = Command::new(script).output().expect("scripts/test-env can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A file of the published package, one of those pinned.
fn published(file: &str) -> PathBuf {
    let lib = PathBuf::from(python()).parent().and_then(|bin| bin.parent()).unwrap().join("lib");
    lib.join("python3.11/site-packages/silero_vad/data").join(file)
}

/// A few syllables with pauses between them: harmonics of a voice that rises and falls, under formants, and hiss.
fn speech(seed: u16, seconds: usize) -> Vec<f32> {
    let mut noise = u32::from(seed) * 7919 + 1;
    let (mut phase, mut samples) = (0.0_f32, Vec::new());
    let pitch = 95.0 + f32::from(seed) * 30.0;
    for index in 0..seconds * RATE as usize {
        let time = index as f32 / RATE as f32;
        let syllable = (time * 3.1 + f32::from(seed)).sin().max(0.0);
        let is_talking = (time * 0.9 + f32::from(seed) * 0.7).sin() > -0.3;
        phase += pitch * (1.0 + 0.15 * (time * 2.3).sin()) / RATE as f32;
        let glottis: f32 = (1..30_u8)
            .map(|harmonic| {
                let frequency = f32::from(harmonic) * pitch;
                let formant = |center: f32, width: f32| (-((frequency - center) / width).powi(2)).exp();
                let first = 500.0 + 200.0 * (time * 5.0).sin();
                let weight = formant(first, 150.0) + 0.6 * formant(1500.0, 250.0) + 0.3 * formant(2500.0, 300.0);
                weight * (std::f32::consts::TAU * phase * f32::from(harmonic)).sin()
            })
            .sum();
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let hiss = (noise >> 8) as f32 / (1 << 24) as f32 - 0.5;
        samples.push(if is_talking { 0.25 * syllable * glottis } else { 0.0 } + 0.004 * hiss);
    }
    samples
}

/// Several voices at once, chunk by chunk: each waits for its answer before it goes on.
async fn stream(registry: &Registry, input: &str, voices: &[Vec<f32>], context: usize) -> Vec<Vec<f32>> {
    join_all(voices.iter().enumerate().map(|(voice, samples)| async move {
        let mut found = Vec::new();
        let mut window = vec![0.0; context];
        let count = samples.len() / CHUNK;
        for (index, chunk) in samples.chunks_exact(CHUNK).enumerate() {
            window.truncate(context);
            window.extend_from_slice(chunk);
            let rate = RawTensor::from_vec(DType::Int64, vec![1], vec![RATE]).unwrap();
            let inputs = vec![named(input, f32s(&[1, window.len() as i64], &window)), named("sr", rate)];
            let request = step(voice as u64 + 1, index == 0, index + 1 == count, inputs);
            found.push(answer(registry, "vad", request).await.unwrap()[0]);
            window.drain(..CHUNK);
        }
        found
    }))
    .await
}

fn compare(found: &[Vec<f32>], expected: &[Vec<f32>]) {
    for (voice, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len());
        for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() <= 1e-4, "chunk {index} of voice {voice}: {found}, not {expected}");
        }
        let highest = expected.iter().copied().fold(0.0, f32::max);
        let lowest = expected.iter().copied().fold(1.0, f32::min);
        assert!(highest > 0.5 && lowest < 0.1, "voice {voice} is heard, and its pauses: {lowest} to {highest}");
    }
}

fn voices() -> Vec<Vec<f32>> {
    (0..3).map(|seed| speech(seed, 4)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_onnx_model_hears_the_same_through_the_server_with_its_state_kept_there() {
    let file = published("silero_vad.onnx");
    let mut engine = OnnxRuntime::open(&file, Options::default()).unwrap();
    let mut alone = |samples: &Vec<f32>| -> Vec<f32> {
        let mut state = RawTensor::zeros(DType::Fp32, vec![2, 1, 128]).unwrap();
        let mut window = vec![0.0; CONTEXT];
        let mut hear = |chunk: &[f32]| {
            window.truncate(CONTEXT);
            window.extend_from_slice(chunk);
            let rate = RawTensor::from_vec(DType::Int64, vec![], vec![RATE]).unwrap();
            let inputs = [f32s(&[1, window.len() as i64], &window), state.clone(), rate];
            let mut found = engine.run_raw(&inputs, &[0, 1]).unwrap();
            state = found.remove(1);
            window.drain(..CHUNK);
            found[0].numbers::<f32>()[0]
        };
        samples.chunks_exact(CHUNK).map(&mut hear).collect()
    };
    let voices = voices();
    let expected: Vec<_> = voices.iter().map(&mut alone).collect();

    let bench = Bench::new();
    bench.write("vad", "1/model.onnx", std::fs::read(&file).unwrap()).write(
        "vad",
        "config.pbtxt",
        r#"
        max_batch_size: 0
        input { name: "input" data_type: TYPE_FP32 dims: [ 1, -1 ] }
        input { name: "sr" data_type: TYPE_INT64 dims: 1 reshape { shape: [ ] } }
        output { name: "output" data_type: TYPE_FP32 dims: [ -1, 1 ] }
        sequence_batching {
          max_sequence_idle_microseconds: 60000000
          oldest { max_candidate_sequences: 8 }
          state { input_name: "state" output_name: "stateN" data_type: TYPE_FP32 dims: [ 2, 1, 128 ] }
        }
        "#,
    );
    let registry = bench.open().await;
    assert!(registry.ready("vad", ""), "{}", reason(&registry));
    compare(&stream(&registry, "input", &voices, CONTEXT).await, &expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_torchscript_module_hears_the_same_through_the_server_with_an_instance_for_each_voice() {
    let file = published("silero_vad.jit");
    let module = CModule::load(&file).unwrap();
    let alone = |samples: &Vec<f32>| -> Vec<f32> {
        module.method_is::<IValue>("reset_states", &[]).unwrap();
        let hear = |chunk: &[f32]| {
            let chunk = Tensor::from_slice(chunk).unsqueeze(0);
            match tch::no_grad(|| module.forward_is(&[IValue::Tensor(chunk), IValue::Int(RATE)])) {
                Ok(IValue::Tensor(found)) => found.double_value(&[0, 0]) as f32,
                other => panic!("{other:?}"),
            }
        };
        samples.chunks_exact(CHUNK).map(hear).collect()
    };
    let voices = voices();
    let expected: Vec<_> = voices.iter().map(alone).collect();

    let bench = Bench::new();
    bench.write("vad", "1/model.pt", std::fs::read(&file).unwrap()).write(
        "vad",
        "config.pbtxt",
        r#"
        backend: "pytorch"
        max_batch_size: 0
        input { name: "x" data_type: TYPE_FP32 dims: [ 1, 512 ] }
        input { name: "sr" data_type: TYPE_INT64 dims: 1 }
        output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ 1, 1 ] }
        instance_group { count: 2 }
        sequence_batching { max_sequence_idle_microseconds: 60000000 direct { } }
        parameters { key: "reset_method" value { string_value: "reset_states" } }
        model_warmup {
          name: "silence"
          inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 1, 512 ] zero_data: true } }
          inputs { key: "sr" value { data_type: TYPE_INT64 dims: 1 input_data_file: "rate" } }
        }
        "#,
    );
    bench.write("vad", "warmup/rate", RATE.to_le_bytes());
    let registry = bench.open().await;
    assert!(registry.ready("vad", ""), "{}", reason(&registry));
    // Three voices and two instances: the third waits for an end.
    compare(&stream(&registry, "x", &voices, 0).await, &expected);
}

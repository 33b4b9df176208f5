//! TorchScript as Triton has it: names, configuration, batches, errors.

use futures::future::join_all;
use sensorium_server::repository::Openers;

use crate::bench::{Bench, answer, f32s, infer, named, reason, request, said};

const SCALE: &str = "def forward(self, x):\n    return x * 2, x + 1\n";

const CONFIG: &str = r#"
platform: "pytorch_libtorch"
max_batch_size: 8
dynamic_batching { max_queue_delay_microseconds: 1000000 }
input { name: "INPUT__0" data_type: TYPE_FP32 dims: [ -1 ] }
output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ -1 ] }
output { name: "OUTPUT__1" data_type: TYPE_FP32 dims: [ -1 ] }
model_warmup { name: "ones" batch_size: 4 inputs { key: "INPUT__0" value { data_type: TYPE_FP32 dims: 3 random_data: true } } }
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_with_tritons_configuration_is_served_as_it_is_and_in_batches() {
    let bench = Bench::new();
    bench.compile("m", SCALE, &[]).write("m", "config.pbtxt", CONFIG);
    let registry = bench.open().await;
    let model = registry.model("m", "").unwrap_or_else(|error| panic!("{error}: {}", reason(&registry)));
    let config = model.config();
    assert_eq!((config.platform.as_str(), config.backend.as_str()), ("pytorch_libtorch", "pytorch"));
    let asked = (0..64_u8).map(|index| {
        let request = request(vec![named("INPUT__0", f32s(&[1, 2], &[f32::from(index), 1.0]))]);
        infer(&registry, "m", request)
    });
    for (index, response) in (0..64_u8).zip(join_all(asked).await) {
        let outputs = response.unwrap().outputs;
        let x = f32::from(index);
        assert_eq!(outputs[0].tensor.numbers::<f32>().as_ref(), [2.0 * x, 2.0]);
        assert_eq!(outputs[1].tensor.numbers::<f32>().as_ref(), [x + 1.0, 2.0]);
    }
    let statistics = registry.statistics("m", "").unwrap().remove(0);
    assert_eq!(statistics.execution_count, 8, "a full batch leaves at once, and none leaves before");
    registry.graphs()[0].probe(std::time::Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn what_the_file_does_not_say_is_asked_for() {
    let bench = Bench::new();
    bench.compile("m", SCALE, &[]);
    let error = reason(&bench.open().await);
    assert!(error.contains("does not say of which type and shape input `x` is; write it in config.pbtxt"), "{error}");
}

#[tokio::test]
async fn a_program_without_libtorch_names_the_one_that_has_it() {
    let bench = Bench::new();
    bench.compile("m", SCALE, &[]).write("m", "config.pbtxt", CONFIG);
    let error = reason(&bench.open_with(Openers::default()).await);
    assert!(error.contains("which sensorium-server-torch has; run that instead"), "{error}");
    bench.write("m", "config.pbtxt", "");
    let error = reason(&bench.open_with(Openers::default()).await);
    assert!(error.contains("which sensorium-server-torch has; run that instead"), "{error}");
}

#[tokio::test]
async fn a_request_that_the_model_fails_at_fails_alone() {
    let source = "def forward(self, x):\n    assert not bool((x < 0).any()), 'below zero'\n    return x.sqrt()\n";
    let config = "max_batch_size: 8 \
        input { name: \"x\" data_type: TYPE_FP32 dims: 1 } output { name: \"OUTPUT__0\" data_type: TYPE_FP32 dims: 1 } \
        dynamic_batching { max_queue_delay_microseconds: 20000 }";
    let bench = Bench::new();
    bench.compile("m", source, &[]).write("m", "config.pbtxt", config);
    let registry = bench.open().await;
    let asked = (0..8_u8).map(|index| {
        let value = if index == 3 { -1.0 } else { f32::from(index * index) };
        answer(&registry, "m", request(vec![named("x", f32s(&[1, 1], &[value]))]))
    });
    for (index, found) in (0..8_u8).zip(join_all(asked).await) {
        match found {
            Ok(found) => assert_eq!(found, [f32::from(index)]),
            Err(error) => assert!(index == 3 && said(&error).contains("below zero"), "{index}: {}", said(&error)),
        }
    }
}

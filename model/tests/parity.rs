//! Holds the exported graphs to libtorch: the same numbers within 1e-4, for random networks, inputs and shapes.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which clippy does not count as tests")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use sensorium_engine::Engine;
use sensorium_engine::{OnnxRuntime, Options};
use sensorium_model::{
    Acts, Eager, Exported, FusionConfig, ImageConfig, Network, NetworkConfig, ParamView, Section, Slot, StemLayer,
    TextConfig, Weights, export, import, initialise,
};
use tch::Tensor;

const TOLERANCE: f32 = 1e-4;

/// Networks of all kinds that are small enough to run dozens of.
fn any_network() -> impl Strategy<Value = NetworkConfig> {
    let tower = || (1usize..3, 1i64..4, 1i64..3);
    let stem = prop_oneof![
        Just(vec![(4, 4, 0)]),
        Just(vec![(5, 2, 2), (3, 2, 1)]),
        Just(vec![(3, 2, 1), (3, 1, 1), (5, 4, 1)]),
    ];
    (tower(), tower(), tower(), stem, 16i64..24, 1i64..9, prop::option::of(2i64..6), prop::option::of(2i64..9))
        .prop_map(|(text, image, fusion, stem, size, max_length, answers, embedding)| {
            let width = |(_, heads, _): (usize, i64, i64)| heads * 4;
            let last = stem.len() - 1;
            let channels = |at: usize| if at == last { width(image) } else { 5 + at as i64 };
            NetworkConfig {
                width: width(fusion),
                text: TextConfig {
                    vocabulary: 13,
                    max_length: max_length + 2,
                    width: width(text),
                    layers: text.0,
                    heads: text.1,
                    mlp_ratio: text.2,
                },
                image: ImageConfig {
                    size,
                    stem: stem
                        .iter()
                        .enumerate()
                        .map(|(at, &(kernel, stride, padding))| StemLayer {
                            channels: channels(at),
                            kernel,
                            stride,
                            padding,
                        })
                        .collect(),
                    width: width(image),
                    layers: image.0,
                    heads: image.1,
                    mlp_ratio: image.2,
                },
                fusion: FusionConfig { layers: fusion.0, heads: fusion.1, mlp_ratio: fusion.2 },
                answers,
                embedding_dim: embedding,
            }
        })
}

/// All blocks of `section` in libtorch.
fn run_eager(network: &Network, weights: &Weights, section: Section, mut acts: Acts<Tensor>) -> Acts<Tensor> {
    for block in network.blocks().iter().filter(|block| block.section() == section) {
        let values: Vec<Tensor> = block
            .params()
            .iter()
            .map(|spec| Tensor::from_slice(&weights[&block.full_name(spec)].data).view(spec.shape.as_slice()))
            .collect();
        let written = block.forward(&mut Eager, ParamView::new(block.params(), &values), &acts).unwrap();
        acts.extend(written);
    }
    acts
}

fn host_f32(tensor: &Tensor) -> sensorium_modality::Tensor {
    let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
    sensorium_modality::Tensor::from_vec(shape, Vec::<f32>::try_from(tensor.contiguous().flatten(0, -1)).unwrap())
        .unwrap()
}

fn host_i64(tensor: &Tensor) -> sensorium_modality::Tensor {
    let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
    sensorium_modality::Tensor::from_vec(shape, Vec::<i64>::try_from(tensor.flatten(0, -1)).unwrap()).unwrap()
}

type Named = Vec<(String, sensorium_modality::Tensor)>;

fn run_onnx(exported: &Exported, graph: &str, inputs: Named) -> BTreeMap<String, sensorium_modality::Tensor> {
    let (_, model) = exported.graphs.iter().find(|(name, _)| *name == graph).unwrap();
    let mut engine = OnnxRuntime::open_bytes(graph, &model.to_bytes(), Options::default()).unwrap();
    let outputs: Vec<String> = engine.signature().outputs().iter().map(|output| output.name.clone()).collect();
    engine.run(inputs, &outputs).unwrap().into_iter().collect()
}

fn assert_close(what: &str, expected: &Tensor, found: &sensorium_modality::Tensor) {
    let expected = host_f32(expected);
    assert_eq!(expected.shape(), found.shape(), "{what}");
    let (a, b) = (expected.as_slice::<f32>().unwrap(), found.as_slice::<f32>().unwrap());
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs() / a.abs().max(1.0)).fold(0.0, f32::max);
    assert!(worst <= TOLERANCE, "{what} differs by {worst}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_exported_graph_agrees_with_libtorch(
        config in any_network(),
        seed in 0u64..1000,
        batch in 1i64..4,
        shorter in 0i64..3,
    ) {
        tch::manual_seed(seed as i64);
        let network = Network::new(config.clone()).unwrap();
        let weights = initialise(&network, seed);
        let exported = export(&network, &weights).unwrap();

        let length = (config.text.max_length - shorter).max(1);
        let ids = Tensor::randint_low(1, config.text.vocabulary, [batch, length], (tch::Kind::Int64, tch::Device::Cpu));
        // Padding at the end of the first row, as far as there is room for it.
        if length > 1 {
            let _ = ids.get(0).narrow(0, length - 1, 1).fill_(0);
        }
        let pixels = Tensor::randn([batch, 3, config.image.size, config.image.size], (tch::Kind::Float, tch::Device::Cpu));

        let text = run_eager(&network, &weights, Section::TextEncoder, Acts::from([(Slot::TextIds, ids.shallow_clone())]));
        let found = run_onnx(&exported, "text_encoder", vec![("input_ids".to_owned(), host_i64(&ids))]);
        assert_close("text_features", &text[&Slot::Text], &found["text_features"]);
        assert_close("text_mask", &text[&Slot::TextMask], &found["text_mask"]);
        if config.embedding_dim.is_some() {
            assert_close("text_embedding", &text[&Slot::TextEmbedding], &found["text_embedding"]);
        }

        let image = run_eager(&network, &weights, Section::ImageEncoder, Acts::from([(Slot::Pixels, pixels.shallow_clone())]));
        let found = run_onnx(&exported, "image_encoder", vec![("pixel_values".to_owned(), host_f32(&pixels))]);
        assert_close("image_features", &image[&Slot::Image], &found["image_features"]);
        if config.embedding_dim.is_some() {
            assert_close("image_embedding", &image[&Slot::ImageEmbedding], &found["image_embedding"]);
        }

        if config.answers.is_some() {
            let inputs = vec![
                ("text_features".to_owned(), host_f32(&text[&Slot::Text])),
                ("text_mask".to_owned(), host_f32(&text[&Slot::TextMask])),
                ("image_features".to_owned(), host_f32(&image[&Slot::Image])),
            ];
            let found = run_onnx(&exported, "fusion", inputs);
            let mut acts = text;
            acts.extend(image);
            let fused = run_eager(&network, &weights, Section::Fusion, acts);
            assert_close("logits", &fused[&Slot::Logits], &found["logits"]);
        }
    }

    #[test]
    fn weights_come_back_from_the_graphs_to_the_bit(config in any_network(), seed in 0u64..1000) {
        let network = Network::new(config).unwrap();
        let weights = initialise(&network, seed);
        let graphs: Vec<_> = export(&network, &weights).unwrap().graphs.into_iter().map(|(_, model)| model).collect();
        prop_assert_eq!(import(&network, &graphs, &weights).unwrap(), weights);
    }
}

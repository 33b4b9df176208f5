//! Whole jobs on a tiny artifact with known answers.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a test fails by panicking, and equal means equal")]

use std::cell::RefCell;
use std::path::Path;

use sensorium_api::run::{JobKey, JobKind, Progress, RunConfig, RunResult, RunState};
use sensorium_api::workload::{FailurePolicy, PodSettings, Resources, Scheduling};
use sensorium_api::{
    Acceptance, ArtifactSource, Calibration, CalibrationMethod, CompressionJobSpec, CompressionStep, Metric,
    OutputSpec, QuantizationScheme, QuantizeStep,
};
use sensorium_artifact::{Artifact, Store, Volumes};
use sensorium_compress::{CompressError, Control, run};
use sensorium_data::{QuestionAnswer, Sample, ShardWriter, WriterOptions};
use sensorium_engine::fixture;

/// Bright, so that a model calibrated on black clips every channel.
const COLORS: [(&str, [u8; 3]); 3] = [("red", [250, 150, 140]), ("green", [140, 240, 150]), ("blue", [150, 140, 250])];

struct Bench {
    _folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    volumes: Volumes,
    parent: Artifact,
}

impl Bench {
    /// A store with the fixture as `tiny`, and the data sets `colors`, `black` and `foreign`.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut volumes = Volumes::default();
        for claim in ["artifacts", "datasets"] {
            std::fs::create_dir(folder.path().join(claim)).unwrap();
            volumes.insert(format!("{claim}={}", folder.path().join(claim).display()).parse().unwrap());
        }
        let store = Store::open("pvc://artifacts", &volumes).unwrap();
        let parent = runtime.block_on(fixture::commit(&store, "tiny")).unwrap();
        let data = folder.path().join("datasets");
        let colors: Vec<_> = (0..40).map(|i| COLORS[i % 3]).collect();
        write(&data.join("colors"), &colors);
        write(&data.join("black"), &[("red", [0; 3]); 4]);
        write(&data.join("foreign"), &[("a boat", [9; 3]); 4]);
        Self { _folder: folder, runtime, volumes, parent }
    }

    fn job() -> RunConfig<CompressionJobSpec> {
        let calibration =
            Calibration { data: "pvc://datasets/colors".to_owned(), samples: 32, method: CalibrationMethod::Minmax };
        let quantize = QuantizeStep { scheme: QuantizationScheme::StaticInt8, calibration, exclude: vec![] };
        RunConfig {
            job: JobKey {
                kind: JobKind::CompressionJob,
                namespace: "default".to_owned(),
                name: "tiny-int8".to_owned(),
            },
            spec_hash: "sha256:0".to_owned(),
            spec: CompressionJobSpec {
                source: ArtifactSource { artifact: "tiny".to_owned(), store: "pvc://artifacts".to_owned() },
                steps: vec![CompressionStep::Quantize(quantize)],
                acceptance: Acceptance {
                    data: "pvc://datasets/colors".to_owned(),
                    metric: Metric::VqaAccuracy,
                    max_drop: 0.01,
                    min_speedup: None,
                    samples: None,
                },
                failure_policy: FailurePolicy::default(),
                suspend: false,
                active_deadline_seconds: None,
                pre_running_deadline_seconds: 600,
                ttl_seconds_after_finished: None,
                scheduling: Scheduling::default(),
                pods: PodSettings::default(),
                resources: Resources::default(),
                output: OutputSpec {
                    artifact: "tiny-int8".to_owned(),
                    store: "pvc://artifacts".to_owned(),
                    retention: None,
                },
            },
        }
    }

    fn run(&self, config: &RunConfig<CompressionJobSpec>) -> Result<RunResult, CompressError> {
        run(config, &self.volumes, &Control { progress: &|_| (), cancelled: &|| false })
    }

    fn resolve(&self, reference: &str) -> Option<Artifact> {
        let store = Store::open("pvc://artifacts", &self.volumes).unwrap();
        self.runtime.block_on(store.resolve(reference)).ok()
    }

    fn artifacts(&self) -> usize {
        let store = Store::open("pvc://artifacts", &self.volumes).unwrap();
        self.runtime.block_on(store.list()).unwrap().len()
    }
}

fn write(folder: &Path, samples: &[(&str, [u8; 3])]) {
    let mut writer = ShardWriter::create(folder, WriterOptions::default()).unwrap();
    for (number, (answer, color)) in samples.iter().enumerate() {
        let questions = vec![QuestionAnswer { question: fixture::QUESTION.to_owned(), answer: (*answer).to_owned() }];
        let sample = Sample { key: format!("{number}"), image: fixture::png(*color), questions, caption: None };
        writer.append(&sample).unwrap();
    }
    writer.finish().unwrap();
}

fn quantize(config: &mut RunConfig<CompressionJobSpec>) -> &mut QuantizeStep {
    let CompressionStep::Quantize(step) = &mut config.spec.steps[0];
    step
}

#[test]
fn a_candidate_that_is_as_good_is_promoted_with_its_lineage() {
    let bench = Bench::new();
    let result = bench.run(&Bench::job()).unwrap();
    assert_eq!(result.state, RunState::Succeeded, "{}", result.message);
    let gate = result.gate.unwrap();
    assert!(gate.promoted);
    assert_eq!((gate.parent, gate.candidate, gate.drop), (1.0, 1.0, 0.0));
    let found = bench.resolve("tiny-int8").unwrap();
    assert_eq!(result.artifact.unwrap().digest, found.digest.to_string());
    let lineage = &found.manifest.lineage;
    assert_eq!(lineage.parents, [bench.parent.digest]);
    assert_eq!(lineage.data, ["pvc://datasets/colors"]);
    assert!(lineage.steps[0].starts_with("quantize static-int8, minmax over 32 questions of sha256:"), "{lineage:?}");
    assert_eq!(lineage.job.as_ref().unwrap().name, "tiny-int8");
    assert_eq!(found.manifest.metrics["vqa_accuracy"], 1.0);
    assert_eq!(found.manifest.pipeline, bench.parent.manifest.pipeline);
}

#[test]
fn the_same_job_gives_the_same_artifact() {
    let bench = Bench::new();
    for method in [CalibrationMethod::Minmax, CalibrationMethod::Entropy] {
        let mut job = Bench::job();
        quantize(&mut job).calibration.method = method;
        let digests = [0, 1].map(|_| bench.run(&job).unwrap().artifact.unwrap().digest);
        assert_eq!(digests[0], digests[1]);
    }
}

#[test]
fn a_candidate_that_lost_accuracy_is_kept_and_not_promoted() {
    let bench = Bench::new();
    let mut job = Bench::job();
    // Calibrated on black images alone, every colour is clipped to black.
    quantize(&mut job).calibration.data = "pvc://datasets/black".to_owned();
    let result = bench.run(&job).unwrap();
    assert_eq!(result.state, RunState::Failed);
    let gate = result.gate.unwrap();
    assert!(!gate.promoted && gate.drop > 0.5, "{gate:?}");
    assert!(gate.message.contains("points are lost, 1.000 are allowed"), "{}", gate.message);
    assert!(bench.resolve("tiny-int8").is_none());
    assert!(bench.resolve(&result.artifact.unwrap().digest).is_some(), "kept for inspection");
}

#[test]
fn a_candidate_that_is_too_slow_leaves_the_name_where_it_was() {
    let bench = Bench::new();
    let promoted = bench.run(&Bench::job()).unwrap().artifact.unwrap();
    let mut job = Bench::job();
    job.spec.acceptance.min_speedup = Some(1e6);
    quantize(&mut job).exclude = vec!["image_encoder".to_owned()];
    let result = bench.run(&job).unwrap();
    assert!(!result.gate.unwrap().promoted);
    assert_ne!(result.artifact.unwrap().digest, promoted.digest);
    assert_eq!(bench.resolve("tiny-int8").unwrap().digest.to_string(), promoted.digest);
}

#[test]
fn fewer_questions_than_there_are_can_be_asked() {
    let bench = Bench::new();
    let mut job = Bench::job();
    job.spec.acceptance.samples = Some(7);
    let message = bench.run(&job).unwrap().message;
    assert!(message.contains("on 7 questions"), "{message}");
}

#[test]
fn progress_names_every_stage_in_order() {
    let bench = Bench::new();
    let states = RefCell::new(Vec::<String>::new());
    let progress = |progress: Progress| {
        let mut states = states.borrow_mut();
        if states.last() != Some(&progress.state) {
            states.push(progress.state);
        }
    };
    run(&Bench::job(), &bench.volumes, &Control { progress: &progress, cancelled: &|| false }).unwrap();
    assert_eq!(*states.borrow(), ["starting", "calibrating", "quantizing", "gating", "exporting", "done"]);
}

#[test]
fn a_cancelled_job_leaves_the_store_as_it_was() {
    let bench = Bench::new();
    for stage in ["calibrating", "gating", "exporting"] {
        let reached = RefCell::new(false);
        let progress = |progress: Progress| *reached.borrow_mut() |= progress.state == stage;
        let control = Control { progress: &progress, cancelled: &|| *reached.borrow() };
        let result = run(&Bench::job(), &bench.volumes, &control);
        // The last stage can't be left any more once it has begun.
        if stage == "exporting" {
            assert!(result.is_ok());
        } else {
            assert!(matches!(result, Err(CompressError::Cancelled)), "{stage}: {result:?}");
            assert_eq!(bench.artifacts(), 1);
        }
    }
}

#[test]
fn mistakes_in_a_job_are_named() {
    let bench = Bench::new();
    let failed = |change: &dyn Fn(&mut RunConfig<CompressionJobSpec>)| {
        let mut job = Bench::job();
        change(&mut job);
        let error = bench.run(&job).unwrap_err();
        assert_eq!(bench.artifacts(), 1, "{error}");
        error
    };
    match failed(&|job| quantize(job).exclude = vec!["fusoin".to_owned()]) {
        CompressError::UnknownExclude { entry, known } => {
            assert_eq!(entry, "fusoin");
            assert!(known.contains(&"fusion/classifier.weight".to_owned()), "{known:?}");
        }
        other => panic!("{other}"),
    }
    let all = ["text_encoder", "image_encoder", "fusion"].map(str::to_owned);
    let nothing = failed(&|job| quantize(job).exclude = all.to_vec());
    assert!(matches!(nothing, CompressError::NothingToQuantize { .. }), "{nothing}");
    let foreign = failed(&|job| job.spec.acceptance.data = "pvc://datasets/foreign".to_owned());
    assert!(matches!(foreign, CompressError::ForeignData { .. }), "{foreign}");
    let missing = failed(&|job| job.spec.acceptance.data = "pvc://datasets/nowhere".to_owned());
    assert!(matches!(missing, CompressError::Data { .. }), "{missing}");
    let source = failed(&|job| job.spec.source.artifact = "nothing".to_owned());
    assert!(matches!(source, CompressError::Artifact(_)), "{source}");
}

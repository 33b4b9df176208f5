//! A compression job from its source in the store to its result in the store.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use sensorium_api::run::{ArtifactResult, GateResult, Progress, RunConfig, RunResult, RunState};
use sensorium_api::{CalibrationMethod, CompressionJobSpec, CompressionStep, QuantizeStep};
use sensorium_artifact::{Artifact, Draft, Lineage, LineageJob, ManifestParts, Store, Volumes};
use sensorium_engine::{LocalPipeline, Options, Pipeline};
use sensorium_modality::Limits;
use sensorium_onnx::Model;
use tokio::runtime::Runtime;

use crate::affine::{ActivationType, WeightRange};
use crate::calibrate::Calibrator;
use crate::error::CompressError;
use crate::gate::{Measured, decide};
use crate::measure::measure;
use crate::plan::{GraphPlan, plan_graph};
use crate::questions::{Asked, Questions};
use crate::result::artifact_result;
use crate::rewrite::{Representation, rewrite};

/// How `static-int8` represents numbers: what is accurate and fused on every x86 CPU.
///
/// ONNX Runtime multiplies u8 activations with i8 weights there. Without VNNI instructions it adds pairs of products in 16
/// bits, which saturates with full-range weights. Measured on such a CPU with `examples/int8.rs` (4 layers, width 64):
/// relative RMS error 0.025 with seven-bit weights, 0.082 with eight. Signed activations are no way out: they become
/// unsigned before they are multiplied (0.028 and 0.065), and a value with several readers, such as the LayerNorm before
/// query, key and value, then misses the fusion, which made the graph slower than f32.
const STATIC_INT8: Representation =
    Representation { activations: ActivationType::AsymmetricU8, weights: WeightRange::SevenBit };

/// Questions per calibration batch.
const CALIBRATION_BATCH: usize = 16;

/// How a job tells where it is, and how it is told to stop.
pub struct Control<'a> {
    /// Called with every step of progress.
    pub progress: &'a dyn Fn(Progress),
    /// Asked between batches; `true` ends the job with [`CompressError::Cancelled`] before anything is committed.
    pub cancelled: &'a dyn Fn() -> bool,
}

impl Control<'_> {
    pub(crate) fn step(&self, state: &str, step: u64, steps: u64) -> Result<(), CompressError> {
        if (self.cancelled)() {
            return Err(CompressError::Cancelled);
        }
        (self.progress)(Progress { state: state.to_owned(), step, steps, ..Progress::default() });
        Ok(())
    }
}

/// Compresses the source artifact step by step, lets the gate compare the result with it, and commits it. The result is
/// promoted under `output.artifact` if the gate agrees; a refused one stays in the store under its digest, the run's state
/// is `Failed`, and its message has the numbers.
///
/// What is committed depends on the spec, the source and the data only: speed, which differs from run to run, is in the
/// returned result and not in the artifact. Blocks the calling thread, which must not be one that drives async tasks.
/// # Errors
/// Anything that kept the candidate from being made or measured; nothing was committed then.
pub fn run(
    config: &RunConfig<CompressionJobSpec>,
    volumes: &Volumes,
    control: &Control<'_>,
) -> Result<RunResult, CompressError> {
    let started = Instant::now();
    control.step("starting", 0, 0)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CompressError::Setup)?;
    let source = Source::fetch(&config.spec, volumes, &runtime)?;
    let store = Store::open(&config.spec.output.store, volumes)?;
    let held_out = open(&config.spec.acceptance.data, config.spec.acceptance.samples, volumes)?;

    let mut candidate = Candidate { models: source.models()?, lineage: source.lineage(config) };
    for step in &config.spec.steps {
        match step {
            CompressionStep::Quantize(step) => candidate.quantize(step, &source, volumes, &runtime, control)?,
        }
    }
    let draft = candidate.write(&source, &store)?;
    let measured = compare(&source, draft.folder(), &held_out, &runtime, control)?;
    let gate = decide(&measured, &config.spec.acceptance);
    control.step("exporting", 0, 0)?;
    let artifact = commit(&config.spec, &store, draft, &source, candidate.lineage, &measured, &gate, &runtime)?;
    (control.progress)(Progress {
        state: "done".to_owned(),
        accuracy: Some(gate.candidate),
        message: Some(gate.message.clone()),
        ..Progress::default()
    });
    let metrics = [
        (gate.metric.clone(), gate.candidate),
        (format!("parent_{}", gate.metric), gate.parent),
        ("speedup".to_owned(), measured.speedup()),
        ("speedup_single".to_owned(), measured.speedup_single()),
        ("size_ratio".to_owned(), gate.size_ratio),
    ];
    Ok(RunResult {
        state: if gate.promoted { RunState::Succeeded } else { RunState::Failed },
        message: gate.message.clone(),
        artifact: Some(artifact),
        metrics: metrics.into(),
        gate: Some(gate),
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn open(uri: &str, wanted: Option<u32>, volumes: &Volumes) -> Result<Questions, CompressError> {
    Questions::open(uri, &volumes.local_path(uri)?, wanted)
}

/// The artifact to compress, on this machine.
struct Source {
    artifact: Artifact,
    folder: PathBuf,
    /// Holds the files when they came from afar.
    _cache: tempfile::TempDir,
}

impl Source {
    fn fetch(spec: &CompressionJobSpec, volumes: &Volumes, runtime: &Runtime) -> Result<Self, CompressError> {
        let cache = tempfile::tempdir().map_err(CompressError::Setup)?;
        let store = Store::open(&spec.source.store, volumes)?;
        let artifact = runtime.block_on(store.resolve(&spec.source.artifact))?;
        let folder = runtime.block_on(store.fetch(&artifact, cache.path()))?;
        Ok(Self { artifact, folder, _cache: cache })
    }

    fn models(&self) -> Result<BTreeMap<String, Model>, CompressError> {
        let graphs = self.artifact.manifest.graphs.iter();
        graphs.map(|graph| Ok((graph.name.clone(), Model::load(&self.folder.join(&graph.file))?))).collect()
    }

    /// Where the candidate comes from, before its own steps.
    fn lineage(&self, config: &RunConfig<CompressionJobSpec>) -> Lineage {
        let parent = &self.artifact.manifest.lineage;
        Lineage {
            job: Some(LineageJob {
                kind: config.job.kind.to_string(),
                namespace: config.job.namespace.clone(),
                name: config.job.name.clone(),
                spec_hash: config.spec_hash.clone(),
            }),
            parents: vec![self.artifact.digest],
            data: parent.data.clone(),
            steps: parent.steps.clone(),
        }
    }
}

/// The graphs as they are after the steps so far.
struct Candidate {
    models: BTreeMap<String, Model>,
    lineage: Lineage,
}

impl Candidate {
    fn quantize(
        &mut self,
        step: &QuantizeStep,
        source: &Source,
        volumes: &Volumes,
        runtime: &Runtime,
        control: &Control<'_>,
    ) -> Result<(), CompressError> {
        let plans = self.plan(&step.exclude)?;
        if plans.values().all(|plan| plan.targets.is_empty()) {
            return Err(CompressError::NothingToQuantize { artifact: source.artifact.manifest.name.clone() });
        }
        let calibration = &step.calibration;
        let questions = open(&calibration.data, Some(calibration.samples), volumes)?;
        let graphs = self.models.iter().map(|(name, model)| (name.as_str(), model, &plans[name]));
        let calibrator = Calibrator::open(graphs, calibration.method)?;
        let seen = calibrate(&calibrator, source, &questions, runtime, control)?;

        control.step("quantizing", 0, self.models.len() as u64)?;
        let ranges = calibrator.ranges(STATIC_INT8.activations);
        for (position, (name, model)) in self.models.iter_mut().enumerate() {
            let plan = &plans[name];
            *model = rewrite(model, plan, &ranges[name], STATIC_INT8)?;
            tracing::info!(graph = name.as_str(), weights = plan.weights().len(), "quantized");
            control.step("quantizing", position as u64 + 1, plans.len() as u64)?;
        }
        let method = match calibration.method {
            CalibrationMethod::Minmax => "minmax",
            CalibrationMethod::Entropy => "entropy",
        };
        let digest = questions.digest();
        self.lineage.steps.push(format!("quantize static-int8, {method} over {seen} questions of {digest}"));
        if !self.lineage.data.contains(&calibration.data) {
            self.lineage.data.push(calibration.data.clone());
        }
        Ok(())
    }

    fn plan(&self, exclude: &[String]) -> Result<BTreeMap<String, GraphPlan>, CompressError> {
        let all: BTreeMap<&String, GraphPlan> =
            self.models.iter().map(|(graph, model)| (graph, plan_graph(model, |_| false))).collect();
        let known: BTreeSet<String> = all
            .iter()
            .flat_map(|(graph, plan)| plan.weights().into_iter().map(move |weight| format!("{graph}/{weight}")))
            .chain(self.models.keys().cloned())
            .collect();
        if let Some(entry) = exclude.iter().find(|entry| !known.contains(*entry)) {
            return Err(CompressError::UnknownExclude { entry: entry.clone(), known: known.into_iter().collect() });
        }
        let excluded =
            |graph: &String, weight: &str| exclude.contains(graph) || exclude.contains(&format!("{graph}/{weight}"));
        let plans = self
            .models
            .iter()
            .map(|(graph, model)| (graph.clone(), plan_graph(model, |weight| excluded(graph, weight))));
        Ok(plans.collect())
    }

    /// The candidate's files: its own graphs, and everything else of the source.
    fn write(&self, source: &Source, store: &Store) -> Result<Draft, CompressError> {
        let draft = store.draft()?;
        let manifest = &source.artifact.manifest;
        for file in &manifest.files {
            let path = draft.path(&file.path)?;
            let model = manifest
                .graphs
                .iter()
                .find(|graph| graph.file == file.path)
                .and_then(|graph| self.models.get(&graph.name));
            if let Some(model) = model {
                model.save(&path)?;
            } else {
                let copied = std::fs::copy(source.folder.join(&file.path), path);
                copied.map_err(|source| CompressError::Copy { path: file.path.clone(), source })?;
            }
        }
        Ok(draft)
    }
}

/// Runs calibration questions through the graphs; returns how many.
fn calibrate(
    calibrator: &Calibrator,
    source: &Source,
    questions: &Questions,
    runtime: &Runtime,
    control: &Control<'_>,
) -> Result<u64, CompressError> {
    let pipeline = Pipeline::new(&source.folder, &source.artifact.manifest, Limits::default())?;
    let mut iter = questions.iter();
    let mut seen = 0;
    loop {
        control.step("calibrating", seen, questions.len() as u64)?;
        let batch: Vec<Asked> = iter.by_ref().take(CALIBRATION_BATCH).collect::<Result<_, _>>()?;
        if batch.is_empty() {
            break;
        }
        let inputs = batch.iter().map(|asked| pipeline.prepare_vqa(&asked.image, &asked.question));
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        let answered = runtime.block_on(pipeline.vqa(calibrator, &inputs));
        // A NaN inside explains one in the logits, which is all that the pipeline can see.
        calibrator.check()?;
        answered?;
        seen += batch.len() as u64;
    }
    if seen == 0 {
        return Err(CompressError::NoQuestions { uri: questions.uri().to_owned() });
    }
    Ok(seen)
}

/// Asks source and candidate, whose files are in `folder`, the held-out questions.
fn compare(
    source: &Source,
    folder: &Path,
    held_out: &Questions,
    runtime: &Runtime,
    control: &Control<'_>,
) -> Result<Measured, CompressError> {
    let manifest = &source.artifact.manifest;
    let parent = LocalPipeline::open(&source.folder, manifest, Options::default())?;
    // The candidate's signatures and processors are its parent's, and so is what the manifest says of them.
    let candidate = LocalPipeline::open(folder, manifest, Options::default())?;
    let mut measured = measure(&parent, &candidate, held_out, runtime, control)?;
    measured.parent_bytes = manifest.total_bytes();
    let size = |path: &str| std::fs::metadata(folder.join(path)).map(|found| found.len());
    for file in &manifest.files {
        measured.candidate_bytes +=
            size(&file.path).map_err(|source| CompressError::Copy { path: file.path.clone(), source })?;
    }
    Ok(measured)
}

#[expect(clippy::too_many_arguments, reason = "the end of one function, cut off to keep that one readable")]
fn commit(
    spec: &CompressionJobSpec,
    store: &Store,
    draft: Draft,
    source: &Source,
    lineage: Lineage,
    measured: &Measured,
    gate: &GateResult,
    runtime: &Runtime,
) -> Result<ArtifactResult, CompressError> {
    let manifest = &source.artifact.manifest;
    let parts = ManifestParts {
        name: spec.output.artifact.clone(),
        format: manifest.format,
        graphs: manifest.graphs.clone(),
        pipeline: manifest.pipeline.clone(),
        modalities: manifest.modalities.clone(),
        metrics: [(gate.metric.clone(), measured.candidate_accuracy())].into(),
        lineage,
    };
    let artifact = runtime.block_on(store.commit(draft, parts))?;
    if gate.promoted {
        runtime.block_on(store.promote(&spec.output.artifact, &artifact.digest))?;
    }
    Ok(artifact_result(&spec.output.artifact, &artifact))
}

use std::path::Path;

use sensorium_api::manifest::parse_documents;
use sensorium_api::run::ArtifactResult;
use sensorium_artifact::{Format, Lineage, ManifestParts};
use sensorium_data::{QuestionAnswer, Sample, ShardWriter, WriterOptions};
use sensorium_operator::plan;

use super::*;

/// A compression job whose data, source and output are all there.
struct Fixture {
    _dir: tempfile::TempDir,
    state: StateDir,
    references: References,
    plan: WorkloadPlan,
    record: JobRecord,
}

fn manifest(samples: u32) -> String {
    format!(
        "
apiVersion: sensorium.dev/v1alpha1
kind: CompressionJob
metadata: {{name: vqa-int8}}
spec:
  source: {{artifact: vqa}}
  steps: [{{quantize: {{calibration: {{data: 'pvc://datasets/d', samples: {samples}}}}}}}]
  acceptance: {{data: 'pvc://datasets/d', maxDrop: 0.01}}
  output: {{artifact: vqa-int8}}
"
    )
}

fn planned(samples: u32) -> (References, WorkloadPlan) {
    let resources = parse_documents(&manifest(samples), "compression.yaml").unwrap();
    (References::of(&resources[0]), plan::plan(&resources[0]).unwrap())
}

fn write_data(folder: &Path, answer: &str) {
    let mut writer = ShardWriter::create(folder, WriterOptions::default()).unwrap();
    let questions = vec![QuestionAnswer { question: "what is it?".to_owned(), answer: answer.to_owned() }];
    let image = b"\x89PNG\r\n\x1a\n".to_vec();
    writer.append(&Sample { key: "0".to_owned(), image, questions, caption: None }).unwrap();
    writer.finish().unwrap();
}

async fn write_artifact(state: &StateDir, name: &str, content: &str) -> Artifact {
    let reference = ArtifactReference { store: "pvc://artifacts".to_owned(), artifact: name.to_owned() };
    let store = open_store(&reference, state).unwrap();
    let draft = store.draft().unwrap();
    std::fs::write(draft.path("graphs/a.onnx").unwrap(), content).unwrap();
    let parts = ManifestParts {
        name: name.to_owned(),
        format: Format::Onnx,
        graphs: Vec::new(),
        pipeline: None,
        modalities: Vec::new(),
        metrics: BTreeMap::new(),
        lineage: Lineage::default(),
    };
    let artifact = store.commit(draft, parts).await.unwrap();
    store.promote(name, &artifact.digest).await.unwrap();
    artifact
}

impl Fixture {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path()).unwrap();
        write_data(&state.volume("datasets").join("d"), "circle");
        write_artifact(&state, "vqa", "parent").await;
        let output = write_artifact(&state, "vqa-int8", "candidate").await;
        let (references, plan) = planned(512);
        let artifact = ArtifactResult {
            name: "vqa-int8".to_owned(),
            digest: output.digest.to_string(),
            bytes: output.manifest.total_bytes(),
            uri: output.uri,
            record: None,
        };
        let record = JobRecord {
            phase: Phase::Succeeded,
            inputs: inputs(&plan, &references, &state).await.unwrap(),
            attempts: 1,
            seconds: 1.0,
            metrics: BTreeMap::new(),
            artifact: Some(artifact),
            gate: None,
        };
        Self { _dir: dir, state, references, plan, record }
    }

    async fn is_reused(&self) -> bool {
        let inputs = inputs(&self.plan, &self.references, &self.state).await.unwrap();
        let output = self.references.output.as_ref().unwrap();
        reusable(Some(&self.record), &inputs, output, &self.state).await.unwrap().is_some()
    }

    fn output_file(&self) -> std::path::PathBuf {
        let digest = &self.record.artifact.as_ref().unwrap().digest;
        let object = self.state.volume("artifacts").join("objects").join(digest.trim_start_matches("sha256:"));
        object.join("graphs/a.onnx")
    }
}

#[tokio::test]
async fn a_job_whose_inputs_did_not_change_is_reused() {
    assert!(Fixture::new().await.is_reused().await);
}

#[tokio::test]
async fn a_job_that_never_ran_or_did_not_succeed_is_not_reused() {
    let mut fixture = Fixture::new().await;
    let output = fixture.references.output.clone().unwrap();
    assert!(reusable(None, &fixture.record.inputs, &output, &fixture.state).await.unwrap().is_none());
    for phase in [Phase::Running, Phase::Failed] {
        fixture.record.phase = phase;
        assert!(!fixture.is_reused().await, "{phase:?}");
    }
}

#[tokio::test]
async fn a_changed_spec_is_not_reused() {
    let mut fixture = Fixture::new().await;
    (fixture.references, fixture.plan) = planned(256);
    assert!(!fixture.is_reused().await);
}

#[tokio::test]
async fn changed_data_is_not_reused() {
    let fixture = Fixture::new().await;
    let folder = fixture.state.volume("datasets").join("d");
    std::fs::remove_dir_all(&folder).unwrap();
    write_data(&folder, "square");
    assert!(!fixture.is_reused().await);
}

#[tokio::test]
async fn a_changed_source_artifact_is_not_reused() {
    let fixture = Fixture::new().await;
    write_artifact(&fixture.state, "vqa", "another parent").await;
    assert!(!fixture.is_reused().await);
}

#[tokio::test]
async fn an_output_whose_name_was_given_to_another_is_not_reused() {
    let fixture = Fixture::new().await;
    write_artifact(&fixture.state, "vqa-int8", "another candidate").await;
    assert!(!fixture.is_reused().await);
}

#[tokio::test]
async fn a_damaged_or_missing_output_is_not_reused() {
    let fixture = Fixture::new().await;
    std::fs::write(fixture.output_file(), "damaged").unwrap();
    assert!(!fixture.is_reused().await);
    std::fs::remove_dir_all(fixture.output_file().ancestors().nth(2).unwrap()).unwrap();
    assert!(!fixture.is_reused().await);
}

#[tokio::test]
async fn missing_data_is_an_error_that_names_it() {
    let fixture = Fixture::new().await;
    std::fs::remove_dir_all(fixture.state.volume("datasets")).unwrap();
    let error = inputs(&fixture.plan, &fixture.references, &fixture.state).await.unwrap_err();
    assert!(matches!(&error, Error::Data { uri, .. } if uri == "pvc://datasets/d"), "{error}");
}

//! The custom resources of Sensorium as Rust types: schema, defaults, rules and offline validation.
//!
//! Four kinds in the group `sensorium.dev/v1alpha1`: a [`TrainingJob`] trains a model, a [`CompressionJob`] makes it
//! small behind an accuracy gate, a [`ServingJob`] serves it, and a [`ModelArtifact`] records what one hands the next.
//!
//! * One module per kind holds its types. Their doc comments become the descriptions of the generated schemas, their
//!   `serde` defaults the schema's defaults, and their CEL rules the checks of the API server.
//! * [`crds`] turns the types into CustomResourceDefinitions (committed under `crds/`), [`reference`] these into a page of
//!   the documentation.
//! * [`manifest`] reads YAML and holds it to those same definitions, rules included, with no cluster.
//! * [`run`] is the contract between a planned job and the program that runs it.
//!
//! There is no client, runtime or file access here. What we gave up: a rule that needs the outside world, such as
//! whether an artifact exists, cannot be written in a schema; whoever runs a plan checks those.
//!
//! ```
//! let text = "
//! apiVersion: sensorium.dev/v1alpha1
//! kind: ServingJob
//! metadata: {name: vqa}
//! spec:
//!   model: {artifact: vqa-int8}
//!   replica: 2
//! ";
//! let error = sensorium_api::manifest::parse_documents(text, "serving.yaml").unwrap_err();
//! assert!(error.to_string().contains("did you mean `replicas`?"));
//! ```

#![allow(unreachable_pub, reason = "`KubeSchema` repeats each public struct inside a function that builds its schema")]
#![allow(
    clippy::duplicated_attributes,
    reason = "clippy takes the columns of `#[kube(printcolumn(..))]` for repetitions"
)]

pub mod architecture;
pub mod canonical;
pub mod compression_job;
pub mod crds;
pub mod manifest;
pub mod model_artifact;
pub mod reference;
pub mod run;
pub mod serving_job;
pub mod status;
pub mod storage;
pub mod training;
pub mod training_job;
pub mod workload;

pub use architecture::{Architecture, FusionArchitecture, ImageArchitecture, StemLayer, TextArchitecture};
pub use compression_job::{
    Acceptance, Calibration, CalibrationMethod, CompressionJob, CompressionJobSpec, CompressionStep, Metric,
    QuantizationScheme, QuantizeStep,
};
pub use manifest::Resource;
pub use model_artifact::{
    ArtifactFormat, DataType, GraphSignature, Lineage, LineageJob, ModelArtifact, ModelArtifactSpec,
    ModelArtifactStatus, TensorSignature,
};
pub use serving_job::{
    Analysis, Autoscaling, Batching, Canary, CanaryStep, EncoderService, Engine, Limits, NetworkAccess, Ports, Rollout,
    RolloutStatus, ScaleMetric, Security, ServiceSpec, ServiceType, ServingJob, ServingJobSpec, ServingJobStatus,
    TlsSecret, TokensSecret, Verification,
};
pub use status::{AttemptFailure, JobState, JobStatus};
pub use storage::{ArtifactSource, FilePolicy, OutputSpec, Retention};
pub use training::{Augmentation, BatchSpec, OptimizerSpec, Precision, TrainingParams};
pub use training_job::{
    CheckpointSpec, Elastic, ModelSource, Parallelism, TaskSpec, TaskType, TrainingData, TrainingJob, TrainingJobSpec,
};
pub use workload::{
    FailureAction, FailurePolicy, FailureRule, PodSettings, Resources, Scheduling, Topology, TopologyMode,
};

/// The API group of every kind.
pub const GROUP: &str = "sensorium.dev";
/// The version of every kind.
pub const VERSION: &str = "v1alpha1";
/// `apiVersion` as manifests write it.
pub const API_VERSION: &str = "sensorium.dev/v1alpha1";

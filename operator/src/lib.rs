//! The operator: from custom resources to what runs, and back to their status.
//!
//! Three modules are pure, and most decisions are in them: [`plan`] (what a resource needs to run), [`render`] (a plan as
//! Kubernetes objects) and [`status`] (from what a cluster shows to what is done next and what is said). [`controller`]
//! does the rest: it watches, calls them, and writes. [`lease`] says which of several operators may.
//!
//! [`plan`] turns a checked resource into a [`plan::WorkloadPlan`]: which programs, how many, with which arguments,
//! environment, files and storage. Whoever runs it, a cluster or one machine, fills in the addresses. It knows no
//! client, clock, randomness or async runtime, and a test keeps it so; the same resource always gives the same plan.
//!
//! ```
//! let text = "
//! apiVersion: sensorium.dev/v1alpha1
//! kind: ServingJob
//! metadata: {name: vqa}
//! spec: {model: {artifact: vqa-int8}}
//! ";
//! let resources = sensorium_api::manifest::parse_documents(text, "serving.yaml")?;
//! let plan = sensorium_operator::plan::plan(&resources[0])?;
//! assert_eq!(plan.requires, ["vqa-int8"]);
//! assert_eq!(plan.roles[0].ports["grpc"], 8001);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod controller;
pub mod lease;
pub mod plan;
pub mod render;
pub mod status;

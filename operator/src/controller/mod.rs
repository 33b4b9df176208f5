//! The part that talks to a cluster: watches, and a controller for each kind.
//!
//! A reconciler reads from caches that the watches fill, asks the pure modules what to do, does it, and writes what there
//! is to say. Every visit may be the first one after a crash. Writes can be repeated: what may change is applied, what
//! may not is created unless it is there, and a status is written only if it still is the one that was read.

#![allow(
    clippy::needless_pass_by_value,
    reason = "kube's runtime passes objects and contexts to its callbacks by value"
)]

mod apply;
mod artifact;
mod children;
mod context;
mod events;
mod health;
mod index;
mod kept;
mod lean;
mod news;
mod pods;
mod run;
mod serving;
mod visit;

pub use context::{Context, Settings};
pub use health::Health;

use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use kube::Client;
use sensorium_api::{CompressionJob, ModelArtifact, TrainingJob};

use artifact::Artifacts;
use news::News;

use crate::plan::PlanError;
use crate::status::{Refusal, RefusalCause};

/// A future that ends when everything should; every controller waits for its own copy.
pub type Stop = Shared<BoxFuture<'static, ()>>;

/// Runs the controllers of all kinds until `stop` ends; visits that have begun are finished. Everything is watched from the
/// start, and visited while `lead` says so: whoever takes over knows all objects already. To be called in a runtime of tokio.
///
/// Boxed, so that the controllers are compiled with this library and not again with each program that runs them.
pub fn run(
    client: Client,
    settings: Settings,
    health: Arc<Health>,
    lead: tokio::sync::watch::Receiver<bool>,
    stop: Stop,
) -> BoxFuture<'static, ()> {
    let context = Arc::new(Context::new(client, settings, health, lead, stop.clone()));
    let (known, touched) = context.watch_main::<ModelArtifact>();
    let artifacts = Artifacts::new(known);
    let (senders, [trained, compressed, served]) = news::channels();
    let kinds: Vec<BoxFuture<'static, ()>> = vec![
        run::control::<TrainingJob>(Arc::clone(&context), artifacts.clone(), trained, stop.clone()).boxed(),
        run::control::<CompressionJob>(Arc::clone(&context), artifacts.clone(), compressed, stop.clone()).boxed(),
        serving::control(Arc::clone(&context), artifacts.clone(), served, stop.clone()).boxed(),
        artifact::control(context, artifacts, senders.tell(touched), stop).boxed(),
    ];
    futures::future::join_all(kinds).map(drop).boxed()
}

/// Why a visit could not be finished; it is repeated later.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused, or was not reached.
    #[error("could not {action} {object}")]
    Api {
        /// What was tried.
        action: &'static str,
        /// On what.
        object: String,
        /// What came back.
        #[source]
        source: Box<kube::Error>,
    },
    /// An object that is to be made has the name of one that is somebody else's.
    #[error("{object} is there already, and belongs to somebody else; remove or rename it")]
    Taken {
        /// The object.
        object: String,
    },
    /// The caches are not filled yet.
    #[error("not all objects are known yet")]
    NotReady,
    /// An object that cannot be planned or written as JSON.
    #[error("{0}")]
    Object(String),
    /// A spec that cannot be planned.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

impl Error {
    fn api(action: &'static str, object: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let object = object.into();
        move |source| Self::Api { action, object, source: Box::new(source) }
    }

    /// Whether nothing can be created because the namespace goes away.
    fn is_namespace_terminating(&self) -> bool {
        let Self::Api { source, .. } = self else { return false };
        let kube::Error::Api(status) = &**source else { return false };
        let causes = status.details.iter().flat_map(|details| &details.causes);
        status.code == 403 && causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
    }

    /// Why what the spec asks for cannot be had, where that is so. Everything else is worth another try and no more.
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Plan(error) => Some(Refusal::of_plan(error)),
            Self::Api { action, object, source } => match &**source {
                // What was sent is invalid, or a quota, a policy or a webhook is against it.
                kube::Error::Api(status)
                    if matches!(status.code, 400 | 403 | 422) && !self.is_namespace_terminating() =>
                {
                    Some(Refusal::by_cluster(action, object, &status.message))
                }
                _ => None,
            },
            Self::Taken { .. } => Some(Refusal { cause: RefusalCause::Cluster, message: self.to_string() }),
            Self::NotReady | Self::Object(_) => None,
        }
    }

    /// Whether somebody else changed the object in between: the next visit sees the change.
    fn is_conflict(&self) -> bool {
        matches!(self, Self::Api { source, .. } if matches!(&**source, kube::Error::Api(status) if status.code == 409))
    }
}

//! Whether what was opened runs: before it is asked, and before anything says that it is ready.

use std::time::Duration;

use super::Loaded;
use crate::{error::chain, model::ModelVersion};

/// How long a new engine may take for its first row before it is served without that proof. Health goes on asking.
const FIRST_PROBE: Duration = Duration::from_secs(10);

impl Loaded {
    /// Runs something on every engine. Versions of which one fails at all that it is given are failures, with what it said:
    /// they would fail at requests as well.
    pub(super) async fn prove(&mut self) {
        let mut broken = Vec::new();
        for model in &self.versions {
            for graph in model.graphs() {
                match tokio::time::timeout(FIRST_PROBE, graph.probe(Duration::ZERO)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) if error.is_of_the_input() => {
                        let reason = format!(
                            "{}; it failed at zeros of every shape that was tried: if it should, give it a model_warmup of \
                             what it takes",
                            chain(&error)
                        );
                        broken.push((number(model), reason));
                        break;
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(
                            graph = graph.name(),
                            error = chain(&error),
                            "its engine did not answer at once"
                        );
                    }
                    Err(_) => tracing::warn!(graph = graph.name(), "its engine did not answer at once"),
                }
            }
        }
        for (version, reason) in broken {
            let (out, rest): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.versions).into_iter().partition(|model| number(model) == version);
            self.versions = rest;
            // What answers questions with its graphs goes with them.
            self.multimodal.take_if(|whole| out.iter().any(|model| model.artifact() == Some(whole.digest())));
            self.failed.entry(version).or_insert(reason);
        }
    }
}

fn number(model: &ModelVersion) -> u64 {
    model.version().parse().unwrap_or(0)
}

//! Whether what was opened runs: before it is asked, and before anything says that it is ready.

use sensorium_telemetry::error_line;

use super::Loaded;
use crate::{model::ModelVersion, scheduler::LONGEST_PROBE};

impl Loaded {
    /// Runs something on every engine. What a version says that fails at all it is given is noted: most likely it would fail at
    /// requests as well, but for one that takes none of the guesses. With `is_needed` it is a failure.
    pub(super) async fn prove(&mut self, is_needed: bool) {
        let mut broken = Vec::new();
        for model in &self.versions {
            for graph in model.graphs() {
                match tokio::time::timeout(LONGEST_PROBE, graph.prove()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) if error.is_of_the_input() => {
                        let reason = format!(
                            "{}; it fails at all that was tried, zeros of many shapes: write a model_warmup of what it takes",
                            error_line(&error)
                        );
                        broken.push((number(model), reason));
                        break;
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(
                            graph = graph.name(),
                            error = error_line(&error),
                            "its engine did not answer at once"
                        );
                    }
                    Err(_) => tracing::warn!(graph = graph.name(), "its engine did not answer at once"),
                }
            }
        }
        for (version, reason) in broken {
            if !is_needed {
                tracing::warn!(version, reason, "it is served without proof that it runs");
                self.remarks.insert(version, reason);
                continue;
            }
            self.versions.retain(|model| number(model) != version);
            // What answers questions with its graphs goes with them.
            self.multimodal.remove(&version);
            self.failed.entry(version).or_insert(reason);
        }
    }
}

fn number(model: &ModelVersion) -> u64 {
    model.version().parse().unwrap_or(0)
}

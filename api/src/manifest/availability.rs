//! Parts of the API that are settled but that no program runs yet. Refused by name, instead of being ignored.

use super::Cause;
use crate::TrainingJobSpec;

/// The fields of a TrainingJob that ask for something this version cannot do, such as `spec.parallelism.tensor`.
pub fn unavailable(spec: &TrainingJobSpec) -> Vec<(String, Cause)> {
    let mut problems = Vec::new();
    let parallelism = &spec.parallelism;
    let mut refuse = |field: &str, found: u32, instead| {
        problems.push((format!("spec.parallelism.{field}"), Cause::NotAvailable { found: found.to_string(), instead }));
    };
    if parallelism.tensor > 1 {
        refuse("tensor", parallelism.tensor, "1, and `data` for more processes");
    }
    if parallelism.pipeline > 1 {
        refuse("pipeline", parallelism.pipeline, "1, and `data` for more processes");
    }
    if parallelism.zero_stage > 0 {
        refuse("zeroStage", u32::from(parallelism.zero_stage), "0");
    }
    problems
}

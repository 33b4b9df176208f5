//! `sensorium plan`: what would run, for people and for programs.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use sensorium_operator::plan::{Lifetime, MountSource, Role, RunPolicy, WorkloadPlan, order};

use crate::args::{PlanArgs, PlanFormat};
use crate::error::Error;
use crate::{manifests, output};

/// Prints the plans of the jobs in the order in which they would run.
///
/// # Errors
/// When the manifests are wrong.
pub fn run(args: &PlanArgs) -> Result<(), Error> {
    let plans: Vec<WorkloadPlan> = manifests::load(&args.paths)?
        .into_iter()
        .map(|job| Ok(job.on_this_machine()?.plan))
        .collect::<Result<_, Error>>()?;
    // What exists is for `up` to look at: a plan of one manifest is worth reading without its neighbours.
    let available: BTreeSet<String> = plans.iter().flat_map(|plan| plan.requires.clone()).collect();
    let plans = order(plans, &available)?;
    let failed = |error: std::io::Error| Error::Output(error);
    output::print(&match args.output {
        PlanFormat::Text => plans.iter().map(text).collect::<Vec<_>>().join("\n"),
        PlanFormat::Json => serde_json::to_string_pretty(&plans).map_err(|error| failed(error.into()))? + "\n",
        PlanFormat::Yaml => {
            let documents: Result<Vec<_>, _> = plans.iter().map(serde_yaml_ng::to_string).collect();
            documents.map_err(|error| failed(std::io::Error::other(error)))?.join("---\n")
        }
    })
}

fn text(plan: &WorkloadPlan) -> String {
    let mut text = format!("{}{}\n", plan.job, if plan.suspended { " (suspended: would not run)" } else { "" });
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(text, "  {name:<9}{value}");
        }
    };
    line("needs", &plan.requires.join(", "));
    line("makes", plan.produces.as_deref().unwrap_or_default());
    for role in &plan.roles {
        line("runs", &runs(role));
        line("command", &command(role));
        line("ports", &role.ports.iter().map(|(name, port)| format!("{name} {port}")).collect::<Vec<_>>().join(", "));
        line("volumes", &volumes(role));
    }
    match &plan.lifetime {
        Lifetime::RunToCompletion(RunPolicy { failure, active_deadline_seconds, .. }) => {
            let max_restarts = failure.max_restarts;
            let deadline = active_deadline_seconds.map(|seconds| format!(", within {seconds} s"));
            line("until", &format!("it is done; at most {max_restarts} restarts{}", deadline.unwrap_or_default()));
        }
        Lifetime::Service => line("until", "it is stopped"),
    }
    line("spec", &plan.spec_hash);
    text
}

fn runs(role: &Role) -> String {
    format!(
        "{} {}",
        role.world_size(),
        if role.world_size() == 1 { role.name.clone() } else { format!("{}s", role.name) }
    )
}

fn command(role: &Role) -> String {
    let arguments: Vec<String> = role.args.iter().map(ToString::to_string).collect();
    format!("{} {}", role.program.binary(), arguments.join(" "))
}

fn volumes(role: &Role) -> String {
    let claims = role.mounts.iter().filter_map(|mount| match &mount.source {
        MountSource::Claim(claim) => Some(format!("{claim}{}", if mount.read_only { " (read only)" } else { "" })),
        MountSource::Artifact(artifact) => Some(format!("{} (fetched by the node)", artifact.store)),
        MountSource::Secret(secret) => Some(format!("{secret} (a Secret)")),
        MountSource::Config | MountSource::Scratch => None,
    });
    claims.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use sensorium_api::manifest::parse_documents;

    use super::*;

    #[test]
    fn a_plan_is_a_few_lines_for_people() {
        let manifest = "
apiVersion: sensorium.dev/v1alpha1
kind: CompressionJob
metadata: {name: vqa-int8}
spec:
  source: {artifact: vqa}
  steps: [{quantize: {calibration: {data: 'pvc://datasets/train'}}}]
  acceptance: {data: 'pvc://datasets/test', maxDrop: 0.01}
  activeDeadlineSeconds: 600
  output: {artifact: vqa-int8}
---
apiVersion: sensorium.dev/v1alpha1
kind: ServingJob
metadata: {name: vqa}
spec: {model: {artifact: vqa-int8}}
";
        let resources = parse_documents(manifest, "m.yaml").unwrap();
        let texts: Vec<String> =
            resources.iter().map(|resource| text(&sensorium_operator::plan::plan(resource).unwrap())).collect();
        insta::assert_snapshot!(texts.join("\n"));
    }
}

//! `kubectl explain`, as a user of a cluster reads it.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use sensorium_api::crds::definitions;
use sensorium_tests::ApiCluster;
use serde_json::Value;

/// What kubectl prints in the place of a description that is missing.
const MISSING: &str = "<empty>";

#[test]
fn kubectl_explains_every_field_of_every_kind() -> Result<()> {
    let cluster = ApiCluster::shared()?;
    let mut objects = Vec::new();
    for definition in definitions()? {
        let kind = definition.kind.to_lowercase();
        let names = definition.schema()["properties"].as_object().into_iter().flatten().map(|(name, _)| name.clone());
        objects.push((kind.clone(), names.collect()));
        for part in ["spec", "status"] {
            collect(&format!("{kind}.{part}"), &definition.schema()["properties"][part], &mut objects);
        }
    }
    ensure!(objects.len() > 60, "only {} objects", objects.len());
    // One kubectl for each, some at a time: most of its time is its own start.
    for some in objects.chunks(8) {
        let asked = some.iter().map(|(path, _)| {
            let mut command = cluster.command("kubectl");
            command.args(["explain", path]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
        });
        let asked: Vec<_> = asked.collect::<std::io::Result<_>>()?;
        for (child, (path, fields)) in asked.into_iter().zip(some) {
            let output = child.wait_with_output()?;
            ensure!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
            described(&String::from_utf8(output.stdout)?, fields).with_context(|| format!("kubectl explain {path}"))?;
        }
    }
    Ok(())
}

/// The objects below `path`, each with the names of its fields.
fn collect(path: &str, schema: &Value, objects: &mut Vec<(String, Vec<String>)>) {
    for object in [schema, &schema["items"], &schema["additionalProperties"]] {
        if let Some(fields) = object["properties"].as_object() {
            objects.push((path.to_owned(), fields.keys().cloned().collect()));
            for (name, field) in fields {
                collect(&format!("{path}.{name}"), field, objects);
            }
        }
    }
}

/// Whether the object has a description, and below the name of each field there is one too.
fn described(said: &str, fields: &[String]) -> Result<()> {
    ensure!(!said.contains(MISSING), "{said}");
    let (_, listed) = said.split_once("\nFIELDS:\n").with_context(|| said.to_owned())?;
    let lines: Vec<&str> = listed.lines().collect();
    for field in fields {
        // `  workers	<integer>`, at times the values of an enum, and the description two columns to the right.
        let start = format!("  {field}\t<");
        let line =
            lines.iter().position(|line| line.starts_with(&start)).with_context(|| format!("{field}: {said}"))?;
        let next = lines[line + 1..].iter().find(|line| !line.starts_with("  enum:")).context("a line follows")?;
        ensure!(next.starts_with("    ") && !next.trim().is_empty(), "{field} has no description: {said}");
    }
    Ok(())
}

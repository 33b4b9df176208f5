//! `sensorium artifact`: what is in a store, whether it is whole, and where it comes from.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use sensorium_artifact::{Artifact, ArtifactError, DType, Digest, Store, TensorSpec};

use crate::args::{ArtifactCommand, StoreArgs};
use crate::error::Error;
use crate::local::state_dir::StateDir;
use crate::output::{self, indent, table};
use crate::text::{number, size};

/// Runs one of the commands.
///
/// # Errors
/// When the store cannot be read, or what was asked for is not there or not whole.
pub async fn run(command: &ArtifactCommand, state: &StateDir) -> Result<(), Error> {
    let open = |store: &StoreArgs| Ok::<_, Error>(Store::open(&store.store, &state.volumes_of(&[&store.store])?)?);
    match command {
        ArtifactCommand::Ls { store, all } => {
            let store = open(store)?;
            output::print(&listing(store.uri(), &store.names().await?, &store.list().await?, *all))
        }
        ArtifactCommand::Show { artifact, store, json } => {
            let artifact = open(store)?.resolve(artifact).await?;
            output::print(&if *json { pretty_json(&artifact) } else { card(&artifact) })
        }
        ArtifactCommand::Verify { artifacts, store } => verify(&open(store)?, artifacts).await,
        ArtifactCommand::Tree { artifact, store } => {
            let store = open(store)?;
            output::print(&tree(&store, artifact).await?)
        }
    }
}

fn listing(store: &str, names: &BTreeMap<String, Digest>, artifacts: &[Artifact], all: bool) -> String {
    let row = |name: &str, artifact: &Artifact| {
        let metrics = artifact.manifest.metrics.iter().map(|(name, value)| format!("{name} {}", number(*value)));
        vec![
            name.to_owned(),
            artifact.digest.short(),
            size(artifact.manifest.total_bytes()),
            made_by(artifact),
            metrics.collect::<Vec<_>>().join(", "),
        ]
    };
    let mut rows = Vec::new();
    for (name, digest) in names {
        match artifacts.iter().find(|artifact| artifact.digest == *digest) {
            Some(artifact) => rows.push(row(name, artifact)),
            None => rows.push(vec![name.clone(), digest.short(), "missing or damaged".to_owned()]),
        }
    }
    let named: BTreeSet<&Digest> = names.values().collect();
    if all {
        rows.extend(
            artifacts.iter().filter(|artifact| !named.contains(&artifact.digest)).map(|artifact| row("-", artifact)),
        );
    }
    if rows.is_empty() {
        return format!("no artifacts in {store}\n");
    }
    rows.insert(0, ["NAME", "DIGEST", "SIZE", "MADE BY", "METRICS"].map(str::to_owned).to_vec());
    table(&rows)
}

fn made_by(artifact: &Artifact) -> String {
    artifact.manifest.lineage.job.as_ref().map_or("-".to_owned(), |job| format!("{}/{}", job.kind, job.name))
}

fn card(artifact: &Artifact) -> String {
    let manifest = &artifact.manifest;
    let mut facts = vec![
        vec!["name".to_owned(), manifest.name.clone()],
        vec!["digest".to_owned(), artifact.digest.to_string()],
        vec!["uri".to_owned(), artifact.uri.clone()],
        vec!["size".to_owned(), size(manifest.total_bytes())],
        vec!["modalities".to_owned(), manifest.modalities.join(", ")],
        vec!["made by".to_owned(), made_by(artifact)],
        vec!["steps".to_owned(), manifest.lineage.steps.join(", then ")],
        vec!["data".to_owned(), manifest.lineage.data.join(", ")],
        vec![
            "parents".to_owned(),
            manifest.lineage.parents.iter().map(Digest::to_string).collect::<Vec<_>>().join(", "),
        ],
    ];
    facts.retain(|fact| !fact[1].is_empty());
    let mut text = table(&facts);
    let mut part = |title: &str, rows: Vec<Vec<String>>| {
        if !rows.is_empty() {
            let _ = write!(text, "\n{title}\n");
            text.push_str(&indent(&table(&rows)));
        }
    };
    part("metrics", manifest.metrics.iter().map(|(name, value)| vec![name.clone(), number(*value)]).collect());
    for graph in &manifest.graphs {
        let tensor =
            |arrow: &str, spec: &TensorSpec| vec![arrow.to_owned(), spec.name.clone(), dtype(spec.dtype), shape(spec)];
        let inputs = graph.inputs.iter().map(|spec| tensor("in", spec));
        let outputs = graph.outputs.iter().map(|spec| tensor("out", spec));
        part(&format!("graph {}", graph.name), inputs.chain(outputs).collect());
    }
    let file = |file: &sensorium_artifact::FileEntry| vec![file.path.clone(), size(file.bytes), file.digest.short()];
    part("files", manifest.files.iter().map(file).collect());
    text
}

fn dtype(dtype: DType) -> String {
    serde_json::to_value(dtype).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn shape(spec: &TensorSpec) -> String {
    let axes: Vec<String> =
        spec.shape.iter().map(|axis| axis.map_or("?".to_owned(), |size| size.to_string())).collect();
    format!("[{}]", axes.join(", "))
}

fn pretty_json(artifact: &Artifact) -> String {
    let value = serde_json::json!({
        "digest": artifact.digest,
        "uri": artifact.uri,
        "manifest": artifact.manifest,
    });
    format!("{value:#}\n")
}

/// Verifies what was named, or everything; reports all that is damaged before it fails.
async fn verify(store: &Store, references: &[String]) -> Result<(), Error> {
    let mut wanted: Vec<(String, Digest)> = Vec::new();
    if references.is_empty() {
        let names = store.names().await?;
        let artifacts = store.list().await?;
        let unnamed =
            artifacts.iter().map(|artifact| artifact.digest).filter(|digest| !names.values().any(|d| d == digest));
        let unnamed: Vec<(String, Digest)> = unnamed.map(|digest| (digest.to_string(), digest)).collect();
        wanted.extend(names);
        wanted.extend(unnamed);
    }
    for reference in references {
        // The digest alone: resolving reads the manifest, and a damaged one is for `verify` below to report.
        let digest = match reference.parse() {
            Ok(digest) => digest,
            Err(_) => match store.names().await?.get(reference) {
                Some(digest) => *digest,
                None => store.resolve(reference).await?.digest,
            },
        };
        wanted.push((reference.clone(), digest));
    }
    let mut first_failure = None;
    for (name, digest) in wanted {
        match store.verify(&digest).await {
            Ok(artifact) => {
                let files = artifact.manifest.files.len();
                output::print(&format!("ok       {name}  {files} files, {}\n", size(artifact.manifest.total_bytes())))?;
            }
            Err(error @ (ArtifactError::Corrupt { .. } | ArtifactError::NotFound { .. })) => {
                output::print(&format!("damaged  {name}\n"))?;
                first_failure = first_failure.or(Some(error));
            }
            Err(error) => return Err(error.into()),
        }
    }
    first_failure.map_or(Ok(()), |error| Err(error.into()))
}

/// An artifact and what it was made from, as far as the store knows.
async fn tree(store: &Store, reference: &str) -> Result<String, Error> {
    let root = store.resolve(reference).await?;
    let mut text = String::new();
    // Depth first with a stack of (depth, artifact or the digest of one that is elsewhere).
    let mut stack = vec![(0, Ok(root))];
    while let Some((depth, artifact)) = stack.pop() {
        let indent = if depth == 0 { String::new() } else { format!("{}└─ ", "   ".repeat(depth - 1)) };
        let artifact: Artifact = match artifact {
            Ok(artifact) => artifact,
            Err(digest) => {
                let _ = writeln!(text, "{indent}{digest} (not in {})", store.uri());
                continue;
            }
        };
        let lineage = &artifact.manifest.lineage;
        let _ = writeln!(
            text,
            "{indent}{} {}  {}: {}",
            artifact.manifest.name,
            artifact.digest.short(),
            made_by(&artifact),
            lineage.steps.join(", then "),
        );
        if lineage.parents.is_empty() {
            for data in &lineage.data {
                let _ = writeln!(text, "{}└─ {data}", "   ".repeat(depth));
            }
        }
        for digest in lineage.parents.iter().rev() {
            let parent = match store.resolve(&digest.to_string()).await {
                Ok(parent) => Ok(parent),
                Err(ArtifactError::NotFound { .. }) => Err(*digest),
                Err(error) => return Err(error.into()),
            };
            stack.push((depth + 1, parent));
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests;

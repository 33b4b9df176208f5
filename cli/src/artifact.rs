//! `sensorium artifact`: what is in a store, whether it is whole, and where it comes from.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use sensorium_api::{ModelArtifact, ModelArtifactSpec};
use sensorium_artifact::{Artifact, ArtifactError, DType, Digest, Store, TensorSpec};

use crate::args::{ArtifactCommand, StoreArgs};
use crate::error::Error;
use crate::local::state_dir::StateDir;
use crate::output::{self, indent, table};
use crate::text::{number, size};
use sensorium_operator::status::ARTIFACT_LABEL;

/// Runs one of the commands.
///
/// # Errors
/// When the store cannot be read, or what was asked for is not there or not whole.
pub async fn run(command: &ArtifactCommand, state: &StateDir) -> Result<(), Error> {
    let open = |store: &StoreArgs| {
        let mut volumes = state.volumes_of(&[&store.store])?;
        store.volumes.iter().for_each(|volume| volumes.insert(volume.clone()));
        Ok::<_, Error>(Store::open(&store.store, &volumes)?)
    };
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
        ArtifactCommand::Rm { artifacts, store } => remove(&open(store)?, artifacts).await,
        ArtifactCommand::Tree { artifact, cluster, namespace, .. } if *cluster || is_kubectl_plugin() => {
            output::print(&cluster_tree(namespace.as_deref(), artifact).await?)
        }
        ArtifactCommand::Tree { artifact, store, .. } => {
            let store = open(store)?;
            output::print(&tree(&store, artifact).await?)
        }
    }
}

/// Whether this was started as `kubectl sensorium`: kubectl runs a program of that name.
fn is_kubectl_plugin() -> bool {
    let name = std::env::args_os().next().map(std::path::PathBuf::from);
    name.and_then(|path| path.file_name().map(|name| name == "kubectl-sensorium")).unwrap_or(false)
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
        wanted.push((reference.clone(), digest_of(store, reference).await?));
    }
    let mut first_failure = None;
    for (name, digest) in wanted {
        match store.verify(&digest).await {
            Ok(artifact) => {
                let files = artifact.manifest.files.len();
                let bytes = size(artifact.manifest.total_bytes());
                output::print_as_it_goes(&format!("ok       {name}  {files} files, {bytes}\n"))?;
            }
            Err(error @ (ArtifactError::Corrupt { .. } | ArtifactError::NotFound { .. })) => {
                output::print_as_it_goes(&format!("damaged  {name}\n"))?;
                first_failure = first_failure.or(Some(error));
            }
            Err(error) => return Err(error.into()),
        }
    }
    first_failure.map_or(Ok(()), |error| Err(error.into()))
}

/// The digest that a reference means. Its manifest is not read, because it may be damaged.
async fn digest_of(store: &Store, reference: &str) -> Result<Digest, Error> {
    Ok(match reference.parse() {
        Ok(digest) => digest,
        Err(_) => match store.names().await?.get(reference) {
            Some(digest) => *digest,
            None => store.resolve(reference).await?.digest,
        },
    })
}

/// Removes all that were named, or none if one of them is not there under its name.
async fn remove(store: &Store, references: &[String]) -> Result<(), Error> {
    let mut digests = Vec::new();
    for reference in references {
        let digest = digest_of(store, reference).await?;
        if !store.has(&digest).await? {
            // Which says what there is.
            store.resolve(reference).await?;
        }
        digests.push(digest);
    }
    for digest in digests {
        let names = store.remove(&digest).await?;
        let called = if names.is_empty() { String::new() } else { format!("  ({})", names.join(", ")) };
        output::print_as_it_goes(&format!("removed  {}{called}\n", digest.short()))?;
    }
    Ok(())
}

/// What a tree shows of an artifact, wherever it is recorded.
struct Made {
    name: String,
    digest: String,
    by: String,
    steps: Vec<String>,
    data: Vec<String>,
    parents: Vec<String>,
}

impl From<&Artifact> for Made {
    fn from(artifact: &Artifact) -> Self {
        let lineage = &artifact.manifest.lineage;
        Self {
            name: artifact.manifest.name.clone(),
            digest: artifact.digest.to_string(),
            by: made_by(artifact),
            steps: lineage.steps.clone(),
            data: lineage.data.clone(),
            parents: lineage.parents.iter().map(Digest::to_string).collect(),
        }
    }
}

impl From<&ModelArtifact> for Made {
    fn from(artifact: &ModelArtifact) -> Self {
        let ModelArtifactSpec { digest, lineage, .. } = &artifact.spec;
        Self {
            name: artifact.labels().get(ARTIFACT_LABEL).cloned().unwrap_or_else(|| artifact.name_any()),
            digest: digest.clone(),
            by: lineage.job.as_ref().map_or("-".to_owned(), |job| format!("{}/{}", job.kind, job.name)),
            steps: lineage.steps.clone(),
            data: lineage.data.clone(),
            parents: lineage.parents.clone(),
        }
    }
}

/// What an artifact of a store was made from.
async fn tree(store: &Store, reference: &str) -> Result<String, Error> {
    let root = store.resolve(reference).await?;
    let all: Vec<Made> = store.list().await?.iter().map(Made::from).collect();
    Ok(draw(&Made::from(&root), &all, store.uri()))
}

/// What an artifact of a cluster was made from. A name means the newest one, as it does to jobs.
async fn cluster_tree(namespace: Option<&str>, reference: &str) -> Result<String, Error> {
    let client = kube::Client::try_default().await.map_err(Error::cluster)?;
    let namespace = namespace.unwrap_or(client.default_namespace()).to_owned();
    let mut known = Api::<ModelArtifact>::namespaced(client, &namespace)
        .list(&ListParams::default())
        .await
        .map_err(Error::cluster)?
        .items;
    known.sort_by_key(|artifact| artifact.metadata.creation_timestamp.as_ref().map(|time| time.0));
    let all: Vec<Made> = known.iter().map(Made::from).collect();
    let meant =
        known.iter().zip(&all).rev().find(|(object, made)| {
            made.digest == reference || made.name == reference || object.name_any() == reference
        });
    let (_, root) = meant.ok_or_else(|| Error::NoSuchArtifact {
        reference: reference.to_owned(),
        namespace: namespace.clone(),
        names: all.iter().map(|made| made.name.clone()).collect::<BTreeSet<_>>().into_iter().collect(),
    })?;
    Ok(draw(root, &all, &format!("namespace {namespace}")))
}

/// Depth first, with a stack of depths and artifacts, or digests of those that are not in `place`. What was drawn before is named again, and no
/// more: records may say anything, also that something was made from itself.
fn draw(root: &Made, all: &[Made], place: &str) -> String {
    let mut text = String::new();
    let mut drawn = BTreeSet::new();
    let mut stack = vec![(0, Ok(root))];
    while let Some((depth, artifact)) = stack.pop() {
        let indent = if depth == 0 { String::new() } else { format!("{}└─ ", "   ".repeat(depth - 1)) };
        let artifact: &Made = match artifact {
            Ok(artifact) => artifact,
            Err(digest) => {
                let _ = writeln!(text, "{indent}{digest} (not in {place})");
                continue;
            }
        };
        let short: String = artifact.digest.trim_start_matches("sha256:").chars().take(12).collect();
        if !drawn.insert(artifact.digest.as_str()) {
            let _ = writeln!(text, "{indent}{} {short}  (as above)", artifact.name);
            continue;
        }
        let _ =
            writeln!(text, "{indent}{} {short}  {}: {}", artifact.name, artifact.by, artifact.steps.join(", then "));
        if artifact.parents.is_empty() {
            for data in &artifact.data {
                let _ = writeln!(text, "{}└─ {data}", "   ".repeat(depth));
            }
        }
        for digest in artifact.parents.iter().rev() {
            stack.push((depth + 1, all.iter().find(|made| made.digest == *digest).ok_or(digest)));
        }
    }
    text
}

#[cfg(test)]
mod tests;

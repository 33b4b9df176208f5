//! What the tests of all stores share.

use std::path::Path;
use std::process::Command;

use sensorium_artifact::{
    Artifact, ArtifactError, DType, Digest, Draft, Format, Graph, Lineage, ManifestParts, Store, TensorSpec,
};

/// The parts of an artifact called `name` with one graph in `graphs/fusion.onnx`.
pub(crate) fn parts(name: &str) -> ManifestParts {
    let spec = |name: &str, shape| TensorSpec { name: name.into(), dtype: DType::Fp32, shape };
    ManifestParts {
        name: name.into(),
        format: Format::Onnx,
        graphs: vec![Graph {
            name: "fusion".into(),
            file: "graphs/fusion.onnx".into(),
            inputs: vec![spec("text_features", vec![None, None, Some(64)])],
            outputs: vec![spec("logits", vec![None, Some(13)])],
        }],
        pipeline: Some(serde_json::json!({ "tasks": [{ "vqa": { "answers": ["yes", "no"] } }] })),
        modalities: vec!["image".into(), "text".into()],
        metrics: [("vqa_accuracy".to_owned(), 0.993)].into(),
        lineage: Lineage { parents: vec![Digest::of(b"parent")], steps: vec!["train".into()], ..Lineage::default() },
    }
}

/// Writes `content` where [`parts`] wants the graph, and a second file.
pub(crate) fn fill(draft: &Draft, content: &[u8]) {
    std::fs::write(draft.path("graphs/fusion.onnx").unwrap(), content).unwrap();
    std::fs::write(draft.path("processor/tokenizer.json").unwrap(), b"{}").unwrap();
}

pub(crate) async fn commit(store: &Store, name: &str, content: &[u8]) -> Result<Artifact, ArtifactError> {
    let draft = store.draft()?;
    fill(&draft, content);
    store.commit(draft, parts(name)).await
}

/// Changes one bit in the middle of a file.
pub(crate) fn flip_a_bit(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

/// Rules that hold for every store.
pub(crate) async fn a_store_keeps_names_and_finds_artifacts(store: &Store, cache: &Path) {
    assert!(store.list().await.unwrap().is_empty());
    assert!(store.names().await.unwrap().is_empty());

    let first = commit(store, "vqa", b"first").await.unwrap();
    let second = commit(store, "vqa", b"second").await.unwrap();
    assert_ne!(first.digest, second.digest);
    assert_eq!(first.uri, format!("{}/objects/{}", store.uri(), first.digest.hex()));
    assert_eq!(first.manifest.total_bytes(), 7);
    let paths: Vec<_> = first.manifest.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["graphs/fusion.onnx", "processor/tokenizer.json"]);

    // Nothing has a name until it is promoted, everything has its digest.
    let error = store.resolve("vqa").await.unwrap_err();
    assert!(matches!(&error, ArtifactError::NotFound { reference, .. } if reference == "vqa"), "{error}");
    assert_eq!(store.resolve(&first.digest.to_string()).await.unwrap(), first);

    store.promote("vqa", &first.digest).await.unwrap();
    store.promote("vqa-best", &first.digest).await.unwrap();
    store.promote("vqa", &second.digest).await.unwrap();
    assert_eq!(store.resolve("vqa").await.unwrap(), second);
    assert_eq!(store.resolve("vqa-best").await.unwrap(), first);
    let names = store.names().await.unwrap();
    assert_eq!(
        names.into_iter().collect::<Vec<_>>(),
        [("vqa".into(), second.digest), ("vqa-best".into(), first.digest)]
    );

    let error = store.resolve("other").await.unwrap_err();
    assert!(
        error.to_string().contains("no artifact `other`") && error.to_string().contains("vqa, vqa-best"),
        "{error}"
    );
    let error = store.promote("vqa", &Digest::of(b"nothing")).await.unwrap_err();
    assert!(matches!(error, ArtifactError::NotFound { .. }), "{error}");
    let error = store.promote("no/name", &first.digest).await.unwrap_err();
    assert!(matches!(error, ArtifactError::InvalidName { .. }), "{error}");
    assert_eq!(store.resolve("vqa").await.unwrap(), second);

    // The same content again is the same artifact.
    assert_eq!(commit(store, "vqa", b"first").await.unwrap(), first);
    let mut all = vec![first.clone(), second];
    all.sort_by_key(|artifact| artifact.digest);
    assert_eq!(store.list().await.unwrap(), all);

    let folder = store.fetch(&first, cache).await.unwrap();
    assert_eq!(std::fs::read(folder.join("graphs/fusion.onnx")).unwrap(), b"first");
    assert_eq!(Digest::of(&std::fs::read(folder.join("manifest.json")).unwrap()), first.digest);
    assert_eq!(store.verify(&first.digest).await.unwrap(), first);

    // What is removed is gone with its names, also when it was gone already.
    assert_eq!(store.remove(&first.digest).await.unwrap(), ["vqa-best"]);
    assert!(store.remove(&first.digest).await.unwrap().is_empty());
    assert_eq!(store.list().await.unwrap().len(), 1);
    assert_eq!(store.names().await.unwrap().into_keys().collect::<Vec<_>>(), ["vqa"]);
    assert!(matches!(store.verify(&first.digest).await.unwrap_err(), ArtifactError::NotFound { .. }));
}

/// Both values of the one mismatch of a `Corrupt` error, after checking that the message has them.
pub(crate) fn mismatch(error: &ArtifactError) -> (String, Digest, Option<Digest>) {
    let ArtifactError::Corrupt { mismatches, .. } = error else { panic!("not Corrupt: {error}") };
    let [only] = mismatches.as_slice() else { panic!("not one mismatch: {error}") };
    let text = error.to_string();
    assert!(text.contains(&only.expected.to_string()) && text.contains(&only.path), "{text}");
    if let Some(found) = only.found {
        assert!(text.contains(&found.to_string()), "{text}");
    }
    (only.path.clone(), only.expected, only.found)
}

/// This test program, to run the ignored test `name` in a process of its own.
pub(crate) fn child(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture"]);
    command
}

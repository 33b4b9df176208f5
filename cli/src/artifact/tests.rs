use std::path::Path;

use sensorium_artifact::{Format, Graph, Lineage, LineageJob, ManifestParts, Volumes};

use super::*;

/// A store with `vqa` and `vqa-int8`, which was made from it.
async fn store(folder: &Path) -> (Store, Artifact) {
    let store = Store::open(&format!("file://{}", folder.display()), &Volumes::default()).unwrap();
    let vqa = commit(
        &store,
        "TrainingJob",
        "vqa",
        Lineage { steps: vec!["train".to_owned()], data: vec!["pvc://d/train".to_owned()], ..Lineage::default() },
    )
    .await;
    let steps = vec!["quantize static-int8".to_owned()];
    let int8 = commit(
        &store,
        "CompressionJob",
        "vqa-int8",
        Lineage { steps, parents: vec![vqa.digest], ..Lineage::default() },
    )
    .await;
    (store, int8)
}

async fn commit(store: &Store, kind: &str, name: &str, lineage: Lineage) -> Artifact {
    let draft = store.draft().unwrap();
    std::fs::write(draft.path("graphs/fusion.onnx").unwrap(), name).unwrap();
    let job = LineageJob {
        kind: kind.to_owned(),
        namespace: "default".to_owned(),
        name: name.to_owned(),
        spec_hash: "sha256:5".to_owned(),
    };
    let tensor = |name: &str, shape| TensorSpec { name: name.to_owned(), dtype: DType::Fp32, shape };
    let parts = ManifestParts {
        name: name.to_owned(),
        format: Format::Onnx,
        graphs: vec![Graph {
            name: "fusion".to_owned(),
            file: "graphs/fusion.onnx".to_owned(),
            inputs: vec![tensor("image_features", vec![None, Some(16), Some(64)])],
            outputs: vec![tensor("logits", vec![None, Some(13)])],
        }],
        pipeline: None,
        modalities: vec!["image".to_owned(), "text".to_owned()],
        metrics: [("vqa_accuracy".to_owned(), 0.9875)].into(),
        lineage: Lineage { job: Some(job), ..lineage },
    };
    let artifact = store.commit(draft, parts).await.unwrap();
    store.promote(name, &artifact.digest).await.unwrap();
    artifact
}

#[tokio::test]
async fn a_listing_has_a_line_per_name() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = store(dir.path()).await;
    let text = listing("pvc://artifacts", &store.names().await.unwrap(), &store.list().await.unwrap(), false);
    insta::assert_snapshot!(text);
    assert_eq!(listing("pvc://empty", &BTreeMap::new(), &[], true), "no artifacts in pvc://empty\n");
}

#[tokio::test]
async fn versions_without_a_name_are_listed_when_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (store, int8) = store(dir.path()).await;
    let names = [("vqa-int8".to_owned(), int8.digest)].into();
    let artifacts = store.list().await.unwrap();
    assert_eq!(listing("s", &names, &artifacts, false).lines().count(), 2);
    let all = listing("s", &names, &artifacts, true);
    assert!(all.lines().nth(2).unwrap().starts_with("- "), "{all}");
}

#[tokio::test]
async fn a_card_shows_signature_metrics_files_and_lineage() {
    let dir = tempfile::tempdir().unwrap();
    let (_, int8) = store(dir.path()).await;
    let text = card(&int8).replace(&dir.path().display().to_string(), "/store");
    insta::assert_snapshot!(text);
}

#[tokio::test]
async fn a_tree_leads_from_the_artifact_to_the_data() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = store(dir.path()).await;
    insta::assert_snapshot!(tree(&store, "vqa-int8").await.unwrap());
}

#[tokio::test]
async fn verifying_everything_finds_a_damaged_file_and_one_damaged_manifest_does_not_hide_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, int8) = store(dir.path()).await;
    verify(&store, &[]).await.unwrap();
    let object = dir.path().join("objects").join(int8.digest.hex());
    for file in ["graphs/fusion.onnx", "manifest.json"] {
        let kept = std::fs::read(object.join(file)).unwrap();
        std::fs::write(object.join(file), "damaged").unwrap();
        for wanted in [vec![], vec!["vqa-int8".to_owned()], vec![int8.digest.to_string()]] {
            let error = verify(&store, &wanted).await.unwrap_err();
            let Error::Artifact(ArtifactError::Corrupt { artifact, mismatches }) = error else { panic!("{error}") };
            assert_eq!((artifact, mismatches[0].path.as_str()), (int8.digest, file));
        }
        std::fs::write(object.join(file), kept).unwrap();
    }
}

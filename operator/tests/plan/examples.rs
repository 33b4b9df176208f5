//! Every manifest under `examples/` is valid, has a plan, and its folder runs as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sensorium_api::manifest::parse_documents;
use sensorium_operator::plan::{order, plan};

#[test]
fn every_example_validates_plans_and_has_an_order() {
    let mut folders: BTreeMap<PathBuf, Vec<_>> = BTreeMap::new();
    for path in manifests(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let resources = parse_documents(&text, &path.display().to_string()).unwrap_or_else(|error| panic!("{error}"));
        assert!(!resources.is_empty(), "{} holds nothing", path.display());
        let plans = resources.iter().map(|resource| plan(resource).unwrap());
        folders.entry(path.parent().unwrap().to_owned()).or_default().extend(plans);
    }
    assert!(!folders.is_empty());
    // An example may go on from what another one makes.
    let made: BTreeSet<String> = folders.values().flatten().filter_map(|plan| plan.produces.clone()).collect();
    for (folder, plans) in folders {
        order(plans, &made).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    }
}

fn manifests(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { manifests(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .collect()
}

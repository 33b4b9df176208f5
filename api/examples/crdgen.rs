//! Writes what is generated from the types: the CustomResourceDefinitions to `crds/`, one file per kind, and the reference of
//! their fields to `docs/`.

use std::path::Path;

use sensorium_api::{crds, reference};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::create_dir_all(root.join("crds"))?;
    let definitions = crds::definitions()?;
    for definition in &definitions {
        std::fs::write(root.join("crds").join(&definition.file_name), definition.to_yaml()?)?;
        println!("crds/{}", definition.file_name);
    }
    std::fs::write(root.join("docs").join(reference::FILE_NAME), reference::markdown(&definitions))?;
    println!("docs/{}", reference::FILE_NAME);
    Ok(())
}

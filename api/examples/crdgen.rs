//! Writes the CustomResourceDefinitions to `crds/`, one file per kind.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds");
    std::fs::create_dir_all(&folder)?;
    for definition in sensorium_api::crds::definitions()? {
        std::fs::write(folder.join(&definition.file_name), definition.to_yaml()?)?;
        println!("crds/{}", definition.file_name);
    }
    Ok(())
}

//! `sensorium-node-cache`: see `--help`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use sensorium_node_cache::cache::{ARTIFACTS, Cache};
use sensorium_node_cache::mounts::{Mounts, in_use};
use sensorium_node_cache::plugin::{self, Plugin};

/// Fetches artifacts from buckets once per node and gives them to pods as read-only volumes, as a plugin of the kubelet.
#[derive(Debug, Parser)]
#[command(name = "sensorium-node-cache", version, max_term_width = 100)]
struct Options {
    /// Name of this node
    #[arg(long, env = "SENSORIUM_NODE_NAME")]
    node_name: String,
    /// Folder of the node for artifacts
    #[arg(
        long,
        env = "SENSORIUM_NODE_CACHE_FOLDER",
        default_value = "/var/lib/sensorium/node-cache",
        value_name = "DIR"
    )]
    folder: PathBuf,
    /// Bytes of artifacts that are kept at most, such as 50Gi; those that were used longest ago go first
    #[arg(long, env = "SENSORIUM_NODE_CACHE_CAPACITY", default_value = "50Gi", value_parser = bytes)]
    capacity: u64,
    /// The kubelet's folder, at the same place as on the node
    #[arg(long, env = "SENSORIUM_KUBELET_FOLDER", default_value = "/var/lib/kubelet", value_name = "DIR")]
    kubelet_folder: PathBuf,
    /// Stores other than AWS itself that pods may name; may be repeated
    #[arg(long, env = "SENSORIUM_NODE_CACHE_ENDPOINTS", value_delimiter = ',', value_name = "URL")]
    endpoint: Vec<String>,
}

/// Bytes, in Kubernetes' words: a number, perhaps with Ki, Mi, Gi, Ti, k, M, G or T.
fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 8] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
    ];
    let (number, unit) =
        UNITS.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit))).unwrap_or((text, 1));
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is no size; write 50Gi or 500M, for example"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text} is more than any disk has"))
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sensorium-node-cache: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> anyhow::Result<()> {
    sensorium_telemetry::init("sensorium-node-cache")?;
    let runtime = tokio::runtime::Runtime::new().context("could not start the async runtime")?;
    runtime.block_on(async {
        let asked = sensorium_lifecycle::asked_to_end().context("could not listen for signals")?;
        let pods = options.kubelet_folder.join("pods");
        let used = {
            let pods = pods.clone();
            Box::new(move || in_use(&pods))
        };
        let cache = Cache::open(&options.folder, options.capacity, used)?;
        let mounts = Mounts::prepare(&options.folder.join(ARTIFACTS), &options.folder.join("view"), &pods)?;
        let socket = plugin::socket(&options.kubelet_folder.join("plugins_registry"));
        let (listener, number) =
            plugin::listen(&socket).with_context(|| format!("could not listen on {}", socket.display()))?;
        tracing::info!(socket = %socket.display(), bytes = cache.bytes(), capacity = options.capacity, "listening");
        let plugin =
            Plugin { cache, mounts, node: options.node_name, endpoints: options.endpoint, socket: socket.clone() };
        plugin::serve(plugin, listener, asked).await.context("the server ended")?;
        plugin::leave(&socket, number).with_context(|| format!("could not remove {}", socket.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_kubernetes_words() {
        assert_eq!([bytes("5"), bytes("2Ki"), bytes("3M")], [Ok(5), Ok(2048), Ok(3_000_000)]);
        for bad in ["", "-1", "1.5Gi", "Gi", "99999999999T"] {
            bytes(bad).unwrap_err();
        }
    }
}

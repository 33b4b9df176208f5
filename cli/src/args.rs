//! What can be typed: the commands, their options and their help. What it means is decided in each command's module.

#![expect(missing_docs, reason = "doc comments here are what `--help` prints; not all of its items are in it")]

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// The model that `infer` asks: the name of the example's ServingJob.
pub const DEFAULT_MODEL: &str = "vqa";
/// Where `infer` looks for a server: the ServingJob's default port, which is Triton's.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:8001";

/// Trains, compresses and serves multimodal models from Kubernetes manifests, on this machine.
#[derive(Debug, Parser)]
#[command(
    name = "sensorium",
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 it worked, 1 it failed, 2 the command line is wrong, 130 it was interrupted.\n\
                  Run `sensorium COMMAND --help` for examples."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// Folder for jobs, volumes and reports; pvc://CLAIM is DIR/volumes/CLAIM
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = ".sensorium",
        env = "SENSORIUM_STATE_DIR",
        hide_env_values = true
    )]
    pub state_dir: PathBuf,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run jobs on this machine, in the order in which they need each other
    ///
    /// Every worker is a process. A job whose manifest, data and source artifacts have not changed since it last
    /// succeeded is not run again. A job that was interrupted goes on from its newest checkpoint. The run ends with a
    /// report in the state folder: report.html to look at, report.json for scripts.
    ///
    /// Ctrl-C stops all workers, which save their state first; a second Ctrl-C does not wait for them.
    Up(UpArgs),
    /// Print what `up` would run, without running it
    Plan(PlanArgs),
    /// Ask a served model a question about an image
    Infer(InferArgs),
    /// Import and inspect data sets
    #[command(subcommand)]
    Data(DataCommand),
    /// List, inspect and verify model artifacts
    #[command(subcommand)]
    Artifact(ArtifactCommand),
    /// Print a completion script for a shell
    #[command(after_help = "Examples:\n  \
        sensorium completion bash > ~/.local/share/bash-completion/completions/sensorium\n  \
        sensorium completion zsh > \"${fpath[1]}/_sensorium\"\n  \
        sensorium completion fish > ~/.config/fish/completions/sensorium.fish")]
    Completion {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        sensorium up examples/easy-vqa/             train, compress and serve, then ask a few questions\n  \
        sensorium up examples/easy-vqa/ --keep      the same, and leave the server running\n  \
        sensorium up training.yaml serving.yaml     only these manifests\n  \
        sensorium up serving.yaml --grpc-port 9001  serve on another port")]
pub struct UpArgs {
    /// Manifests, or folders of them (*.yaml, *.yml)
    #[arg(required = true, value_name = "FILE|DIR")]
    pub paths: Vec<PathBuf>,
    /// Leave servers running until Ctrl-C
    #[arg(long)]
    pub keep: bool,
    /// Print lines instead of progress bars, as when the output is no terminal
    #[arg(long)]
    pub plain: bool,
    /// Serve gRPC on this port or fail; by default the manifest's port, or a free one if that is taken
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub grpc_port: Option<u16>,
    /// Serve HTTP on this port or fail
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub http_port: Option<u16>,
    /// Serve Prometheus metrics on this port or fail
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub metrics_port: Option<u16>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sensorium plan examples/easy-vqa/\n  \
    sensorium plan examples/easy-vqa/training.yaml -o yaml")]
pub struct PlanArgs {
    /// Manifests, or folders of them (*.yaml, *.yml)
    #[arg(required = true, value_name = "FILE|DIR")]
    pub paths: Vec<PathBuf>,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = PlanFormat::Text)]
    pub output: PlanFormat,
}

/// How `sensorium plan` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PlanFormat {
    /// A few lines per job
    Text,
    /// Everything, one YAML document per job
    Yaml,
    /// Everything, one JSON array
    Json,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sensorium infer --image circle.png --text \"what color is the circle?\"\n  \
    sensorium infer --image circle.png --text \"is there a square?\" --top 3\n  \
    sensorium infer --image circle.png --text \"what shape is it?\" --addr 10.0.0.7:8001 --json")]
pub struct InferArgs {
    /// A PNG, JPEG or WebP file
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    /// The question
    #[arg(long, value_name = "QUESTION")]
    pub text: String,
    /// The server's gRPC address
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_ADDRESS)]
    pub addr: String,
    /// The model: the name of its ServingJob
    #[arg(long, value_name = "NAME", default_value = DEFAULT_MODEL)]
    pub model: String,
    /// Print this many answers, best first
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub top: u32,
    /// Print JSON: {model, digest, answers: [{answer, score}]}
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Turn a data set's own files into shards that jobs read
    #[command(after_help = "Examples:\n  \
        sensorium data import easy-vqa\n  \
        sensorium data import easy-vqa --from downloads/easy_vqa/data --out pvc://datasets/easy-vqa")]
    Import {
        /// The data set
        #[arg(value_enum)]
        dataset: DatasetName,
        /// Folder with its files; by default where set-up has put them
        #[arg(long, value_name = "DIR", env = "SENSORIUM_EASY_VQA", hide_env_values = true)]
        from: Option<PathBuf>,
        /// Where the shards go; by default pvc://datasets/NAME
        #[arg(long, value_name = "URI")]
        out: Option<String>,
    },
    /// Say what is in a data set
    #[command(after_help = "Examples:\n  sensorium data ls pvc://datasets/easy-vqa/test")]
    Ls {
        /// The data set's folder: pvc://CLAIM/PATH or file:///PATH
        uri: String,
        /// Print this many samples
        #[arg(long, value_name = "N", default_value_t = 3)]
        samples: usize,
    },
}

/// The data sets that can be imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DatasetName {
    /// 5,000 drawings of shapes with 48,248 questions about them
    EasyVqa,
}

impl DatasetName {
    /// The name as it is typed, and in the default URI.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EasyVqa => "easy-vqa",
        }
    }
}

#[derive(Debug, Args)]
pub struct StoreArgs {
    /// Where artifacts are: pvc://CLAIM/PATH, file:///PATH or s3://BUCKET/PREFIX
    #[arg(long, value_name = "URI", default_value = sensorium_api::storage::DEFAULT_STORE)]
    pub store: String,
    /// Folder that stands for a claim of pvc:// URIs, instead of the one below the state folder; repeatable
    #[arg(long = "volume", value_name = "CLAIM=DIR")]
    pub volumes: Vec<sensorium_artifact::Volume>,
}

#[derive(Debug, Subcommand)]
pub enum ArtifactCommand {
    /// List artifacts by name
    #[command(after_help = "Examples:\n  sensorium artifact ls\n  sensorium artifact ls --store s3://models/team-a")]
    Ls {
        #[command(flatten)]
        store: StoreArgs,
        /// Also list versions that no name points to
        #[arg(long)]
        all: bool,
    },
    /// Print one artifact: files, signature, metrics, lineage
    #[command(
        after_help = "Examples:\n  sensorium artifact show vqa-int8\n  sensorium artifact show vqa-int8 --json | jq .metrics"
    )]
    Show {
        /// Its name, or `sha256:` and its digest
        artifact: String,
        #[command(flatten)]
        store: StoreArgs,
        /// Print the manifest as JSON
        #[arg(long)]
        json: bool,
    },
    /// Compare every file with its digest
    #[command(
        after_help = "Examples:\n  sensorium artifact verify            all of them\n  sensorium artifact verify vqa-int8\n  \
                      sensorium artifact verify vqa --volume artifacts=/mnt/artifacts"
    )]
    Verify {
        /// Names or digests; all artifacts by default
        artifacts: Vec<String>,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Remove artifacts, with their files and the names that point to them
    #[command(after_help = "Examples:\n  sensorium artifact rm vqa-int8\n  \
                      sensorium artifact rm sha256:4f1c... --volume artifacts=/mnt/artifacts")]
    Rm {
        /// Names or digests
        #[arg(required = true)]
        artifacts: Vec<String>,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Print what an artifact was made from
    #[command(after_help = "Examples:\n  sensorium artifact tree vqa-int8\n  \
                      sensorium artifact tree vqa-int8 --cluster --namespace my-team\n  \
                      kubectl sensorium artifact tree vqa-int8    the same, where this program is also called kubectl-sensorium")]
    Tree {
        /// Its name, or `sha256:` and its digest
        artifact: String,
        /// Read the ModelArtifacts of a cluster, not a store
        #[arg(long, conflicts_with = "store")]
        cluster: bool,
        /// Namespace on the cluster; that of the kubeconfig's context by default
        #[arg(long, short)]
        namespace: Option<String>,
        #[command(flatten)]
        store: StoreArgs,
    },
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_of_every_command_is_as_reviewed() {
        let mut all = String::new();
        write_help(&mut Cli::command().term_width(100), "sensorium", &mut all);
        insta::assert_snapshot!(all);
    }

    fn write_help(command: &mut clap::Command, path: &str, all: &mut String) {
        writeln!(all, "$ {path} --help\n{}", command.clone().bin_name(path).render_long_help()).unwrap();
        for sub in command.get_subcommands_mut().filter(|sub| sub.get_name() != "help") {
            let path = format!("{path} {}", sub.get_name());
            write_help(&mut sub.clone().term_width(100), &path, all);
        }
    }
}

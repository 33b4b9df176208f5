//! `sensorium-trainer`: one worker of a training job, or a compression job.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use sensorium_api::CompressionJobSpec;
use sensorium_api::run::{ArtifactResult, RunConfig, RunResult, RunState};
use sensorium_artifact::{Volume, Volumes};
use sensorium_compress::Control;
use sensorium_dist::{Launch, keep_freed_memory};
use sensorium_lifecycle::{NO_ONNXRUNTIME_TELEMETRY, open_many_files, start_over_with};
use sensorium_telemetry::{Lines, Options, Parent, Telemetry};
use sensorium_trainer::join::join;
use sensorium_trainer::launch::launch;
use sensorium_trainer::progress::Reporter;
use sensorium_trainer::publish::publish;
use sensorium_trainer::setup::{Setup, read_config};
use sensorium_trainer::stop::Stop;
use sensorium_trainer::train::{Run, Trained};
use sensorium_trainer::{TrainError, exit_code, result};
use tracing::Instrument as _;

#[derive(Debug, Parser)]
#[command(name = "sensorium-trainer", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one worker of a TrainingJob. Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them; without
    /// them it trains alone.
    Train(RunArgs),
    /// Run a CompressionJob.
    Compress(RunArgs),
    /// Start several workers in one pod: each runs the command after `--` with RANK and LOCAL_RANK of its own.
    Launch(LaunchArgs),
}

#[derive(Debug, Args)]
struct LaunchArgs {
    /// How many workers; GROUP_RANK says which pod this is.
    #[arg(long, value_name = "N")]
    processes: NonZeroU32,
    /// What each runs, such as `train --config job.json`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What every job is started with.
#[derive(Debug, Args)]
struct RunArgs {
    /// The job's run file (JSON), as `sensorium plan` shows it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Folder that stands for a claim of pvc:// URIs; repeatable.
    #[arg(long = "volume", value_name = "CLAIM=DIR")]
    volumes: Vec<Volume>,
    /// Where rank 0 serves /progress and /metrics.
    #[arg(long, value_name = "HOST:PORT", env = "SENSORIUM_PROGRESS_ADDR")]
    progress_addr: Option<SocketAddr>,
    /// Where the result is written as JSON when the job ends.
    #[arg(long, value_name = "FILE", env = "SENSORIUM_RESULT_FILE")]
    result_file: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_over_with("sensorium-trainer", &[NO_ONNXRUNTIME_TELEMETRY]);
    open_many_files();
    let (runtime, telemetry) = match runtime().and_then(|runtime| telemetry(&runtime).map(|it| (runtime, it))) {
        Ok(both) => both,
        Err(error) => {
            eprintln!("sensorium-trainer: {error:#}");
            return ExitCode::from(2);
        }
    };
    let code = match cli.command {
        Command::Train(args) => run(train, &args, &runtime),
        Command::Compress(args) => run(compress, &args, &runtime),
        Command::Launch(LaunchArgs { processes, command }) => match runtime.block_on(launch(processes, &command)) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "could not start the workers");
                ExitCode::FAILURE
            }
        },
    };
    telemetry.shutdown();
    code
}

/// Logs, and spans where the environment names a collector.
fn telemetry(runtime: &tokio::runtime::Runtime) -> anyhow::Result<Telemetry> {
    let _entered = runtime.enter();
    let otlp_endpoint = std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").ok().filter(|endpoint| !endpoint.is_empty());
    let sampling = sensorium_telemetry::Sampling::default();
    Ok(sensorium_telemetry::start(Options {
        service: "sensorium-trainer",
        otlp_endpoint,
        sampling,
        lines: Lines::AtOnce,
    })?)
}

/// The span of all that this process does, in the trace that the environment names.
fn span(job: &str) -> tracing::Span {
    let rank = std::env::var("RANK").unwrap_or_default();
    let span = tracing::info_span!("run", job, rank);
    if let Some(parent) = std::env::var("TRACEPARENT").ok().and_then(|parent| Parent::parse(&parent, None)) {
        parent.adopt(&span);
    }
    span
}

/// Rank 0 returns the result, the others nothing.
type Job = fn(&RunArgs, &Volumes, &tokio::runtime::Runtime) -> anyhow::Result<Option<RunResult>>;

/// Runs a job, and tells how it ended by the result file and the exit code.
fn run(job: Job, args: &RunArgs, runtime: &tokio::runtime::Runtime) -> ExitCode {
    let mut volumes = Volumes::default();
    args.volumes.iter().for_each(|volume| volumes.insert(volume.clone()));
    let started = Instant::now();
    let (result, code) = match job(args, &volumes, runtime) {
        // A candidate that the gate refused is a result, and a failed job.
        Ok(Some(result)) if result.state == RunState::Failed => (result, ExitCode::FAILURE),
        Ok(Some(result)) => (result, ExitCode::SUCCESS),
        Ok(None) => return ExitCode::SUCCESS, // a rank other than 0: rank 0 tells
        Err(error) => {
            let message = format!("{error:#}");
            tracing::error!(error = message, "the job did not finish");
            let result = RunResult { state: RunState::Failed, message, ..empty() };
            let code = ExitCode::from(exit_code::of(&error));
            // The other ranks fail in the wake of one, so only rank 0 speaks for the job.
            if std::env::var("RANK").is_ok_and(|rank| rank != "0") {
                return code;
            }
            (result, code)
        }
    };
    let result = RunResult { seconds: started.elapsed().as_secs_f64(), ..result };
    match args.result_file.as_deref().map(|path| result::write(path, &result)) {
        Some(Err(error)) => {
            tracing::error!(error = format!("{error:#}"), "could not write the result");
            ExitCode::FAILURE
        }
        _ => code,
    }
}

fn empty() -> RunResult {
    RunResult {
        state: RunState::Succeeded,
        message: String::new(),
        artifact: None,
        metrics: BTreeMap::new(),
        gate: None,
        seconds: 0.0,
    }
}

/// One thread serves progress and stores artifacts; computing has threads of its own.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().build().context("could not start the async runtime")
}

fn train(args: &RunArgs, volumes: &Volumes, runtime: &tokio::runtime::Runtime) -> anyhow::Result<Option<RunResult>> {
    let config = read_config(&args.config)?;
    share_cores();
    keep_freed_memory();
    let launch = Launch::from_env().map_err(TrainError::from)?;
    let (reporter, stop) = (Reporter::default(), Stop::default());
    let is_first = launch.rank == 0;
    runtime.block_on(listen(&reporter, &stop, args.progress_addr.filter(|_| is_first)))?;
    let setup = runtime.block_on(Setup::new(&config, volumes, &stop))?;
    let group = join(&launch, config.spec.pre_running_deadline_seconds, &stop)?;
    tracing::info!(
        job = %config.job,
        rank = group.rank(),
        world_size = group.size(),
        parameters = setup.network.parameter_count(),
        samples = setup.train.len(),
        "training"
    );
    let _span = span(&config.job.to_string()).entered();
    let Trained { weights, mut metrics, seconds } = Run::new(&config, &setup, &group, &reporter, &stop)?.train()?;
    let artifact = if is_first {
        reporter.update(|progress| "exporting".clone_into(&mut progress.state));
        let publish = publish(&config, &setup, &weights, metrics.clone(), volumes);
        Some(runtime.block_on(publish.instrument(tracing::info_span!("publish")))?)
    } else {
        None
    };
    let Some(artifact) = artifact else { return Ok(None) };
    // Not in the artifact: the same training gives the same digest, however long it took.
    metrics.insert("train_seconds".to_owned(), seconds);
    reporter.update(|progress| "done".clone_into(&mut progress.state));
    let ArtifactResult { name, digest, .. } = &artifact;
    let message = format!("trained {} steps; artifact {name} is {digest}", config.spec.training.steps);
    Ok(Some(RunResult { message, artifact: Some(artifact), metrics, ..empty() }))
}

/// Gives libtorch this process's part of the cores, unless the user has decided. By itself it takes a thread for every core
/// that it sees, which in a container are more than it may use, and on a machine with several workers as many as all of
/// them may.
fn share_cores() {
    if std::env::var_os("OMP_NUM_THREADS").is_none() {
        let processes =
            std::env::var("LOCAL_WORLD_SIZE").ok().and_then(|it| it.parse().ok()).unwrap_or(NonZeroUsize::MIN);
        let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        tch::set_num_threads((cores.get() / processes.get()).max(1) as i32);
    }
}

fn compress(args: &RunArgs, volumes: &Volumes, runtime: &tokio::runtime::Runtime) -> anyhow::Result<Option<RunResult>> {
    let bytes = std::fs::read(&args.config).with_context(|| args.config.display().to_string())?;
    let config: RunConfig<CompressionJobSpec> =
        serde_json::from_slice(&bytes).with_context(|| args.config.display().to_string())?;
    let _span = span(&config.job.to_string()).entered();
    let (reporter, stop) = (Reporter::default(), Stop::default());
    runtime.block_on(listen(&reporter, &stop, args.progress_addr))?;
    let control =
        Control { progress: &|told| reporter.update(|kept| *kept = told), cancelled: &|| stop.is_requested() };
    Ok(Some(sensorium_compress::run(&config, volumes, &control)?))
}

/// Listens for the signal to stop, and serves progress where asked to.
async fn listen(reporter: &Reporter, stop: &Stop, address: Option<SocketAddr>) -> anyhow::Result<()> {
    stop.listen().context("could not listen for signals")?;
    match address {
        Some(address) => Ok(reporter.serve(address).await?),
        None => Ok(()),
    }
}

//! From a parsed command line to an exit code.

use std::io::Write as _;
use std::process::ExitCode;

use clap::CommandFactory as _;

use crate::args::{Cli, Command};
use crate::error::Error;
use crate::local::state_dir::StateDir;
use crate::{artifact, data, infer, output, plan, up};

/// Runs a command, prints its error if it has one, and says what to exit with.
pub fn run(cli: Cli) -> ExitCode {
    init_logs();
    sensorium_lifecycle::open_many_files();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&Error::Runtime(error)),
    };
    match runtime.block_on(dispatch(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        // `sensorium plan | head`: the reader has what it wanted.
        Err(Error::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

async fn dispatch(cli: Cli) -> Result<(), Error> {
    let state = StateDir::new(&cli.global.state_dir)?;
    match &cli.command {
        Command::Up(args) => up::run(args, state).await,
        Command::Plan(args) => plan::run(args),
        Command::Infer(args) => infer::run(args).await,
        Command::Data(command) => data::run(command, &state),
        Command::Artifact(command) => artifact::run(command, &state).await,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "sensorium", &mut script);
            output::print(&String::from_utf8_lossy(&script))
        }
    }
}

/// Libraries that we use warn about what they work around, such as a damaged artifact that a list leaves out.
fn init_logs() {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing_subscriber::filter::LevelFilter::WARN.into())
        .with_env_var("SENSORIUM_LOG")
        .from_env_lossy();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Fails only where a subscriber is installed already, whose owner then decides what is logged.
    let _ = lines.with_target(false).without_time().with_ansi(output::colours()).try_init();
}

fn fail(error: &Error) -> ExitCode {
    let prefix = if output::colours() { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
    // Nobody may listen any more, and the exit code still tells.
    let _ = write!(std::io::stderr(), "{prefix} {}", error.report());
    ExitCode::from(error.exit_code())
}

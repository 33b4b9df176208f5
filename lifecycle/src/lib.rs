//! How a program of Sensorium begins, and how it is asked to end: SIGTERM, SIGINT, or the end of the process that started it.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Set to `1` by a parent that holds the other end of this process's standard input: its end means the same as SIGTERM,
/// so that not even a killed parent leaves processes behind.
pub const EXIT_WITH_PARENT: &str = "SENSORIUM_EXIT_WITH_PARENT";

/// Variable of onnxruntime that keeps it from telling its makers about the machine and the program that it runs on, and from leaving an
/// identity in the home folder. Its interface can turn off only a part of that, and only once it has begun.
pub const NO_ONNXRUNTIME_TELEMETRY: (&str, &str) = ("ORT_DISABLE_TELEMETRY", "1");

/// Starts this program over in its place, once, where the environment lacks any of these variables, which libraries read before `main`
/// or as soon as they are loaded. What the environment says already is left as it is.
pub fn start_over_with(program_name: &str, settings: &[(&str, &str)]) {
    let unset = |setting: &&(&str, &str)| std::env::var_os(setting.0).is_none();
    let missing: Vec<_> = settings.iter().filter(unset).copied().collect();
    let mut arguments = std::env::args_os();
    let (name, Ok(program)) = (arguments.next(), std::env::current_exe()) else { return };
    if missing.is_empty() {
        return;
    }
    let mut again = Command::new(program);
    again.args(arguments).envs(missing);
    if let Some(name) = name {
        again.arg0(name);
    }
    // Returns only where it failed: then everything else is as it would be.
    let error = again.exec();
    eprintln!("{program_name}: could not start over with its settings: {error}");
}

/// Lets this process open as many files as it may: data sets have a file for each thousand samples. The limit that a process begins
/// with is a low one for the sake of programs that still call select(); this is none of them.
pub fn open_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    // Where that is not let, opening them says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Listens from this call on, so that nothing is lost during a slow start; what it returns completes when somebody asks.
/// Call it on a Tokio runtime. The signals never end this process by themselves again, however often they come.
///
/// # Errors
/// When the operating system refuses a signal handler.
pub fn asked_to_end() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let orphaned = orphaned();
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = orphaned => {}
        }
    })
}

/// Completes when the parent is gone, if it asked to be followed.
fn orphaned() -> impl Future<Output = ()> + Send + 'static {
    let (gone, ended) = oneshot::channel();
    let follows = std::env::var_os(EXIT_WITH_PARENT).is_some_and(|value| value == "1");
    if follows {
        // Reading blocks and cannot be cancelled; this thread ends with the process. Nothing is ever sent.
        std::thread::spawn(move || {
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            let _ = gone.send(());
        });
    }
    async move {
        if !follows || ended.await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

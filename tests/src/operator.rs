//! The operator itself, as a process against the test's API server.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How much of the log a failed test shows.
const SHOWN_LINES: usize = 80;
const POLL: Duration = Duration::from_millis(20);

/// A `sensorium-operator` that was started. It is killed when this is dropped, and a test that fails shows the end of
/// its log.
pub struct Operator {
    program: PathBuf,
    arguments: Vec<String>,
    folder: TempDir,
    http: SocketAddr,
    child: Child,
}

impl Operator {
    /// Starts it with a kubeconfig, for one namespace, with images that need not exist, as the only replica; `arguments`
    /// come last, and the last one of a flag wins.
    ///
    /// # Errors
    /// When the program has not been built.
    pub fn start(kubeconfig: &Path, namespace: &str, arguments: &[&str]) -> Result<Self> {
        let program = programs().join("sensorium-operator");
        ensure!(
            program.is_file(),
            "{} is not there: run `cargo build --release` first, or set SENSORIUM_BIN_DIR to where it is",
            program.display()
        );
        // Free now, and given to nobody else soon: the kernel goes through all ports before it repeats one.
        let http = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let folder = TempDir::with_prefix("sensorium-operator-")?;
        fs::copy(kubeconfig, folder.path().join("kubeconfig")).context("the kubeconfig")?;
        let defaults = [
            ("namespace", namespace),
            ("trainer-image", "sensorium.dev/sensorium-trainer:test"),
            ("server-image", "sensorium.dev/sensorium-server:test"),
            ("cli-image", "sensorium.dev/sensorium-cli:test"),
            ("http-addr", &http.to_string()),
            ("leader-elect", "false"),
            ("lease-namespace", namespace),
        ];
        let given = |flag: &str| arguments.iter().any(|argument| argument.starts_with(&format!("--{flag}=")));
        let defaults = defaults.into_iter().filter(|(flag, _)| !given(flag));
        let all = defaults.map(|(flag, value)| format!("--{flag}={value}"));
        let arguments: Vec<String> = all.chain(arguments.iter().map(|&argument| argument.to_owned())).collect();
        let child = spawn(&program, &arguments, folder.path())?;
        Ok(Self { program, arguments, folder, http, child })
    }

    /// Waits until `/readyz` answers with 200.
    ///
    /// # Errors
    /// When it does not within `limit`, or the operator ends.
    pub fn wait_until_ready(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.get("/readyz");
            if answer.as_ref().is_ok_and(|(status, _)| *status == 200) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the operator has ended: {status}");
            }
            if Instant::now() > deadline {
                bail!("the operator is not ready after {} s: {answer:?}", limit.as_secs());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Status and body of `GET PATH` (`/metrics`, `/livez`, `/readyz`).
    ///
    /// # Errors
    /// When it does not answer.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect(self.http)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        // HTTP/1.0: the body ends with the connection.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.http)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer has a head")?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("an answer has a status")?;
        Ok((status, body.to_owned()))
    }

    /// Ends it without a chance to clean up.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    ///
    /// # Errors
    /// When it has not within `limit`.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        self.wait(limit)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// When it has not within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(status),
                None if Instant::now() > deadline => bail!("still running after {} s", limit.as_secs()),
                None => std::thread::sleep(POLL),
            }
        }
    }

    /// Starts it again, as it was started first; the log goes on.
    ///
    /// # Errors
    /// When it still runs.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.child.try_wait()?.is_some(), "the operator still runs");
        self.child = spawn(&self.program, &self.arguments, self.folder.path())?;
        Ok(())
    }

    /// The process id, to read its memory or stop it for a while.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything that it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // Fails where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The test runner shows this only for tests that fail.
        let log = self.log();
        let skipped = log.lines().count().saturating_sub(SHOWN_LINES);
        eprintln!("--- the operator's log, without its first {skipped} lines");
        for line in log.lines().skip(skipped) {
            eprintln!("{line}");
        }
    }
}

/// Where the built programs are.
pub(crate) fn programs() -> PathBuf {
    std::env::var_os("SENSORIUM_BIN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release"), PathBuf::from)
}

fn spawn(program: &Path, arguments: &[String], folder: &Path) -> Result<Child> {
    let log: File = OpenOptions::new().create(true).append(true).open(folder.join("log"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("KUBECONFIG", folder.join("kubeconfig"))
        .env("SENSORIUM_LOG", "info,sensorium_operator=debug");
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| program.display().to_string())
}

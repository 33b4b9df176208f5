//! Runs a test body on several ranks. Ranks are processes, so the test binary starts itself again, once per rank, with
//! the launch contract in the environment and the running test as its filter.

use std::any::type_name;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio, exit};
use std::thread;
use std::time::Duration;

use sensorium_dist::{Launch, Patience, ProcessGroup};

/// How long a rank may take. Reaching it is a failure: nothing here may hang.
const LIMIT: Duration = Duration::from_secs(30);
/// How long ranks wait for each other to start: however busy the machine is, they have all loaded libtorch by then.
pub(crate) const JOINING: Duration = Duration::from_secs(20);
const OVER_LIMIT: i32 = 99;
const SIGABRT: i32 = 6;
/// How a rank leaves that is to die.
const DEAD: i32 = 3;

/// A group of processes to run a body in.
pub(crate) struct Ranks {
    size: u32,
    timeout: Duration,
    dying: Option<u32>,
    aborting: bool,
}

/// `size` ranks, which all have to succeed.
pub(crate) fn ranks(size: u32) -> Ranks {
    Ranks { size, timeout: Duration::from_secs(20), dying: None, aborting: false }
}

/// Ends this process without any goodbye, as a crash does.
pub(crate) fn die() -> ! {
    exit(DEAD)
}

impl Ranks {
    /// Sets the timeout of the group's operations.
    pub(crate) fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Says which rank is to [`die`].
    pub(crate) fn dying(self, rank: u32) -> Self {
        Self { dying: Some(rank), ..self }
    }

    /// Lets ranks end by an abort instead.
    pub(crate) fn aborting(self) -> Self {
        Self { aborting: true, ..self }
    }

    /// Runs `body` with the group of each rank.
    pub(crate) fn run<F: Fn(&ProcessGroup)>(self, body: F) {
        let patience = Patience::new(JOINING, self.timeout);
        self.start(&test_name::<F>(), |launch| body(&launch.connect(&patience).expect("the ranks meet")));
    }

    /// Runs `body` in each rank, which may or may not connect.
    pub(crate) fn launch<F: Fn(&Launch)>(self, body: F) {
        self.start(&test_name::<F>(), body);
    }

    /// Called a first time by the test, it starts the processes; called again in each of them, it runs the body.
    fn start(self, test: &str, body: impl Fn(&Launch)) {
        if std::env::var_os("RANK").is_some() {
            thread::spawn(|| {
                thread::sleep(LIMIT);
                eprintln!("not done after {LIMIT:?}");
                exit(OVER_LIMIT);
            });
            // Several processes share the machine's cores.
            tch::set_num_threads(1);
            return body(&Launch::from_env().expect("the environment describes a rank"));
        }
        let port = free_port();
        let processes: Vec<_> = (0..self.size)
            .map(|rank| {
                Command::new(std::env::current_exe().expect("this binary has a path"))
                    .args([test, "--exact", "--nocapture", "--test-threads=1"])
                    .env("RANK", rank.to_string())
                    .env("LOCAL_RANK", rank.to_string())
                    .env("WORLD_SIZE", self.size.to_string())
                    .env("MASTER_ADDR", "127.0.0.1")
                    .env("MASTER_PORT", port.to_string())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .expect("a rank starts")
            })
            .collect();
        // Waited for at once: a full pipe must not hold a rank up.
        let waits: Vec<_> = processes.into_iter().map(|process| thread::spawn(|| process.wait_with_output())).collect();
        let mut failures = Vec::new();
        for (rank, wait) in (0..).zip(waits) {
            let output = wait.join().expect("waiting does not panic").expect("a rank can be waited for");
            let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let well = if self.dying == Some(rank) {
                output.status.code() == Some(DEAD)
            } else {
                // A wrong filter would run no test, and succeed.
                output.status.success() && out.contains("1 passed")
            };
            let aborted = self.aborting && output.status.signal() == Some(SIGABRT);
            if !well && !aborted {
                failures.push(format!("---- rank {rank}: {}\n{out}{err}", output.status));
            }
        }
        assert!(failures.is_empty(), "{test}:\n{}", failures.join("\n"));
    }
}

/// The name of the test that a closure stands in (so the body has to be a closure, not a function): `groups::values::a_test::{{closure}}` is `values::a_test`.
fn test_name<F>() -> String {
    let path = type_name::<F>().split("::{{closure}}").next().unwrap_or_default();
    let (_crate, test) = path.split_once("::").expect("a test lives in a crate");
    test.to_owned()
}

fn free_port() -> u16 {
    let probe = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
    probe.local_addr().expect("a bound socket has an address").port()
}

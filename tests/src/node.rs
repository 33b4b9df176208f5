//! A real Kubernetes node: kubelet, containerd, Services and cluster DNS, in namespaces of its own. Needs root.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::FakeGpus;

const POLL: Duration = Duration::from_millis(500);

/// A cluster with one node. `scripts/cluster run` holds it, and takes it down when this program ends, in whichever way.
pub struct Node {
    _holder: Child,
    state: PathBuf,
}

impl Node {
    /// Whether this process may make one: root, and not of a container that keeps root from making namespaces. That is said past
    /// the test runner, which shows nothing of tests that pass.
    pub fn is_possible() -> bool {
        if !rustix::process::geteuid().is_root() {
            return false;
        }
        // As scripts/cluster does.
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--pid", "--fork", "--mount-proc", "true"]);
        let made = finish(&mut command, "there are none");
        if let Err(error) = &made {
            let error = format!("{error:#}");
            // Whoever closed it does not want to know.
            let _ = writeln!(
                std::io::stderr(),
                "not run: a node needs namespaces and mounts, for which root needs CAP_SYS_ADMIN; {}",
                error.trim_end()
            );
        }
        made.is_ok()
    }

    /// Starts one; that takes about twenty seconds.
    ///
    /// # Errors
    /// When it does not start; the script has said why.
    pub fn start() -> Result<Self> {
        let state = TempDir::with_prefix("sensorium-node-")?.path().to_owned();
        let mut command = Command::new(scripts().join("cluster"));
        command.args(["run", "node"]).arg(&state).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = command.spawn().context("scripts/cluster")?;
        let mut line = String::new();
        BufReader::new(holder.stdout.take().context("its output is a pipe")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "scripts/cluster run node did not start a cluster; it says why above");
        Ok(Self { _holder: holder, state })
    }

    /// Its folder on this machine; the kubelet's is `kubelet/root` in it.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// A program on the node's network, with `KUBECONFIG` set and the cluster's programs (`kubectl`, `helm`, `ctr`) at hand.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(scripts().join("cluster"));
        command.arg("exec").arg(&self.state).arg(program).args(arguments);
        command
    }

    /// Runs a program to its end and returns what it printed.
    ///
    /// # Errors
    /// When it fails; with what it said.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        finish(&mut self.command(program, arguments), &format!("{program} {}", arguments.join(" ")))
    }

    /// `kubectl ARGUMENTS`.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.run("kubectl", arguments)
    }

    /// `kubectl apply` of a text.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        let mut command = self.command("kubectl", &["apply", "--server-side", "--filename", "-"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("its input is a pipe")?.write_all(manifest.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "kubectl apply: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// An object, or nothing where there is none.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Result<Option<Value>> {
        let text =
            self.kubectl(&["get", kind, name, "--namespace", namespace, "--ignore-not-found", "--output", "json"])?;
        if text.trim().is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&text)?)) }
    }

    /// The objects that match a label selector.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn list(&self, kind: &str, namespace: &str, selector: &str) -> Result<Vec<Value>> {
        let text =
            self.kubectl(&["get", kind, "--namespace", namespace, "--selector", selector, "--output", "json"])?;
        let mut list: Value = serde_json::from_str(&text)?;
        Ok(list["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// Waits until `look` finds something. A look that fails, because the API server is away, is repeated.
    ///
    /// # Errors
    /// When nothing is found within `limit`; with all pods and events.
    pub fn eventually<T>(&self, what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            let found = look();
            if let Ok(Some(found)) = found {
                return Ok(found);
            }
            if Instant::now() > deadline {
                bail!(
                    "not within {} s: {what}{}\n{}",
                    limit.as_secs(),
                    found.err().map(|error| format!(" ({error})")).unwrap_or_default(),
                    self.all_there_is(),
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// All pods, jobs and events, and the last words of operators and of pods that failed.
    fn all_there_is(&self) -> String {
        const OPERATORS: [&str; 6] = [
            "--namespace",
            "sensorium-system",
            "--selector",
            "app.kubernetes.io/name=sensorium-operator",
            "--tail",
            "30",
        ];
        let mut texts = vec![
            self.kubectl(&["get", "pods,tj,cpj,sj,ma,jobs", "--all-namespaces", "--output", "wide"]),
            self.kubectl(&["get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"]),
            self.kubectl(&[&["logs"], &OPERATORS[..]].concat()),
        ];
        let path = "jsonpath={range .items[*]}{.metadata.namespace} {.metadata.name}{\"\\n\"}{end}";
        let failed = self.kubectl(&["get", "pods", "-A", "--field-selector", "status.phase=Failed", "--output", path]);
        for pod in failed.unwrap_or_default().lines() {
            let Some((namespace, name)) = pod.split_once(' ') else { continue };
            let said = self.kubectl(&["logs", "--namespace", namespace, name, "--tail", "10"]);
            texts.push(said.map(|said| format!("{pod}: {said}")));
        }
        texts.into_iter().map(Result::unwrap_or_default).collect::<Vec<_>>().join("\n")
    }

    /// Ends containers at once, as the kernel does when memory runs out: all that run, or those of one pod.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub fn kill_containers(&self, pod: Option<&Value>) -> Result<usize> {
        let wanted: Vec<String> = match pod {
            Some(pod) => {
                let statuses = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
                let ids = statuses.iter().filter_map(|status| status["containerID"].as_str());
                ids.map(|id| id.trim_start_matches("containerd://").to_owned()).collect()
            }
            None => self.run("ctr", &["tasks", "list", "--quiet"])?.lines().map(str::to_owned).collect(),
        };
        let mut killed = 0;
        for id in &wanted {
            match self.run("ctr", &["tasks", "kill", "--signal", "SIGKILL", id]) {
                Ok(_) => killed += 1,
                // Of many, some may have ended by themselves.
                Err(error) if pod.is_some() => return Err(error),
                Err(_) => {}
            }
        }
        Ok(killed)
    }

    /// Offers GPUs that do not exist to the kubelet, until what is returned is dropped: see [`FakeGpus::offer`].
    ///
    /// # Errors
    /// When the kubelet refuses.
    pub fn offer_gpus(&self, resource: &str, devices: &[&str]) -> Result<FakeGpus> {
        let process = fs::read_to_string(self.state.join("pids/node"))?;
        let process = process.split(' ').next().unwrap_or_default();
        // The kubelet's folder, in the node's own view of the file system.
        let folder = format!("/proc/{process}/root/var/lib/kubelet/device-plugins");
        FakeGpus::offer(Path::new(&folder), resource, devices)
    }

    /// Ends the API server at once; the node starts it again.
    ///
    /// # Errors
    /// When it cannot be found.
    pub fn kill_api_server(&self) -> Result<()> {
        finish(
            Command::new(scripts().join("cluster")).args(["kill"]).arg(&self.state).arg("kube-apiserver"),
            "scripts/cluster kill",
        )
        .map(drop)
    }
}

fn finish(command: &mut Command, what: &str) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| what.to_owned())?;
    ensure!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Builds the container images of the programs, or takes those that were built of the same programs before; gives the
/// archives.
///
/// # Errors
/// When they cannot be built; the script says why.
pub fn images() -> Result<Vec<PathBuf>> {
    let mut command = Command::new(scripts().join("images"));
    command.env("SENSORIUM_BIN", crate::operator::programs()).env("SENSORIUM_TAG", "test");
    let said = finish(&mut command, "scripts/images")?;
    let archives = said.lines().filter_map(|line| line.split('\t').nth(1)).map(PathBuf::from);
    Ok(archives.collect())
}

/// The Python with the pinned clients, and what a container needs to see of this machine to run it: the same paths.
///
/// # Errors
/// When the environment cannot be made.
pub fn python() -> Result<(String, Vec<String>)> {
    let python = finish(&mut Command::new(scripts().join("test-env")), "scripts/test-env")?.trim().to_owned();
    let prefix = finish(Command::new(&python).args(["-c", "import sys; print(sys.base_prefix)"]), &python)?;
    let environment =
        Path::new(&python).ancestors().nth(2).context("an environment has a folder")?.display().to_string();
    let mut folders = vec![environment, "/lib".to_owned(), "/lib64".to_owned(), "/usr/lib".to_owned()];
    if prefix.trim() == "/usr" {
        folders.push("/usr/bin".to_owned());
    } else {
        folders.push(prefix.trim().to_owned());
    }
    Ok((python, folders))
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts")
}

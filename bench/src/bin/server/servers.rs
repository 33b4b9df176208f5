//! The servers that are measured: each a tree of processes on the first core, or on the first half of them beside a GPU.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::thread::{CpuSet, sched_setaffinity};
use sensorium_engine::Device;

use crate::cases::Case;
use crate::load::{Message, Protocol, ask_once};

/// Servers take their time: Python imports, first runs.
const START_LIMIT: Duration = Duration::from_mins(2);

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// `sensorium-server`, or `sensorium-server-torch` where that is needed.
    Ours,
    /// Triton Inference Server, with its Python backend around onnxruntime or torch.
    Triton,
    /// KServe's Python runtime around the same.
    Kserve,
    /// The messages and nothing else.
    Echo,
    /// The same, but the model is run in between, by the thread that reads and writes.
    Inline,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Triton => "triton",
            Self::Kserve => "kserve",
            Self::Echo => "echo",
            Self::Inline => "inline",
        }
    }
}

/// What all servers need.
pub(crate) struct Setting {
    /// Python of the environment that has the peers.
    pub(crate) python: PathBuf,
    /// Folder with the peers' scripts.
    pub(crate) scripts: PathBuf,
    /// Folder with the models.
    pub(crate) models: PathBuf,
    /// Folder for repositories and logs.
    pub(crate) work: PathBuf,
    /// Where models run.
    pub(crate) device: Device,
    pub(crate) cores: Cores,
}

/// How many cores a server has, from the first on, and its client, behind those.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores(usize);

impl Cores {
    /// One each where models run on them, half each where they run on a GPU.
    pub(crate) fn of_this_machine(device: Device) -> Result<Self> {
        let cores = std::thread::available_parallelism()?.get();
        ensure!(cores >= 2, "the server and its client need a core each, this machine has {cores}");
        Ok(Self(if device == Device::Cpu { 1 } else { cores / 2 }))
    }

    /// Puts this thread, and those that it starts, where the client belongs.
    pub(crate) fn be_the_client(self) -> Result<()> {
        let mut own = CpuSet::new();
        (self.0..2 * self.0).for_each(|core| own.set(core));
        Ok(sched_setaffinity(None, &own)?)
    }

    /// `program` where servers belong. It ends with this program, also where a signal ends that.
    pub(crate) fn server(self, program: &Path) -> Command {
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", &format!("0-{}", self.0 - 1), "setpriv", "--pdeathsig", "KILL"]).arg(program);
        command
    }
}

/// A server that runs. Dropping it ends it with all its processes.
pub(crate) struct Server {
    pub(crate) kind: Kind,
    child: Child,
    grpc: u16,
    http: u16,
    /// Seconds from its start to its first answer.
    pub(crate) start_seconds: f64,
    /// MiB of its own after its first answer, shared pages counted by their share.
    pub(crate) idle_mebibytes: f64,
}

impl Server {
    /// Starts a server with one model, and waits for its first answer.
    pub(crate) fn start(kind: Kind, setting: &Setting, case: &Case, config: &str, message: &Message) -> Result<Self> {
        let folder = setting.work.join(kind.name());
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        let ports = free_ports()?;
        let mut command = match kind {
            Kind::Ours => ours(&folder, setting, case, config, ports)?,
            Kind::Triton => triton(&folder, setting, case, config, ports)?,
            Kind::Kserve => kserve(setting, case, ports),
            Kind::Echo | Kind::Inline => bail!("an echo is started with the answer that it gives"),
        };
        Self::wait(kind, &mut command, &folder, ports, message)
    }

    /// Starts a server that answers everything with what `grpc` and `http` have answered; with `runs` it runs the model, too.
    pub(crate) fn echo(
        setting: &Setting,
        (grpc, http): (&[u8], &[u8]),
        message: &Message,
        runs: Option<&Case>,
    ) -> Result<Self> {
        let kind = if runs.is_some() { Kind::Inline } else { Kind::Echo };
        let folder = setting.work.join(kind.name());
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("grpc"), grpc)?;
        fs::write(folder.join("http"), http)?;
        let ports = free_ports()?;
        let mut command = setting.cores.server(&std::env::current_exe()?);
        command.arg("echo").arg(folder.join("grpc")).arg(folder.join("http"));
        command.args([ports[0].to_string(), ports[1].to_string()]);
        if let Some(case) = runs {
            command.arg(case.name).arg(&setting.models);
        }
        Self::wait(kind, &mut command, &folder, ports, message)
    }

    fn wait(kind: Kind, command: &mut Command, folder: &Path, ports: [u16; 3], message: &Message) -> Result<Self> {
        let log = folder.join("log");
        let file = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        let started = Instant::now();
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        let [grpc, http, _] = ports;
        let mut server = Self { kind, child, grpc, http, start_seconds: 0.0, idle_mebibytes: 0.0 };
        loop {
            let answer = ask_once(grpc, Protocol::Grpc, message).and_then(|_| ask_once(http, Protocol::Http, message));
            if answer.is_ok() {
                break;
            }
            if server.child.try_wait()?.is_some() || started.elapsed() > START_LIMIT {
                let log = fs::read_to_string(&log).unwrap_or_default();
                bail!("{} does not answer: {answer:?}\n{log}", kind.name());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        server.start_seconds = started.elapsed().as_secs_f64();
        server.idle_mebibytes = mebibytes(server.child.id())?;
        Ok(server)
    }

    pub(crate) fn port(&self, protocol: Protocol) -> u16 {
        match protocol {
            Protocol::Grpc => self.grpc,
            Protocol::Http => self.http,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // Fails where all have ended already.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn ours(folder: &Path, setting: &Setting, case: &Case, config: &str, ports: [u16; 3]) -> Result<Command> {
    let repository = folder.join("repository");
    fill(&repository, case, &setting.models, config)?;
    let program = if case.is_torchscript() { "sensorium-server-torch" } else { "sensorium-server" };
    let program = std::env::current_exe()?.with_file_name(program);
    ensure!(program.is_file(), "{} is not there: run `make build`", program.display());
    let mut command = setting.cores.server(&program);
    command.arg("--model-repository").arg(repository);
    for (flag, port) in ["--grpc-addr", "--http-addr", "--metrics-addr"].into_iter().zip(ports) {
        command.arg(format!("{flag}=127.0.0.1:{port}"));
    }
    Ok(command)
}

fn triton(folder: &Path, setting: &Setting, case: &Case, config: &str, ports: [u16; 3]) -> Result<Command> {
    let (repository, backends) = (folder.join("repository"), folder.join("backends"));
    // It knows no scalars where requests do not batch; its backend's script makes them.
    let config = config.replace("reshape: { shape: [] }", "");
    let version = fill(&repository, case, &setting.models, &config)?;
    fs::copy(setting.scripts.join("triton_model.py"), version.join("model.py"))?;
    let packages = python(&setting.python, "import sysconfig; print(sysconfig.get_path('purelib'))")?;
    let libraries = python(&setting.python, "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))")?;
    let triton = Path::new(&packages).join("pytriton/tritonserver");
    // The backend and the interpreter's stub come in two folders, and are wanted in one.
    let backend = backends.join("python");
    fs::create_dir_all(&backend)?;
    for from in [triton.join("backends/python"), triton.join("python_backend_stubs/3.11")] {
        for entry in fs::read_dir(&from).with_context(|| from.display().to_string())? {
            let entry = entry?;
            symlink(entry.path(), backend.join(entry.file_name()))?;
        }
    }
    let mut command = setting.cores.server(&triton.join("bin/tritonserver"));
    command.arg("--model-repository").arg(repository).arg("--backend-directory").arg(backends);
    for (flag, port) in ["--grpc-port", "--http-port", "--metrics-port"].into_iter().zip(ports) {
        command.arg(format!("{flag}={port}"));
    }
    command.env("LD_LIBRARY_PATH", format!("{libraries}:{packages}/nvidia_pytriton.libs"));
    command.env("BENCH_PYTHON_PATH", format!("{}:{packages}", setting.scripts.display()));
    Ok(command)
}

fn kserve(setting: &Setting, case: &Case, ports: [u16; 3]) -> Command {
    let mut command = setting.cores.server(&setting.python);
    command.arg(setting.scripts.join("kserve_server.py")).arg(case.name).arg(case.path(&setting.models));
    command.args([ports[1].to_string(), ports[0].to_string()]);
    command
}

/// A repository of one model; the folder of its version.
fn fill(repository: &Path, case: &Case, models: &Path, config: &str) -> Result<PathBuf> {
    let model = repository.join(case.name);
    let version = model.join("1");
    fs::create_dir_all(&version)?;
    fs::write(model.join("config.pbtxt"), config)?;
    symlink(case.path(models).canonicalize()?, version.join(case.served_as()))?;
    Ok(version)
}

/// What a line of Python prints.
fn python(interpreter: &Path, line: &str) -> Result<String> {
    let output = Command::new(interpreter).args(["-c", line]).output().context("python")?;
    ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Ports that nobody listens on now.
fn free_ports() -> Result<[u16; 3]> {
    let mut listeners = Vec::new();
    for _ in 0..3 {
        listeners.push(TcpListener::bind("127.0.0.1:0")?);
    }
    let mut ports = [0; 3];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

/// Memory of a process and all that it started.
fn mebibytes(root: u32) -> Result<f64> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // One that has ended meanwhile is nobody's.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<u32>().ok());
        parents.extend(parent.map(|parent| (id, parent)));
    }
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(&parent) = tree.get(next) {
        tree.extend(parents.iter().filter(|(_, own)| *own == parent).map(|(id, _)| *id));
        next += 1;
    }
    let mut kibibytes = 0.0;
    for id in tree {
        let Ok(rollup) = fs::read_to_string(format!("/proc/{id}/smaps_rollup")) else { continue };
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("the kernel tells no Pss")?;
        kibibytes += line.trim().trim_end_matches(" kB").parse::<f64>()?;
    }
    Ok(kibibytes / 1024.0)
}

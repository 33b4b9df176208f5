//! Starts workers as the local backend does, and reads what they leave.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use sensorium_api::run::{HistoryPoint, RunResult};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than any run here takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(5);

/// easy-VQA as shards, imported once per test binary.
fn datasets() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let source = std::env::var_os("SENSORIUM_EASY_VQA").expect("SENSORIUM_EASY_VQA is set by `make setup`");
            sensorium_data::import::easy_vqa(Path::new(&source), &folder.path().join("easy-vqa"), |_| {}).unwrap();
            folder
        })
        .path()
}

/// Volumes of one test.
pub struct State {
    folder: TempDir,
}

impl State {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn artifacts(&self) -> PathBuf {
        self.folder.path().join("artifacts")
    }
}

/// A training job to be.
pub struct Job<'a> {
    state: &'a State,
    config: Value,
    checkpoints: String,
    file_size_limit_kib: Option<u32>,
}

impl<'a> Job<'a> {
    pub fn new(state: &'a State, name: &str) -> Self {
        let tower = |more: Value| {
            let mut tower = json!({ "layers": 1, "width": 32, "heads": 2 });
            tower.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            tower
        };
        let stem = json!([
            { "channels": 12, "kernel": 5, "stride": 4, "padding": 2 },
            { "channels": 32, "kernel": 5, "stride": 4, "padding": 1 },
        ]);
        let config = json!({
            "job": { "kind": "TrainingJob", "namespace": "default", "name": name },
            "specHash": "sha256:0123456789abcdef",
            "spec": {
                "model": { "architecture": {
                    "width": 32,
                    "text": tower(json!({ "maxLength": 10 })),
                    "image": tower(json!({ "size": 64, "stem": stem })),
                    "fusion": { "layers": 1, "heads": 2 },
                    "embeddingDim": 16,
                } },
                "data": { "train": "pvc://datasets/easy-vqa/train", "evaluation": "pvc://datasets/easy-vqa/test" },
                "tasks": [{ "type": "vqa" }],
                "training": {
                    "steps": 10,
                    "batch": { "images": 16, "questionsPerImage": 2 },
                    "optimizer": { "learningRate": 1e-3, "warmupSteps": 10 },
                    "augment": { "horizontalFlip": true },
                },
                "checkpoint": { "everySteps": 1000 },
                "output": { "artifact": name },
            },
        });
        Self { state, config, checkpoints: name.to_owned(), file_size_limit_kib: None }
    }

    fn spec(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.config["spec"]);
        self
    }

    pub fn steps(self, steps: u64) -> Self {
        self.spec(|spec| spec["training"]["steps"] = steps.into())
    }

    pub fn checkpoint_every(self, steps: u64) -> Self {
        self.spec(|spec| spec["checkpoint"]["everySteps"] = steps.into())
    }

    pub fn activation_checkpointing(self) -> Self {
        self.spec(|spec| spec["training"]["activationCheckpointing"] = true.into())
    }

    pub fn data(self, uri: &str) -> Self {
        self.spec(|spec| spec["data"]["train"] = uri.into())
    }

    /// Begins with the weights of an artifact of the store.
    pub fn begins_with(self, artifact: &str) -> Self {
        self.spec(|spec| spec["model"] = json!({ "artifact": artifact }))
    }

    pub fn tasks(self, tasks: &[(&str, f64)]) -> Self {
        let tasks: Vec<Value> = tasks.iter().map(|(name, weight)| json!({ "type": name, "weight": weight })).collect();
        self.spec(|spec| spec["tasks"] = tasks.into())
    }

    pub fn images(self, images: u32) -> Self {
        self.spec(|spec| spec["training"]["batch"]["images"] = images.into())
    }

    /// Keeps checkpoints apart from those of a run with the same name.
    pub fn checkpoints(mut self, folder: &str) -> Self {
        folder.clone_into(&mut self.checkpoints);
        self
    }

    pub fn file_size_limit_kib(mut self, limit: u32) -> Self {
        // Another folder too: the run must not go on from what is there.
        self.checkpoints += "-limited";
        self.file_size_limit_kib = Some(limit);
        self
    }

    pub fn run(&self, workers: u32) -> Ended {
        self.start(workers).wait()
    }

    pub fn start(&self, workers: u32) -> Workers {
        let run = self.prepare(workers);
        let master = free_port().to_string();
        let workers = (0..workers).map(|rank| {
            let mut command = self.command();
            command
                .args(run.train(rank == 0))
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", workers.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", &master)
                .stdin(Stdio::null());
            run.spawn(command, rank)
        });
        let children = workers.collect();
        Workers { children, run }
    }

    /// One pod that starts all workers itself; its only process here is the launcher.
    pub fn launch(&self, processes: u32) -> Workers {
        let run = self.prepare(processes);
        let mut command = self.command();
        command
            .args(["launch", "--processes", &processes.to_string(), "--"])
            .args(run.train(true))
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", free_port().to_string())
            .stdin(Stdio::null());
        let children = vec![run.spawn(command, 0)];
        Workers { children, run }
    }

    fn prepare(&self, workers: u32) -> Run {
        let state = self.state.folder.path();
        let folder = tempfile::Builder::new().prefix("run-").tempdir_in(state).unwrap().keep();
        let mut value = self.config.clone();
        value["spec"]["workers"] = workers.into();
        value["spec"]["parallelism"] = json!({ "data": workers });
        fs::write(folder.join("job.json"), value.to_string()).unwrap();
        let checkpoints = state.join("checkpoints").join(&self.checkpoints);
        let curves = checkpoints.join("default").join(self.config["job"]["name"].as_str().unwrap());
        Run { folder, artifacts: self.state.artifacts(), checkpoints, curves, progress: free_port() }
    }

    fn command(&self) -> Command {
        let Some(limit) = self.file_size_limit_kib else {
            return Command::new(env!("CARGO_BIN_EXE_sensorium-trainer"));
        };
        // The signal that goes with the limit is ignored, as on a full disk: the write fails instead.
        let mut shell = Command::new("bash");
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$@\"");
        shell.args(["-c", &script, "bash", env!("CARGO_BIN_EXE_sensorium-trainer")]);
        shell
    }
}

/// Files and ports of a job that was started.
#[derive(Clone)]
struct Run {
    folder: PathBuf,
    artifacts: PathBuf,
    checkpoints: PathBuf,
    curves: PathBuf,
    progress: u16,
}

impl Run {
    /// Arguments of a worker; one that may be rank 0 gets those that rank 0 alone uses.
    fn train(&self, may_be_first: bool) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let volume = |claim: &str, folder: &Path| ["--volume".to_owned(), format!("{claim}={}", folder.display())];
        let mut args = vec!["train".to_owned(), "--config".to_owned(), path(&self.folder.join("job.json"))];
        args.extend(volume("datasets", datasets()));
        args.extend(volume("artifacts", &self.artifacts));
        args.extend(volume("checkpoints", &self.checkpoints));
        if may_be_first {
            args.extend(["--progress-addr".to_owned(), format!("127.0.0.1:{}", self.progress)]);
            args.extend(["--result-file".to_owned(), path(&self.folder.join("result.json"))]);
        }
        args
    }

    fn spawn(&self, mut command: Command, rank: u32) -> Child {
        let log = fs::File::create(self.folder.join(format!("{rank}.log"))).unwrap();
        command.env("OMP_NUM_THREADS", "1").stderr(log).spawn().unwrap()
    }
}

/// `kill -9` and the like, for a process that is not a child of this one.
pub fn kill(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

fn children_of(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let line = format!("PPid:\t{parent}");
    let is_child = |id: &u32| {
        fs::read_to_string(format!("/proc/{id}/status")).is_ok_and(|status| status.lines().any(|it| it == line))
    };
    ids.filter(is_child).collect()
}

/// Blocks until none of these processes is there any more.
pub fn wait_for_end(processes: &[u32]) {
    let deadline = Instant::now() + PATIENCE;
    // An orphan may have been inherited by a process that never looks at its end: it stays as a zombie.
    let lives =
        |id: &u32| fs::read_to_string(format!("/proc/{id}/status")).is_ok_and(|status| !status.contains("State:\tZ"));
    while processes.iter().any(lives) {
        assert!(Instant::now() < deadline, "one of {processes:?} did not end");
        sleep(Duration::from_millis(20));
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Processes that run; dropping kills them.
pub struct Workers {
    children: Vec<Child>,
    run: Run,
}

impl Drop for Workers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Workers {
    /// Blocks until rank 0 has done this many steps.
    pub fn wait_for_step(&self, step: u64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if support_http::get_json(self.run.progress, "/progress")
                .is_some_and(|it| it["step"].as_u64() >= Some(step))
            {
                return;
            }
            assert!(Instant::now() < deadline, "step {step} never came: {}", self.log());
            sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.run.folder.join("0.log")).unwrap_or_default()
    }

    /// kill -9 for all.
    pub fn kill(mut self) {
        self.children.iter_mut().for_each(|child| child.kill().unwrap());
    }

    /// kill -9 for one.
    pub fn kill_rank(&self, rank: usize) {
        self.signal(rank, "-KILL");
    }

    pub fn terminate(&self) {
        (0..self.children.len()).for_each(|rank| self.signal(rank, "-TERM"));
    }

    fn signal(&self, rank: usize, signal: &str) {
        kill(self.children[rank].id(), signal);
    }

    /// Process ids of the workers that a launcher has started.
    pub fn launched(&self) -> Vec<u32> {
        children_of(self.children[0].id())
    }

    pub fn wait(self) -> Ended {
        self.wait_at_most(PATIENCE)
    }

    pub fn wait_at_most(mut self, patience: Duration) -> Ended {
        let deadline = Instant::now() + patience;
        let codes = (0..self.children.len()).map(|rank| self.code_of(rank, deadline)).collect();
        Ended { codes, run: self.run.clone() }
    }

    /// The exit code of a rank; none where a signal ended it.
    fn code_of(&mut self, rank: usize, deadline: Instant) -> Option<i32> {
        loop {
            if let Some(status) = self.children[rank].try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "rank {rank} did not end: {}", self.log());
            sleep(Duration::from_millis(20));
        }
    }
}

/// A job whose workers have ended.
pub struct Ended {
    codes: Vec<Option<i32>>,
    run: Run,
}

impl Ended {
    pub fn expect_success(self) -> Self {
        assert!(self.codes.iter().all(|code| *code == Some(0)), "{:?}: {}", self.codes, self.log());
        self
    }

    pub fn exit_codes(&self) -> &[Option<i32>] {
        &self.codes
    }

    pub fn result(&self) -> RunResult {
        serde_json::from_slice(&fs::read(self.run.folder.join("result.json")).unwrap()).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.run.folder.join("0.log")).unwrap()
    }

    /// The loss of every step.
    pub fn losses(&self) -> Vec<f64> {
        let text = fs::read_to_string(self.run.curves.join("history.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str::<HistoryPoint>(line).unwrap().loss).collect()
    }

    /// Committed checkpoints.
    pub fn checkpoints(&self) -> Vec<PathBuf> {
        let Ok(specs) = fs::read_dir(&self.run.curves) else { return Vec::new() };
        let folders = specs.flatten().filter(|entry| entry.path().is_dir());
        let steps = folders.flat_map(|entry| fs::read_dir(entry.path()).unwrap().flatten());
        let mut steps: Vec<_> = steps.map(|step| step.path()).filter(|path| path.join("index.json").exists()).collect();
        steps.sort();
        steps
    }

    /// What the manifest of the artifact that came of it says of its inputs and outputs.
    pub fn pipeline(&self) -> Value {
        let digest = self.result().artifact.unwrap().digest;
        let folder = self.run.artifacts.join("objects").join(digest.trim_start_matches("sha256:"));
        let manifest: Value = serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap()).unwrap();
        manifest["pipeline"].clone()
    }

    /// Bytes of the newest checkpoint's parameters and moments.
    pub fn weights(&self) -> Vec<u8> {
        fs::read(self.checkpoints().last().unwrap().join("state.safetensors")).unwrap()
    }

    /// The step that the log says the run went on from.
    pub fn resumed_from(&self) -> Option<u64> {
        let log = self.log();
        let line = log.lines().find(|line| line.contains("going on from a checkpoint"))?;
        serde_json::from_str::<Value>(line).unwrap()["step"].as_u64()
    }
}

pub fn assert_curves_agree(one: &[f64], other: &[f64], tolerance: f64) {
    assert_eq!(one.len(), other.len());
    for (step, (a, b)) in one.iter().zip(other).enumerate() {
        assert!((a - b).abs() <= tolerance, "the losses of step {} are {a} and {b}", step + 1);
    }
}

/// Just enough HTTP to ask a worker for its progress.
mod support_http {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    pub fn get_json(port: u16, path: &str) -> Option<serde_json::Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }
}

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
const PATIENCE: Duration = Duration::from_secs(300);

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

    pub fn tasks(self, tasks: &[(&str, f64)]) -> Self {
        let tasks: Vec<Value> = tasks.iter().map(|(name, weight)| json!({ "type": name, "weight": weight })).collect();
        self.spec(|spec| spec["tasks"] = tasks.into())
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
        let folder = self.state.folder.path();
        let run = tempfile::Builder::new().prefix("run-").tempdir_in(folder).unwrap().keep();
        let config = run.join("job.json");
        let mut value = self.config.clone();
        value["spec"]["workers"] = workers.into();
        value["spec"]["parallelism"] = json!({ "data": workers });
        fs::write(&config, value.to_string()).unwrap();
        let (master, progress) = (free_port(), free_port());
        let checkpoints = folder.join("checkpoints").join(&self.checkpoints);
        let children = (0..workers)
            .map(|rank| {
                let mut command = match self.file_size_limit_kib {
                    None => Command::new(env!("CARGO_BIN_EXE_sensorium-trainer")),
                    Some(limit) => {
                        // The signal that goes with the limit is ignored, as on a full disk: the write fails instead.
                        let mut shell = Command::new("bash");
                        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$@\"");
                        shell.args(["-c", &script, "bash", env!("CARGO_BIN_EXE_sensorium-trainer")]);
                        shell
                    }
                };
                command
                    .arg("train")
                    .arg("--config")
                    .arg(&config)
                    .args(["--volume", &format!("datasets={}", datasets().display())])
                    .args(["--volume", &format!("artifacts={}", folder.join("artifacts").display())])
                    .args(["--volume", &format!("checkpoints={}", checkpoints.display())])
                    .env("RANK", rank.to_string())
                    .env("WORLD_SIZE", workers.to_string())
                    .env("MASTER_ADDR", "127.0.0.1")
                    .env("MASTER_PORT", master.to_string())
                    .env("OMP_NUM_THREADS", "1")
                    .stdin(Stdio::null())
                    .stderr(fs::File::create(run.join(format!("{rank}.log"))).unwrap());
                if rank == 0 {
                    command.args(["--progress-addr", &format!("127.0.0.1:{progress}")]);
                    command.arg("--result-file").arg(run.join("result.json"));
                }
                command.spawn().unwrap()
            })
            .collect();
        let name = self.config["job"]["name"].as_str().unwrap();
        let curves = checkpoints.join("default").join(name);
        Workers { children, run, curves, progress }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Processes that run; dropping kills them.
pub struct Workers {
    children: Vec<Child>,
    run: PathBuf,
    curves: PathBuf,
    progress: u16,
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
            if support_http::get_json(self.progress, "/progress").is_some_and(|it| it["step"].as_u64() >= Some(step)) {
                return;
            }
            assert!(Instant::now() < deadline, "step {step} never came: {}", self.log());
            sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.run.join("0.log")).unwrap_or_default()
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
        let pid = self.children[rank].id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    pub fn wait(self) -> Ended {
        self.wait_at_most(PATIENCE)
    }

    pub fn wait_at_most(mut self, patience: Duration) -> Ended {
        let deadline = Instant::now() + patience;
        let mut codes = vec![None; self.children.len()];
        for rank in 0..self.children.len() {
            loop {
                if let Some(status) = self.children[rank].try_wait().unwrap() {
                    codes[rank] = status.code();
                    break;
                }
                assert!(Instant::now() < deadline, "rank {rank} did not end: {}", self.log());
                sleep(Duration::from_millis(20));
            }
        }
        Ended { codes, run: self.run.clone(), curves: self.curves.clone() }
    }
}

/// A job whose workers have ended.
pub struct Ended {
    codes: Vec<Option<i32>>,
    run: PathBuf,
    curves: PathBuf,
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
        serde_json::from_slice(&fs::read(self.run.join("result.json")).unwrap()).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.run.join("0.log")).unwrap()
    }

    /// The loss of every step.
    pub fn losses(&self) -> Vec<f64> {
        let text = fs::read_to_string(self.curves.join("history.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str::<HistoryPoint>(line).unwrap().loss).collect()
    }

    /// Committed checkpoints.
    pub fn checkpoints(&self) -> Vec<PathBuf> {
        let Ok(specs) = fs::read_dir(&self.curves) else { return Vec::new() };
        let folders = specs.flatten().filter(|entry| entry.path().is_dir());
        let steps = folders.flat_map(|entry| fs::read_dir(entry.path()).unwrap().flatten());
        let mut steps: Vec<_> = steps.map(|step| step.path()).filter(|path| path.join("index.json").exists()).collect();
        steps.sort();
        steps
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

//! How fast the model server is: beside Triton and KServe's runtime, the same session in process, and a bare echo.
//!
//! Servers have the first core to themselves, the client has the second. All servers of a model run at the same time, and
//! are asked in turn, as the session in process is: what disturbs the machine disturbs all of them. Ours is the median over rounds; what
//! stands beside it is that by the median of the rounds' ratios, since a machine's speed changes more from round to round than servers
//! differ. p99 is that of all requests of all rounds.

mod cases;
mod ceilings;
mod load;
mod servers;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::{Parser, Subcommand};
use prost::Message as _;
use sensorium_bench::{Better, Report};
use sensorium_engine::Device;
use sensorium_proto::inference::ModelInferResponse;

use crate::cases::{CASES, Case, LONGEST_TEXT, PADDING, texts};
use crate::ceilings::{InProcess, Runs};
use crate::load::{Message, Protocol, Sample, closed_loop};
use crate::servers::{Cores, Kind, Server, Setting};

/// Requests at a time, unless others are asked for.
const CONCURRENCIES: [usize; 4] = [1, 8, 32, 128];
/// From here on a server has enough to do to come near its limit.
const SATURATED: usize = 32;
/// A model of less in process is compared with an echo of its messages.
const TINY: f64 = 0.001;
/// Texts of unequal lengths, and how many are asked at a time.
const TEXTS: usize = 256;
const TEXTS_AT_A_TIME: usize = 32;

/// The limits that were set before anything was measured.
mod limits {
    /// Seconds that a request alone may take longer than the model.
    pub(crate) const ADDED_LATENCY: f64 = 200e-6;
}

/// Measures the model server beside its peers
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    part: Option<Part>,
    /// Python of the environment of the peers: `scripts/test-env bench` prints it
    #[arg(long, env = "BENCH_PYTHON", default_value = "python3")]
    python: PathBuf,
    /// Folder of models, which bench/peers/models.py writes
    #[arg(long, env = "BENCH_MODELS", default_value = "models")]
    models: PathBuf,
    /// Only these models
    #[arg(long, value_name = "MODEL")]
    model: Vec<String>,
    /// Only these peers
    #[arg(long, value_name = "PEER", num_args = 0.., default_values = ["triton", "kserve"])]
    peer: Vec<Kind>,
    /// Requests at a time
    #[arg(long, value_name = "REQUESTS", default_values_t = CONCURRENCIES)]
    concurrency: Vec<usize>,
    /// Times that each figure is measured
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds of each time, longer where a model is slow
    #[arg(long, default_value_t = 0.4)]
    seconds: f64,
    /// Seconds of load on each server before anything of several requests at a time is measured: one that finds out how large its batches are
    /// to be, or compiles what is asked often, has done so by then
    #[arg(long, default_value_t = 3.0)]
    settle: f64,
    /// Where our server and the session in process run the models: `cpu`, or `cuda` for a GPU, where the server has half of the cores
    /// and the client the other half, and peers are to be left out (`--peer` without a value)
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Name of the file of results
    #[arg(long, default_value = "server")]
    name: String,
}

/// What the program does in processes of its own.
#[derive(Debug, Subcommand)]
enum Part {
    /// Run a model without a server, as the standard input says
    #[command(hide = true)]
    InProcess { model: String, models: PathBuf, device: Device },
    /// Only send requests, to a server that a profiler looks at
    Load { model: String, port: u16, protocol: Protocol, concurrency: usize, seconds: f64 },
    /// Answer with the same messages, after a run of the model if there is one
    #[command(hide = true)]
    Echo {
        grpc: PathBuf,
        http: PathBuf,
        grpc_port: u16,
        http_port: u16,
        #[arg(requires = "models")]
        model: Option<String>,
        models: Option<PathBuf>,
    },
}

fn main() -> Result<()> {
    let options = Options::parse();
    match options.part {
        Some(Part::InProcess { model, models, device }) => ceilings::run(case(&model)?, &models, device),
        Some(Part::Load { model, port, protocol, concurrency, seconds }) => {
            let case = case(&model)?;
            let messages = [(1.0, Message::new(case.name, &case.request(1)?))];
            let time = (Duration::from_millis(300), Duration::from_secs_f64(seconds));
            Cores::of_this_machine(Device::Cpu)?.be_the_client()?;
            let sample = closed_loop(port, protocol, &messages, concurrency, time)?;
            let [p50, p99] = [0.5, 0.99].map(|share| sample.latency(share) * 1e3);
            println!("{:.0} requests/s, p50 {p50:.3} ms, p99 {p99:.3} ms", sample.per_second);
            Ok(())
        }
        Some(Part::Echo { grpc, http, grpc_port, http_port, model, models }) => {
            let model = model.as_deref().map(case).transpose()?.zip(models.as_deref());
            ceilings::echo(&grpc, &http, [grpc_port, http_port], model)
        }
        None => measure(&options),
    }
}

fn case(name: &str) -> Result<&'static Case> {
    CASES.iter().find(|case| case.name == name).with_context(|| format!("there is no model {name:?}"))
}

fn measure(options: &Options) -> Result<()> {
    let cores = Cores::of_this_machine(options.device)?;
    let mut report = Report::new("server")?.named(&options.name);
    if options.device != Device::Cpu {
        report = report.on_gpu()?;
    }
    let work = tempfile::tempdir()?;
    let scripts = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/peers"));
    let setting = Setting {
        python: options.python.clone(),
        scripts,
        models: options.models.canonicalize().with_context(|| options.models.display().to_string())?,
        work: work.path().to_owned(),
        device: options.device,
        cores,
    };
    cores.be_the_client()?;
    let chosen = |case: &&Case| options.model.is_empty() || options.model.iter().any(|name| name == case.name);
    for case in CASES.iter().filter(chosen) {
        measure_case(case, &setting, options, &mut report)?;
        if case.name == "minilm-int8" && options.concurrency.contains(&TEXTS_AT_A_TIME) {
            measure_texts(case, &setting, options, &mut report)?;
        }
        // After each, so that what was measured is kept if another one fails.
        report.save()?;
    }
    report.finish()
}

fn measure_case(case: &Case, setting: &Setting, options: &Options, report: &mut Report) -> Result<()> {
    eprintln!("{}", case.name);
    let time = Duration::from_secs_f64(options.seconds);
    let mut session = InProcess::start(case, setting)?;
    let best = session.best_batch(case, setting.device, time)?;
    let alone = session.run(1, time)?;
    let message = Message::new(case.name, &case.request(1)?);
    let kinds: Vec<Kind> = std::iter::once(Kind::Ours).chain(options.peer.iter().copied()).collect();
    let mut servers = Vec::new();
    for &kind in &kinds {
        let backend = match kind {
            Kind::Triton => "python",
            _ if case.is_torchscript() => "pytorch",
            _ => "onnxruntime",
        };
        let server = Server::start(kind, setting, case, &case.config(backend, setting.device, best), &message)?;
        eprintln!("  {} answers after {:.2} s, {:.0} MiB", kind.name(), server.start_seconds, server.idle_mebibytes);
        servers.push(server);
    }
    let (ours, peers) = servers.split_first().context("ours is the first")?;
    for peer in peers {
        let name = peer.kind.name();
        let row = |what: &str| format!("{}/{what}", case.name);
        report.row(row("cold-start"), "s", Better::Lower, ours.start_seconds, (name, peer.start_seconds));
        report.row(row("idle-memory"), "MiB", Better::Lower, ours.idle_mebibytes, (name, peer.idle_mebibytes));
    }
    let is_tiny = alone.median < TINY;
    let grpc = load::ask_once(ours.port(Protocol::Grpc), Protocol::Grpc, &message)?;
    let http = load::ask_once(ours.port(Protocol::Http), Protocol::Http, &message)?;
    check(&grpc)?;
    let answers: (&[u8], &[u8]) = (&grpc, &http);
    servers.push(Server::echo(setting, answers, &message, None)?);
    if setting.device == Device::Cpu && !case.is_torchscript() {
        servers.push(Server::echo(setting, answers, &message, Some(case))?);
    }
    for protocol in [Protocol::Grpc, Protocol::Http] {
        for &concurrency in &options.concurrency {
            let place = Place { case, protocol, concurrency, best, is_tiny, device: setting.device };
            let turns = take_turns(&place, &servers, &mut session, options, alone.median, &message)?;
            place.report(&turns, report);
        }
    }
    Ok(())
}

/// Whether an answer is one.
fn check(grpc: &Bytes) -> Result<()> {
    let answer = ModelInferResponse::decode(grpc.clone())?;
    ensure!(!answer.raw_output_contents.is_empty(), "the answer has no outputs");
    Ok(())
}

/// What is measured at a time.
struct Place<'a> {
    case: &'a Case,
    protocol: Protocol,
    concurrency: usize,
    /// The batch that is best in process.
    best: usize,
    is_tiny: bool,
    device: Device,
}

/// What came of it: samples of each server, in rounds, and of the session in process.
struct Turns {
    samples: Vec<(Kind, Vec<Sample>)>,
    in_process: Vec<Runs>,
}

fn take_turns(
    place: &Place<'_>,
    servers: &[Server],
    session: &mut InProcess,
    options: &Options,
    row_seconds: f64,
    message: &Message,
) -> Result<Turns> {
    // As long as all requests at a time take one after the other: the slowest server answers each twice.
    let round = row_seconds * place.concurrency as f64;
    let warm_up = Duration::from_secs_f64(round.max(0.1));
    let time = Duration::from_secs_f64((2.0 * round).max(options.seconds));
    // One request at a time is all that it is for.
    let asked: Vec<_> = servers.iter().filter(|server| server.kind != Kind::Inline || place.concurrency == 1).collect();
    let mut turns =
        Turns { samples: asked.iter().map(|server| (server.kind, Vec::new())).collect(), in_process: Vec::new() };
    let messages = [(1.0, message.clone())];
    if place.concurrency > 1 && options.settle > 0.0 {
        let settle = (Duration::ZERO, Duration::from_secs_f64(options.settle));
        for server in &asked {
            closed_loop(server.port(place.protocol), place.protocol, &messages, place.concurrency, settle)
                .with_context(|| server.kind.name())?;
        }
    }
    for round in 0..options.rounds as usize {
        for turn in 0..asked.len() {
            // Each round begins with another one.
            let index = (round + turn) % asked.len();
            let server = asked[index];
            let sample =
                closed_loop(server.port(place.protocol), place.protocol, &messages, place.concurrency, (warm_up, time))
                    .with_context(|| server.kind.name())?;
            turns.samples[index].1.push(sample);
            if server.kind == Kind::Ours {
                let batch = if place.concurrency == 1 { 1 } else { place.best };
                turns.in_process.push(session.run(batch, Duration::from_secs_f64(options.seconds))?);
            }
        }
    }
    Ok(turns)
}

impl Turns {
    /// What a server did, in the order of rounds; nothing where it was not asked.
    fn of(&self, kind: Kind) -> &[Sample] {
        self.samples.iter().find(|(own, _)| *own == kind).map_or(&[], |(_, samples)| samples)
    }

    fn ours(&self, figure: impl Fn(&Sample) -> f64) -> f64 {
        median(self.of(Kind::Ours).iter().map(figure))
    }

    /// What stands beside ours, of which each round has one: ours by the median of the rounds' ratios.
    fn beside(&self, others: impl Iterator<Item = f64>, figure: impl Fn(&Sample) -> f64) -> f64 {
        let ratios = self.of(Kind::Ours).iter().zip(others).map(|(own, other)| figure(own) / other);
        self.ours(&figure) / median(ratios)
    }

    fn peer(&self, kind: Kind, figure: impl Fn(&Sample) -> f64) -> Option<f64> {
        let samples = self.of(kind);
        (!samples.is_empty()).then(|| self.beside(samples.iter().map(&figure), &figure))
    }

    /// Milliseconds that one request of a hundred exceeds.
    fn p99(&self, kind: Kind) -> f64 {
        Sample::latency_of_all(self.of(kind), 0.99) * 1e3
    }

    /// Microseconds that a request takes longer than the model in process.
    fn added(&self, kind: Kind) -> f64 {
        let alone = self.of(kind).iter().zip(&self.in_process);
        median(alone.map(|(own, model)| (own.latency(0.5) - model.median) * 1e6))
    }
}

fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Place<'_> {
    fn report(&self, turns: &Turns, report: &mut Report) {
        let row = |what: &str| format!("{}/{}/c{}/{what}", self.case.name, self.protocol.name(), self.concurrency);
        let throughput = |sample: &Sample| sample.per_second;
        let (ours, ours_p99) = (turns.ours(throughput), turns.p99(Kind::Ours));
        let heading = format!("  {} c{}", self.protocol.name(), self.concurrency);
        let mut figures = vec![format!("ours {ours:.0}/s p99 {ours_p99:.2} ms")];
        for kind in [Kind::Triton, Kind::Kserve] {
            let Some(peer) = turns.peer(kind, throughput) else { continue };
            let peer_p99 = turns.p99(kind);
            figures.push(format!("{} {peer:.0}/s p99 {peer_p99:.2} ms", kind.name()));
            report.row(row("throughput"), "requests/s", Better::Higher, ours, (kind.name(), peer));
            report.row(row("p99"), "ms", Better::Lower, ours_p99, (kind.name(), peer_p99));
        }
        if self.concurrency == 1 {
            let added = turns.added(Kind::Ours);
            figures.push(format!("{added:.0} us more than in process"));
            let limit = ("limit", limits::ADDED_LATENCY * 1e6);
            report.row(row("added-latency-p50"), "us", Better::Lower, added, limit);
            // What the messages alone take, without a model and all that belongs to it.
            let echo = median(turns.of(Kind::Echo).iter().map(|sample| sample.latency(0.5) * 1e6));
            figures.push(format!("echo {echo:.0} us"));
            report.row(row("added-latency-p50"), "us", Better::Lower, added, ("echo", echo));
            if !turns.of(Kind::Inline).is_empty() {
                let inline = turns.added(Kind::Inline);
                figures.push(format!("one thread that does all {inline:.0} us"));
                report.row(row("added-latency-p50"), "us", Better::Lower, added, ("inline", inline));
            }
        }
        if self.concurrency >= SATURATED {
            let model = || turns.in_process.iter().map(|found| found.rows_per_second);
            let echoes = || turns.of(Kind::Echo).iter().map(throughput);
            let echo = || ("echo", turns.beside(echoes(), throughput));
            let ceiling = || ("ceiling", turns.beside(model(), throughput));
            // One core does both: the model, and what there is to do about each message.
            let both = || {
                let both = echoes().zip(model()).map(|(echo, model)| 1.0 / (1.0 / echo + 1.0 / model));
                ("echo-and-model", turns.beside(both, throughput))
            };
            let limits = match self.device {
                Device::Cpu if self.is_tiny => [echo(), both()],
                Device::Cpu => [ceiling(), both()],
                Device::Cuda(_) | Device::TensorRt(_) => [ceiling(), echo()],
            };
            for (name, limit) in limits {
                figures.push(format!("{name} {limit:.0}/s: {:.3} of it", ours / limit));
                report.row(row("throughput"), "requests/s", Better::Higher, ours, (name, limit));
            }
        }
        eprintln!("{heading}: {}", figures.join(", "));
    }
}

/// Tokens per second with texts of unequal lengths, by a server that pads, beside texts that the client has padded.
fn measure_texts(case: &Case, setting: &Setting, options: &Options, report: &mut Report) -> Result<()> {
    let as_messages = |padded_to| -> Result<Vec<(f64, Message)>> {
        let texts = texts(TEXTS, padded_to)?;
        Ok(texts.iter().map(|(tokens, inputs)| (*tokens as f64, Message::new(case.name, inputs))).collect())
    };
    let (unequal, padded) = (as_messages(None)?, as_messages(Some(LONGEST_TEXT))?);
    let config = case.config("onnxruntime", setting.device, 32);
    let time = (Duration::from_secs(2), Duration::from_secs_f64(options.seconds.max(4.0)));
    let (mut own, mut clients) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        for (messages, config, found) in
            [(&unequal, format!("{config}{PADDING}"), &mut own), (&padded, config.clone(), &mut clients)]
        {
            let (_, first) = &messages[0];
            let server = Server::start(Kind::Ours, setting, case, &config, first)?;
            let sample = closed_loop(server.port(Protocol::Grpc), Protocol::Grpc, messages, TEXTS_AT_A_TIME, time)?;
            found.push(sample.weight_per_second);
        }
    }
    let (own, clients) = (median(own.into_iter()), median(clients.into_iter()));
    eprintln!("  texts of 4 to 128 tokens: {own:.0} tokens/s, padded to the longest {clients:.0} tokens/s");
    let row = format!("{}/texts/c{TEXTS_AT_A_TIME}/tokens", case.name);
    report.row(row, "tokens/s", Better::Higher, own, ("padded", clients));
    Ok(())
}

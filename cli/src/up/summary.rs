//! Sentences about jobs and what to do next.

use std::path::PathBuf;

use sensorium_api::run::RunResult;
use sensorium_operator::plan::{Program, Role, WorkloadPlan};

use super::typed;
use crate::args::{DEFAULT_ADDRESS, DEFAULT_MODEL};
use crate::local::placement::{PortMap, Replaced};
use crate::text::duration;

/// What came of a job that ended well: its own words, how good it is where they do not say, and the time it took.
pub(super) fn done(result: &RunResult) -> String {
    let accuracy = result.metrics.get("vqa_accuracy").filter(|_| result.gate.is_none());
    let accuracy = accuracy.map(|accuracy| format!("; accuracy {accuracy:.4}")).unwrap_or_default();
    format!("{}{accuracy} ({})", result.message, duration(result.seconds))
}

/// `2 workers`, or `1 server, 2 image_encoders`: what of a job runs.
pub(super) fn processes(plan: &WorkloadPlan) -> String {
    let role = |role: &Role| {
        let noun = if role.program == Program::Server { role.name.as_str() } else { "worker" };
        let count = role.world_size();
        format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
    };
    plan.roles.iter().map(role).collect::<Vec<_>>().join(", ")
}

/// `ready: gRPC 127.0.0.1:8001, HTTP :8000, metrics :8002`.
pub(super) fn ready(plan: &WorkloadPlan, ports: &PortMap) -> String {
    let role = plan.roles.first().map(|role| role.name.as_str()).unwrap_or_default();
    let port = |name| {
        let address = ports.address(role, 0, name).unwrap_or_default();
        address.rsplit_once(':').map(|(_, port)| port.to_owned()).unwrap_or_default()
    };
    let grpc = ports.address(role, 0, "grpc").unwrap_or_default();
    format!("ready: gRPC {grpc}, HTTP :{}, metrics :{}", port("http"), port("metrics"))
}

/// Why a server does not listen where its manifest says.
pub(super) fn replaced(replaced: &Replaced) -> String {
    let Replaced { name, declared, used, holder } = replaced;
    let holder = holder.as_ref().map_or("another program".to_owned(), ToString::to_string);
    format!("port {declared} for {name} is taken by {holder}; using {used}")
}

/// The last lines of a run that worked.
///
/// `served` is the name and the gRPC address of a model that is being served.
pub(super) fn how_to_go_on(paths: &[PathBuf], keep: bool, served: Option<(String, String)>) -> String {
    let mut lines = Vec::new();
    if let Some((model, address)) = served {
        let first = if keep { String::new() } else { format!("sensorium up {} --keep, then ", typed(paths)) };
        let model = if model == DEFAULT_MODEL { String::new() } else { format!(" --model {model}") };
        let address = if address == DEFAULT_ADDRESS { String::new() } else { format!(" --addr {address}") };
        lines.push(format!("Ask more: {first}sensorium infer --image FILE --text \"...\"{model}{address}"));
    }
    lines.push(format!("Same on a cluster: {}", apply(paths)));
    if keep {
        lines.push("Serving until Ctrl-C.".to_owned());
    }
    lines.join("\n")
}

fn apply(paths: &[PathBuf]) -> String {
    let files: Vec<String> = paths.iter().map(|path| format!("-f {}", path.display())).collect();
    format!("kubectl apply {}", files.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::ports::Holder;

    #[test]
    fn a_kept_server_is_named_with_its_model_and_address_where_these_are_not_the_defaults() {
        let paths = [PathBuf::from("examples/easy-vqa/")];
        let line = |model: &str, address: &str| {
            let text = how_to_go_on(&paths, true, Some((model.to_owned(), address.to_owned())));
            text.lines().next().unwrap().to_owned()
        };
        let ask = "Ask more: sensorium infer --image FILE --text \"...\"";
        assert_eq!(line("vqa", "127.0.0.1:8001"), ask);
        assert_eq!(line("tiny", "127.0.0.1:9001"), format!("{ask} --model tiny --addr 127.0.0.1:9001"));
    }

    #[test]
    fn a_run_that_serves_no_longer_says_how_to_serve() {
        let served = Some(("vqa".to_owned(), "127.0.0.1:8001".to_owned()));
        let text = how_to_go_on(&[PathBuf::from("a.yaml"), PathBuf::from("b.yaml")], false, served);
        assert_eq!(
            text,
            "Ask more: sensorium up a.yaml b.yaml --keep, then sensorium infer --image FILE --text \"...\"\n\
             Same on a cluster: kubectl apply -f a.yaml -f b.yaml"
        );
    }

    #[test]
    fn a_replaced_port_says_who_has_the_declared_one() {
        let holder = Some(Holder { pid: 7, name: "nginx".to_owned() });
        let text = replaced(&Replaced { name: "http".to_owned(), declared: 8000, used: 40_123, holder });
        assert_eq!(text, "port 8000 for http is taken by process 7 (nginx); using 40123");
    }
}

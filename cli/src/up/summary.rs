//! Sentences about jobs and what to do next.

use std::path::PathBuf;

use sensorium_operator::plan::{Program, WorkloadPlan};

use super::typed;
use crate::local::placement::{PortMap, Replaced};

/// `2 workers`: what of a job runs.
pub(super) fn processes(plan: &WorkloadPlan) -> String {
    let count: u32 = plan.roles.iter().map(sensorium_operator::plan::Role::world_size).sum();
    let noun = if plan.roles.iter().any(|role| role.program == Program::Server) { "server" } else { "worker" };
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
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
pub(super) fn how_to_go_on(paths: &[PathBuf], keep: bool, grpc: Option<String>) -> String {
    let manifests = typed(paths);
    let address = grpc.filter(|address| address != "127.0.0.1:8001").map(|address| format!(" --addr {address}"));
    let ask = format!("sensorium infer --image FILE --text \"...\"{}", address.clone().unwrap_or_default());
    let mut lines = Vec::new();
    if keep {
        lines.push(format!("Ask more: {ask}"));
    } else {
        lines.push(format!("Ask more: sensorium up {manifests} --keep, then sensorium infer --image FILE --text \"...\""));
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
    fn a_kept_server_is_named_with_its_address_only_where_that_is_not_the_default() {
        let paths = [PathBuf::from("examples/easy-vqa/")];
        let line = |grpc: &str| how_to_go_on(&paths, true, Some(grpc.to_owned())).lines().next().unwrap().to_owned();
        assert_eq!(line("127.0.0.1:8001"), "Ask more: sensorium infer --image FILE --text \"...\"");
        assert_eq!(line("127.0.0.1:9001"), "Ask more: sensorium infer --image FILE --text \"...\" --addr 127.0.0.1:9001");
    }

    #[test]
    fn a_run_that_serves_no_longer_says_how_to_serve() {
        let text = how_to_go_on(&[PathBuf::from("a.yaml"), PathBuf::from("b.yaml")], false, None);
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

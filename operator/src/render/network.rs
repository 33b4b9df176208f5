//! Who may reach pods. Ways out are left open: stores and data sets can be anywhere.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::{
    NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sensorium_api::run::JobKey;
use sensorium_api::{ServiceType, ServingJobSpec};

use super::names::selector;
use super::serving::server_selector;
use crate::plan::Role;

/// Labels of the operator's own pods, in whatever namespace it runs.
const OPERATOR: (&str, &str) = ("app.kubernetes.io/name", "sensorium-operator");

/// Workers: each other on every port (the collectives choose theirs as they go), the operator on the declared ones.
pub(super) fn workers(job: &JobKey, role: &Role) -> NetworkPolicySpec {
    policy(
        selector(job),
        vec![
            NetworkPolicyIngressRule { from: Some(vec![pods(selector(job))]), ports: None },
            NetworkPolicyIngressRule { from: Some(vec![operator()]), ports: Some(ports(role)) },
        ],
    )
}

/// Servers: the pods of their namespace, those of the namespaces that the spec names, and the operator. Where their Service is for
/// clients outside of the cluster, all of those, but not for metrics.
pub(super) fn servers(job: &JobKey, spec: &ServingJobSpec, role: &Role) -> NetworkPolicySpec {
    let mut rules = vec![NetworkPolicyIngressRule { from: Some(clients(spec)), ports: Some(ports(role)) }];
    if spec.service.type_ != ServiceType::ClusterIP {
        let asked = role.ports.keys().filter(|name| *name != "metrics").map(|name| port(name)).collect();
        rules.push(NetworkPolicyIngressRule { from: None, ports: Some(asked) });
    }
    policy(server_selector(job), rules)
}

/// An encoder, whose pods have the labels `selected`: the job's servers, and for its metrics whoever may reach these.
pub(super) fn encoder(
    job: &JobKey,
    spec: &ServingJobSpec,
    role: &Role,
    selected: BTreeMap<String, String>,
) -> NetworkPolicySpec {
    let servers = vec![pods(server_selector(job))];
    let watchers = (!spec.network_access.open).then(|| clients(spec));
    let metrics = role.ports.keys().filter(|name| *name == "metrics").map(|name| port(name)).collect();
    policy(
        selected,
        vec![
            NetworkPolicyIngressRule { from: Some(servers), ports: Some(ports(role)) },
            NetworkPolicyIngressRule { from: watchers, ports: Some(metrics) },
        ],
    )
}

fn clients(spec: &ServingJobSpec) -> Vec<NetworkPolicyPeer> {
    let mut from = vec![pods(BTreeMap::new()), operator()];
    if !spec.network_access.from_namespaces.is_empty() {
        let namespaces = matching(spec.network_access.from_namespaces.clone());
        from.push(NetworkPolicyPeer { namespace_selector: Some(namespaces), ..NetworkPolicyPeer::default() });
    }
    from
}

fn policy(selected: BTreeMap<String, String>, ingress: Vec<NetworkPolicyIngressRule>) -> NetworkPolicySpec {
    NetworkPolicySpec {
        pod_selector: Some(matching(selected)),
        policy_types: Some(vec!["Ingress".to_owned()]),
        ingress: Some(ingress),
        egress: None,
    }
}

fn pods(labels: BTreeMap<String, String>) -> NetworkPolicyPeer {
    NetworkPolicyPeer { pod_selector: Some(matching(labels)), ..NetworkPolicyPeer::default() }
}

fn operator() -> NetworkPolicyPeer {
    let labels = BTreeMap::from([(OPERATOR.0.to_owned(), OPERATOR.1.to_owned())]);
    NetworkPolicyPeer {
        pod_selector: Some(matching(labels)),
        namespace_selector: Some(LabelSelector::default()),
        ip_block: None,
    }
}

fn matching(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: (!labels.is_empty()).then_some(labels), match_expressions: None }
}

fn ports(role: &Role) -> Vec<NetworkPolicyPort> {
    role.ports.keys().map(|name| port(name)).collect()
}

/// By name, so that while a job's `ports` change each pod can be reached at its own number.
fn port(name: &str) -> NetworkPolicyPort {
    NetworkPolicyPort {
        port: Some(IntOrString::String(name.to_owned())),
        protocol: Some("TCP".to_owned()),
        end_port: None,
    }
}

//! Writes: each can be repeated, and each is left out when it would change nothing.

use std::fmt::Debug;
use std::time::Instant;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy};
use kube::{Api, Resource, ResourceExt};
use sensorium_telemetry::Parent;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tracing::{Instrument as _, Span};

use super::Error;
use super::visit::Visit;
use crate::render::short_digest;

/// The name under which the operator owns the fields that it sets.
const MANAGER: &str = "sensorium-operator";
/// The name under which it owns a number of pods that it leaves to others from then on.
const KEEPER: &str = "sensorium-operator-replicas";
/// Annotation of what is applied: a digest of all that was said, so that what is said no longer is a difference, too.
const APPLIED_ANNOTATION: &str = "sensorium.dev/applied";

fn named_in(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

fn named<K: Resource<DynamicType = ()>>(name: &str) -> String {
    format!("{}/{name}", K::kind(&()))
}

/// The span of a write, in the trace of the resource that `object` is or belongs to.
fn span<K: Resource<DynamicType = ()>>(verb: &'static str, object: &K) -> Span {
    let span = tracing::info_span!("write", verb, object = named::<K>(&object.name_any()), otel.kind = "client");
    let owner = object.owner_references().iter().find(|owner| owner.controller == Some(true));
    let uid = owner.map(|owner| owner.uid.clone()).or_else(|| object.uid());
    if let Some(parent) = uid.and_then(|uid| Parent::of_object(&uid)) {
        parent.adopt(&span);
    }
    span
}

/// Creates `object` unless it is there; what is there stays as it is. Says whether it was created.
pub(super) async fn create<K>(visit: &Visit<'_>, object: &K) -> Result<bool, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned,
{
    let api: Api<K> = visit.context.api_in(&object.namespace().unwrap_or_default());
    let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
    let sent = Instant::now();
    match api.create(&params, object).instrument(span("create", object)).await {
        Ok(_) => {
            visit.wrote("create", sent);
            Ok(true)
        }
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(false),
        Err(error) => Err(Error::api("create", named::<K>(&object.name_any()))(error)),
    }
}

/// Makes the live object have every field of `desired`, and none that it had from here and that `desired` has not. Fields that
/// others set stay theirs, and so does the number of a Deployment's pods, where `desired` does not say it any more.
pub(super) async fn apply<K>(visit: &Visit<'_>, desired: &K, actual: Option<&K>) -> Result<bool, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned,
{
    let json = |object: &K| serde_json::to_value(object).map_err(|error| Error::Object(error.to_string()));
    let mut wanted = json(desired)?;
    wanted["metadata"]["annotations"][APPLIED_ANNOTATION] = json!(short_digest(&wanted.to_string()));
    if let Some(actual) = actual
        && covers(&json(actual)?, &wanted)
    {
        return Ok(false);
    }
    wanted["apiVersion"] = json!(K::api_version(&()));
    wanted["kind"] = json!(K::kind(&()));
    let api: Api<K> = visit.context.api_in(&desired.namespace().unwrap_or_default());
    if K::kind(&()) == "Deployment" && actual.is_some() && wanted.pointer("/spec/replicas").is_none() {
        keep_replicas(visit, &api, desired).await?;
    }
    send(visit, &api, MANAGER, &wanted, span("apply", desired)).await?;
    Ok(true)
}

/// Applies an object of a kind that is not watched, whether or not that changes anything.
pub(super) async fn apply_unseen(visit: &Visit<'_>, api: &Api<DynamicObject>, object: &Value) -> Result<(), Error> {
    let span = tracing::info_span!("write", verb = "apply", object = named_in(object), otel.kind = "client");
    send(visit, api, MANAGER, object, span).await
}

/// Applies what `manager` says of an object: its fields become what they are in `said`, whoever set them before.
async fn send<K>(visit: &Visit<'_>, api: &Api<K>, manager: &str, said: &Value, span: Span) -> Result<(), Error>
where
    K: Clone + Debug + DeserializeOwned,
{
    let name = said["metadata"]["name"].as_str().unwrap_or_default();
    let sent = Instant::now();
    api.patch(name, &PatchParams::apply(manager).force(), &Patch::Apply(said))
        .instrument(span)
        .await
        .map_err(Error::api("apply", named_in(said)))?;
    visit.wrote("apply", sent);
    Ok(())
}

/// Leaves a Deployment as many pods as it has. A field that nobody says any more falls back to its default, which is one pod,
/// until an autoscaler has seen that.
async fn keep_replicas<K>(visit: &Visit<'_>, api: &Api<K>, desired: &K) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned,
{
    let name = desired.name_any();
    let live = api.get_opt(&name).await.map_err(Error::api("read", named::<K>(&name)))?;
    let live = serde_json::to_value(&live).map_err(|error| Error::Object(error.to_string()))?;
    let is_said_here = |fields: &Value| {
        let said = fields.pointer("/fieldsV1/f:spec/f:replicas");
        fields["manager"] == MANAGER && fields["operation"] == "Apply" && said.is_some()
    };
    if !live["metadata"]["managedFields"].as_array().into_iter().flatten().any(is_said_here) {
        return Ok(());
    }
    let kept = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": name},
        "spec": {"replicas": live["spec"]["replicas"]},
    });
    send(visit, api, KEEPER, &kept, span("apply", desired)).await
}

/// Changes part of an object.
pub(super) async fn merge<K>(visit: &Visit<'_>, object: &K, change: &Value) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let api: Api<K> = visit.context.api_in(&object.namespace().unwrap_or_default());
    let name = object.name_any();
    let sent = Instant::now();
    api.patch(
        &name,
        &PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() },
        &Patch::Merge(change),
    )
    .instrument(span("merge", object))
    .await
    .map_err(Error::api("change", named::<K>(&name)))?;
    visit.wrote("merge", sent);
    Ok(())
}

/// Deletes exactly this object; what it owns follows.
pub(super) async fn delete<K>(visit: &Visit<'_>, object: &K) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    delete_with(visit, object, PropagationPolicy::Background).await
}

/// Deletes exactly this object, what it owns first: as long as it is there, so may they be.
pub(super) async fn delete_last<K>(visit: &Visit<'_>, object: &K) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    delete_with(visit, object, PropagationPolicy::Foreground).await
}

async fn delete_with<K>(visit: &Visit<'_>, object: &K, propagation: PropagationPolicy) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    if object.meta().deletion_timestamp.is_some() {
        return Ok(());
    }
    let api: Api<K> = visit.context.api_in(&object.namespace().unwrap_or_default());
    let params = DeleteParams {
        propagation_policy: Some(propagation),
        preconditions: Some(Preconditions { uid: object.uid(), resource_version: None }),
        ..DeleteParams::default()
    };
    let sent = Instant::now();
    match api.delete(&object.name_any(), &params).instrument(span("delete", object)).await {
        Ok(_) => {
            visit.wrote("delete", sent);
            Ok(())
        }
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        // A conflict too: another one may have taken its place, and then the next visit sees that.
        Err(error) => Err(Error::api("delete", named::<K>(&object.name_any()))(error)),
    }
}

/// Writes `status` if it differs from `old`, and only onto the version that was read: a decision made on old news is not
/// written over a newer one.
pub(super) async fn write_status<K, S>(
    visit: &Visit<'_>,
    object: &K,
    old: Option<&S>,
    status: &S,
) -> Result<bool, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
    S: Serialize + PartialEq,
{
    if old == Some(status) {
        return Ok(false);
    }
    let value = |status: &S| serde_json::to_value(status).map_err(|error| Error::Object(error.to_string()));
    let mut wanted = value(status)?;
    // A merge keeps what is not mentioned, so what is no longer said has to be taken back.
    if let (Some(old), Value::Object(wanted)) = (old.map(value).transpose()?, &mut wanted) {
        erase(&old, wanted);
    }
    let change = json!({"metadata": {"resourceVersion": object.resource_version()}, "status": wanted});
    let api: Api<K> = visit.context.api_in(&object.namespace().unwrap_or_default());
    let name = object.name_any();
    let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    let sent = Instant::now();
    match api.patch_status(&name, &params, &Patch::Merge(&change)).instrument(span("status", object)).await {
        Ok(written) => {
            visit.wrote("status", sent);
            if let Some(old) = object.resource_version()
                && written.resource_version().as_ref() != Some(&old)
            {
                visit.replaced(old);
            }
            Ok(true)
        }
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(false),
        Err(error) => Err(Error::api("write the status of", named::<K>(&name))(error)),
    }
}

/// Adds a null for every key of `old` that `wanted` lacks, at every depth.
fn erase(old: &Value, wanted: &mut serde_json::Map<String, Value>) {
    let Value::Object(old) = old else { return };
    for (key, value) in old {
        match wanted.get_mut(key) {
            None => {
                wanted.insert(key.clone(), Value::Null);
            }
            Some(Value::Object(inner)) => erase(value, inner),
            Some(_) => {}
        }
    }
}

/// Whether `actual` has everything that `desired` says. The server adds defaults, so more is fine; it also rewrites
/// quantities (`1000m` becomes `1`), so these are compared by value.
fn covers(actual: &Value, desired: &Value) -> bool {
    match (actual, desired) {
        (Value::Object(actual), Value::Object(desired)) => desired.iter().all(|(key, wanted)| match actual.get(key) {
            Some(found) => covers(found, wanted),
            // The server drops what is empty.
            None => wanted.is_null() || wanted.as_object().is_some_and(serde_json::Map::is_empty),
        }),
        (Value::Array(actual), Value::Array(desired)) => {
            actual.len() == desired.len() && actual.iter().zip(desired).all(|(found, wanted)| covers(found, wanted))
        }
        (Value::String(found), Value::String(wanted)) => found == wanted || same_quantity(found, wanted),
        _ => actual == desired,
    }
}

fn same_quantity(one: &str, other: &str) -> bool {
    matches!((quantity(one), quantity(other)), (Some(one), Some(other)) if (one - other).abs() <= 1e-9 * one.abs())
}

/// The value of a quantity such as `500m`, `2`, `8Gi`.
fn quantity(text: &str) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 14] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("", 1.0),
    ];
    SUFFIXES.iter().find_map(|(suffix, factor)| {
        let number = text.strip_suffix(suffix)?;
        // `parse` would read words such as `inf` too.
        number
            .starts_with(|c: char| c.is_ascii_digit())
            .then(|| number.parse::<f64>().ok())?
            .map(|value| value * factor)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_that_the_server_adds_are_no_difference_and_lost_fields_are() {
        let desired = json!({"spec": {"ports": [{"port": 1}], "limits": {"cpu": "1000m"}, "labels": {}}});
        let actual =
            json!({"spec": {"ports": [{"port": 1, "protocol": "TCP"}], "limits": {"cpu": "1"}, "type": "ClusterIP"}});
        assert!(covers(&actual, &desired));
        assert!(!covers(&json!({"spec": {"ports": []}}), &desired));
        assert!(!covers(&json!({"spec": {"ports": [{"port": 2}], "limits": {"cpu": "1"}}}), &desired));
    }

    #[test]
    fn what_is_no_longer_said_is_taken_back() {
        let mut wanted = json!({"a": {"x": 1}}).as_object().unwrap().clone();
        erase(&json!({"a": {"x": 1, "y": 2}, "b": 3}), &mut wanted);
        assert_eq!(Value::Object(wanted), json!({"a": {"x": 1, "y": null}, "b": null}));
    }
}

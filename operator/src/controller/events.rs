//! Events: what happened, for whoever reads `kubectl describe`.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

use crate::status::Note;

const CONTROLLER: &str = "sensorium-operator";
/// What is said again within this time is counted and not written anew; client-go's time.
const SAME: Duration = Duration::from_mins(6);
/// Characters of an event's note that Kubernetes allows.
const LONGEST: usize = 1000;

/// Writes events. Of what was written only a fingerprint is kept: ten thousand jobs may start within minutes.
pub(super) struct Events {
    client: Client,
    instance: String,
    written: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    by_fingerprint: HashMap<u64, Series>,
    /// When each was first written, the oldest first.
    order: VecDeque<(Instant, u64)>,
}

/// When an event was first written, and how often it has been.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Series {
    first: Timestamp,
    count: i32,
}

impl Written {
    /// Notes that this event happens at `now` (the same moment, told by two clocks); gives its series so far.
    fn note(&mut self, fingerprint: u64, (instant, now): (Instant, Timestamp)) -> Series {
        while let Some((since, old)) = self.order.front().copied()
            && instant.duration_since(since) > SAME
        {
            self.order.pop_front();
            self.by_fingerprint.remove(&old);
        }
        let order = &mut self.order;
        let series = self.by_fingerprint.entry(fingerprint).or_insert_with(|| {
            order.push_back((instant, fingerprint));
            Series { first: now, count: 0 }
        });
        series.count = series.count.saturating_add(1);
        *series
    }
}

impl Events {
    pub(super) fn new(client: Client, instance: String) -> Self {
        Self { client, instance, written: Mutex::default() }
    }

    /// Writes an event about an object.
    pub(super) async fn write(&self, about: &ObjectReference, note: &Note) -> kube::Result<()> {
        let mut hasher = DefaultHasher::new();
        (&about.uid, &about.namespace, &about.name, note.reason, &note.message).hash(&mut hasher);
        let now = Timestamp::now();
        let series = {
            let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
            written.note(hasher.finish(), (Instant::now(), now))
        };
        let api: Api<Event> = Api::namespaced(self.client.clone(), about.namespace.as_deref().unwrap_or("default"));
        let about_name = about.name.as_deref().unwrap_or(CONTROLLER);
        let name = format!("{about_name}.{:x}", series.first.as_nanosecond());
        if series.count > 1 {
            let again = EventSeries { count: series.count, last_observed_time: MicroTime(now) };
            let again = Patch::Merge(json!({"series": again}));
            match api.patch(&name, &PatchParams::default(), &again).await {
                // It has run out, or its writing failed.
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                written => return written.map(drop),
            }
        }
        let event = Event {
            metadata: ObjectMeta { name: Some(name), namespace: about.namespace.clone(), ..ObjectMeta::default() },
            type_: Some(if note.warning { "Warning" } else { "Normal" }.to_owned()),
            reason: Some(note.reason.to_owned()),
            action: Some(note.reason.to_owned()),
            note: Some(note.message.chars().take(LONGEST).collect()),
            regarding: Some(about.clone()),
            event_time: Some(MicroTime(now)),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(self.instance.clone()),
            ..Event::default()
        };
        api.create(&PostParams::default(), &event).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_again_within_minutes_is_counted_and_later_it_is_new() {
        let (mut written, start) = (Written::default(), Instant::now());
        let at = |seconds: u64| {
            (start + Duration::from_secs(seconds), Timestamp::from_second(seconds.try_into().unwrap()).unwrap())
        };
        assert_eq!(written.note(1, at(0)).count, 1);
        assert_eq!(written.note(2, at(10)).count, 1);
        assert_eq!(written.note(1, at(20)), Series { first: at(0).1, count: 2 });
        assert_eq!(written.note(1, at(361)), Series { first: at(361).1, count: 1 });
        assert_eq!(written.note(2, at(361)).count, 2);
        written.note(3, at(1000));
        assert_eq!((written.by_fingerprint.len(), written.order.len()), (1, 1), "nothing is remembered for longer");
    }
}

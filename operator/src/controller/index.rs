//! The objects of our own kinds, and which of them concern which others without looking at all of them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};

use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::Event;
use sensorium_api::JobState;

use super::children::Key;
use super::kept::{Kept, Own};

/// Objects by a word that they can be meant by, or that they mean others by: artifacts by their digests and names, jobs by
/// the names of what they read. A word counts in one namespace.
type ByTerm = HashMap<Key, BTreeSet<Key>>;

/// All objects of a kind.
pub(super) struct Known<K: Own> {
    store: Store<Kept<K>>,
    index: Arc<RwLock<Index>>,
}

#[derive(Default)]
struct Index {
    by_term: ByTerm,
    /// Whether a first list is complete.
    listed: bool,
}

impl<K: Own> Clone for Known<K> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), index: Arc::clone(&self.index) }
    }
}

impl<K: Own> Known<K> {
    /// What a controller reads.
    pub(super) fn store(&self) -> Store<Kept<K>> {
        self.store.clone()
    }

    /// Whether there is such an object.
    pub(super) fn has(&self, key: &Key) -> bool {
        self.store.get(&reference(key)).is_some()
    }

    /// Whether all that exist are known.
    pub(super) fn listed(&self) -> bool {
        self.index.read().unwrap_or_else(PoisonError::into_inner).listed
    }

    /// Namespace and name of the objects with this term.
    pub(super) fn with_term(&self, term: &Key) -> Vec<Key> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.by_term.get(term).into_iter().flatten().cloned().collect()
    }

    /// The objects with this term, as far as they can be read.
    pub(super) fn meant_by(&self, term: &Key) -> Vec<K> {
        let found = self.with_term(term).into_iter().filter_map(|key| self.store.get(&reference(&key)));
        found.filter_map(|kept| kept.read().ok()).collect()
    }

    /// How many objects print each state.
    pub(super) fn count(&self) -> Vec<(JobState, i64)> {
        let mut counts: Vec<(JobState, i64)> = Vec::new();
        for state in self.store.state().iter().filter_map(|kept| kept.state()) {
            match counts.iter_mut().find(|(known, _)| *known == state) {
                Some((_, count)) => *count += 1,
                None => counts.push((state, 1)),
            }
        }
        counts
    }
}

/// How a controller names an object.
pub(super) fn reference<K: Own>((namespace, name): &Key) -> ObjectRef<Kept<K>> {
    ObjectRef::new(name).within(namespace)
}

/// An object that there is news of.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Touched {
    /// Namespace and name.
    pub(super) object: Key,
    /// Its terms, and those that it had before.
    pub(super) terms: Vec<Key>,
}

impl Touched {
    fn of<K>(object: &Kept<K>) -> Self {
        Self { object: object.key(), terms: object.terms().to_vec() }
    }
}

/// Takes in what a watch tells.
pub(super) struct Follower<K: Own> {
    known: Known<K>,
    writer: Writer<Kept<K>>,
    listing: ByTerm,
}

impl<K: Own> Follower<K> {
    pub(super) fn new() -> (Known<K>, Self) {
        let (store, writer) = reflector::store();
        let known = Known { store, index: Arc::default() };
        (known.clone(), Self { known, writer, listing: HashMap::new() })
    }

    /// Takes in an event. Of a list there is news when it is complete, and not before: whoever is visited then finds what
    /// it says. What vanished while nobody watched is news too.
    pub(super) fn follow(&mut self, event: &Event<Kept<K>>) -> Vec<Touched> {
        let index = Arc::clone(&self.known.index);
        let index = || index.write().unwrap_or_else(PoisonError::into_inner);
        let mut touched = Vec::new();
        match event {
            Event::Init => self.listing = HashMap::new(),
            Event::InitApply(object) => add(&mut self.listing, object),
            Event::InitDone => {
                let old = self.known.store.state();
                self.writer.apply_watcher_event(event);
                let new = self.known.store.state();
                *index() = Index { by_term: std::mem::take(&mut self.listing), listed: true };
                touched.extend(new.iter().map(|object| Touched::of(object)));
                let there: HashSet<Key> = new.iter().map(|object| object.key()).collect();
                touched.extend(old.iter().map(|object| Touched::of(object)).filter(|old| !there.contains(&old.object)));
                return touched;
            }
            Event::Apply(object) | Event::Delete(object) => {
                let old = self.known.store.get(&reference(&object.key()));
                let mut index = index();
                let mut news = Touched::of(object);
                for term in old.iter().flat_map(|old| old.terms()) {
                    remove(&mut index.by_term, term, &news.object);
                    if !news.terms.contains(term) {
                        news.terms.push(term.clone());
                    }
                }
                if matches!(event, Event::Apply(_)) {
                    add(&mut index.by_term, object);
                }
                touched.push(news);
            }
        }
        self.writer.apply_watcher_event(event);
        touched
    }
}

fn add<K>(index: &mut ByTerm, object: &Kept<K>) {
    for term in object.terms() {
        index.entry(term.clone()).or_default().insert(object.key());
    }
}

fn remove(index: &mut ByTerm, term: &Key, object: &Key) {
    if let Some(objects) = index.get_mut(term) {
        objects.remove(object);
        if objects.is_empty() {
            index.remove(term);
        }
    }
}

#[cfg(test)]
mod tests {
    use sensorium_api::ModelArtifact;
    use serde_json::json;

    use super::*;

    fn artifact(name: &str, label: &str) -> Kept<ModelArtifact> {
        serde_json::from_value(json!({
            "apiVersion": "sensorium.dev/v1alpha1",
            "kind": "ModelArtifact",
            "metadata": {
                "name": name, "namespace": "a", "labels": {"sensorium.dev/artifact": label}, "resourceVersion": "1",
                "managedFields": [{"manager": "somebody", "fieldsV1": {"f:spec": {}}}],
            },
            "spec": {"uri": format!("pvc://artifacts/{name}"), "digest": format!("sha256:{name:0>64}"), "signature": []},
        }))
        .unwrap()
    }

    fn names(known: &Known<ModelArtifact>, term: &str) -> Vec<String> {
        known.with_term(&("a".to_owned(), term.to_owned())).into_iter().map(|(_, name)| name).collect()
    }

    #[test]
    fn an_object_is_found_by_what_it_is_called_now_and_whoever_looked_for_its_old_name_hears_of_it() {
        let (known, mut follower) = Follower::new();
        follower.follow(&Event::Apply(artifact("x", "vqa")));
        follower.follow(&Event::Apply(artifact("y", "vqa")));
        assert_eq!(names(&known, "vqa"), ["x", "y"]);
        assert_eq!(names(&known, &format!("sha256:{:0>64}", "x")), ["x"]);
        let touched = follower.follow(&Event::Apply(artifact("x", "other")));
        assert!(touched[0].terms.contains(&("a".to_owned(), "vqa".to_owned())));
        assert_eq!((names(&known, "vqa"), names(&known, "other")), (vec!["y".to_owned()], vec!["x".to_owned()]));
        follower.follow(&Event::Delete(artifact("y", "vqa")));
        assert!(names(&known, "vqa").is_empty());
    }

    #[test]
    fn a_new_list_replaces_what_was_known_and_tells_of_what_vanished() {
        let (known, mut follower) = Follower::new();
        follower.follow(&Event::Apply(artifact("x", "vqa")));
        assert!(!known.listed());
        assert!(follower.follow(&Event::Init).is_empty());
        assert!(follower.follow(&Event::InitApply(artifact("y", "vqa"))).is_empty());
        assert_eq!(names(&known, "vqa"), ["x"], "the old list stands until the new one is complete");
        let mut touched: Vec<String> =
            follower.follow(&Event::InitDone).into_iter().map(|news| news.object.1).collect();
        touched.sort();
        assert_eq!(touched, ["x", "y"]);
        assert_eq!(names(&known, "vqa"), ["y"]);
        assert!(known.listed());
    }

    #[test]
    fn what_is_read_again_is_what_was_written_but_for_what_the_server_keeps_for_itself() {
        let read = artifact("x", "vqa").read().unwrap();
        assert_eq!(read.metadata.resource_version.as_deref(), Some("1"));
        assert_eq!(read.metadata.labels.unwrap()["sensorium.dev/artifact"], "vqa");
        assert_eq!(read.metadata.managed_fields, None);
    }

    #[test]
    fn an_object_that_cannot_be_read_says_why_and_which_one_it_is() {
        let object: Kept<ModelArtifact> = serde_json::from_value(json!({
            "metadata": {"name": "x", "namespace": "a", "uid": "1"}, "spec": {"uri": "pvc://a/b", "colour": "red"},
        }))
        .unwrap();
        assert_eq!(object.key(), ("a".to_owned(), "x".to_owned()));
        assert!(object.read().unwrap_err().to_string().contains("colour"));
        assert!(object.terms().is_empty());
    }
}

//! Repositories that are watched: models follow their folders.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use futures::future::join_all;
use sensorium_artifact::ArtifactError;
use sensorium_telemetry::error_line;
use tokio::time;
use tokio_util::task::AbortOnDropHandle;

use super::{Inner, Registry, folder, place::Place};

/// How long a bucket is waited for. One that takes longer is looked at when it is here, and nobody else waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Fingerprints of models that are loaded, or could not be, by name.
type Loaded = BTreeMap<String, u64>;
/// What a look at the repositories found: fingerprints by name, `None` for a model that could not be read, or is not here as a whole.
pub(super) type Look = BTreeMap<String, Option<u64>>;

/// A repository, which is looked at whatever becomes of the others.
struct Watched {
    place: Place,
    /// Its models, as they were when it could last be read.
    models: BTreeMap<String, PathBuf>,
    /// What fetches it, while that lasts.
    fetching: Option<AbortOnDropHandle<Result<(), ArtifactError>>>,
    /// Whether it could not be read at the last look, which has been said.
    is_away: bool,
}

impl Watched {
    fn new(place: &Place) -> Self {
        let models = place.models().unwrap_or_default();
        Self { place: place.clone(), models, fetching: None, is_away: false }
    }

    /// Whether it is here as a whole; a bucket is fetched before, and goes on being fetched after `patience`.
    async fn fetch(&mut self, patience: Duration) -> bool {
        if self.place.is_here() {
            return true;
        }
        let fetching = self.fetching.get_or_insert_with(|| {
            let place = self.place.clone();
            AbortOnDropHandle::new(tokio::spawn(async move { place.refresh().await.map(drop) }))
        });
        let Ok(fetched) = time::timeout(patience, fetching).await else { return false };
        self.fetching = None;
        let is_here = matches!(fetched, Ok(Ok(())));
        if let Ok(Err(error)) = &fetched
            && !self.is_away
        {
            // Once, as all that can be said of the next looks is the same.
            tracing::warn!(error = error_line(error), "the models of a repository stay as they are");
        }
        self.is_away = !is_here;
        is_here
    }

    /// Its models. Blocks.
    fn look(&mut self, is_whole: bool) -> Look {
        let read = if is_whole { self.place.models().map(Some) } else { Ok(None) };
        let read = read.inspect_err(|error| {
            if !self.is_away {
                let path = self.place.path().display().to_string();
                tracing::warn!(path, %error, "a repository cannot be read, and its models stay as they are");
            }
        });
        self.is_away = !is_whole || read.is_err();
        let found = read.unwrap_or(None);
        let Some(found) = found else { return self.models.keys().map(|name| (name.clone(), None)).collect() };
        self.models.clone_from(&found);
        let (whole, missing) = found.into_iter().partition(|(name, _)| self.place.missing(name).is_none());
        let mut look = fingerprints(whole);
        look.extend(BTreeMap::into_iter(missing).map(|(name, _)| (name, None)));
        look
    }
}

/// Watches the repositories of `registry` until it goes. `found` are the models that it has tried to load, as they were then.
pub(super) fn spawn(registry: &Registry, interval: Duration, found: Look) {
    let (weak, end) = (Arc::downgrade(&registry.0), registry.0.background.clone());
    let loaded = found.into_iter().filter_map(|(name, found)| Some((name, found?))).collect();
    let repositories = registry.0.places.iter().map(Watched::new).collect();
    // Ends with the registry, which cancels it.
    tokio::spawn(async move { end.run_until_cancelled(watch(weak, interval, repositories, loaded)).await });
}

async fn watch(registry: Weak<Inner>, interval: Duration, mut repositories: Vec<Watched>, mut loaded: Loaded) {
    // What could not be loaded may only want for another model.
    let mut failed: Vec<String> = registry
        .upgrade()
        .map(|registry| {
            let registry = Registry(registry);
            loaded.keys().filter(|name| !registry.ready(name, "")).cloned().collect()
        })
        .unwrap_or_default();
    let mut before = loaded.clone();
    let mut next = interval;
    loop {
        time::sleep(next).await;
        let are_whole = join_all(repositories.iter_mut().map(|repository| repository.fetch(PATIENCE))).await;
        let looked = tokio::task::spawn_blocking(move || {
            let now = look_at(&mut repositories, are_whole);
            (repositories, now)
        });
        let Ok((looked_at, mut now)) = looked.await else { return };
        repositories = looked_at;
        let Some(registry) = registry.upgrade().map(Registry) else { return };
        now.retain(|name, _| registry.artifact(name).is_none());
        let Changes { stable, gone, is_settled } = compare(&loaded, &before, &now);
        for name in gone {
            tracing::info!(model = name, "gone from its repository");
            registry.remove(&name);
            loaded.remove(&name);
        }
        for name in now.iter().filter(|(_, found)| found.is_none()).map(|(name, _)| name) {
            registry.note_missing(name);
        }
        if !stable.is_empty() {
            let rest = std::mem::take(&mut failed).into_iter();
            let rest = rest.filter(|name| !stable.contains_key(name) && now.contains_key(name));
            // Also after a failure: it is tried again when something changes. Unless some version of it serves, and would have to
            // begin anew; an ensemble costs nothing, and may only have wanted for what has changed.
            let (again, rest): (Vec<_>, Vec<_>) =
                rest.partition(|name| now[name].is_some() && (!registry.ready(name, "") || registry.is_ensemble(name)));
            let names = stable.keys().cloned().chain(again);
            let _changing = registry.0.changing.lock().await;
            failed = registry.bring_all(names.collect()).await;
            failed.extend(rest);
            loaded.extend(stable);
        }
        // A change is taken as soon as it stands still, which need not last a whole interval.
        next = if is_settled { interval } else { interval.min(Duration::from_millis(500)) };
        before = remembered(&before, now);
    }
}

/// The models of all repositories, by name; the first repository that has one wins.
fn look_at(repositories: &mut [Watched], are_whole: Vec<bool>) -> Look {
    let mut now = Look::new();
    for (repository, is_whole) in repositories.iter_mut().zip(are_whole) {
        for (name, found) in repository.look(is_whole) {
            now.entry(name).or_insert(found);
        }
    }
    now
}

/// What two looks at the repositories say. What differs in them is being written, or replaced, and is looked at again.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// Other than what is loaded, in both.
    stable: Loaded,
    /// In neither.
    gone: Vec<String>,
    /// Whether the last look was as the one before.
    is_settled: bool,
}

/// `before` is what each model was like when it could last be read.
fn compare(loaded: &Loaded, before: &Loaded, now: &Look) -> Changes {
    let read = || now.iter().filter_map(|(name, found)| Some((name, (*found)?)));
    let is_stable =
        |(name, found): &(&String, u64)| before.get(*name) == Some(found) && loaded.get(*name) != Some(found);
    let is_gone = |name: &&String| !now.contains_key(*name) && !before.contains_key(*name);
    Changes {
        stable: read().filter(is_stable).map(|(name, found)| (name.clone(), found)).collect(),
        gone: loaded.keys().filter(is_gone).cloned().collect(),
        is_settled: before.keys().all(|name| now.contains_key(name))
            && read().all(|(name, found)| before.get(name) == Some(&found)),
    }
}

/// What each model was like when it could last be read, after another look: one that is not there now is forgotten.
fn remembered(before: &Loaded, now: Look) -> Loaded {
    now.into_iter().filter_map(|(name, found)| Some((name.clone(), found.or(before.get(&name).copied())?))).collect()
}

/// What the models' folders are like now.
pub(super) fn fingerprints(found: BTreeMap<String, PathBuf>) -> Look {
    let fingerprint = |(name, path): (String, PathBuf)| {
        let found = folder::fingerprint(&path);
        if let Err(error) = &found {
            tracing::warn!(model = name, %error, "its folder cannot be read, and it stays as it is");
        }
        (name, found.ok())
    };
    found.into_iter().map(fingerprint).collect()
}

#[cfg(test)]
mod tests {
    use sensorium_artifact::Mirror;

    use super::*;

    fn loaded(models: &[(&str, u64)]) -> Loaded {
        models.iter().map(|(name, fingerprint)| ((*name).to_owned(), *fingerprint)).collect()
    }

    fn look(models: &[(&str, u64)]) -> Look {
        models.iter().map(|(name, fingerprint)| ((*name).to_owned(), Some(*fingerprint))).collect()
    }

    #[test]
    fn a_change_is_taken_once_it_stands_still() {
        let known = loaded(&[("a", 1), ("b", 1), ("c", 1)]);
        let looks = [
            look(&[("a", 1), ("b", 1), ("c", 1)]),
            look(&[("a", 1), ("b", 2), ("d", 7)]),
            look(&[("a", 1), ("b", 3), ("d", 7)]),
            look(&[("a", 1), ("b", 3), ("d", 7)]),
        ];
        let changes = |index: usize| {
            let before = looks[..index].iter().cloned().fold(Loaded::new(), |before, look| remembered(&before, look));
            compare(&known, &before, &looks[index])
        };
        assert_eq!(changes(1), Changes::default(), "all of it may be about to change again");
        let gone = vec!["c".to_owned()];
        assert_eq!(changes(2), Changes { stable: loaded(&[("d", 7)]), gone: gone.clone(), is_settled: false });
        assert_eq!(changes(3), Changes { stable: loaded(&[("b", 3), ("d", 7)]), gone, is_settled: true });
    }

    #[test]
    fn a_folder_that_cannot_be_read_is_not_gone_and_has_not_changed() {
        let (known, unreadable) = (loaded(&[("a", 1)]), Look::from([("a".to_owned(), None), ("b".to_owned(), None)]));
        let settled = Changes { is_settled: true, ..Changes::default() };
        assert_eq!(compare(&known, &known, &unreadable), settled);
        let before = remembered(&known, unreadable.clone());
        assert_eq!(compare(&known, &before, &unreadable), settled);
        let before = remembered(&remembered(&before, look(&[("a", 2)])), unreadable);
        let changed = compare(&known, &before, &look(&[("a", 2)]));
        assert_eq!(changed.stable, loaded(&[("a", 2)]), "it stands still since it could last be read");
    }

    #[tokio::test]
    async fn a_bucket_that_does_not_answer_leaves_its_models_as_they_are_and_keeps_no_other_repository_waiting() {
        // Takes connections, and says nothing.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bucket = [
            ("AWS_ENDPOINT_URL", format!("http://{}", silent.local_addr().unwrap())),
            ("AWS_ACCESS_KEY_ID", "a".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "b".to_owned()),
        ];
        let bucket = bucket.map(|(name, value)| (name.to_owned(), value));
        let work = tempfile::tempdir().unwrap();
        let mirror = Mirror::open_with("s3://bucket/models", work.path(), bucket).unwrap();
        let here = work.path().join("here");
        for model in [mirror.folder().join("both"), mirror.folder().join("far"), here.join("both"), here.join("near")] {
            std::fs::create_dir_all(model).unwrap();
        }
        let mut repositories = [Place::copy(mirror), Place::Folder(here.clone())].map(|place| Watched::new(&place));
        let fetched = repositories.iter_mut().map(|repository| repository.fetch(Duration::from_millis(50)));
        let are_whole = join_all(fetched).await;
        assert_eq!(are_whole, [false, true]);
        let looked = look_at(&mut repositories, are_whole);
        let is_known: Vec<_> = looked.iter().map(|(name, found)| (name.as_str(), found.is_some())).collect();
        assert_eq!(is_known, [("both", false), ("far", false), ("near", true)], "the first one's is served");
        std::fs::remove_dir_all(here).unwrap();
        assert_eq!(look_at(&mut repositories, vec![false, true]).len(), 3, "one that is away has its models still");
    }
}

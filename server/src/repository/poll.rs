//! A repository that is watched: models follow their folders.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use sensorium_telemetry::error_line;
use tokio::time;

use super::{Inner, Registry, folder};

/// Fingerprints of models that are loaded, or could not be, by name.
type Loaded = BTreeMap<String, u64>;
/// What a look at the repositories found: fingerprints by name, `None` for a folder that could not be read.
pub(super) type Look = BTreeMap<String, Option<u64>>;

/// Watches the repositories of `registry` until it goes. `found` are the models that it has tried to load, as they were then.
pub(super) fn spawn(registry: &Registry, interval: Duration, found: Look) {
    let (weak, end) = (Arc::downgrade(&registry.0), registry.0.background.clone());
    let loaded = found.into_iter().filter_map(|(name, found)| Some((name, found?))).collect();
    // Ends with the registry, which cancels it.
    tokio::spawn(async move { end.run_until_cancelled(watch(weak, interval, loaded)).await });
}

async fn watch(registry: Weak<Inner>, interval: Duration, mut loaded: Loaded) {
    // What could not be loaded may only want for another model.
    let mut failed: Vec<String> = registry
        .upgrade()
        .map(|registry| {
            let registry = Registry(registry);
            loaded.keys().filter(|name| !registry.ready(name, "")).cloned().collect()
        })
        .unwrap_or_default();
    let mut before: Look = loaded.iter().map(|(name, fingerprint)| (name.clone(), Some(*fingerprint))).collect();
    let mut next = interval;
    loop {
        time::sleep(next).await;
        let Some(registry) = registry.upgrade().map(Registry) else { return };
        if let Err(error) = registry.refresh().await {
            tracing::warn!(error = error_line(&error), "the models stay as they are");
            continue;
        }
        let now = match tokio::task::spawn_blocking({
            let registry = registry.clone();
            move || registry.look().map(fingerprints)
        })
        .await
        {
            Ok(Ok(now)) => now,
            Ok(Err(error)) => {
                tracing::warn!(error = error_line(&error), "the models stay as they are");
                continue;
            }
            Err(_) => return,
        };
        let Changes { stable, gone, is_settled } = compare(&loaded, &before, &now);
        for name in gone {
            tracing::info!(model = name, "gone from its repository");
            registry.remove(&name);
            loaded.remove(&name);
        }
        if !stable.is_empty() {
            // Also after a failure: it is tried again when something changes.
            // Unless some version of it serves, and would have to begin anew.
            let again = std::mem::take(&mut failed).into_iter();
            let again =
                again.filter(|name| !stable.contains_key(name) && now.contains_key(name) && !registry.ready(name, ""));
            let again: Vec<String> = again.collect();
            let names = stable.keys().cloned().chain(again);
            let _changing = registry.0.changing.lock().await;
            failed = registry.bring_all(names.collect()).await;
            loaded.extend(stable);
        }
        // A change is taken as soon as it stands still, which need not last a whole interval.
        next = if is_settled { interval } else { interval.min(Duration::from_millis(500)) };
        before = now;
    }
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

fn compare(loaded: &Loaded, before: &Look, now: &Look) -> Changes {
    let is_stable = |(name, found): &(&String, &Option<u64>)| {
        found.is_some() && before.get(*name) == Some(*found) && loaded.get(*name) != found.as_ref()
    };
    let stable = now.iter().filter(is_stable).filter_map(|(name, found)| Some((name.clone(), (*found)?)));
    let is_gone = |name: &&String| !now.contains_key(*name) && !before.contains_key(*name);
    Changes {
        stable: stable.collect(),
        gone: loaded.keys().filter(is_gone).cloned().collect(),
        is_settled: before == now,
    }
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
        let changes = |index: usize| compare(&known, &looks[index - 1], &looks[index]);
        assert_eq!(changes(1), Changes::default(), "all of it may be about to change again");
        let gone = vec!["c".to_owned()];
        assert_eq!(changes(2), Changes { stable: loaded(&[("d", 7)]), gone: gone.clone(), is_settled: false });
        assert_eq!(changes(3), Changes { stable: loaded(&[("b", 3), ("d", 7)]), gone, is_settled: true });
    }

    #[test]
    fn a_folder_that_cannot_be_read_is_not_gone_and_has_not_changed() {
        let (known, unreadable) = (loaded(&[("a", 1)]), Look::from([("a".to_owned(), None), ("b".to_owned(), None)]));
        let settled = Changes { is_settled: true, ..Changes::default() };
        assert_eq!(compare(&known, &unreadable, &unreadable), settled);
    }
}

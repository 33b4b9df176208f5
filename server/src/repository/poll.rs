//! A repository that is watched: models follow their folders.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::time;

use super::{Inner, LoadParameters, Registry, folder};
use crate::error::chain;

/// Fingerprints of models by name.
type Seen = BTreeMap<String, u64>;

/// Watches the repositories of `registry` until it goes. `found` are the models that were loaded already.
pub(super) fn spawn(registry: &Registry, interval: Duration, found: BTreeMap<String, PathBuf>) {
    let (weak, end) = (Arc::downgrade(&registry.0), registry.0.background.clone());
    let loaded = fingerprints(found);
    // Ends with the registry, which cancels it.
    tokio::spawn(async move { end.run_until_cancelled(watch(weak, interval, loaded)).await });
}

async fn watch(registry: Weak<Inner>, interval: Duration, mut loaded: Seen) {
    let mut unstable = Seen::new();
    let mut next = interval;
    loop {
        time::sleep(next).await;
        let Some(registry) = registry.upgrade().map(Registry) else { return };
        if let Err(error) = registry.refresh().await {
            tracing::warn!(error = chain(&error), "the models stay as they are");
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
                tracing::warn!(error = chain(&error), "the models stay as they are");
                continue;
            }
            Err(_) => return,
        };
        let Changes { stable, unstable: still, gone } = compare(&loaded, &unstable, &now);
        for name in gone {
            tracing::info!(model = name, "gone from its repository");
            registry.remove(&name);
            loaded.remove(&name);
        }
        for (name, fingerprint) in stable {
            let _changing = registry.0.changing.lock().await;
            if let Err(error) = registry.bring(&name, LoadParameters::default()).await {
                tracing::error!(model = name, error = chain(&error), "not loaded");
            }
            // Also after a failure: it is tried again when something changes.
            loaded.insert(name, fingerprint);
        }
        // A change is taken as soon as it stands still, which need not last a whole interval.
        next = if still.is_empty() { interval } else { interval.min(Duration::from_millis(500)) };
        unstable = still;
    }
}

/// What a look at the repositories found.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// Changed, and the same in two looks: nobody is writing there.
    stable: Seen,
    /// Changed since the last look.
    unstable: Seen,
    /// Not there any more.
    gone: Vec<String>,
}

fn compare(loaded: &Seen, before: &Seen, now: &Seen) -> Changes {
    let mut changes = Changes::default();
    for (name, fingerprint) in now.iter().filter(|(name, fingerprint)| loaded.get(*name) != Some(fingerprint)) {
        let known = before.get(name) == Some(fingerprint);
        let list = if known { &mut changes.stable } else { &mut changes.unstable };
        list.insert(name.clone(), *fingerprint);
    }
    changes.gone = loaded.keys().filter(|name| !now.contains_key(*name)).cloned().collect();
    changes
}

/// A folder that cannot be read has none, as if it were gone.
fn fingerprints(found: BTreeMap<String, PathBuf>) -> Seen {
    found.into_iter().filter_map(|(name, path)| Some((name, folder::fingerprint(&path).ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(models: &[(&str, u64)]) -> Seen {
        models.iter().map(|(name, fingerprint)| ((*name).to_owned(), *fingerprint)).collect()
    }

    #[test]
    fn a_change_is_taken_once_it_stands_still() {
        let loaded = seen(&[("a", 1), ("b", 1), ("c", 1)]);
        let first = compare(&loaded, &seen(&[]), &seen(&[("a", 1), ("b", 2), ("d", 7)]));
        assert_eq!((first.stable, first.gone), (seen(&[]), vec!["c".to_owned()]));
        assert_eq!(first.unstable, seen(&[("b", 2), ("d", 7)]));
        let second = compare(&loaded, &first.unstable, &seen(&[("a", 1), ("b", 3), ("d", 7), ("c", 1)]));
        assert_eq!(second, Changes { stable: seen(&[("d", 7)]), unstable: seen(&[("b", 3)]), gone: vec![] });
    }
}

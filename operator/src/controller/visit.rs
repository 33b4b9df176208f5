//! One visit to an object, and how long it took from what it came for to what it wrote.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::Error;
use super::children::Key;
use super::context::Context;

/// When there was first news of each object that has not been visited since.
#[derive(Debug, Default)]
pub(super) struct Unseen(Mutex<HashMap<(&'static str, Key), Instant>>);

impl Unseen {
    /// There is news of an object.
    pub(super) fn heard(&self, kind: &'static str, key: &Key, now: Instant) {
        let mut news = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = news.entry((kind, key.clone())).or_insert(now);
        *since = now.min(*since);
    }

    /// When there was first news of the object; it is being visited now, or it is gone.
    pub(super) fn take(&self, kind: &'static str, key: &Key) -> Option<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&(kind, key.clone()))
    }
}

/// The version of each object onto which its status was written, until its watch tells of that.
///
/// News of what a visit made arrives while it ends, and the next visit would begin with the status from before the last one: it
/// would decide the same again, and the API server refuse to write it.
#[derive(Debug, Default)]
pub(super) struct Replaced(Mutex<HashMap<(&'static str, Key), String>>);

impl Replaced {
    fn note(&self, kind: &'static str, key: &Key, version: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert((kind, key.clone()), version);
    }

    /// Whether `version` of an object, which is what its watch last told of, has been replaced by a write of ours.
    pub(super) fn is_replaced(&self, kind: &'static str, key: &Key, version: Option<&str>) -> bool {
        let mut replaced = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let object = (kind, key.clone());
        let is_replaced = replaced.get(&object).is_some_and(|old| Some(old.as_str()) == version);
        if !is_replaced {
            replaced.remove(&object);
        }
        is_replaced
    }
}

/// A visit under way. Writes are made through it, so that they are counted and timed.
pub(super) struct Visit<'a> {
    pub(super) context: &'a Context,
    kind: &'static str,
    key: Key,
    began: Instant,
    /// Since when there has been news that nobody acted on; none where the time has come for something.
    news: Option<Instant>,
    has_written: AtomicBool,
}

impl<'a> Visit<'a> {
    pub(super) fn begin(context: &'a Context, kind: &'static str, key: Key) -> Self {
        let news = context.unseen.take(kind, &key);
        Self { context, kind, key, began: Instant::now(), news, has_written: AtomicBool::new(false) }
    }

    /// Notes a write that was sent at `sent` and has just been answered. The first one of a visit is the operator's answer to
    /// the news; what follows waits for it.
    pub(super) fn wrote(&self, verb: &'static str, sent: Instant) {
        self.context.health.wrote(self.kind, verb);
        let is_first = !self.has_written.swap(true, Ordering::Relaxed);
        if let (true, Some(news)) = (is_first, self.news) {
            let answered = news.elapsed();
            self.context.health.reacted(self.kind, sent.saturating_duration_since(news), answered);
        }
    }

    /// Notes that the object's status was written onto `version`, and that there is a newer version now.
    pub(super) fn replaced(&self, version: String) {
        self.context.replaced.note(self.kind, &self.key, version);
    }

    pub(super) fn end<T>(self, result: &Result<T, Error>) {
        let outcome = match result {
            Ok(_) => "ok",
            Err(error) if error.is_conflict() => "conflict",
            Err(Error::NotReady) => "not_ready",
            Err(_) => "error",
        };
        if let (Err(_), Some(news), false) = (result, self.news, self.has_written.into_inner()) {
            // Nothing has come of it yet, and the next visit goes on with it.
            self.context.unseen.heard(self.kind, &self.key, news);
        }
        self.context.health.visited(self.kind, outcome, self.began.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_heard_first_counts_until_somebody_looks() {
        let (unseen, start) = (Unseen::default(), Instant::now());
        let key = ("a".to_owned(), "vqa".to_owned());
        unseen.heard("TrainingJob", &key, start + Duration::from_secs(2));
        unseen.heard("TrainingJob", &key, start + Duration::from_secs(1));
        unseen.heard("TrainingJob", &key, start + Duration::from_secs(3));
        assert_eq!(unseen.take("ServingJob", &key), None, "another one of that name");
        assert_eq!(unseen.take("TrainingJob", &key), Some(start + Duration::from_secs(1)));
        assert_eq!(unseen.take("TrainingJob", &key), None);
    }

    #[test]
    fn an_object_is_old_until_its_watch_tells_of_our_own_write() {
        let (replaced, key) = (Replaced::default(), ("a".to_owned(), "vqa".to_owned()));
        let is_old = |version| replaced.is_replaced("TrainingJob", &key, Some(version));
        assert!(!is_old("7"));
        replaced.note("TrainingJob", &key, "7".to_owned());
        assert!(is_old("7") && is_old("7"));
        assert!(!is_old("8"));
        assert!(!is_old("7"), "nothing is remembered once there has been news");
    }
}

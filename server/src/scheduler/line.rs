//! The line of requests that wait for one model: who gets in, who leaves early, who is next, and with whom. Pure: time
//! is an argument.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use super::{
    extent::Extent,
    policy::{Delay, Policy},
};

/// What the line knows of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    /// Its rows.
    pub(super) rows: usize,
    /// Its level of priority, 1 and up.
    pub(super) level: u64,
    /// Requests of equal classes can stand in one batch.
    pub(super) class: Vec<i64>,
    /// How far it reaches along the axes that requests choose.
    pub(super) extent: Extent,
    pub(super) arrived: Instant,
    /// Whether it does not wait for company.
    pub(super) is_alone: bool,
    /// When its level's timeout strikes.
    pub(super) timeout: Option<Instant>,
    /// When its caller stops waiting.
    pub(super) deadline: Option<Instant>,
}

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Number {
    level: u64,
    arrival: u64,
}

/// Order of service: by level; within it first those that did not wait too long; then by arrival.
type Key = (u64, bool, u64);

/// See the module. `J` is whatever belongs to a request.
#[derive(Debug)]
pub(super) struct Line<J> {
    waiting: BTreeMap<Key, (Ticket, J)>,
    /// When something happens to a request that nobody takes.
    expiries: BTreeSet<(Instant, Number)>,
    by_level: BTreeMap<u64, Level>,
    rows: usize,
    arrivals: u64,
}

/// What waits on one level of priority.
#[derive(Debug, Default)]
struct Level {
    requests: usize,
    rows: usize,
}

/// Why a request does not get in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The bound of its level.
    Level {
        /// Requests that may wait there.
        limit: usize,
    },
    /// A bound on rows: of those that go before it, or of those of all levels.
    Rows {
        /// Of these, those that wait.
        waiting: usize,
        /// Those that may.
        limit: usize,
    },
}

/// What an engine is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<R> {
    /// Run this.
    Run(R),
    /// Nothing yet; ask again at that time, or when something comes.
    Wait(Option<Instant>),
}

/// An engine that looks for work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Free {
    pub(super) now: Instant,
    /// Whether it has just run something.
    pub(super) was_busy: bool,
    /// Whether nothing more will come.
    pub(super) closing: bool,
    /// Rows of its next batch at most, where requests have not more by themselves.
    pub(super) max_rows: usize,
}

impl<J> Default for Line<J> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), expiries: BTreeSet::new(), by_level: BTreeMap::new(), rows: 0, arrivals: 0 }
    }
}

impl<J> Line<J> {
    /// Requests that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Rows that go before a newcomer on `level`.
    pub(super) fn rows_before(&self, level: u64) -> usize {
        self.by_level.range(..=level).fold(0, |rows, (_, level)| rows.saturating_add(level.rows))
    }

    /// Rows that wait.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Puts a request in its place.
    ///
    /// No more rows go before it than the policy lets wait. Beyond that all levels together are bounded, for the memory: by twice as
    /// many on level 1, and by evenly less on each level below it, so that whatever floods a level leaves room for those above.
    pub(super) fn push(&mut self, policy: &Policy, ticket: Ticket, job: J) -> Result<Number, Refused> {
        let level = policy.level(ticket.level);
        let on_level = self.by_level.get(&ticket.level).map_or(0, |level| level.requests);
        if level.max_requests > 0 && on_level >= level.max_requests {
            return Err(Refused::Level { limit: level.max_requests });
        }
        let bounds =
            [(self.rows_before(ticket.level), policy.max_waiting_rows), (self.rows, most_rows(policy, ticket.level))];
        for (waiting, limit) in bounds {
            // An empty line takes any request, so that what fits into a batch can always be run.
            if waiting > 0 && waiting.saturating_add(ticket.rows) > limit {
                return Err(Refused::Rows { waiting, limit });
            }
        }
        let number = Number { level: ticket.level, arrival: self.arrivals };
        self.arrivals += 1;
        self.rows = self.rows.saturating_add(ticket.rows);
        let level = self.by_level.entry(ticket.level).or_default();
        level.requests += 1;
        level.rows = level.rows.saturating_add(ticket.rows);
        self.expiries.extend(ticket.expiries().map(|at| (at, number)));
        self.waiting.insert((number.level, false, number.arrival), (ticket, job));
        Ok(number)
    }

    /// Takes a request out that nobody wants any more; `None` when an engine has it already.
    pub(super) fn remove(&mut self, number: Number) -> Option<J> {
        let normal = (number.level, false, number.arrival);
        let key = if self.waiting.contains_key(&normal) { normal } else { (number.level, true, number.arrival) };
        self.take(key)
    }

    /// Takes everything out.
    pub(super) fn clear(&mut self) -> Vec<J> {
        let Self { waiting, .. } = std::mem::take(self);
        waiting.into_values().map(|(_, job)| job).collect()
    }

    /// Takes out those whose time is over at `now`, and sets those back whose level is patient.
    pub(super) fn expire(&mut self, policy: &Policy, now: Instant) -> Vec<J> {
        let mut expired = Vec::new();
        while let Some(&(at, number)) = self.expiries.first().filter(|(at, _)| *at <= now) {
            self.expiries.remove(&(at, number));
            let key = (number.level, false, number.arrival);
            let late = (number.level, true, number.arrival);
            let patient = policy.level(number.level).delay_timed_out;
            let is_over = |ticket: &Ticket| ticket.deadline.is_some_and(|deadline| deadline <= now);
            match self.waiting.get(&key).or_else(|| self.waiting.get(&late)) {
                Some((ticket, _)) if patient && !is_over(ticket) => {
                    if let Some(set_back) = self.waiting.remove(&key) {
                        self.waiting.insert(late, set_back);
                    }
                }
                _ => expired.extend(self.remove(number)),
            }
        }
        expired
    }

    /// What an engine does that is `free`. What `accepts` does not take stays. Call [`Line::expire`] first.
    pub(super) fn next(
        &mut self,
        policy: &Policy,
        free: Free,
        accepts: impl FnOnce(&mut dyn Iterator<Item = &J>) -> bool,
    ) -> Next<Vec<J>> {
        let Some(batch) = self.batch(policy, free.max_rows) else { return Next::Wait(None) };
        if let Some(until) = batch.waits(policy, free).filter(|until| free.now < *until) {
            let expiry = self.expiries.first().map(|(at, _)| *at);
            return Next::Wait(Some(expiry.map_or(until, |expiry| expiry.min(until))));
        }
        let keys = batch.sent(policy, free.now);
        if !accepts(&mut keys.iter().filter_map(|key| Some(&self.waiting.get(key)?.1))) {
            return Next::Wait(Some(free.now));
        }
        Next::Run(keys.into_iter().filter_map(|key| self.take(key)).collect())
    }

    /// The first request, and with it in order each that fits: of the same class, within the bounds. One that does not
    /// fit is not overtaken for long: it is the first soon.
    fn batch(&self, policy: &Policy, max_rows: usize) -> Option<Batch> {
        let (&first_key, (first, _)) = self.waiting.first_key_value()?;
        let mut batch = Batch {
            keys: vec![(first_key, first.rows)],
            rows: first.rows,
            oldest: first.arrived,
            is_stuck: first.is_alone,
        };
        let mut extent = first.extent.clone();
        for (&key, (ticket, _)) in self.waiting.iter().skip(1) {
            if batch.rows >= max_rows {
                break;
            }
            let rows = batch.rows.saturating_add(ticket.rows);
            let fits = rows <= max_rows && ticket.class == first.class;
            let within = || policy.max_elements == 0 || extent.with(&ticket.extent).cost(rows) <= policy.max_elements;
            if fits && within() {
                batch.rows = rows;
                extent.add(&ticket.extent);
                batch.oldest = batch.oldest.min(ticket.arrived);
                batch.keys.push((key, ticket.rows));
            } else {
                // It could only be joined by what this batch cannot take: waiting would help neither.
                batch.is_stuck = true;
                if policy.preserve_ordering {
                    break;
                }
            }
        }
        Some(batch)
    }

    fn take(&mut self, key: Key) -> Option<J> {
        let (ticket, job) = self.waiting.remove(&key)?;
        self.rows = self.rows.saturating_sub(ticket.rows);
        if let Some(level) = self.by_level.get_mut(&ticket.level) {
            level.requests = level.requests.saturating_sub(1);
            level.rows = level.rows.saturating_sub(ticket.rows);
            if level.requests == 0 {
                self.by_level.remove(&ticket.level);
            }
        }
        let number = Number { level: key.0, arrival: key.2 };
        for at in ticket.expiries() {
            self.expiries.remove(&(at, number));
        }
        Some(job)
    }
}

/// Rows of all levels that may wait with one of `level`.
fn most_rows(policy: &Policy, level: u64) -> usize {
    let below = policy.levels.saturating_sub(level) as f64 / policy.levels.saturating_sub(1).max(1) as f64;
    let limit = policy.max_waiting_rows;
    limit.saturating_add((limit as f64 * below) as usize)
}

impl Ticket {
    fn expiries(&self) -> impl Iterator<Item = Instant> + use<> {
        self.timeout.into_iter().chain(self.deadline)
    }
}

/// Requests that could run together.
struct Batch {
    /// With their rows.
    keys: Vec<(Key, usize)>,
    rows: usize,
    oldest: Instant,
    is_stuck: bool,
}

impl Batch {
    /// Until when it waits for more; `None` for not at all.
    fn waits(&self, policy: &Policy, free: Free) -> Option<Instant> {
        let delay = match policy.delay {
            _ if free.closing => return None,
            Delay::WhenBusy(delay) if free.was_busy => delay,
            Delay::WhenBusy(_) => return None,
            Delay::Always(delay) => delay,
        };
        let is_ready = self.rows >= free.max_rows || self.is_stuck || self.preferred(policy).is_some();
        (!is_ready).then(|| self.oldest + delay)
    }

    /// How many of its requests make the largest preferred size.
    fn preferred(&self, policy: &Policy) -> Option<usize> {
        let mut rows = 0;
        let sizes = self.keys.iter().enumerate().map(|(index, (_, own))| {
            rows += own;
            (index + 1, rows)
        });
        sizes.filter(|(_, rows)| policy.preferred.contains(rows)).last().map(|(requests, _)| requests)
    }

    /// Those that run now: a preferred size where there is one, else all; and all, as in Triton, once the oldest has waited for as
    /// long as any has to.
    fn sent(&self, policy: &Policy, now: Instant) -> Vec<Key> {
        let is_overdue = matches!(policy.delay, Delay::Always(delay) if now >= self.oldest + delay);
        let count = self.preferred(policy).filter(|_| !is_overdue).unwrap_or(self.keys.len());
        self.keys[..count].iter().map(|(key, _)| *key).collect()
    }
}

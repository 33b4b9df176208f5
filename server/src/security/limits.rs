//! How much one client may ask: so many requests at a time, and so many per second. The clock is the caller's.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    time::{Duration, Instant},
};

/// Clients that are remembered. Beyond it, those that are idle are forgotten: they have their whole allowance back.
const REMEMBERED: usize = 10_000;

/// What each client may do. Either may be without limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests per second; as many may come at once after a pause of a second.
    pub per_second: Option<NonZeroU32>,
    /// Requests at a time.
    pub at_once: Option<NonZeroU32>,
}

/// Which limit a request is beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beyond {
    PerSecond(NonZeroU32),
    AtOnce(NonZeroU32),
}

/// What clients have used of their limits.
#[derive(Debug, Default)]
pub(super) struct Used {
    clients: HashMap<String, Client>,
}

/// What one client has used.
#[derive(Debug)]
struct Client {
    running: u32,
    /// Requests that it may still make, as of `at`.
    allowance: f64,
    at: Instant,
}

impl Used {
    /// Counts a request of `client` that begins, if its limits allow it.
    pub(super) fn begin(&mut self, limits: Limits, client: &str, now: Instant) -> Result<(), Beyond> {
        if self.clients.len() >= REMEMBERED && !self.clients.contains_key(client) {
            let second = Duration::from_secs(1);
            self.clients.retain(|_, used| used.running > 0 || now.saturating_duration_since(used.at) < second);
        }
        let full = limits.per_second.map_or(0.0, |rate| f64::from(rate.get()));
        if !self.clients.contains_key(client) {
            self.clients.insert(client.to_owned(), Client { running: 0, allowance: full, at: now });
        }
        let Some(used) = self.clients.get_mut(client) else { return Ok(()) };
        if let Some(most) = limits.at_once
            && used.running >= most.get()
        {
            return Err(Beyond::AtOnce(most));
        }
        if let Some(rate) = limits.per_second {
            let passed = now.saturating_duration_since(used.at).as_secs_f64();
            used.allowance = (used.allowance + passed * full).min(full);
            used.at = now;
            if used.allowance < 1.0 {
                return Err(Beyond::PerSecond(rate));
            }
            used.allowance -= 1.0;
        }
        used.running += 1;
        Ok(())
    }

    /// Counts one of its requests as done.
    pub(super) fn end(&mut self, client: &str) {
        if let Some(used) = self.clients.get_mut(client) {
            used.running = used.running.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(per_second: u32, at_once: u32) -> Limits {
        Limits { per_second: NonZeroU32::new(per_second), at_once: NonZeroU32::new(at_once) }
    }

    #[test]
    fn a_client_has_its_allowance_back_after_a_second() {
        let (mut used, start) = (Used::default(), Instant::now());
        let mut begun = |milliseconds: u64| {
            let now = start + Duration::from_millis(milliseconds);
            (0..10).filter(|_| used.begin(limits(4, 0), "a", now).is_ok()).count()
        };
        assert_eq!([begun(0), begun(1), begun(500), begun(10_000)], [4, 0, 2, 4]);
    }

    #[test]
    fn clients_do_not_share_their_limits() {
        let (mut used, now) = (Used::default(), Instant::now());
        assert_eq!(used.begin(limits(0, 1), "a", now), Ok(()));
        assert_eq!(used.begin(limits(0, 1), "a", now), Err(Beyond::AtOnce(NonZeroU32::MIN)));
        assert_eq!(used.begin(limits(0, 1), "b", now), Ok(()));
        used.end("a");
        assert_eq!(used.begin(limits(0, 1), "a", now), Ok(()));
    }

    #[test]
    fn a_flood_of_clients_takes_no_more_than_its_share_of_memory() {
        let (mut used, start) = (Used::default(), Instant::now());
        used.begin(limits(5, 5), "busy", start).unwrap();
        for client in 0..3 * REMEMBERED as u64 {
            let name = client.to_string();
            used.begin(limits(5, 5), &name, start + Duration::from_millis(client)).unwrap();
            used.end(&name);
        }
        assert!(used.clients.len() <= REMEMBERED + 1);
        assert_eq!(used.clients["busy"].running, 1);
    }
}

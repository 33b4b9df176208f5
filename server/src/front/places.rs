//! How many connections there may be at a time.
//!
//! Each is a file descriptor and some memory before it has asked anything. One too many is closed at once: its client may go
//! to another server, where one that is left waiting in the backlog would only learn by its own timeout that this one is full.

use std::num::NonZeroU32;

use crate::metrics::ConnectionMetrics;

/// Places for connections of clients, of all ports together. Clones share them.
#[derive(Clone, Debug)]
pub struct Places {
    limit: u32,
    /// What is taken is counted by the gauge that shows it.
    metrics: ConnectionMetrics,
}

/// The place of one connection, until this is dropped.
#[derive(Debug)]
pub(super) struct Place(ConnectionMetrics);

impl Places {
    /// So many places.
    pub fn new(limit: NonZeroU32, metrics: ConnectionMetrics) -> Self {
        metrics.limit(limit.get());
        Self { limit: limit.get(), metrics }
    }

    /// A place, if there is one; that there is none is counted.
    pub(super) fn take(&self) -> Option<Place> {
        let open = self.metrics.opened();
        let place = Place(self.metrics.clone());
        if open < self.limit {
            return Some(place);
        }
        self.metrics.refused();
        None
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.closed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Counted, Metrics};

    #[test]
    fn a_place_that_is_given_back_is_the_next_ones() {
        let metrics = Metrics::new();
        let places = Places::new(NonZeroU32::new(2).unwrap(), metrics.connections());
        let (first, _second) = (places.take().unwrap(), places.take().unwrap());
        assert!(places.take().is_none() && places.clone().take().is_none());
        drop(first);
        assert!(places.take().is_some());
        let page = metrics.encode(&Counted::default()).unwrap();
        for line in [
            "sensorium_server_connections 1",
            "sensorium_server_connections_limit 2",
            "sensorium_server_connections_refusals_total 2",
        ] {
            assert!(page.contains(&format!("\n{line}\n")), "{line} is not in\n{page}");
        }
    }
}

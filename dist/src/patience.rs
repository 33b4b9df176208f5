//! How long ranks wait for each other.

use std::time::Duration;

/// What the waiting of a rank that was cancelled ended with.
pub(crate) const CANCELLED: &str = "the waiting was cancelled";

/// How long the ranks of a group wait for each other: to meet, and later in every operation.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    /// For the others to come while the group is made. Processes may start minutes apart.
    pub joining: Duration,
    /// For each operation of the group.
    pub operation: Duration,
    /// Asked again and again while joining; `true` ends it early, with the error that ends it when the time is over.
    pub cancelled: &'a dyn Fn() -> bool,
}

impl Patience<'static> {
    /// Nobody cancels it.
    pub fn new(joining: Duration, operation: Duration) -> Self {
        Self { joining, operation, cancelled: &never }
    }
}

pub(crate) fn never() -> bool {
    false
}

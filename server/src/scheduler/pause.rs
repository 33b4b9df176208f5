//! How many times pass until something is tried again that costs a little and is seldom worth it. Pure.

/// See the module. It grows with each attempt that was not worth it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pause {
    left: u32,
    last: u32,
    shortest: u32,
    longest: u32,
    factor: u32,
}

impl Pause {
    /// Of `shortest` times at first and after an attempt that was worth it, and of `factor` times as many as before after another,
    /// up to `longest`.
    pub(super) const fn new(shortest: u32, longest: u32, factor: u32) -> Self {
        Self { left: shortest, last: shortest, shortest, longest, factor }
    }

    /// The same with the first attempt at once.
    pub(super) const fn over(self) -> Self {
        Self { left: 0, ..self }
    }

    /// One of its times has passed.
    pub(super) fn pass(&mut self) {
        self.left = self.left.saturating_sub(1);
    }

    pub(super) fn is_over(&self) -> bool {
        self.left == 0
    }

    /// The attempt was made.
    pub(super) fn begin(&mut self, was_worth_it: bool) {
        self.last = if was_worth_it { self.shortest } else { self.last.saturating_mul(self.factor).min(self.longest) };
        self.left = self.last;
    }
}

//! How one model's requests are queued and put together, as its configuration says. Pure.

use std::{collections::BTreeMap, time::Duration};

use sensorium_proto::inference::{
    ModelConfig, ModelDynamicBatching, ModelQueuePolicy, model_config::SchedulingChoice,
    model_queue_policy::TimeoutAction, model_sequence_batching::StrategyChoice,
};

use super::Batching;

/// What a scheduler decides by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Rows of the largest batch; 1 where requests are never put together.
    pub max_rows: usize,
    /// Whether batches may be of fewer rows where that runs more of them per second.
    pub finds_size: bool,
    /// Batch sizes to aim at, ascending; empty means `max_rows` alone.
    pub preferred: Vec<usize>,
    /// How long the oldest request waits for company.
    pub delay: Delay,
    /// Whether answers leave in the order in which requests came.
    pub preserve_ordering: bool,
    /// Levels of priority; 1 is served first. At least 1.
    pub levels: u64,
    /// The level of a request that names none.
    pub default_level: u64,
    /// What holds on every level that `by_level` has not.
    pub queue: QueuePolicy,
    /// What holds on single levels.
    pub by_level: BTreeMap<u64, QueuePolicy>,
    /// Rows that may wait on a level and those above it, and half of what may on all together: the bound on memory.
    pub max_waiting_rows: usize,
    /// How unequal requests are made equal.
    pub padding: Option<Padding>,
    /// Elements of a batch at most, along the axes that requests choose and after padding; 0 for no bound. A request that
    /// has more runs alone.
    pub max_elements: usize,
    /// How inputs are put together that are no rows, by their index in the graph.
    pub joins: BTreeMap<usize, Join>,
    /// Whether what a run has done stays done, as engines have it that keep something of each for their sequences.
    pub runs_once: bool,
    /// Rows that batches are filled up to, ascending, for engines to which every other number is something new; empty for those
    /// that take any.
    pub steps: Vec<usize>,
}

/// When a batch that is not full waits for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// Only behind a run, when more is likely on its way: what finds the engine idle runs at once.
    WhenBusy(Duration),
    /// Also while an engine is idle, as the model's configuration asks.
    Always(Duration),
}

/// What holds for the requests of one level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuePolicy {
    /// Requests that may wait; 0 for no bound of its own.
    pub max_requests: usize,
    /// How long a request may wait, where the request does not say less.
    pub timeout: Option<Duration>,
    /// Whether a request may shorten that.
    pub allow_override: bool,
    /// Whether one that waited too long is served last instead of refused.
    pub delay_timed_out: bool,
}

/// Requests whose inputs differ in length, made equal with a value that the model ignores.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Padding {
    /// The value for each input, by name.
    pub values: BTreeMap<String, f64>,
    /// For each output of the graph, which of its sizes follow those of inputs; `None` where only their names tell.
    pub follows: Option<Vec<Vec<Follows>>>,
}

/// A size of an output that is as large as one of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Follows {
    /// Which size of the output.
    pub axis: usize,
    /// Which input.
    pub input: usize,
    /// Which size of that.
    pub followed: usize,
}

impl Eq for Padding {}

/// How an input of several requests becomes one, where its first axis is not the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// One behind the other, however long each is.
    Flat,
    /// What the server says of each request, one behind the other.
    Listed,
    /// Counts that are summed up: those of a request begin where those before it end.
    Summed {
        /// Whether a zero stands before them.
        with_zero: bool,
    },
    /// The longest one stands for all.
    Longest,
}

impl Policy {
    /// The policy of a server that a model without a configuration has.
    pub fn of_server(batching: Batching) -> Self {
        Self {
            max_rows: batching.max_rows,
            finds_size: true,
            preferred: Vec::new(),
            delay: Delay::WhenBusy(batching.max_delay),
            preserve_ordering: false,
            levels: 1,
            default_level: 1,
            queue: QueuePolicy::default(),
            by_level: BTreeMap::new(),
            max_waiting_rows: batching.max_waiting_rows,
            padding: None,
            max_elements: 0,
            joins: BTreeMap::new(),
            runs_once: false,
            steps: Vec::new(),
        }
    }

    /// The same, with few sizes of batches: those that the model's configuration prefers, and powers of two up to the least of them or
    /// to all rows.
    #[must_use]
    pub fn in_steps(mut self) -> Self {
        let least = self.preferred.first().copied().unwrap_or(self.max_rows);
        let powers = std::iter::successors(Some(1_usize), |step| step.checked_mul(2)).take_while(|step| *step < least);
        let mut steps: Vec<usize> = powers.chain(self.preferred.iter().copied()).collect();
        steps.push(self.max_rows);
        steps.sort_unstable();
        steps.dedup();
        self.steps = steps;
        self
    }

    /// Rows that a batch of `rows` is filled up with.
    pub(super) fn filling(&self, rows: usize) -> usize {
        self.steps.iter().find(|step| **step >= rows).map_or(0, |step| step - rows)
    }

    /// The policy that a complete configuration states; `batching` has what it leaves to the server.
    ///
    /// # Errors
    /// The first option that makes no sense, as a sentence about the model.
    pub fn of_model(config: &ModelConfig, batching: Batching) -> Result<Self, String> {
        // Whoever writes a large batch size wants the queue to hold a few of them.
        let max_rows = usize::try_from(config.max_batch_size).unwrap_or(0).max(1);
        let max_waiting_rows = batching.max_waiting_rows.max(max_rows.saturating_mul(2));
        let base = Self { max_rows, max_waiting_rows, finds_size: false, ..Self::of_server(batching) };
        match &config.scheduling_choice {
            Some(SchedulingChoice::DynamicBatching(dynamic)) => base.dynamic(dynamic),
            Some(SchedulingChoice::SequenceBatching(sequence)) => match &sequence.strategy_choice {
                Some(StrategyChoice::Oldest(oldest)) => Ok(Self {
                    preferred: base.preferred("sequence_batching.oldest", &oldest.preferred_batch_size)?,
                    delay: base.waiting(oldest.max_queue_delay_microseconds),
                    preserve_ordering: oldest.preserve_ordering,
                    ..base
                }),
                Some(StrategyChoice::Direct(direct)) => {
                    let share = direct.minimum_slot_utilization;
                    if !(0.0..=1.0).contains(&share) {
                        return Err(format!("its direct has minimum_slot_utilization {share}, which must be 0 to 1"));
                    }
                    // Only a batch of fewer seats than that waits.
                    let enough = (share * max_rows as f32).ceil() as usize;
                    let delay = if enough > 1 { base.waiting(direct.max_queue_delay_microseconds) } else { base.delay };
                    let preferred = if enough > 1 { (enough..=max_rows).collect() } else { Vec::new() };
                    Ok(Self { preferred, delay, ..base })
                }
                None => Ok(base),
            },
            // Requests may have several rows, and each runs by itself.
            Some(SchedulingChoice::EnsembleScheduling(_)) | None => Ok(Self { max_rows: 1, ..base }),
        }
    }

    fn waiting(&self, microseconds: u64) -> Delay {
        if microseconds == 0 { self.delay } else { Delay::Always(Duration::from_micros(microseconds)) }
    }

    /// Checked batch sizes, ascending.
    fn preferred(&self, option: &str, sizes: &[i32]) -> Result<Vec<usize>, String> {
        let check = |&size: &i32| match usize::try_from(size) {
            Ok(size) if (1..=self.max_rows).contains(&size) => Ok(size),
            _ => Err(format!(
                "its {option} has preferred_batch_size {size}, which must be 1 to its max_batch_size, {}",
                self.max_rows
            )),
        };
        let mut preferred = sizes.iter().map(check).collect::<Result<Vec<_>, _>>()?;
        preferred.sort_unstable();
        preferred.dedup();
        Ok(preferred)
    }

    fn dynamic(self, dynamic: &ModelDynamicBatching) -> Result<Self, String> {
        let levels = dynamic.priority_levels.max(1);
        let default_level = match dynamic.default_priority_level {
            0 if dynamic.priority_levels > 0 => {
                return Err(format!("its dynamic_batching has {levels} priority_levels and no default_priority_level"));
            }
            level if level > levels => {
                return Err(format!(
                    "its dynamic_batching has default_priority_level {level}, but {levels} priority_levels"
                ));
            }
            level => level.max(1),
        };
        if let Some(level) = dynamic.priority_queue_policy.keys().find(|level| !(1..=levels).contains(*level)) {
            return Err(format!(
                "its dynamic_batching has a priority_queue_policy for level {level}, but {levels} priority_levels"
            ));
        }
        if dynamic.preserve_ordering && levels > 1 {
            return Err("its dynamic_batching has preserve_ordering and priority_levels, which contradict".to_owned());
        }
        Ok(Self {
            // Who names sizes wants these.
            finds_size: dynamic.preferred_batch_size.is_empty(),
            preferred: self.preferred("dynamic_batching", &dynamic.preferred_batch_size)?,
            delay: self.waiting(dynamic.max_queue_delay_microseconds),
            preserve_ordering: dynamic.preserve_ordering,
            levels,
            default_level,
            queue: dynamic.default_queue_policy.as_ref().map(QueuePolicy::from).unwrap_or_default(),
            by_level: dynamic.priority_queue_policy.iter().map(|(level, policy)| (*level, policy.into())).collect(),
            ..self
        })
    }

    /// What holds on a level.
    pub fn level(&self, level: u64) -> &QueuePolicy {
        self.by_level.get(&level).unwrap_or(&self.queue)
    }
}

impl From<&ModelQueuePolicy> for QueuePolicy {
    fn from(policy: &ModelQueuePolicy) -> Self {
        let timeout = policy.default_timeout_microseconds;
        Self {
            max_requests: policy.max_queue_size as usize,
            timeout: (timeout > 0).then_some(Duration::from_micros(timeout)),
            allow_override: policy.allow_timeout_override,
            delay_timed_out: policy.timeout_action() == TimeoutAction::Delay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_powers_of_two_or_what_is_preferred_and_always_hold_one_row_and_all() {
        let policy = |max_rows, preferred: &[usize]| {
            let batching = Batching { max_rows, max_waiting_rows: 100, max_delay: Duration::ZERO };
            Policy { preferred: preferred.to_vec(), ..Policy::of_server(batching) }
        };
        for (max_rows, preferred, steps) in [
            (1, &[][..], &[1][..]),
            (8, &[], &[1, 2, 4, 8]),
            (12, &[], &[1, 2, 4, 8, 12]),
            (32, &[8, 16], &[1, 2, 4, 8, 16, 32]),
            (16, &[1, 16], &[1, 16]),
        ] {
            assert_eq!(policy(max_rows, preferred).in_steps().steps, steps, "{max_rows}");
        }
        let stepped = policy(12, &[]).in_steps();
        assert_eq!([1, 2, 3, 5, 9, 12, 13].map(|rows| stepped.filling(rows)), [0, 0, 1, 3, 3, 0, 0]);
        assert_eq!(policy(12, &[]).filling(3), 0, "there are no steps");
    }
}

//! The line by itself, with time that the test makes.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use sensorium_proto::inference::{
    ModelConfig, ModelSequenceBatching,
    model_config::SchedulingChoice,
    model_sequence_batching::{StrategyChoice, StrategyDirect},
};

use super::{
    Batching, Delay, Policy, QueuePolicy,
    extent::Extent,
    line::{Free, Line, Next, Number, Refused, Ticket},
};

fn policy(max_rows: usize) -> Policy {
    Policy::of_server(Batching { max_rows, max_waiting_rows: 1000, max_delay: Duration::ZERO })
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn ticket(rows: usize, arrived: Instant) -> Ticket {
    Ticket {
        rows,
        level: 1,
        class: Vec::new(),
        extent: Extent::default(),
        arrived,
        is_alone: false,
        timeout: None,
        deadline: None,
    }
}

/// A line of requests that are called by number, in order of their coming.
struct Bench {
    line: Line<usize>,
    policy: Policy,
    start: Instant,
    numbers: Vec<Number>,
}

impl Bench {
    fn new(policy: Policy) -> Self {
        Self { line: Line::default(), policy, start: Instant::now(), numbers: Vec::new() }
    }

    fn find(&mut self, now: Instant, was_busy: bool, closing: bool) -> Next<Vec<usize>> {
        let free = Free { now, was_busy, closing, max_rows: self.policy.max_rows };
        self.line.next(&self.policy, free, |_| true)
    }

    fn push(&mut self, ticket: Ticket) -> Result<(), Refused> {
        let number = self.line.push(&self.policy, ticket, self.numbers.len())?;
        self.numbers.push(number);
        Ok(())
    }

    /// One that came `at` milliseconds after the start.
    fn come(&mut self, rows: usize, at: u64, change: impl FnOnce(&mut Ticket)) {
        let mut ticket = ticket(rows, self.start + ms(at));
        change(&mut ticket);
        self.push(ticket).unwrap();
    }

    /// What an idle engine does `at` milliseconds after the start: the requests it runs, or when it asks again.
    fn next(&mut self, at: u64) -> Result<Vec<usize>, Option<u64>> {
        match self.find(self.start + ms(at), false, false) {
            Next::Run(jobs) => Ok(jobs),
            Next::Wait(until) => Err(until.map(|until| (until - self.start).as_millis() as u64)),
        }
    }

    fn expire(&mut self, at: u64) -> Vec<usize> {
        self.line.expire(&self.policy, self.start + ms(at))
    }
}

#[test]
fn a_lower_level_number_goes_first_and_fills_its_batch_from_below() {
    let mut bench = Bench::new(Policy { levels: 3, ..policy(3) });
    bench.come(1, 0, |ticket| ticket.level = 3);
    bench.come(1, 1, |ticket| ticket.level = 1);
    bench.come(1, 2, |ticket| ticket.level = 2);
    bench.come(1, 3, |ticket| ticket.level = 1);
    assert_eq!(bench.next(9), Ok(vec![1, 3, 2]));
    assert_eq!(bench.next(9), Ok(vec![0]));
    assert_eq!(bench.next(9), Err(None));
}

#[test]
fn where_order_is_kept_none_goes_before_one_that_does_not_fit() {
    for (preserve_ordering, first) in [(true, vec![0]), (false, vec![0, 2])] {
        let mut bench = Bench::new(Policy { preserve_ordering, ..policy(8) });
        for rows in [6, 4, 2] {
            bench.come(rows, 0, |_| {});
        }
        assert_eq!(bench.next(9), Ok(first));
    }
}

#[test]
fn each_level_has_a_bound_of_its_own_on_requests_and_one_on_rows_with_those_above() {
    let narrow = QueuePolicy { max_requests: 1, ..QueuePolicy::default() };
    let mut bench =
        Bench::new(Policy { levels: 2, by_level: BTreeMap::from([(2, narrow)]), max_waiting_rows: 4, ..policy(8) });
    let at = |level| Ticket { level, ..ticket(1, Instant::now()) };
    bench.push(at(2)).unwrap();
    assert_eq!(bench.push(at(2)), Err(Refused::Level { limit: 1 }));
    bench.push(at(1)).unwrap();
    assert_eq!(bench.push(ticket(4, Instant::now())), Err(Refused::Rows { waiting: 1, limit: 4 }));
    assert_eq!(bench.next(0).unwrap().len(), 2);
    bench.push(at(2)).expect("there is room again");
}

#[test]
fn a_flood_on_one_level_leaves_room_for_those_above_it() {
    let mut bench = Bench::new(Policy { levels: 3, max_waiting_rows: 4, ..policy(8) });
    let mut flood = |level| loop {
        if let Err(refused) = bench.push(Ticket { level, ..ticket(1, Instant::now()) }) {
            return (refused, bench.line.rows());
        }
    };
    assert_eq!(flood(3), (Refused::Rows { waiting: 4, limit: 4 }, 4));
    assert_eq!(flood(2), (Refused::Rows { waiting: 6, limit: 6 }, 6), "half of what is left is for level 1");
    assert_eq!(flood(1), (Refused::Rows { waiting: 8, limit: 8 }, 8));
    assert_eq!(flood(3), (Refused::Rows { waiting: 8, limit: 4 }, 8));
    let mut bench = Bench::new(Policy { levels: 3, max_waiting_rows: 4, ..policy(8) });
    for _ in 0..4 {
        bench.come(1, 0, |_| {});
    }
    let refused = bench.push(ticket(1, Instant::now()));
    assert_eq!(refused, Err(Refused::Rows { waiting: 4, limit: 4 }), "no level has more for itself than the limit");
}

#[test]
fn delay_waits_for_the_oldest_unless_more_would_not_help() {
    let delayed = || Policy { delay: Delay::Always(ms(100)), preferred: vec![2, 4], ..policy(8) };
    let mut bench = Bench::new(delayed());
    bench.come(1, 10, |_| {});
    assert_eq!(bench.next(50), Err(Some(110)), "until the oldest waited for 100 ms");
    assert_eq!(bench.next(110), Ok(vec![0]), "then with whatever is there");
    for at in [0, 1, 2, 3, 4] {
        bench.come(1, at, |_| {});
    }
    assert_eq!(bench.next(5), Ok(vec![1, 2, 3, 4]), "the largest preferred size goes at once");
    assert_eq!(bench.next(5), Err(Some(104)), "and the rest waits");
    bench.come(1, 6, |ticket| ticket.class = vec![7]);
    assert_eq!(bench.next(6), Ok(vec![5]), "a request of another shape ends the wait");
    let mut bench = Bench::new(delayed());
    bench.come(8, 0, |_| {});
    assert_eq!(bench.next(0), Ok(vec![0]), "a full batch does not wait");
    bench.come(1, 0, |ticket| ticket.is_alone = true);
    assert_eq!(bench.next(0), Ok(vec![1]), "and neither does who wants no company");
    let mut bench = Bench::new(delayed());
    for at in 0..5 {
        bench.come(1, at, |_| {});
    }
    assert_eq!(bench.next(100), Ok(vec![0, 1, 2, 3, 4]), "after the delay a preferred size holds nobody back");
}

#[test]
fn enough_seats_do_not_wait_and_more_of_them_go_along() {
    let direct = StrategyDirect { minimum_slot_utilization: 0.5, max_queue_delay_microseconds: 100_000 };
    let sequence =
        ModelSequenceBatching { strategy_choice: Some(StrategyChoice::Direct(direct)), ..Default::default() };
    let config = ModelConfig {
        max_batch_size: 8,
        scheduling_choice: Some(SchedulingChoice::SequenceBatching(sequence)),
        ..ModelConfig::default()
    };
    let batching = Batching { max_rows: 8, max_waiting_rows: 1000, max_delay: Duration::ZERO };
    let mut bench = Bench::new(Policy::of_model(&config, batching).unwrap());
    for _ in 0..3 {
        bench.come(1, 0, |_| {});
    }
    assert_eq!(bench.next(1), Err(Some(100)), "three of eight are not half of them");
    for _ in 0..3 {
        bench.come(1, 1, |_| {});
    }
    assert_eq!(bench.next(1), Ok(vec![0, 1, 2, 3, 4, 5]));
}

#[test]
fn behind_a_run_the_server_waits_for_company_and_in_front_of_none() {
    let mut bench = Bench::new(Policy { delay: Delay::WhenBusy(ms(5)), ..policy(8) });
    bench.come(1, 0, |_| {});
    let now = bench.start + ms(1);
    assert_eq!(bench.find(now, true, false), Next::Wait(Some(bench.start + ms(5))));
    assert_eq!(bench.find(now, true, true), Next::Run(vec![0]), "nothing more comes at the end");
    bench.come(1, 0, |_| {});
    assert_eq!(bench.next(1), Ok(vec![1]));
}

#[test]
fn who_waited_too_long_is_refused_or_served_last() {
    let patient = QueuePolicy { delay_timed_out: true, ..QueuePolicy::default() };
    let mut bench = Bench::new(Policy { levels: 2, by_level: BTreeMap::from([(1, patient)]), ..policy(1) });
    let (late, later) = (bench.start + ms(10), bench.start + ms(30));
    bench.come(1, 0, |ticket| (ticket.timeout, ticket.deadline) = (Some(late), Some(later)));
    bench.come(1, 1, |_| {});
    bench.come(1, 2, |ticket| (ticket.level, ticket.timeout) = (2, Some(late)));
    assert_eq!(bench.expire(9), [0; 0]);
    assert_eq!(bench.expire(10), [2], "level 2 refuses");
    assert_eq!(bench.next(10), Ok(vec![1]), "level 1 serves the late one last");
    assert_eq!(bench.expire(30), [0], "but not when nobody waits for it any more");
    assert_eq!((bench.line.len(), bench.line.rows()), (0, 0));
}

#[test]
fn padding_is_bounded_by_the_elements_of_a_batch() {
    let mut bench = Bench::new(Policy { max_elements: 12, ..policy(8) });
    for length in [4, 3, 6, 4] {
        bench.come(1, 0, |ticket| ticket.extent.reach(0, length));
    }
    assert_eq!(bench.next(0), Ok(vec![0, 1, 3]), "with the long one it would be 3 rows of 6");
    assert_eq!(bench.next(0), Ok(vec![2]));
}

#[derive(Clone, Debug)]
enum Event {
    Come { rows: usize, level: u64, class: i64, timeout: Option<u64> },
    Leave(prop::sample::Index),
    Next { was_busy: bool },
}

fn event() -> impl Strategy<Value = Event> {
    let come = (1..6_usize, 1..4_u64, 0..2_i64, prop::option::of(0..20_u64));
    prop_oneof![
        3 => come.prop_map(|(rows, level, class, timeout)| Event::Come { rows, level, class, timeout }),
        1 => any::<prop::sample::Index>().prop_map(Event::Leave),
        2 => any::<bool>().prop_map(|was_busy| Event::Next { was_busy }),
    ]
}

proptest! {
    #[test]
    fn nobody_is_lost_or_served_twice_and_batches_keep_their_bounds(
        events in prop::collection::vec((0..5_u64, event()), 1..80),
        delay in 0..20_u64,
        preferred in prop::collection::vec(1..8_usize, 0..3),
    ) {
        let mut bench = Bench::new(Policy {
            levels: 3, preferred, delay: Delay::Always(ms(delay)), max_waiting_rows: 30, ..policy(8)
        });
        let mut tickets: Vec<Ticket> = Vec::new();
        let mut fate: Vec<&str> = Vec::new();
        let mut clock = 0;
        let settle = |fate: &mut Vec<&str>, jobs: Vec<usize>, end| {
            for job in jobs {
                prop_assert_eq!(fate[job], "waits");
                fate[job] = end;
            }
            Ok(())
        };
        for (pause, event) in events {
            clock += pause;
            match event {
                Event::Come { rows, level, class, timeout } => {
                    let now = bench.start + ms(clock);
                    let timeout = timeout.map(|timeout| now + ms(timeout));
                    let ticket = Ticket { level, class: vec![class], timeout, ..ticket(rows, now) };
                    if bench.push(ticket.clone()).is_ok() {
                        tickets.push(ticket);
                        fate.push("waits");
                    }
                }
                Event::Leave(who) if !tickets.is_empty() => {
                    let job = who.index(tickets.len());
                    let removed = bench.line.remove(bench.numbers[job]);
                    prop_assert_eq!(removed.is_some(), fate[job] == "waits");
                    settle(&mut fate, removed.into_iter().collect(), "left")?;
                }
                Event::Leave(_) => {}
                Event::Next { was_busy } => {
                    let now = bench.start + ms(clock);
                    settle(&mut fate, bench.line.expire(&bench.policy, now), "expired")?;
                    match bench.find(now, was_busy, false) {
                        Next::Run(jobs) => {
                            prop_assert!(!jobs.is_empty());
                            prop_assert!(jobs.iter().map(|job| tickets[*job].rows).sum::<usize>() <= 8);
                            prop_assert!(jobs.iter().all(|job| tickets[*job].class == tickets[jobs[0]].class));
                            let best = (0..fate.len()).filter(|job| fate[*job] == "waits").map(|job| tickets[job].level).min();
                            prop_assert_eq!(Some(tickets[jobs[0]].level), best, "the first is of the best level");
                            settle(&mut fate, jobs, "ran")?;
                        }
                        Next::Wait(Some(until)) => prop_assert!(until > now && until <= now + ms(delay)),
                        Next::Wait(None) => prop_assert_eq!(bench.line.len(), 0),
                    }
                }
            }
            prop_assert!(bench.line.rows() <= 60, "twice the limit, at most");
            let waiting = (0..fate.len()).filter(|job| fate[*job] == "waits");
            prop_assert_eq!(waiting.map(|job| tickets[job].rows).sum::<usize>(), bench.line.rows());
        }
        // In the end everybody who still waits is served.
        let end = bench.start + ms(clock + 1000);
        settle(&mut fate, bench.line.expire(&bench.policy, end), "expired")?;
        while let Next::Run(jobs) = bench.find(end, false, false) {
            settle(&mut fate, jobs, "ran")?;
        }
        prop_assert!(!fate.contains(&"waits"));
    }

    #[test]
    fn a_batch_costs_no_more_than_it_may_and_takes_all_that_fits(
        requests in prop::collection::vec((1..4_usize, 1..40_usize, 1..5_usize, 0..30_usize, 0..2_i64), 1..60),
        max_elements in 1..200_usize,
    ) {
        let mut bench = Bench::new(Policy { max_elements, ..policy(16) });
        let mut tickets = Vec::new();
        for (index, (rows, long, wide, flat, class)) in requests.into_iter().enumerate() {
            bench.come(rows, index as u64, |ticket| {
                ticket.class = vec![class];
                for (input, size) in [(0, long), (0, wide), (1, long)] {
                    ticket.extent.reach(input, size);
                }
                ticket.extent.lie(flat);
                tickets.push(ticket.clone());
            });
        }
        let cost = |jobs: &[usize]| {
            let mut all = Extent::default();
            for job in jobs {
                all.add(&tickets[*job].extent);
            }
            all.cost(jobs.iter().map(|job| tickets[*job].rows).sum())
        };
        let mut waiting: Vec<usize> = (0..tickets.len()).collect();
        while let Ok(jobs) = bench.next(1000) {
            prop_assert_eq!(jobs[0], waiting[0], "the oldest is never left behind");
            prop_assert!(jobs.len() == 1 || cost(&jobs) <= max_elements);
            waiting.retain(|job| !jobs.contains(job));
            let rows: usize = jobs.iter().map(|job| tickets[*job].rows).sum();
            for left in waiting.iter().filter(|left| tickets[**left].class == tickets[jobs[0]].class) {
                let with = [&jobs[..], &[*left]].concat();
                let fits = rows + tickets[*left].rows <= 16 && cost(&with) <= max_elements;
                prop_assert!(!fits, "{left} would have found room beside {jobs:?}");
            }
        }
        prop_assert!(waiting.is_empty());
    }
}

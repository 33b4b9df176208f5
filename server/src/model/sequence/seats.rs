//! Who may be under way, and where: a seat is a row of an instance's batch, and a sequence has one for its life.
//!
//! [`Board`] decides and knows neither threads nor clocks; [`Seats`] shares it, and hands out [`Seat`]s that give
//! themselves back.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// Where a sequence sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Position {
    /// Which instance runs it.
    pub(super) instance: usize,
    /// Its row there.
    pub(super) row: usize,
}

/// The seats of all instances and those who wait for one, in the order of their coming. Pure.
#[derive(Debug)]
struct Board<W> {
    /// By instance: whether each row is taken.
    taken: Vec<Vec<bool>>,
    waiting: VecDeque<(u64, W)>,
    tickets: u64,
    most_waiting: usize,
}

/// No seat is free, and as many wait as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

impl<W> Board<W> {
    fn new(instances: usize, rows: usize, most_waiting: usize) -> Self {
        Self { taken: vec![vec![false; rows]; instances], waiting: VecDeque::new(), tickets: 0, most_waiting }
    }

    /// A free seat of the instance that has most of them, the lowest row there.
    fn sit(&mut self) -> Option<Position> {
        let free = |rows: &Vec<bool>| rows.iter().filter(|taken| !**taken).count();
        // The first of equals: `max_by_key` takes the last.
        let (instance, rows) = self.taken.iter_mut().enumerate().rev().max_by_key(|(_, rows)| free(rows))?;
        let row = rows.iter().position(|taken| !taken)?;
        rows[row] = true;
        Some(Position { instance, row })
    }

    /// A place behind all who wait.
    fn wait(&mut self, waiter: W) -> Result<u64, Full> {
        if self.waiting.len() >= self.most_waiting {
            return Err(Full);
        }
        let ticket = self.tickets;
        self.tickets += 1;
        self.waiting.push_back((ticket, waiter));
        Ok(ticket)
    }

    /// Frees a seat, or passes it on to whoever has waited longest: then it stays taken.
    fn give_back(&mut self, seat: Position) -> Option<W> {
        let next = self.waiting.pop_front();
        if next.is_none()
            && let Some(taken) = self.taken.get_mut(seat.instance).and_then(|rows| rows.get_mut(seat.row))
        {
            *taken = false;
        }
        next.map(|(_, waiter)| waiter)
    }

    /// Takes somebody out who does not wait any more.
    fn withdraw(&mut self, ticket: u64) {
        if let Ok(index) = self.waiting.binary_search_by_key(&ticket, |(ticket, _)| *ticket) {
            self.waiting.remove(index);
        }
    }

    fn is_any_taken(&self, instance: usize) -> bool {
        self.taken.get(instance).is_some_and(|rows| rows.contains(&true))
    }
}

/// The seats of a model.
#[derive(Debug)]
pub(super) struct Seats(Mutex<Board<oneshot::Sender<Seat>>>);

/// A seat that somebody has. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct Seat {
    seats: Arc<Seats>,
    pub(super) position: Position,
}

/// A seat, or a place among those who wait for one.
#[derive(Debug)]
pub(super) enum Asked {
    Seated(Seat),
    Waiting(Waiting),
}

/// A place among those who wait. Dropping it gives it up.
#[derive(Debug)]
pub(super) struct Waiting {
    seats: Arc<Seats>,
    ticket: u64,
    given: oneshot::Receiver<Seat>,
}

impl Seats {
    pub(super) fn new(instances: usize, rows: usize, most_waiting: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Board::new(instances, rows, most_waiting))))
    }

    /// A seat, if one is free, else a place in the line.
    ///
    /// # Errors
    /// [`Full`].
    pub(super) fn ask(self: &Arc<Self>) -> Result<Asked, Full> {
        let mut board = self.lock();
        // While somebody waits no seat is free, so that nobody is overtaken.
        if let Some(position) = board.sit() {
            return Ok(Asked::Seated(Seat { seats: self.clone(), position }));
        }
        let (seat, given) = oneshot::channel();
        let ticket = board.wait(seat)?;
        Ok(Asked::Waiting(Waiting { seats: self.clone(), ticket, given }))
    }

    /// Whether a sequence is under way in an instance.
    pub(super) fn is_any_taken(&self, instance: usize) -> bool {
        self.lock().is_any_taken(instance)
    }

    /// Only this module's few lines run under the lock.
    fn lock(&self) -> MutexGuard<'_, Board<oneshot::Sender<Seat>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asked {
    /// Waits for the seat; `None` never comes as long as the seats are there.
    pub(super) async fn seat(self) -> Option<Seat> {
        match self {
            Self::Seated(seat) => Some(seat),
            Self::Waiting(mut waiting) => (&mut waiting.given).await.ok(),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let next = self.seats.lock().give_back(self.position);
        if let Some(next) = next {
            // Who left meanwhile gives it back by not taking it.
            let _ = next.send(Self { seats: self.seats.clone(), position: self.position });
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.seats.lock().withdraw(self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Move {
        /// Somebody new comes.
        Come,
        /// The n-th of those who sit leaves, by its end or because it was idle.
        Leave(usize),
        /// The n-th of those who wait gives up.
        GiveUp(usize),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let any = prop_oneof![
            3 => Just(Move::Come),
            2 => any::<usize>().prop_map(Move::Leave),
            1 => any::<usize>().prop_map(Move::GiveUp),
        ];
        prop::collection::vec(any, 1..200)
    }

    proptest! {
        /// Against what must hold, whatever happens: who sits keeps the seat, no seat has two, who comes is refused only
        /// when all seats and all places in the line are taken, and the line moves in order.
        #[test]
        fn a_seat_is_ones_own_and_the_line_is_bounded_and_in_order(
            instances in 1_usize..4, rows in 1_usize..4, most_waiting in 0_usize..6, moves in moves(),
        ) {
            let mut board: Board<u32> = Board::new(instances, rows, most_waiting);
            let mut sitting: BTreeMap<u32, Position> = BTreeMap::new();
            let mut waiting: VecDeque<(u64, u32)> = VecDeque::new();
            for (name, step) in (0_u32..).zip(moves) {
                match step {
                    Move::Come => {
                        if let Some(position) = board.sit() {
                            prop_assert!(waiting.is_empty(), "nobody is overtaken");
                            prop_assert!(position.instance < instances && position.row < rows);
                            sitting.insert(name, position);
                        } else {
                            let ticket = board.wait(name);
                            prop_assert_eq!(ticket.is_err(), waiting.len() == most_waiting);
                            waiting.extend(ticket.ok().map(|ticket| (ticket, name)));
                        }
                    }
                    Move::Leave(which) => {
                        let Some(&who) = sitting.keys().nth(which % sitting.len().max(1)) else { continue };
                        let position = sitting.remove(&who).unwrap();
                        let next = board.give_back(position);
                        prop_assert_eq!(next, waiting.pop_front().map(|(_, name)| name), "the longest wait ends");
                        sitting.extend(next.map(|next| (next, position)));
                    }
                    Move::GiveUp(which) => {
                        if waiting.is_empty() { continue; }
                        let (ticket, _) = waiting.remove(which % waiting.len()).unwrap();
                        board.withdraw(ticket);
                    }
                }
                let seats: HashSet<Position> = sitting.values().copied().collect();
                prop_assert_eq!(seats.len(), sitting.len(), "no seat has two");
                prop_assert!(waiting.len() <= most_waiting);
                prop_assert!(waiting.is_empty() || sitting.len() == instances * rows, "nobody waits beside a free seat");
                for instance in 0..instances {
                    let anybody = seats.iter().any(|position| position.instance == instance);
                    prop_assert_eq!(board.is_any_taken(instance), anybody);
                }
            }
            for position in sitting.into_values() {
                board.waiting.clear();
                board.give_back(position);
            }
            let free: HashSet<Position> = std::iter::from_fn(|| board.sit()).collect();
            prop_assert_eq!(free.len(), instances * rows, "every seat came back");
        }
    }

    #[test]
    fn sequences_spread_over_instances_before_they_share_one() {
        let mut board: Board<()> = Board::new(2, 2, 0);
        let seats: Vec<_> = std::iter::from_fn(|| board.sit()).map(|at| (at.instance, at.row)).collect();
        assert_eq!(seats, [(0, 0), (1, 0), (0, 1), (1, 1)]);
    }

    #[tokio::test]
    async fn a_seat_goes_past_those_who_left_to_the_first_who_waits() {
        let seats = Seats::new(1, 1, 3);
        let Ok(Asked::Seated(first)) = seats.ask() else { panic!("a seat is free") };
        let [second, third, fourth] = std::array::from_fn(|_| seats.ask().unwrap());
        assert_eq!(seats.ask().unwrap_err(), Full);
        drop(second);
        let fifth = seats.ask().unwrap();
        drop(first);
        let third = third.seat().await.unwrap();
        assert_eq!(third.position, Position { instance: 0, row: 0 });
        drop(fourth);
        drop(third);
        drop(fifth.seat().await.unwrap());
        assert!(!seats.is_any_taken(0));
    }
}

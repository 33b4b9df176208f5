//! Finding out who is gone when an operation fails, and telling the others.
//!
//! Gloo notices a dead peer only on the connection that an operation is waiting on. So in a ring of four the neighbours
//! of the dead rank fail within milliseconds, with a message that names a port, and the others wait for ever on ranks
//! that are alive. This module closes both gaps, with nothing running while all is well:
//!
//! - Every rank listens on a port of its own and knows all others' from the start. The kernel answers a connection as
//!   long as the process lives, however busy it is, and refuses it once the process is gone: that tells who is lost.
//! - A rank whose operation failed leaves a report with everyone. A wait that takes long looks for reports, so
//!   all ranks end soon after the first. A rank that leaves none is not waiting: after a timeout, that tells who is late.
//!
//! A report opens with a secret that the receiver published in the store, so that a port scan breaks no training run.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Call, DistError, Operation};
use crate::ffi::RawStore;
use crate::patience::{CANCELLED, Patience};
use crate::store::random_bits;

/// How often to ask the store for ranks that are not there yet.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// How long to try to reach a peer. One on a machine that is gone does not refuse, it is silent; but so is one that lives,
/// where the first packet was lost. The kernel sends it again after one second and after three.
const REACH: Duration = Duration::from_millis(3500);
/// How long a connected peer may take to write its report: it first tries to reach everyone.
const READ: Duration = Duration::from_secs(4);
const _: () = assert!(READ.as_millis() > REACH.as_millis());
/// How long to look further where the first look did not tell: a process that dies closes its sockets one by one, and
/// other ranks report within a slice of their waits.
const LOOK: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// The largest report that is read: a list of thousands of ranks and a message.
const REPORT_BYTES: u64 = 64 * 1024;

/// A rank's place in a group that is being made.
pub(crate) struct Member<'a> {
    pub(crate) group: &'a str,
    pub(crate) rank: u32,
    pub(crate) size: u32,
    pub(crate) interface: IpAddr,
}

/// One rank's part in the roll calls of a group.
pub(crate) struct RollCall {
    rank: u32,
    /// Where every rank listens, by rank.
    doors: Vec<Door>,
    listener: TcpListener,
    /// What other ranks reported, in the order of arrival.
    reports: Mutex<Vec<Report>>,
}

/// Where to leave a report with a rank, and the secret that it asks for.
#[derive(Clone, Debug, PartialEq)]
struct Door {
    address: SocketAddr,
    secret: u64,
}

/// What a rank tells the others when its operation fails.
#[derive(Clone, Debug, PartialEq)]
struct Report {
    rank: u32,
    timed_out: bool,
    /// Whom it could not reach.
    lost: Vec<u32>,
    cause: String,
}

impl RollCall {
    /// Publishes where this rank listens and learns where the others do.
    ///
    /// On failure gives the ranks that did not show up in time, and what the store said.
    pub(crate) fn open(
        store: &RawStore,
        member: &Member<'_>,
        patience: &Patience<'_>,
    ) -> Result<Self, (Vec<u32>, String)> {
        let &Member { group, rank, size, interface } = member;
        let failed = |cause: String| (Vec::new(), cause);
        let listener = TcpListener::bind((interface, 0))
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|error| failed(format!("could not listen on {interface}: {error}")))?;
        let address = listener.local_addr().map_err(|error| failed(error.to_string()))?;
        let own = Door { address, secret: random_bits() };

        store.set(&key(group, rank), own.publish().as_bytes()).map_err(failed)?;
        let doors = find_doors(store, group, size, patience)?;
        Ok(Self { rank, doors, listener, reports: Mutex::default() })
    }

    /// Whether another rank has reported a failure; takes microseconds where none has.
    pub(crate) fn heard_of_failure(&self) -> bool {
        !self.collect().is_empty()
    }

    /// Finds out what a failure is about, and reports it to the other ranks.
    ///
    /// * `cause`: what the backend said; none where only other ranks failed.
    pub(crate) fn explain(&self, call: Call, timeout: Duration, cause: Option<&str>) -> DistError {
        // A report that is already here is nearer to the root than our own failure, which may follow from it.
        let (timed_out, cause) = match (self.collect().first(), cause.map(tidy)) {
            (Some(first), _) => (first.timed_out, format!("rank {} reported: {}", first.rank, first.cause)),
            (None, Some(cause)) => (is_timeout(&cause), cause),
            (None, None) => (false, "no reason is known".to_owned()),
        };
        let lost = self.look_for_lost(timed_out, &cause);
        if !lost.is_empty() {
            return DistError::PeersLost { call, lost, cause };
        }
        let reports = self.collect();
        if timed_out || reports.iter().any(|report| report.timed_out) {
            let silent = match call.operation {
                Operation::Send { to: peer, .. } | Operation::Recv { from: peer, .. } => vec![peer],
                _ => self.others().filter(|&rank| reports.iter().all(|report| report.rank != rank)).collect(),
            };
            return DistError::Timeout { call, timeout, silent, cause };
        }
        DistError::Failed { call, cause }
    }

    /// Reports to everyone, and gives the ranks that are gone, as soon as it finds any.
    fn look_for_lost(&self, timed_out: bool, cause: &str) -> Vec<u32> {
        let mut lost = self.report(timed_out, cause);
        let deadline = Instant::now() + LOOK;
        loop {
            let reports = self.collect();
            // Who failed first saw the cause; who looks later also misses ranks that have left because of it.
            if let Some(report) = reports.iter().find(|report| !report.lost.is_empty()) {
                return report.lost.iter().copied().filter(|&rank| rank != self.rank).collect();
            }
            let all_reported = self.others().all(|rank| reports.iter().any(|report| report.rank == rank));
            drop(reports);
            if !lost.is_empty() || (timed_out && all_reported) || Instant::now() > deadline {
                return lost;
            }
            thread::sleep(LOOK_AGAIN);
            if !timed_out {
                (_, lost) = self.knock();
            }
        }
    }

    /// Leaves a report with every rank that lives; gives those that do not.
    fn report(&self, timed_out: bool, cause: &str) -> Vec<u32> {
        let (living, lost) = self.knock();
        let report = Report { rank: self.rank, timed_out, lost, cause: cause.to_owned() };
        for (rank, mut stream) in living {
            let text = report.write(self.doors[rank as usize].secret);
            // One that dies just now is found by the next look.
            let _ = stream.write_all(text.as_bytes());
        }
        report.lost
    }

    /// Connects to all other ranks at once: those that live, and those that are gone.
    fn knock(&self) -> (Vec<(u32, TcpStream)>, Vec<u32>) {
        let (mut living, mut lost) = (Vec::new(), Vec::new());
        thread::scope(|scope| {
            let attempt = |rank: u32| TcpStream::connect_timeout(&self.doors[rank as usize].address, REACH);
            let spawn = |rank| thread::Builder::new().spawn_scoped(scope, move || attempt(rank));
            let attempts: Vec<_> = self.others().map(|rank| (rank, spawn(rank))).collect();
            for (rank, thread) in attempts {
                let answer = thread.ok().and_then(|thread| thread.join().ok()).map_or(Answer::Unclear, Answer::from);
                match answer {
                    Answer::Lives(stream) => living.push((rank, stream)),
                    Answer::Gone => lost.push(rank),
                    Answer::Unclear => {}
                }
            }
        });
        (living, lost)
    }

    /// Reads the reports that have arrived, and gives all so far.
    fn collect(&self) -> MutexGuard<'_, Vec<Report>> {
        // A panic under this lock leaves a list of whole reports.
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok((stream, _)) = self.listener.accept() {
            // A connection without the secret is a look, or a stranger's.
            reports.extend(read_report(&stream, self.doors[self.rank as usize].secret));
        }
        reports
    }

    fn others(&self) -> impl Iterator<Item = u32> {
        let own = self.rank;
        (0..self.doors.len() as u32).filter(move |&rank| rank != own)
    }
}

/// Where in the store a rank says where it listens.
fn key(group: &str, rank: u32) -> String {
    format!("{group}/roll_call/{rank}")
}

/// Reads where all ranks listen. On failure gives those that are not known, and why.
///
/// Asks again and again instead of waiting for all keys at once: who is missing has to be known also where the rank
/// that serves the store gives up first and takes it away.
fn find_doors(
    store: &RawStore,
    group: &str,
    size: u32,
    patience: &Patience<'_>,
) -> Result<Vec<Door>, (Vec<u32>, String)> {
    let deadline = Instant::now() + patience.joining;
    let mut doors: Vec<Option<Door>> = vec![None; size as usize];
    loop {
        let failure = (0..)
            .zip(&mut doors)
            .filter(|(_, door)| door.is_none())
            .find_map(|(rank, door)| read_door(store, &key(group, rank)).map(|found| *door = found).err());
        let missing: Vec<u32> = (0..).zip(&doors).filter(|(_, door)| door.is_none()).map(|(rank, _)| rank).collect();
        if missing.is_empty() {
            return Ok(doors.into_iter().flatten().collect());
        }
        if let Some(cause) = failure {
            return Err((missing, cause));
        }
        if (patience.cancelled)() {
            return Err((missing, CANCELLED.to_owned()));
        }
        if Instant::now() > deadline {
            return Err((missing, "the time is over".to_owned()));
        }
        thread::sleep(ASK_AGAIN);
    }
}

fn read_door(store: &RawStore, key: &str) -> Result<Option<Door>, String> {
    if !store.contains(key)? {
        return Ok(None);
    }
    let value = store.get(key)?;
    Door::parse(&value).map(Some).ok_or_else(|| format!("{key} is not an address: {}", value.escape_ascii()))
}

/// What an attempt to connect says about a peer.
enum Answer {
    Lives(TcpStream),
    Gone,
    /// Nothing: this process may be out of descriptors, for example.
    Unclear,
}

impl From<io::Result<TcpStream>> for Answer {
    fn from(attempt: io::Result<TcpStream>) -> Self {
        use io::ErrorKind::{ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut};
        match attempt {
            Ok(stream) => Self::Lives(stream),
            Err(error) => match error.kind() {
                ConnectionRefused | ConnectionReset | HostUnreachable | NetworkUnreachable | TimedOut => Self::Gone,
                _ => Self::Unclear,
            },
        }
    }
}

fn read_report(stream: &TcpStream, secret: u64) -> Option<Report> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(READ)).ok()?;
    let mut text = String::new();
    stream.take(REPORT_BYTES).read_to_string(&mut text).ok()?;
    Report::parse(&text, secret)
}

impl Report {
    /// One field per line; the last one takes the rest.
    fn write(&self, secret: u64) -> String {
        let lost: Vec<_> = self.lost.iter().map(u32::to_string).collect();
        format!("{secret}\n{}\n{}\n{}\n{}", self.rank, self.timed_out, lost.join(","), self.cause)
    }

    fn parse(text: &str, secret: u64) -> Option<Self> {
        let mut fields = text.splitn(5, '\n');
        let mut field = || fields.next();
        if field()?.parse() != Ok(secret) {
            return None;
        }
        Some(Self {
            rank: field()?.parse().ok()?,
            timed_out: field()?.parse().ok()?,
            lost: field()?.split(',').filter(|rank| !rank.is_empty()).map(str::parse).collect::<Result<_, _>>().ok()?,
            cause: field()?.to_owned(),
        })
    }
}

impl Door {
    fn publish(&self) -> String {
        format!("{} {}", self.address, self.secret)
    }

    fn parse(value: &[u8]) -> Option<Self> {
        let (address, secret) = std::str::from_utf8(value).ok()?.split_once(' ')?;
        Some(Self { address: address.parse().ok()?, secret: secret.parse().ok()? })
    }
}

/// Gloo's message without the place in its source that leads it: `[/path/pair.cc:12] Connection closed by peer ...`.
fn tidy(cause: &str) -> String {
    let line = cause.lines().next().unwrap_or_default();
    match line.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((place, message)) if place.contains(".cc:") || place.contains(".h:") => message.to_owned(),
        _ => line.to_owned(),
    }
}

/// Gloo has one exception for all that goes wrong with a connection, so its text has to tell:
/// `Timed out waiting 1800000ms for recv operation to complete`, or `Application timeout caused pair closure` where
/// another operation timed out on the same connection.
fn is_timeout(cause: &str) -> bool {
    cause.contains("Timed out") || cause.contains("timed out") || cause.contains("timeout")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_the_way_and_asks_for_the_secret() {
        let report = Report { rank: 3, timed_out: true, lost: vec![1, 12], cause: "two\nlines".to_owned() };
        assert_eq!(Report::parse(&report.write(42), 42), Some(report.clone()));
        assert_eq!(Report::parse(&report.write(42), 43), None);
        let nobody = Report { lost: Vec::new(), ..report };
        assert_eq!(Report::parse(&nobody.write(7), 7), Some(nobody));
        assert_eq!(Report::parse("", 7), None);
        assert_eq!(Report::parse("GET / HTTP/1.1\r\n", 7), None);
    }

    #[test]
    fn a_door_survives_the_store() {
        let door = Door { address: "[::1]:80".parse().unwrap(), secret: u64::MAX };
        assert_eq!(Door::parse(door.publish().as_bytes()), Some(door));
    }

    #[test]
    fn a_cause_loses_the_place_in_the_backend_and_keeps_addresses() {
        assert_eq!(
            tidy("[/src/pair.cc:547] Connection closed by peer [127.0.0.1]:9\nat .."),
            "Connection closed by peer [127.0.0.1]:9"
        );
        assert_eq!(tidy("[127.0.0.1]:9 is gone"), "[127.0.0.1]:9 is gone");
        assert!(is_timeout(&tidy(
            "[/src/unbound_buffer.cc:78] Timed out waiting 500ms for recv operation to complete"
        )));
        assert!(!is_timeout("Connection closed by peer [127.0.0.1]:9"));
    }
}

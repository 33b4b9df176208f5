//! Which of several operators acts: the one that holds the Lease.
//!
//! The rules are those of Kubernetes' own components (client-go, `tools/leaderelection`), and so are the times. A Lease is written
//! at the version at which it was read, so of two writers one is refused. Nobody's clock is compared with another's: a holder is
//! gone when its Lease has not changed for [`DURATION`] since a candidate first saw it as it is. The holder stops
//! acting before that, [`TERM`] after it last renewed it.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use sensorium_telemetry::error_line;
use tokio::time::{Instant, sleep, timeout_at};

/// Another may take a Lease that has not been renewed for so long.
pub const DURATION: Duration = Duration::from_secs(15);
/// The holder acts for so long after it last asked for the Lease and got it.
const TERM: Duration = Duration::from_secs(10);
/// Between two looks at the Lease, by the holder and by those who wait for it.
const PERIOD: Duration = Duration::from_secs(2);
/// Who ends gives the Lease up, if that takes no longer.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A part in the election of who holds one Lease.
#[derive(Debug)]
pub struct Election {
    leases: Api<Lease>,
    name: String,
    candidate: Candidate,
}

impl Election {
    /// A candidate for the Lease `name`, which is made if it is not there. No two candidates that run may have one `identity`.
    pub fn new(client: Client, namespace: &str, name: &str, identity: &str) -> Self {
        let candidate = Candidate { identity: identity.to_owned(), seen: None };
        Self { leases: Api::namespaced(client, namespace), name: name.to_owned(), candidate }
    }

    /// Waits for the Lease, calls `leads` when it holds it, and renews it until it is lost: nobody may act on it from then on. Says
    /// why it was lost.
    pub async fn lead(&mut self, leads: impl FnOnce()) -> String {
        let mut end = self.win().await;
        leads();
        loop {
            sleep(PERIOD).await;
            let asked = Instant::now();
            match self.attempt(end).await {
                Ok(Attempt::Held) => end = asked + TERM,
                Ok(Attempt::HeldByAnother) => return "another one holds it".to_owned(),
                // Who has changed it is seen at the next look.
                Ok(Attempt::Changed) if Instant::now() + PERIOD < end => {}
                Ok(Attempt::Changed) => {
                    return format!("it changed under each attempt to renew it for {} s", TERM.as_secs());
                }
                Err(error) if Instant::now() + PERIOD < end => {
                    tracing::warn!(error, lease = self.name, "the Lease was not renewed; trying again");
                }
                Err(error) => return format!("it could not be renewed for {} s: {error}", TERM.as_secs()),
            }
        }
    }

    /// Gives the Lease up if this candidate holds it, so that the next one need not wait for it to run out.
    ///
    /// # Errors
    /// When the API server does not take it. Then it runs out by itself.
    pub async fn give_up(self) -> Result<(), String> {
        let end = Instant::now() + LAST_WORDS;
        loop {
            let Some(mut lease) = within(end, self.leases.get_opt(&self.name)).await? else { return Ok(()) };
            let Some(spec) = self.candidate.release(lease.spec.as_ref()) else { return Ok(()) };
            lease.spec = Some(spec);
            // A renewal that was under way may come first.
            if within(end, self.write(&lease)).await? {
                return Ok(());
            }
        }
    }

    /// Waits for the Lease. Returns until when it is held.
    async fn win(&mut self) -> Instant {
        let mut told = false;
        loop {
            let asked = Instant::now();
            match self.attempt(asked + TERM).await {
                Ok(Attempt::Held) => return asked + TERM,
                Ok(Attempt::HeldByAnother | Attempt::Changed) => told = false,
                // Once, not at each attempt: the API server may be away for long.
                Err(error) if !told => {
                    tracing::warn!(error, lease = self.name, "the Lease cannot be had; trying again");
                    told = true;
                }
                Err(_) => {}
            }
            sleep(PERIOD).await;
        }
    }

    /// Takes or renews the Lease.
    async fn attempt(&mut self, end: Instant) -> Result<Attempt, String> {
        let found = within(end, self.leases.get_opt(&self.name)).await?;
        let spec = found.as_ref().and_then(|lease| lease.spec.as_ref());
        let Some(spec) = self.candidate.claim(spec, Instant::now(), Timestamp::now()) else {
            return Ok(Attempt::HeldByAnother);
        };
        let named = || ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
        let metadata = found.map_or_else(named, |lease| lease.metadata);
        let written = within(end, self.write(&Lease { metadata, spec: Some(spec) })).await?;
        Ok(if written { Attempt::Held } else { Attempt::Changed })
    }

    /// Writes the Lease at the version at which it was read; false when it has changed since.
    async fn write(&self, lease: &Lease) -> kube::Result<bool> {
        let params = PostParams { field_manager: Some("sensorium-operator".to_owned()), ..PostParams::default() };
        let written = match lease.metadata.resource_version {
            Some(_) => self.leases.replace(&self.name, &params, lease).await,
            None => self.leases.create(&params, lease).await,
        };
        match written {
            Ok(_) => Ok(true),
            // Written, made or deleted by another one.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// How an attempt to hold the Lease ended.
enum Attempt {
    Held,
    HeldByAnother,
    /// Somebody wrote it between the look at it and the attempt.
    Changed,
}

async fn within<T>(end: Instant, request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match timeout_at(end, request).await {
        Ok(outcome) => outcome.map_err(|error| error_line(&error)),
        Err(_) => Err("the API server did not answer in time".to_owned()),
    }
}

/// What a candidate knows of the Lease, and the rules by which it takes it.
#[derive(Debug)]
struct Candidate {
    identity: String,
    /// The Lease as it was last seen, and since when it has been so.
    seen: Option<(LeaseSpec, Instant)>,
}

impl Candidate {
    /// What to write to hold the Lease that was `found` at `now`; none while another one holds it. `clock` is for who reads it.
    fn claim(&mut self, found: Option<&LeaseSpec>, now: Instant, clock: Timestamp) -> Option<LeaseSpec> {
        let found = found.cloned().unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == found => *since,
            _ => now,
        };
        let holder = found.holder_identity.as_deref().filter(|holder| !holder.is_empty());
        let is_mine = holder == Some(&self.identity);
        let duration = found.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let is_free = holder.is_none() || now >= since + duration.map_or(DURATION, Duration::from_secs);
        let transitions = found.lease_transitions.unwrap_or(0);
        let claim = (is_mine || is_free).then(|| LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(DURATION.as_secs() as i32),
            acquire_time: if is_mine { found.acquire_time.clone() } else { Some(MicroTime(clock)) },
            renew_time: Some(MicroTime(clock)),
            lease_transitions: Some(if is_mine { transitions } else { transitions.saturating_add(1) }),
            ..LeaseSpec::default()
        });
        self.seen = Some((found, since));
        claim
    }

    /// What to write to give up the Lease that was `found`; none where this candidate does not hold it.
    fn release(&self, found: Option<&LeaseSpec>) -> Option<LeaseSpec> {
        let found = found.filter(|spec| spec.holder_identity.as_ref() == Some(&self.identity))?;
        Some(LeaseSpec { lease_transitions: found.lease_transitions, ..LeaseSpec::default() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidate(identity: &str) -> Candidate {
        Candidate { identity: identity.to_owned(), seen: None }
    }

    fn claim(candidate: &mut Candidate, found: Option<&LeaseSpec>, now: Instant) -> Option<LeaseSpec> {
        candidate.claim(found, now, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn a_lease_that_nobody_holds_is_taken_at_once() {
        let now = Instant::now();
        let (mut first, mut second) = (candidate("first"), candidate("second"));
        let held = claim(&mut first, None, now);
        assert_eq!(held.as_ref().and_then(|spec| spec.holder_identity.as_deref()), Some("first"));
        assert_eq!(claim(&mut second, held.as_ref(), now), None);
        let released = first.release(held.as_ref());
        assert_eq!(second.release(held.as_ref()), None);
        let taken = claim(&mut second, released.as_ref(), now);
        assert_eq!(taken.and_then(|spec| spec.lease_transitions), Some(2));
    }

    #[test]
    fn a_lease_that_does_not_change_is_taken_when_its_own_duration_is_over_whatever_the_clocks_say() {
        let start = Instant::now();
        let held = LeaseSpec {
            holder_identity: Some("first".to_owned()),
            lease_duration_seconds: Some(40),
            // Its clock is a year behind.
            renew_time: Some(MicroTime(Timestamp::UNIX_EPOCH)),
            ..LeaseSpec::default()
        };
        let mut second = candidate("second");
        assert_eq!(claim(&mut second, Some(&held), start), None);
        assert_eq!(claim(&mut second, Some(&held), start + Duration::from_secs(39)), None);
        let renewed = LeaseSpec { renew_time: Some(MicroTime(Timestamp::MAX)), ..held };
        assert_eq!(claim(&mut second, Some(&renewed), start + Duration::from_secs(41)), None);
        assert!(claim(&mut second, Some(&renewed), start + Duration::from_secs(82)).is_some());
    }

    #[test]
    fn who_comes_back_by_its_name_goes_on_with_its_lease() {
        let start = Instant::now();
        let held = claim(&mut candidate("first"), None, start);
        let again = claim(&mut candidate("first"), held.as_ref(), start);
        assert_eq!(again.and_then(|spec| spec.lease_transitions), Some(1));
    }

    /// One attempt of a candidate on a bad network, in milliseconds.
    #[derive(Clone, Debug)]
    struct Try {
        /// From when it asks until the API server reads the Lease for it.
        read: u64,
        /// From then until the Lease is written.
        write: u64,
        /// After the attempt.
        rest: u64,
        fate: Fate,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fate {
        Written,
        Lost,
        /// Written, but the candidate does not hear of it.
        Unheard,
    }

    fn tries() -> impl Strategy<Value = Vec<Try>> {
        let late = prop_oneof![4 => 0..500_u64, 1 => 0..12_000_u64];
        let fate = prop_oneof![3 => Just(Fate::Written), 2 => Just(Fate::Lost), 1 => Just(Fate::Unheard)];
        let one = (0..500_u64, late, 0..4_000_u64, fate);
        prop::collection::vec(one.prop_map(|(read, write, rest, fate)| Try { read, write, rest, fate }), 60)
    }

    /// What happens next at the API server: for an attempt of `who` that began at `asked`, it reads the Lease, or writes `spec` if
    /// that is still at `version`.
    enum Event {
        Read { who: usize, asked: u64 },
        Write { who: usize, asked: u64, version: u64, spec: LeaseSpec, fate: Fate },
    }

    proptest! {
        #[test]
        fn however_late_requests_arrive_no_two_hold_the_lease_at_once(tries in prop::collection::vec(tries(), 3)) {
            let start = Instant::now();
            let term = TERM.as_millis() as u64;
            let mut candidates: Vec<Candidate> = (0..tries.len()).map(|who| candidate(&who.to_string())).collect();
            let mut tries: Vec<_> = tries.into_iter().map(|some| some.into_iter().peekable()).collect();
            // By time; the second number keeps those of one moment apart.
            let mut events = std::collections::BTreeMap::new();
            for (who, tries) in tries.iter_mut().enumerate() {
                events.insert((tries.peek().map_or(0, |one| one.read), who as u64), Event::Read { who, asked: 0 });
            }
            let (mut lease, mut version, mut serial) = (None, 0, 100);
            // Who acts, and until when.
            let mut holder: Option<(usize, u64)> = None;
            while let Some(((time, _), event)) = events.pop_first() {
                match event {
                    Event::Read { who, asked } => {
                        let Some(one) = tries[who].next() else { continue };
                        let clock = Timestamp::from_millisecond(time as i64)?;
                        let claim = candidates[who].claim(lease.as_ref(), start + Duration::from_millis(time), clock);
                        // Who has waited for long enough tries again, and its write arrives all the same.
                        let over = if claim.is_some() { (time + one.write).min(asked + term) } else { time };
                        if let Some(spec) = claim && one.fate != Fate::Lost {
                            let write = Event::Write { who, asked, version, spec, fate: one.fate };
                            events.insert((time + one.write, serial), write);
                        }
                        let asked = over + one.rest;
                        let read = asked + tries[who].peek().map_or(0, |next| next.read);
                        events.insert((read, serial + 1), Event::Read { who, asked });
                        serial += 2;
                    }
                    Event::Write { version: seen, .. } if seen != version => {}
                    Event::Write { who, asked, spec, fate, .. } => {
                        (lease, version) = (Some(spec), version + 1);
                        if fate == Fate::Written && time < asked + term {
                            if let Some((other, end)) = holder && other != who {
                                prop_assert!(end <= time, "{other} acts until {end}, {who} from {time}");
                            }
                            holder = Some((who, asked + term));
                        }
                    }
                }
            }
        }
    }
}

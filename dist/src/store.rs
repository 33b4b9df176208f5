//! The key-value store through which ranks find each other.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::DistError;
use crate::ffi::RawStore;
use crate::patience::{CANCELLED, never};

/// A client of a key-value store over TCP, which one rank serves. Clones share the connection.
///
/// Calls on one connection take turns: while one thread is in [`wait`](Self::wait) or [`get`](Self::get), others wait
/// for it. The store lives as long as the process that serves it holds a clone.
#[derive(Clone)]
pub struct Store {
    raw: Arc<RawStore>,
    port: u16,
}

impl Store {
    /// Serves a store at `port` (0 takes a free one) and connects to it.
    ///
    /// It listens on loopback only if `host` is a loopback address or `localhost`, else on all addresses: `host` may be
    /// a service's name that leads here, but is no address of this machine.
    ///
    /// # Errors
    /// [`DistError::Listen`] if the port is taken; [`DistError::Connect`] if the server does not answer.
    pub fn serve(host: &str, port: u16, timeout: Duration) -> Result<Self, DistError> {
        let (listener, address) = listen(host, port)?;
        let target = match address.ip() {
            ip if !ip.is_unspecified() => ip,
            _ => Ipv4Addr::LOCALHOST.into(),
        };
        RawStore::tcp(&target.to_string(), address.port(), Some(listener.into()), timeout)
            .map(|raw| Self { raw: Arc::new(raw), port: address.port() })
            .map_err(|cause| connect_error(host, address.port(), timeout, cause))
    }

    /// Connects to the store at `host:port`, again and again until `timeout`: ranks start in any order, and a name may
    /// not resolve yet. `timeout` is also how long [`get`](Self::get) waits for a key.
    ///
    /// # Errors
    /// [`DistError::Connect`] with what the last try met.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self, DistError> {
        Self::connect_unless(host, port, timeout, &never)
    }

    /// As [`connect`](Self::connect), unless it is cancelled.
    pub(crate) fn connect_unless(
        host: &str,
        port: u16,
        timeout: Duration,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Self, DistError> {
        let deadline = Instant::now() + timeout;
        // c10d can retry too, but it writes a warning for each try and gives up at once on a name that does not resolve.
        wait_for_listener(host, port, deadline, cancelled)
            .map_err(|cause| connect_error(host, port, timeout, cause))?;
        RawStore::tcp(host, port, None, timeout)
            .map(|raw| Self { raw: Arc::new(raw), port })
            .map_err(|cause| connect_error(host, port, timeout, cause))
    }

    /// The port of the server.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets a key, replacing what was there.
    ///
    /// # Errors
    /// [`DistError::Store`], as for all that follow.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), DistError> {
        self.raw.set(key, value).map_err(store_error("set", &[key]))
    }

    /// Reads a key, waiting for it to appear.
    ///
    /// # Errors
    /// [`DistError::Store`] also if it does not appear within the store's timeout.
    pub fn get(&self, key: &str) -> Result<Vec<u8>, DistError> {
        self.raw.get(key).map_err(store_error("get", &[key]))
    }

    /// Waits until all keys are there.
    ///
    /// # Errors
    /// [`DistError::Store`] also if they are not within `timeout`.
    pub fn wait(&self, keys: &[&str], timeout: Duration) -> Result<(), DistError> {
        let owned: Vec<_> = keys.iter().map(|&key| key.to_owned()).collect();
        self.raw.wait(&owned, timeout).map_err(store_error("wait for", keys))
    }

    /// Whether a key is there now.
    pub fn contains(&self, key: &str) -> Result<bool, DistError> {
        self.raw.contains(key).map_err(store_error("look up", &[key]))
    }

    /// Adds to a counter, which starts at zero, and returns the sum.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, DistError> {
        self.raw.add(key, amount).map_err(store_error("add to", &[key]))
    }

    /// Deletes a key; answers whether it was there.
    pub fn delete(&self, key: &str) -> Result<bool, DistError> {
        self.raw.delete(key).map_err(store_error("delete", &[key]))
    }

    pub(crate) fn raw(&self) -> &RawStore {
        &self.raw
    }
}

/// Binds the server's socket here, not in C++, which can only bind to all addresses.
fn listen(host: &str, port: u16) -> Result<(TcpListener, SocketAddr), DistError> {
    let candidates = match loopback(host) {
        Some(ip) => vec![ip],
        // The first takes both families where the machine has IPv6.
        None => vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)],
    };
    let addresses: Vec<_> = candidates.into_iter().map(|ip| SocketAddr::new(ip, port)).collect();
    TcpListener::bind(&addresses[..])
        .and_then(|listener| listener.local_addr().map(|address| (listener, address)))
        .map_err(|source| DistError::Listen { address: addresses[addresses.len() - 1], source })
}

/// The loopback address that `host` is by its very name, without asking a resolver.
pub(crate) fn loopback(host: &str) -> Option<IpAddr> {
    if host == "localhost" {
        return Some(Ipv4Addr::LOCALHOST.into());
    }
    host.parse().ok().filter(IpAddr::is_loopback)
}

/// Tries to connect until `deadline`, or until it is cancelled; the error is what the last try met.
fn wait_for_listener(host: &str, port: u16, deadline: Instant, cancelled: &dyn Fn() -> bool) -> Result<(), String> {
    const FIRST_DELAY: Duration = Duration::from_millis(20);
    const LAST_DELAY: Duration = Duration::from_secs(1);
    /// Of one try. Where nobody refuses, it would take all the time that is left, and hear of no cancelling.
    const LONGEST_TRY: Duration = Duration::from_secs(4);
    let mut delay = FIRST_DELAY;
    loop {
        if cancelled() {
            return Err(CANCELLED.to_owned());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let cause = match (host, port).to_socket_addrs() {
            Ok(addresses) => match try_each(addresses, left.clamp(FIRST_DELAY, LONGEST_TRY)) {
                Ok(()) => return Ok(()),
                Err(cause) => cause,
            },
            Err(error) => error.to_string(),
        };
        if left.is_zero() {
            return Err(cause);
        }
        // Hundreds of workers that wait for one server must not come in step.
        thread::sleep(delay.mul_f64(0.5 + random_fraction()).min(left));
        delay = (delay * 2).min(LAST_DELAY);
    }
}

fn try_each(addresses: impl Iterator<Item = SocketAddr>, timeout: Duration) -> Result<(), String> {
    let mut cause = "the name has no address".to_owned();
    for address in addresses {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(_) => return Ok(()),
            Err(error) => cause = format!("{address}: {error}"),
        }
    }
    Err(cause)
}

/// Evenly spread over `0.0..1.0`, from the seed that the standard library draws for its maps. Not for secrets.
fn random_fraction() -> f64 {
    random_bits() as f64 / u64::MAX as f64
}

/// A number that differs between calls and processes.
pub(crate) fn random_bits() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn connect_error(host: &str, port: u16, timeout: Duration, cause: String) -> DistError {
    DistError::Connect { host: host.to_owned(), port, timeout, cause }
}

fn store_error(action: &'static str, keys: &[&str]) -> impl FnOnce(String) -> DistError {
    let keys = keys.iter().map(|&key| key.to_owned()).collect();
    move |cause| DistError::Store { action, keys, cause }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_client_sees_what_another_wrote() {
        let server = Store::serve("127.0.0.1", 0, SECOND).unwrap();
        let client = Store::connect("127.0.0.1", server.port(), SECOND).unwrap();
        client.set("bytes", &[0, 1, 255]).unwrap();
        assert_eq!(server.get("bytes").unwrap(), [0, 1, 255]);
        client.set("empty", &[]).unwrap();
        assert_eq!(server.get("empty").unwrap(), [0; 0]);
        assert_eq!(server.add("count", 2).unwrap(), 2);
        assert_eq!(client.add("count", 3).unwrap(), 5);
        assert!(client.delete("bytes").unwrap());
        assert!(!server.delete("bytes").unwrap());
        assert!(!server.contains("bytes").unwrap());
    }

    #[test]
    fn a_key_that_does_not_appear_is_named_in_time_and_the_store_goes_on() {
        let store = Store::serve("localhost", 0, SECOND).unwrap();
        let start = Instant::now();
        let error = store.wait(&["absent"], Duration::from_millis(100)).unwrap_err();
        assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
        assert!(matches!(&error, DistError::Store { action: "wait for", keys, .. } if keys == &["absent"]), "{error}");
        store.set("absent", b"here").unwrap();
        assert_eq!(store.get("absent").unwrap(), b"here");
    }

    #[test]
    fn a_client_may_come_before_the_server() {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let client = thread::spawn(move || Store::connect("127.0.0.1", port, 10 * SECOND).unwrap().get("key").unwrap());
        thread::sleep(Duration::from_millis(200));
        let server = Store::serve("127.0.0.1", port, SECOND).unwrap();
        server.set("key", b"value").unwrap();
        assert_eq!(client.join().unwrap(), b"value");
    }

    #[test]
    fn a_missing_server_is_named_with_the_reason_of_the_last_try() {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let error = Store::connect("127.0.0.1", port, Duration::from_millis(100)).err().unwrap();
        assert!(matches!(&error, DistError::Connect { cause, .. } if cause.contains("refused")), "{error}");
    }

    #[test]
    fn a_client_that_is_cancelled_waits_no_longer() {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let asked = Cell::new(0);
        let cancelled = || asked.replace(asked.get() + 1) == 2;
        let error = Store::connect_unless("127.0.0.1", port, 600 * SECOND, &cancelled).err().unwrap();
        assert!(matches!(&error, DistError::Connect { cause, .. } if cause == CANCELLED), "{error}");
        assert_eq!(asked.get(), 3);
    }

    #[test]
    fn a_taken_port_is_an_error_that_names_it() {
        let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = taken.local_addr().unwrap();
        let error = Store::serve("127.0.0.1", address.port(), SECOND).err().unwrap();
        assert!(matches!(&error, DistError::Listen { address: named, .. } if *named == address), "{error}");
    }
}

//! The launch contract: how a process learns its rank and finds the others.

use std::env;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::error::DistError;
use crate::patience::Patience;
use crate::process_group::ProcessGroup;
use crate::store::{Store, loopback};

/// Which rank this process is, and where the ranks meet; the same variables as `torchrun` sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// `RANK`, `0..world_size`.
    pub rank: u32,
    /// `WORLD_SIZE`; unset means one.
    pub world_size: u32,
    /// `LOCAL_RANK`: which of the processes on this machine; unset means zero.
    pub local_rank: u32,
    /// `MASTER_ADDR`: name or address of rank 0, which serves the store.
    pub master_addr: String,
    /// `MASTER_PORT`: the store's port.
    pub master_port: u16,
    /// `SENSORIUM_INTERFACE_ADDR`: the local address to take connections of peers on. Unset means the one from which
    /// the master is reached.
    pub interface: Option<IpAddr>,
}

impl Launch {
    /// Reads the environment. `RANK`, `MASTER_ADDR` and `MASTER_PORT` are needed only where `WORLD_SIZE` exceeds one.
    ///
    /// # Errors
    /// [`DistError::Environment`] names the variable, its value and what would be right.
    pub fn from_env() -> Result<Self, DistError> {
        Self::from_variables(&|name| env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    fn from_variables(variables: Variables<'_>) -> Result<Self, DistError> {
        let world_size = optional(variables, "WORLD_SIZE", "a number of ranks, at least 1")?.map_or(1, NonZeroU32::get);
        let in_world = format!("a rank below WORLD_SIZE={world_size}");
        // A world of one meets nobody, so it need not say where.
        let alone = world_size == 1;
        let rank = required(variables, "RANK", &in_world, alone.then_some(0))?;
        if rank >= world_size {
            return Err(environment("RANK", &rank.to_string(), &in_world));
        }
        let master_addr = alone.then(|| Ipv4Addr::LOCALHOST.to_string());
        Ok(Self {
            rank,
            world_size,
            local_rank: optional(variables, "LOCAL_RANK", "a whole number")?.unwrap_or(0),
            master_addr: required(variables, "MASTER_ADDR", "the name or address of rank 0", master_addr)?,
            master_port: required(variables, "MASTER_PORT", "the port of rank 0's store", alone.then_some(0))?,
            interface: optional(variables, "SENSORIUM_INTERFACE_ADDR", "an IP address of this machine")?,
        })
    }

    /// Meets the other ranks: rank 0 serves the store, the others connect to it, in any order of starting.
    /// A world of one needs no network.
    ///
    /// # Errors
    /// [`DistError::Listen`], [`DistError::Connect`] or [`DistError::Join`]; the last names the missing ranks.
    pub fn connect(&self, patience: &Patience<'_>) -> Result<ProcessGroup, DistError> {
        if self.world_size == 1 {
            return Ok(ProcessGroup::single());
        }
        let store = if self.rank == 0 {
            Store::serve(&self.master_addr, self.master_port, patience.joining)?
        } else {
            Store::connect_unless(&self.master_addr, self.master_port, patience.joining, patience.cancelled)?
        };
        let interface = match self.interface {
            Some(interface) => interface,
            None => local_address_towards(&self.master_addr, self.master_port, patience).map_err(|error| {
                let expected = format!("set, and no address of this machine leads to {}: {error}", self.master_addr);
                environment("SENSORIUM_INTERFACE_ADDR", "", &expected)
            })?,
        };
        ProcessGroup::gloo(&store, "world", self.rank, self.world_size, interface, patience)
    }
}

/// Time between one look-up of a name and the next.
const LOOKUP_PAUSE: Duration = Duration::from_millis(500);

/// The address of this machine from which a host is reached. Where workers start together, a name may be known a little
/// later than they are, so it is looked up for as long as ranks wait for each other.
fn local_address_towards(host: &str, port: u16, patience: &Patience<'_>) -> io::Result<IpAddr> {
    if let Some(loopback) = loopback(host) {
        return Ok(loopback);
    }
    let deadline = Instant::now() + patience.joining;
    let is_over = || (patience.cancelled)() || Instant::now() + LOOKUP_PAUSE > deadline;
    let mut addresses = loop {
        match (host, port).to_socket_addrs() {
            Err(error) if is_over() => return Err(error),
            Err(_) => std::thread::sleep(LOOKUP_PAUSE),
            Ok(addresses) => break addresses,
        }
    };
    let remote = addresses.next().ok_or_else(|| io::Error::other("the name has no address"))?;
    let any: IpAddr = match remote {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Connecting a datagram socket sends nothing; it only picks the route.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(remote)?;
    Ok(socket.local_addr()?.ip())
}

/// Looks a variable up.
type Variables<'a> = &'a dyn Fn(&'static str) -> Option<String>;

fn optional<T: FromStr>(variables: Variables<'_>, name: &'static str, expected: &str) -> Result<Option<T>, DistError> {
    let parse = |value: String| value.parse().map_err(|_| environment(name, &value, expected));
    variables(name).map(parse).transpose()
}

fn required<T: FromStr>(
    variables: Variables<'_>,
    name: &'static str,
    expected: &str,
    default: Option<T>,
) -> Result<T, DistError> {
    optional(variables, name, expected)?.or(default).ok_or_else(|| environment(name, "", expected))
}

fn environment(variable: &'static str, value: &str, expected: &str) -> DistError {
    DistError::Environment { variable, value: value.to_owned(), expected: expected.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Result<Launch, DistError> {
        let find = |name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Launch::from_variables(&find)
    }

    fn no_patience() -> Patience<'static> {
        Patience::new(Duration::ZERO, Duration::ZERO)
    }

    const TWO: [(&str, &str); 4] =
        [("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "trainer-0.trainer"), ("MASTER_PORT", "29500")];

    #[test]
    fn an_empty_environment_is_a_world_of_one() {
        let alone = launch(&[]).unwrap();
        assert_eq!((alone.rank, alone.world_size, alone.local_rank), (0, 1, 0));
        let group = alone.connect(&no_patience()).unwrap();
        assert_eq!((group.rank(), group.size()), (0, 1));
    }

    #[test]
    fn the_launch_contract_is_read_whole() {
        let variables = [&TWO[..], &[("LOCAL_RANK", "1"), ("SENSORIUM_INTERFACE_ADDR", "10.0.0.7")]].concat();
        let expected = Launch {
            rank: 1,
            world_size: 2,
            local_rank: 1,
            master_addr: "trainer-0.trainer".to_owned(),
            master_port: 29500,
            interface: Some([10, 0, 0, 7].into()),
        };
        assert_eq!(launch(&variables).unwrap(), expected);
    }

    #[test]
    fn a_wrong_variable_is_named_with_its_value_and_what_would_be_right() {
        for (name, value, message) in [
            ("WORLD_SIZE", "0", "WORLD_SIZE=\"0\" is not a number of ranks, at least 1"),
            ("RANK", "2", "RANK=\"2\" is not a rank below WORLD_SIZE=2"),
            ("RANK", "one", "RANK=\"one\" is not a rank below WORLD_SIZE=2"),
            ("LOCAL_RANK", "-1", "LOCAL_RANK=\"-1\" is not a whole number"),
            ("MASTER_PORT", "65536", "MASTER_PORT=\"65536\" is not the port of rank 0's store"),
            (
                "SENSORIUM_INTERFACE_ADDR",
                "eth0",
                "SENSORIUM_INTERFACE_ADDR=\"eth0\" is not an IP address of this machine",
            ),
        ] {
            let variables: Vec<_> = [(name, value)].into_iter().chain(TWO).collect();
            assert_eq!(launch(&variables).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn two_ranks_have_to_say_who_they_are_and_where_they_meet() {
        for missing in ["RANK", "MASTER_ADDR", "MASTER_PORT"] {
            let variables: Vec<_> = TWO.into_iter().filter(|(name, _)| *name != missing).collect();
            let error = launch(&variables).unwrap_err();
            assert!(matches!(error, DistError::Environment { variable, .. } if variable == missing), "{error}");
        }
    }

    #[test]
    fn a_loopback_master_is_reached_from_loopback_only() {
        for (host, address) in [("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::1", "::1")] {
            let found = local_address_towards(host, 80, &no_patience()).unwrap();
            assert_eq!(found, address.parse::<IpAddr>().unwrap());
        }
    }
}

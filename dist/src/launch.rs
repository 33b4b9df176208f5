//! The launch contract: how a process learns its rank and finds the others.

use std::env;
use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs, UdpSocket};
use std::str::FromStr;
use std::time::Duration;

use crate::error::DistError;
use crate::process_group::ProcessGroup;
use crate::store::{Store, is_loopback};

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
        Self::from_variables(|name| env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&'static str) -> Option<String>) -> Result<Self, DistError> {
        let number = |name, default| match variable(name) {
            Some(value) => parse::<u32>(name, &value, "a whole number"),
            None => Ok(default),
        };
        let required = |name, expected: &str| variable(name).ok_or_else(|| environment(name, "", expected));

        let world_size = number("WORLD_SIZE", 1)?;
        if world_size == 0 {
            return Err(environment("WORLD_SIZE", "0", "at least 1"));
        }
        let alone = world_size == 1;
        let rank = match variable("RANK") {
            None if !alone => return Err(environment("RANK", "", format!("a rank below WORLD_SIZE={world_size}"))),
            None => 0,
            Some(value) => parse("RANK", &value, "a whole number")?,
        };
        if rank >= world_size {
            return Err(environment("RANK", &rank.to_string(), format!("below WORLD_SIZE={world_size}")));
        }
        Ok(Self {
            rank,
            world_size,
            local_rank: number("LOCAL_RANK", 0)?,
            master_addr: match alone {
                true => variable("MASTER_ADDR").unwrap_or_else(|| Ipv4Addr::LOCALHOST.to_string()),
                false => required("MASTER_ADDR", "the name or address of rank 0")?,
            },
            master_port: match (alone, variable("MASTER_PORT")) {
                (true, None) => 0,
                (false, None) => return Err(environment("MASTER_PORT", "", "the port of rank 0's store")),
                (_, Some(value)) => parse("MASTER_PORT", &value, "a port")?,
            },
            interface: variable("SENSORIUM_INTERFACE_ADDR")
                .map(|value| parse("SENSORIUM_INTERFACE_ADDR", &value, "an IP address of this machine"))
                .transpose()?,
        })
    }

    /// Meets the other ranks: rank 0 serves the store, the others connect to it, in any order of starting.
    /// A world of one needs no network.
    ///
    /// * `timeout`: how long to wait for the others now, and later for each operation of the group.
    ///
    /// # Errors
    /// [`DistError::Listen`], [`DistError::Connect`] or [`DistError::Join`]; the last names the missing ranks.
    pub fn connect(&self, timeout: Duration) -> Result<ProcessGroup, DistError> {
        if self.world_size == 1 {
            return Ok(ProcessGroup::single());
        }
        let store = if self.rank == 0 {
            Store::serve(&self.master_addr, self.master_port, timeout)?
        } else {
            Store::connect(&self.master_addr, self.master_port, timeout)?
        };
        let interface = match self.interface {
            Some(interface) => interface,
            None => self.local_address()?,
        };
        ProcessGroup::gloo(&store, "world", self.rank, self.world_size, interface, timeout)
    }

    /// The local address from which the master is reached.
    fn local_address(&self) -> Result<IpAddr, DistError> {
        if is_loopback(&self.master_addr) {
            return Ok(if self.master_addr == "::1" {
                self.master_addr.parse().unwrap_or(Ipv4Addr::LOCALHOST.into())
            } else {
                Ipv4Addr::LOCALHOST.into()
            });
        }
        let route = || {
            let master = (self.master_addr.as_str(), self.master_port)
                .to_socket_addrs()?
                .next()
                .ok_or_else(|| std::io::Error::other("the name has no address"))?;
            let any: IpAddr =
                if master.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
            // Connecting a datagram socket sends nothing; it only picks the route.
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(master)?;
            socket.local_addr()
        };
        route().map(|address| address.ip()).map_err(|error| {
            let expected = format!("set, and no address of this machine leads to {}: {error}", self.master_addr);
            environment("SENSORIUM_INTERFACE_ADDR", "", expected)
        })
    }
}

fn parse<T: FromStr>(variable: &'static str, value: &str, expected: &str) -> Result<T, DistError> {
    value.trim().parse().map_err(|_| environment(variable, value, expected))
}

fn environment(variable: &'static str, value: &str, expected: impl Into<String>) -> DistError {
    DistError::Environment { variable, value: value.to_owned(), expected: expected.into() }
}

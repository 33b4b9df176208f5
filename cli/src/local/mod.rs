//! The backend for one machine: plans as processes of this user, folders for volumes, loopback for the network.

pub mod interrupt;
pub mod job;
pub mod placement;
pub mod ports;
pub mod process;
pub mod programs;
pub mod reuse;
pub mod service;
pub mod state_dir;

//! The server as its clients meet it: real sockets on loopback, a tiny artifact with known answers.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which clippy does not count as tests")]

mod budget;
mod clients;
mod connections;
#[path = "../graphs/counter.rs"]
mod counter;
mod harness;
mod inference;
mod iteration;
mod load;
mod malformed;
mod operations;
mod remote;
mod remote_deadlines;
mod remote_security;
mod rest;
mod security;
mod shutdown;
mod streams;
mod stress;
mod traces;

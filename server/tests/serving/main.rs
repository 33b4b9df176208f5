//! The server as its clients meet it: real sockets on loopback, a tiny artifact with known answers.

mod harness;
mod inference;
mod load;
mod malformed;
mod shutdown;
mod triton;

//! The operator on a real API server, with the real controllers behind it and no node: tests say what pods do.
//!
//! Each test has a namespace and an operator of its own. docs/operator-tests.md lists which cases of other operators'
//! suites are covered, and where.

mod common;

mod artifacts;
mod children;
mod compression;
mod encoders;
mod explain;
mod leadership;
mod serving;
mod traces;
mod training;

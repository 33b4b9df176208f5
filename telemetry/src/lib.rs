//! Logs and metric names of every Sensorium program, set up in one place.
//!
//! A program calls [`init`] once, first thing in `main`. Its metrics are declared by the [`metrics`] table, which
//! `docs/metrics.md` describes; a test holds the two together.
//!
//! ```
//! sensorium_telemetry::init("sensorium-example")?;
//! tracing::info!(step = 7, "saved a checkpoint");
//! # Ok::<(), sensorium_telemetry::InitError>(())
//! ```

mod logs;
pub mod metrics;

pub use logs::{InitError, init};

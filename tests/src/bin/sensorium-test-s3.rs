//! The tests' S3 server as a program, for where a test cannot be itself: sensorium-test-s3 ADDRESS FOLDER LOG USER=BUCKET...
//!
//! Prints `ready`, appends a line for each request to LOG and ends with its input.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use sensorium_tests::{S3Server, S3User};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, folder, log, users @ ..] = &arguments[..] else { anyhow::bail!("ADDRESS FOLDER LOG USER=BUCKET...") };
    let user = |text: &String| text.split_once('=').map(|(id, bucket)| S3User::new(id, bucket));
    let users: Vec<S3User> = users.iter().map(user).collect::<Option<_>>().context("USER=BUCKET")?;
    let log = Arc::new(Mutex::new(OpenOptions::new().create(true).append(true).open(log)?));
    let tell = move |line: &str| {
        // A test that finds a line missing says so itself.
        let _ = writeln!(log.lock().unwrap_or_else(PoisonError::into_inner), "{line}");
    };
    let runtime = tokio::runtime::Runtime::new()?;
    let _server = runtime.block_on(S3Server::start(Path::new(folder), address, &users, tell))?;
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

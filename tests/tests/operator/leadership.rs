//! Several operators: one acts, and another takes over.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};
use sensorium_tests::{ApiCluster, Kubelet, Namespace, Operator};

use crate::common::{LIMIT, training};

#[tokio::test]
async fn when_the_leader_is_killed_the_next_one_takes_over() -> Result<()> {
    let cluster = ApiCluster::shared()?;
    let namespace = cluster.namespace("lead").await?;
    let mut first = start(cluster, &namespace, "first")?;
    wait_for_leader(&first).await?;
    let second = start(cluster, &namespace, "second")?;
    assert!(!leads(&second)?);
    first.kill()?;
    let killed = Instant::now();
    namespace.apply(&training("vqa").to_string()).await?;
    Kubelet::new(&namespace).pods("sensorium.dev/name=vqa", 2, LIMIT).await?;
    assert!(killed.elapsed() < Duration::from_secs(30), "{:?}", killed.elapsed());
    assert!(leads(&second)?);
    Ok(())
}

#[tokio::test]
async fn a_leader_that_is_asked_to_end_hands_over_at_once() -> Result<()> {
    let cluster = ApiCluster::shared()?;
    let namespace = cluster.namespace("handover").await?;
    let mut first = start(cluster, &namespace, "first")?;
    wait_for_leader(&first).await?;
    let second = start(cluster, &namespace, "second")?;
    assert!(first.terminate(LIMIT)?.success());
    let asked = Instant::now();
    wait_for_leader(&second).await?;
    assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
    Ok(())
}

#[tokio::test]
async fn a_leader_that_slept_for_too_long_ends_instead_of_acting_beside_the_next() -> Result<()> {
    let cluster = ApiCluster::shared()?;
    let namespace = cluster.namespace("asleep").await?;
    let mut first = start(cluster, &namespace, "first")?;
    wait_for_leader(&first).await?;
    let mut second = start(cluster, &namespace, "second")?;
    let sleeper = Pid::from_raw(first.id() as i32).context("a process has an id")?;
    kill_process(sleeper, Signal::STOP)?;
    wait_for_leader(&second).await?;
    kill_process(sleeper, Signal::CONT)?;
    assert!(!first.wait(LIMIT)?.success());
    assert!(first.log().contains("does not hold the Lease any more"), "{}", first.log());
    // It has not taken the Lease back, nor given up that of another one.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(leads(&second)?);
    assert!(second.terminate(LIMIT)?.success());
    Ok(())
}

fn start(cluster: &ApiCluster, namespace: &Namespace, identity: &str) -> Result<Operator> {
    let identity = format!("--identity={identity}");
    let mut operator = Operator::start(&cluster.kubeconfig(), namespace.name(), &["--leader-elect=true", &identity])?;
    operator.wait_until_ready(LIMIT)?;
    Ok(operator)
}

fn leads(operator: &Operator) -> Result<bool> {
    Ok(operator.get("/metrics")?.1.lines().any(|line| line == "sensorium_leader 1"))
}

async fn wait_for_leader(operator: &Operator) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !leads(operator)? {
        anyhow::ensure!(Instant::now() < deadline, "nobody leads");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

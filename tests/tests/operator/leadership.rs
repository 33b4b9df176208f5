//! Several operators: one acts, and another takes over.

use std::time::{Duration, Instant};

use anyhow::Result;
use sensorium_tests::{ApiCluster, Kubelet, Operator};

use crate::common::{LIMIT, training};

#[tokio::test]
async fn when_the_leader_is_killed_the_next_one_takes_over() -> Result<()> {
    let cluster = ApiCluster::shared()?;
    let namespace = cluster.namespace("lead").await?;
    let start = |identity: &str| {
        let identity = format!("--identity={identity}");
        Operator::start(&cluster.kubeconfig(), namespace.name(), &["--leader-elect=true", &identity])
    };
    let mut first = start("first")?;
    first.wait_until_ready(LIMIT)?;
    wait_for_leader(&first).await?;
    let mut second = start("second")?;
    second.wait_until_ready(LIMIT)?;
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
    let start = |identity: &str| {
        let identity = format!("--identity={identity}");
        Operator::start(&cluster.kubeconfig(), namespace.name(), &["--leader-elect=true", &identity])
    };
    let mut first = start("first")?;
    first.wait_until_ready(LIMIT)?;
    wait_for_leader(&first).await?;
    let mut second = start("second")?;
    second.wait_until_ready(LIMIT)?;
    assert!(first.terminate(LIMIT)?.success());
    let asked = Instant::now();
    wait_for_leader(&second).await?;
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
    Ok(())
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

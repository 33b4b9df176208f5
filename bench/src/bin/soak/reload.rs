//! A model that is loaded again and again under load, and one that is let go: nobody notices, and memory comes back.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use sensorium_bench::{Better, Report};
use sensorium_proto::inference::{RepositoryModelLoadRequest, RepositoryModelUnloadRequest};
use tokio::{task::JoinSet, time};

use crate::server::{Server, one};

const CLIENTS: usize = 16;
/// Loads that pay for what is paid for once.
const FIRST: usize = 10;

pub(crate) async fn run(report: &mut Report, repository: &Path, loads: usize) -> Result<()> {
    let server = Server::start(repository, &[]).await?;
    let stop = Arc::<AtomicBool>::default();
    let (answered, failed) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (mut client, stop, answered, failed) =
            (server.client().await?, stop.clone(), answered.clone(), failed.clone());
        clients.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                match client.model_infer(one("twice", 1.0)).await {
                    Ok(_) => answered.fetch_add(1, Ordering::Relaxed),
                    Err(status) => {
                        eprintln!("reload: {status:?}");
                        failed.fetch_add(1, Ordering::Relaxed)
                    }
                };
            }
        });
    }
    let mut control = server.client().await?;
    let mut settled = 0.0;
    for load in 0..loads {
        control.repository_model_load(loading("twice")).await?;
        if load == FIRST.min(loads / 2) {
            settled = server.memory()?;
        }
    }
    stop.store(true, Ordering::Relaxed);
    clients.join_all().await;
    time::sleep(Duration::from_secs(1)).await;
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed) as f64;
    report.row("reload/answered".to_owned(), "requests", Better::Higher, count(&answered), ("at-least", 100.0));
    report.row("reload/failed".to_owned(), "requests", Better::Lower, count(&failed), ("limit", 0.0));
    report.row(
        "reload/memory".to_owned(),
        "MiB",
        Better::Lower,
        server.memory()?,
        ("after-the-first-and-5%", settled * 1.05),
    );

    // Twice, because the first time pays for buffers that stay.
    let mut before = 0.0;
    let mut held = 0.0;
    for _ in 0..2 {
        control.repository_model_unload(unloading("large")).await?;
        time::sleep(Duration::from_secs(2)).await;
        before = server.memory()?;
        control.repository_model_load(loading("large")).await?;
        control.model_infer(one("large", 1.0)).await?;
        held = server.memory()?;
    }
    control.repository_model_unload(unloading("large")).await?;
    time::sleep(Duration::from_secs(2)).await;
    let after = server.memory()?;
    eprintln!("reload: {before:.1} MiB without the large model, {held:.1} with it, {after:.1} without it again");
    report.row("unload/memory".to_owned(), "MiB", Better::Lower, after, ("before-and-8", before + 8.0));
    // Nor does the first of all keep it.
    drop(server);
    let fresh = Server::start(repository, &[]).await?;
    let mut control = fresh.client().await?;
    control.repository_model_unload(unloading("large")).await?;
    time::sleep(Duration::from_secs(2)).await;
    let emptied = fresh.memory()?;
    eprintln!("reload: {emptied:.1} MiB after the model of the start is let go");
    report.row(
        "unload/model-of-the-start".to_owned(),
        "MiB",
        Better::Lower,
        emptied,
        ("others-and-32", held - 100.0 + 32.0),
    );
    Ok(())
}

fn loading(model: &str) -> RepositoryModelLoadRequest {
    RepositoryModelLoadRequest { model_name: model.to_owned(), ..Default::default() }
}

fn unloading(model: &str) -> RepositoryModelUnloadRequest {
    RepositoryModelUnloadRequest { model_name: model.to_owned(), ..Default::default() }
}

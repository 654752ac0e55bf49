//! The processes that serve: controller, agent, or both in one. This is where
//! the rooms are wired to each other; nothing is decided here.

mod agent;
mod controller;
mod identity;
mod limits;
mod look;
pub mod memory;
mod streams;
mod workload;

use std::fmt::Display;
use std::sync::Arc;

use anyhow::Context;
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Config, Role};
use crate::csi;
use crate::metrics::{self, Readiness};

/// What every part of a process is given, and adds to.
struct Process {
    config: Config,
    readiness: Arc<Readiness>,
    registry: prometheus_client::registry::Registry,
    stop: watch::Receiver<bool>,
    tasks: JoinSet<anyhow::Result<()>>,
}

impl Process {
    /// Listens where others connect.
    async fn listen(
        &self,
        what: &'static str,
        address: impl ToSocketAddrs + Display + Copy,
    ) -> anyhow::Result<TcpListener> {
        TcpListener::bind(address)
            .await
            .with_context(|| format!("listen for {what} on {address}"))
    }
}

/// Runs one process until it is told to stop or one of its parts ends.
///
/// # Errors
/// When a part cannot start or ends with an error.
pub async fn run(config: Config, role: Role) -> anyhow::Result<()> {
    let (stopper, stop) = watch::channel(false);
    let mut process = Process {
        readiness: Arc::new(Readiness::default()),
        registry: metrics::registry(),
        tasks: JoinSet::new(),
        stop,
        config,
    };
    let mut services = csi::Services::new(process.config.driver_name.clone());
    if role != Role::Agent {
        services = services.with_controller(controller::start(&mut process).await?);
    }
    if role != Role::Controller {
        let staging = agent::start(&mut process).await?;
        services = services.with_node(process.config.node.clone(), staging);
    }
    let Process {
        config,
        readiness,
        mut registry,
        stop,
        mut tasks,
    } = process;
    services.register_metrics(&mut registry);
    let socket = config.csi_socket.clone();
    let csi_stop = stop.clone();
    tasks.spawn(async move { Ok(csi::serve(&socket, services, csi_stop).await?) });
    let (address, report) = (config.metrics_address, Arc::clone(&readiness));
    let metrics_stop = stop.clone();
    tasks.spawn(async move {
        let served = metrics::serve(address, registry, report, metrics_stop).await;
        served.with_context(|| format!("serve metrics on {address}"))
    });
    tracing::info!(node = %config.node, csi = %config.csi_socket.display(), "drover serves");

    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let ended = tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted.context("watch for SIGINT"),
        _ = terminate.recv() => Ok(()),
        Some(ended) = tasks.join_next() => ended.context("a part of drover panicked").flatten(),
    };
    tracing::info!("drover stops; what hosts have attached waits for it to come back");
    stopper.send_replace(true);
    let rest = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(std::time::Duration::from_secs(5), rest)
        .await
        .is_err()
    {
        tracing::warn!("not everything had ended after 5 s");
    }
    ended
}

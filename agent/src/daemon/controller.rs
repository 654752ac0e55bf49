//! The controller's part of a process.

use std::sync::Arc;

use anyhow::Context;
use tokio_stream::wrappers::TcpListenerStream;

use super::Process;
use crate::attach::Arbiter;
use crate::rpc::agent_client::Directory;
use crate::rpc::controller_service::ControllerService;
use crate::rpc::pb::controller_server::ControllerServer;
use crate::store::embedded::EmbeddedStore;

/// Opens the store, takes up what is unfinished, and serves.
pub(super) async fn start(process: &mut Process) -> anyhow::Result<Arc<Arbiter>> {
    let config = &process.config;
    if let Some(folder) = config.state.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("make folder {}", folder.display()))?;
    }
    let store = Arc::new(EmbeddedStore::open(&config.state)?);
    let agents = Arc::new(Directory::default());
    let arbiter = Arbiter::start(store, agents.clone()).await?;
    arbiter.register_metrics(&mut process.registry);
    process.readiness.note("store", Ok(()));

    let listener = process
        .listen("agents and the command line", config.controller.as_str())
        .await?;
    let service = ControllerServer::new(ControllerService::new(Arc::clone(&arbiter), agents));
    let mut stop = process.stop.clone();
    process.tasks.spawn(async move {
        let stopped = async move { drop(stop.wait_for(|stop| *stop).await) };
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped)
            .await
            .context("serve drover.v1.Controller")
    });
    Ok(arbiter)
}

//! The agent's part of a process: the home's side, where the node has a pool,
//! and the workload's side of one node.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_stream::wrappers::TcpListenerStream;

use super::Process;
use super::identity;
use super::limits;
use super::memory;
use super::streams::Reporter;
use super::workload::Workload;
use crate::attach::ports::{HostIdentity, Protocol, Staging};
use crate::attach::record::Registration;
use crate::backup::Streams;
use crate::backup::keeper::Keeper;
use crate::block::file::FileDevice;
use crate::csi;
use crate::evidence::tools::Tool;
use crate::evidence::{Evidence, EvidenceConfig};
use crate::export::{self, Exports};
use crate::fence::Gates;
use crate::home::{Home, HomeConfig};
use crate::initiator::{Initiator, Settings};
use crate::pool::{Pool, PoolConfig};
use crate::reactor::{self, Reactors};
use crate::rpc::agent_service::{HomeService, NodeService};
use crate::rpc::controller_client::ControllerClient;
use crate::rpc::pb::home_server::HomeServer;
use crate::rpc::pb::node_server::NodeServer;

/// How often an agent says that it is there, and how its streams are.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Opens the pool, restores its exports, and serves; gives the node's side of CSI.
pub(super) async fn start(process: &mut Process) -> anyhow::Result<Arc<dyn Staging>> {
    let config = process.config.clone();
    std::fs::create_dir_all(&config.state_dir)
        .with_context(|| format!("make folder {}", config.state_dir.display()))?;
    let host = identity::load(&config.state_dir)?;
    let control = ControllerClient::new(&config.controller);

    let evidence = evidence(config.progress_window, config.backup_tools.clone()).await;
    evidence.register_metrics(&mut process.registry);
    let program = std::env::current_exe().context("find drover's own binary")?;
    let node = config.node.clone();
    let gates = tokio::task::spawn_blocking(move || Gates::start(&node))
        .await
        .context("load the gates")?;
    gates.register_metrics(&mut process.registry);
    let streams = Streams::new(program);
    streams.register_metrics(&mut process.registry);

    let home = home(process).await?;
    let settings = Settings::of(config.node.clone());
    let initiator = Initiator::of_this_kernel(
        settings,
        host.clone(),
        Arc::new(control.clone()),
        evidence.clone(),
        gates,
    );
    initiator.register_metrics(&mut process.registry);
    if let Err(error) = initiator.adopt() {
        tracing::error!(%error, "what the kernel has attached cannot be listed");
    }
    let (shut, mut stop) = (Arc::clone(&initiator), process.stop.clone());
    process.tasks.spawn(async move {
        tokio::select! {
            () = shut.keep_gates() => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        Ok(())
    });
    let keeper = Keeper::open(config.state_dir.join("streams"), Arc::clone(&streams)).await?;
    let workload = Arc::new(Workload::new(
        config.node.clone(),
        Arc::clone(&initiator),
        evidence,
        control.clone(),
        Arc::clone(&keeper),
    ));

    let listener = process
        .listen("the controller", config.agent_address)
        .await?;
    let has_pool = home.is_some();
    let ended = home.clone();
    let home = HomeService::new(config.node.clone(), home, streams, Arc::clone(&keeper));
    let node = NodeService::new(Arc::clone(&workload));
    let mut stop = process.stop.clone();
    process.tasks.spawn(async move {
        let stopped = async move { drop(stop.wait_for(|stop| *stop).await) };
        tonic::transport::Server::builder()
            .add_service(HomeServer::new(home))
            .add_service(NodeServer::new(node))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped)
            .await
            .context("serve drover.v1.Home and drover.v1.Node")
    });

    let mut registration = Registration {
        node: config.node.clone(),
        incarnation: identity::boot()?,
        host: HostIdentity {
            proves: initiator.proves().await,
            ..host
        },
        agent: config.agent_advertise,
        has_pool,
        attached: Vec::new(),
        late: Vec::new(),
    };
    let reporter = Reporter::new(config.node.clone(), keeper, control.clone());
    let mut stop = process.stop.clone();
    process.tasks.spawn(async move {
        tokio::select! {
            () = reporter.run(HEARTBEAT) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        Ok(())
    });
    let (attached, readiness) = (Arc::clone(&initiator), Arc::clone(&process.readiness));
    readiness.note("controller", Err("has not answered yet".into()));
    let mut stop = process.stop.clone();
    process.tasks.spawn(async move {
        let beat = async {
            let mut every = tokio::time::interval(HEARTBEAT);
            every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                every.tick().await;
                match attached.attached() {
                    Ok(list) => {
                        registration.attached = list;
                        registration.late = ended.as_ref().map(Home::late).unwrap_or_default();
                        let answer = control.register(&registration).await;
                        readiness.note("controller", answer.map_err(|error| error.to_string()));
                    }
                    // An empty list would say "clean" of a node that may not be.
                    Err(error) => readiness.note("controller", Err(error.to_string())),
                }
                workload.look_after_readers().await;
                workload.label_disks().await;
            }
        };
        tokio::select! {
            () = beat => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        Ok(())
    });
    if let Some(folder) = config.kubelet_registry {
        let (driver, endpoint) = (config.driver_name.clone(), config.csi_socket.clone());
        let stop = process.stop.clone();
        process
            .tasks
            .spawn(async move { Ok(csi::register(&folder, &driver, &endpoint, stop).await?) });
    }
    Ok(initiator)
}

/// The evidence, or why there is none: the agent works without it, and every verdict is `Unknown`.
async fn evidence(window: Duration, tools: Vec<Tool>) -> Arc<Evidence> {
    let config = EvidenceConfig {
        window,
        tools,
        ..EvidenceConfig::default()
    };
    let started = tokio::task::spawn_blocking(|| Evidence::start(config)).await;
    match started {
        Ok(Ok(evidence)) => evidence,
        Ok(Err(error)) => {
            tracing::warn!(%error, "no evidence: every verdict will be unknown");
            Evidence::blind(error.to_string())
        }
        Err(panic) => Evidence::blind(format!("loading the programs panicked: {panic}")),
    }
}

/// The home's side: serves once the pool's lock is held and every export is restored.
async fn home(process: &mut Process) -> anyhow::Result<Option<Home>> {
    let Some(dir) = process.config.pool.clone() else {
        return Ok(None);
    };
    let settings = PoolConfig {
        lock_wait: process.config.pool_lock_wait,
        low_water: process.config.pool_low_water,
        overcommit_percent: process.config.pool_overcommit_percent,
        // Such a pool serves volumes, and says why it takes no snapshots.
        require_reflink: false,
    };
    let node = process.config.node.clone();
    let pool = tokio::task::spawn_blocking(move || Pool::open(&dir, &node, settings))
        .await
        .context("open the pool")??;
    memory::keep();
    limits::raise();
    let reactors = Reactors::start(reactor::Settings {
        threads: process.config.data_threads,
        engine: process.config.data_engine,
        poll: process.config.data_poll,
        held: vec![
            pool.lock()
                .file()
                .try_clone()
                .context("hold the pool's lock")?
                .into(),
        ],
    })
    .context("start the data path")?;
    let exports = Exports::new(reactors);
    let home = Home::new(
        pool,
        Arc::clone(&exports) as Arc<dyn crate::home::Frontend>,
        Arc::new(|file, path, size| Ok(Arc::new(FileDevice::new(file, path, size)?) as Arc<_>)),
        HomeConfig::at(
            process.config.nvme_advertise,
            process.config.iscsi_advertise,
        ),
    );
    let restored = home.restore().await;
    tracing::info!(
        open = restored.open,
        closed = restored.closed,
        failed = restored.failed.len(),
        "exports restored"
    );
    let (rest, mut stop) = (home.clone(), process.stop.clone());
    process.tasks.spawn(async move {
        let served = async {
            rest.restore_rest(restored).await;
            // A part of drover that ends would end it all.
            std::future::pending().await
        };
        tokio::select! {
            () = served => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        Ok(())
    });
    home.register_metrics(&mut process.registry);
    exports.register_metrics(&mut process.registry);
    serve(process, &exports).await?;
    process.readiness.note("pool", Ok(()));
    Ok(Some(home))
}

/// Listens for hosts of both protocols, and for those that discover.
async fn serve(process: &mut Process, exports: &Arc<Exports>) -> anyhow::Result<()> {
    let addresses = [
        (Protocol::NvmeTcp, process.config.nvme_address),
        (Protocol::Iscsi, process.config.iscsi_address),
    ];
    for (protocol, address) in addresses {
        let what = match protocol {
            Protocol::NvmeTcp => "NVMe/TCP hosts",
            Protocol::Iscsi => "iSCSI initiators",
        };
        let listener =
            export::listen(address).with_context(|| format!("listen for {what} on {address}"))?;
        let (exports, stop) = (Arc::clone(exports), process.stop.clone());
        process.tasks.spawn(async move {
            exports.serve(protocol, listener, stop).await;
            Ok(())
        });
    }
    let address = process.config.discovery_address;
    let listener = export::listen(address)
        .with_context(|| format!("listen for NVMe/TCP discovery on {address}"))?;
    let (exports, stop) = (Arc::clone(exports), process.stop.clone());
    process.tasks.spawn(async move {
        exports.serve_discovery(listener, stop).await;
        Ok(())
    });
    Ok(())
}

//! What can be set, and how a file and flags come together.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{ConfigError, Span};
use crate::evidence::tools::Tool;
use crate::ids::HostPort;

/// What can be set, by flag, environment or file. What is not set has a
/// default, named in each text.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// This node's name, as Kubernetes knows it [default: the host name]
    #[arg(long, env = "DROVER_NODE")]
    pub node: Option<String>,
    /// Folder of the agent's own state: the node's identity, streams to resume [default: /var/lib/drover/agent]
    #[arg(long, env = "DROVER_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The controller's state, one file [default: /var/lib/drover/controller.redb]
    #[arg(long, env = "DROVER_STATE", value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Folder of the volumes, on XFS with reflink. Without it the node holds no volumes, and only attaches those of others
    #[arg(long, env = "DROVER_POOL", value_name = "DIR")]
    pub pool: Option<PathBuf>,
    /// Bytes of the pool's file system that are never given to volumes [default: 268435456]
    #[arg(long, env = "DROVER_POOL_LOW_WATER", value_name = "BYTES")]
    pub pool_low_water: Option<u64>,
    /// How much more than the pool's size its volumes may promise together, in per cent of it [default: 200]
    #[arg(long, env = "DROVER_POOL_OVERCOMMIT", value_name = "PERCENT")]
    pub pool_overcommit: Option<u32>,
    /// How long to wait for an earlier agent's last I/O on the pool to end [default: 60s]
    #[arg(long, env = "DROVER_POOL_LOCK_WAIT", value_name = "TIME")]
    pub pool_lock_wait: Option<Span>,
    /// Where the controller listens for agents and the command line; an agent: where its controller is, also by name [default: 127.0.0.1:9750]
    #[arg(long, env = "DROVER_CONTROLLER", value_name = "ADDRESS")]
    pub controller: Option<HostPort>,
    /// Where the agent listens for the controller [default: 127.0.0.1:9751]
    #[arg(long, env = "DROVER_AGENT_ADDRESS", value_name = "ADDRESS")]
    pub agent_address: Option<SocketAddr>,
    /// The agent's address as the controller reaches it [default: agent-address]
    #[arg(long, env = "DROVER_AGENT_ADVERTISE", value_name = "ADDRESS")]
    pub agent_advertise: Option<SocketAddr>,
    /// Where the NVMe/TCP target listens [default: 127.0.0.1:4420]
    #[arg(long, env = "DROVER_NVME_ADDRESS", value_name = "ADDRESS")]
    pub nvme_address: Option<SocketAddr>,
    /// The NVMe/TCP target's address as other nodes reach it [default: nvme-address]
    #[arg(long, env = "DROVER_NVME_ADVERTISE", value_name = "ADDRESS")]
    pub nvme_advertise: Option<SocketAddr>,
    /// Where the iSCSI target listens [default: 127.0.0.1:3260]
    #[arg(long, env = "DROVER_ISCSI_ADDRESS", value_name = "ADDRESS")]
    pub iscsi_address: Option<SocketAddr>,
    /// The iSCSI target's address as other nodes reach it [default: iscsi-address]
    #[arg(long, env = "DROVER_ISCSI_ADVERTISE", value_name = "ADDRESS")]
    pub iscsi_advertise: Option<SocketAddr>,
    /// Where the NVMe/TCP target listens for hosts that discover what they may use [default: 127.0.0.1:8009]
    #[arg(long, env = "DROVER_DISCOVERY_ADDRESS", value_name = "ADDRESS")]
    pub discovery_address: Option<SocketAddr>,
    /// Threads that serve volumes to their hosts [default: 2]
    #[arg(long, env = "DROVER_DATA_THREADS", value_name = "NUMBER")]
    pub data_threads: Option<usize>,
    /// What these threads use: io-uring, threads, or auto: io-uring where the kernel allows it [default: auto]
    #[arg(long, env = "DROVER_DATA_ENGINE", value_name = "ENGINE")]
    pub data_engine: Option<String>,
    /// How long such a thread looks out for the next command before it sleeps, as long as that pays; it uses a processor meanwhile. 0s: never [default: 200us]
    #[arg(long, env = "DROVER_DATA_POLL", value_name = "TIME")]
    pub data_poll: Option<Span>,
    /// The CSI socket [default: /run/drover/csi.sock, of a controller /run/drover/controller.sock]
    #[arg(long, env = "DROVER_CSI_SOCKET", value_name = "PATH")]
    pub csi_socket: Option<PathBuf>,
    /// The CSI driver's name [default: drover.io]
    #[arg(long, env = "DROVER_DRIVER_NAME", value_name = "NAME")]
    pub driver_name: Option<String>,
    /// kubelet's plugins_registry folder; the agent registers itself there. Without it, it does not
    #[arg(long, env = "DROVER_KUBELET_REGISTRY", value_name = "DIR")]
    pub kubelet_registry: Option<PathBuf>,
    /// Where /metrics, /healthz and /readyz are served [default: 127.0.0.1:9752, of a controller 127.0.0.1:9753]
    #[arg(long, env = "DROVER_METRICS_ADDRESS", value_name = "ADDRESS")]
    pub metrics_address: Option<SocketAddr>,
    /// A registered reader that read nothing for so long is stale [default: 30s]
    #[arg(long, env = "DROVER_PROGRESS_WINDOW", value_name = "TIME")]
    pub progress_window: Option<Span>,
    /// Names of backup tools' processes, or beginnings of them and *: who reads a volume's device under one counts as registered [default: velero,kopia,restic,rustic]
    #[arg(
        long,
        env = "DROVER_BACKUP_TOOLS",
        value_name = "NAME",
        value_delimiter = ','
    )]
    pub backup_tools: Option<Vec<Tool>>,
}

impl Options {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// When it cannot be read, is not TOML, or has an unknown key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// These options, and `file`'s where these are silent.
    #[must_use]
    pub fn over(self, file: Self) -> Self {
        Self {
            node: self.node.or(file.node),
            state_dir: self.state_dir.or(file.state_dir),
            state: self.state.or(file.state),
            pool: self.pool.or(file.pool),
            pool_low_water: self.pool_low_water.or(file.pool_low_water),
            pool_overcommit: self.pool_overcommit.or(file.pool_overcommit),
            pool_lock_wait: self.pool_lock_wait.or(file.pool_lock_wait),
            controller: self.controller.or(file.controller),
            agent_address: self.agent_address.or(file.agent_address),
            agent_advertise: self.agent_advertise.or(file.agent_advertise),
            nvme_address: self.nvme_address.or(file.nvme_address),
            nvme_advertise: self.nvme_advertise.or(file.nvme_advertise),
            iscsi_address: self.iscsi_address.or(file.iscsi_address),
            iscsi_advertise: self.iscsi_advertise.or(file.iscsi_advertise),
            discovery_address: self.discovery_address.or(file.discovery_address),
            data_threads: self.data_threads.or(file.data_threads),
            data_engine: self.data_engine.or(file.data_engine),
            data_poll: self.data_poll.or(file.data_poll),
            csi_socket: self.csi_socket.or(file.csi_socket),
            driver_name: self.driver_name.or(file.driver_name),
            kubelet_registry: self.kubelet_registry.or(file.kubelet_registry),
            metrics_address: self.metrics_address.or(file.metrics_address),
            progress_window: self.progress_window.or(file.progress_window),
            backup_tools: self.backup_tools.or(file.backup_tools),
        }
    }
}

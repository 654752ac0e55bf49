//! What the store keeps of volumes, snapshots and nodes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::ports::{Content, HostIdentity, LateCommands, Protocol, micros};
use crate::ids::{Bytes, Epoch, NodeId, TicketId, VolumeId};

/// How a volume may be shared. One writer, whatever the mode, in this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessMode {
    /// One node, reading and writing.
    SingleWriter,
    /// One node, reading.
    SingleReader,
}

/// A volume as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Its id.
    pub id: VolumeId,
    /// The name its creator gave it; CreateVolume is idempotent by it.
    pub name: String,
    /// Its size.
    pub size: Bytes,
    /// What it began as.
    pub content: Content,
    /// The protocol it is exported over.
    pub protocol: Protocol,
    /// The node whose pool holds its bytes.
    pub home: NodeId,
    /// How long a live holder may keep NodeUnstage from ending.
    #[serde(with = "micros")]
    pub busy_deadline: Duration,
    /// StorageClass parameters, as given.
    pub parameters: BTreeMap<String, String>,
}

/// What a ticket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TicketKind {
    /// A pod's use of the volume. Ends by unpublish or by its node being lost, never by time.
    Workload,
    /// A backup that reads a snapshot at home or a device on a node.
    Backup,
    /// A restore into the volume.
    Restore,
    /// An operator's claim; always has a deadline.
    Maintenance,
}

/// A claim on a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Its id.
    pub id: TicketId,
    /// What it is for.
    pub kind: TicketKind,
    /// The node it is held on.
    pub node: NodeId,
    /// Who holds it: `kubelet`, `drover backup`, `pid 4711`, …
    pub owner: String,
    /// Whether it may be ended when another node needs the volume.
    pub interruptible: bool,
    /// Whether it reads a snapshot at home, and so pins nothing.
    pub home_side: bool,
    /// When it ends unless it is renewed; none: it has no lease.
    pub lease_ends: Option<SystemTime>,
}

/// A node as the controller knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub node: NodeId,
    /// Which boot of it registered (the kernel's boot id): what "lost" is said of.
    pub incarnation: String,
    /// Who it is to targets.
    pub host: HostIdentity,
    /// Its agent's gRPC address.
    pub agent: SocketAddr,
    /// Whether it has a pool, so can be a home.
    pub has_pool: bool,
    /// When it last registered.
    pub seen: SystemTime,
    /// The incarnation declared lost, until the node comes back clean.
    pub lost: Option<String>,
}

/// What an agent says when it registers, every few seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// The node's name.
    pub node: NodeId,
    /// The kernel's boot id.
    pub incarnation: String,
    /// Who it is to targets.
    pub host: HostIdentity,
    /// Its gRPC address.
    pub agent: SocketAddr,
    /// Whether it has a pool.
    pub has_pool: bool,
    /// The attachments its kernel has now, with the epoch of each.
    pub attached: Vec<(VolumeId, Epoch)>,
    /// Late commands that its home refused of epochs that ended not long ago.
    pub late: Vec<LateCommands>,
}

/// A request for a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVolume {
    /// The name that makes the request idempotent.
    pub name: String,
    /// At least this size; rounded up to whole MiB.
    pub at_least: Bytes,
    /// At most this size, if there is a limit.
    pub at_most: Option<Bytes>,
    /// What it begins as.
    pub content: Content,
    /// The protocol.
    pub protocol: Protocol,
    /// Where its bytes shall live; none: the pool with most room
    /// (for a clone always its source's home).
    pub home: Option<NodeId>,
    /// How long a live holder may keep NodeUnstage from ending.
    pub busy_deadline: Duration,
    /// StorageClass parameters, as given.
    pub parameters: BTreeMap<String, String>,
}

/// A volume and where it is published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeView {
    /// The volume.
    pub spec: VolumeSpec,
    /// Its epoch.
    pub epoch: Epoch,
    /// Every claim on it.
    pub tickets: Vec<Ticket>,
    /// The nodes it is published to (those with workload tickets).
    pub published: Vec<NodeId>,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// What the home says of it.
    pub info: super::ports::SnapshotInfo,
    /// The name its creator gave it; CreateSnapshot is idempotent by it.
    pub name: String,
    /// The home that holds it.
    pub home: NodeId,
    /// Whether it is complete and durable.
    pub ready: bool,
}

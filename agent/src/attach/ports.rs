//! The arbiter's ports: what it asks of homes, nodes and the control plane,
//! and the plain types these calls carry.
//!
//! Nothing here acts. A port is a trait; who performs it stands in
//! `crate::home`, `crate::initiator`, `crate::backup`, `crate::evidence` and,
//! over the wire, `crate::rpc`. Every call to a home or a node about an
//! attachment names its epoch and is refused when it is not the one that counts.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::ids::{Bytes, Diskseq, Epoch, NodeId, SnapshotId, TicketId, VolumeId};

mod fence;
mod gate;
mod judgement;
mod reach;

pub use fence::{FenceRequest, LateCommands, Recorded, SettledBy, Settlement};
pub use gate::{GateLayer, GateReport, NodeGate};
pub use judgement::{Holder, Judgement, Pod, Verdict};
pub use reach::{Chap, Credentials, Disclosure, HostIdentity, NAME_MAX, Protocol, Target, is_iqn};

/// Let `host` of `node` use the volume from `epoch` on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRequest {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch granted; greater than every earlier one, or a repeat of the current.
    pub epoch: Epoch,
    /// The node that holds it.
    pub node: NodeId,
    /// The one host that may connect.
    pub host: HostIdentity,
    /// The protocol it is exported over.
    #[serde(default)]
    pub protocol: Protocol,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// An export that is open and durable in the home's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// The epoch it is of.
    pub epoch: Epoch,
    /// How to reach it.
    pub target: Target,
    /// Whether any host has ever written to the volume. Only a volume for
    /// which this is false may be formatted. In what is kept of a grant: by
    /// then; in the answer to the node: by now, as far as the home says so.
    pub ever_written: bool,
}

/// Why a home did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum HomeError {
    /// The home does not answer.
    #[error("home {node} does not answer: {detail}")]
    Unreachable {
        /// The home.
        node: NodeId,
        /// What was tried, and what came of it.
        detail: String,
    },
    /// The request's epoch is no longer the one that counts.
    #[error("epoch is stale: the home's record is at {home}")]
    StaleEpoch {
        /// The highest epoch in the home's record; to an export also that of a
        /// fence that is not in it yet.
        home: Epoch,
    },
    /// The home's record is behind what it had recorded: it was put back from an old copy.
    #[error(
        "the home's record, at epoch {home}, has lost what it had recorded of epoch {recorded}: its pool is an old copy and serves nothing"
    )]
    RecordBehind {
        /// The highest epoch in the home's record.
        home: Epoch,
        /// The epoch that it, or whose end it, is known to have recorded.
        recorded: Epoch,
    },
    /// Commands are still inside the closed gate; ask again.
    #[error("{inside} commands are still inside the closed gate")]
    Unsettled {
        /// How many.
        inside: u32,
    },
    /// Commands of an ended export are inside its gate, and what was asked would
    /// stop the volume's I/O until they end. Nothing was begun; ask again.
    #[error(
        "volume {volume}: {inside} commands of epoch {epoch} are still inside its closed gate, \
         and what was asked would wait for them, and every read and write of the volume with it: \
         refused until they have ended; look at the home's disk (dmesg, processes in D state)"
    )]
    StillInside {
        /// The volume.
        volume: VolumeId,
        /// The epoch they are of.
        epoch: Epoch,
        /// How many.
        inside: u32,
    },
    /// It is under way and goes on; ask again.
    #[error("{0}")]
    NotYet(String),
    /// The home has no such volume.
    #[error("the home has no volume {0}")]
    NoVolume(VolumeId),
    /// The home has no such snapshot.
    #[error("the home has no snapshot {0}")]
    NoSnapshot(SnapshotId),
    /// The volume was written or exported before: nothing is restored over it.
    #[error(
        "volume {0} was published or written before, and a restore makes a new volume: restore under another name"
    )]
    Used(VolumeId),
    /// The pool cannot hold what was asked.
    #[error("pool {pool}: {needed} asked, {available} available")]
    NoSpace {
        /// The pool's folder.
        pool: PathBuf,
        /// What was asked.
        needed: Bytes,
        /// What is left.
        available: Bytes,
    },
    /// The pool cannot do this at all (no reflink, say).
    #[error("{0}")]
    Unsupported(String),
    /// A call of the home's failed; the text names it and its object.
    #[error("{0}")]
    Failed(String),
}

/// What a new volume's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// Nothing: reads as zeroes, never written.
    Empty,
    /// A clone of a snapshot on the same home.
    Snapshot(SnapshotId),
    /// A clone of a volume on the same home.
    Volume(VolumeId),
}

/// A snapshot at its home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its id.
    pub id: SnapshotId,
    /// The volume it is of.
    pub volume: VolumeId,
    /// The volume's size when it was taken.
    pub size: Bytes,
    /// When it was taken.
    pub taken: SystemTime,
}

/// Room in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// What new volumes can still be given.
    pub available: Bytes,
    /// The whole.
    pub total: Bytes,
}

/// A home's call that clones or syncs a whole volume is answered within this.
pub const COPY: Duration = Duration::from_secs(60);

/// The home's side of a volume: its bytes, its record, its exports.
///
/// Every method can be repeated: the same request again has the same outcome.
#[async_trait]
pub trait Home: Send + Sync {
    /// Makes a volume of `size`.
    async fn create(
        &self,
        volume: &VolumeId,
        size: Bytes,
        content: &Content,
    ) -> Result<(), HomeError>;
    /// Deletes a volume whose exports are all closed, with its record; `unused`:
    /// only if it was never exported nor written (a clone counts as written).
    /// What it must leave is stale. No such volume: success.
    async fn delete(&self, volume: &VolumeId, unused: bool) -> Result<(), HomeError>;
    /// Grows a volume to at least `size`, tells connected hosts, and returns the new size.
    async fn expand(&self, volume: &VolumeId, size: Bytes) -> Result<Bytes, HomeError>;
    /// Clones a volume as it is now.
    async fn snapshot(
        &self,
        volume: &VolumeId,
        snapshot: &SnapshotId,
    ) -> Result<SnapshotInfo, HomeError>;
    /// Deletes a snapshot. No such snapshot: success.
    async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), HomeError>;
    /// Room in the pool.
    async fn capacity(&self) -> Result<Capacity, HomeError>;
    /// Opens an export. When this returns, the home's record says so on disk.
    async fn export(&self, request: &ExportRequest) -> Result<Exported, HomeError>;
    /// What the two sides of an export that is open at `epoch` prove to each
    /// other, and whether the volume was written by now. Opens nothing.
    async fn disclose(&self, volume: &VolumeId, epoch: Epoch) -> Result<Disclosure, HomeError>;
    /// Closes every export up to an epoch and waits, within a bound, for the
    /// commands inside. When this returns, the home's record says so on disk.
    async fn fence(&self, request: &FenceRequest) -> Result<Settlement, HomeError>;
}

/// What the old node answered when it was told that its attachment has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeAnswer {
    /// It had nothing attached, or has let go.
    Clean,
    /// Something there still holds the (dead) device; the text says what.
    Held(String),
    /// It did not answer; the text says what was tried.
    Silent(String),
    /// It had the volume attached, and shut it.
    Shut {
        /// What was shut there, and how fast.
        gate: GateReport,
        /// Who held the disk when it was shut, as that node's kernel saw it;
        /// none in receipts of agents that did not tell.
        #[serde(default)]
        judgement: Option<Box<Judgement>>,
        /// What still holds the (dead) device, if anything does.
        held: Option<String>,
    },
}

/// The workload node's side, as the controller sees it. Best effort: no receipt depends on it.
#[async_trait]
pub trait Node: Send + Sync {
    /// The volume's attachment up to `epoch` has ended: let go of what is left of it.
    async fn release(&self, volume: &VolumeId, epoch: Epoch) -> NodeAnswer;
    /// Stop what holds this ticket within `grace`. True when it has stopped.
    async fn interrupt(&self, volume: &VolumeId, ticket: &TicketId, grace: Duration) -> bool;
}

/// Finds the ports of a node by its name.
pub trait Ports: Send + Sync {
    /// The home's side of a node, if it has ever registered.
    fn home(&self, node: &NodeId) -> Option<Arc<dyn Home>>;
    /// The workload side of a node, if it has ever registered.
    fn node(&self, node: &NodeId) -> Option<Arc<dyn Node>>;
}

/// What a node may use now: the answer to "what is this volume to me?".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The volume.
    pub volume: VolumeId,
    /// The volume's size.
    pub size: Bytes,
    /// The open export.
    pub exported: Exported,
    /// Whether writes are refused.
    pub read_only: bool,
    /// How long a live holder may keep NodeUnstage from ending.
    #[serde(with = "micros")]
    pub busy_deadline: Duration,
}

/// Why the controller did not answer a node's question with what it asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum ControlError {
    /// The controller does not answer.
    #[error("controller does not answer: {0}")]
    Unreachable(String),
    /// The volume is not published to the node.
    #[error("volume {volume} is not published to node {node}: call ControllerPublishVolume first")]
    NotPublished {
        /// The volume.
        volume: VolumeId,
        /// The node that asked.
        node: NodeId,
    },
    /// No such volume.
    #[error("no volume {0}")]
    NoVolume(VolumeId),
    /// Anything else, in the controller's words.
    #[error("{0}")]
    Failed(String),
}

/// The controller, as a node sees it.
#[async_trait]
pub trait Control: Send + Sync {
    /// What `node` may use of `volume` now.
    async fn attachment(
        &self,
        volume: &VolumeId,
        node: &NodeId,
    ) -> Result<Attachment, ControlError>;
    /// Adds a line to the journal. Best effort.
    async fn note(&self, note: Note);
}

/// A line of the journal, `drover events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// When, by the writer's clock.
    pub time: SystemTime,
    /// The volume it is about, if it is about one.
    pub volume: Option<VolumeId>,
    /// The node it is about, if it is about one.
    pub node: Option<NodeId>,
    /// What happened, one word (`published`, `fenced`, `staged`, `lease-expired`, …).
    pub kind: String,
    /// A sentence for a person.
    pub text: String,
    /// Figures and facts for a program; an object.
    pub detail: serde_json::Value,
}

/// A disk of this node: a whole disk, never a partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The kernel's name, `nvme0n1`.
    pub name: String,
    /// Its sequence number.
    pub diskseq: Diskseq,
}

impl Disk {
    /// The device node's path.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }
}

/// Who holds a disk: the evidence, as the initiator sees it.
#[async_trait]
pub trait Witness: Send + Sync {
    /// Judges who holds `disk`. Mounts below a path of `own_mounts` are
    /// drover's own and hold nothing.
    async fn judge(&self, disk: &Disk, own_mounts: &[PathBuf]) -> Judgement;
}

/// How a volume is used on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// The bare device.
    Block,
    /// A file system on it.
    Mount {
        /// Which.
        fs: FsType,
        /// mount(8) options.
        flags: Vec<String>,
    },
}

/// File systems that drover makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FsType {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

/// A file system's or device's room, for NodeGetVolumeStats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in all, used and available (the latter two 0 for a bare device).
    pub bytes: [u64; 3],
    /// Inodes in all, used and available; none for a bare device.
    pub inodes: Option<[u64; 3]>,
}

/// Why the node's side did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The controller could not say what the node may use.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The volume is not staged at that path.
    #[error("volume {volume} is not staged at {}", path.display())]
    NotStaged {
        /// The volume.
        volume: VolumeId,
        /// The staging path.
        path: PathBuf,
    },
    /// The volume is not at that path.
    #[error("volume {volume} is not at {}", path.display())]
    NotThere {
        /// The volume.
        volume: VolumeId,
        /// The path.
        path: PathBuf,
    },
    /// The same volume is staged or published there already, otherwise.
    #[error("{0}")]
    Incompatible(String),
    /// Somebody holds the device and may not be cut off yet; the text names who.
    #[error("{0}")]
    Busy(String),
    /// A kernel call or a tool did not end in time.
    #[error("{what} did not end within {deadline:?}")]
    Deadline {
        /// The call or command and its object.
        what: String,
        /// How long it had.
        deadline: Duration,
    },
    /// The device holds what must not be formatted, or answers with errors.
    #[error("{0}")]
    Unusable(String),
    /// A call or tool failed; the text names it, its object and its reason.
    #[error("{0}")]
    Failed(String),
}

/// Stage: make a published volume ready on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Where kubelet wants it.
    pub staging: PathBuf,
    /// How it is used.
    pub access: Access,
}

/// Publish: hand a staged volume to a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Where it is staged.
    pub staging: PathBuf,
    /// Where the pod's container finds it.
    pub target: PathBuf,
    /// How it is used.
    pub access: Access,
    /// Whether the pod may not write.
    pub read_only: bool,
}

/// The workload node's side, as kubelet sees it (through CSI).
#[async_trait]
pub trait Staging: Send + Sync {
    /// Connects, formats a never-written volume, mounts.
    async fn stage(&self, request: &StageRequest) -> Result<(), NodeError>;
    /// Unmounts and disconnects. Not staged: success.
    async fn unstage(&self, volume: &VolumeId, staging: &Path) -> Result<(), NodeError>;
    /// Bind-mounts into a pod.
    async fn publish(&self, request: &PublishRequest) -> Result<(), NodeError>;
    /// Takes out of a pod. Not there: success.
    async fn unpublish(&self, volume: &VolumeId, target: &Path) -> Result<(), NodeError>;
    /// Room in what is at `path`.
    async fn stats(&self, volume: &VolumeId, path: &Path) -> Result<Usage, NodeError>;
    /// Grows the file system at `path` to the device's size and returns that.
    async fn expand(
        &self,
        volume: &VolumeId,
        path: &Path,
        at_least: Bytes,
    ) -> Result<Bytes, NodeError>;
}

/// Durations as whole microseconds, so that records read the same everywhere.
pub mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes whole microseconds.
    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(value.as_micros()).unwrap_or(u64::MAX))
    }

    /// Reads whole microseconds.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_micros)
    }
}

//! The arbiter's runner.

use std::sync::Arc;
use std::time::Duration;

use super::ports::{Attachment, Capacity, Note, Ports};
use super::record::{
    AccessMode, NewVolume, NodeRecord, Registration, SnapshotRecord, Ticket, VolumeView,
};
use crate::ids::{Bytes, Epoch, NodeId, SnapshotId, TicketId, VolumeId};
use crate::store::StateStore;

/// Why the arbiter refused.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// No such volume.
    #[error("no volume {0}")]
    NoVolume(VolumeId),
    /// No such snapshot.
    #[error("no snapshot {0}")]
    NoSnapshot(SnapshotId),
    /// No node of that name has ever registered.
    #[error("no node {0} has registered")]
    NoNode(NodeId),
    /// No such ticket.
    #[error("volume {volume} has no ticket {ticket}")]
    NoTicket {
        /// The volume.
        volume: VolumeId,
        /// The ticket.
        ticket: TicketId,
    },
    /// A workload on another node holds the volume.
    #[error(
        "volume {volume} is published to node {node}; unpublish it there, or declare the node lost (drover node lost {node})"
    )]
    HeldBy {
        /// The volume.
        volume: VolumeId,
        /// The node that holds it.
        node: NodeId,
    },
    /// The volume is not published to the node.
    #[error("volume {volume} is not published to node {node}: call ControllerPublishVolume first")]
    NotPublished {
        /// The volume.
        volume: VolumeId,
        /// The node.
        node: NodeId,
    },
    /// The same name or node again with other properties.
    #[error("{0}")]
    Incompatible(String),
    /// Something needs the object still (a published volume, a snapshot being cloned).
    #[error("{0}")]
    InUse(String),
    /// The size cannot be had.
    #[error("{0}")]
    OutOfRange(String),
    /// A pool is full.
    #[error("{0}")]
    NoSpace(String),
    /// This home or pool cannot do that.
    #[error("{0}")]
    Unsupported(String),
    /// A node that was declared lost has not come back clean.
    #[error("node {0} was declared lost and has not come back clean")]
    NodeLost(NodeId),
    /// What must happen first has not happened yet; the text says what and since when. Retry.
    #[error("{0}")]
    NotYet(String),
    /// The store or a home cannot be reached. Retry.
    #[error("{0}")]
    Unavailable(String),
    /// A home failed; the text names the call and its object.
    #[error("{0}")]
    Failed(String),
}

/// The arbiter: decides by [`super::state`] and acts through [`super::ports`].
pub struct Arbiter {
    _store: Arc<dyn StateStore>,
    _ports: Arc<dyn Ports>,
}

#[expect(
    clippy::todo,
    unused_variables,
    clippy::unused_async,
    missing_docs,
    reason = "the arbiter is being written"
)]
impl Arbiter {
    /// Reads every record and takes up what an earlier process left unfinished.
    pub async fn start(
        store: Arc<dyn StateStore>,
        ports: Arc<dyn Ports>,
    ) -> Result<Arc<Self>, ArbiterError> {
        todo!()
    }
    pub async fn create_volume(&self, request: NewVolume) -> Result<VolumeView, ArbiterError> {
        todo!()
    }
    /// Unknown volume: success. Published: `InUse`.
    pub async fn delete_volume(&self, volume: &VolumeId) -> Result<(), ArbiterError> {
        todo!()
    }
    pub async fn volume(&self, volume: &VolumeId) -> Result<VolumeView, ArbiterError> {
        todo!()
    }
    /// All volumes, in order of id.
    pub async fn volumes(&self) -> Result<Vec<VolumeView>, ArbiterError> {
        todo!()
    }
    /// Answers when the export is open at the home, or with `NotYet` at the deadline.
    pub async fn publish(
        &self,
        volume: &VolumeId,
        node: &NodeId,
        mode: AccessMode,
        deadline: Duration,
    ) -> Result<Epoch, ArbiterError> {
        todo!()
    }
    /// Answers as soon as the end of the claim is durable. `None`: from every node. Unknown volume or node: success.
    pub async fn unpublish(
        &self,
        volume: &VolumeId,
        node: Option<&NodeId>,
    ) -> Result<(), ArbiterError> {
        todo!()
    }
    /// What `node` may use now.
    pub async fn attachment(
        &self,
        volume: &VolumeId,
        node: &NodeId,
    ) -> Result<Attachment, ArbiterError> {
        todo!()
    }
    pub async fn expand(
        &self,
        volume: &VolumeId,
        at_least: Bytes,
        at_most: Option<Bytes>,
    ) -> Result<Bytes, ArbiterError> {
        todo!()
    }
    pub async fn create_snapshot(
        &self,
        volume: &VolumeId,
        name: &str,
    ) -> Result<SnapshotRecord, ArbiterError> {
        todo!()
    }
    /// Unknown snapshot: success.
    pub async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), ArbiterError> {
        todo!()
    }
    /// All snapshots, in order of id.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotRecord>, ArbiterError> {
        todo!()
    }
    /// Room in the pool of `home`, or the largest room any pool has.
    pub async fn capacity(&self, home: Option<&NodeId>) -> Result<Capacity, ArbiterError> {
        todo!()
    }
    pub async fn take_ticket(&self, volume: &VolumeId, ticket: Ticket) -> Result<(), ArbiterError> {
        todo!()
    }
    pub async fn renew_ticket(
        &self,
        volume: &VolumeId,
        ticket: &TicketId,
        lease: Duration,
    ) -> Result<(), ArbiterError> {
        todo!()
    }
    /// Unknown ticket: success.
    pub async fn end_ticket(
        &self,
        volume: &VolumeId,
        ticket: &TicketId,
        why: &str,
    ) -> Result<(), ArbiterError> {
        todo!()
    }
    pub async fn register(&self, registration: Registration) -> Result<(), ArbiterError> {
        todo!()
    }
    pub async fn nodes(&self) -> Result<Vec<NodeRecord>, ArbiterError> {
        todo!()
    }
    /// Says of the node's present incarnation that it will not write again by itself: its tickets end, its exports are fenced.
    pub async fn node_lost(&self, node: &NodeId) -> Result<(), ArbiterError> {
        todo!()
    }
    pub async fn note(&self, note: Note) {
        todo!()
    }
    /// The journal, oldest first, with receipts in it.
    pub async fn notes(&self, volume: Option<&VolumeId>) -> Result<Vec<Note>, ArbiterError> {
        todo!()
    }
}

//! Why the arbiter refuses: one error for all its callers.

use crate::attach::ports::HomeError;
use crate::attach::state::Refusal;
use crate::ids::{NodeId, SnapshotId, TicketId, VolumeId};
use crate::store::StoreError;

/// Why the arbiter refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
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

impl From<StoreError> for ArbiterError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict(key) => {
                Self::NotYet(format!("record {key} has changed meanwhile"))
            }
            StoreError::Unavailable(text) => Self::Unavailable(format!("store: {text}")),
        }
    }
}

impl From<HomeError> for ArbiterError {
    fn from(error: HomeError) -> Self {
        let text = error.to_string();
        match error {
            HomeError::Unreachable { .. } => Self::Unavailable(text),
            HomeError::StaleEpoch { .. }
            | HomeError::Unsettled { .. }
            | HomeError::StillInside { .. }
            | HomeError::NotYet(_) => Self::NotYet(text),
            HomeError::RecordBehind { .. } | HomeError::NoVolume(_) | HomeError::Failed(_) => {
                Self::Failed(text)
            }
            HomeError::Used(_) => Self::InUse(text),
            HomeError::NoSnapshot(snapshot) => Self::NoSnapshot(snapshot),
            HomeError::NoSpace { .. } => Self::NoSpace(text),
            HomeError::Unsupported(_) => Self::Unsupported(text),
        }
    }
}

impl ArbiterError {
    pub(super) fn refused(volume: &VolumeId, refusal: Refusal) -> Self {
        match refusal {
            Refusal::HeldBy(node) => Self::HeldBy {
                volume: volume.clone(),
                node,
            },
            Refusal::NodeLost(node) => Self::NodeLost(node),
            Refusal::InUse(text) => Self::InUse(text),
            Refusal::Incompatible(text) => Self::Incompatible(text),
            Refusal::NoVolume => Self::NoVolume(volume.clone()),
            Refusal::NoTicket(ticket) => Self::NoTicket {
                volume: volume.clone(),
                ticket,
            },
            Refusal::NotYet(text) => Self::NotYet(text),
        }
    }

    /// Whether waiting a little may still help.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Self::NotYet(_) | Self::Unavailable(_))
    }
}

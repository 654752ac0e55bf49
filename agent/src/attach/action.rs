//! What the arbiter decided to do. Performed by the runner, in no order but
//! that of the list; the first of a list is never begun before the decision is
//! durable.

use std::time::Duration;

use super::ports::{Content, FenceRequest, Note};
use super::proof::Grant;
use crate::ids::{ActionId, Bytes, Epoch, NodeId, TicketId};

/// How long a stream that must stop is given to do so by itself.
pub const GRACE: Duration = Duration::from_secs(1);

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The one intent whose result the volume waits for.
    Intent(Intent),
    /// Tell a node to stop what holds a ticket that has ended. Best effort.
    Interrupt {
        /// The ticket.
        ticket: TicketId,
        /// Where it is held.
        node: NodeId,
        /// How long it may take to stop by itself.
        grace: Duration,
    },
    /// Tell what happened.
    Note(Note),
}

/// An intent for a volume's home. Repeated until its result, or until it is superseded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// Which intent; its result carries the same.
    pub id: ActionId,
    /// The epoch it is about; its result carries the same.
    pub epoch: Epoch,
    /// The home.
    pub home: NodeId,
    /// What to do there.
    pub task: Task,
}

/// What to do at a home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// Make the volume.
    Create {
        /// Its size.
        size: Bytes,
        /// What it begins as.
        content: Content,
    },
    /// End every export up to an epoch.
    Fence {
        /// What to ask.
        request: FenceRequest,
        /// The node to tell in parallel, where one held it.
        holder: Option<NodeId>,
    },
    /// Open an export.
    Export(Grant),
    /// Delete the volume, whose exports have all ended.
    Delete {
        /// Only if it was never exported nor written.
        unused: bool,
    },
}

impl Task {
    /// Its name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create { .. } => "create",
            Self::Fence { .. } => "fence",
            Self::Export(_) => "export",
            Self::Delete { .. } => "delete",
        }
    }
}

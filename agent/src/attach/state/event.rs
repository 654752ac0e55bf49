//! What can happen to a volume, and why it can be refused.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Holder;
use crate::attach::ports::{Exported, HomeError};
use crate::attach::proof::Receipt;
use crate::attach::record::Ticket;
use crate::ids::{ActionId, Bytes, Epoch, NodeId, TicketId};

/// What happens to a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A workload on a node wants the volume.
    Publish {
        /// The node, its identity and how the volume is to be used.
        holder: Holder,
        /// The nodes that are declared lost now.
        lost: BTreeSet<NodeId>,
    },
    /// The workload has left. None: every node's.
    Unpublish(Option<NodeId>),
    /// The volume is to be deleted.
    Delete,
    /// A stream or an operator claims the volume.
    Take {
        /// The claim.
        ticket: Ticket,
        /// How long it lasts unless renewed.
        lease: Option<Duration>,
    },
    /// A claim's owner made progress.
    Renew {
        /// The claim.
        ticket: TicketId,
        /// How long it lasts from now.
        lease: Duration,
    },
    /// A claim's owner is done.
    End {
        /// The claim.
        ticket: TicketId,
        /// Why, for the journal.
        why: String,
    },
    /// A restore has failed: the volume that was made for it holds nothing.
    FailRestore {
        /// The restore's claim.
        ticket: TicketId,
        /// Why, for the journal.
        why: String,
    },
    /// A claim's lease ran out (on the runner's monotonic clock).
    Expired(TicketId),
    /// A node was declared lost.
    NodeLost(NodeId),
    /// The home has grown the volume.
    Resized(Bytes),
    /// Nobody performs the pending intent any more: perform it again.
    Resume,
    /// An intent's result.
    Result {
        /// The intent.
        action: ActionId,
        /// The epoch it was about.
        epoch: Epoch,
        /// What came of it.
        outcome: Outcome,
    },
}

/// What came of an intent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The home made the volume.
    Created,
    /// The exports have ended.
    Fenced(Receipt),
    /// The export is open.
    Exported(Exported),
    /// The home has deleted the volume.
    Deleted,
    /// The home did not do it.
    Refused(HomeError),
}

/// Why an event was refused. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// A workload on this node holds the volume.
    HeldBy(NodeId),
    /// The node was declared lost.
    NodeLost(NodeId),
    /// A claim is in the way; which.
    InUse(String),
    /// The same request with other properties.
    Incompatible(String),
    /// The volume is being deleted.
    NoVolume,
    /// No such ticket.
    NoTicket(TicketId),
    /// Something must come first; what.
    NotYet(String),
}

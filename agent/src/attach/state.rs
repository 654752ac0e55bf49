//! The state of one volume, and what follows from an event: pure.
//!
//! [`step`](VolumeState::step) takes the state and an event and gives the next
//! state and the actions, or a refusal that changes nothing. It reads no clock,
//! store or port. [`VolumeState`] is what the store keeps.
//!
//! ```text
//!               created            publish, first ever
//!   Creating ----------> Idle ---------------------------+
//!      |                 ^  | publish                    v
//!      | cannot be made  |  +-----------> Handing --> Exporting --> Attached
//!      |         receipt |    publish    ^ |   receipt  |  |           |
//!      |                 |  +------------+ | unpublish  |  | unpublish,| node lost
//!      |                 Closing <---------+------------)--+-----------+
//!      |                    | delete        stale epoch |  another node, its
//!      |   delete (Idle) -->v                 Handing <-+  holder lost: Handing
//!      +------------> Deleting <-- Ending
//!                        |     receipt
//!                        v deleted
//!                       Gone
//! ```
//!
//! `Closing`, `Handing` and `Ending` all wait for the receipt of the same kind
//! of fence; they differ in what follows it: nothing, an export, the deletion.
//! Going from one to another of them keeps the fence that is under way.
//!
//! | event \ in | Creating | Idle | Closing | Handing | Exporting | Attached | Ending | Deleting | Gone |
//! |---|---|---|---|---|---|---|---|---|---|
//! | publish, the holder's node | – | – | – | same | same | same | – | – | – |
//! | publish, free | not yet | Handing, or Exporting if first ever | Handing | – | – | – | no volume | no volume | no volume |
//! | publish, held by another | – | – | – | held | held | held | – | – | – |
//! | publish, its holder lost | – | – | – | Handing | Handing | Handing | – | – | – |
//! | publish, node lost / ticket in the way | not yet | refused | refused | refused | refused | refused | no volume | no volume | no volume |
//! | unpublish, node lost: the holder's | same | same | same | Closing | Closing | Closing | same | same | same |
//! | delete | not yet | Ending | Ending | in use | in use | in use | same | same | same |
//! | take a ticket | not yet | Idle | Closing | Handing | Exporting | Attached | no volume | no volume | no volume |
//! | take a restore ticket | not yet | Idle | not yet | in use | in use | in use | no volume | no volume | no volume |
//! | renew, end, expiry of others' | same | same | same | same | same | same | same | same | same |
//! | failure, expiry of its restore | not yet | Ending if never offered | same | same | same | same | same | same | same |
//! | resized | same | same | same | same | same | same | same | same | same |
//! | resume | again | same | again | again | Handing | same | again | again | same |
//! | created | Idle | – | – | – | – | – | – | – | – |
//! | receipt | – | – | Idle | Exporting | – | – | Deleting | – | – |
//! | exported | – | – | – | – | Attached | – | – | – | – |
//! | deleted | – | – | – | – | – | – | – | Gone | – |
//! | refused: stale epoch | – | – | Closing at the home's epoch | Handing, likewise | Handing, likewise | – | Ending, likewise; a failed restore's: Closing | Ending, likewise; Closing where it could not be made | – |
//! | refused: cannot be made | Deleting | – | – | – | – | – | – | – | – |
//! | refused: no such volume | same | – | same | same | same | – | Deleting | same | – |
//! | refused: record behind | same | – | same | same | same | – | Deleting | same | – |
//! | refused: failed | Deleting | – | same | same | same | – | same | same | – |
//! | refused: anything else | same | – | same | same | same | – | same | same | – |
//! | a result that nobody waits for | same | same | same | same | same | same | same | same | same |
//!
//! "same": the event is accepted and the phase stays; for a refusal the intent
//! stays and the runner repeats it. "again": the intent gets a new id and is
//! performed again. "–": cannot happen, or, for results, is of no waited-for
//! intent and changes nothing.
//!
//! Four decisions that are not obvious:
//!
//! * A grant is always preceded by a fence, even where a receipt for the last
//!   epoch exists: its answer tells whether the home's record is still as new
//!   as what was recorded there. A pool put back from an old copy is found
//!   before a new holder gets a byte of it, and so is a store put back from one.
//!   The fence names every epoch below the one to grant, offered or not: a
//!   request of the life before an old copy was put back may still be under way.
//! * Interruptible tickets of other nodes end when the volume is published
//!   elsewhere, and their owners are told with a grace of 1 s, beside the fence
//!   and not before it: the export they read through has been closing since
//!   unpublish, so waiting would save them nothing and cost the workload a second.
//! * A restore that fails ends with its volume in one step, and only while its
//!   own ticket stands on a volume that no node was ever offered: whoever tells
//!   of a failure again, or late, meets somebody's good volume, and changes nothing.
//!   Where the home knows of an epoch all the same, the claim is of an old copy of
//!   the store, and the volume lives.
//! * An epoch that was decided and then not needed (unpublish while handing) is
//!   not used again; `offered` says up to where exports can exist.
//! * What could not be made is deleted only if nobody ever used it: a store put
//!   back from an old copy may ask to make what was made and written long ago.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::action::{Action, Intent, Task};
use super::ports::{
    ExportRequest, Exported, FenceRequest, HomeError, HostIdentity, Note, Recorded,
};
use super::proof::{Cleared, Grant};
use super::record::{AccessMode, Ticket, TicketKind, VolumeSpec};
use crate::ids::{ActionId, Epoch, NodeId, TicketId, VolumeId};

mod claims;
mod event;
mod outcome;
mod stage;

pub(super) use claims::kind_name;
pub use event::{Event, Outcome, Refusal};
pub use stage::Stage;

/// What the store keeps of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeState {
    /// The volume as it is now.
    pub spec: VolumeSpec,
    /// The highest epoch that was decided.
    pub epoch: Epoch,
    /// The highest epoch for which an export may ever have been asked for.
    pub offered: Epoch,
    /// How far the home's record is known to have come.
    #[serde(flatten)]
    pub recorded: Recorded,
    /// Every claim.
    pub claims: Vec<Claim>,
    /// Where the volume stands.
    pub phase: Phase,
    /// The id of the next intent.
    pub next_action: ActionId,
    /// The intent whose result is waited for.
    pub pending: Option<ActionId>,
    /// The last receipt's id.
    pub last_receipt: Option<String>,
}

/// A ticket with the length of its lease, which starts afresh at each start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The ticket.
    pub ticket: Ticket,
    /// The lease's length in microseconds; none: it has no lease.
    pub lease_us: Option<u64>,
}

/// Who a volume is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The node.
    pub node: NodeId,
    /// Who the node is to targets.
    pub host: HostIdentity,
    /// How it uses the volume.
    pub mode: AccessMode,
}

/// What follows the receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// Nothing: the volume rests.
    Rest,
    /// An export at the decided epoch.
    Export(Holder),
    /// The deletion.
    Delete,
    /// The deletion of what was made for a restore, unless its home knows of an
    /// epoch: then an old copy of the store has put the restore's claim back.
    Discard,
}

/// Where a volume stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Decided; the home is being asked to make it.
    Creating,
    /// Nobody holds it, and a receipt says so (or nobody ever did).
    Idle,
    /// The exports up to `closing` are being ended.
    Fencing {
        /// The last epoch that ends.
        closing: Epoch,
        /// Who held it, to be told.
        holder: Option<NodeId>,
        /// What follows.
        then: Then,
    },
    /// The decided epoch is being opened.
    Exporting {
        /// For whom.
        holder: Holder,
        /// Why that is safe.
        cleared: Cleared,
    },
    /// The decided epoch is open.
    Attached {
        /// For whom.
        holder: Holder,
        /// How to reach it.
        exported: Exported,
    },
    /// The home is being asked to delete it; where it could not be made, why.
    Deleting {
        /// The refusal of the making.
        unmade: Option<HomeError>,
    },
    /// The record is to be removed.
    Gone {
        /// The refusal of the making.
        unmade: Option<HomeError>,
    },
}

/// The next state and what to do.
pub type Step = (VolumeState, Vec<Action>);

impl VolumeState {
    /// A volume that was decided on and not made yet.
    pub fn new(spec: VolumeSpec) -> Self {
        Self {
            spec,
            epoch: Epoch(0),
            offered: Epoch(0),
            recorded: Recorded::default(),
            claims: Vec::new(),
            phase: Phase::Creating,
            next_action: ActionId(2),
            pending: Some(ActionId(1)),
            last_receipt: None,
        }
    }

    /// A volume that is made for a restore: its claim is there before the volume
    /// is, so that it has an owner and an end from the first moment on.
    pub fn for_restore(
        spec: VolumeSpec,
        ticket: TicketId,
        lease: Duration,
        now: SystemTime,
    ) -> Self {
        let ticket = Ticket {
            id: ticket,
            kind: TicketKind::Restore,
            node: spec.home.clone(),
            owner: "drover restore".to_owned(),
            interruptible: false,
            home_side: true,
            lease_ends: None,
        };
        Self {
            claims: vec![Claim::new(ticket, Some(lease), now)],
            ..Self::new(spec)
        }
    }

    /// Decides what follows from `event`. `now` is for notes and the leases' wall-clock ends.
    ///
    /// # Errors
    /// A refusal; nothing has changed.
    pub fn step(&self, event: Event, now: SystemTime) -> Result<Step, Refusal> {
        let mut turn = Turn {
            state: self.clone(),
            actions: Vec::new(),
            now,
        };
        match event {
            Event::Publish { holder, lost } => turn.publish(holder, &lost)?,
            Event::Unpublish(node) => turn.unpublish(node.as_ref()),
            Event::Delete => turn.delete()?,
            Event::Take { ticket, lease } => turn.take(ticket, lease)?,
            Event::Renew { ticket, lease } => turn.renew(&ticket, lease)?,
            Event::End { ticket, why } => turn.end(&ticket, &why),
            Event::FailRestore { ticket, why } => turn.fail_restore(&ticket, &why)?,
            Event::Expired(ticket) => turn.expired(&ticket)?,
            Event::NodeLost(node) => turn.node_lost(&node),
            Event::Resized(size) => turn.resized(size),
            Event::Resume => turn.resume(),
            Event::Result {
                action,
                epoch,
                outcome,
            } => {
                if self.pending == Some(action) && self.intent_epoch() == epoch {
                    turn.result(outcome);
                }
            }
        }
        Ok((turn.state, turn.actions))
    }

    /// Where the volume stands.
    pub fn stage(&self) -> Stage {
        match &self.phase {
            Phase::Creating => Stage::Creating,
            Phase::Idle => Stage::Idle,
            Phase::Fencing { then, .. } => match then {
                Then::Rest => Stage::Closing,
                Then::Export(_) => Stage::Handing,
                Then::Delete | Then::Discard => Stage::Ending,
            },
            Phase::Exporting { .. } => Stage::Exporting,
            Phase::Attached { .. } => Stage::Attached,
            Phase::Deleting { .. } => Stage::Deleting,
            Phase::Gone { .. } => Stage::Gone,
        }
    }

    /// Who the volume is for: who has it, or gets it next.
    pub fn holder(&self) -> Option<&Holder> {
        match &self.phase {
            Phase::Fencing {
                then: Then::Export(holder),
                ..
            }
            | Phase::Exporting { holder, .. }
            | Phase::Attached { holder, .. } => Some(holder),
            _ => None,
        }
    }

    /// The workload's claim, if there is one.
    pub fn workload(&self) -> Option<&Claim> {
        self.claims
            .iter()
            .find(|claim| claim.ticket.kind == TicketKind::Workload)
    }

    /// The epoch that the pending intent and its result name.
    fn intent_epoch(&self) -> Epoch {
        match &self.phase {
            Phase::Fencing { closing, .. } => *closing,
            _ => self.epoch,
        }
    }

    /// The pending intent, as it is to be performed now.
    pub fn intent(&self) -> Option<Intent> {
        let id = self.pending?;
        let volume = || self.spec.id.clone();
        let task = match &self.phase {
            Phase::Creating => Task::Create {
                size: self.spec.size,
                content: self.spec.content.clone(),
            },
            Phase::Fencing {
                closing, holder, ..
            } => Task::Fence {
                request: FenceRequest {
                    volume: volume(),
                    epoch: *closing,
                    recorded: self.recorded,
                },
                holder: holder.clone(),
            },
            Phase::Exporting { holder, cleared } => {
                let request = ExportRequest {
                    volume: volume(),
                    epoch: self.epoch,
                    node: holder.node.clone(),
                    host: holder.host.clone(),
                    protocol: self.spec.protocol,
                    read_only: holder.mode == AccessMode::SingleReader,
                };
                Task::Export(Grant::new(cleared, request).ok()?)
            }
            Phase::Deleting { unmade } => Task::Delete {
                unused: unmade.is_some(),
            },
            Phase::Idle | Phase::Attached { .. } | Phase::Gone { .. } => return None,
        };
        Some(Intent {
            id,
            epoch: self.intent_epoch(),
            home: self.spec.home.clone(),
            task,
        })
    }
}

/// One step under way.
struct Turn {
    state: VolumeState,
    actions: Vec<Action>,
    now: SystemTime,
}

impl Turn {
    /// Enters a phase with an intent of its own (or none, where a phase waits for nobody).
    fn enter(&mut self, phase: Phase) {
        let from = self.state.stage();
        self.state.phase = phase;
        debug_assert!(
            from.may_become(self.state.stage()),
            "{from:?} became {:?}",
            self.state.stage()
        );
        self.renew_intent();
    }

    /// Changes what follows the fence that is under way, and nothing else.
    fn follow_with(&mut self, next: Then) {
        if let Phase::Fencing { then, .. } = &mut self.state.phase {
            *then = next;
        }
    }

    fn renew_intent(&mut self) {
        let id = self.state.next_action;
        self.state.pending = Some(id);
        match self.state.intent() {
            Some(intent) => {
                self.state.next_action = id.next();
                self.actions.push(Action::Intent(intent));
            }
            None => self.state.pending = None,
        }
    }

    /// A process that starts asks again for what is pending. What cleared the
    /// way for an export may be of a life before this copy of the store was put
    /// back, and the home may have opened a lower epoch since: it proves nothing
    /// any more, so the epoch that was offered is fenced and a new one is made.
    fn resume(&mut self) {
        match self.state.phase.clone() {
            Phase::Exporting { holder, .. } => {
                self.state.epoch = self.state.epoch.next();
                let then = Then::Export(holder);
                self.enter(Phase::Fencing {
                    closing: self.all_before(&then),
                    holder: None,
                    then,
                });
            }
            _ if self.state.pending.is_some() => self.renew_intent(),
            _ => {}
        }
    }

    fn note(&mut self, kind: &str, node: Option<&NodeId>, text: String) {
        let detail = serde_json::json!({
            "epoch": self.state.epoch,
            "phase": self.state.stage().name(),
        });
        self.actions.push(Action::Note(Note {
            time: self.now,
            volume: Some(self.volume()),
            node: node.cloned(),
            kind: kind.to_owned(),
            text,
            detail,
        }));
    }

    fn volume(&self) -> VolumeId {
        self.state.spec.id.clone()
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;

//! The product's records, requests and events, made from the model's small
//! words and told in them.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use drover::attach::action::Task;
use drover::attach::ports::{
    ExportRequest, Exported, FenceRequest, HomeError, HostIdentity, Protocol, Recorded, SettledBy,
    Settlement, Target,
};
use drover::attach::proof::Receipt;
use drover::attach::record::{AccessMode, Ticket, TicketKind};
use drover::attach::state::{Event, Holder, Outcome, Phase, Stage, VolumeState};
use drover::ids::{ActionId, Epoch, NodeId, VolumeId};
use drover::pool::record::{ExportState, Record};
use uuid::Uuid;

use crate::wire::{self, Input, NODES, Node, Number, Reply, Request, TICKET};

/// The one moment there is: no decision reads a clock.
pub const NOW: SystemTime = SystemTime::UNIX_EPOCH;
const LEASE: Duration = Duration::from_secs(60);

/// What the model asks of a record of the store.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Where the volume stands.
    pub stage: Stage,
    /// The highest epoch that was decided.
    pub epoch: Number,
    /// Whom it is for.
    pub holder: Option<Node>,
    /// What the pending intent asks of the home.
    pub request: Option<Request>,
    /// The ticket beside the workload's: its node (a restore's: none).
    pub ticket: Option<Option<Node>>,
    /// What holds of every record ([`sound`]).
    pub sound: bool,
}

/// Whether an export is open, as the home's record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDisk {
    /// Nothing is.
    Closed,
    /// This epoch has not ended.
    Closing(Number),
    /// This epoch is open, for this node.
    Open(Number, Node),
}

/// What the model asks of a record of the home.
#[derive(Debug, Clone)]
pub struct DiskFacts {
    /// The highest epoch it took note of.
    pub highest: Number,
    /// What is open.
    pub open: OnDisk,
    /// Whether a restore writes the file, or has written half of it.
    pub restoring: bool,
}

/// A record of the store without what no decision reads: the intents' numbers
/// (only whether one is pending, and that a new one is new), the last receipt's
/// name, whom a fence tells beside it (best effort), and the order of claims.
pub fn rest(mut state: VolumeState) -> VolumeState {
    state.pending = state.pending.map(|_| ActionId(1));
    state.next_action = ActionId(2);
    state.last_receipt = None;
    if let Phase::Fencing { holder, .. } = &mut state.phase {
        *holder = None;
    }
    state
        .claims
        .sort_by(|a, b| a.ticket.id.as_str().cmp(b.ticket.id.as_str()));
    state
}

/// What is asked of a record of the store.
pub fn facts(state: &VolumeState) -> Facts {
    let request = state.intent().map(|intent| match intent.task {
        Task::Fence { request, .. } => Request::Fence {
            epoch: number(request.epoch),
            recorded: wire::Recorded {
                epoch: number(request.recorded.epoch),
                ended: request.recorded.ended,
            },
        },
        Task::Export(grant) => Request::Export {
            epoch: number(grant.request().epoch),
            node: index(&grant.request().node),
        },
        Task::Create { .. } | Task::Delete { .. } => unreachable!("not in this model"),
    });
    let beside = |claim: &&drover::attach::state::Claim| claim.ticket.kind != TicketKind::Workload;
    let ticket = state.claims.iter().find(beside).map(|claim| {
        let node = index(&claim.ticket.node);
        (claim.ticket.kind == TicketKind::Backup).then_some(node)
    });
    Facts {
        stage: state.stage(),
        epoch: number(state.epoch),
        holder: state.holder().map(|holder| index(&holder.node)),
        request,
        ticket,
        sound: sound(state),
    }
}

/// What must hold of every record: one workload's claim, of the holder's node;
/// no epoch offered that was not decided, none recorded that was not offered;
/// an intent that can be performed wherever one is pending (a grant among
/// them, which only a receipt for all that came before makes).
pub fn sound(state: &VolumeState) -> bool {
    let workloads = state
        .claims
        .iter()
        .filter(|claim| claim.ticket.kind == TicketKind::Workload)
        .count();
    workloads <= 1
        && state.workload().map(|claim| &claim.ticket.node)
            == state.holder().map(|holder| &holder.node)
        && state.offered <= state.epoch
        && state.recorded.epoch <= state.offered
        && state.pending.is_some() == state.intent().is_some()
}

/// What is asked of a record of the home.
pub fn disk_facts(record: &Record) -> DiskFacts {
    DiskFacts {
        highest: number(record.highest),
        restoring: record.restoring,
        open: match &record.export {
            ExportState::Closed => OnDisk::Closed,
            ExportState::Closing { export, .. } => OnDisk::Closing(number(export.epoch)),
            ExportState::Open { export } => OnDisk::Open(number(export.epoch), index(&export.node)),
        },
    }
}

/// None: nobody waits for such a result.
pub fn event(state: &VolumeState, input: Input) -> Option<Event> {
    Some(match input {
        Input::Publish { node, lost } => Event::Publish {
            holder: Holder {
                node: name(node),
                host: host(node),
                mode: AccessMode::SingleWriter,
            },
            lost: (0..3)
                .filter(|n| lost & (1 << n) != 0)
                .map(name)
                .collect::<BTreeSet<_>>(),
        },
        Input::Unpublish => Event::Unpublish(None),
        Input::NodeLost(node) => Event::NodeLost(name(node)),
        Input::Backup(node) => take(TicketKind::Backup, name(node)),
        Input::Restore => take(TicketKind::Restore, "home".parse().expect("a node's name")),
        // Not by its lease: with a restore's the volume goes, and no deletion is here.
        Input::TicketEnds => Event::End {
            ticket: TICKET.parse().expect("a ticket's id"),
            why: "it was ended".to_owned(),
        },
        Input::Resume => Event::Resume,
        Input::Result(reply) => event_of(state, reply)?,
    })
}

fn take(kind: TicketKind, node: NodeId) -> Event {
    Event::Take {
        ticket: Ticket {
            id: TICKET.parse().expect("a ticket's id"),
            kind,
            node,
            owner: "drover".to_owned(),
            interruptible: kind == TicketKind::Backup,
            home_side: false,
            lease_ends: None,
        },
        lease: Some(LEASE),
    }
}

/// The result of the pending intent that a reply is.
pub fn event_of(state: &VolumeState, reply: Reply) -> Option<Event> {
    let intent = state.intent()?;
    let outcome = match reply {
        Reply::Done => match &intent.task {
            Task::Fence { request, .. } => {
                let made = Receipt::new(request, settlement(request.epoch), Duration::ZERO, NOW);
                Outcome::Fenced(made.expect("it answers this very fence"))
            }
            Task::Export(grant) => Outcome::Exported(exported(grant.request().epoch)),
            Task::Create { .. } => Outcome::Created,
            Task::Delete { .. } => Outcome::Deleted,
        },
        Reply::Failed => Outcome::Refused(HomeError::Failed("a call failed".to_owned())),
        Reply::Behind => Outcome::Refused(HomeError::RecordBehind {
            home: Epoch(0),
            recorded: Epoch(0),
        }),
        Reply::Stale(home) => Outcome::Refused(HomeError::StaleEpoch {
            home: Epoch(home.into()),
        }),
    };
    Some(Event::Result {
        action: intent.id,
        epoch: intent.epoch,
        outcome,
    })
}

/// What a home answers to a fence.
pub fn settlement(epoch: Epoch) -> Settlement {
    Settlement {
        volume: volume(),
        epoch,
        node: None,
        sessions_ended: 0,
        inside_at_close: 0,
        settled_by: SettledBy::Drained,
        unsettled: 0,
        settle_time: Duration::ZERO,
        late_refused: 0,
        last_write: None,
    }
}

fn exported(epoch: Epoch) -> Exported {
    Exported {
        epoch,
        target: Target {
            protocol: Protocol::NvmeTcp,
            name: format!("nqn.v.{epoch}"),
            unit: Uuid::nil(),
            address: ([127, 0, 0, 1], 4420).into(),
            chap: None,
            proves: false,
        },
        ever_written: true,
    }
}

/// A fence, as the home is asked.
pub fn fence_request(epoch: Number, recorded: wire::Recorded) -> FenceRequest {
    FenceRequest {
        volume: volume(),
        epoch: Epoch(epoch.into()),
        recorded: Recorded {
            epoch: Epoch(recorded.epoch.into()),
            ended: recorded.ended,
        },
    }
}

/// An export, as the home is asked.
pub fn export_request(epoch: Number, node: Node) -> ExportRequest {
    ExportRequest {
        volume: volume(),
        epoch: Epoch(epoch.into()),
        node: name(node),
        host: host(node),
        protocol: Protocol::NvmeTcp,
        read_only: false,
    }
}

/// The one volume.
pub fn volume() -> VolumeId {
    "v".parse().expect("a volume's id")
}

fn name(node: Node) -> NodeId {
    NODES[usize::from(node)].parse().expect("a node's name")
}

fn host(node: Node) -> HostIdentity {
    HostIdentity::of(format!("nqn.{}", NODES[usize::from(node)]), Uuid::nil())
}

fn index(node: &NodeId) -> Node {
    let place = NODES.iter().position(|name| *name == node.as_str());
    // The home's own name, where a restore's ticket is held.
    place.map_or(Node::MAX, |place| u8::try_from(place).expect("three nodes"))
}

/// An epoch as a small number.
pub fn number(epoch: Epoch) -> Number {
    u8::try_from(epoch.0).expect("a handful of epochs")
}

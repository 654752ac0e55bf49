//! One state of the whole system, and what can happen to it.

use std::fmt;

use crate::product::{DiskId, Product, RecordId};
use crate::records::OnDisk;
use crate::wire::{Node, Number, Recorded, Replies, Reply, Request, Requests};

/// What the home's process serves, as [`Serving`](drover::home) of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Serving {
    /// Nothing.
    Nothing,
    /// This epoch: its gate is open.
    Open(Number),
    /// This epoch's gate is closed.
    Closing(Number),
    /// This epoch has ended (or was never opened), and the record does not say so yet.
    Ended(Number),
}

/// The call that has the volume's lock at the home.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// None.
    None,
    /// An export that the record says is open, and whose gate is not yet.
    Opening,
    /// A fence that has the closed gate in hand: it records the closing and
    /// waits for the commands inside, in parallel.
    Closing {
        /// The epoch it was asked to end.
        to: Number,
        /// As the request said.
        recorded: Recorded,
    },
}

/// Who waits for a write's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Waits {
    /// Its host.
    Host,
    /// Nobody: the connection that brought it has ended. The gate counts it.
    Gate,
    /// Nobody: its process is dead, and the kernel has it.
    Kernel,
}

/// A write that has passed the gate and not landed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Write {
    /// Whose: 0 is no write at all.
    pub epoch: Number,
    /// The how manieth of its epoch; later ones replace earlier ones' data.
    pub number: u8,
    /// Who waits for it.
    pub waits: Waits,
}

/// No write.
pub const NO_WRITE: Write = Write {
    epoch: 0,
    number: 0,
    waits: Waits::Host,
};

/// What must never happen, noted when it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A write of an older epoch landed after a newer one was opened.
    OlderWrite,
    /// A write landed over a later one that had been acknowledged.
    Undone,
    /// A fence was answered while something of what it ended was still on.
    FalseReceipt,
    /// An export was opened over one that had not ended.
    OpenedOver,
    /// The home's epoch went back.
    EpochBack,
    /// A result of an intent that nobody waits for would have changed something.
    LateResultTaken,
    /// A fence found its gate out of reach: nobody can tell what is inside.
    GateLost,
    /// A home that lost nothing was called an old copy.
    FalseOldCopy,
}

/// The faults that have happened.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Faults(u8);

impl Faults {
    /// Notes one.
    pub fn add(&mut self, fault: Fault) {
        self.0 |= 1 << fault as u8;
    }

    /// Whether it has happened.
    pub fn has(self, fault: Fault) -> bool {
        self.0 & (1 << fault as u8) != 0
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The whole system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    /// The store's record of the volume. What the arbiter's process holds in
    /// memory is the same, since it shows nothing that is not durable.
    pub record: RecordId,
    /// Whether the arbiter's process runs.
    pub up: bool,
    /// The nodes declared lost, in the store.
    pub lost: u8,
    /// An old copy of the store: the record and the lost nodes.
    pub copy: Option<(RecordId, u8)>,
    /// How often the store was put back.
    pub put_back: u8,
    /// Requests of intents that are not pending any more, still under way.
    pub late: Requests,
    /// Answers to the pending intent.
    pub replies: Replies,
    /// The home's record.
    pub disk: DiskId,
    /// Whether the home's process runs.
    pub home_up: bool,
    /// The highest epoch that a fence has named, in its memory.
    pub floor: Number,
    /// What it serves.
    pub serving: Serving,
    /// What it does about epochs.
    pub call: Call,
    /// Whether the open export's host is connected.
    pub connected: bool,
    /// Writes that have passed the gate, in order.
    pub writes: [Write; 2],
    /// The highest epoch that was ever opened.
    pub opened: Number,
    /// How many of its writes were acknowledged.
    pub acknowledged: u8,
    /// A restore writes at the home, within its process's claim.
    pub restoring: bool,
    /// A restore's worker that has outlived the agent that claimed the file for it.
    pub orphan: bool,
    /// What has gone wrong.
    pub faults: Faults,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Publish(Node),
    Unpublish,
    DeclareLost(Node),
    ComeBack(Node),
    SweepLost(Node),
    BackupBegins(Node),
    RestoreBegins,
    TicketEnds,
    Hears(Reply),
    ArbiterDies,
    ArbiterStarts,
    CopyStore,
    PutStoreBack,
    Arrives(Request),
    CallFails,
    OpensGate,
    RecordsClosing,
    RecordsClosed,
    GivesUpWaiting,
    HomeDies,
    HomeStarts,
    Connects,
    Disconnects,
    Writes,
    Lands(u8),
    RestoreEnds,
    OrphanEnds,
}

impl State {
    /// A volume that was made and never published.
    pub fn first(product: &Product) -> Self {
        Self {
            record: product.first_record(),
            up: true,
            lost: 0,
            copy: None,
            put_back: 0,
            late: Requests::default(),
            replies: Replies::default(),
            disk: product.first_disk(),
            home_up: true,
            floor: 0,
            serving: Serving::Nothing,
            call: Call::None,
            connected: false,
            writes: [NO_WRITE; 2],
            opened: 0,
            acknowledged: 0,
            restoring: false,
            orphan: false,
            faults: Faults::default(),
        }
    }

    /// Writes under way.
    pub fn under_way(&self) -> impl Iterator<Item = Write> {
        self.writes.into_iter().filter(|write| write.epoch != 0)
    }

    /// The same state in the one form that stands for all that cannot be told
    /// from it: what can have no effect any more is left out, and of all
    /// renamings of the nodes the least one is taken.
    pub fn canonical(mut self, product: &Product, prune: bool) -> Self {
        self.writes.sort_unstable();
        let disk = product.disk(self.disk);
        let (highest, open) = (disk.highest, disk.open);
        // Below the record's epoch, a floor refuses nothing that the record lets in.
        let closed = open == OnDisk::Closed && self.call == Call::None;
        if self.floor < highest || (self.floor == highest && closed) {
            self.floor = 0;
        }
        if closed && self.under_way().count() == 0 {
            self.acknowledged = 0;
        }
        if prune && self.late != Requests::default() {
            self.late.keep(|request| match request {
                Request::Fence { epoch, .. } => {
                    epoch > highest || (epoch == highest && open != OnDisk::Closed)
                }
                Request::Export { epoch, node } => {
                    epoch > highest || open == OnDisk::Open(epoch, node)
                }
                Request::Restore => true,
            });
            // What the home has recorded it knows itself.
            let reached = Recorded {
                epoch: highest,
                ended: open == OnDisk::Closed,
            };
            self.late.map(|request| match request {
                Request::Fence { epoch, recorded } if recorded <= reached => Request::Fence {
                    epoch,
                    recorded: Recorded::default(),
                },
                other => other,
            });
        }
        self.least(product)
    }

    fn least(self, product: &Product) -> Self {
        let mut least = self;
        let key = |state: &Self| (state.record, state.disk, state.lost, state.copy, state.late);
        for (index, permutation) in product.permutations().iter().enumerate().skip(1) {
            let lost = |lost: u8| {
                permutation
                    .iter()
                    .enumerate()
                    .filter(|(from, _)| lost & (1 << from) != 0)
                    .fold(0, |bits, (_, to)| bits | 1 << to)
            };
            let record = product.renamed(self.record, index);
            if record > least.record {
                continue;
            }
            let renamed = Self {
                record,
                disk: product.renamed_disk(self.disk, index),
                lost: lost(self.lost),
                copy: self
                    .copy
                    .map(|(record, nodes)| (product.renamed(record, index), lost(nodes))),
                late: self.late.renamed(permutation),
                ..self
            };
            if key(&renamed) < key(&least) {
                least = renamed;
            }
        }
        least
    }
}

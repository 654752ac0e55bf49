//! The product's own code, as the model calls it: [`VolumeState::step`] for the
//! arbiter, [`decide`] for the home, over the record types that are on disk.
//!
//! A model's state holds numbers of records instead of records. Each record
//! that ever comes up is kept once, with what the rest of the model asks of it,
//! and each question to the product is asked once and its answer kept: both
//! functions are pure. What is left out of a record before it is numbered is
//! listed at [`rest`], with why nothing depends on it.

use std::collections::BTreeMap;
use std::time::Duration;

use drover::attach::ports::{Content, Protocol};
use drover::attach::record::VolumeSpec;
use drover::attach::state::{Event, Outcome, VolumeState};
use drover::home::decide::{self, ExportMove, FenceMove};
use drover::ids::{ActionId, Bytes, Epoch};
use drover::pool::record::{ExportState, OpenExport, Record};
use uuid::Uuid;

use crate::records::{
    DiskFacts, Facts, NOW, disk_facts, event, event_of, export_request, facts, fence_request,
    number, rest, settlement, volume,
};
use crate::table::{Memo, Table, permutations};
use crate::wire::{Input, Node, Number, Reply, Request};

/// The number of a record of the store.
pub type RecordId = u16;
/// The number of a record of the home.
pub type DiskId = u16;

/// What a home does about a request, by [`decide`].
#[derive(Debug, Clone, Copy)]
pub enum Move {
    /// Answers, and does nothing.
    Answer(Reply),
    /// The fence was done before: answers the same.
    FencedBefore,
    /// The export is open in the record: serves it, if it is not served yet.
    Serve,
    /// Opens it.
    Open {
        /// The record that says so.
        opened: DiskId,
    },
    /// Ends what is open.
    Close {
        /// Its epoch.
        of: Number,
        /// The record while it closes.
        closing: DiskId,
        /// The record when it is closed.
        closed: DiskId,
    },
    /// Nothing is open: takes note of the epoch.
    Note {
        /// The record that says so.
        closed: DiskId,
    },
}

/// What the arbiter's step came to.
#[derive(Debug, Clone, Copy)]
pub struct Stepped {
    /// The record afterwards.
    pub record: RecordId,
    /// Whether the intent that was waited for no longer is.
    pub superseded: bool,
    /// Whether a result of that intent would still change something.
    pub unguarded: bool,
}

/// The product, asked once for each question.
pub struct Product {
    permutations: Vec<Vec<Node>>,
    records: Table<VolumeState, Facts>,
    disks: Table<Record, DiskFacts>,
    steps: Memo<(RecordId, Input), Option<Stepped>>,
    moves: Memo<(DiskId, Number, Request), Move>,
    restores: Memo<(DiskId, bool), DiskId>,
}

impl Product {
    /// For a cluster of this many nodes that may hold the volume.
    pub fn new(nodes: Node) -> Self {
        Self {
            permutations: permutations(nodes),
            records: Table::new(facts),
            disks: Table::new(disk_facts),
            steps: Memo::new(),
            moves: Memo::new(),
            restores: Memo::new(),
        }
    }

    /// How many ways there are to rename the nodes.
    pub fn permutations(&self) -> &[Vec<Node>] {
        &self.permutations
    }

    /// A volume that was made and never published.
    pub fn first_record(&self) -> RecordId {
        let fresh = VolumeState::new(VolumeSpec {
            id: volume(),
            name: "pvc".to_owned(),
            size: Bytes(1 << 20),
            content: Content::Empty,
            protocol: Protocol::NvmeTcp,
            home: "home".parse().expect("a node's name"),
            busy_deadline: Duration::from_secs(120),
            parameters: BTreeMap::new(),
        });
        let created = Event::Result {
            action: ActionId(1),
            epoch: Epoch(0),
            outcome: Outcome::Created,
        };
        let (made, _) = fresh.step(created, NOW).expect("a result is never refused");
        self.records.id(&rest(made), &self.permutations)
    }

    /// The home's record of it.
    pub fn first_disk(&self) -> DiskId {
        let record = Record::new(volume(), false);
        self.disks.id(&record, &self.permutations)
    }

    /// What is asked of a record of the store.
    pub fn facts(&self, id: RecordId) -> &Facts {
        &self.records.get(id).facts
    }

    /// What is asked of a record of the home.
    pub fn disk(&self, id: DiskId) -> &DiskFacts {
        &self.disks.get(id).facts
    }

    /// A record of the store with its nodes renamed.
    pub fn renamed(&self, id: RecordId, permutation: usize) -> RecordId {
        self.records.get(id).renamed[permutation]
    }

    /// A record of the home with its nodes renamed.
    pub fn renamed_disk(&self, id: DiskId, permutation: usize) -> DiskId {
        self.disks.get(id).renamed[permutation]
    }

    /// One step of the arbiter. None: refused, or nothing changes.
    pub fn step(&self, record: RecordId, input: Input) -> Option<Stepped> {
        self.steps.get((record, input), || {
            let before = &self.records.get(record).value;
            let event = event(before, input)?;
            let (next, _) = before.step(event, NOW).ok()?;
            let superseded = before.pending.is_some() && next.pending != before.pending;
            let unguarded = superseded
                && Reply::every().any(|reply| {
                    event_of(before, reply)
                        .and_then(|late| next.step(late, NOW).ok())
                        .is_some_and(|(after, _)| after != next)
                });
            let id = self.records.id(&rest(next), &self.permutations);
            (id != record || superseded).then_some(Stepped {
                record: id,
                superseded,
                unguarded,
            })
        })
    }

    /// What the home decides about a request, when fences have named epochs up to `floor`.
    pub fn decide(&self, disk: DiskId, floor: Number, request: Request) -> Move {
        self.moves.get((disk, floor, request), || {
            let record = &self.disks.get(disk).value;
            match request {
                Request::Fence { epoch, recorded } => {
                    let asked = fence_request(epoch, recorded);
                    match decide::fence(record, &asked) {
                        FenceMove::Refuse(error) => Move::Answer(Reply::of(&error)),
                        FenceMove::Repeat(_) => Move::FencedBefore,
                        FenceMove::Note { highest } => Move::Note {
                            closed: self.closed(record, highest),
                        },
                        FenceMove::Close {
                            export, highest, ..
                        } => {
                            let mut closing = record.clone();
                            closing.highest = highest;
                            closing.export = ExportState::Closing {
                                export: export.clone(),
                                inside: 0,
                            };
                            Move::Close {
                                of: number(export.epoch),
                                closing: self.disks.id(&closing, &self.permutations),
                                closed: self.closed(record, highest),
                            }
                        }
                        FenceMove::Behind { .. } => Move::Answer(Reply::Behind),
                    }
                }
                Request::Export { epoch, node } => {
                    let asked = export_request(epoch, node);
                    match decide::export(record, Epoch(floor.into()), &asked) {
                        ExportMove::Refuse(error) => Move::Answer(Reply::of(&error)),
                        ExportMove::Repeat(_) => Move::Serve,
                        ExportMove::Behind { .. } => Move::Answer(Reply::Behind),
                        ExportMove::Open => {
                            let mut opened = record.clone();
                            opened.highest = asked.epoch;
                            opened.settlement = None;
                            opened.export = ExportState::Open {
                                export: OpenExport {
                                    epoch: asked.epoch,
                                    node: asked.node,
                                    host: asked.host,
                                    protocol: asked.protocol,
                                    name: format!("nqn.v.{epoch}"),
                                    unit: Uuid::nil(),
                                    chap: None,
                                    read_only: asked.read_only,
                                    failed_flush: None,
                                },
                            };
                            Move::Open {
                                opened: self.disks.id(&opened, &self.permutations),
                            }
                        }
                    }
                }
                Request::Restore => unreachable!("a claim is not decided here"),
            }
        })
    }

    /// The home's record while a restore has the file, or when it has ended.
    pub fn restoring(&self, disk: DiskId, restoring: bool) -> DiskId {
        self.restores.get((disk, restoring), || {
            let mut record = self.disks.get(disk).value.clone();
            record.restoring = restoring;
            self.disks.id(&record, &self.permutations)
        })
    }

    fn closed(&self, record: &Record, highest: Epoch) -> DiskId {
        let mut closed = record.clone();
        closed.highest = highest;
        closed.export = ExportState::Closed;
        closed.settlement = Some(settlement(highest));
        self.disks.id(&closed, &self.permutations)
    }
}

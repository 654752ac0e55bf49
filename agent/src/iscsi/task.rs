//! The commands of one session that are not answered yet, and those whose
//! device call has not settled.
//!
//! ```text
//!   taken ─► gathering (unsolicited data comes) ─► hungry (no buffer yet)
//!                 │                                  │
//!                 └──────────► asking (R2T) ◄────────┤
//!                                  └─► working ◄─────┘ ─► freed
//! ```
//!
//! The table has a fixed number of places, so that nothing is allocated per
//! command.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::answers::Ending;
use super::scsi::command::Command;
use super::scsi::opcodes::Kind;
use super::scsi::sense::Sense;
use crate::block::BLOCK;
use crate::reactor::{Buffer, Tag};

/// How a device call ends its command, where that is not plainly good.
pub type Verdict = Arc<OnceLock<Ending>>;

/// Commands that an initiator may have outstanding by their numbers.
pub const WINDOW: u32 = 64;
/// Immediate commands beyond those.
pub const IMMEDIATE: usize = 16;
/// Commands of a session at once.
pub const PLACES: usize = WINDOW as usize + IMMEDIATE;

/// Bytes of a block, in the type that transfers are counted in.
pub const BLOCK_BYTES: u32 = 4096;
const _: () = assert!(BLOCK_BYTES as u64 == BLOCK);

/// Where a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Unsolicited data is still to come.
    Gathering,
    /// There is no buffer for its data yet.
    Hungry,
    /// The initiator was asked for data.
    Asking,
    /// The device has it.
    Working,
}

/// One sequence of data PDUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sequence {
    /// Where the next PDU's data begins.
    pub next: u32,
    /// Where the sequence ends at the latest.
    pub end: u32,
    /// The next PDU's number.
    pub number: u32,
}

/// A task.
pub struct Task {
    /// The initiator's tag.
    pub tag: u32,
    /// The command's LUN field.
    pub lun: u64,
    /// Whether it has a number of its own, which makes room when it is freed.
    pub numbered: bool,
    /// What it is.
    pub kind: Kind,
    /// Its parameters.
    pub command: Command,
    /// Its CDB.
    pub cdb: [u8; 16],
    /// Bytes that the initiator expects to transfer.
    pub expected: u32,
    /// Whether it expects to read them.
    pub reads: bool,
    /// Bytes that the command itself would transfer.
    pub natural: u64,
    /// Bytes that are transferred: of data that it sends, or that it reads.
    pub wanted: u32,
    /// Where it is.
    pub stage: Stage,
    /// Its data, on the budget.
    pub data: Option<Buffer>,
    /// Whether it has such a buffer, though that may be elsewhere just now.
    pub on_budget: bool,
    /// Unsolicited data that came before there was a buffer.
    pub staged: Option<Buffer>,
    /// Data that has come, from the start on.
    pub came: u32,
    /// Data that the device has dealt with, or that was read and sent.
    pub dealt: u32,
    /// The sequence of data PDUs that is under way.
    pub sequence: Sequence,
    /// Data-In and R2T PDUs so far.
    pub sent: u32,
    /// When data was asked for.
    pub asked: Instant,
    /// How it ends when the sequence that broke the rules is over.
    pub given_up: Option<Sense>,
    /// It is to end without an answer.
    pub aborted: bool,
    /// It was answered before the device had settled it.
    pub answered: bool,
    /// What the device call has come to; good, if nothing is in it.
    pub verdict: Option<Verdict>,
}

/// Data goes to the device, and comes from it, in parts of at most this length.
const SEGMENT: u32 = 256 << 10;

impl Task {
    /// Where its data is put.
    pub fn place(&mut self) -> &mut Option<Buffer> {
        if self.on_budget {
            &mut self.data
        } else {
            &mut self.staged
        }
    }

    /// The part that is dealt with now, in bytes.
    pub fn segment(&self) -> u32 {
        let left = self.wanted - self.dealt.min(self.wanted);
        let parts = matches!(self.command, Command::Read { .. }) || self.command.in_parts();
        if parts { left.min(SEGMENT) } else { left }
    }

    /// Bytes of the buffer that it needs for that: whole blocks for a read.
    pub fn buffer_length(&self) -> usize {
        match self.command {
            Command::Read { .. } => self.segment().next_multiple_of(BLOCK_BYTES) as usize,
            command if command.data_out() > 0 => self.segment() as usize,
            _ => 0,
        }
    }
}

/// A task's place in the table, for as long as the task is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    place: u16,
    turn: u32,
}

impl Slot {
    /// What the device's outcome comes back with.
    pub fn tag(self) -> Tag {
        Tag(u64::from(self.turn) << 16 | u64::from(self.place))
    }

    /// The slot of an outcome.
    pub fn of_tag(tag: Tag) -> Self {
        let [.., a, b, c, d, high, low] = tag.0.to_be_bytes();
        Self {
            place: u16::from_be_bytes([high, low]),
            turn: u32::from_be_bytes([a, b, c, d]),
        }
    }

    /// What the initiator's answer to an R2T comes back with. The place is
    /// never so high that this is no tag.
    pub fn transfer(self) -> u32 {
        self.turn << 16 | u32::from(self.place)
    }
}

#[derive(Default)]
struct Place {
    turn: u32,
    task: Option<Task>,
}

/// A session's tasks.
pub struct Tasks {
    places: Vec<Place>,
    free: Vec<u16>,
    immediate: usize,
}

impl Tasks {
    /// No tasks.
    pub fn new() -> Self {
        let mut places = Vec::new();
        places.resize_with(PLACES, Place::default);
        let free = (0..PLACES)
            .rev()
            .filter_map(|place| u16::try_from(place).ok());
        Self {
            places,
            free: free.collect(),
            immediate: 0,
        }
    }

    /// Whether one more task has room.
    pub fn has_room(&self, numbered: bool) -> bool {
        !self.free.is_empty() && (numbered || self.immediate < IMMEDIATE)
    }

    /// Takes a task in; none when there is no room.
    pub fn insert(&mut self, task: Task) -> Option<Slot> {
        if !self.has_room(task.numbered) {
            return None;
        }
        let index = self.free.pop()?;
        self.immediate += usize::from(!task.numbered);
        let place = &mut self.places[usize::from(index)];
        place.turn = place.turn.wrapping_add(1);
        place.task = Some(task);
        Some(Slot {
            place: index,
            turn: place.turn,
        })
    }

    /// The task in a slot, if it is there still.
    pub fn get(&mut self, slot: Slot) -> Option<&mut Task> {
        let place = self.places.get_mut(usize::from(slot.place))?;
        if place.turn == slot.turn {
            place.task.as_mut()
        } else {
            None
        }
    }

    /// Takes a task out.
    pub fn remove(&mut self, slot: Slot) -> Option<Task> {
        self.get(slot)?;
        let task = self.places[usize::from(slot.place)].task.take()?;
        self.immediate -= usize::from(!task.numbered);
        self.free.push(slot.place);
        Some(task)
    }

    /// The slots of all tasks.
    pub fn slots(&self) -> impl Iterator<Item = (Slot, &Task)> {
        let places = self.places.iter().enumerate();
        places.filter_map(|(index, place)| {
            let slot = Slot {
                place: u16::try_from(index).ok()?,
                turn: place.turn,
            };
            Some((slot, place.task.as_ref()?))
        })
    }

    /// The slot of the task with this tag that is not answered yet.
    pub fn find(&self, tag: u32) -> Option<Slot> {
        let mut slots = self.slots();
        let found = slots.find(|(_, task)| task.tag == tag && !task.answered);
        found.map(|(slot, _)| slot)
    }

    /// The slot that a transfer tag names, if its task has this tag.
    pub fn of_transfer(&mut self, transfer: u32, tag: u32) -> Option<Slot> {
        let [_, _, high, low] = transfer.to_be_bytes();
        let index = u16::from_be_bytes([high, low]);
        let turn = self.places.get(usize::from(index))?.turn;
        let slot = Slot { place: index, turn };
        let task = self.get(slot)?;
        (slot.transfer() == transfer && task.tag == tag).then_some(slot)
    }
}

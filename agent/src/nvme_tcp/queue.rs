//! One connection's queue pair: which commands are outstanding, what each of
//! them waits for, and how it is answered.
//!
//! ```text
//!            ┌─► waiting for room ─┐
//!   begun ───┼─────────────────────┼─► asked (R2T) ─┐
//!            └─────────────────────┴────────────────┴─► inside ─► answered
//! ```
//!
//! A command has a slot of a table that is as long as the queue is deep, so
//! nothing is allocated for one. An operation's tag and a transfer's tag name
//! the slot; a slot that was answered ahead of its operation's end (by a fence)
//! counts on, and that end finds nobody.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::command::Entry;
use super::io::Task;
use super::metrics::Metrics;
use super::status::Status;
use super::wire::{
    self, Completion, Data, Digests, FLAG_LAST, FLAG_SUCCESS, Flaw, Kind, Malformed, Short,
};
use crate::reactor::{Buffer, Link, Tag};

/// A host that was asked for data and has not sent all of it is gone.
pub const DATA_STALLED: Duration = Duration::from_secs(60);

/// How a connection is used, from its Connect on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The queue id; 0 is the admin queue.
    pub id: u16,
    /// Entries of the queue.
    pub depth: u16,
    /// The digests in use.
    pub digests: Digests,
    /// Whether the host does without submission queue flow control.
    pub no_flow_control: bool,
}

/// What a command is to do.
#[derive(Debug, Clone, Copy)]
pub enum Work {
    /// An I/O command.
    Io(Task),
    /// Any other, by its entry.
    Other(Entry),
}

/// A command's slot in the table.
pub type Index = u16;

/// What a command waits for.
enum Stage {
    Free,
    /// Memory for its data. The data that came with it, if it did.
    Room {
        work: Work,
        capsule: Option<Buffer>,
    },
    /// Data that the host was asked for.
    Asked(Transfer),
    /// An operation's end, or an event.
    Inside(Work),
}

struct Transfer {
    work: Work,
    /// Away while the connection receives into it.
    buffer: Option<Buffer>,
    length: usize,
    filled: usize,
    damaged: bool,
    since: Instant,
}

struct Slot {
    command: u16,
    opcode: u8,
    generation: u32,
    stage: Stage,
}

/// Data that has come in whole.
pub struct Whole {
    /// What it is for.
    pub work: Work,
    /// The data, and the scratch behind it.
    pub buffer: Buffer,
    /// Its length.
    pub length: usize,
    /// Whether every digest matched.
    pub sound: bool,
}

/// One connection's queue pair.
pub struct Queue {
    shape: Shape,
    metrics: Metrics,
    slots: Box<[Slot]>,
    free: Vec<Index>,
    /// A bit for each command identifier: whether it is outstanding.
    used: Box<[u64; 1024]>,
    waiting: VecDeque<(Index, u32)>,
    head: u16,
    /// No transfer is overdue before this; none when nothing was asked for.
    due: Option<Instant>,
    asked: usize,
}

impl Queue {
    /// A queue pair whose Connect was answered.
    pub fn new(shape: Shape, metrics: Metrics) -> Self {
        let slot = |_| Slot {
            command: 0,
            opcode: 0,
            generation: 0,
            stage: Stage::Free,
        };
        Self {
            shape,
            metrics,
            slots: (0..shape.depth).map(slot).collect(),
            free: (0..shape.depth).rev().collect(),
            used: bytemuck::zeroed_box(),
            waiting: VecDeque::with_capacity(shape.depth.into()),
            // The Connect was its first entry.
            head: 1 % shape.depth,
            due: None,
            asked: 0,
        }
    }

    /// How the connection is used.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Takes a command in. None: its identifier is in use (and is answered so).
    ///
    /// # Errors
    /// More commands than the queue has entries.
    pub fn begin(
        &mut self,
        command: u16,
        opcode: u8,
        link: &mut Link,
    ) -> Result<Option<Index>, Malformed> {
        if self.free.is_empty() {
            return Err(Flaw::Sequence.at(wire::COMMON as u32));
        }
        self.head = (self.head + 1) % self.shape.depth;
        let (word, bit) = place(command);
        if self.used[word] & bit != 0 {
            let status = Status::COMMAND_ID_CONFLICT;
            link.send(&self.response(command, 0, status));
            self.metrics.command(self.shape.id == 0, opcode, status);
            return Ok(None);
        }
        let index = self.free.pop();
        if let Some(index) = index {
            self.used[word] |= bit;
            let slot = &mut self.slots[usize::from(index)];
            (slot.command, slot.opcode) = (command, opcode);
        }
        Ok(index)
    }

    /// Answers a command.
    pub fn answer(&mut self, index: Index, result: u64, status: Status, link: &mut Link) {
        let (command, opcode) = self.release(index);
        link.send(&self.response(command, result, status));
        self.metrics.command(self.shape.id == 0, opcode, status);
    }

    /// Answers a command without counting it.
    pub fn answer_uncounted(&mut self, index: Index, link: &mut Link) {
        let (command, _) = self.release(index);
        link.send(&self.response(command, 0, Status::SUCCESS));
    }

    /// Answers a command with the buffer's bytes as data, and success; its
    /// caller counts it.
    pub fn answer_data(&mut self, index: Index, buffer: Buffer, link: &mut Link) {
        let digests = self.shape.digests;
        let length = buffer.len();
        let (command, _) = self.release(index);
        let flow_control = !self.shape.no_flow_control;
        let flags = FLAG_LAST | if flow_control { 0 } else { FLAG_SUCCESS };
        let digest = digests.data.then(|| crc32c::crc32c(&buffer));
        let size = u32::try_from(length).expect("checked against MDTS");
        let header = Data {
            command,
            tag: 0,
            offset: 0,
            length: size,
        };
        let common = wire::common(Kind::C2HData, flags, digests, size);
        link.send(&Short::sealed(header.encode(common), digests));
        link.send_buffer(buffer, 0..length);
        if let Some(digest) = digest {
            link.send(&digest.to_le_bytes());
        }
        if flow_control {
            link.send(&self.response(command, 0, Status::SUCCESS));
        }
    }

    /// Puts a command behind those that wait for memory.
    pub fn wait(&mut self, index: Index, work: Work, capsule: Option<Buffer>) {
        let slot = &mut self.slots[usize::from(index)];
        slot.stage = Stage::Room { work, capsule };
        self.waiting.push_back((index, slot.generation));
    }

    /// Whether any command waits for memory: a new one waits behind it.
    pub fn anyone_waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The command that has waited longest for memory: what it is to do, and
    /// whether its data came with it.
    pub fn longest_waiting(&mut self) -> Option<(Index, Work, bool)> {
        while let Some((index, generation)) = self.waiting.front() {
            let slot = &self.slots[usize::from(*index)];
            if let Stage::Room { work, capsule } = &slot.stage
                && slot.generation == *generation
            {
                return Some((*index, *work, capsule.is_some()));
            }
            // Answered meanwhile.
            self.waiting.pop_front();
        }
        None
    }

    /// The command that has waited longest waits no more; the data that came with it.
    pub fn served(&mut self) -> Option<Buffer> {
        let (index, _) = self.waiting.pop_front()?;
        let slot = &mut self.slots[usize::from(index)];
        match std::mem::replace(&mut slot.stage, Stage::Free) {
            Stage::Room { capsule, .. } => capsule,
            Stage::Free | Stage::Asked(_) | Stage::Inside(_) => None,
        }
    }

    /// Asks the host for `length` bytes of a command's data, which go to the
    /// beginning of `buffer`.
    pub fn ask(&mut self, index: Index, work: Work, buffer: Buffer, length: u32, link: &mut Link) {
        let slot = &mut self.slots[usize::from(index)];
        slot.stage = Stage::Asked(Transfer {
            work,
            buffer: Some(buffer),
            length: length as usize,
            filled: 0,
            damaged: false,
            since: link.now(),
        });
        self.asked += 1;
        self.due.get_or_insert(link.now() + DATA_STALLED);
        let header = Data {
            command: slot.command,
            tag: index,
            offset: 0,
            length,
        };
        let digests = self.shape.digests;
        let common = wire::common(Kind::R2T, 0, digests, 0);
        link.send(&Short::sealed(header.encode(common), digests));
    }

    /// Where the data of an H2CData PDU goes. The buffer comes back by
    /// [`Self::received`].
    ///
    /// # Errors
    /// Data that was not asked for, out of order, or beyond what was asked for.
    pub fn transfer(
        &mut self,
        data: Data,
        length: usize,
        last: bool,
    ) -> Result<(Buffer, Range<usize>), Malformed> {
        let slot = self.slots.get_mut(usize::from(data.tag));
        let slot = slot.ok_or(Flaw::HeaderField.at(10))?;
        let Stage::Asked(transfer) = &mut slot.stage else {
            return Err(Flaw::HeaderField.at(10));
        };
        if data.command != slot.command {
            return Err(Flaw::HeaderField.at(8));
        }
        if data.length as usize != length {
            return Err(Flaw::HeaderField.at(16));
        }
        if data.offset as usize != transfer.filled {
            return Err(Flaw::OutOfRange.at(12));
        }
        let left = transfer.length - transfer.filled;
        if length > left {
            return Err(Flaw::OutOfRange.at(16));
        }
        if last != (length == left) {
            return Err(Flaw::HeaderField.at(1));
        }
        let at = transfer.filled..transfer.filled + length;
        // Only ever away between this and `received`, with nothing between them.
        let buffer = transfer.buffer.take().ok_or(Flaw::Sequence.at(0))?;
        Ok((buffer, at))
    }

    /// `length` more bytes have come; `sound` is whether their digest matched.
    /// All of the data, when it is all here.
    pub fn received(
        &mut self,
        index: Index,
        buffer: Buffer,
        length: usize,
        sound: bool,
    ) -> Option<Whole> {
        let slot = self.slots.get_mut(usize::from(index))?;
        let Stage::Asked(transfer) = &mut slot.stage else {
            return None;
        };
        transfer.filled += length;
        transfer.damaged |= !sound;
        if transfer.filled < transfer.length {
            transfer.buffer = Some(buffer);
            return None;
        }
        let whole = Whole {
            work: transfer.work,
            buffer,
            length: transfer.length,
            sound: !transfer.damaged,
        };
        slot.stage = Stage::Inside(whole.work);
        self.answered_asking();
        Some(whole)
    }

    /// A command is being done; its operation's tag.
    pub fn inside(&mut self, index: Index, work: Work) -> Tag {
        let slot = &mut self.slots[usize::from(index)];
        slot.stage = Stage::Inside(work);
        Tag(u64::from(slot.generation) << 16 | u64::from(index))
    }

    /// The command that an operation was for. None: it was answered meanwhile.
    pub fn ended(&self, tag: Tag) -> Option<(Index, Work)> {
        let index = Index::try_from(tag.0 & 0xffff).ok()?;
        let slot = self.slots.get(usize::from(index))?;
        match &slot.stage {
            Stage::Inside(work) if u64::from(slot.generation) == tag.0 >> 16 => {
                Some((index, *work))
            }
            _ => None,
        }
    }

    /// The slot of the command with this identifier.
    pub fn find(&self, command: u16) -> Option<Index> {
        let outstanding =
            |slot: &Slot| slot.command == command && !matches!(slot.stage, Stage::Free);
        let at = self.slots.iter().position(outstanding)?;
        Index::try_from(at).ok()
    }

    /// Answers every command with `status`, but not one whose host is sending
    /// data: it would use the memory of a request that has ended.
    pub fn answer_all(&mut self, status: Status, link: &mut Link) {
        for index in 0..self.shape.depth {
            match self.slots[usize::from(index)].stage {
                Stage::Free | Stage::Asked(_) => {}
                Stage::Room { .. } | Stage::Inside(_) => self.answer(index, 0, status, link),
            }
        }
    }

    /// When to look whether data that was asked for is overdue.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether a host has not sent in time what it was asked for.
    pub fn overdue(&mut self, now: Instant) -> bool {
        if self.due.is_none_or(|due| now < due) {
            return false;
        }
        let since = self.slots.iter().filter_map(|slot| match &slot.stage {
            Stage::Asked(transfer) => Some(transfer.since),
            Stage::Free | Stage::Room { .. } | Stage::Inside(_) => None,
        });
        self.due = since.min().map(|since| since + DATA_STALLED);
        self.due.is_some_and(|due| due <= now)
    }

    fn answered_asking(&mut self) {
        self.asked -= 1;
        if self.asked == 0 {
            self.due = None;
        }
    }

    /// Frees a slot: the command's identifier and opcode.
    fn release(&mut self, index: Index) -> (u16, u8) {
        let slot = &mut self.slots[usize::from(index)];
        slot.stage = Stage::Free;
        slot.generation = slot.generation.wrapping_add(1);
        let (command, opcode) = (slot.command, slot.opcode);
        let (word, bit) = place(command);
        self.used[word] &= !bit;
        self.free.push(index);
        (command, opcode)
    }

    fn response(&self, command: u16, result: u64, status: Status) -> Short {
        let flow_control = !self.shape.no_flow_control;
        Completion {
            result,
            sq_head: if flow_control { self.head } else { 0 },
            command,
            status: status.0,
        }
        .encode(self.shape.digests)
    }
}

/// Where a command identifier's bit is.
fn place(command: u16) -> (usize, u64) {
    (usize::from(command >> 6), 1 << (command & 63))
}

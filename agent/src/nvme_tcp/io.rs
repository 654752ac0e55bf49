//! The I/O commands of a connection: what they need, whether they may, and
//! their beginning on the device.

use super::command::{Entry, Io, Place};
use super::perform;
use super::queue::{Index, Work};
use super::serving::{Serving, recycle};
use super::status::Status;
use crate::reactor::link::Passes;
use crate::reactor::{Buffer, Link, Operation, Outcome};

/// An I/O command, and where its data is.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    /// What is done.
    pub io: Io,
    /// Where the data is that the host sends with it, and how long.
    pub incoming: Option<(Place, u32)>,
    /// Bytes that the host gets.
    pub outgoing: u32,
}

impl Task {
    /// Bytes of the connection's memory that it needs.
    pub fn room(&self) -> u32 {
        match (self.incoming, self.io.scratch()) {
            (Some((Place::Capsule, _)), 0) => 0,
            (Some((_, length)), scratch) => length + scratch,
            (None, scratch) => self.outgoing + scratch,
        }
    }
}

impl Serving {
    /// An I/O command.
    pub(super) fn io(
        &mut self,
        index: Index,
        entry: &Entry,
        capsule: Option<Buffer>,
        link: &mut Link,
    ) -> Result<(), Status> {
        let task = match self.decode(entry, capsule.as_ref()) {
            Ok(task) => task,
            Err(status) => {
                recycle(capsule, link);
                return Err(status);
            }
        };
        match task.room() {
            0 => self.start(index, task, capsule, link),
            length => self.in_turn(index, Work::Io(task), length, capsule, link),
        }
    }

    fn decode(&self, entry: &Entry, capsule: Option<&Buffer>) -> Result<Task, Status> {
        self.usable()?;
        let mut io = Io::decode(entry, self.subsystem.read_only())?;
        if !self.controller.write_cache() {
            io = io.durable();
        }
        let task = Task {
            io,
            incoming: io.incoming(entry)?,
            outgoing: io.outgoing(entry)?,
        };
        // What a capsule brings is what its command takes, no less and no more.
        let takes = match task.incoming {
            Some((Place::Capsule, length)) => length as usize,
            _ => 0,
        };
        if capsule.map_or(0, |data| data.len()) != takes {
            return Err(Status::DATA_SGL_LENGTH_INVALID);
        }
        Ok(task)
    }

    /// Refuses an I/O command that came too late, ahead of all other checks, or too early.
    pub(super) fn usable(&self) -> Result<(), Status> {
        self.late()?;
        if self.controller.enabled() {
            Ok(())
        } else {
            Err(Status::COMMAND_SEQUENCE_ERROR)
        }
    }

    /// Begins a command whose data and memory are all here.
    pub(super) fn start(
        &mut self,
        index: Index,
        task: Task,
        buffer: Option<Buffer>,
        link: &mut Link,
    ) -> Result<(), Status> {
        let device = self.subsystem.device();
        let length = task.incoming.map_or(0, |(_, length)| length) as usize;
        let data = buffer.as_ref().and_then(|buffer| buffer.get(..length));
        let fits = perform::check(task.io, data.unwrap_or_default(), device.size());
        // Ahead of the gates: who is preempted has its gate closed behind this.
        let barred = self.subsystem.bars(task.io.needs_write());
        let let_in = if barred {
            Err(Status::RESERVATION_CONFLICT)
        } else {
            fits
        };
        let passes = match let_in.and_then(|()| self.enter()) {
            Ok(Some(passes)) => passes,
            Ok(None) => {
                recycle(buffer, link);
                return Ok(());
            }
            Err(status) => {
                recycle(buffer, link);
                return Err(status);
            }
        };
        if task.io.writes() {
            self.subsystem.note_write();
        }
        let tag = self.queue.inside(index, Work::Io(task));
        let operation = match (task.io, buffer) {
            (Io::Read { lba, fua: true, .. }, Some(buffer)) => Operation::read_durable(lba, buffer),
            (Io::Read { lba, .. }, Some(buffer)) => Operation::Read { lba, buffer },
            (Io::Write { lba, fua, .. }, Some(buffer)) => Operation::Write { lba, buffer, fua },
            (Io::Flush, _) => Operation::Flush,
            (io, mut buffer) => Operation::Call(Box::new(move |device| {
                let all = buffer.as_deref_mut().unwrap_or_default();
                let (data, scratch) = all.split_at_mut(length);
                let result = perform::perform(io, device, data, scratch);
                Outcome { buffer, result }
            })),
        };
        link.begin(tag, self.subsystem.device(), operation, passes);
        Ok(())
    }

    /// Lets a command through the export's gate and the association's. None:
    /// the association has ended, and so will this connection, which says so.
    ///
    /// # Errors
    /// The export has ended, or the controller was disabled.
    pub(super) fn enter(&self) -> Result<Option<Passes>, Status> {
        let Some(export) = self.subsystem.gate().enter() else {
            self.metrics.late();
            return Err(Status::RESERVATION_CONFLICT);
        };
        match self.controller.gate().enter() {
            Some(association) => Ok(Some([Some(export), Some(association), None])),
            None => self.shut().map_or(Ok(None), Err),
        }
    }

    /// How a command is answered that a closed gate keeps out. None: not at
    /// all, since the association has ended.
    pub(super) fn shut(&self) -> Option<Status> {
        if self.subsystem.gate().is_closed() {
            Some(Status::RESERVATION_CONFLICT)
        } else {
            (!self.controller.has_ended()).then_some(Status::COMMAND_SEQUENCE_ERROR)
        }
    }

    /// Refuses a command, as late, when its export's gate is closed already.
    pub(super) fn late(&self) -> Result<(), Status> {
        if self.subsystem.gate().is_closed() {
            // Closed for good, so this refuses, and counts that.
            self.enter().map(drop)?;
        }
        Ok(())
    }
}

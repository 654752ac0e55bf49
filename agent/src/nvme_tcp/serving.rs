//! A connection that has passed Connect: its commands, from their arrival to
//! their answers.
//!
//! A command that needs memory for its data takes it from the connection's
//! budget, or waits behind those that wait already; what comes behind it on
//! the stream is taken in all the same, since it may be the data that another
//! waits for. Both gates are entered when all of a command's data is here: a
//! gate waits for the disk, never for a host that does not send.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::admin::{self, Reply};
use super::command::{Entry, FABRICS, Io, MAX_TRANSFER, Place};
use super::connection::Capsule;
use super::controller::Controller;
use super::metrics::{Counting, Hot, Metrics};
use super::perform;
use super::queue::{Index, Queue, Shape, Work};
use super::status::Status;
use super::subsystem::{Counted, Subsystem};
use super::wire::{Data, Malformed};
use crate::block::gate::Pass;
use crate::reactor::{Buffer, End, Failed, Link, Operation, Outcome, Tag};

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
    fn room(&self) -> u32 {
        match (self.incoming, self.io.scratch()) {
            (Some((Place::Capsule, _)), 0) => 0,
            (Some((_, length)), scratch) => length + scratch,
            (None, scratch) => self.outgoing + scratch,
        }
    }
}

/// A connection that has passed Connect.
pub struct Serving {
    controller: Arc<Controller>,
    subsystem: Arc<Subsystem>,
    queue: Queue,
    metrics: Metrics,
    hot: Hot,
    /// Whether outstanding commands were answered because the namespace is gone.
    told: bool,
    _connection: Counted,
    _association: Option<Counting>,
}

impl Serving {
    /// A connection of `controller`, from now on.
    pub fn new(
        controller: Arc<Controller>,
        shape: Shape,
        metrics: Metrics,
        link: &mut Link,
    ) -> Self {
        controller.attach(link.waker());
        let subsystem = Arc::clone(controller.subsystem());
        Self {
            queue: Queue::new(shape, metrics.clone()),
            hot: metrics.hot(),
            told: false,
            _connection: subsystem.count(),
            _association: (shape.id == 0).then(|| metrics.association()),
            metrics,
            controller,
            subsystem,
        }
    }

    /// A command has come, with its data if that was in its capsule.
    pub fn command(
        &mut self,
        entry: Entry,
        capsule: Option<Capsule>,
        link: &mut Link,
    ) -> Result<Result<(), Malformed>, End> {
        self.controller.heard(link.now());
        let begun = self.queue.begin(entry.command(), entry.opcode(), link);
        let sound = capsule.as_ref().is_none_or(|capsule| capsule.sound);
        let capsule = capsule.map(|capsule| capsule.buffer);
        let index = match begun {
            Ok(Some(index)) => index,
            refused => {
                recycle(capsule, link);
                return Ok(refused.map(|_| ()));
            }
        };
        let taken = if !sound {
            recycle(capsule, link);
            Err(Status::TRANSIENT_TRANSPORT_ERROR)
        } else if self.queue.shape().id == 0 || entry.opcode() == FABRICS {
            self.other(index, entry, capsule, link)
        } else {
            self.io(index, &entry, capsule, link)
        };
        if let Err(status) = taken {
            self.queue.answer(index, 0, status, link);
        }
        Ok(Ok(()))
    }

    /// Where an H2CData PDU's data goes.
    ///
    /// # Errors
    /// Data that was not asked for so.
    pub fn transfer(
        &mut self,
        data: Data,
        length: usize,
        last: bool,
    ) -> Result<(Buffer, Range<usize>), Malformed> {
        self.queue.transfer(data, length, last)
    }

    /// An H2CData PDU's data has come.
    pub fn received(
        &mut self,
        index: Index,
        buffer: Buffer,
        length: usize,
        sound: bool,
        link: &mut Link,
    ) -> Result<(), End> {
        self.controller.heard(link.now());
        let Some(whole) = self.queue.received(index, buffer, length, sound) else {
            return Ok(());
        };
        let taken = if !whole.sound {
            link.recycle(whole.buffer);
            Err(Status::TRANSIENT_TRANSPORT_ERROR)
        } else {
            match whole.work {
                Work::Io(task) => self.start(index, task, Some(whole.buffer), link),
                Work::Other(entry) => self.administer(index, &entry, Some(whole.buffer), link),
            }
        };
        if let Err(status) = taken {
            self.queue.answer(index, 0, status, link);
        }
        Ok(())
    }

    /// An operation has ended.
    pub fn done(&mut self, tag: Tag, outcome: Outcome, link: &mut Link) -> Result<(), End> {
        let Some((index, work)) = self.queue.ended(tag) else {
            recycle(outcome.buffer, link);
            return Ok(());
        };
        if let Err(failed) = &outcome.result {
            let status = self.failed(&work, failed);
            recycle(outcome.buffer, link);
            self.queue.answer(index, 0, status, link);
            return Ok(());
        }
        match (work, outcome.buffer) {
            (
                Work::Io(Task {
                    io: Io::Read { .. },
                    ..
                }),
                Some(buffer),
            ) => {
                self.hot.read(buffer.len());
                self.queue.answer_data(index, buffer, link);
            }
            (
                Work::Io(Task {
                    io: Io::Write { .. },
                    ..
                }),
                Some(buffer),
            ) => {
                self.hot.wrote(buffer.len());
                link.recycle(buffer);
                self.queue.answer_uncounted(index, link);
            }
            (_, buffer) => {
                recycle(buffer, link);
                self.queue.answer(index, 0, Status::SUCCESS, link);
            }
        }
        Ok(())
    }

    fn failed(&self, work: &Work, failed: &Failed) -> Status {
        let (status, command) = match (work, failed) {
            (_, Failed::Miscompare { .. }) => return Status::COMPARE_FAILURE,
            (Work::Io(task), Failed::Device(error)) if task.io.writes() || task.io == Io::Flush => {
                (Status::of_write(error), Some(task.io))
            }
            (Work::Io(task), Failed::Device(error)) => (Status::of_read(error), Some(task.io)),
            (Work::Other(_), Failed::Device(error)) => (Status::of_write(error), None),
            (_, Failed::Other(_)) => (Status::INTERNAL_ERROR, None),
        };
        tracing::warn!(
            subsystem = self.subsystem.nqn(), ?command, error = %failed,
            "a host's command was not done"
        );
        status
    }

    /// Looks at what has happened outside of the connection.
    pub fn woken(&mut self, link: &mut Link) -> Result<(), End> {
        if self.controller.has_ended() {
            return Err(End::Protocol("the association has ended"));
        }
        let admin = self.queue.shape().id == 0;
        if !admin && !self.told && self.subsystem.is_gone() {
            self.told = true;
            self.queue.answer_all(Status::RESERVATION_CONFLICT, link);
        }
        if admin {
            self.deliver(link);
            if self.controller.is_silent(link.now()) {
                tracing::warn!(
                    subsystem = self.subsystem.nqn(),
                    controller = self.controller.id(),
                    "the host was silent beyond its keep-alive timeout"
                );
                return Err(End::Late("keep alive"));
            }
        }
        if self.queue.overdue(link.now()) {
            tracing::warn!(
                subsystem = self.subsystem.nqn(),
                "a host did not send the data it was asked for"
            );
            self.controller.end();
            return Err(End::Late("the data that the host was asked for"));
        }
        self.make_room(link);
        Ok(())
    }

    /// When it is to be woken.
    pub fn deadline(&self) -> Option<Instant> {
        let alive = (self.queue.shape().id == 0)
            .then(|| self.controller.silent_at())
            .flatten();
        [self.queue.due(), alive].into_iter().flatten().min()
    }

    /// The connection has ended.
    pub fn ended(&self) {
        if self.queue.shape().id == 0 {
            self.controller.end();
        }
    }

    fn deliver(&mut self, link: &mut Link) {
        while let Some((command, result)) = self.controller.take_event() {
            if let Some(index) = self.queue.find(command) {
                self.queue
                    .answer(index, result.into(), Status::SUCCESS, link);
            }
        }
    }

    /// Lets commands that wait for memory go on, in their order, as far as there is some.
    fn make_room(&mut self, link: &mut Link) {
        while let Some((index, work, _)) = self.queue.longest_waiting() {
            let length = match &work {
                Work::Io(task) => task.room(),
                Work::Other(entry) => transfer_of(entry).map_or(0, |(_, length)| length),
            };
            let Some(buffer) = link.buffer(length as usize) else {
                return;
            };
            let capsule = self.queue.served();
            if let Err(status) = self.with_room(index, work, buffer, capsule, link) {
                self.queue.answer(index, 0, status, link);
            }
        }
    }

    /// Goes on with a command as soon as it has memory.
    fn in_turn(
        &mut self,
        index: Index,
        work: Work,
        length: u32,
        capsule: Option<Buffer>,
        link: &mut Link,
    ) -> Result<(), Status> {
        let buffer = if self.queue.anyone_waits() {
            None
        } else {
            link.buffer(length as usize)
        };
        match buffer {
            Some(buffer) => self.with_room(index, work, buffer, capsule, link),
            None => {
                self.queue.wait(index, work, capsule);
                Ok(())
            }
        }
    }

    fn with_room(
        &mut self,
        index: Index,
        work: Work,
        mut buffer: Buffer,
        capsule: Option<Buffer>,
        link: &mut Link,
    ) -> Result<(), Status> {
        match work {
            Work::Io(task) => match (task.incoming, capsule) {
                (Some((Place::Host, length)), _) => {
                    self.late()?;
                    self.queue.ask(index, work, buffer, length, link);
                    Ok(())
                }
                (_, Some(capsule)) => {
                    buffer[..capsule.len()].copy_from_slice(&capsule);
                    link.recycle(capsule);
                    self.start(index, task, Some(buffer), link)
                }
                (_, None) => self.start(index, task, Some(buffer), link),
            },
            Work::Other(entry) => match transfer_of(&entry) {
                Some((true, length)) => {
                    self.queue.ask(index, work, buffer, length, link);
                    Ok(())
                }
                _ => self.administer(index, &entry, Some(buffer), link),
            },
        }
    }

    /// An admin or fabrics command.
    fn other(
        &mut self,
        index: Index,
        entry: Entry,
        capsule: Option<Buffer>,
        link: &mut Link,
    ) -> Result<(), Status> {
        match transfer_of(&entry) {
            Some((_, length)) if length > MAX_TRANSFER => Err(Status::INVALID_FIELD),
            Some((_, length)) => self.in_turn(index, Work::Other(entry), length, capsule, link),
            None => self.administer(index, &entry, capsule, link),
        }
    }

    /// Does an admin or fabrics command; the buffer has what the host sent
    /// with it, or takes what it gets.
    fn administer(
        &mut self,
        index: Index,
        entry: &Entry,
        buffer: Option<Buffer>,
        link: &mut Link,
    ) -> Result<(), Status> {
        let data = buffer.as_deref().unwrap_or_default();
        let reply = admin::handle(&self.controller, self.queue.shape().id, entry, data);
        let reply = match reply {
            Ok(reply) => reply,
            Err(status) => {
                recycle(buffer, link);
                return Err(status);
            }
        };
        match (reply, buffer) {
            (Reply::Data(data), Some(mut buffer)) if data.len() == buffer.len() => {
                buffer.copy_from_slice(&data);
                self.queue.answer_data(index, buffer, link);
                self.metrics.command(true, entry.opcode(), Status::SUCCESS);
                // Reading a log may let the next event be told.
                self.deliver(link);
                return Ok(());
            }
            (Reply::Data(_), buffer) => {
                recycle(buffer, link);
                return Err(Status::DATA_SGL_LENGTH_INVALID);
            }
            (Reply::Done(result), buffer) => {
                recycle(buffer, link);
                self.queue.answer(index, result, Status::SUCCESS, link);
            }
            (Reply::Abort(command), buffer) => {
                recycle(buffer, link);
                let aborted = self.queue.find(command);
                if let Some(event) = aborted {
                    self.queue
                        .answer(event, 0, Status::COMMAND_ABORT_REQUESTED, link);
                }
                let not_aborted = u64::from(aborted.is_none());
                self.queue.answer(index, not_aborted, Status::SUCCESS, link);
            }
            (Reply::Later, buffer) => {
                recycle(buffer, link);
                let _ = self.queue.inside(index, Work::Other(*entry));
            }
            (Reply::ShutDown, buffer) => {
                recycle(buffer, link);
                self.queue.answer(index, 0, Status::SUCCESS, link);
                self.shut_down(link);
            }
        }
        self.deliver(link);
        Ok(())
    }

    /// Flushes, and then says that the shutdown is complete.
    fn shut_down(&mut self, link: &mut Link) {
        // A flush that fails latches the device; the shutdown is over all the same.
        // After a fence there is nothing to flush, and nothing was late either.
        let fenced = self.subsystem.gate().is_closed();
        let passes = if fenced {
            None
        } else {
            self.enter().ok().flatten()
        };
        let controller = Arc::clone(&self.controller);
        let Some(passes) = passes else {
            controller.shutdown_complete();
            return;
        };
        let flush = move |device: &dyn crate::block::BlockDevice| {
            let outcome = Outcome::new(None, device.flush());
            controller.shutdown_complete();
            outcome
        };
        let call = Operation::Call(Box::new(flush));
        link.begin(Tag(u64::MAX), self.subsystem.device(), call, passes);
    }

    /// An I/O command.
    fn io(
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
        // Ahead of all other checks: whatever it was, it came too late.
        self.late()?;
        if !self.controller.enabled() {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        let mut io = Io::decode(entry, self.subsystem.read_only())?;
        if !self.controller.write_cache() {
            io = io.durable();
        }
        let task = Task {
            io,
            incoming: io.incoming(entry)?,
            outgoing: io.outgoing(entry)?,
        };
        if let Some((Place::Capsule, length)) = task.incoming
            && capsule.is_none_or(|data| data.len() != length as usize)
        {
            return Err(Status::DATA_SGL_LENGTH_INVALID);
        }
        Ok(task)
    }

    /// Begins a command whose data and memory are all here.
    fn start(
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
        let passes = match fits.and_then(|()| self.enter()) {
            Ok(Some(passes)) => passes,
            // The association has ended, and so will this connection.
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
            (Io::Read { lba, .. }, Some(buffer)) => Operation::Read { lba, buffer },
            (Io::Write { lba, fua, .. }, Some(buffer)) => Operation::Write { lba, buffer, fua },
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
    /// the association has ended.
    fn enter(&self) -> Result<Option<[Option<Pass>; 2]>, Status> {
        let Some(export) = self.subsystem.gate().enter() else {
            self.metrics.late();
            return Err(Status::RESERVATION_CONFLICT);
        };
        let association = self.controller.gate().enter();
        Ok(association.map(|association| [Some(export), Some(association)]))
    }

    /// Refuses a command, as late, when its export's gate is closed already.
    fn late(&self) -> Result<(), Status> {
        if self.subsystem.gate().is_closed() {
            // Closed for good, so this refuses, and counts that.
            self.enter().map(drop)?;
        }
        Ok(())
    }
}

fn recycle(buffer: Option<Buffer>, link: &mut Link) {
    if let Some(buffer) = buffer {
        link.recycle(buffer);
    }
}

/// What an admin or fabrics command moves between the host's memory and this
/// side: whether it comes from the host, and how long it is. The low bits of
/// an opcode, or of a fabrics command's type, say which way data goes.
fn transfer_of(entry: &Entry) -> Option<(bool, u32)> {
    let code = match entry.opcode() {
        FABRICS => entry.fabrics_type(),
        opcode => opcode,
    };
    match entry.descriptor() {
        Ok((Place::Host, length)) if length > 0 && matches!(code & 3, 1 | 2) => {
            Some((code & 3 == 1, length))
        }
        _ => None,
    }
}

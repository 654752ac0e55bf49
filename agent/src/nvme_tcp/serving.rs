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

use super::administer::{is_auth, transfer_of};
use super::auth::Auth;
use super::command::{Entry, FABRICS, Io, Place};
use super::connection::Capsule;
use super::controller::Controller;
use super::io::Task;
use super::metrics::{Counting, Hot, Metrics, Peer};
use super::queue::{Index, Queue, Shape, Work};
use super::reserve;
use super::status::Status;
use super::subsystem::{Counted, Subsystem};
use super::wire::{Data, Malformed, u16_at, u64_at};
use crate::reactor::{Buffer, End, Failed, Link, Outcome, Tag};

/// A connection that has passed Connect.
pub struct Serving {
    pub(super) controller: Arc<Controller>,
    pub(super) subsystem: Arc<Subsystem>,
    pub(super) queue: Queue,
    pub(super) metrics: Metrics,
    peer: Peer,
    hot: Hot,
    /// Whether outstanding commands were answered because the namespace is gone.
    told: bool,
    /// What the controller knows its waker by.
    attached: u64,
    pub(super) auth: Option<Auth>,
    /// Until when the host must have proved itself; none when it has, or need not.
    pub(super) unproved: Option<Instant>,
    _connection: Counted,
    _association: Option<Counting>,
}

impl Serving {
    /// A connection of `controller`, from now on. Its host has `until` then to
    /// prove itself, if it must.
    pub fn new(
        controller: Arc<Controller>,
        shape: Shape,
        metrics: Metrics,
        peer: Peer,
        until: Instant,
        link: &mut Link,
    ) -> Self {
        let attached = controller.attach(link.waker());
        link.make_room(shape.depth.into());
        let subsystem = Arc::clone(controller.subsystem());
        Self {
            queue: Queue::new(shape, metrics.clone()),
            hot: metrics.hot(),
            told: false,
            attached,
            unproved: subsystem.secrets().map(|_| until),
            auth: (subsystem.secrets().is_some())
                .then(|| Auth::new(Arc::clone(&controller), peer.clone(), shape.id == 0)),
            _connection: subsystem.count(),
            _association: (shape.id == 0).then(|| metrics.association()),
            metrics,
            peer,
            controller,
            subsystem,
        }
    }

    /// Whether it is an export's host's for sure: anybody may discover, and who
    /// must prove itself has done that.
    pub fn is_a_hosts(&self) -> bool {
        self.unproved.is_none() && self.subsystem.discovery().is_none()
    }

    /// A command has come, with its data if that was in its capsule.
    pub fn command(
        &mut self,
        entry: Entry,
        capsule: Option<Capsule>,
        link: &mut Link,
    ) -> Result<Result<(), Malformed>, End> {
        self.heard(link);
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
        } else if self.unproved.is_some() && !is_auth(&entry) {
            recycle(capsule, link);
            Err(Status::AUTHENTICATION_REQUIRED)
        } else if self.queue.shape().id == 0 || entry.opcode() == FABRICS {
            self.other(index, entry, capsule, link)
        } else if reserve::is_one(entry.opcode()) {
            self.usable()
                .and_then(|()| self.other(index, entry, capsule, link))
        } else {
            self.io(index, &entry, capsule, link)
        };
        if let Err(status) = taken {
            self.queue.answer(index, 0, status, link);
        }
        self.claim().map(Ok)
    }

    /// The host lives; a stranger on one of its queues does not say so.
    fn heard(&self, link: &Link) {
        if self.unproved.is_none() || self.queue.shape().id == 0 {
            self.controller.heard(link.now());
        }
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
        self.heard(link);
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
        self.claim()
    }

    /// An operation has ended.
    pub fn done(&mut self, tag: Tag, outcome: Outcome, link: &mut Link) -> Result<(), End> {
        let Some((index, work)) = self.queue.ended(tag) else {
            recycle(outcome.buffer, link);
            return Ok(());
        };
        if matches!(outcome.result, Err(Failed::Closed)) {
            recycle(outcome.buffer, link);
            if let Some(status) = self.shut() {
                self.queue.answer(index, 0, status, link);
            }
            return Ok(());
        }
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
            (Work::Other(_), Some(answer)) => {
                let (result, status) = (u64_at(&answer, 0), Status(u16_at(&answer, 8)));
                link.recycle(answer);
                self.prove();
                self.queue.answer(index, result, status, link);
                return self.claim();
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
            (_, Failed::Other(_) | Failed::Closed) => (Status::INTERNAL_ERROR, None),
        };
        if self.peer.may_log(status.class()) {
            tracing::warn!(
                subsystem = self.subsystem.nqn(), ?command, error = %failed,
                "a host's command was not done"
            );
        }
        status
    }

    /// Looks at what has happened outside of the connection.
    pub fn woken(&mut self, link: &mut Link) -> Result<(), End> {
        if self.controller.has_ended() {
            return Err(End::Protocol("the association has ended"));
        }
        if self.unproved.is_some_and(|until| until <= link.now()) {
            return Err(End::Late("authentication"));
        }
        let admin = self.queue.shape().id == 0;
        if !admin && !self.told && self.subsystem.is_gone() {
            self.told = true;
            self.queue.answer_all(Status::RESERVATION_CONFLICT, link);
        }
        if admin {
            self.deliver(link);
            if self.controller.is_silent(link.now()) {
                if self.peer.may_log("silent") {
                    tracing::warn!(
                        peer = %self.peer.address, subsystem = self.subsystem.nqn(),
                        controller = self.controller.id(),
                        "the host was silent beyond its keep-alive timeout"
                    );
                }
                return Err(End::Late("keep alive"));
            }
        }
        if self.queue.overdue(link.now()) {
            if self.peer.may_log("data-stalled") {
                tracing::warn!(
                    peer = %self.peer.address, subsystem = self.subsystem.nqn(),
                    "a host did not send the data it was asked for"
                );
            }
            self.controller.end();
            return Err(End::Late("the data that the host was asked for"));
        }
        self.make_room(link);
        self.claim()
    }

    /// When it is to be woken.
    pub fn deadline(&self) -> Option<Instant> {
        let alive = (self.queue.shape().id == 0)
            .then(|| self.controller.silent_at())
            .flatten();
        [self.queue.due(), alive, self.unproved]
            .into_iter()
            .flatten()
            .min()
    }

    /// The connection has ended.
    pub fn ended(&self) {
        self.controller.detach(self.attached);
        if self.queue.shape().id == 0 {
            self.controller.end();
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
    pub(super) fn in_turn(
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
                    // As long as the command says, for which there is room.
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
}

pub(super) fn recycle(buffer: Option<Buffer>, link: &mut Link) {
    if let Some(buffer) = buffer {
        link.recycle(buffer);
    }
}

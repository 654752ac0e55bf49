//! The admin, fabrics and reservation commands of a connection: how their data
//! goes, and what their answers come to.

use std::sync::Arc;

use super::admin::{self, Job, Reply};
use super::auth::{self, Auth};
use super::command::{Entry, FABRICS, MAX_TRANSFER, Place};
use super::controller::Controller;
use super::queue::{Index, Work};
use super::reserve;
use super::serving::{Serving, recycle};
use super::status::Status;
use crate::reactor::link::Passes;
use crate::reactor::{Buffer, End, Link, Operation, Outcome, Tag};

impl Serving {
    /// An admin or fabrics command.
    pub(super) fn other(
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
    pub(super) fn administer(
        &mut self,
        index: Index,
        entry: &Entry,
        buffer: Option<Buffer>,
        link: &mut Link,
    ) -> Result<(), Status> {
        let data = buffer.as_deref().unwrap_or_default();
        let queue = self.queue.shape().id;
        let reply = if let Some(auth) = self.auth.as_ref().filter(|_| is_auth(entry)) {
            let reply = auth.handle(entry, data);
            self.prove();
            reply
        } else if queue != 0 && reserve::is_one(entry.opcode()) {
            reserve::handle(&self.subsystem, entry, data)
        } else {
            admin::handle(&self.controller, queue, entry, data)
        };
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
            (Reply::Job(job), buffer) => {
                recycle(buffer, link);
                return self.wait_for(index, entry, job, link);
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

    /// Has work done on a thread that may wait. How it ended comes back in a
    /// small buffer: eight bytes of the result, two of the status.
    fn wait_for(
        &mut self,
        index: Index,
        entry: &Entry,
        job: Job,
        link: &mut Link,
    ) -> Result<(), Status> {
        // What does not concern the device keeps no gate, and waits for none.
        let passes = if self.queue.shape().id == 0 || is_auth(entry) {
            Passes::default()
        } else {
            match self.enter()? {
                Some(passes) => passes,
                None => return Ok(()),
            }
        };
        let tag = self.queue.inside(index, Work::Other(*entry));
        let mut answer = link.unsolicited(10);
        let call = Operation::Call(Box::new(move |_| {
            let (result, status) = match job.run() {
                Ok(result) => (result, Status::SUCCESS),
                Err(status) => (0, status),
            };
            answer[..8].copy_from_slice(&result.to_le_bytes());
            answer[8..].copy_from_slice(&status.0.to_le_bytes());
            Outcome::new(Some(answer), Ok(()))
        }));
        link.begin(tag, self.subsystem.device(), call, passes);
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
        let over = ShutDown(controller);
        let flush = move |device: &dyn crate::block::BlockDevice| {
            let outcome = Outcome::new(None, device.flush());
            drop(over);
            outcome
        };
        let call = Operation::Call(Box::new(flush));
        link.begin(Tag(u64::MAX), self.subsystem.device(), call, passes);
    }

    /// Looks whether the host that had proved itself fails to do so anew: it is
    /// a stranger from now on.
    pub(super) fn prove(&self) {
        if let (Some(auth), None) = (&self.auth, self.unproved)
            && !auth.done()
            && auth.failed()
        {
            self.controller.end();
        }
    }

    /// Gives a host that has proved itself what it asked for: its queue.
    ///
    /// # Errors
    /// Another connection has proved itself for the same one.
    pub(super) fn claim(&mut self) -> Result<(), End> {
        if self.unproved.is_none() || !self.auth.as_ref().is_some_and(Auth::done) {
            return Ok(());
        }
        let id = self.queue.shape().id;
        if id != 0 && self.controller.connect_queue(id, true).is_err() {
            return Err(End::Protocol("the queue is another connection's"));
        }
        self.unproved = None;
        Ok(())
    }

    /// Tells the host what has happened; the requests to be told are the admin queue's.
    pub(super) fn deliver(&mut self, link: &mut Link) {
        if self.queue.shape().id != 0 {
            return;
        }
        while let Some((command, result)) = self.controller.take_event() {
            if let Some(index) = self.queue.find(command) {
                self.queue
                    .answer(index, result.into(), Status::SUCCESS, link);
            }
        }
    }
}

/// A shutdown under way: over when its flush has ended, or is not begun because
/// the export or the association has ended.
struct ShutDown(Arc<Controller>);

impl Drop for ShutDown {
    fn drop(&mut self) {
        self.0.shutdown_complete();
    }
}

/// Whether it is a command that authenticates.
pub fn is_auth(entry: &Entry) -> bool {
    entry.opcode() == FABRICS && matches!(entry.fabrics_type(), auth::SEND | auth::RECEIVE)
}

/// What an admin or fabrics command moves between the host's memory and this
/// side: whether it comes from the host, and how long it is. The low bits of
/// an opcode, or of a fabrics command's type, say which way data goes.
pub fn transfer_of(entry: &Entry) -> Option<(bool, u32)> {
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

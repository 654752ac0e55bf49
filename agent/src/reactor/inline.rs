//! Drives one connection on the calling thread, without sockets: for tests of
//! protocols and for fuzzing. What it runs is what the reactor's threads run.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::link::{Begun, Waker};
use super::protocol::{End, Protocol};

/// One connection whose peer is the caller.
pub struct Inline {
    connection: Connection,
    now: Instant,
    /// Operations that were begun and are held back.
    held: VecDeque<Begun>,
    hold: bool,
    deaf: bool,
}

impl Inline {
    /// A connection that speaks `protocol`.
    pub fn new(protocol: Box<dyn Protocol>) -> Self {
        let now = Instant::now();
        let waker = Waker::new(Arc::new(|| {}));
        Self {
            connection: Connection::new(protocol, waker, now),
            now,
            held: VecDeque::new(),
            hold: false,
            deaf: false,
        }
    }

    /// Sends bytes to the protocol, as far as it takes them, and returns what
    /// it answers by then. After its end it takes none.
    pub fn send(&mut self, mut bytes: &[u8]) -> Vec<u8> {
        let mut answer = self.settle();
        while !bytes.is_empty() {
            let Some(space) = self.connection.space() else {
                break;
            };
            let some = bytes.len().min(space.len());
            space[..some].copy_from_slice(&bytes[..some]);
            bytes = &bytes[some..];
            self.connection.received(some, self.now);
            answer.extend(self.settle());
        }
        answer
    }

    /// Closes the peer's side.
    pub fn close(&mut self) {
        if self.connection.space().is_some() {
            self.connection.received(0, self.now);
        }
    }

    /// Lets time pass and returns what is said meanwhile.
    pub fn wait(&mut self, time: Duration) -> Vec<u8> {
        self.now += time;
        self.settle()
    }

    /// Holds back what the device is to do from now on, or lets all of it happen.
    pub fn hold(&mut self, hold: bool) {
        self.hold = hold;
    }

    /// Keeps wakes from it from now on, or not: a thread comes to what happened
    /// elsewhere only behind a turn's events.
    pub fn deafen(&mut self, deaf: bool) {
        self.deaf = deaf;
    }

    /// Operations that are held back.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Why the connection has ended, if it has.
    pub fn end(&self) -> Option<&End> {
        self.connection.end()
    }

    /// Does what is to be done until nothing is, and returns what was sent.
    fn settle(&mut self) -> Vec<u8> {
        let mut answer = Vec::new();
        loop {
            if !self.deaf {
                self.connection.woken(self.now);
            }
            while let Some(begun) = self.connection.begun() {
                self.held.push_back(begun);
            }
            let sent: Vec<u8> = self.connection.output().flatten().copied().collect();
            if !sent.is_empty() {
                self.connection.sent(sent.len(), self.now);
                answer.extend(sent);
                continue;
            }
            if self.hold {
                return answer;
            }
            let Some(begun) = self.held.pop_front() else {
                return answer;
            };
            let outcome = begun.operation.perform(&*begun.device);
            drop(begun.passes);
            self.connection.done(begun.tag, outcome, self.now);
        }
    }
}

impl Drop for Inline {
    /// A thread that drops a connection has told it of its end before.
    fn drop(&mut self) {
        self.connection.finish(End::Closed);
    }
}

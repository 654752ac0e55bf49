//! A protocol's side of its connection: what came, what goes out, what the
//! device is to do.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::errno::Errno;

use super::buffer::{Budget, Buffer, Spares};
use super::gather::Gather;
use super::protocol::{Operation, Outcome, Tag};
use crate::block::BlockDevice;
use crate::block::gate::Pass;

/// Bytes of received data that wait to be consumed, at most.
pub const INPUT: usize = 64 << 10;
/// As many at the beginning.
const FIRST_INPUT: usize = 4 << 10;
/// Bytes that an answer to a command needs beside its data: headers, padding
/// and digests of an iSCSI Data-In and its response, or of an R2T.
const ANSWER: usize = 128;
/// Beyond so many bytes that wait to be sent, nothing more is received: a peer
/// that asks and does not take would have memory grow without end.
const BACKLOG: usize = 2 << 20;
/// Bytes of buffers that one connection's commands may hold.
const BUDGET: usize = 1 << 20;

/// Something to be sent.
enum Chunk {
    /// So many of the gathered bytes, all in one block.
    Gathered(usize),
    /// A part of a command's data; the buffer is free when it is sent.
    Data(Buffer, Range<usize>),
}

impl Chunk {
    fn len(&self) -> usize {
        match self {
            Self::Gathered(length) => *length,
            Self::Data(_, range) => range.len(),
        }
    }
}

/// An operation that was begun, with what holds the gates for it until it has settled.
pub struct Begun {
    /// The protocol's name for it.
    pub tag: Tag,
    /// What it is done on.
    pub device: Arc<dyn BlockDevice>,
    /// What is done.
    pub operation: Operation,
    /// The gates' passes.
    pub passes: Passes,
}

impl Begun {
    /// Whether it waits for nothing, so that no other thread need do it.
    pub fn is_quick(&self) -> bool {
        !matches!(self.operation, Operation::Call(_)) && self.device.in_memory()
    }

    /// What is left to do of a durable write that failed so: the device is told,
    /// which may have to wait until that is noted.
    pub fn durable_write_failed(mut self, errno: Errno) -> Self {
        if let Operation::Write { buffer, .. } = self.operation {
            self.operation = Operation::Call(Box::new(move |device| {
                Outcome::new(Some(buffer), Err(device.durable_write_failed(errno)))
            }));
        }
        self
    }

    /// Whether what it writes must be durable when it is done.
    pub fn is_durable(&self) -> bool {
        matches!(self.operation, Operation::Write { fua: true, .. })
    }
}

/// What an operation holds until it has settled: passes of its gates.
pub type Passes = [Option<Pass>; 3];

/// Bytes that came: `bytes[head..tail]` are not consumed yet. What lies beyond
/// `tail` may be in a driver's hands, so only [`Input::space`] moves anything.
///
/// It begins small, and doubles when all its room was used at once: a connection
/// that sends little at a time keeps little.
pub(super) struct Input {
    bytes: Vec<u8>,
    head: usize,
    tail: usize,
}

impl Input {
    fn new() -> Self {
        Self {
            bytes: vec![0; FIRST_INPUT],
            head: 0,
            tail: 0,
        }
    }

    pub fn waiting(&self) -> &[u8] {
        &self.bytes[self.head..self.tail]
    }

    pub fn consume(&mut self, bytes: usize) {
        self.head = (self.head + bytes).min(self.tail);
    }

    /// Room for more, empty when there is none. Nobody may hold an earlier one.
    pub fn space(&mut self) -> &mut [u8] {
        if self.tail == self.bytes.len() && self.bytes.len() < INPUT {
            self.bytes.resize(2 * self.bytes.len(), 0);
        }
        if self.head > 0 {
            self.bytes.copy_within(self.head..self.tail, 0);
            self.tail -= self.head;
            self.head = 0;
        }
        &mut self.bytes[self.tail..]
    }

    /// So many bytes of the space were filled.
    pub fn came(&mut self, bytes: usize) {
        self.tail = (self.tail + bytes).min(self.bytes.len());
    }
}

/// Where the next bytes of the stream go.
pub(super) struct Fill {
    pub buffer: Buffer,
    pub at: Range<usize>,
}

/// A protocol's side of its connection.
pub struct Link {
    pub(super) input: Input,
    pub(super) fill: Option<Fill>,
    output: VecDeque<Chunk>,
    gathered: Gather,
    /// Bytes of the output's first chunk that have gone out.
    gone: usize,
    pub(super) begun: VecDeque<Begun>,
    /// Bytes of the output, as they were put into it.
    queued: usize,
    pub(super) starved: bool,
    pub(super) spares: Spares,
    pub(super) now: Instant,
    budget: Arc<Budget>,
    waker: Waker,
}

/// Wakes a connection from any thread.
#[derive(Clone)]
pub struct Waker {
    woken: Arc<AtomicBool>,
    notify: Arc<dyn Fn() + Send + Sync>,
}

impl Waker {
    /// A waker that calls `notify` when it is used and was not since the last wake.
    pub fn new(notify: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self {
            woken: Arc::default(),
            notify,
        }
    }

    /// Has [`Protocol::woken`](super::Protocol::woken) called soon.
    pub fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            (self.notify)();
        }
    }

    /// Whether it was used since it was last asked.
    pub(super) fn take(&self) -> bool {
        self.woken.swap(false, Ordering::AcqRel)
    }
}

impl Link {
    /// The link of a new connection.
    pub fn new(waker: Waker, now: Instant) -> Self {
        Self {
            input: Input::new(),
            fill: None,
            output: VecDeque::new(),
            gathered: Gather::default(),
            gone: 0,
            begun: VecDeque::new(),
            queued: 0,
            starved: false,
            spares: Spares::default(),
            now,
            budget: Budget::new(BUDGET),
            waker,
        }
    }

    /// Bytes that came and were not consumed.
    pub fn input(&self) -> &[u8] {
        self.input.waiting()
    }

    /// Takes the first `bytes` off the input.
    pub fn consume(&mut self, bytes: usize) {
        self.input.consume(bytes);
    }

    /// Has the next bytes of the stream put into this part of `buffer`; then
    /// [`Protocol::filled`](super::Protocol::filled) is called with it, and
    /// nothing else is received before.
    pub fn fill(&mut self, buffer: Buffer, at: Range<usize>) {
        self.fill = Some(Fill { buffer, at });
    }

    /// A buffer of `length` bytes, with any content, within the connection's
    /// budget. None when that is used up:
    /// [`Protocol::woken`](super::Protocol::woken) is called when some was
    /// given back.
    pub fn buffer(&mut self, length: usize) -> Option<Buffer> {
        let buffer = self.spares.within(&self.budget, length);
        self.starved |= buffer.is_none();
        buffer
    }

    /// A buffer of `length` bytes, with any content, for data that the peer
    /// sends unasked. The protocol's own flow control must bound how much that is.
    pub fn unsolicited(&mut self, length: usize) -> Buffer {
        self.spares.any(length)
    }

    /// Keeps a buffer's memory for the next command.
    pub fn recycle(&mut self, buffer: Buffer) {
        self.spares.keep(buffer);
    }

    /// So many commands may be under way at once, from now on: what it takes to
    /// begin and to answer them is there before they come.
    pub fn make_room(&mut self, commands: usize) {
        self.begun.reserve(commands);
        // Each answer's header, and its data.
        self.output.reserve(2 * commands + 1);
        self.gathered.reserve(ANSWER * commands);
        self.spares.make_room(commands);
    }

    /// Sends bytes, behind all that was sent before.
    pub fn send(&mut self, mut bytes: &[u8]) {
        self.queued += bytes.len();
        while !bytes.is_empty() {
            let goes_on = self.gathered.goes_on();
            let put = self.gathered.put(bytes);
            match self.output.back_mut() {
                Some(Chunk::Gathered(length)) if goes_on => *length += put,
                _ => self.output.push_back(Chunk::Gathered(put)),
            }
            bytes = &bytes[put..];
        }
    }

    /// Sends a part of a buffer, behind all that was sent before.
    pub fn send_buffer(&mut self, buffer: Buffer, part: Range<usize>) {
        self.queued += part.len();
        self.output.push_back(Chunk::Data(buffer, part));
    }

    /// Whether a buffer that was refused may be had now. Asked once: the
    /// protocol asks again for what it still wants.
    pub(super) fn fed(&mut self) -> bool {
        let fed = self.starved && self.budget.used() < BUDGET;
        self.starved &= !fed;
        fed
    }

    /// Whether the peer has so much to take that nothing more is received.
    pub(super) fn is_clogged(&self) -> bool {
        self.queued > BACKLOG
    }

    /// Whether there is something to be sent.
    pub(super) fn wants_to_send(&self) -> bool {
        !self.output.is_empty()
    }

    /// What is to be sent, in order. The bytes stay where they are until
    /// [`Self::sent`] says that they are gone.
    pub(super) fn output(&self) -> impl Iterator<Item = &[u8]> {
        let (mut at, mut gone) = (self.gathered.head(), self.gone);
        self.output.iter().map(move |chunk| {
            let bytes = match chunk {
                Chunk::Gathered(length) => {
                    let bytes = self.gathered.bytes(at, *length);
                    at += length;
                    bytes
                }
                Chunk::Data(buffer, part) => &buffer[part.clone()],
            };
            &bytes[std::mem::take(&mut gone)..]
        })
    }

    /// So many bytes of the output have gone out: their memory is free.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.gone += bytes;
        while let Some(first) = self.output.front()
            && self.gone >= first.len()
        {
            self.gone -= first.len();
            self.queued -= first.len();
            match self.output.pop_front() {
                Some(Chunk::Gathered(length)) => self.gathered.take(length),
                Some(Chunk::Data(buffer, _)) => self.recycle(buffer),
                None => {}
            }
        }
    }

    /// Has `device` do something. The outcome comes by
    /// [`Protocol::done`](super::Protocol::done) with `tag`; the passes leave
    /// their gates when it has settled, whatever becomes of the connection.
    pub fn begin(
        &mut self,
        tag: Tag,
        device: &Arc<dyn BlockDevice>,
        operation: Operation,
        passes: Passes,
    ) {
        self.begun.push_back(Begun {
            tag,
            device: Arc::clone(device),
            operation,
            passes,
        });
    }

    /// The time: of the event that is being handled.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// What wakes this connection from any thread.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }
}

//! One reactor thread: its connections, and what the kernel does for them.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use slab::Slab;

use super::bell::{Handle, Inbox, Message};
use super::connection::Connection;
use super::driver::{Driver, Event, Key, Memory, Way};
use super::link::Begun;
use super::protocol::{End, Operation, Outcome, Protocol};
use super::workers::{Job, Workers};

/// Pieces that are sent in one call.
const PIECES: usize = 64;
/// Commands for which each thread has room from its start; with more under way
/// than ever before, its tables grow.
pub const COMMANDS: usize = 1024;
/// What a connection's end leaves to be sent and to be read gets this long.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// One thread's connections.
pub struct Serving {
    driver: Box<dyn Driver>,
    inbox: Arc<Inbox>,
    workers: Arc<Workers>,
    peers: Slab<Box<Peer>>,
    transfers: Slab<Transfer>,
    /// Connections to which something happened in this turn.
    touched: Vec<Key>,
    turns: u32,
    /// When to look at all connections' deadlines.
    look: Option<Instant>,
    stopping: bool,
}

/// A connection with its socket. Boxed, since the kernel holds pointers into it.
struct Peer {
    connection: Connection,
    socket: TcpStream,
    key: Key,
    outbound: Outbound,
    receiving: bool,
    sending: bool,
    /// Whether it is among those that something happened to.
    touched: bool,
    ending: Option<Ending>,
    /// What is received after the end goes here.
    scratch: [u8; 512],
    /// Wakes come by it.
    _handle: Arc<Handle>,
}

/// How far the end of a connection has come.
struct Ending {
    /// When it is closed, whatever is left.
    at: Instant,
    /// Whether the peer was told that nothing more comes.
    shut: bool,
    /// Whether the peer has closed as well, or the socket is of no use any more.
    over: bool,
}

/// A message's header and its pieces, which the kernel reads while it sends.
struct Outbound {
    header: libc::msghdr,
    pieces: [libc::iovec; PIECES],
}

/// A transfer that the kernel makes.
struct Transfer {
    key: Key,
    begun: Begun,
    length: usize,
}

impl Serving {
    /// A thread's state, with no connections yet.
    pub fn new(driver: Box<dyn Driver>, inbox: Arc<Inbox>, workers: Arc<Workers>) -> Self {
        Self {
            driver,
            inbox,
            workers,
            peers: Slab::new(),
            transfers: Slab::with_capacity(COMMANDS),
            touched: Vec::new(),
            turns: 0,
            look: None,
            stopping: false,
        }
    }

    /// Serves until told to stop, and until nothing is under way any more.
    pub fn run(mut self) {
        let mut events = Vec::with_capacity(COMMANDS);
        let mut messages = VecDeque::with_capacity(COMMANDS);
        let mut now = Instant::now();
        loop {
            self.inbox.take(&mut messages);
            while let Some(message) = messages.pop_front() {
                self.told(message, now);
            }
            if self.look.is_some_and(|at| at <= now) {
                self.look_at_all(now);
            }
            self.attend_to_all(now);
            if self.stopping && self.peers.is_empty() && self.transfers.is_empty() {
                return;
            }
            let wait = self.look.map(|at| at.saturating_duration_since(now));
            if let Err(error) = self.driver.turn(wait, &mut events) {
                // Nothing that is under way can be collected any more, and its
                // memory must not be freed: the process ends, as after a kill.
                tracing::error!(%error, "the data path's driver failed");
                std::process::abort();
            }
            now = Instant::now();
            for event in events.drain(..) {
                self.happened(event, now);
            }
        }
    }

    fn told(&mut self, message: Message, now: Instant) {
        match message {
            Message::Serve(socket, protocol, handle) => self.serve(socket, protocol, handle, now),
            Message::Wake(handle) => {
                if let Some(key) = handle.key.get()
                    && let Some(peer) = self.peer(*key)
                {
                    peer.connection.woken(now);
                    self.touch(*key);
                }
            }
            Message::Done(key, tag, outcome) => {
                if let Some(peer) = self.peer(key) {
                    peer.connection.done(tag, outcome, now);
                    self.touch(key);
                }
            }
            Message::Stop => {
                self.stopping = true;
                let keys: Vec<_> = self.peers.iter().map(|(_, peer)| peer.key).collect();
                for key in keys {
                    if let Some(peer) = self.peer(key) {
                        peer.connection.finish(End::Protocol("drover stops"));
                        self.touch(key);
                    }
                }
            }
        }
    }

    fn serve(
        &mut self,
        socket: TcpStream,
        protocol: Box<dyn Protocol>,
        handle: Arc<Handle>,
        now: Instant,
    ) {
        self.turns = self.turns.wrapping_add(1);
        let entry = self.peers.vacant_entry();
        let key = Key {
            place: u32::try_from(entry.key()).expect("descriptors are fewer than 2^32"),
            turn: self.turns,
        };
        // It is set here only, once for each handle.
        let _ = handle.key.set(key);
        entry.insert(Box::new(Peer {
            connection: Connection::new(protocol, handle.waker.clone(), now),
            socket,
            key,
            outbound: Outbound::new(),
            receiving: false,
            sending: false,
            touched: false,
            ending: None,
            scratch: [0; 512],
            _handle: handle,
        }));
        self.touched.reserve(self.peers.len());
        if self.stopping
            && let Some(peer) = self.peer(key)
        {
            peer.connection.finish(End::Protocol("drover stops"));
        }
        self.touch(key);
    }

    fn peer(&mut self, key: Key) -> Option<&mut Peer> {
        let peer = self.peers.get_mut(key.place as usize)?;
        (peer.key == key).then_some(&mut **peer)
    }

    fn happened(&mut self, event: Event, now: Instant) {
        match event {
            Event::Received(key, result) => {
                let Some(peer) = self.peer(key) else { return };
                peer.receiving = false;
                peer.received(result, now);
                self.touch(key);
            }
            Event::Sent(key, result) => {
                let Some(peer) = self.peer(key) else { return };
                peer.sending = false;
                peer.sent(result, now);
                self.touch(key);
            }
            Event::Moved(number, result) => self.moved(number, result, now),
        }
    }

    /// A transfer has ended. One that did not move all of it is done again by a
    /// thread that may wait: it says what is wrong. But a durable write that
    /// failed is not: its flush may have failed, and that is told once. Such a
    /// thread tells the device, unless the kernel lacked time or memory, and
    /// never came to the disk.
    fn moved(&mut self, number: u32, result: Result<usize, Errno>, now: Instant) {
        let Some(transfer) = self.transfers.try_remove(number as usize) else {
            return;
        };
        let Transfer { key, begun, length } = transfer;
        let result = match result {
            Ok(moved) if moved == length => Ok(()),
            Err(errno) if begun.is_durable() && !reached_no_disk(errno) => {
                return self.hand_over(key, begun.durable_write_failed(errno));
            }
            Ok(_) | Err(_) => return self.hand_over(key, begun),
        };
        let Begun {
            tag,
            operation,
            passes,
            ..
        } = begun;
        drop(passes);
        let (Operation::Read { buffer, .. } | Operation::Write { buffer, .. }) = operation else {
            return;
        };
        if let Some(peer) = self.peer(key) {
            let outcome = Outcome::new(Some(buffer), result);
            peer.connection.done(tag, outcome, now);
            self.touch(key);
        }
    }

    /// Something happened to a connection: it is attended to in this turn, once.
    fn touch(&mut self, key: Key) {
        if let Some(peer) = self.peer(key)
            && !std::mem::replace(&mut peer.touched, true)
        {
            self.touched.push(key);
        }
    }

    fn attend_to_all(&mut self, now: Instant) {
        let mut touched = std::mem::take(&mut self.touched);
        for key in touched.drain(..) {
            if let Some(peer) = self.peer(key) {
                peer.touched = false;
                self.attend(key, now);
            }
        }
        self.touched = touched;
    }

    /// Does what a connection asks for now.
    fn attend(&mut self, key: Key, now: Instant) {
        loop {
            let Some(peer) = self.peer(key) else { return };
            let Some(begun) = peer.connection.begun() else {
                // What goes out now may have made room for more to begin.
                if peer.send(now) {
                    continue;
                }
                break;
            };
            if begun.is_quick() {
                let outcome = begun.operation.perform(&*begun.device);
                drop(begun.passes);
                peer.connection.done(begun.tag, outcome, now);
            } else {
                self.begin(key, begun);
            }
        }
        let Some(peer) = self.peers.get_mut(key.place as usize) else {
            return;
        };
        let socket = peer.socket.as_raw_fd();
        if peer.connection.end().is_some() && peer.say_goodbye(now) {
            self.driver.forget(socket);
            self.peers.remove(key.place as usize);
            return;
        }
        if let Some(memory) = peer.space() {
            peer.receiving = true;
            // SAFETY: the space stays where it is, and nobody touches it, until
            // `received` is called; the peer lives until its end has come.
            unsafe { self.driver.receive(key, socket, memory) };
        }
        if let Some(message) = peer.message() {
            peer.sending = true;
            // SAFETY: the output stays where it is until `sent` is called, and
            // the message until the next is made; the peer lives until then.
            unsafe { self.driver.send(key, socket, message) };
        }
        let deadline = match &peer.ending {
            Some(ending) => Some(ending.at),
            None => peer.connection.deadline(),
        };
        self.look = [self.look, deadline].into_iter().flatten().min();
    }

    /// Begins an operation: by the kernel if it can, else by a thread that may wait.
    fn begin(&mut self, key: Key, mut begun: Begun) {
        let durable = begun.is_durable();
        let (lba, buffer, way) = match &mut begun.operation {
            Operation::Read { lba, buffer } => (*lba, buffer, Way::Read),
            Operation::Write { lba, buffer, .. } if durable => (*lba, buffer, Way::WriteDurably),
            Operation::Write { lba, buffer, .. } => (*lba, buffer, Way::Write),
            Operation::Flush | Operation::Call(_) => return self.hand_over(key, begun),
        };
        let length = buffer.len();
        let Some(direct) = begun.device.direct(lba, length, way != Way::Read) else {
            return self.hand_over(key, begun);
        };
        let memory = Memory {
            start: buffer.as_mut_ptr(),
            length,
        };
        let entry = self.transfers.vacant_entry();
        let Ok(number) = u32::try_from(entry.key()) else {
            return self.hand_over(key, begun);
        };
        // SAFETY: the buffer's memory is on the heap and stays there with the
        // transfer, and so does the device that holds the file open, until the
        // event of its end removes it.
        if unsafe { self.driver.transfer(number, direct, memory, way) } {
            entry.insert(Transfer { key, begun, length });
        } else {
            self.hand_over(key, begun);
        }
    }

    fn hand_over(&self, key: Key, begun: Begun) {
        self.workers.run(Job {
            inbox: Arc::clone(&self.inbox),
            key,
            begun,
        });
    }

    fn look_at_all(&mut self, now: Instant) {
        self.look = None;
        let keys: Vec<_> = self.peers.iter().map(|(_, peer)| peer.key).collect();
        for key in keys {
            if let Some(peer) = self.peer(key) {
                peer.connection.woken(now);
                self.touch(key);
            }
        }
    }
}

/// Whether a transfer failed before any of it was handed to a disk.
fn reached_no_disk(errno: Errno) -> bool {
    matches!(errno, Errno::EINTR | Errno::EAGAIN | Errno::ENOMEM)
}

impl Peer {
    fn received(&mut self, result: Result<usize, Errno>, now: Instant) {
        match (&mut self.ending, result) {
            (Some(ending), Ok(0) | Err(_)) => ending.over = true,
            (Some(_), Ok(_)) => {}
            (None, Ok(bytes)) => self.connection.received(bytes, now),
            (None, Err(errno)) => self.connection.finish(End::Io {
                call: "receive",
                errno,
            }),
        }
    }

    fn sent(&mut self, result: Result<usize, Errno>, now: Instant) {
        match result {
            Ok(bytes) => self.connection.sent(bytes, now),
            Err(errno) => {
                self.connection.finish(End::Io {
                    call: "send",
                    errno,
                });
                if let Some(ending) = &mut self.ending {
                    ending.over = true;
                }
            }
        }
    }

    /// Where the next bytes go, if any are to be received now.
    fn space(&mut self) -> Option<Memory> {
        if self.receiving {
            return None;
        }
        let space = match &self.ending {
            None => self.connection.space()?,
            Some(ending) if ending.over => return None,
            Some(_) => &mut self.scratch[..],
        };
        Some(Memory {
            start: space.as_mut_ptr(),
            length: space.len(),
        })
    }

    /// Sends what the socket takes without waiting; whether it took any.
    fn send(&mut self, now: Instant) -> bool {
        let Some(message) = self.message() else {
            return false;
        };
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message and all it points to stay where they are until `sent` is called.
        let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), message, flags) };
        match Errno::result(sent).map(isize::cast_unsigned) {
            Err(Errno::EAGAIN | Errno::EINTR) => false,
            result => {
                self.sent(result, now);
                result.is_ok()
            }
        }
    }

    /// What is to be sent, if any is to be sent now.
    fn message(&mut self) -> Option<*const libc::msghdr> {
        if self.sending || !self.connection.wants_to_send() {
            return None;
        }
        if self.ending.as_ref().is_some_and(|ending| ending.over) {
            return None;
        }
        Some(self.outbound.fill(self.connection.output()))
    }

    /// Goes on with the connection's end; true when the socket may be closed.
    fn say_goodbye(&mut self, now: Instant) -> bool {
        let lost = !matches!(self.connection.end(), Some(End::Protocol(_)));
        let ending = self.ending.get_or_insert(Ending {
            at: now + LAST_WORDS,
            shut: false,
            over: lost,
        });
        ending.over |= now >= ending.at;
        if !ending.over && !ending.shut && !self.sending && !self.connection.wants_to_send() {
            ending.shut = true;
            ending.over |= self.socket.shutdown(Shutdown::Write).is_err();
        }
        if !ending.over {
            return false;
        }
        if self.receiving || self.sending {
            // Ends what the kernel has under way. It fails if the peer was faster.
            let _ = self.socket.shutdown(Shutdown::Both);
            ending.at = now + LAST_WORDS;
            return false;
        }
        true
    }
}

impl Outbound {
    fn new() -> Self {
        // SAFETY: a header of zeroes is one without a name, pieces or control data.
        let header = unsafe { std::mem::zeroed() };
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            header,
            pieces: [empty; PIECES],
        }
    }

    fn fill<'a>(&mut self, output: impl Iterator<Item = &'a [u8]>) -> *const libc::msghdr {
        let mut used = 0;
        for (piece, bytes) in self.pieces.iter_mut().zip(output) {
            piece.iov_base = bytes.as_ptr().cast_mut().cast();
            piece.iov_len = bytes.len();
            used += 1;
        }
        self.header.msg_iov = self.pieces.as_mut_ptr();
        self.header.msg_iovlen = used;
        &raw const self.header
    }
}

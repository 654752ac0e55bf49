//! The driver where the kernel forbids io_uring: epoll for sockets, and threads
//! that wait for files.

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::bell::Bell;
use super::driver::{Driver, Event, Key, Memory, Way};
use crate::block::Direct;

/// The bell's name among the sockets, which are named by their descriptors.
const BELL: u64 = u64::MAX;
/// Sockets that are looked at in one turn.
const EVENTS: usize = 256;

/// The epoll of one thread.
pub struct Polling {
    epoll: Epoll,
    bell: Bell,
    sockets: HashMap<RawFd, Socket>,
    /// Sockets that may have become able to do what was asked for.
    ready: Vec<RawFd>,
}

#[derive(Default)]
struct Socket {
    receive: Option<(Key, Memory)>,
    send: Option<(Key, *const libc::msghdr)>,
}

impl Polling {
    /// An epoll that is woken by `bell`.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new(bell: Bell) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        Ok(Self {
            epoll,
            bell,
            sockets: HashMap::new(),
            ready: Vec::new(),
        })
    }

    fn socket(&mut self, socket: RawFd) -> &mut Socket {
        if !self.sockets.contains_key(&socket) {
            // SAFETY: the caller holds the socket open until it has it forgotten.
            let open = unsafe { BorrowedFd::borrow_raw(socket) };
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
            let name = u64::from(socket.cast_unsigned());
            if let Err(errno) = self.epoll.add(open, EpollEvent::new(flags, name)) {
                tracing::error!(%errno, "a socket cannot be watched: its connection will time out");
            }
        }
        self.ready.push(socket);
        self.sockets.entry(socket).or_default()
    }

    /// Tries what was asked of a socket.
    fn attempt(&mut self, number: RawFd, ended: &mut Vec<Event>) {
        let Some(socket) = self.sockets.get_mut(&number) else {
            return;
        };
        if let Some((key, memory)) = socket.receive {
            // SAFETY: who asked for it keeps the memory until its end is told.
            let got = unsafe {
                libc::recv(
                    number,
                    memory.start.cast(),
                    memory.length,
                    libc::MSG_DONTWAIT,
                )
            };
            if let Some(result) = finished(got) {
                socket.receive = None;
                ended.push(Event::Received(key, result));
            }
        }
        if let Some((key, message)) = socket.send {
            // SAFETY: who asked for it keeps the message until its end is told.
            let sent =
                unsafe { libc::sendmsg(number, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
            if let Some(result) = finished(sent) {
                socket.send = None;
                ended.push(Event::Sent(key, result));
            }
        }
    }
}

/// What a call came to; none when it is to be tried again once the socket is ready.
fn finished(result: isize) -> Option<Result<usize, Errno>> {
    match Errno::result(result) {
        Err(Errno::EAGAIN | Errno::EINTR) => None,
        other => Some(other.map(isize::cast_unsigned)),
    }
}

impl Driver for Polling {
    unsafe fn receive(&mut self, key: Key, socket: RawFd, memory: Memory) {
        self.socket(socket).receive = Some((key, memory));
    }

    unsafe fn send(&mut self, key: Key, socket: RawFd, message: *const libc::msghdr) {
        self.socket(socket).send = Some((key, message));
    }

    unsafe fn transfer(&mut self, _: u32, _: Direct, _: Memory, _: Way) -> bool {
        false
    }

    fn turn(&mut self, wait: Option<Duration>, ended: &mut Vec<Event>) -> io::Result<()> {
        let mut ready = std::mem::take(&mut self.ready);
        for socket in ready.drain(..) {
            self.attempt(socket, ended);
        }
        self.ready = ready;
        let wait = if ended.is_empty() {
            wait
        } else {
            Some(Duration::ZERO)
        };
        let timeout = match wait {
            // Rounded up: a deadline must have come when it is looked at.
            Some(wait) => EpollTimeout::try_from(wait + Duration::from_micros(999))
                .unwrap_or(EpollTimeout::MAX),
            None => EpollTimeout::NONE,
        };
        let mut events = [EpollEvent::empty(); EVENTS];
        let seen = match self.epoll.wait(&mut events, timeout) {
            Ok(seen) => seen,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        for event in &events[..seen] {
            match RawFd::try_from(event.data()) {
                Ok(socket) => self.attempt(socket, ended),
                Err(_) => self.bell.quiet(),
            }
        }
        Ok(())
    }

    fn forget(&mut self, socket: RawFd) {
        self.sockets.remove(&socket);
        // SAFETY: the caller holds the socket open until this returns.
        let open = unsafe { BorrowedFd::borrow_raw(socket) };
        // It was never watched, if this fails.
        let _ = self.epoll.delete(open);
    }
}

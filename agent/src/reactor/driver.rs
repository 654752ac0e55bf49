//! How a reactor's thread has the kernel do things: by io_uring, or by epoll
//! and threads that wait.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use nix::errno::Errno;

use crate::block::Direct;

/// Which connection something is about; never used twice by one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Its place among the thread's connections.
    pub place: u32,
    /// Tells apart connections that had the same place.
    pub turn: u32,
}

/// What a driver reports.
#[derive(Debug)]
pub enum Event {
    /// Bytes were received; 0: the peer sends no more.
    Received(Key, Result<usize, Errno>),
    /// Bytes were sent.
    Sent(Key, Result<usize, Errno>),
    /// The transfer with this number has ended.
    Moved(u32, Result<usize, Errno>),
}

/// Memory that the kernel reads or fills.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Where it begins.
    pub start: *mut u8,
    /// Bytes.
    pub length: usize,
}

/// What a transfer does to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Fills the memory.
    Read,
    /// Writes the memory.
    Write,
    /// Writes the memory, and it is durable at the end (RWF_DSYNC).
    WriteDurably,
}

/// Starts what the kernel is to do, and reports its ends.
///
/// # Safety of its calls
/// Memory and messages that are handed over must stay valid, and receiving
/// memory untouched, until the event of their end, whatever happens before.
pub trait Driver {
    /// Receives into memory; [`Event::Received`] follows.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn receive(&mut self, key: Key, socket: RawFd, memory: Memory);

    /// Sends a message; [`Event::Sent`] follows.
    ///
    /// # Safety
    /// As the trait says, for the message and all it points to.
    unsafe fn send(&mut self, key: Key, socket: RawFd, message: *const libc::msghdr);

    /// Reads or writes a file; [`Event::Moved`] follows. False: this driver
    /// leaves that to threads that may wait, and nothing was begun.
    ///
    /// # Safety
    /// As the trait says; the file must stay open as well.
    unsafe fn transfer(&mut self, number: u32, at: Direct, memory: Memory, way: Way) -> bool;

    /// Starts what was asked for, waits until something has ended, the
    /// thread's bell was rung, or the time is over, and adds what has ended.
    ///
    /// # Errors
    /// The kernel's, after which this driver is of no use any more.
    fn turn(&mut self, wait: Option<Duration>, ended: &mut Vec<Event>) -> io::Result<()>;

    /// The socket will not be used again; nothing of it is under way.
    fn forget(&mut self, socket: RawFd);
}

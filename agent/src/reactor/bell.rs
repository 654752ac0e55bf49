//! Wakes a reactor's thread: an eventfd, and what it is to be told.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::driver::Key;
use super::link::Waker;
use super::protocol::{Outcome, Protocol, Tag};
use super::serve::COMMANDS;

/// An eventfd that wakes a thread.
#[derive(Clone)]
pub struct Bell(Arc<EventFd>);

impl Bell {
    fn new(flags: EfdFlags) -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | flags,
        )?)))
    }

    fn ring(&self) {
        // It fails when the count is full: then it has been rung often enough.
        let _ = self.0.write(1);
    }

    /// Stops ringing.
    pub fn quiet(&self) {
        // It fails when it does not ring.
        let _ = self.0.read();
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a thread is told by others.
pub enum Message {
    /// A connection to serve.
    Serve(TcpStream, Box<dyn Protocol>, Arc<Handle>),
    /// A connection's waker was used.
    Wake(Arc<Handle>),
    /// A thread that may wait has done an operation.
    Done(Key, Tag, Outcome),
    /// End all connections and then the thread.
    Stop,
}

/// A connection as others hold it.
pub struct Handle {
    /// Its waker.
    pub waker: Waker,
    /// Where it is, once its thread has it.
    pub key: std::sync::OnceLock<Key>,
}

/// A thread's letter box.
pub struct Inbox {
    messages: Mutex<VecDeque<Message>>,
    /// Whether the bell was rung since the thread last looked.
    rung: AtomicBool,
    bell: Bell,
}

impl Inbox {
    /// An empty one. A ring reads its bell and waits for it; epoll must not.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new(waiting_reads: bool) -> io::Result<Arc<Self>> {
        let flags = if waiting_reads {
            EfdFlags::empty()
        } else {
            EfdFlags::EFD_NONBLOCK
        };
        Ok(Arc::new(Self {
            messages: Mutex::new(VecDeque::with_capacity(COMMANDS)),
            rung: AtomicBool::new(false),
            bell: Bell::new(flags)?,
        }))
    }

    /// What rings when there is something in it.
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// Puts something in.
    pub fn post(&self, message: Message) {
        self.messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(message);
        if !self.rung.swap(true, Ordering::AcqRel) {
            self.bell.ring();
        }
    }

    /// Takes all that is in it.
    pub fn take(&self, into: &mut VecDeque<Message>) {
        // First, so that what is put in from here on rings again.
        if self.rung.swap(false, Ordering::AcqRel) {
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            into.append(&mut messages);
        }
    }
}

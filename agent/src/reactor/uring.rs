//! The driver over io_uring: sockets and files in one ring, started and
//! collected in batches.
//!
//! Files, sockets and buffers are not registered with the ring, and receives are
//! not multishot: docs/benchmarks.md has what was measured of each.
//!
//! A write that a ring has begun outlives its process: after kill -9 it still
//! lands. So the ring registers the descriptors that must stay open until then
//! ([`Uring::new`]'s `held`): registered files live as long as the ring's last
//! request (seen on Linux 6.1, 6.12 and 6.18).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::errno::Errno;

use super::bell::Bell;
use super::driver::{Driver, Event, Key, Memory, Way};
use super::patience::Patience;
use crate::block::Direct;

/// Requests that are started at once, at most; more wait in the next batch.
const ENTRIES: u32 = 1024;
/// Ends that the ring keeps ahead of their being collected.
const ENDS: u32 = 4 * ENTRIES;

/// Transfers that are started together, at most. A disk begins with the first
/// while the next are made ready; all at once, it would wait for the last.
const TOGETHER: u32 = 4;

/// IORING_RECVSEND_POLL_FIRST (linux/io_uring.h): the socket is waited for before it is read.
const POLL_FIRST: u16 = 1;

const RECEIVE: u64 = 1;
const SEND: u64 = 2;
const TRANSFER: u64 = 3;
const BELL: u64 = 4;

/// The io_uring of one thread.
pub struct Uring {
    ring: IoUring,
    bell: Bell,
    /// Where the bell's count is read to.
    rung: Box<u64>,
    listening: bool,
    /// Transfers that are not started yet.
    unstarted: u32,
    /// Transfers that have not ended.
    transfers: u32,
    /// Whether the socket at each place had nothing left when it was last read.
    /// It is a hint: to look before one waits would be in vain.
    drained: Vec<bool>,
    patience: Patience,
}

impl Uring {
    /// A ring of the calling thread's. It is woken by `bell`, keeps `held` open
    /// as long as any of its requests can still have an effect, and looks out
    /// for up to `poll` before it sleeps.
    ///
    /// # Errors
    /// The kernel forbids io_uring, or is older than 5.19.
    pub fn new(bell: Bell, held: &[RawFd], poll: Duration) -> io::Result<Self> {
        let best = IoUring::builder()
            .setup_cqsize(ENDS)
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(ENTRIES);
        let ring = match best {
            // Linux before 6.1 has no deferred task work.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
                .setup_cqsize(ENDS)
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .build(ENTRIES)?,
            other => other?,
        };
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if !held.is_empty() {
            ring.submitter().register_files(held)?;
        }
        Ok(Self {
            ring,
            bell,
            rung: Box::default(),
            listening: false,
            unstarted: 0,
            transfers: 0,
            drained: Vec::new(),
            patience: Patience::new(poll),
        })
    }

    /// # Safety
    /// As [`Driver`] says for what the entry points to.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise is the one that `push` asks for.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full: starting what is there makes room. A failure shows at the next turn.
            if self.ring.submit().is_err() {
                std::thread::yield_now();
            }
        }
    }

    /// Waits without sleeping, for a moment, if that pays. Whether all that the
    /// ring has to tell can be collected, and all that was asked for has begun.
    fn look_out(&mut self, wait: Option<Duration>) -> bool {
        let Self { ring, patience, .. } = self;
        let came =
            |ring: &mut IoUring| ring.submission().taskrun() || !ring.completion().is_empty();
        // A disk is not waited for so: it takes its time, and where it is emulated
        // it needs the processor. And what is there says nothing of waiting.
        if self.transfers > 0 || came(ring) {
            return false;
        }
        let mut begun = false;
        patience.look_out(wait, || {
            if !std::mem::replace(&mut begun, true) && !ring.submission().is_empty() {
                // What does not begin now does at the enter, where a failure shows.
                let _ = ring.submit();
            }
            came(ring)
        });
        let submission = ring.submission();
        let enter = submission.taskrun() || submission.cq_overflow() || !submission.is_empty();
        drop(submission);
        !enter && !ring.completion().is_empty()
    }

    /// Starts what was asked for, and sleeps until something has ended or the time is over.
    fn enter(&mut self, wait: Option<Duration>) -> io::Result<()> {
        let time = wait.map(Timespec::from);
        let mut arguments = SubmitArgs::new();
        if let Some(time) = &time {
            arguments = arguments.timespec(time);
        }
        // One is wanted even where there is no time to wait: deferred task work,
        // and with it every end, is done only by an enter that wants some.
        match self.ring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => Ok(()),
            // Time is over; a signal came; ends must be collected first.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn collect(&mut self, ended: &mut Vec<Event>) {
        for end in self.ring.completion() {
            let data = end.user_data();
            let key = Key {
                place: u32::try_from(data >> 32 & 0x00ff_ffff).unwrap_or_default(),
                turn: u32::try_from(data & 0xffff_ffff).unwrap_or_default(),
            };
            let result = match end.result() {
                failed @ ..0 => Err(Errno::from_raw(-failed)),
                moved => Ok(usize::try_from(moved).unwrap_or_default()),
            };
            match data >> 56 {
                RECEIVE => {
                    let place = key.place as usize;
                    if self.drained.len() <= place {
                        self.drained.resize(place + 1, false);
                    }
                    self.drained[place] = !cqueue::sock_nonempty(end.flags());
                    ended.push(Event::Received(key, result));
                }
                SEND => ended.push(Event::Sent(key, result)),
                TRANSFER => {
                    self.transfers -= 1;
                    ended.push(Event::Moved(key.turn, result));
                }
                _ => self.listening = false,
            }
        }
    }

    fn listen(&mut self) {
        if self.listening {
            return;
        }
        let to = std::ptr::from_mut::<u64>(&mut self.rung).cast();
        let entry = opcode::Read::new(Fd(self.bell.as_raw_fd()), to, 8)
            .build()
            .user_data(BELL << 56);
        // SAFETY: `rung` is boxed and lives as long as the ring, and nobody else uses it.
        unsafe { self.push(&entry) };
        self.listening = true;
    }
}

impl Driver for Uring {
    unsafe fn receive(&mut self, key: Key, socket: RawFd, memory: Memory) {
        let drained = self.drained.get(key.place as usize) == Some(&true);
        let entry = opcode::Recv::new(Fd(socket), memory.start, length(memory))
            .ioprio(if drained { POLL_FIRST } else { 0 })
            .build()
            .user_data(of(RECEIVE, key));
        // SAFETY: the caller's promise.
        unsafe { self.push(&entry) };
    }

    unsafe fn send(&mut self, key: Key, socket: RawFd, message: *const libc::msghdr) {
        let entry = opcode::SendMsg::new(Fd(socket), message)
            .flags(libc::MSG_NOSIGNAL.cast_unsigned())
            .build()
            .user_data(of(SEND, key));
        // SAFETY: the caller's promise.
        unsafe { self.push(&entry) };
    }

    unsafe fn transfer(&mut self, number: u32, at: Direct, memory: Memory, way: Way) -> bool {
        let (file, length) = (Fd(at.file), length(memory));
        let write = |flags| {
            opcode::Write::new(file, memory.start, length)
                .offset(at.offset)
                .rw_flags(flags)
                .build()
        };
        let entry = match way {
            Way::Read => opcode::Read::new(file, memory.start, length)
                .offset(at.offset)
                .build(),
            Way::Write => write(0),
            Way::WriteDurably => write(libc::RWF_DSYNC),
        };
        let entry = entry.user_data(TRANSFER << 56 | u64::from(number));
        // SAFETY: the caller's promise.
        unsafe { self.push(&entry) };
        self.unstarted += 1;
        self.transfers += 1;
        if self.unstarted == TOGETHER {
            self.unstarted = 0;
            // What it does not take now is started at the next turn, where a failure shows.
            let _ = self.ring.submit();
        }
        true
    }

    fn turn(&mut self, wait: Option<Duration>, ended: &mut Vec<Event>) -> io::Result<()> {
        self.listen();
        self.unstarted = 0;
        if !self.look_out(wait) {
            self.enter(wait)?;
        }
        self.collect(ended);
        Ok(())
    }

    fn forget(&mut self, _socket: RawFd) {}
}

/// What a request is called in the ring: its kind, and the connection.
fn of(kind: u64, key: Key) -> u64 {
    kind << 56 | u64::from(key.place & 0x00ff_ffff) << 32 | u64::from(key.turn)
}

/// No space is anywhere near 4 GiB.
fn length(memory: Memory) -> u32 {
    u32::try_from(memory.length).unwrap_or(u32::MAX)
}

//! One association: a host's admin queue and its I/O queues, and what the
//! host has configured on them.
//!
//! ```text
//!   admitted ── CC.EN ──► enabled ── CC.SHN ──► shut down
//!       │                    │ CC.EN = 0            │
//!       └────────────┬───────┴──────────────────────┘
//!                    ▼  also: admin connection lost, keep alive expired,
//!                  ended    a newer association, the export's end
//! ```
//!
//! An ended association lets no command in any more; those inside finish, and
//! until they have, no other association of the subsystem is admitted. It is
//! never enabled again: a host connects anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::identify::{
    DISCOVERY_NOTICES, EVENT_REQUESTS, KEEP_ALIVE_GRANULARITY, NAMESPACE_NOTICES,
};
use super::status::Status;
use super::subsystem::Subsystem;
use crate::block::gate::Gate;
use crate::reactor::Waker;

/// I/O queues, so connections, that an association may have.
pub const MAX_IO_QUEUES: u16 = 16;

const CC_ENABLE: u32 = 1;
const CC_SHUTDOWN: u32 = 0b11 << 14;
const CSTS_READY: u32 = 1;
const CSTS_SHUTDOWN_RUNNING: u32 = 0b01 << 2;
const CSTS_SHUTDOWN_COMPLETE: u32 = 0b10 << 2;

/// What a host can be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The namespace has another size, or is gone.
    Namespace,
    /// There is a notification in the reservations' log.
    Reservation,
    /// What can be discovered is another.
    Discovery,
}

impl Event {
    const ALL: [Self; 3] = [Self::Namespace, Self::Reservation, Self::Discovery];

    fn bit(self) -> u8 {
        1 << self as u8
    }

    /// The completion's result: type, information and the log page to read.
    fn result(self) -> u32 {
        match self {
            Self::Namespace => 0x0004_0002,
            Self::Reservation => 0x0080_0006,
            Self::Discovery => 0x0070_f002,
        }
    }

    /// Whether a host with this event configuration wants it.
    fn wanted(self, notices: u32) -> bool {
        match self {
            Self::Namespace => notices & NAMESPACE_NOTICES != 0,
            // Masked by a feature of its own, before they are noted.
            Self::Reservation => true,
            Self::Discovery => notices & DISCOVERY_NOTICES != 0,
        }
    }
}

/// One association's state. What every command looks at is atomic; the rest
/// is behind a lock that only admin commands take.
pub struct Controller {
    id: u16,
    subsystem: Arc<Subsystem>,
    gate: Arc<Gate>,
    born: Instant,
    /// Milliseconds from `born` until something was last heard of the host.
    heard: AtomicU64,
    /// Milliseconds; 0: none.
    keep_alive: AtomicU32,
    /// CSTS.
    status: AtomicU32,
    write_cache: AtomicBool,
    ended: AtomicBool,
    wakers: Mutex<Wakers>,
    state: Mutex<State>,
}

/// What wakes its connections, each by a number of its own.
#[derive(Default)]
struct Wakers {
    last: u64,
    all: BTreeMap<u64, Waker>,
}

struct State {
    configuration: u32,
    io_queues: u16,
    connected: BTreeSet<u16>,
    notices: u32,
    retry_delays: bool,
    requests: VecDeque<u16>,
    changed: bool,
    /// Events that were told and whose log was not read since, a bit for each.
    masked: u8,
    /// Events to be told.
    due: u8,
    saw_no_namespace: bool,
}

impl Controller {
    /// A new association of `subsystem`. `keep_alive` in milliseconds, 0 for none.
    pub fn new(id: u16, subsystem: Arc<Subsystem>, keep_alive: u32, now: Instant) -> Arc<Self> {
        let state = State {
            configuration: 0,
            io_queues: MAX_IO_QUEUES,
            connected: BTreeSet::new(),
            notices: 0,
            retry_delays: false,
            requests: VecDeque::new(),
            changed: false,
            masked: 0,
            due: 0,
            saw_no_namespace: false,
        };
        Arc::new(Self {
            id,
            subsystem,
            gate: Gate::new(),
            born: now,
            heard: AtomicU64::new(0),
            keep_alive: AtomicU32::new(keep_alive),
            status: AtomicU32::new(0),
            write_cache: AtomicBool::new(true),
            ended: AtomicBool::new(false),
            wakers: Mutex::default(),
            state: Mutex::new(state),
        })
    }

    /// The controller id.
    pub fn id(&self) -> u16 {
        self.id
    }
    /// The subsystem it is of.
    pub fn subsystem(&self) -> &Arc<Subsystem> {
        &self.subsystem
    }
    /// The gate of this association alone.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
    /// What a successful Connect results in: the id, and ATR if the host must
    /// prove itself.
    pub fn connect_result(&self) -> u64 {
        let authenticate = self.subsystem.secrets().is_some();
        u64::from(self.id) | u64::from(authenticate) << 17
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if some did, each field would still be sound.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn wakers(&self) -> MutexGuard<'_, Wakers> {
        // No code panics while it holds the lock.
        self.wakers
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Has this waker of a connection used when something happens to the
    /// association; returns what [`Self::detach`] takes.
    pub fn attach(&self, waker: Waker) -> u64 {
        let mut wakers = self.wakers();
        wakers.last += 1;
        let number = wakers.last;
        wakers.all.insert(number, waker.clone());
        drop(wakers);
        // It may have ended before.
        waker.wake();
        number
    }

    /// A connection has ended.
    pub fn detach(&self, number: u64) {
        self.wakers().all.remove(&number);
    }

    /// Wakes all connections.
    pub fn wake(&self) {
        for waker in self.wakers().all.values() {
            waker.wake();
        }
    }

    /// Ends the association: no command enters, and its connections close.
    pub fn end(&self) {
        // First, so that who finds the gate closed knows whether this is why.
        self.ended.store(true, Ordering::Release);
        self.gate.close();
        self.wake();
    }

    /// Whether the association has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The host has sent something, on whichever queue: it lives (TBKAS).
    pub fn heard(&self, now: Instant) {
        let since = now.saturating_duration_since(self.born).as_millis();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        self.heard.store(since, Ordering::Relaxed);
    }

    /// When the host will have been silent beyond its keep-alive timeout, if
    /// nothing is heard of it.
    pub fn silent_at(&self) -> Option<Instant> {
        let timeout = self.keep_alive.load(Ordering::Relaxed);
        let granularity = Duration::from_millis(100) * u32::from(KEEP_ALIVE_GRANULARITY);
        let heard = self.born + Duration::from_millis(self.heard.load(Ordering::Relaxed));
        (timeout != 0).then(|| heard + Duration::from_millis(timeout.into()) + granularity)
    }

    /// Whether the host has been silent for longer than its keep-alive timeout.
    pub fn is_silent(&self, now: Instant) -> bool {
        self.silent_at().is_some_and(|at| at <= now)
    }

    /// CC.
    pub fn configuration(&self) -> u32 {
        self.state().configuration
    }

    /// CSTS.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    fn set_status(&self, clear: u32, set: u32) {
        let change = |status| Some(status & !clear | set);
        // It cannot fail: the change is always some.
        let _ = self
            .status
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
    }

    /// Whether I/O queues may be connected and used.
    pub fn enabled(&self) -> bool {
        self.status() & CSTS_READY != 0
    }

    /// Sets CC. True: the host has asked for a shutdown, which begins now.
    ///
    /// # Errors
    /// A command set, page or entry size that is not this controller's; an
    /// association that was disabled is not enabled again.
    pub fn configure(&self, value: u32) -> Result<bool, Status> {
        let mut state = self.state();
        let (was, enable) = (state.configuration & CC_ENABLE != 0, value & CC_ENABLE != 0);
        if enable && !was {
            let (sets, page, arbitration) = (value >> 4 & 7, value >> 7 & 15, value >> 11 & 7);
            let (submission, completion) = (value >> 16 & 15, value >> 20 & 15);
            if (sets, page, arbitration) != (0, 0, 0) || (submission, completion) != (6, 4) {
                return Err(Status::INVALID_FIELD);
            }
            if self.gate.is_closed() {
                return Err(Status::COMMAND_SEQUENCE_ERROR);
            }
            self.set_status(0, CSTS_READY);
        }
        let shut_down =
            value & CC_SHUTDOWN != 0 && state.configuration & CC_SHUTDOWN == 0 && (was || enable);
        state.configuration = value;
        if was && !enable {
            self.gate.close();
            self.set_status(CSTS_READY, 0);
        }
        if shut_down {
            self.set_status(0, CSTS_SHUTDOWN_RUNNING);
        } else if value & CC_SHUTDOWN != 0 && self.status() & (0b11 << 2) == 0 {
            // Never enabled, so nothing to flush.
            self.set_status(0, CSTS_SHUTDOWN_COMPLETE);
        }
        Ok(shut_down)
    }

    /// What a shutdown had to make durable is durable.
    pub fn shutdown_complete(&self) {
        self.set_status(0b11 << 2, CSTS_SHUTDOWN_COMPLETE);
    }

    /// Adds I/O queue `id`, or, without the claim, only looks whether that may be:
    /// who must prove itself has an id when it has done so.
    ///
    /// # Errors
    /// An association that is not enabled or has ended; an id that was not
    /// granted; a queue that was connected before, since the host would replay
    /// what the first has not answered.
    pub fn connect_queue(&self, id: u16, claim: bool) -> Result<(), Status> {
        let mut state = self.state();
        if !self.enabled() || self.gate.is_closed() {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        if id > state.io_queues {
            return Err(Status::CONNECT_INVALID_PARAMETERS);
        }
        if state.connected.contains(&id) {
            return Err(Status::QUEUE_IN_USE);
        }
        if claim {
            state.connected.insert(id);
        }
        Ok(())
    }

    /// I/O queues granted.
    pub fn io_queues(&self) -> u16 {
        self.state().io_queues
    }

    /// Grants up to `wanted` I/O queues and returns how many.
    ///
    /// # Errors
    /// When I/O queues are connected already.
    pub fn grant_io_queues(&self, wanted: u32) -> Result<u16, Status> {
        let mut state = self.state();
        if !state.connected.is_empty() {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        let most = u32::from(MAX_IO_QUEUES);
        state.io_queues = u16::try_from(wanted.clamp(1, most)).unwrap_or(MAX_IO_QUEUES);
        Ok(state.io_queues)
    }

    /// Whether writes may stay volatile until a flush.
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Relaxed)
    }
    /// Turns the volatile write cache on or off. Off: every write is durable when answered.
    pub fn set_write_cache(&self, on: bool) {
        self.write_cache.store(on, Ordering::Relaxed);
    }
    /// Milliseconds; 0: none.
    pub fn keep_alive_timeout(&self) -> u32 {
        self.keep_alive.load(Ordering::Relaxed)
    }
    /// Milliseconds; 0: none.
    pub fn set_keep_alive_timeout(&self, timeout: u32) {
        self.keep_alive.store(timeout, Ordering::Relaxed);
    }
    /// Whether the host understands command retry delays.
    pub fn retry_delays(&self) -> bool {
        self.state().retry_delays
    }
    /// Sets whether the host understands command retry delays.
    pub fn set_retry_delays(&self, on: bool) {
        self.state().retry_delays = on;
    }
    /// The events that the host wants.
    pub fn events_enabled(&self) -> u32 {
        self.state().notices
    }
    /// Sets the events that the host wants.
    pub fn enable_events(&self, notices: u32) {
        self.state().notices = notices;
    }

    /// Keeps an Asynchronous Event Request until there is an event.
    ///
    /// # Errors
    /// When as many wait as may.
    pub fn request_event(&self, command: u16) -> Result<(), Status> {
        let mut state = self.state();
        if state.requests.len() >= usize::from(EVENT_REQUESTS) {
            return Err(Status::ASYNC_EVENT_LIMIT_EXCEEDED);
        }
        state.requests.push_back(command);
        Ok(())
    }

    /// Forgets a request that was aborted. False: there is none such.
    pub fn cancel_event(&self, command: u16) -> bool {
        let mut state = self.state();
        let before = state.requests.len();
        state.requests.retain(|request| *request != command);
        state.requests.len() < before
    }

    /// Something has happened: the host is told when it listens and has read
    /// what it was told before of the same.
    pub fn announce(&self, event: Event) {
        let mut state = self.state();
        state.changed |= event == Event::Namespace;
        state.due |= event.bit();
        drop(state);
        self.wake();
    }

    /// Whether the namespace has changed since the host last read that log.
    pub fn namespace_changed(&self) -> bool {
        self.state().changed
    }

    /// The host has read the log of such events; `more` is whether there is
    /// something in it still.
    pub fn has_read(&self, event: Event, more: bool) {
        let mut state = self.state();
        state.changed &= event != Event::Namespace;
        state.masked &= !event.bit();
        state.due &= !event.bit();
        if more {
            state.due |= event.bit();
        }
    }

    /// An event that can be delivered: the request it answers, and its result.
    pub fn take_event(&self) -> Option<(u16, u32)> {
        let mut state = self.state();
        let ready = state.due & !state.masked;
        let notices = state.notices;
        let event = Event::ALL
            .into_iter()
            .find(|event| ready & event.bit() != 0 && event.wanted(notices))?;
        let command = state.requests.pop_front()?;
        state.due &= !event.bit();
        state.masked |= event.bit();
        Some((command, event.result()))
    }

    /// The host has asked for the namespaces and was told that there are none.
    pub fn saw_no_namespace(&self) {
        self.state().saw_no_namespace = true;
    }

    /// Whether the host knows that the namespace is gone.
    pub fn knows_the_end(&self) -> bool {
        self.state().saw_no_namespace
    }
}

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

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::identify::{EVENT_REQUESTS, KEEP_ALIVE_GRANULARITY, NAMESPACE_NOTICES};
use super::status::Status;
use super::subsystem::Subsystem;
use crate::block::gate::Gate;

/// I/O queues, so connections, that an association may have.
pub const MAX_IO_QUEUES: u16 = 16;

const CC_ENABLE: u32 = 1;
const CC_SHUTDOWN: u32 = 0b11 << 14;
const CSTS_READY: u32 = 1;
const CSTS_SHUTDOWN_RUNNING: u32 = 0b01 << 2;
const CSTS_SHUTDOWN_COMPLETE: u32 = 0b10 << 2;
/// Notice, namespace attribute changed, log page 04.
const NAMESPACE_CHANGED: u32 = 0x0004_0002;

/// One association's state.
pub struct Controller {
    id: u16,
    subsystem: Arc<Subsystem>,
    gate: Arc<Gate>,
    state: Mutex<State>,
    /// Told when an event may be deliverable.
    events: Notify,
    ended: watch::Sender<bool>,
}

struct State {
    configuration: u32,
    status: u32,
    /// Milliseconds; 0: none.
    keep_alive: u32,
    heard: Instant,
    write_cache: bool,
    io_queues: u16,
    connected: BTreeSet<u16>,
    notices: u32,
    requests: VecDeque<u16>,
    changed: bool,
    /// Whether a notice was sent and the log was not read since.
    masked: bool,
    due: bool,
    saw_no_namespace: bool,
}

impl Controller {
    /// A new association of `subsystem`. `keep_alive` in milliseconds, 0 for none.
    pub fn new(id: u16, subsystem: Arc<Subsystem>, keep_alive: u32) -> Arc<Self> {
        let state = State {
            configuration: 0,
            status: 0,
            keep_alive,
            heard: Instant::now(),
            write_cache: true,
            io_queues: MAX_IO_QUEUES,
            connected: BTreeSet::new(),
            notices: 0,
            requests: VecDeque::new(),
            changed: false,
            masked: false,
            due: false,
            saw_no_namespace: false,
        };
        Arc::new(Self {
            id,
            subsystem,
            gate: Gate::new(),
            state: Mutex::new(state),
            events: Notify::new(),
            ended: watch::Sender::new(false),
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

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if some did, each field would still be sound.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Ends the association: no command enters, and its connections close.
    pub fn end(&self) {
        self.gate.close();
        self.ended.send_replace(true);
    }

    /// Waits until the association has ended.
    pub async fn ended(&self) {
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// The host has sent something: it lives.
    pub fn heard(&self) {
        self.state().heard = Instant::now();
    }

    /// Waits until the host has been silent for longer than its keep-alive timeout.
    pub async fn silent(&self) {
        let granularity = Duration::from_millis(100) * u32::from(KEEP_ALIVE_GRANULARITY);
        loop {
            let deadline = {
                let state = self.state();
                let timeout = Duration::from_millis(state.keep_alive.into());
                (state.keep_alive != 0).then(|| state.heard + timeout + granularity)
            };
            match deadline {
                Some(deadline) if deadline <= Instant::now() => return,
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                // The host may set a timeout later.
                None => tokio::time::sleep(granularity).await,
            }
        }
    }

    /// CC.
    pub fn configuration(&self) -> u32 {
        self.state().configuration
    }

    /// CSTS.
    pub fn status(&self) -> u32 {
        self.state().status
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
            state.status |= CSTS_READY;
        }
        let shut_down =
            value & CC_SHUTDOWN != 0 && state.configuration & CC_SHUTDOWN == 0 && (was || enable);
        state.configuration = value;
        if was && !enable {
            self.gate.close();
            state.status &= !CSTS_READY;
        }
        if shut_down {
            state.status |= CSTS_SHUTDOWN_RUNNING;
        } else if value & CC_SHUTDOWN != 0 && state.status & (0b11 << 2) == 0 {
            // Never enabled, so nothing to flush.
            state.status |= CSTS_SHUTDOWN_COMPLETE;
        }
        Ok(shut_down)
    }

    /// What a shutdown had to make durable is durable.
    pub fn shutdown_complete(&self) {
        let mut state = self.state();
        state.status = state.status & !(0b11 << 2) | CSTS_SHUTDOWN_COMPLETE;
    }

    /// Adds I/O queue `id`.
    ///
    /// # Errors
    /// An association that is not enabled or has ended; an id that was not
    /// granted; a queue that was connected before, since the host would replay
    /// what the first has not answered.
    pub fn connect_queue(&self, id: u16) -> Result<(), Status> {
        let mut state = self.state();
        if state.status & CSTS_READY == 0 || self.gate.is_closed() {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        if id > state.io_queues {
            return Err(Status::CONNECT_INVALID_PARAMETERS);
        }
        if state.connected.insert(id) {
            Ok(())
        } else {
            Err(Status::COMMAND_SEQUENCE_ERROR)
        }
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
        self.state().write_cache
    }
    /// Turns the volatile write cache on or off. Off: every write is durable when answered.
    pub fn set_write_cache(&self, on: bool) {
        self.state().write_cache = on;
    }
    /// Milliseconds; 0: none.
    pub fn keep_alive_timeout(&self) -> u32 {
        self.state().keep_alive
    }
    /// Milliseconds; 0: none.
    pub fn set_keep_alive_timeout(&self, timeout: u32) {
        self.state().keep_alive = timeout;
    }
    /// The events that the host wants.
    pub fn events_enabled(&self) -> u32 {
        self.state().notices
    }
    /// Sets the events that the host wants.
    pub fn enable_events(&self, notices: u32) {
        self.state().notices = notices;
        self.events.notify_one();
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
        self.events.notify_one();
        Ok(())
    }

    /// The namespace has another size, or is gone: the host is told when it
    /// listens and has read what it was told before.
    pub fn announce_change(&self) {
        let mut state = self.state();
        state.changed = true;
        state.due = true;
        self.events.notify_one();
    }

    /// Whether the namespace has changed since the host last read that log.
    pub fn namespace_changed(&self) -> bool {
        self.state().changed
    }

    /// The host has read the log of changes.
    pub fn changes_read(&self) {
        let mut state = self.state();
        state.changed = false;
        state.masked = false;
        state.due = false;
        self.events.notify_one();
    }

    /// Waits for an event that can be delivered: the request it answers, and its result.
    pub async fn event(&self) -> (u16, u32) {
        loop {
            if let Some(event) = self.take_event() {
                return event;
            }
            self.events.notified().await;
        }
    }

    fn take_event(&self) -> Option<(u16, u32)> {
        let mut state = self.state();
        if !state.due || state.masked || state.notices & NAMESPACE_NOTICES == 0 {
            return None;
        }
        let command = state.requests.pop_front()?;
        (state.due, state.masked) = (false, true);
        Some((command, NAMESPACE_CHANGED))
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

//! A subsystem: one export as the protocol sees it, and who is let in.
//!
//! It has one association at a time. A newer one ends the older one at once,
//! and is admitted only when every command of the older one has settled: its
//! host replays what was not answered, and a command that is still on its way
//! to the disk would land over the replay and over what follows it.
//!
//! An association belongs to its connections, and knows its subsystem; the
//! subsystem keeps only what outlives it, the gate that its commands are in.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::auth::Secrets;
use super::controller::{Controller, Event};
use super::discovery;
use super::reservation;
use super::reserve::Reservations;
use super::status::Status;
use crate::block::BlockDevice;
use crate::block::gate::Gate;

/// How long a new association waits for the commands of the one before it,
/// ahead of being answered busy.
pub const TAKEOVER_WAIT: Duration = Duration::from_secs(1);
/// How often it is looked whether they have settled.
pub const LOOK: Duration = Duration::from_millis(2);
/// The largest controller id for a host (FFF0 and above are reserved).
const LAST_CONTROLLER_ID: u16 = 0xffef;

/// The one host that may connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Its NQN.
    pub nqn: String,
    /// Its identifier.
    pub id: Uuid,
}

/// What is known of a subsystem NQN.
pub enum Found {
    /// It is served.
    Live(Arc<Subsystem>),
    /// The discovery service.
    Discovery(Arc<discovery::Discovery>),
    /// It was served and never will be again.
    Closed,
    /// Nothing; it may be known later.
    Unknown,
}

/// Finds subsystems by NQN.
pub trait Directory: Send + Sync + 'static {
    /// What is known of `subsystem`.
    fn find(&self, subsystem: &str) -> Found;
}

/// A Connect that is refused: the status, and the result that explains it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The status.
    pub status: Status,
    /// For invalid parameters: where the parameter is.
    pub result: u32,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { status, result: 0 }
    }
}

/// What a subsystem is made of.
pub struct Parts {
    /// Its NQN.
    pub nqn: String,
    /// Its namespace's UUID.
    pub namespace: Uuid,
    /// The one host that may connect.
    pub host: Host,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What is served.
    pub device: Arc<dyn BlockDevice>,
    /// The reservations of its volume.
    pub reservations: Arc<Reservations>,
    /// What its host must prove; none: its name is enough.
    pub secrets: Option<Secrets>,
    /// For a discovery controller: what it shows. It has no namespace then.
    pub discovery: Option<discovery::View>,
}

/// One export as the protocol sees it.
pub struct Subsystem {
    parts: Parts,
    gate: Arc<Gate>,
    /// What reservations keep the host from: [`NO_READ`], [`NO_WRITE`].
    barred: AtomicU8,
    reservations_log: Mutex<ReservationLog>,
    /// Set when the namespace is gone.
    gone: AtomicBool,
    association: Mutex<Association>,
    connections: AtomicU32,
    /// Microseconds since 1970; 0: never.
    last_write: AtomicU64,
}

/// Reads are refused by a reservation.
const NO_READ: u8 = 1;
/// Writes are refused by a reservation.
const NO_WRITE: u8 = 2;
/// Notifications that are kept for a host; beyond them the oldest are lost.
const RESERVATION_NOTICES: usize = 64;

/// What the host was not told yet of reservations (log page 80h).
#[derive(Default)]
struct ReservationLog {
    /// Counts the notifications; the first is 1.
    count: u64,
    notices: VecDeque<(u64, reservation::Notice)>,
    /// Which kinds are not noted (feature 82h).
    mask: u32,
}

#[derive(Default)]
struct Association {
    current: Option<Current>,
    last_id: u16,
}

/// The association there is, or was last.
struct Current {
    id: u16,
    gate: Arc<Gate>,
    controller: Weak<Controller>,
}

impl Current {
    fn new(controller: &Arc<Controller>) -> Self {
        Self {
            id: controller.id(),
            gate: Arc::clone(controller.gate()),
            controller: Arc::downgrade(controller),
        }
    }

    fn end(&self) {
        // Without a controller nobody is left to enter, and nobody to be told.
        match self.controller.upgrade() {
            Some(controller) => controller.end(),
            None => _ = self.gate.close(),
        }
    }
}

/// A connection's place in its subsystem's count.
pub struct Counted(Arc<Subsystem>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Subsystem {
    /// A subsystem that serves a device to a host.
    pub fn new(parts: Parts) -> Arc<Self> {
        let subsystem = Arc::new(Self {
            parts,
            gate: Gate::new(),
            barred: AtomicU8::new(0),
            reservations_log: Mutex::default(),
            gone: AtomicBool::new(false),
            association: Mutex::default(),
            connections: AtomicU32::new(0),
            last_write: AtomicU64::new(0),
        });
        subsystem.parts.reservations.join(&subsystem);
        subsystem
    }

    /// Its NQN.
    pub fn nqn(&self) -> &str {
        &self.parts.nqn
    }
    /// Its namespace's UUID.
    pub fn namespace(&self) -> Uuid {
        self.parts.namespace
    }
    /// The one host that may connect.
    pub fn host(&self) -> &Host {
        &self.parts.host
    }
    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.parts.read_only
    }
    /// What is served.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.parts.device
    }
    /// The reservations of its volume.
    pub fn reservations(&self) -> &Arc<Reservations> {
        &self.parts.reservations
    }

    /// What its host must prove.
    pub fn secrets(&self) -> Option<&Secrets> {
        self.parts.secrets.as_ref()
    }
    /// What it shows, if it is a discovery controller's.
    pub fn discovery(&self) -> Option<&discovery::View> {
        self.parts.discovery.as_ref()
    }

    /// Sets what reservations let the host do: (read, write).
    pub fn set_access(&self, (read, write): (bool, bool)) {
        let barred = if read { 0 } else { NO_READ } | if write { 0 } else { NO_WRITE };
        self.barred.store(barred, Ordering::Release);
    }

    /// Whether a reservation keeps the host from reading, or from writing.
    pub fn bars(&self, write: bool) -> bool {
        let what = if write { NO_WRITE } else { NO_READ };
        self.barred.load(Ordering::Acquire) & what != 0
    }

    fn reservations_log(&self) -> MutexGuard<'_, ReservationLog> {
        // No code panics while it holds the lock.
        self.reservations_log
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Notes what happened to the host's reservations, and tells it that there is something.
    pub fn note_reservation(&self, notice: reservation::Notice) {
        let mut log = self.reservations_log();
        if log.mask & 1 << notice as u32 != 0 {
            return;
        }
        log.count += 1;
        let number = log.count;
        log.notices.push_back((number, notice));
        if log.notices.len() > RESERVATION_NOTICES {
            log.notices.pop_front();
        }
        drop(log);
        if let Some(controller) = self.current() {
            controller.announce(Event::Reservation);
        }
    }

    /// The oldest notification that was not read: its number, what it is, and
    /// how many there are in all. It is forgotten, unless it is to be retained.
    pub fn reservation_notice(&self, retain: bool) -> Option<(u64, reservation::Notice, usize)> {
        let mut log = self.reservations_log();
        let all = log.notices.len();
        let oldest = log.notices.front().copied();
        if !retain {
            log.notices.pop_front();
        }
        oldest.map(|(number, notice)| (number, notice, all))
    }

    /// Which kinds of notifications are not noted: a bit for each number.
    pub fn reservation_mask(&self) -> u32 {
        self.reservations_log().mask
    }
    /// Sets which kinds of notifications are not noted.
    pub fn set_reservation_mask(&self, mask: u32) {
        self.reservations_log().mask = mask;
    }
    /// The export's gate. Once it is closed every Connect is refused for good.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
    /// Connections now.
    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::Acquire)
    }

    /// Counts a connection until the returned value is dropped.
    pub fn count(self: &Arc<Self>) -> Counted {
        self.connections.fetch_add(1, Ordering::AcqRel);
        Counted(Arc::clone(self))
    }

    /// When a command that writes was last let in.
    pub fn last_write(&self) -> Option<SystemTime> {
        match self.last_write.load(Ordering::Acquire) {
            0 => None,
            micros => Some(UNIX_EPOCH + Duration::from_micros(micros)),
        }
    }

    /// Notes that a command that writes was let in.
    pub fn note_write(&self) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let micros = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        self.last_write.fetch_max(micros, Ordering::AcqRel);
    }

    fn association(&self) -> MutexGuard<'_, Association> {
        // No code panics while it holds the lock.
        self.association
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The association now, if it has connections.
    pub fn current(&self) -> Option<Arc<Controller>> {
        let association = self.association();
        association.current.as_ref()?.controller.upgrade()
    }

    /// Whether the namespace is gone.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Takes the namespace away and tells the host so. The gate must be closed before.
    pub fn take_away(&self) {
        self.gone.store(true, Ordering::Release);
        if let Some(controller) = self.current() {
            controller.announce(Event::Namespace);
        }
    }

    /// Ends the association, if there is one. Its gate: whether its commands
    /// have settled.
    pub fn disconnect(&self) -> Option<Arc<Gate>> {
        let association = self.association();
        let current = association.current.as_ref()?;
        current.end();
        Some(Arc::clone(&current.gate))
    }

    /// Admits a new association, in place of the one there is, which ends.
    /// None: commands of that one are unsettled, so it is to be asked again.
    ///
    /// # Errors
    /// Another host, or a closed gate: for good.
    pub fn admit(
        self: &Arc<Self>,
        host: &Host,
        keep_alive: u32,
        now: Instant,
    ) -> Result<Option<Arc<Controller>>, Refusal> {
        self.check(host)?;
        let mut association = self.association();
        if self.secrets().is_some() {
            // It becomes the association when it has proved itself, not before.
            return Ok(Some(self.new_controller(&mut association, keep_alive, now)));
        }
        if !self.older_is_gone(&association) {
            return Ok(None);
        }
        if self.gate.is_closed() {
            return Err(Status::CONNECT_INVALID_HOST.into());
        }
        let controller = self.new_controller(&mut association, keep_alive, now);
        association.current = Some(Current::new(&controller));
        Ok(Some(controller))
    }

    fn new_controller(
        self: &Arc<Self>,
        association: &mut Association,
        keep_alive: u32,
        now: Instant,
    ) -> Arc<Controller> {
        let taken = association.current.as_ref().map(|current| current.id);
        association.last_id = association.last_id % LAST_CONTROLLER_ID + 1;
        if taken == Some(association.last_id) {
            association.last_id = association.last_id % LAST_CONTROLLER_ID + 1;
        }
        Controller::new(association.last_id, Arc::clone(self), keep_alive, now)
    }

    /// Ends the association there is; whether none of its commands is unsettled.
    /// Looked at under the lock: of several at once each sees the one before.
    fn older_is_gone(&self, association: &Association) -> bool {
        association.current.as_ref().is_none_or(|older| {
            if !older.gate.is_closed() {
                tracing::debug!(
                    subsystem = self.nqn(),
                    controller = older.id,
                    "a new association takes over"
                );
            }
            older.end();
            older.gate.inside() == 0
        })
    }

    /// Makes a controller whose host has proved itself the association, in
    /// place of the one there is. It waits for that one's commands.
    ///
    /// # Errors
    /// They have not settled in time, the export's gate is closed, or the
    /// controller has ended meanwhile.
    pub fn install(&self, controller: &Arc<Controller>) -> Result<(), Status> {
        let until = Instant::now() + TAKEOVER_WAIT;
        loop {
            let mut association = self.association();
            if controller.has_ended() {
                return Err(Status::COMMAND_SEQUENCE_ERROR);
            }
            let current = association.current.as_ref();
            if current.is_some_and(|current| Arc::ptr_eq(&current.gate, controller.gate())) {
                return Ok(());
            }
            if self.gate.is_closed() {
                return Err(Status::CONNECT_INVALID_HOST);
            }
            if self.older_is_gone(&association) {
                association.current = Some(Current::new(controller));
                return Ok(());
            }
            drop(association);
            if Instant::now() >= until {
                return Err(Status::CONTROLLER_BUSY);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Finds the association that an I/O queue belongs to.
    ///
    /// # Errors
    /// Another host, a closed gate, or a controller id that is not the association's.
    pub fn join(&self, host: &Host, controller: u16) -> Result<Arc<Controller>, Refusal> {
        self.check(host)?;
        match self.current() {
            Some(current) if current.id() == controller => Ok(current),
            _ => Err(Refusal {
                status: Status::CONNECT_INVALID_PARAMETERS,
                result: 1 << 16 | 16,
            }),
        }
    }

    fn check(&self, host: &Host) -> Result<(), Refusal> {
        if self.gate.is_closed() || *host != self.parts.host {
            return Err(Status::CONNECT_INVALID_HOST.into());
        }
        Ok(())
    }
}

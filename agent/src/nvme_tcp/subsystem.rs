//! A subsystem: one export as the protocol sees it, and who is let in.
//!
//! It has one association at a time. A newer one ends the older one at once,
//! and is admitted only when every command of the older one has settled: its
//! host replays what was not answered, and a command that is still on its way
//! to the disk would land over the replay and over what follows it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::controller::Controller;
use super::status::Status;
use crate::block::BlockDevice;
use crate::block::gate::Gate;

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

/// One export as the protocol sees it.
pub struct Subsystem {
    nqn: String,
    namespace: Uuid,
    host: Host,
    read_only: bool,
    device: Arc<dyn BlockDevice>,
    gate: Arc<Gate>,
    /// Set when the namespace is gone.
    gone: AtomicBool,
    association: Mutex<Association>,
    connections: AtomicU32,
    /// Microseconds since 1970; 0: never.
    last_write: AtomicU64,
}

#[derive(Default)]
struct Association {
    current: Option<Arc<Controller>>,
    last_id: u16,
}

/// A connection's place in its subsystem's count.
pub struct Counted(Arc<Subsystem>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Subsystem {
    /// A subsystem that serves `device` to `host`.
    pub fn new(
        nqn: String,
        namespace: Uuid,
        host: Host,
        read_only: bool,
        device: Arc<dyn BlockDevice>,
    ) -> Arc<Self> {
        Arc::new(Self {
            nqn,
            namespace,
            host,
            read_only,
            device,
            gate: Gate::new(),
            gone: AtomicBool::new(false),
            association: Mutex::default(),
            connections: AtomicU32::new(0),
            last_write: AtomicU64::new(0),
        })
    }

    /// Its NQN.
    pub fn nqn(&self) -> &str {
        &self.nqn
    }
    /// Its namespace's UUID.
    pub fn namespace(&self) -> Uuid {
        self.namespace
    }
    /// The one host that may connect.
    pub fn host(&self) -> &Host {
        &self.host
    }
    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
    /// What is served.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
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

    /// The association now, if there is one.
    pub fn current(&self) -> Option<Arc<Controller>> {
        self.association().current.clone()
    }

    /// Whether the namespace is gone.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Takes the namespace away and tells the host so. The gate must be closed before.
    pub fn take_away(&self) {
        self.gone.store(true, Ordering::Release);
        if let Some(controller) = self.current() {
            controller.announce_change();
        }
    }

    /// Ends the association, if there is one.
    pub fn disconnect(&self) {
        if let Some(controller) = self.current() {
            controller.end();
        }
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
        // Looked at under the lock: of several at once each sees the one before.
        if let Some(older) = &association.current {
            if !older.has_ended() {
                tracing::info!(
                    subsystem = %self.nqn, controller = older.id(), "a new association takes over"
                );
            }
            older.end();
            if older.gate().inside() > 0 {
                return Ok(None);
            }
        }
        if self.gate.is_closed() {
            return Err(Status::CONNECT_INVALID_HOST.into());
        }
        association.last_id = association.last_id % LAST_CONTROLLER_ID + 1;
        let id = association.last_id;
        let controller = Controller::new(id, Arc::clone(self), keep_alive, now);
        association.current = Some(Arc::clone(&controller));
        Ok(Some(controller))
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
        if self.gate.is_closed() || *host != self.host {
            return Err(Status::CONNECT_INVALID_HOST.into());
        }
        Ok(())
    }
}

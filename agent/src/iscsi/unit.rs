//! The logical unit: the device, its settings and reservations, and the
//! sessions that use it.
//!
//! COMPARE AND WRITE is atomic against every other write of the unit. Plain
//! writes take no lock for that: they are counted, and while an exclusive one
//! is about, new writes take the lock instead and those counted are waited for.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::reservations::Reservations;
use super::scsi::inquiry::Identity;
use super::scsi::mode::Settings;
use super::scsi::reservation::Keeper;
use super::scsi::sense::Sense;
use super::session::Session;
use crate::block::gate::Pass;
use crate::block::{BLOCK, BlockDevice};

/// How often an exclusive write looks whether plain ones have ended.
const LOOK: Duration = Duration::from_micros(100);

/// The logical unit.
pub struct Unit {
    device: Arc<dyn BlockDevice>,
    identity: Identity,
    read_only: bool,
    settings: AtomicU8,
    /// Sessions that use it, and ended ones whose commands have not settled.
    pub(super) nexuses: Mutex<Vec<Arc<Session>>>,
    pub(super) reservations: Reservations,
    /// Held by writes that are not plain; exclusively by exclusive ones.
    writing: RwLock<()>,
    /// Exclusive writes that are under way or wait.
    exclusive: AtomicU32,
    /// Microseconds since 1970; 0: never.
    last_write: AtomicU64,
}

const DESCRIPTOR_SENSE: u8 = 1;
const WRITE_PROTECT: u8 = 2;

impl Unit {
    /// A unit on `device`. Reservations are kept by `keeper`, if there is one.
    ///
    /// # Errors
    /// When what was kept of reservations cannot be read.
    pub fn new(
        device: Arc<dyn BlockDevice>,
        identity: Identity,
        read_only: bool,
        keeper: Option<Box<dyn Keeper>>,
    ) -> Result<Arc<Self>, String> {
        Ok(Arc::new(Self {
            device,
            identity,
            read_only,
            settings: AtomicU8::new(0),
            nexuses: Mutex::default(),
            reservations: Reservations::new(keeper)?,
            writing: RwLock::default(),
            exclusive: AtomicU32::new(0),
            last_write: AtomicU64::new(0),
        }))
    }

    /// What is read and written.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether writes are refused for good.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Its size now, in blocks.
    pub fn blocks(&self) -> u64 {
        self.device.size().0 / BLOCK
    }

    /// The settings now.
    pub fn settings(&self) -> Settings {
        let bits = self.settings.load(Ordering::Acquire);
        Settings {
            descriptor_sense: bits & DESCRIPTOR_SENSE != 0,
            write_protect: bits & WRITE_PROTECT != 0,
        }
    }

    fn set(&self, settings: Settings) {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        let bits = bit(settings.descriptor_sense, DESCRIPTOR_SENSE)
            | bit(settings.write_protect, WRITE_PROTECT);
        self.settings.store(bits, Ordering::Release);
    }

    /// Changes the settings, and tells every session but this one.
    pub fn change(&self, settings: Settings, by: &Session) {
        if self.settings() != settings {
            self.set(settings);
            for session in self.sessions() {
                if !std::ptr::eq(&raw const *session, by) {
                    session.attention(Sense::MODE_CHANGED);
                }
            }
        }
    }

    /// Why it may not be written to, if it may not.
    pub fn write_protected(&self) -> Option<Sense> {
        if self.read_only {
            Some(Sense::WRITE_PROTECTED)
        } else {
            let protected = self.settings().write_protect;
            protected.then_some(Sense::SOFTWARE_WRITE_PROTECTED)
        }
    }

    /// The sessions that use it.
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        let sessions = self.nexuses.lock();
        sessions.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its size has changed: initiators are told.
    pub fn announce_resize(&self) {
        self.sessions()
            .iter()
            .for_each(|session| session.announce_resize());
    }

    /// A session has ended: what it reserved is free, and it is forgotten as
    /// soon as its commands have settled.
    pub fn leave(&self, session: &Session) {
        session.end();
        self.reservations.nexus_lost(session.tsih());
        let mut sessions = self.nexuses.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|other| {
            !std::ptr::eq(&raw const **other, session) || other.gate().inside() > 0
        });
    }

    /// Resets the unit: reservations of RESERVE end, settings are the default
    /// ones, and every session is told.
    pub fn reset(&self) {
        self.reservations.reset();
        self.set(Settings::default());
        for session in self.sessions() {
            session.attention(Sense::RESET);
        }
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

    /// Begins a write that takes no lock and lasts as long as the pass is kept;
    /// none: it must be made by [`Self::beside`].
    pub fn begin_plain_write(&self, session: &Session) -> Option<Pass> {
        let pass = session.writes().enter()?;
        // Counted first, looked at second; the exclusive one does it the other
        // way round, so at least one of the two sees the other.
        fence(Ordering::SeqCst);
        (self.exclusive.load(Ordering::SeqCst) == 0).then_some(pass)
    }

    /// Does something that writes, at a time when nothing exclusive is done.
    pub fn beside<T>(&self, act: impl FnOnce() -> T) -> T {
        let _shared = self.writing.read().unwrap_or_else(PoisonError::into_inner);
        act()
    }

    /// Claims to write alone, from now on: writes that begin later are not
    /// plain, so that those to be waited for are never behind the claim's call.
    pub fn claim(self: &Arc<Self>) -> Claim {
        self.exclusive.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        Claim(Arc::clone(self))
    }
}

/// A claim to write alone, until it is dropped.
pub struct Claim(Arc<Unit>);

impl Claim {
    /// Does something at a time when nobody else writes.
    pub fn alone<T>(&self, act: impl FnOnce() -> T) -> T {
        let unit = &self.0;
        let _locked = unit.writing.write().unwrap_or_else(PoisonError::into_inner);
        let written = |session: &Arc<Session>| session.writes().inside() > 0;
        while unit.sessions().iter().any(written) {
            std::thread::sleep(LOOK);
        }
        act()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.exclusive.fetch_sub(1, Ordering::SeqCst);
    }
}

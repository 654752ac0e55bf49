//! Who may use a unit: its persistent reservations, and the older kind that
//! RESERVE makes and that ends with its session (SPC-2, 5.5).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::scsi::command::Command;
use super::scsi::reservation::{Effects, Keeper, Order, Refused, State};
use super::session::Session;

/// A unit's reservations.
pub struct Reservations {
    /// Whether there is one of either kind, without the lock.
    any: AtomicBool,
    now: Mutex<Now>,
    /// Held over a change and its keeping, which may wait for a disk.
    changing: Mutex<()>,
    keeper: Option<Box<dyn Keeper>>,
}

#[derive(Default)]
struct Now {
    state: State,
    /// The session that holds it by RESERVE.
    reserved: Option<u16>,
}

/// Why an order was not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It is refused.
    Refused(Refused),
    /// It could not be kept, and so is not in force.
    NotKept(String),
}

impl Reservations {
    /// Those that `keeper` has kept.
    ///
    /// # Errors
    /// When it cannot read them.
    pub fn new(keeper: Option<Box<dyn Keeper>>) -> Result<Self, String> {
        let kept = keeper.as_ref().map(|keeper| keeper.load()).transpose()?;
        let now = Now {
            state: kept.flatten().unwrap_or_default(),
            reserved: None,
        };
        Ok(Self {
            any: AtomicBool::new(now.state.held.is_some()),
            now: Mutex::new(now),
            changing: Mutex::default(),
            keeper,
        })
    }

    /// Whether states can be kept over a restart.
    pub fn persistent(&self) -> bool {
        self.keeper.is_some()
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, now: &Now) {
        let any = now.reserved.is_some() || now.state.held.is_some();
        self.any.store(any, Ordering::Release);
    }

    /// Whether a session may have this command carried out.
    pub fn allow(&self, session: &Session, command: &Command) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return true;
        }
        let now = self.now();
        if now.reserved.is_some_and(|holder| holder != session.tsih()) {
            return command.always_allowed() || matches!(command, Command::Release);
        }
        now.state.allows(session.nexus(), command.usage())
    }

    /// RESERVE; false: it conflicts.
    pub fn reserve(&self, session: &Session) -> bool {
        let mut now = self.now();
        let free = now.reserved.is_none_or(|holder| holder == session.tsih());
        if free && !now.state.is_used() {
            now.reserved = Some(session.tsih());
            self.note(&now);
            true
        } else {
            false
        }
    }

    /// RELEASE: of nobody else's reservation; false: it conflicts.
    pub fn release(&self, session: &Session) -> bool {
        self.nexus_lost(session.tsih());
        !self.now().state.is_used()
    }

    /// What a session reserved is free.
    pub fn nexus_lost(&self, tsih: u16) {
        let mut now = self.now();
        if now.reserved == Some(tsih) {
            now.reserved = None;
            self.note(&now);
        }
    }

    /// The unit was reset.
    pub fn reset(&self) {
        let mut now = self.now();
        now.reserved = None;
        self.note(&now);
    }

    /// The persistent reservations now.
    pub fn state(&self) -> State {
        self.now().state.clone()
    }

    /// Carries an order out. It may wait for a disk.
    ///
    /// # Errors
    /// When it is refused or cannot be kept; then nothing has changed.
    pub fn order(&self, session: &Session, order: &Order) -> Result<Effects, Failure> {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.state();
        let followed = before.apply(session.nexus(), order);
        let (next, effects) = followed.map_err(Failure::Refused)?;
        if let Some(keeper) = &self.keeper
            && (next.persists || before.persists)
        {
            let kept = keeper.keep(next.persists.then_some(&next));
            kept.map_err(Failure::NotKept)?;
        }
        let mut now = self.now();
        now.state = next;
        self.note(&now);
        Ok(effects)
    }
}

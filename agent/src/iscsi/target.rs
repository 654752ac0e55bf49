//! A target: one export as iSCSI sees it, and who is let in.
//!
//! A session that comes again, or any session where a target has one at most,
//! ends the one before it at once, and is admitted only when every command of
//! that one has settled: its initiator replays what was not answered, and a
//! command that is still on its way to the disk would land over the replay.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};

use super::chap::Credentials;
use super::scsi::sense::Sense;
use super::session::{Nexus, Seat, Session};
use super::unit::Unit;
use crate::block::gate::Gate;
use crate::reactor::Waker;

/// Who may log in, and how it is proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// The initiator's name.
    pub initiator: String,
    /// What it must prove by CHAP; none: its name is enough.
    pub incoming: Option<Credentials>,
    /// What the target proves when the initiator asks for it.
    pub outgoing: Option<Credentials>,
}

/// What a target is made of.
pub struct Spec {
    /// Its IQN, made for this export alone.
    pub name: String,
    /// Who may log in.
    pub access: Vec<Access>,
    /// Sessions at once. With 1, a new one takes the place of the one there is.
    pub max_sessions: usize,
}

/// One export as iSCSI sees it. Its LUN 0 is the unit.
pub struct Target {
    spec: Spec,
    unit: Arc<Unit>,
    gate: Arc<Gate>,
    /// Set when initiators are to be told of the end.
    gone: AtomicBool,
    last_tsih: AtomicU16,
    connections: AtomicU32,
}

/// What is known of an IQN.
pub enum Found {
    /// It is served.
    Live(Arc<Target>),
    /// It was served and never will be again.
    Closed,
    /// Nothing; it may be known later.
    Unknown,
}

/// Finds targets.
pub trait Directory: Send + Sync + 'static {
    /// What is known of this IQN.
    fn find(&self, target: &str) -> Found;
    /// The IQNs of the targets that this initiator may use.
    fn visible(&self, initiator: &str) -> Vec<String>;
}

/// Why a session is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Commands of the session before are unsettled: to be tried again.
    Busy,
    /// As many sessions as there may be: to be tried again.
    Full,
    /// The export has ended, for good.
    Closed,
}

/// A connection's place in its target's count.
pub struct Counted(Arc<Target>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Target {
    /// A target that serves `unit`.
    pub fn new(spec: Spec, unit: Arc<Unit>) -> Arc<Self> {
        Arc::new(Self {
            spec,
            unit,
            gate: Gate::new(),
            gone: AtomicBool::new(false),
            last_tsih: AtomicU16::new(0),
            connections: AtomicU32::new(0),
        })
    }

    /// Its IQN.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// What is served.
    pub fn unit(&self) -> &Arc<Unit> {
        &self.unit
    }

    /// The export's gate. Once it is closed every login is refused for good,
    /// and every command of a live session is answered RESERVATION CONFLICT.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Connections of its sessions now.
    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::Acquire)
    }

    /// Counts a connection until the returned value is dropped.
    pub fn count(self: &Arc<Self>) -> Counted {
        self.connections.fetch_add(1, Ordering::AcqRel);
        Counted(Arc::clone(self))
    }

    /// What an initiator of this name must prove; none: it may not log in.
    pub fn access(&self, initiator: &str) -> Option<&Access> {
        let mut all = self.spec.access.iter();
        all.find(|access| access.initiator == initiator)
    }

    /// Whether initiators were told, or are being told, of the end.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Tells initiators of the end: all that is outstanding is answered
    /// RESERVATION CONFLICT. The gate must be closed before.
    pub fn take_away(&self) {
        self.gone.store(true, Ordering::Release);
        self.each(Session::wake);
    }

    /// Whether each session has answered what was outstanding when the export
    /// was taken away, and at least one command since, so that its initiator
    /// knows the end.
    pub fn knows_the_end(&self) -> bool {
        let mut known = true;
        self.each(|session| known &= session.knows_the_end());
        known
    }

    /// Ends its sessions.
    pub fn disconnect(&self) {
        self.each(Session::end);
    }

    fn each(&self, mut act: impl FnMut(&Session)) {
        for session in self.unit.sessions() {
            if session.is_of(self) {
                act(&session);
            }
        }
    }

    /// Admits a session, in place of the one that it replaces. `waker` wakes
    /// its connection.
    ///
    /// # Errors
    /// Whatever keeps it out, now or for good.
    pub fn admit(self: &Arc<Self>, nexus: Nexus, waker: Waker) -> Result<Seat, Refusal> {
        let mut sessions = self
            .unit
            .nexuses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.gate.is_closed() {
            return Err(Refusal::Closed);
        }
        let mine = |session: &Session| session.is_of(self);
        let replaced = |session: &Session| {
            mine(session) && (self.spec.max_sessions == 1 || *session.nexus() == nexus)
        };
        let mut busy = false;
        for session in sessions.iter().filter(|session| replaced(session)) {
            session.end();
            busy |= session.gate().inside() > 0;
        }
        if busy {
            return Err(Refusal::Busy);
        }
        let again = sessions.iter().any(|session| *session.nexus() == nexus);
        sessions.retain(|session| {
            let goes = replaced(session) || session.has_ended() && session.gate().inside() == 0;
            if goes {
                self.unit.reservations.nexus_lost(session.tsih());
            }
            !goes
        });
        if sessions.iter().filter(|session| mine(session)).count() >= self.spec.max_sessions {
            return Err(Refusal::Full);
        }
        let session = Seat::new(self.next_tsih(&sessions), nexus, Arc::clone(self), waker);
        // Whom the unit does not know has not heard that it began anew, if it did.
        session.attention(if again {
            Sense::NEXUS_LOST
        } else {
            Sense::POWER_ON
        });
        sessions.push(Arc::clone(session.session()));
        Ok(session)
    }

    /// A handle that no session of the unit has, and not 0.
    fn next_tsih(&self, sessions: &[Arc<Session>]) -> u16 {
        loop {
            let next = self
                .last_tsih
                .fetch_add(1, Ordering::AcqRel)
                .wrapping_add(1);
            if next != 0 && sessions.iter().all(|session| session.tsih() != next) {
                return next;
            }
        }
    }

    /// Whether a session has this handle.
    pub fn has_session(&self, tsih: u16) -> bool {
        let mut found = false;
        self.each(|session| found |= session.tsih() == tsih && !session.has_ended());
        found
    }
}

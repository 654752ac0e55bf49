//! A session: one initiator port's use of a target, as others see it. It has
//! one connection, which moves its bytes; what other sessions and the export
//! have to say to it is left here for that connection to find.
//!
//! The unit keeps a session until its last command has settled, which may be
//! long after its connection; the target is kept by that connection alone
//! ([`Seat`]), or an export whose disk hangs would never be let go of.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::scsi::sense::Sense;
use super::target::Target;
use crate::block::gate::Gate;
use crate::reactor::Waker;

/// Unit attentions that wait to be told, at most; the oldest are told first,
/// and each kind once.
const ATTENTIONS: usize = 16;

/// An initiator port: the initiator's name and its part of the session's id
/// (RFC 7143, 3.4).
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Nexus {
    /// The initiator's name.
    pub initiator: String,
    /// Its part of the session's id.
    pub isid: [u8; 6],
}

/// A session of an initiator with a target.
pub struct Session {
    tsih: u16,
    nexus: Nexus,
    target: Weak<Target>,
    /// Every command of the session is inside it until it has settled.
    gate: Arc<Gate>,
    waker: Waker,
    attentions: Mutex<VecDeque<Sense>>,
    /// Whether there are any, without the lock.
    attentive: AtomicBool,
    /// Whether the unit's size has changed, and the initiator is to be told.
    resized: AtomicBool,
    /// How often all of its tasks were to be aborted, …
    aborts_asked: AtomicU64,
    /// … and how many of those have come about.
    aborts_done: AtomicU64,
    /// Writes that take no lock are inside, whatever became of their connection.
    writes: Arc<Gate>,
    knows_the_end: AtomicBool,
}

/// A session as its own connection holds it: with its target.
#[derive(Clone)]
pub struct Seat {
    session: Arc<Session>,
    target: Arc<Target>,
}

impl Seat {
    /// A new session of `target`.
    pub(super) fn new(tsih: u16, nexus: Nexus, target: Arc<Target>, waker: Waker) -> Self {
        let session = Session::new(tsih, nexus, Arc::downgrade(&target), waker);
        Self { session, target }
    }

    /// The target.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// The session as others see it.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }
}

impl Deref for Seat {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.session
    }
}

impl Session {
    fn new(tsih: u16, nexus: Nexus, target: Weak<Target>, waker: Waker) -> Arc<Self> {
        Arc::new(Self {
            tsih,
            nexus,
            target,
            gate: Gate::new(),
            waker,
            attentions: Mutex::default(),
            attentive: AtomicBool::new(false),
            resized: AtomicBool::new(false),
            aborts_asked: AtomicU64::new(0),
            aborts_done: AtomicU64::new(0),
            writes: Gate::new(),
            knows_the_end: AtomicBool::new(false),
        })
    }

    /// The target's part of the session's id; never 0.
    pub fn tsih(&self) -> u16 {
        self.tsih
    }

    /// The initiator port.
    pub fn nexus(&self) -> &Nexus {
        &self.nexus
    }

    /// Whether it is of this target.
    pub fn is_of(&self, target: &Target) -> bool {
        std::ptr::eq(self.target.as_ptr(), target)
    }

    /// The session's own gate: closed when it has ended.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Ends it: nothing of it begins any more, and its connection closes.
    pub fn end(&self) {
        self.gate.close();
        self.waker.wake();
    }

    /// Whether it has ended. Commands may be inside still.
    pub fn has_ended(&self) -> bool {
        self.gate.is_closed()
    }

    /// Has its connection look at what is new.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Raises a unit attention, unless the same one waits already.
    pub fn attention(&self, sense: Sense) {
        let mut attentions = self.attentions();
        if attentions.len() < ATTENTIONS && !attentions.contains(&sense) {
            attentions.push_back(sense);
        }
        self.attentive.store(true, Ordering::Release);
    }

    /// The unit attention to be told next. It is told once.
    pub fn take_attention(&self) -> Option<Sense> {
        if !self.attentive.load(Ordering::Acquire) {
            return None;
        }
        let mut attentions = self.attentions();
        let sense = attentions.pop_front();
        self.attentive
            .store(!attentions.is_empty(), Ordering::Release);
        sense
    }

    fn attentions(&self) -> MutexGuard<'_, VecDeque<Sense>> {
        self.attentions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The unit's size has changed: a unit attention, and an event for who
    /// sends no commands.
    pub fn announce_resize(&self) {
        self.attention(Sense::CAPACITY_CHANGED);
        self.resized.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether an event about the size is to be sent. It is said once.
    pub fn take_resized(&self) -> bool {
        self.resized.swap(false, Ordering::AcqRel)
    }

    /// Asks for all of its tasks to be aborted without an answer. Returns what
    /// [`Self::has_aborted`] is asked with.
    pub fn ask_abort(&self) -> u64 {
        let asked = self.aborts_asked.fetch_add(1, Ordering::AcqRel) + 1;
        self.waker.wake();
        asked
    }

    /// How many aborts were asked for.
    pub fn aborts_asked(&self) -> u64 {
        self.aborts_asked.load(Ordering::Acquire)
    }

    /// So many of the aborts that were asked for have come about: the tasks
    /// are gone, and what they did to the device has settled.
    pub fn aborted(&self, count: u64) {
        self.aborts_done.fetch_max(count, Ordering::AcqRel);
    }

    /// Whether an abort has come about, by itself or with the session's end.
    pub fn has_aborted(&self, asked: u64) -> bool {
        self.aborts_done.load(Ordering::Acquire) >= asked
            || self.has_ended() && self.gate.inside() == 0
    }

    /// The writes that take no lock; see [`Unit`](super::unit::Unit). It is never closed.
    pub fn writes(&self) -> &Arc<Gate> {
        &self.writes
    }

    /// The initiator was told that the export is gone.
    pub fn note_end_known(&self) {
        self.knows_the_end.store(true, Ordering::Release);
    }

    /// Whether the initiator was told that the export is gone.
    pub fn knows_the_end(&self) -> bool {
        self.has_ended() || self.knows_the_end.load(Ordering::Acquire)
    }
}

//! Reservation commands: from their entry to a change that is kept, enforced
//! and told.
//!
//! The subsystems of one volume share one [`Reservations`]. A change is kept by
//! whoever owns the volume's records before anybody sees it, so it is made on a
//! thread that may wait; what each host may do is one atomic byte in its own
//! subsystem, which is all that its commands look at.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::admin::{Job, Reply, to_host};
use super::command::{Entry, NSID};
use super::log;
use super::reservation::{Command, Kind, Record};
use super::status::Status;
use super::subsystem::Subsystem;
use super::wire::u64_at;

/// Opcode of Reservation Register.
pub const REGISTER: u8 = 0x0d;
/// Opcode of Reservation Report.
pub const REPORT: u8 = 0x0e;
/// Opcode of Reservation Acquire.
pub const ACQUIRE: u8 = 0x11;
/// Opcode of Reservation Release.
pub const RELEASE: u8 = 0x15;
/// A controller id that a report gives when a host has none now.
const NO_CONTROLLER: u16 = 0xffff;
/// Preempt and Abort waits this long for commands that it aborts.
const ABORTING: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(1);

/// Whether this is the opcode of a reservation command.
pub fn is_one(opcode: u8) -> bool {
    matches!(opcode, REGISTER | REPORT | ACQUIRE | RELEASE)
}

/// Keeps a namespace's reservations through restarts and power loss.
pub trait Keeper: Send + Sync + 'static {
    /// Makes `record` durable in place of the one before. It may wait.
    ///
    /// # Errors
    /// Why it could not: the command that wanted it fails, and nothing has changed.
    fn keep(&self, record: &[u8]) -> Result<(), String>;
}

/// One volume's reservations, and the subsystems that they concern.
#[derive(Default)]
pub struct Reservations {
    keeper: Option<Box<dyn Keeper>>,
    /// Whether it last could not keep them; said once, however often hosts try.
    unkept: AtomicBool,
    /// Held while a change is made, which may wait.
    changing: Mutex<()>,
    record: Mutex<Arc<Record>>,
    members: Mutex<Vec<Weak<Subsystem>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of the locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reservations {
    /// Reservations that last as long as the process: hosts that want them to
    /// persist are refused.
    pub fn volatile() -> Arc<Self> {
        Arc::default()
    }

    /// Reservations that `keeper` keeps; `kept` is what it kept last.
    ///
    /// # Errors
    /// What was kept is damaged: who held what is unknown.
    pub fn kept(keeper: Box<dyn Keeper>, kept: Option<&[u8]>) -> Result<Arc<Self>, DamagedRecord> {
        let record = match kept {
            Some(bytes) => Record::from_bytes(bytes).ok_or(DamagedRecord)?,
            None => Record::default(),
        };
        Ok(Arc::new(Self {
            keeper: Some(keeper),
            // What was not to persist is gone with the process that had it.
            record: Mutex::new(Arc::new(if record.persistent() {
                record
            } else {
                Record::default()
            })),
            ..Self::default()
        }))
    }

    /// Whether reservations may persist through power loss.
    pub fn can_persist(&self) -> bool {
        self.keeper.is_some()
    }

    /// Now.
    pub fn record(&self) -> Arc<Record> {
        Arc::clone(&lock(&self.record))
    }

    /// Concerns `subsystem` as well from now on.
    pub fn join(&self, subsystem: &Arc<Subsystem>) {
        let mut members = lock(&self.members);
        members.retain(|member| member.strong_count() > 0);
        members.push(Arc::downgrade(subsystem));
        drop(members);
        subsystem.set_access(self.record().access(subsystem.host().id));
    }

    fn members(&self) -> Vec<Arc<Subsystem>> {
        lock(&self.members)
            .iter()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// Drops the registration of a host whose export has ended, unless it has another.
    pub fn leave(&self, subsystem: &Arc<Subsystem>) {
        lock(&self.members).retain(|member| !std::ptr::eq(member.as_ptr(), Arc::as_ptr(subsystem)));
        let host = subsystem.host().id;
        let members = self.members();
        if members.is_empty() {
            // They end with it: nobody is left to be let in or kept out.
            return;
        }
        let elsewhere = members.iter().any(|member| member.host().id == host);
        let _alone = lock(&self.changing);
        if !elsewhere && let Some(change) = self.record().without(host) {
            // If it cannot be kept, the next restart knows a host that never comes.
            self.settle(&change.record, true);
            self.tell(&change.notices);
        }
    }

    /// Sets whether they persist through power loss.
    ///
    /// # Errors
    /// Nobody keeps them, or keeping failed.
    pub fn set_persistence(&self, persistent: bool) -> Result<(), Status> {
        if persistent && !self.can_persist() {
            return Err(Status::INVALID_FIELD);
        }
        let _alone = lock(&self.changing);
        let record = (*self.record()).clone().with_persistence(persistent);
        self.settle(&record, false)
            .then_some(())
            .ok_or(Status::INTERNAL_ERROR)
    }

    fn change(
        &self,
        subsystem: &Arc<Subsystem>,
        command: Command,
        persist: Option<bool>,
    ) -> Result<(), Status> {
        let host = subsystem.host().id;
        let aborted = {
            let _alone = lock(&self.changing);
            let mut change = self.record().apply(host, command)?;
            if let Some(persist) = persist {
                change.record = change.record.with_persistence(persist);
            }
            if !self.settle(&change.record, false) {
                return Err(Status::INTERNAL_ERROR);
            }
            self.tell(&change.notices);
            change.aborted
        };
        self.abort(&aborted)
    }

    /// Keeps a record and, if that succeeded or need not, enforces it.
    fn settle(&self, record: &Record, whatever: bool) -> bool {
        // Also one that stops persisting: it must not come back.
        let wanted = record.persistent() || self.record().persistent();
        if wanted && let Some(keeper) = &self.keeper {
            let kept = keeper.keep(&record.to_bytes());
            let again = self.unkept.swap(kept.is_err(), Ordering::Relaxed);
            if let Err(error) = kept {
                if !again {
                    tracing::error!(%error, "keep a volume's reservations");
                }
                if !whatever {
                    return false;
                }
            }
        }
        *lock(&self.record) = Arc::new(record.clone());
        for member in self.members() {
            member.set_access(record.access(member.host().id));
        }
        true
    }

    fn tell(&self, notices: &[(Uuid, super::reservation::Notice)]) {
        let members = self.members();
        for (host, notice) in notices {
            for member in members.iter().filter(|member| member.host().id == *host) {
                member.note_reservation(*notice);
            }
        }
    }

    /// Ends the associations of hosts whose commands are aborted, and waits
    /// until none of those can reach the device any more.
    fn abort(&self, hosts: &[Uuid]) -> Result<(), Status> {
        let mut members = self.members();
        members.retain(|member| hosts.contains(&member.host().id));
        let until = Instant::now() + ABORTING;
        for gate in members.iter().filter_map(|member| member.disconnect()) {
            while gate.inside() > 0 {
                if Instant::now() >= until {
                    return Err(Status::INTERNAL_ERROR);
                }
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }
}

/// What was kept of a volume's reservations cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the kept reservations are damaged")]
pub struct DamagedRecord;

/// Does a reservation command; `data` is what the host sent with it.
///
/// # Errors
/// The status for the host.
pub fn handle(subsystem: &Arc<Subsystem>, entry: &Entry, data: &[u8]) -> Result<Reply, Status> {
    if entry.bytes()[1] & 3 != 0 {
        return Err(Status::INVALID_FIELD);
    }
    if entry.namespace() != NSID {
        return Err(Status::INVALID_NAMESPACE);
    }
    if entry.opcode() == REPORT {
        return report(subsystem, entry);
    }
    let length = if entry.opcode() == RELEASE { 8 } else { 16 };
    entry.data(length)?;
    if data.len() != length as usize {
        return Err(Status::DATA_SGL_LENGTH_INVALID);
    }
    let ten = entry.dword(10);
    let (action, any_key) = (ten & 7, ten & 1 << 3 != 0);
    let key = u64_at(data, 0);
    let other = if length == 16 { u64_at(data, 8) } else { 0 };
    let kind = || Kind::of((ten >> 8 & 0xff) as u8).ok_or(Status::INVALID_FIELD);
    let checked = (!any_key).then_some(key);
    let mut persist = None;
    let command = match (entry.opcode(), action) {
        (REGISTER, action) => {
            persist = match ten >> 30 {
                0b00 => None,
                0b10 => Some(false),
                0b11 if subsystem.reservations().can_persist() => Some(true),
                _ => return Err(Status::INVALID_FIELD),
            };
            match action {
                0 => Command::Register { key: other },
                1 => Command::Unregister { key: checked },
                2 => Command::Replace {
                    key: checked,
                    new: other,
                },
                _ => return Err(Status::INVALID_FIELD),
            }
        }
        // Only Register may do without the key.
        _ if any_key => return Err(Status::INVALID_FIELD),
        (ACQUIRE, 0) => Command::Acquire { key, kind: kind()? },
        (ACQUIRE, 1 | 2) => Command::Preempt {
            key,
            preempted: other,
            kind: kind()?,
            abort: action == 2,
        },
        (RELEASE, 0) => Command::Release { key, kind: kind()? },
        (RELEASE, 1) => Command::Clear { key },
        _ => return Err(Status::INVALID_FIELD),
    };
    let subsystem = Arc::clone(subsystem);
    let job = Job::new(move || {
        let done = subsystem
            .reservations()
            .change(&subsystem, command, persist);
        done.map(|()| 0)
    });
    Ok(Reply::Job(job))
}

fn report(subsystem: &Arc<Subsystem>, entry: &Entry) -> Result<Reply, Status> {
    // Hosts of fabrics have 128-bit identifiers, which only this form can show.
    if entry.dword(11) & 1 == 0 {
        return Err(Status::HOST_IDENTIFIER_INCONSISTENT_FORMAT);
    }
    let length = entry
        .dword(10)
        .checked_add(1)
        .and_then(|dwords| dwords.checked_mul(4));
    let length = length.ok_or(Status::INVALID_FIELD)?;
    to_host(entry, length)?;
    let members = subsystem.reservations().members();
    let page = subsystem.reservations().record().report(|host| {
        let mut of_host = members.iter().filter(|member| member.host().id == host);
        let current = of_host.find_map(|member| member.current());
        current.map_or(NO_CONTROLLER, |controller| controller.id())
    });
    let part = log::part(&page, 0, length).ok_or(Status::INVALID_FIELD)?;
    Ok(Reply::Data(part))
}

//! Reservations: who may read and write a namespace that several hosts use
//! (NVM Express Base Specification 2.0, 7.5 to 7.8 and 8.19).
//!
//! [`Record`] decides alone: each command makes a new record, or is refused,
//! and says who is to be told what. Keeping it, telling and enforcing are
//! [`reserve`](super::reserve)'s.
//!
//! ```text
//!   no registrant ── register ──► registered ── acquire ──► reserved
//!        ▲                          │  ▲                     │   │
//!        ├── unregister (last) ─────┘  └──── release ────────┘   │
//!        └───────── clear, preempt, the holder's unregister ◄────┘
//! ```

use uuid::Uuid;

use super::status::Status;
use super::wire::{u32_at, u64_at};

/// Registrants at most: a volume has few hosts.
pub const REGISTRANTS: usize = 64;
/// Bytes of a registrant in an extended report, and of its header.
const EXTENDED: usize = 64;
/// Version of a kept record's form.
const FORM: u32 = 1;

/// A reservation's type; the numbers are the specification's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as the specification names them")]
pub enum Kind {
    WriteExclusive = 1,
    ExclusiveAccess = 2,
    WriteExclusiveRegistrants = 3,
    ExclusiveAccessRegistrants = 4,
    WriteExclusiveAll = 5,
    ExclusiveAccessAll = 6,
}

impl Kind {
    /// The type with this number.
    pub fn of(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::WriteExclusive,
            2 => Self::ExclusiveAccess,
            3 => Self::WriteExclusiveRegistrants,
            4 => Self::ExclusiveAccessRegistrants,
            5 => Self::WriteExclusiveAll,
            6 => Self::ExclusiveAccessAll,
            _ => return None,
        })
    }

    /// Whether every registrant holds it.
    fn all_hold(self) -> bool {
        matches!(self, Self::WriteExclusiveAll | Self::ExclusiveAccessAll)
    }

    /// Whether registrants that do not hold it lose something by its end.
    fn serves_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    fn keeps_readers_out(self) -> bool {
        matches!(
            self,
            Self::ExclusiveAccess | Self::ExclusiveAccessRegistrants | Self::ExclusiveAccessAll
        )
    }
}

/// A host that has registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registrant {
    /// The host's identifier.
    pub host: Uuid,
    /// Its key.
    pub key: u64,
}

/// All registrations and the reservation of one namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// Counts the changes of registrations.
    generation: u32,
    /// Whether it persists through power loss.
    persistent: bool,
    registrants: Vec<Registrant>,
    /// Its type, and who took it.
    reservation: Option<(Kind, Uuid)>,
}

/// What a host is told; the numbers are those of log page 80h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Its registration was taken away.
    RegistrationPreempted = 1,
    /// A reservation that let it in was released.
    ReservationReleased = 2,
    /// The reservation and all registrations were cleared.
    ReservationPreempted = 3,
}

/// What a command that succeeded comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The record from now on.
    pub record: Record,
    /// Who is told what.
    pub notices: Vec<(Uuid, Notice)>,
    /// Whose commands are aborted.
    pub aborted: Vec<Uuid>,
}

/// A reservation command that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields named as the specification names them")]
pub enum Command {
    Register {
        key: u64,
    },
    Unregister {
        key: Option<u64>,
    },
    Replace {
        key: Option<u64>,
        new: u64,
    },
    Acquire {
        key: u64,
        kind: Kind,
    },
    Preempt {
        key: u64,
        preempted: u64,
        kind: Kind,
        abort: bool,
    },
    Release {
        key: u64,
        kind: Kind,
    },
    Clear {
        key: u64,
    },
}

impl Record {
    /// Whether it persists through power loss.
    pub fn persistent(&self) -> bool {
        self.persistent
    }

    /// The same, persisting through power loss or not.
    #[must_use]
    pub fn with_persistence(mut self, persistent: bool) -> Self {
        self.persistent = persistent;
        self
    }

    fn key_of(&self, host: Uuid) -> Option<u64> {
        let mut all = self.registrants.iter();
        all.find(|one| one.host == host).map(|one| one.key)
    }

    fn holds(&self, host: Uuid) -> bool {
        self.reservation.is_some_and(|(kind, holder)| {
            holder == host || kind.all_hold() && self.key_of(host).is_some()
        })
    }

    /// What `host` may do now: (read, write).
    pub fn access(&self, host: Uuid) -> (bool, bool) {
        let Some((kind, holder)) = self.reservation else {
            return (true, true);
        };
        let let_in = holder == host || kind.serves_registrants() && self.key_of(host).is_some();
        (let_in || !kind.keeps_readers_out(), let_in)
    }

    /// Does `command` for `host`.
    ///
    /// # Errors
    /// The status for the host; nothing has changed then.
    pub fn apply(&self, host: Uuid, command: Command) -> Result<Change, Status> {
        let mut next = Change {
            record: self.clone(),
            notices: Vec::new(),
            aborted: Vec::new(),
        };
        let mine = self.key_of(host);
        let with = |key: u64| match mine {
            Some(mine) if mine == key => Ok(()),
            _ => Err(Status::RESERVATION_CONFLICT),
        };
        match command {
            Command::Register { key } => {
                match mine {
                    Some(mine) if mine == key => {}
                    Some(_) => return Err(Status::RESERVATION_CONFLICT),
                    None if self.registrants.len() >= REGISTRANTS => {
                        return Err(Status::INTERNAL_ERROR);
                    }
                    None => next.record.registrants.push(Registrant { host, key }),
                }
                next.count();
            }
            Command::Unregister { key } => {
                key.map_or_else(|| mine.map(drop).ok_or(Status::RESERVATION_CONFLICT), with)?;
                next.remove(host);
                next.count();
            }
            Command::Replace { key, new } => {
                key.map_or_else(|| mine.map(drop).ok_or(Status::RESERVATION_CONFLICT), with)?;
                for one in &mut next.record.registrants {
                    if one.host == host {
                        one.key = new;
                    }
                }
                next.count();
            }
            Command::Acquire { key, kind } => {
                with(key)?;
                match self.reservation {
                    None => next.record.reservation = Some((kind, host)),
                    Some((held, _)) if held == kind && self.holds(host) => {}
                    Some(_) => return Err(Status::RESERVATION_CONFLICT),
                }
            }
            Command::Preempt {
                key,
                preempted,
                kind,
                abort,
            } => {
                with(key)?;
                next.preempt(host, preempted, kind)?;
                if !abort {
                    next.aborted.clear();
                }
                next.count();
            }
            Command::Release { key, kind } => {
                with(key)?;
                if let Some((held, _)) = self.reservation
                    && self.holds(host)
                {
                    if held != kind {
                        return Err(Status::INVALID_FIELD);
                    }
                    next.release(host);
                }
            }
            Command::Clear { key } => {
                with(key)?;
                next.tell_others(host, Notice::ReservationPreempted);
                next.record.registrants.clear();
                next.record.reservation = None;
                next.count();
            }
        }
        Ok(next)
    }

    /// The record without `host`, whose export has ended: it unregisters.
    pub fn without(&self, host: Uuid) -> Option<Change> {
        self.apply(host, Command::Unregister { key: None }).ok()
    }

    /// The extended report (figure "Reservation Status Extended Data
    /// Structure"); `controller` names each host's controller.
    pub fn report(&self, controller: impl Fn(Uuid) -> u16) -> Vec<u8> {
        let mut page = vec![0; EXTENDED * (1 + self.registrants.len())];
        page[..4].copy_from_slice(&self.generation.to_le_bytes());
        page[4] = self.reservation.map_or(0, |(kind, _)| kind as u8);
        let count = u16::try_from(self.registrants.len()).unwrap_or(u16::MAX);
        page[5..7].copy_from_slice(&count.to_le_bytes());
        page[9] = self.persistent.into();
        let entries = page[EXTENDED..].chunks_exact_mut(EXTENDED);
        for (entry, one) in entries.zip(&self.registrants) {
            entry[..2].copy_from_slice(&controller(one.host).to_le_bytes());
            entry[2] = self.holds(one.host).into();
            entry[8..16].copy_from_slice(&one.key.to_le_bytes());
            entry[16..32].copy_from_slice(one.host.as_bytes());
        }
        page
    }

    /// Its form for keeping: fixed numbers, little-endian, a CRC32C at the end.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64 + 24 * self.registrants.len());
        bytes.extend_from_slice(&FORM.to_le_bytes());
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.push(self.persistent.into());
        let (kind, holder) = self
            .reservation
            .map_or((0, Uuid::nil()), |(kind, holder)| (kind as u8, holder));
        bytes.push(kind);
        bytes.extend_from_slice(holder.as_bytes());
        for one in &self.registrants {
            bytes.extend_from_slice(one.host.as_bytes());
            bytes.extend_from_slice(&one.key.to_le_bytes());
        }
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// Reads what [`Self::to_bytes`] made. None: it is damaged, or of another form.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.split_last_chunk::<4>()?;
        if crc32c::crc32c(body).to_le_bytes() != *sum || body.len() < 26 || u32_at(body, 0) != FORM
        {
            return None;
        }
        let uuid = |bytes: &[u8]| bytes.first_chunk().map(|id| Uuid::from_bytes(*id));
        let (entries, rest) = body[26..].as_chunks::<24>();
        if !rest.is_empty() {
            return None;
        }
        let registrants = entries.iter().map(|entry| Registrant {
            host: Uuid::from_bytes(*entry.first_chunk().expect("24 bytes have 16")),
            key: u64_at(entry, 16),
        });
        let reservation = match body[9] {
            0 => None,
            kind => Some((Kind::of(kind)?, uuid(&body[10..])?)),
        };
        Some(Self {
            generation: u32_at(body, 4),
            persistent: body[8] != 0,
            registrants: registrants.collect(),
            reservation,
        })
    }
}

impl Change {
    fn count(&mut self) {
        self.record.generation = self.record.generation.wrapping_add(1);
    }

    fn tell_others(&mut self, host: Uuid, notice: Notice) {
        let others = self
            .record
            .registrants
            .iter()
            .filter(|one| one.host != host);
        let notices: Vec<_> = others.map(|one| (one.host, notice)).collect();
        self.notices.extend(notices);
    }

    fn release(&mut self, host: Uuid) {
        if let Some((kind, _)) = self.record.reservation.take()
            && kind.serves_registrants()
        {
            self.tell_others(host, Notice::ReservationReleased);
        }
    }

    /// Takes a registration away, and the reservation with it if it was
    /// `host`'s alone or the last of all.
    fn remove(&mut self, host: Uuid) {
        self.record.registrants.retain(|one| one.host != host);
        match self.record.reservation {
            Some((kind, _)) if kind.all_hold() && self.record.registrants.is_empty() => {
                self.record.reservation = None;
            }
            Some((kind, holder)) if !kind.all_hold() && holder == host => self.release(host),
            _ => {}
        }
    }

    fn preempt(&mut self, host: Uuid, preempted: u64, kind: Kind) -> Result<(), Status> {
        let held = self.record.reservation;
        let takes_over = match held {
            Some((held, _)) if held.all_hold() => preempted == 0,
            Some((_, holder)) => {
                if preempted == 0 {
                    return Err(Status::INVALID_FIELD);
                }
                self.record.key_of(holder) == Some(preempted)
            }
            None => false,
        };
        let everyone = takes_over && preempted == 0;
        let all = self.record.registrants.clone();
        let matches = |one: &&Registrant| everyone || one.key == preempted;
        if !takes_over && !all.iter().any(|one| matches(&one)) {
            return Err(Status::RESERVATION_CONFLICT);
        }
        for one in all.iter().filter(matches).filter(|one| one.host != host) {
            self.record.registrants.retain(|left| left.host != one.host);
            self.notices.push((one.host, Notice::RegistrationPreempted));
            self.aborted.push(one.host);
        }
        if takes_over {
            if held.is_some_and(|(held, _)| held != kind) {
                self.tell_others(host, Notice::ReservationReleased);
            }
            self.record.reservation = Some((kind, host));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "reservation_tests.rs"]
mod tests;

//! Persistent reservations, decided without acting (SPC-4, 5.12 and 6.16).
//!
//! ```text
//!   unregistered ── REGISTER ──► registered ── RESERVE ──► holder
//!        ▲  unregister, CLEAR, PREEMPT │ ◄── RELEASE, PREEMPT ──┘
//!        └─────────────────────────────┘
//! ```
//!
//! [`State::apply`] gives the state that follows an order and what is to be
//! told to whom. A state that outlives the process (APTPL) is kept by
//! [`Keeper`]; registrations outlive sessions in any case.

use serde::{Deserialize, Serialize};

use super::sense::Sense;
use crate::iscsi::session::Nexus;

/// Registrations at once; each is an initiator port.
pub const MOST_REGISTRANTS: usize = 64;
/// Bytes of the parameter list.
pub const PARAMETERS: u32 = 24;

/// Who may do what while a reservation is held (SPC-4, table 51).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each is the standard's name of a type")]
pub enum Type {
    WriteExclusive,
    ExclusiveAccess,
    WriteExclusiveRegistrantsOnly,
    ExclusiveAccessRegistrantsOnly,
    WriteExclusiveAllRegistrants,
    ExclusiveAccessAllRegistrants,
}

impl Type {
    /// Its code, which is never 0.
    pub fn code(self) -> u8 {
        match self {
            Self::WriteExclusive => 1,
            Self::ExclusiveAccess => 3,
            Self::WriteExclusiveRegistrantsOnly => 5,
            Self::ExclusiveAccessRegistrantsOnly => 6,
            Self::WriteExclusiveAllRegistrants => 7,
            Self::ExclusiveAccessAllRegistrants => 8,
        }
    }

    fn of(code: u8) -> Option<Self> {
        [
            Self::WriteExclusive,
            Self::ExclusiveAccess,
            Self::WriteExclusiveRegistrantsOnly,
            Self::ExclusiveAccessRegistrantsOnly,
            Self::WriteExclusiveAllRegistrants,
            Self::ExclusiveAccessAllRegistrants,
        ]
        .into_iter()
        .find(|kind| kind.code() == code)
    }

    fn excludes_reads(self) -> bool {
        matches!(
            self,
            Self::ExclusiveAccess
                | Self::ExclusiveAccessRegistrantsOnly
                | Self::ExclusiveAccessAllRegistrants
        )
    }

    /// Whether every registrant is a holder.
    pub fn all_registrants(self) -> bool {
        matches!(
            self,
            Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants
        )
    }

    /// Whether registrants may do what the holder may.
    fn registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }
}

/// What a command does, as far as reservations care (SPC-4, table 52; SBC-3,
/// table 13).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Nothing that a reservation keeps from anybody.
    Nothing,
    /// It reads blocks.
    Read,
    /// It changes blocks, or settings, or tells of settings.
    Write,
}

/// One initiator port's registration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registrant {
    /// The initiator port.
    pub nexus: Nexus,
    /// Its key, never 0.
    pub key: u64,
}

/// The reservation that is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Its type.
    pub kind: Type,
    /// Who made it; of an all-registrants type all registrants hold it.
    pub holder: Nexus,
}

/// Registrations and the reservation.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct State {
    /// How often registrations changed (PRGENERATION). Not kept over a restart.
    #[serde(skip)]
    pub generation: u32,
    /// Who is registered.
    pub registrants: Vec<Registrant>,
    /// The reservation, if there is one.
    pub held: Option<Held>,
    /// Whether all this outlives the process.
    pub persists: bool,
}

/// Keeps a state over a restart (APTPL).
pub trait Keeper: Send + Sync + 'static {
    /// What was kept; none, if nothing was.
    ///
    /// # Errors
    /// When it cannot be read: nobody can then be let in.
    fn load(&self) -> Result<Option<State>, String>;

    /// Keeps a state, durably when this returns; none: nothing any more.
    ///
    /// # Errors
    /// Why it is not kept.
    fn keep(&self, state: Option<&State>) -> Result<(), String>;
}

/// What PERSISTENT RESERVE OUT orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// The service action.
    pub action: u8,
    /// The scope; only 0, the logical unit, is known.
    pub scope: u8,
    /// The type's code.
    pub kind: u8,
    /// The key that the initiator believes to have.
    pub key: u64,
    /// The service action's key.
    pub other: u64,
    /// Whether the state is to outlive the process.
    pub persists: bool,
}

impl Order {
    /// An order with its parameter list. `persistent`: states can be kept.
    ///
    /// # Errors
    /// A list of another length, or one that asks for what there is not.
    pub fn decode(
        action: u8,
        scope: u8,
        kind: u8,
        list: &[u8],
        persistent: bool,
    ) -> Result<Self, Sense> {
        let list: &[u8; PARAMETERS as usize] = list.try_into().map_err(|_| Sense::LIST_LENGTH)?;
        let key = |at: usize| {
            list[at..at + 8]
                .iter()
                .fold(0, |k, b| k << 8 | u64::from(*b))
        };
        let persists = list[20] & 0x01 != 0;
        // SPEC_I_PT and ALL_TG_PT are not offered.
        let registers = matches!(action, REGISTER | REGISTER_AND_IGNORE);
        if list[20] & 0x0c != 0 || registers && persists && !persistent {
            return Err(Sense::parameter(20));
        }
        Ok(Self {
            action,
            scope,
            kind,
            key: key(0),
            other: key(8),
            persists,
        })
    }
}

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const REGISTER_AND_IGNORE: u8 = 6;

/// Why an order is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Somebody else has the right to it.
    Conflict,
    /// It makes no sense.
    Sense(Sense),
}

impl From<Sense> for Refused {
    fn from(sense: Sense) -> Self {
        Self::Sense(sense)
    }
}

/// What else is to be done about an order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Effects {
    /// Unit attentions to be raised.
    pub attentions: Vec<(Nexus, Sense)>,
    /// Whose commands are to be aborted.
    pub aborts: Vec<Nexus>,
}

impl State {
    /// Whether an initiator port may do something.
    pub fn allows(&self, nexus: &Nexus, what: Use) -> bool {
        let Some(held) = &self.held else {
            return true;
        };
        let free = match what {
            Use::Nothing => true,
            Use::Read => !held.kind.excludes_reads(),
            Use::Write => false,
        };
        free || self.holds(nexus) || held.kind.registrants() && self.key_of(nexus).is_some()
    }

    /// Whether anybody is registered.
    pub fn is_used(&self) -> bool {
        !self.registrants.is_empty()
    }

    /// The key that an initiator port is registered with.
    pub fn key_of(&self, nexus: &Nexus) -> Option<u64> {
        let mut all = self.registrants.iter();
        all.find(|other| other.nexus == *nexus)
            .map(|found| found.key)
    }

    /// Whether an initiator port holds the reservation.
    pub fn holds(&self, nexus: &Nexus) -> bool {
        self.held.as_ref().is_some_and(|held| {
            held.holder == *nexus || held.kind.all_registrants() && self.key_of(nexus).is_some()
        })
    }

    /// What follows an order of this initiator port.
    ///
    /// # Errors
    /// Why nothing follows.
    pub fn apply(&self, nexus: &Nexus, order: &Order) -> Result<(Self, Effects), Refused> {
        let mut next = self.clone();
        let mut effects = Effects::default();
        match order.action {
            REGISTER | REGISTER_AND_IGNORE => next.register(nexus, order, &mut effects)?,
            _ if self.key_of(nexus) != Some(order.key) => return Err(Refused::Conflict),
            RESERVE => next.reserve(nexus, order)?,
            RELEASE => next.release(nexus, order, &mut effects)?,
            CLEAR => {
                next.tell_others(nexus, Sense::RESERVATIONS_PREEMPTED, &mut effects);
                next.registrants.clear();
                next.held = None;
                next.changed();
            }
            PREEMPT | PREEMPT_AND_ABORT => {
                next.preempt(nexus, order, &mut effects)?;
                if order.action == PREEMPT {
                    effects.aborts.clear();
                }
            }
            _ => return Err(Sense::cdb(1).into()),
        }
        Ok((next, effects))
    }

    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    fn register(
        &mut self,
        nexus: &Nexus,
        order: &Order,
        effects: &mut Effects,
    ) -> Result<(), Refused> {
        let known = self.key_of(nexus);
        if order.action == REGISTER && order.key != known.unwrap_or(0) {
            return Err(Refused::Conflict);
        }
        match known {
            None if order.other == 0 => {}
            None if self.registrants.len() >= MOST_REGISTRANTS => {
                return Err(Sense::REGISTRATION_RESOURCES.into());
            }
            None => self.registrants.push(Registrant {
                nexus: nexus.clone(),
                key: order.other,
            }),
            Some(_) if order.other == 0 => self.unregister(nexus, effects),
            Some(_) => {
                for registrant in &mut self.registrants {
                    if registrant.nexus == *nexus {
                        registrant.key = order.other;
                    }
                }
            }
        }
        self.persists = order.persists;
        self.changed();
        Ok(())
    }

    fn unregister(&mut self, nexus: &Nexus, effects: &mut Effects) {
        let held = self.holds(nexus);
        self.registrants.retain(|other| other.nexus != *nexus);
        match &self.held {
            // Its other registrants hold it still.
            Some(kept) if kept.kind.all_registrants() && !self.registrants.is_empty() => {}
            Some(gone) if held => {
                if gone.kind.registrants() {
                    self.tell_others(nexus, Sense::RESERVATIONS_RELEASED, effects);
                }
                self.held = None;
            }
            _ => {}
        }
    }

    fn reserve(&mut self, nexus: &Nexus, order: &Order) -> Result<(), Refused> {
        let kind = scoped_type(order)?;
        match &self.held {
            None => {
                self.held = Some(Held {
                    kind,
                    holder: nexus.clone(),
                });
                Ok(())
            }
            Some(held) if held.kind == kind && self.holds(nexus) => Ok(()),
            Some(_) => Err(Refused::Conflict),
        }
    }

    fn release(
        &mut self,
        nexus: &Nexus,
        order: &Order,
        effects: &mut Effects,
    ) -> Result<(), Refused> {
        let Some(held) = self.held.as_ref().filter(|_| self.holds(nexus)) else {
            return Ok(());
        };
        let kind = held.kind;
        if order.scope != 0 || order.kind != kind.code() {
            return Err(Sense::INVALID_RELEASE.into());
        }
        self.held = None;
        if kind.registrants() {
            self.tell_others(nexus, Sense::RESERVATIONS_RELEASED, effects);
        }
        Ok(())
    }

    fn preempt(
        &mut self,
        nexus: &Nexus,
        order: &Order,
        effects: &mut Effects,
    ) -> Result<(), Refused> {
        let kind = scoped_type(order)?;
        let all = self
            .held
            .as_ref()
            .is_some_and(|held| held.kind.all_registrants());
        let takes = match &self.held {
            _ if order.other == 0 && !all => return Err(Sense::parameter(8).into()),
            None => false,
            Some(_) if all => order.other == 0,
            Some(held) => self.key_of(&held.holder) == Some(order.other),
        };
        let goes = |registrant: &Registrant| order.other == 0 || registrant.key == order.other;
        if !self.registrants.iter().any(goes) {
            return Err(Refused::Conflict);
        }
        for gone in self.registrants.iter().filter(|one| goes(one)) {
            if gone.nexus != *nexus {
                let told = (gone.nexus.clone(), Sense::REGISTRATIONS_PREEMPTED);
                effects.attentions.push(told);
                effects.aborts.push(gone.nexus.clone());
            }
        }
        // Who takes a reservation over keeps its own registration, even if its
        // key is the one that is preempted.
        self.registrants
            .retain(|one| !goes(one) || takes && one.nexus == *nexus);
        if takes {
            let before = self.held.replace(Held {
                kind,
                holder: nexus.clone(),
            });
            if before.is_some_and(|before| before.kind != kind) {
                for other in &self.registrants {
                    if other.nexus != *nexus {
                        let told = (other.nexus.clone(), Sense::RESERVATIONS_RELEASED);
                        effects.attentions.push(told);
                    }
                }
            }
        } else if self.registrants.is_empty() {
            self.held = None;
        }
        self.changed();
        Ok(())
    }

    fn tell_others(&self, nexus: &Nexus, sense: Sense, effects: &mut Effects) {
        let others = self.registrants.iter().filter(|one| one.nexus != *nexus);
        let told = others.map(|one| (one.nexus.clone(), sense));
        effects.attentions.extend(told);
    }
}

fn scoped_type(order: &Order) -> Result<Type, Sense> {
    let kind = Type::of(order.kind).filter(|_| order.scope == 0);
    kind.ok_or(Sense::cdb(2))
}

#[cfg(test)]
#[path = "reservation_tests.rs"]
mod tests;

//! An iSCSI target's protocol: one target per export, one logical unit in it,
//! for the one initiator that may use it.
//!
//! ```text
//!   bytes ─► connection ─► login ─► Target::admit ─► Session
//!              wire           │ scsi: CDB ─► Command ─► perform ─► gates ─► BlockDevice
//!                             └ text: SendTargets
//! ```
//!
//! [`wire`] is bytes; [`login`], [`negotiate`], [`chap`] and [`scsi`] decide
//! without acting; [`target`] admits sessions; [`unit`] is what they share;
//! `connection` moves the bytes. What this refuses: an initiator other than
//! the export's own, a session while a command of the one before is
//! unsettled, more than one connection in a session, and whatever the gates
//! keep out.

pub mod chap;
#[cfg(test)]
mod for_tests;
pub mod login;
pub mod negotiate;
mod perform;
mod reservations;
pub mod scsi;
pub mod session;
pub mod target;
pub mod text;
pub mod unit;
pub mod wire;

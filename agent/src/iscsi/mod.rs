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
//! [`connection`] moves the bytes. What this refuses: an initiator other than
//! the export's own, a session while a command of the one before is
//! unsettled, more than one connection in a session, and whatever the gates
//! keep out.

mod answers;
pub mod chap;
pub mod connection;
#[cfg(any(test, fuzzing))]
pub(crate) mod doors;
mod exchange;
#[cfg(test)]
mod for_tests;
pub mod login;
mod management;
pub mod metrics;
pub mod negotiate;
mod perform;
mod reservations;
pub mod scsi;
mod serving;
pub mod session;
pub mod target;
mod task;
#[cfg(test)]
mod tests;
pub mod text;
mod transfer;
pub mod unit;
mod voice;
pub mod wire;
mod working;

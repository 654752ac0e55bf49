//! The arbiter: who may use which volume, from when, until when.
//!
//! [`state`] decides and does nothing; [`action`] is what it decides; [`proof`]
//! holds the tokens without which an export cannot even be asked for;
//! [`runner`] persists each decision, performs it through [`ports`] and feeds
//! the result back; [`journal`] keeps what happened, [`figures`] counts it.
//! [`record`] is what others see.
//!
//! It refuses to guess: what is not durable was not decided, what has no
//! receipt has not ended, and what another workload holds is not taken.

pub mod action;
#[cfg(any(test, fuzzing))]
pub(crate) mod doors;
pub mod figures;
pub mod journal;
mod moment;
pub mod ports;
pub mod proof;
pub mod record;
pub mod runner;
pub mod state;

pub use runner::{Arbiter, ArbiterError};

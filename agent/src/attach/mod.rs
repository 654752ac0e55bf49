//! The arbiter: who may use which volume, from when, until when.

pub mod ports;
pub mod record;
pub mod runner;

pub use runner::{Arbiter, ArbiterError};

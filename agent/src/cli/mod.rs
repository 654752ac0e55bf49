//! drover's command line: what an operator asks of a running drover.
//!
//! [`args`] says what can be asked; each verb's file asks it and prints the
//! answer. Nothing here decides anything.

pub mod args;
pub mod backups;
pub mod doctor;
pub mod events;
mod look;
pub mod print;
pub mod top;
pub mod trace;
pub mod verbs;

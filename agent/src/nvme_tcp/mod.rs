//! An NVMe/TCP target's protocol: one subsystem per export, one namespace in
//! it, for the one host that may use it.
//!
//! ```text
//!   TCP ─► connection ─► reader ─► admin (answers at once)
//!                        wire      command ─► gates ─► BlockDevice
//!                        writer ◄─ queue (what is outstanding, R2T, answers)
//! ```
//!
//! [`wire`] is bytes, [`command`], [`identify`] and [`log`] decide without
//! acting, [`controller`] is one association's state, [`subsystem`] admits
//! associations, [`connection`] moves the bytes. What this refuses: a host
//! other than the export's own, a second association while a command of the
//! first is unsettled, and whatever the two gates keep out.

pub mod admin;
pub mod command;
pub mod connect;
pub mod connection;
pub mod controller;
pub mod identify;
pub mod log;
pub mod metrics;
pub mod queue;
pub mod reader;
pub mod status;
pub mod subsystem;
pub mod wire;

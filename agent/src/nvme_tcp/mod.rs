//! An NVMe/TCP target's protocol: one subsystem per export, one namespace in
//! it, for the one host that may use it.
//!
//! ```text
//!   reactor ─► connection ─► serving ─► admin (answers at once)
//!              wire          │    └───► command ─► gates ─► reactor ─► BlockDevice
//!                            queue (what is outstanding, R2T, answers)
//! ```
//!
//! Nothing here does I/O or waits: [`connection`] is a protocol of the
//! [`reactor`](crate::reactor), and so one state machine from a connection's
//! first byte to its end. [`wire`] is bytes, [`command`], [`identify`] and
//! [`log`] decide without acting, [`controller`] is one association's state,
//! [`subsystem`] admits associations, [`auth`] has a host prove itself,
//! [`reserve`] keeps the hosts of one volume apart, [`discovery`] says what
//! there is. What this refuses: a host other than the export's own, a second association while a command of the
//! first is unsettled, and whatever the two gates keep out.
//!
//! What is not served, and so not advertised: fused commands (FUSES is 0; no
//! Linux host sends them), asymmetric namespace access and its log 0Ch (a fence
//! ends a path, it never queues on one), command sets beside NVM (CAP.CSS bit
//! 43 would oblige to a descriptor in every namespace), ready independent of
//! media (CAP.CRMS, so no CRTO), the fabrics command Disconnect (a host closes
//! its connection), Write Uncorrectable, and TLS.

pub mod admin;
pub mod administer;
pub mod auth;
pub mod command;
pub mod connect;
pub mod connection;
pub mod controller;
pub mod dhchap;
pub mod discovery;
#[cfg(any(test, fuzzing))]
pub(crate) mod doors;
mod ffdhe;
pub mod identify;
pub mod io;
pub mod log;
pub mod metrics;
pub mod perform;
pub mod queue;
pub mod reservation;
pub mod reserve;
pub mod serving;
pub mod status;
pub mod subsystem;
pub mod wire;

#[cfg(test)]
mod bench_for_tests;
#[cfg(test)]
mod conformance_tests;
#[cfg(test)]
mod connect_tests;
#[cfg(test)]
mod connection_tests;
#[cfg(test)]
mod discovery_tests;
#[cfg(test)]
mod mischief_tests;

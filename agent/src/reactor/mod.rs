//! The data path: threads that move bytes between sockets and files.
//!
//! ```text
//!   listener ─► Reactors ─► one thread each: Driver (io_uring, or threads)
//!                                │ bytes, ends of operations, wakes
//!                                ▼
//!                           Connection ── Link ── Protocol (nvme_tcp, iscsi)
//! ```
//!
//! A [`Protocol`] does no I/O and never waits. It is told what happened to its
//! connection and says through its [`Link`] what is to be sent and what the
//! device is to do. A [`Connection`] joins the two and does no I/O either, so
//! one and the same code runs under io_uring, on a thread pool, and on the
//! calling thread alone ([`inline`], for tests and fuzzing).

mod bell;
pub mod buffer;
pub mod connection;
mod driver;
mod gather;
mod half_open;
pub mod inline;
mod lanes;
pub mod link;
mod patience;
mod polling;
pub mod protocol;
mod serve;
mod threads;
mod uring;
mod workers;

pub use buffer::Buffer;
pub use connection::Connection;
pub use half_open::{Caller, HALF_OPEN, HalfOpen, Place};
pub use link::{Link, Waker};
pub use protocol::{End, Failed, Operation, Outcome, Protocol, Tag};
pub use threads::{Engine, POLL, Reactors, Settings};

#[cfg(test)]
mod tests;

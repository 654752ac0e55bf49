//! SCSI: what a command is, what it may do and what it answers, decided
//! without touching a device (SPC-4, SBC-3).
//!
//! [`opcodes`] and [`command`] take a CDB apart, [`inquiry`], [`mode`] and
//! [`lba_status`] and [`reservation_report`] make parameter data, [`unmap`]
//! reads such a list, [`reservation`] is the state of persistent reservations.

pub mod command;
pub mod inquiry;
pub mod lba_status;
pub mod mode;
pub mod opcodes;
pub mod reservation;
pub mod reservation_report;
pub mod sense;
pub mod unmap;

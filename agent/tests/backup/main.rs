//! Backup streams against real files, real repositories, a real worker
//! process, and the stock restic as the judge.

mod bench;
mod faults;
mod streams;

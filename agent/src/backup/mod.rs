//! Backups of snapshots into restic repositories, and back.
//!
//! Owns the streams that read a snapshot's file at its home and write it,
//! through rustic_core, into a repository that the stock restic can check,
//! prune and restore; and the restores. A volume is the folder
//! `/drover/VOLUME` of fixed-size segment files with a manifest ([`layout`]).
//!
//! A stream runs in a child process ([`worker`]): a repository on a dead NFS
//! server puts its reader into D state, and that must cost the agent neither
//! its port nor its pool. It works in slices ([`archive`]); each is committed
//! as a restic snapshot of its own, and those are the cursor ([`cursor`]), so
//! a resume works on any node and after any crash, and keeps nothing else.
//!
//! Refuses: to join slices of two instants; to resume when the snapshot's file
//! is gone or another; to call a backup done before every blob of it was found;
//! a folder that is something else than a repository; to run beside somebody
//! who holds the repository exclusively.

mod archive;
mod child;
mod cursor;
#[cfg(any(test, fuzzing))]
pub(crate) mod doors;
mod error;
pub mod keeper;
mod layout;
mod lock;
mod meters;
mod repository;
mod restore;
mod sink;
mod source;
mod spec;
mod stream;
mod tally;
mod worker;

use std::time::Duration;

pub use error::BackupError;
pub use spec::{
    BackupInfo, Outcome, Phase, Progress, RepositorySpec, RestoreSpec, Secret, SliceLimits,
    StreamSpec, Which,
};
pub use stream::{Stream, Streams};
pub use worker::worker_main;

/// Segments in a slice, at most.
pub const SLICE_SEGMENTS: u32 = 256;

/// How long a slice should take: about what an interruption without warning costs.
pub const SLICE_TIME: Duration = Duration::from_secs(2);

/// Segments in the first slice, while the repository's speed is not known.
const FIRST_SLICE_SEGMENTS: u32 = 8;

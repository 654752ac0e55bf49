//! Why a backup or a restore ended without success.
//!
//! The same type on both sides of the worker's pipe, so that the agent's caller
//! gets the worker's own error and not a text about it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::{Bytes, SnapshotId, TicketId, VolumeId};

/// Why a stream failed. Each names its object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum BackupError {
    /// The snapshot is not in the pool any more, or its file is another one.
    /// Final: what a cursor held of it is void, since two instants are never joined.
    #[error("snapshot {snapshot} is gone: {}: {why}; take a new snapshot and start a new backup", file.display())]
    SnapshotGone {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Where its file was.
        file: PathBuf,
        /// What was found instead.
        why: String,
    },
    /// A call on the snapshot's file failed.
    #[error("{call} {}: {reason}", file.display())]
    Source {
        /// The call.
        call: String,
        /// The file.
        file: PathBuf,
        /// The kernel's reason.
        reason: String,
    },
    /// The file has another size than the snapshot is known to have.
    #[error("{} has {found}, the snapshot should have {expected}", file.display())]
    WrongSize {
        /// The file.
        file: PathBuf,
        /// What was expected.
        expected: Bytes,
        /// What was found.
        found: Bytes,
    },
    /// The password opens none of the repository's keys.
    #[error("repository {}: the password is wrong", repo.display())]
    WrongPassword {
        /// The repository.
        repo: PathBuf,
    },
    /// There is a folder, and it is no repository.
    #[error("{} is not a restic repository: {why}", repo.display())]
    NotARepository {
        /// The folder.
        repo: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// There is nothing at the path.
    #[error("there is no repository at {}", repo.display())]
    NoRepository {
        /// The path.
        repo: PathBuf,
    },
    /// Somebody holds the repository exclusively (a prune, say).
    #[error("repository {} is locked by {by}; wait for it to end, or remove a stale lock with: restic unlock", repo.display())]
    Locked {
        /// The repository.
        repo: PathBuf,
        /// Who, as the lock says.
        by: String,
    },
    /// A call on the repository failed.
    #[error("repository {}: {doing}: {reason}", repo.display())]
    Repository {
        /// The repository.
        repo: PathBuf,
        /// What was being done.
        doing: String,
        /// What came of it.
        reason: String,
    },
    /// What the repository holds of a backup is not whole.
    #[error("repository {}: {what}: {why}", repo.display())]
    NotWhole {
        /// The repository.
        repo: PathBuf,
        /// The backup or snapshot.
        what: String,
        /// What is missing or wrong.
        why: String,
    },
    /// The repository has no such backup.
    #[error("repository {} has no complete backup {wanted}", repo.display())]
    NoBackup {
        /// The repository.
        repo: PathBuf,
        /// What was asked for.
        wanted: String,
    },
    /// A call on a restore's target failed.
    #[error("{call} {}: {reason}", target.display())]
    Target {
        /// The call.
        call: String,
        /// The target.
        target: PathBuf,
        /// The kernel's reason.
        reason: String,
    },
    /// A restore's target is too small for what should go into it.
    #[error("{} has {has}, the backup needs {needs}", target.display())]
    TargetTooSmall {
        /// The target.
        target: PathBuf,
        /// Its size.
        has: Bytes,
        /// The backup's size.
        needs: Bytes,
    },
    /// A restored backup is not of the volume or size that was asked for.
    #[error("backup {backup} is of {found}, asked was {asked}")]
    WrongBackup {
        /// The restic snapshot.
        backup: String,
        /// What it is of.
        found: String,
        /// What was asked for.
        asked: String,
    },
    /// The request makes no sense.
    #[error("{why}")]
    Invalid {
        /// What is wrong with it.
        why: String,
    },
    /// A stream of the same id is running for something else.
    #[error("stream {id} is running already, for volume {volume}")]
    Busy {
        /// The stream.
        id: TicketId,
        /// What it works on.
        volume: VolumeId,
    },
    /// The worker process could not be started.
    #[error("start {}: {reason}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The kernel's reason.
        reason: String,
    },
    /// The worker process died, or said what it should not.
    #[error("backup worker {pid}: {reason}")]
    Worker {
        /// Its process id.
        pid: u32,
        /// What happened.
        reason: String,
    },
    /// The worker did not answer in time.
    #[error("{what} did not end within {seconds} s")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long it had.
        seconds: u64,
    },
}

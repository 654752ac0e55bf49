//! What a stream is asked to do, and what it says while it does it.
//!
//! A specification goes to the worker on its standard input, and nowhere else:
//! it holds the repository's password, which must show in no argument list, no
//! log and no `Debug` output.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::error::BackupError;
use crate::attach::ports::micros;
use crate::ids::{Bytes, NodeId, SnapshotId, TicketId, VolumeId};

/// A repository's password. Its `Debug` output hides it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes a password as it is.
    pub fn new(password: impl Into<String>) -> Self {
        Self(password.into())
    }

    /// Reads a password file as restic does: white space at both ends is no part of it.
    ///
    /// # Errors
    /// The file cannot be read, or holds nothing.
    pub fn from_file(path: &Path) -> Result<Self, BackupError> {
        let text = std::fs::read_to_string(path).map_err(|error| BackupError::Invalid {
            why: format!("read password file {}: {error}", path.display()),
        })?;
        match text.trim() {
            "" => Err(BackupError::Invalid {
                why: format!("password file {} is empty", path.display()),
            }),
            password => Ok(Self::new(password)),
        }
    }

    /// The password in `RESTIC_PASSWORD`, if that is set and not empty.
    pub fn from_env() -> Option<Self> {
        std::env::var("RESTIC_PASSWORD")
            .ok()
            .filter(|password| !password.is_empty())
            .map(Self)
    }

    /// The password itself.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A repository and how to use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositorySpec {
    /// Its folder, an absolute path.
    pub path: PathBuf,
    /// Its password.
    pub password: Secret,
    /// Upload at most so many bytes a second.
    pub limit_upload: Option<u64>,
}

/// How much goes into one slice: what an interruption without warning costs at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceLimits {
    /// Segments, at most.
    pub segments: u32,
    /// Time a slice should take; slices grow and shrink towards it.
    #[serde(with = "micros")]
    pub time: Duration,
}

impl Default for SliceLimits {
    fn default() -> Self {
        Self {
            segments: super::SLICE_SEGMENTS,
            time: super::SLICE_TIME,
        }
    }
}

/// Back a snapshot up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamSpec {
    /// The stream's id, and its ticket's. The same id again resumes.
    pub id: TicketId,
    /// The volume.
    pub volume: VolumeId,
    /// The snapshot of it that is read.
    pub snapshot: SnapshotId,
    /// The snapshot's file in the pool.
    pub file: PathBuf,
    /// The snapshot's size.
    pub size: Bytes,
    /// The home.
    pub home: NodeId,
    /// Where it goes.
    pub repo: RepositorySpec,
    /// How often a cursor is committed.
    #[serde(default)]
    pub slice: SliceLimits,
}

/// Which backup to restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Which {
    /// The newest complete backup of a volume.
    LatestOf(VolumeId),
    /// A restic snapshot, by its id or the beginning of it (at least eight digits).
    Restic(String),
}

/// Restore a backup into a file or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreSpec {
    /// The stream's id, and its ticket's. The same id again starts from the beginning.
    pub id: TicketId,
    /// The volume that is restored into.
    pub volume: VolumeId,
    /// Where it comes from.
    pub repo: RepositorySpec,
    /// Which backup.
    pub which: Which,
    /// The file or block device. A file that does not exist is made; what
    /// exists must be large enough, and reads as zeroes behind the backup's end.
    pub target: PathBuf,
    /// Refuse a backup of any other size.
    pub size: Option<Bytes>,
}

/// A backup in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupInfo {
    /// The restic snapshot's id.
    pub restic_id: String,
    /// The stream that wrote it.
    pub backup: TicketId,
    /// The volume.
    pub volume: VolumeId,
    /// The drover snapshot that was read.
    pub snapshot: SnapshotId,
    /// When it was written.
    pub time: SystemTime,
    /// The volume's size.
    pub size: Bytes,
    /// Whether it is a whole backup. If not it is one slice, a part of a cursor.
    pub complete: bool,
}

/// Where a stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The worker opens the repository and looks for a cursor.
    Starting,
    /// Bytes flow.
    Running,
    /// It was stopped; the same id again resumes it.
    Interrupted,
    /// All is in the repository (or in the target), and verified.
    Done,
    /// It ended with an error.
    Failed,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 5] = [
        Self::Starting,
        Self::Running,
        Self::Interrupted,
        Self::Done,
        Self::Failed,
    ];

    /// Whether nothing more will come.
    pub fn ended(self) -> bool {
        !matches!(self, Self::Starting | Self::Running)
    }
}

/// How far a stream is. Bytes are the volume's unless said otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Where it is in its life.
    pub phase: Phase,
    /// All there is to do.
    pub bytes_total: u64,
    /// Done, with what the slice in work has read; at an end that is no
    /// success, what the cursor holds.
    pub bytes_done: u64,
    /// Held by the cursor now: what a resume skips.
    pub bytes_held: u64,
    /// Skipped, since a cursor held them when this run began.
    pub bytes_resumed: u64,
    /// Read from the snapshot's file by this run (holes are not read).
    pub bytes_read: u64,
    /// Written to the repository by this run, in bytes of the repository.
    pub bytes_uploaded: u64,
    /// Of those, written since the last cursor: what an end without warning
    /// would make the next run upload again.
    pub bytes_uncommitted: u64,
    /// Bytes of the volume a second, of late.
    pub rate: u64,
    /// Seconds to the end at that rate, once there is one.
    pub eta_seconds: Option<u64>,
    /// The restic snapshot, at the end of a backup, or the one restored from.
    pub restic_snapshot: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}

impl Progress {
    /// Of a stream that has just been started.
    pub(crate) fn starting(total: Bytes) -> Self {
        Self {
            phase: Phase::Starting,
            bytes_total: total.0,
            bytes_done: 0,
            bytes_held: 0,
            bytes_resumed: 0,
            bytes_read: 0,
            bytes_uploaded: 0,
            bytes_uncommitted: 0,
            rate: 0,
            eta_seconds: None,
            restic_snapshot: None,
            error: None,
        }
    }

    /// Of a stream that an earlier agent finished.
    pub(super) fn whole() -> Self {
        Self {
            phase: Phase::Done,
            ..Self::starting(Bytes(0))
        }
    }
}

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Whole and verified; the restic snapshot's id.
    Done(String),
    /// It stopped by itself when asked; its cursor holds all it uploaded.
    Interrupted,
    /// It did not stop in time and was killed; the slice in work is lost.
    Killed,
    /// It was killed, and the kernel holds it still in a call that does not
    /// return. It will do nothing more, and is reaped when it is let go.
    Abandoned,
    /// It failed.
    Failed(BackupError),
}

/// A job for the worker: the one line on its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Job {
    /// Back up.
    Backup(StreamSpec),
    /// Restore.
    Restore(RestoreSpec),
    /// List backups.
    List(RepositorySpec),
}

/// How far the worker is; numbers as in [`Progress`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub(super) total: u64,
    pub(super) done: u64,
    pub(super) held: u64,
    pub(super) resumed: u64,
    pub(super) read: u64,
    pub(super) uploaded: u64,
    pub(super) uncommitted: u64,
}

/// A line on the worker's standard output.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Event {
    /// It is so far.
    Progress(Counts),
    /// The backups in the repository. The last line.
    Backups(Vec<BackupInfo>),
    /// Whole; the restic snapshot's id. The last line.
    Done(String),
    /// Stopped when asked. The last line.
    Interrupted,
    /// Failed. The last line.
    Failed(BackupError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_debug_output_shows_the_password() {
        let job = Job::List(RepositorySpec {
            path: "/repo".into(),
            password: Secret::new("hunter2"),
            limit_upload: None,
        });
        assert!(!format!("{job:?}").contains("hunter2"));
        assert!(serde_json::to_string(&job).unwrap().contains("hunter2"));
    }

    #[test]
    fn a_password_file_is_trimmed_and_must_hold_something() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("password");
        std::fs::write(&file, "  se cret\n").unwrap();
        assert_eq!(Secret::from_file(&file).unwrap().reveal(), "se cret");
        std::fs::write(&file, " \n").unwrap();
        let error = Secret::from_file(&file).unwrap_err().to_string();
        assert!(error.contains("is empty"), "{error}");
        let error = Secret::from_file(&dir.path().join("none")).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
    }

    #[test]
    fn errors_survive_the_pipe() {
        let error = BackupError::SnapshotGone {
            snapshot: "snap-1".parse().unwrap(),
            file: "/pool/snap-1".into(),
            why: "no such file".into(),
        };
        let line = serde_json::to_string(&Event::Failed(error.clone())).unwrap();
        let Event::Failed(back) = serde_json::from_str(&line).unwrap() else {
            panic!("another event came back: {line}");
        };
        assert_eq!(back, error);
    }
}

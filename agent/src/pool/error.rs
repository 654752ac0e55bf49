//! Why the pool did not do what it was asked.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::ids::{Bytes, NodeId, SnapshotId, VolumeId};

/// Why a pool could not be opened, or did not do what it was asked. Each names
/// the file it is about.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// A call on a file failed.
    #[error("{call} {}: {source}", path.display())]
    Call {
        /// The failed call.
        call: &'static str,
        /// Its object.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The file system cannot hold a pool.
    #[error("pool {}: {reason}", dir.display())]
    Unsuitable {
        /// The pool's folder.
        dir: PathBuf,
        /// Why, and what to use instead.
        reason: &'static str,
    },
    /// The pool's file system shares no blocks between files.
    #[error(
        "pool {}: its file system cannot share blocks between files (no reflink), so there are no snapshots and no clones; use XFS (mkfs.xfs -m reflink=1)",
        dir.display()
    )]
    NoReflink {
        /// The pool's folder.
        dir: PathBuf,
    },
    /// The pool belongs to another node.
    #[error(
        "pool {} belongs to node {owner}, and this is node {node}; give this node a folder of its own",
        dir.display()
    )]
    ForeignNode {
        /// The pool's folder.
        dir: PathBuf,
        /// The node in its superblock.
        owner: NodeId,
        /// The node that wanted it.
        node: NodeId,
    },
    /// The folder holds things, and they are not a pool's.
    #[error(
        "{} is no pool: it holds {found} and no superblock; give drover an empty folder",
        dir.display()
    )]
    NotAPool {
        /// The folder.
        dir: PathBuf,
        /// Something that is in it.
        found: String,
    },
    /// A newer drover wrote the pool.
    #[error(
        "pool {}: its format is version {found}, and this drover knows {known}; run the newer drover",
        dir.display()
    )]
    Version {
        /// The pool's folder.
        dir: PathBuf,
        /// The version in its superblock.
        found: u32,
        /// The version this program writes.
        known: u32,
    },
    /// Another process owns the pool.
    #[error(
        "pool {} is held by {holder}, after a wait of {waited:?}; a pool has one owner: stop that one first",
        dir.display()
    )]
    Held {
        /// The pool's folder.
        dir: PathBuf,
        /// Who, as far as the lock file tells.
        holder: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A file's contents are not what the pool wrote. It is never taken for a new one.
    #[error(
        "{} is damaged: {detail}; put it back from a copy, or remove what it belongs to by hand",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A record does not fit its slot.
    #[error("{}: a record of {length} bytes does not fit its slot of {slot}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The record's length in bytes.
        length: usize,
        /// The slot's room in bytes.
        slot: usize,
    },
    /// No such volume.
    #[error("the pool has no volume {0}")]
    NoVolume(VolumeId),
    /// No such snapshot.
    #[error("the pool has no snapshot {0}")]
    NoSnapshot(SnapshotId),
    /// The same id again with other properties.
    #[error("{0}")]
    Conflict(String),
    /// It is being made; ask again.
    #[error("{0}")]
    NotYet(String),
    /// A size that no volume can have.
    #[error("a size of {size} is not possible: {rule}")]
    BadSize {
        /// What was asked.
        size: Bytes,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// The pool has no room for it.
    #[error("pool {}: {needed} asked, {available} available", pool.display())]
    NoSpace {
        /// The pool's folder.
        pool: PathBuf,
        /// What was asked.
        needed: Bytes,
        /// What is left.
        available: Bytes,
    },
}

impl PoolError {
    /// The error of a failed call, ready for `map_err`.
    pub(super) fn call(call: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Call {
            call,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the file system had no room.
    pub fn is_full(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::Call { source, .. } => matches!(
                source.raw_os_error(),
                Some(nix::libc::ENOSPC | nix::libc::EDQUOT)
            ),
            _ => false,
        }
    }
}

//! The pool: a folder that holds volumes, snapshots and the home's records.
//!
//! ```text
//! POOL/lock                       its owner's lock (lock.rs)
//! POOL/superblock                 whose it is, how often it was opened
//! POOL/volumes/ID/{data,record,meta}, and reservations where a host has some
//! POOL/snapshots/ID/{data,meta}
//! ```
//!
//! A volume is a sparse file; a snapshot is another file that shares its
//! blocks. Volumes and snapshots are made in a folder with a leading dot and
//! appear whole by a rename, so a crash leaves all of one or nothing; what
//! else it leaves is removed at the next open.
//!
//! One process owns a pool, and owns it until its last write has landed. The
//! pool refuses: another node's superblock, a folder that holds other things,
//! btrfs, a damaged record (it is never taken for a new one), and promises of
//! more room than its limits allow. Without reflink it serves volumes and
//! refuses snapshots and clones.
//!
//! All calls block on the disk; async callers use a blocking thread. Who may
//! use a volume is not the pool's business but `crate::home`'s.

pub mod device;
#[cfg(any(test, fuzzing))]
pub(crate) mod doors;
mod error;
mod files;
pub mod lock;
pub mod record;
mod reservations;
mod slots;
mod snapshot;
mod superblock;
mod volume;

#[cfg(test)]
pub(crate) mod testing;

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::statfs::FsType;
use uuid::Uuid;

pub use error::PoolError;
pub use volume::Volume;

use crate::attach::ports::{Capacity, SnapshotInfo};
use crate::ids::{Bytes, NodeId, SnapshotId, VolumeId};
use files::Root;
use lock::PoolLock;
use superblock::Superblock;

const VOLUMES: &str = "volumes";
const SNAPSHOTS: &str = "snapshots";
/// Folders in the making and on their way out begin with these; no id does.
const NEW: &str = ".new-";
const GONE: &str = ".gone-";
const PROBES: [&str; 2] = [".probe-from", ".probe-to"];

/// What of a pool can be chosen. The defaults stand in `crate::config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// How long to wait for another owner's end.
    pub lock_wait: Duration,
    /// Room kept free: below it nothing new is made. Never taken for more than
    /// a tenth of the file system.
    pub low_water: Bytes,
    /// How much may be promised, in percent of the file system without its low
    /// water: 100 promises what is there, more counts on sparse volumes. The
    /// sizes of volumes count, snapshots do not.
    pub overcommit_percent: u32,
    /// Refuse a file system without reflink, instead of serving it without
    /// snapshots.
    pub require_reflink: bool,
}

/// A volume's place in the pool.
#[derive(Debug)]
enum VolumeEntry {
    /// Its files are being made.
    Making,
    /// It is there.
    Sound(Arc<Volume>),
    /// It is there and cannot be used; why.
    Damaged(String),
}

/// A snapshot's place in the pool.
#[derive(Debug)]
enum SnapshotEntry {
    /// Its files are being made.
    Making,
    /// It is there.
    Sound(SnapshotInfo),
    /// It is there and cannot be used; why.
    Damaged(String),
}

#[derive(Debug, Default)]
struct Inventory {
    volumes: BTreeMap<VolumeId, VolumeEntry>,
    snapshots: BTreeMap<SnapshotId, SnapshotEntry>,
    /// Bytes promised to volumes in the making or growing.
    reserved: u64,
}

impl Inventory {
    fn provisioned(&self) -> u64 {
        let sizes = self.volumes.values().map(|entry| match entry {
            VolumeEntry::Sound(volume) => volume.size().0,
            VolumeEntry::Making | VolumeEntry::Damaged(_) => 0,
        });
        sizes.fold(self.reserved, u64::saturating_add)
    }
}

/// An open pool. Its lock is held as long as this lives, and as long as any
/// clone of [`PoolLock::file`] does.
#[derive(Debug)]
pub struct Pool {
    root: Root,
    config: PoolConfig,
    superblock: Superblock,
    inventory: Mutex<Inventory>,
    lock: PoolLock,
}

/// What a pool holds and has room for, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Census {
    /// Room.
    pub capacity: Capacity,
    /// The sum of its volumes' sizes.
    pub provisioned: Bytes,
    /// How many volumes.
    pub volumes: u64,
    /// How many of them cannot be used.
    pub damaged: u64,
    /// How many snapshots.
    pub snapshots: u64,
}

impl Pool {
    /// Opens the pool in `dir` for `node`, or makes one in an empty folder.
    ///
    /// Waits at most [`PoolConfig::lock_wait`] for another owner, removes what
    /// a crash left half made, and raises the incarnation durably. A volume
    /// whose files are damaged does not keep the others from being served:
    /// every call about it answers with [`PoolError::Damaged`].
    pub fn open(dir: &Path, node: &NodeId, config: PoolConfig) -> Result<Arc<Self>, PoolError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(PoolError::call("mkdir", dir))?;
        let root = Root::open(dir)?;
        let kind = root.file_system()?;
        Self::open_on(root, kind, node, config)
    }

    fn open_on(
        root: Root,
        kind: FsType,
        node: &NodeId,
        config: PoolConfig,
    ) -> Result<Arc<Self>, PoolError> {
        files::admit(root.dir(), kind)?;
        superblock::refuse_other_folders(&root)?;
        let lock = PoolLock::take(&root, config.lock_wait)?;
        let (mut file, mut superblock) = superblock::open(&root, node)?;
        for folder in [VOLUMES, SNAPSHOTS] {
            root.folder(Path::new(folder))?;
        }
        root.sync_folder(Path::new(""))?;
        superblock.reflink = probe_reflink(&root, superblock.reflink)?;
        superblock.incarnation += 1;
        file.put(&superblock)?;
        if !superblock.reflink {
            let error = PoolError::NoReflink {
                dir: root.dir().to_owned(),
            };
            if config.require_reflink {
                return Err(error);
            }
            tracing::warn!("{error}");
        }
        let mut inventory = Inventory::default();
        volume::load(&root, &mut inventory)?;
        snapshot::load(&root, &mut inventory)?;
        tracing::info!(
            pool = %root.dir().display(), uuid = %superblock.pool, incarnation = superblock.incarnation,
            reflink = superblock.reflink, volumes = inventory.volumes.len(),
            snapshots = inventory.snapshots.len(), "pool opened"
        );
        Ok(Arc::new(Self {
            root,
            config,
            superblock,
            inventory: Mutex::new(inventory),
            lock,
        }))
    }

    /// The pool's folder.
    pub fn dir(&self) -> &Path {
        self.root.dir()
    }

    /// The node whose pool it is.
    pub fn node(&self) -> &NodeId {
        &self.superblock.node
    }

    /// The pool's own identity.
    pub fn uuid(&self) -> Uuid {
        self.superblock.pool
    }

    /// How many times the pool has been opened, this time included.
    pub fn incarnation(&self) -> u64 {
        self.superblock.incarnation
    }

    /// Whether snapshots and clones can be made.
    pub fn reflink(&self) -> bool {
        self.superblock.reflink
    }

    /// The lock, for I/O that can outlive the thread that began it.
    pub fn lock(&self) -> &PoolLock {
        &self.lock
    }

    /// Every volume, sound or not, in order of id.
    pub fn volumes(&self) -> Vec<VolumeId> {
        let inventory = self.inventory();
        let made = inventory
            .volumes
            .iter()
            .filter(|(_, entry)| !matches!(entry, VolumeEntry::Making));
        made.map(|(id, _)| id.clone()).collect()
    }

    /// Every sound snapshot, in order of id.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        let inventory = self.inventory();
        let sound = inventory
            .snapshots
            .values()
            .filter_map(|entry| match entry {
                SnapshotEntry::Sound(info) => Some(info.clone()),
                SnapshotEntry::Making | SnapshotEntry::Damaged(_) => None,
            });
        sound.collect()
    }

    /// Room for new volumes.
    pub fn capacity(&self) -> Result<Capacity, PoolError> {
        Ok(self.census()?.capacity)
    }

    /// What the pool holds and has room for.
    pub fn census(&self) -> Result<Census, PoolError> {
        let room = self.root.room()?;
        let inventory = self.inventory();
        let damaged = inventory
            .volumes
            .values()
            .filter(|entry| matches!(entry, VolumeEntry::Damaged(_)));
        let provisioned = inventory.provisioned();
        Ok(Census {
            capacity: Capacity {
                available: Bytes(available(&self.config, room, provisioned)),
                total: room.total,
            },
            provisioned: Bytes(provisioned),
            volumes: inventory.volumes.len() as u64,
            damaged: damaged.count() as u64,
            snapshots: inventory.snapshots.len() as u64,
        })
    }

    fn inventory(&self) -> MutexGuard<'_, Inventory> {
        self.inventory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Promises `needed` bytes, or says why not. The caller gives them back
    /// when the volume's own size counts them, or when it came to nothing.
    fn reserve(&self, inventory: &mut Inventory, needed: Bytes) -> Result<(), PoolError> {
        let room = self.root.room()?;
        let left = available(&self.config, room, inventory.provisioned());
        if needed.0 > left {
            return Err(PoolError::NoSpace {
                pool: self.dir().to_owned(),
                needed,
                available: Bytes(left),
            });
        }
        inventory.reserved += needed.0;
        Ok(())
    }

    fn need_reflink(&self) -> Result<(), PoolError> {
        if self.reflink() {
            return Ok(());
        }
        Err(PoolError::NoReflink {
            dir: self.dir().to_owned(),
        })
    }
}

/// The low-water mark of a file system of this size.
fn low_water(config: &PoolConfig, total: Bytes) -> u64 {
    config.low_water.0.min(total.0 / 10)
}

/// What may still be promised when `provisioned` bytes are.
fn available(config: &PoolConfig, room: files::Room, provisioned: u64) -> u64 {
    let kept = low_water(config, room.total);
    if room.free.0 <= kept {
        return 0;
    }
    let whole = u128::from(room.total.0 - kept) * u128::from(config.overcommit_percent) / 100;
    u64::try_from(whole)
        .unwrap_or(u64::MAX)
        .saturating_sub(provisioned)
}

/// Whether the file system shares blocks: tried, with two files of one block.
/// A full one cannot be asked; then what was found `before` counts.
fn probe_reflink(root: &Root, before: bool) -> Result<bool, PoolError> {
    let forget = || {
        for name in PROBES {
            let _ = std::fs::remove_file(root.path(Path::new(name)));
        }
    };
    forget();
    let found = try_reflink(root);
    forget();
    match found {
        Err(error) if error.is_full() => Ok(before),
        other => other,
    }
}

fn try_reflink(root: &Root) -> Result<bool, PoolError> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
    let [from, to] = PROBES.map(Path::new);
    let source = root.file(from, flags)?;
    std::os::unix::fs::FileExt::write_all_at(&source, &[1; 4096], 0)
        .map_err(PoolError::call("write", &root.path(from)))?;
    let target = root.file(to, flags)?;
    match files::clone_file(&source, &target) {
        Ok(()) => Ok(true),
        Err(error) if files::cannot_clone(&error) => Ok(false),
        Err(error) => Err(PoolError::call("FICLONE", &root.path(to))(error)),
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;

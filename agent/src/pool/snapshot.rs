//! Snapshots: files that share a volume's blocks as they were at one instant.
//!
//! What was acknowledged before the call is in the snapshot; what was in
//! flight may be or not, as after a power loss.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use nix::fcntl::OFlag;

use super::error::PoolError;
use super::files::Root;
use super::volume::{Source, entries};
use super::{GONE, Inventory, NEW, Pool, SNAPSHOTS, SnapshotEntry, Volume, low_water};
use crate::attach::ports::SnapshotInfo;
use crate::ids::{Bytes, SnapshotId, VolumeId};

const DATA: &str = "data";
const META: &str = "meta";

/// Where a snapshot's bytes are, below the pool's folder.
pub(super) fn data(id: &SnapshotId) -> PathBuf {
    Path::new(SNAPSHOTS).join(id.as_str()).join(DATA)
}

/// Reads every snapshot, and removes what was left half made or half removed.
pub(super) fn load(root: &Root, inventory: &mut Inventory) -> Result<(), PoolError> {
    for name in entries(root, SNAPSHOTS)? {
        let Ok(id) = name.parse::<SnapshotId>() else {
            tracing::warn!(pool = %root.dir().display(), name, "not a snapshot; left alone");
            continue;
        };
        let entry = match read(root, &id) {
            Ok(info) => SnapshotEntry::Sound(info),
            Err(error) => {
                tracing::error!(snapshot = %id, %error, "the snapshot cannot be used");
                SnapshotEntry::Damaged(error.to_string())
            }
        };
        inventory.snapshots.insert(id, entry);
    }
    Ok(())
}

fn read(root: &Root, id: &SnapshotId) -> Result<SnapshotInfo, PoolError> {
    let meta = Path::new(SNAPSHOTS).join(id.as_str()).join(META);
    let info: SnapshotInfo = root.read_json(&meta)?;
    if info.id != *id {
        return Err(PoolError::Damaged {
            path: root.path(&meta),
            detail: format!("it is of snapshot {}", info.id),
        });
    }
    let data = data(id);
    let length = root
        .file(&data, OFlag::O_RDONLY)?
        .metadata()
        .map_err(PoolError::call("stat", &root.path(&data)))?
        .len();
    if length != info.size.0 {
        return Err(PoolError::Damaged {
            path: root.path(&data),
            detail: format!("it is {length} bytes long and not {}", info.size),
        });
    }
    Ok(info)
}

impl Pool {
    /// Takes a snapshot of a volume as it is now. The same request again gives
    /// the snapshot that was taken.
    pub fn snapshot(&self, volume: &VolumeId, id: &SnapshotId) -> Result<SnapshotInfo, PoolError> {
        {
            let mut inventory = self.inventory();
            match inventory.snapshots.get(id) {
                None => {}
                Some(SnapshotEntry::Sound(info)) if info.volume == *volume => {
                    return Ok(info.clone());
                }
                Some(SnapshotEntry::Sound(info)) => {
                    return Err(PoolError::Conflict(format!(
                        "snapshot {id} exists already, of volume {}",
                        info.volume
                    )));
                }
                Some(SnapshotEntry::Making) => return Err(being_taken(id)),
                Some(SnapshotEntry::Damaged(why)) => return Err(self.damaged_snapshot(id, why)),
            }
            self.need_reflink()?;
            inventory
                .snapshots
                .insert(id.clone(), SnapshotEntry::Making);
        }
        let taken = self.take(volume, id);
        let mut inventory = self.inventory();
        match taken {
            Ok(info) => {
                inventory
                    .snapshots
                    .insert(id.clone(), SnapshotEntry::Sound(info.clone()));
                Ok(info)
            }
            Err(error) => {
                inventory.snapshots.remove(id);
                Err(error)
            }
        }
    }

    fn take(&self, volume: &VolumeId, id: &SnapshotId) -> Result<SnapshotInfo, PoolError> {
        let of = self.volume(volume)?;
        let room = self.root.room()?;
        if room.free.0 <= low_water(&self.config, room.total) {
            return Err(PoolError::NoSpace {
                pool: self.dir().to_owned(),
                needed: of.size(),
                available: Bytes(0),
            });
        }
        let folder = Path::new(SNAPSHOTS).join(format!("{NEW}{id}"));
        let built = self.build_snapshot(&folder, &of, id);
        if built.is_err() {
            let _ = self.root.remove_folder(&folder);
        }
        let info = built?;
        let place = Path::new(SNAPSHOTS).join(id.as_str());
        let gone = Path::new(SNAPSHOTS).join(format!("{GONE}{id}"));
        self.root.appear(&folder, &place, &gone, || Ok(info))
    }

    fn build_snapshot(
        &self,
        folder: &Path,
        of: &Arc<Volume>,
        id: &SnapshotId,
    ) -> Result<SnapshotInfo, PoolError> {
        self.root.remove_folder(folder)?;
        self.root.folder(folder)?;
        let relative = of
            .path()
            .strip_prefix(self.dir())
            .expect("a volume's file is in its pool");
        let source = Source {
            file: self.root.file(relative, OFlag::O_RDWR)?,
            path: of.path().to_owned(),
            volume: Some(Arc::clone(of)),
        };
        let data = folder.join(DATA);
        let path = self.root.path(&data);
        let file = self
            .root
            .file(&data, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL)?;
        source.clone_to(&file, &path)?;
        file.sync_all().map_err(PoolError::call("fsync", &path))?;
        let length = file
            .metadata()
            .map_err(PoolError::call("stat", &path))?
            .len();
        let info = SnapshotInfo {
            id: id.clone(),
            volume: of.id().clone(),
            size: Bytes(length),
            taken: SystemTime::now(),
        };
        self.root.write_json(&folder.join(META), &info)?;
        self.root.sync_folder(folder)?;
        Ok(info)
    }

    /// What is known of a snapshot.
    pub fn snapshot_info(&self, id: &SnapshotId) -> Result<SnapshotInfo, PoolError> {
        match self.inventory().snapshots.get(id) {
            Some(SnapshotEntry::Sound(info)) => Ok(info.clone()),
            Some(SnapshotEntry::Making) => Err(being_taken(id)),
            Some(SnapshotEntry::Damaged(why)) => Err(self.damaged_snapshot(id, why)),
            None => Err(PoolError::NoSnapshot(id.clone())),
        }
    }

    /// The file that holds a snapshot's bytes. Nobody writes to it.
    pub fn snapshot_path(&self, id: &SnapshotId) -> Result<PathBuf, PoolError> {
        self.snapshot_info(id)?;
        Ok(self.root.path(&data(id)))
    }

    /// Deletes a snapshot, a damaged one too. No such snapshot: success.
    pub fn delete_snapshot(&self, id: &SnapshotId) -> Result<(), PoolError> {
        match self.inventory().snapshots.get(id) {
            None => return Ok(()),
            Some(SnapshotEntry::Making) => return Err(being_taken(id)),
            Some(SnapshotEntry::Sound(_) | SnapshotEntry::Damaged(_)) => {}
        }
        let gone = Path::new(SNAPSHOTS).join(format!("{GONE}{id}"));
        self.root
            .retire(&Path::new(SNAPSHOTS).join(id.as_str()), &gone)?;
        self.inventory().snapshots.remove(id);
        if let Err(error) = self.root.remove_folder(&gone) {
            tracing::warn!(snapshot = %id, %error, "deleted; its space comes free at the next start");
        }
        Ok(())
    }

    fn damaged_snapshot(&self, id: &SnapshotId, why: &str) -> PoolError {
        PoolError::Damaged {
            path: self.dir().join(SNAPSHOTS).join(id.as_str()),
            detail: why.to_owned(),
        }
    }
}

fn being_taken(id: &SnapshotId) -> PoolError {
    PoolError::NotYet(format!("snapshot {id} is being taken; ask again"))
}

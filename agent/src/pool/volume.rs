//! Volumes: made, cloned, grown and deleted, each durably and whole.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use super::device::FirstWrite;
use super::error::PoolError;
use super::files::{self, Root};
use super::record::{Record, RecordFile};
use super::reservations::Holder;
use super::slots::SlotFile;
use super::{GONE, Inventory, NEW, Pool, VOLUMES, VolumeEntry};
use crate::attach::ports::Content;
use crate::block::{BLOCK, BlockDevice};
use crate::ids::{Bytes, VolumeId};

const DATA: &str = "data";
const RECORD: &str = "record";
const META: &str = "meta";

/// How a volume was asked for, so that a repeat of the request is known as one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    id: VolumeId,
    size: Bytes,
    content: Content,
}

/// A volume's files.
#[derive(Debug)]
pub struct Volume {
    meta: Meta,
    size: AtomicU64,
    path: PathBuf,
    record: RecordFile,
    /// The device that was opened last, if it still serves.
    served: Mutex<Weak<FirstWrite>>,
    pub(super) reservations: Holder,
}

impl Volume {
    /// Its id.
    pub fn id(&self) -> &VolumeId {
        &self.meta.id
    }

    /// Its size now.
    pub fn size(&self) -> Bytes {
        Bytes(self.size.load(Ordering::Acquire))
    }

    /// The file that holds its bytes.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The home's record of it.
    pub fn record(&self) -> &RecordFile {
        &self.record
    }

    /// From now on this device is the one to which hosts write.
    pub(super) fn serve_by(&self, device: &Arc<FirstWrite>) {
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        *served = Arc::downgrade(device);
    }

    /// The export served last ends before its commands do ([`FirstWrite::abandon`]).
    pub fn abandon(&self) {
        if let Some(device) = self.served() {
            device.abandon();
        }
    }

    /// The lock is held for a moment only, and never over a call of the device.
    fn served(&self) -> Option<Arc<FirstWrite>> {
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.upgrade()
    }

    /// Makes durable what `file`, one of its own, and its hosts wrote. Where it
    /// is served, through that device: the kernel tells of a failure once, and
    /// that must latch the device whose writes may be lost.
    pub(super) fn sync(&self, file: &File) -> Result<(), PoolError> {
        match self.served() {
            Some(device) => device
                .flush()
                .map_err(|error| std::io::Error::other(error.to_string())),
            None => file.sync_data(),
        }
        .map_err(PoolError::call("fdatasync", &self.path))
    }

    fn load(root: &Root, id: &VolumeId) -> Result<Self, PoolError> {
        let folder = Path::new(VOLUMES).join(id.as_str());
        let meta: Meta = root.read_json(&folder.join(META))?;
        if meta.id != *id {
            return Err(PoolError::Damaged {
                path: root.path(&folder.join(META)),
                detail: format!("it is of volume {}", meta.id),
            });
        }
        let data = folder.join(DATA);
        let length = root
            .file(&data, OFlag::O_RDWR)?
            .metadata()
            .map_err(PoolError::call("stat", &root.path(&data)))?
            .len();
        if length < meta.size.0 || !length.is_multiple_of(BLOCK) {
            return Err(PoolError::Damaged {
                path: root.path(&data),
                detail: format!("it is {length} bytes long and was made with {}", meta.size),
            });
        }
        let relative = folder.join(RECORD);
        let (file, record) = SlotFile::<Record>::open(root, &relative)?;
        Ok(Self {
            record: RecordFile::new(file, record, id, root.path(&relative))?,
            path: root.path(&data),
            size: AtomicU64::new(length),
            served: Mutex::default(),
            reservations: Holder::default(),
            meta,
        })
    }
}

/// Reads every volume, and removes what was left half made or half removed.
pub(super) fn load(root: &Root, inventory: &mut Inventory) -> Result<(), PoolError> {
    for name in entries(root, VOLUMES)? {
        let Ok(id) = name.parse::<VolumeId>() else {
            tracing::warn!(pool = %root.dir().display(), name, "not a volume; left alone");
            continue;
        };
        let entry = match Volume::load(root, &id) {
            Ok(volume) => VolumeEntry::Sound(Arc::new(volume)),
            Err(error) => {
                tracing::error!(volume = %id, %error, "the volume is not served");
                VolumeEntry::Damaged(error.to_string())
            }
        };
        inventory.volumes.insert(id, entry);
    }
    Ok(())
}

/// The names in a folder of the pool, after leftovers of a crash were removed.
pub(super) fn entries(root: &Root, folder: &'static str) -> Result<Vec<String>, PoolError> {
    let path = root.path(Path::new(folder));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(PoolError::call("list", &path))? {
        let entry = entry.map_err(PoolError::call("list", &path))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(NEW) || name.starts_with(GONE) {
            tracing::info!(pool = %root.dir().display(), name, "removing what a crash left");
            root.remove_folder(&Path::new(folder).join(&name))?;
        } else {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn check_size(size: Bytes) -> Result<(), PoolError> {
    let rule = if size.0 == 0 {
        "it must be more than 0"
    } else if !size.0.is_multiple_of(BLOCK) {
        "it must be a multiple of 4096 bytes"
    } else if i64::try_from(size.0).is_err() {
        "no file can be that long"
    } else {
        return Ok(());
    };
    Err(PoolError::BadSize { size, rule })
}

impl Pool {
    /// Makes a volume. The same request again: nothing changes.
    pub fn create(&self, id: &VolumeId, size: Bytes, content: &Content) -> Result<(), PoolError> {
        check_size(size)?;
        let meta = Meta {
            id: id.clone(),
            size,
            content: content.clone(),
        };
        {
            let mut inventory = self.inventory();
            match inventory.volumes.get(id) {
                None => {}
                Some(VolumeEntry::Sound(volume)) if volume.meta == meta => return Ok(()),
                Some(VolumeEntry::Sound(_)) => {
                    return Err(PoolError::Conflict(format!(
                        "volume {id} exists already, with another size or content"
                    )));
                }
                Some(VolumeEntry::Making) => return Err(being_made(id)),
                Some(VolumeEntry::Damaged(why)) => return Err(self.damaged(id, why)),
            }
            self.reserve(&mut inventory, size)?;
            inventory.volumes.insert(id.clone(), VolumeEntry::Making);
        }
        let made = self.make(meta);
        let mut inventory = self.inventory();
        inventory.reserved -= size.0;
        match made {
            Ok(volume) => {
                inventory
                    .volumes
                    .insert(id.clone(), VolumeEntry::Sound(Arc::new(volume)));
                Ok(())
            }
            Err(error) => {
                inventory.volumes.remove(id);
                Err(error)
            }
        }
    }

    fn make(&self, meta: Meta) -> Result<Volume, PoolError> {
        let source = self.source(&meta)?;
        let folder = Path::new(VOLUMES).join(format!("{NEW}{}", meta.id));
        let built = self.build(&folder, &meta, source);
        if built.is_err() {
            let _ = self.root.remove_folder(&folder);
        }
        built?;
        let place = Path::new(VOLUMES).join(meta.id.as_str());
        let gone = Path::new(VOLUMES).join(format!("{GONE}{}", meta.id));
        self.root.appear(&folder, &place, &gone, || {
            Volume::load(&self.root, &meta.id)
        })
    }

    /// Writes a volume's three files into `folder`, durably.
    fn build(&self, folder: &Path, meta: &Meta, source: Option<Source>) -> Result<(), PoolError> {
        self.root.remove_folder(folder)?;
        self.root.folder(folder)?;
        let data = folder.join(DATA);
        let path = self.root.path(&data);
        let file = self
            .root
            .file(&data, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL)?;
        if let Some(source) = &source {
            source.clone_to(&file, &path)?;
        }
        file.set_len(meta.size.0)
            .map_err(PoolError::call("ftruncate", &path))?;
        file.sync_all().map_err(PoolError::call("fsync", &path))?;
        let record = Record::new(meta.id.clone(), source.is_some());
        SlotFile::create(&self.root, &folder.join(RECORD), &record)?;
        self.root.write_json(&folder.join(META), meta)?;
        self.root.sync_folder(folder)
    }

    fn source(&self, meta: &Meta) -> Result<Option<Source>, PoolError> {
        let (relative, size, volume) = match &meta.content {
            Content::Empty => return Ok(None),
            Content::Snapshot(id) => {
                self.need_reflink()?;
                let size = self.snapshot_info(id)?.size;
                (super::snapshot::data(id), size, None)
            }
            Content::Volume(id) => {
                self.need_reflink()?;
                let volume = self.volume(id)?;
                let data = Path::new(VOLUMES).join(id.as_str()).join(DATA);
                (data, volume.size(), Some(volume))
            }
        };
        if meta.size < size {
            return Err(PoolError::BadSize {
                size: meta.size,
                rule: "a clone cannot be smaller than its source",
            });
        }
        Ok(Some(Source {
            file: self.root.file(&relative, OFlag::O_RDWR)?,
            path: self.root.path(&relative),
            volume,
        }))
    }

    /// A volume, or why it cannot be used.
    pub fn volume(&self, id: &VolumeId) -> Result<Arc<Volume>, PoolError> {
        match self.inventory().volumes.get(id) {
            Some(VolumeEntry::Sound(volume)) => Ok(Arc::clone(volume)),
            Some(VolumeEntry::Damaged(why)) => Err(self.damaged(id, why)),
            Some(VolumeEntry::Making) => Err(being_made(id)),
            None => Err(PoolError::NoVolume(id.clone())),
        }
    }

    /// The file that holds a volume's bytes.
    pub fn volume_path(&self, id: &VolumeId) -> Result<PathBuf, PoolError> {
        Ok(self.volume(id)?.path.clone())
    }

    /// Deletes a volume with its record. No such volume: success. A damaged
    /// one is left alone, since nobody knows who still uses it.
    pub fn delete(&self, id: &VolumeId) -> Result<(), PoolError> {
        match self.volume(id) {
            Ok(_) => {}
            Err(PoolError::NoVolume(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
        let gone = Path::new(VOLUMES).join(format!("{GONE}{id}"));
        self.root
            .retire(&Path::new(VOLUMES).join(id.as_str()), &gone)?;
        self.inventory().volumes.remove(id);
        if let Err(error) = self.root.remove_folder(&gone) {
            tracing::warn!(volume = %id, %error, "deleted; its space comes free at the next start");
        }
        Ok(())
    }

    /// Grows a volume to at least `size`, durably, and returns its size.
    pub fn expand(&self, id: &VolumeId, size: Bytes) -> Result<Bytes, PoolError> {
        check_size(size)?;
        let volume = self.volume(id)?;
        let more = size.0.saturating_sub(volume.size().0);
        if more == 0 {
            return Ok(volume.size());
        }
        self.reserve(&mut self.inventory(), Bytes(more))?;
        let data = Path::new(VOLUMES).join(id.as_str()).join(DATA);
        let grown = self.root.file(&data, OFlag::O_RDWR).and_then(|file| {
            file.set_len(size.0)
                .map_err(PoolError::call("ftruncate", &volume.path))?;
            volume.sync(&file)
        });
        let mut inventory = self.inventory();
        inventory.reserved -= more;
        grown?;
        volume.size.store(size.0, Ordering::Release);
        Ok(size)
    }

    fn damaged(&self, id: &VolumeId, why: &str) -> PoolError {
        PoolError::Damaged {
            path: self.dir().join(VOLUMES).join(id.as_str()),
            detail: why.to_owned(),
        }
    }
}

fn being_made(id: &VolumeId) -> PoolError {
    PoolError::NotYet(format!("volume {id} is being made; ask again"))
}

/// What a new file is cloned from.
#[derive(Debug)]
pub(super) struct Source {
    pub file: File,
    pub path: PathBuf,
    /// Whose file it is; none: a snapshot's.
    pub volume: Option<Arc<Volume>>,
}

impl Source {
    /// Makes what was acknowledged durable, then shares it all with `target`.
    pub fn clone_to(&self, target: &File, path: &Path) -> Result<(), PoolError> {
        match &self.volume {
            Some(volume) => volume.sync(&self.file)?,
            None => self
                .file
                .sync_data()
                .map_err(PoolError::call("fdatasync", &self.path))?,
        }
        files::clone_file(&self.file, target).map_err(PoolError::call("FICLONE", path))
    }
}

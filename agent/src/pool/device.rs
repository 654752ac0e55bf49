//! The device of a volume: its file, and the notes of its first write and of a
//! failed flush.
//!
//! Only a volume that was never written may be formatted, so before the first
//! write is let through to the file, the record says on disk that there was one.
//!
//! After a flush that failed nothing of the export is served any more. The
//! record says so before anybody is told of the failure, so that a restart of
//! the agent does not answer the next flush over what was lost.
//!
//! Beside commands of an ended export that may never end, nothing is asked of the
//! file that waits for all of its I/O, see [`FirstWrite::beside_unsettled`].

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::errno::Errno;

use super::error::PoolError;
use super::lock::PoolLock;
use super::volume::Volume;
use super::{Pool, VOLUMES};
use crate::block::file::FileDevice;
use crate::block::{BLOCK, BlockDevice, DeviceError, Direct, Extent};
use crate::ids::{Bytes, Lba, VolumeId};

/// Blocks of zeroes that are written at once: 1 MiB.
const ZEROES: u64 = 256;

/// A device over a file of the pool's, which can grow.
pub trait Backing: BlockDevice {
    /// Takes note of the file's new size; it never shrinks.
    fn grow(&self, size: Bytes);
}

impl Backing for FileDevice {
    fn grow(&self, size: Bytes) {
        FileDevice::grow(self, size);
    }
}

/// Makes the device over a volume's file, which is open for reading and
/// writing. The path only names it.
pub type OpenBacking =
    Arc<dyn Fn(File, &Path, Bytes) -> Result<Arc<dyn Backing>, DeviceError> + Send + Sync>;

/// A volume's device: every write after the first goes straight through.
pub struct FirstWrite {
    backing: Arc<dyn Backing>,
    volume: Arc<Volume>,
    written: AtomicBool,
    /// Why a flush of this export failed, if one did, or nothing more of it counts.
    failed_flush: OnceLock<String>,
    /// Whether the record says so, or need not.
    failure_noted: Mutex<bool>,
    beside_unsettled: AtomicBool,
    _lock: PoolLock,
}

impl Pool {
    /// Opens a volume's device.
    pub fn device(&self, id: &VolumeId, open: &OpenBacking) -> Result<Arc<FirstWrite>, PoolError> {
        let volume = self.volume(id)?;
        let relative = Path::new(VOLUMES).join(id.as_str()).join("data");
        let file = self.root.file(&relative, nix::fcntl::OFlag::O_RDWR)?;
        let backing =
            open(file, volume.path(), volume.size()).map_err(|error| PoolError::Call {
                call: "open device on",
                path: volume.path().to_owned(),
                source: std::io::Error::other(error.to_string()),
            })?;
        let record = volume.record().get();
        let failed_flush = OnceLock::new();
        if let Some(why) = record.failed_flush() {
            tracing::error!(volume = %id, why, "a flush failed in this epoch: it serves nothing any more");
            failed_flush.get_or_init(|| why.to_owned());
        }
        let device = Arc::new(FirstWrite {
            backing,
            written: AtomicBool::new(record.ever_written),
            failure_noted: Mutex::new(failed_flush.get().is_some()),
            failed_flush,
            beside_unsettled: AtomicBool::new(false),
            volume: Arc::clone(&volume),
            _lock: self.lock.clone(),
        });
        volume.serve_by(&device);
        Ok(device)
    }
}

impl FirstWrite {
    /// Takes note of the volume's new size.
    pub fn grow(&self, size: Bytes) {
        self.backing.grow(size);
    }

    /// Commands of an ended export are inside the file, and may be for ever. To
    /// punch a hole or to zero a range waits for them, under a lock that all other
    /// I/O then waits for (fs/xfs/xfs_file.c, xfs_file_fallocate;
    /// fs/ext4/extents.c, ext4_fallocate: inode_dio_wait). So this device writes
    /// its zeroes, and lets be what it is only asked to give back.
    pub fn beside_unsettled(&self) {
        self.beside_unsettled.store(true, Ordering::Release);
    }

    /// Whether there are such blocks.
    fn range(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        let (size, end) = (self.size(), lba.0.saturating_add(blocks));
        if end > size.0 / BLOCK {
            return Err(DeviceError::OutOfRange { lba, blocks, size });
        }
        Ok(())
    }

    fn write_out_zeroes(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.range(lba, blocks)?;
        let zeroes = vec![0; BLOCK as usize * blocks.min(ZEROES) as usize];
        let mut done = 0;
        while done < blocks {
            let some = (blocks - done).min(ZEROES);
            let some_zeroes = &zeroes[..BLOCK as usize * some as usize];
            self.backing.write(Lba(lba.0 + done), some_zeroes, false)?;
            done += some;
        }
        Ok(())
    }

    /// Its export ends before its commands do: what the file has begun may end
    /// at any time, and nothing more is begun, nor noted on the next export.
    /// Waits for a note that is just being made.
    pub(super) fn abandon(&self) {
        let noted = self.failure_noted.lock();
        let mut noted = noted.unwrap_or_else(PoisonError::into_inner);
        let why = || "the export has ended without its last commands".to_owned();
        self.failed_flush.get_or_init(why);
        *noted = true;
    }

    /// Returns when the record says on disk that the volume was written.
    fn note_write(&self) -> Result<(), DeviceError> {
        if self.written.load(Ordering::Acquire) {
            return Ok(());
        }
        let noted = self
            .volume
            .record()
            .update(|record| record.ever_written = true);
        match noted {
            Ok(_) => {
                self.written.store(true, Ordering::Release);
                Ok(())
            }
            Err(error) if error.is_full() => Err(DeviceError::NoSpace),
            Err(error) => Err(DeviceError::Io {
                call: format!(
                    "note the first write of volume {}: {error}",
                    self.volume.id()
                ),
                errno: errno(&error),
            }),
        }
    }

    fn usable(&self) -> Result<(), DeviceError> {
        match self.failed_flush.get() {
            None => Ok(()),
            Some(why) => {
                self.note_failed_flush(why);
                Err(DeviceError::FlushFailed(why.clone()))
            }
        }
    }

    /// What came of a call of the file's; a failed flush is latched.
    fn seen<T>(&self, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
        result.inspect_err(|error| self.look_at(error))
    }

    fn look_at(&self, error: &DeviceError) {
        if let DeviceError::FlushFailed(why) = error {
            let why = self.failed_flush.get_or_init(|| why.clone());
            self.note_failed_flush(why);
        }
    }

    /// Returns when the record says on disk that a flush failed, or cannot be
    /// made to: then each further command tries again.
    fn note_failed_flush(&self, why: &str) {
        let noted = self.failure_noted.lock();
        let mut noted = noted.unwrap_or_else(PoisonError::into_inner);
        if *noted {
            return;
        }
        let record = self.volume.record();
        match record.update(|record| *noted = record.note_failed_flush(why)) {
            Ok(_) => {}
            Err(error) => {
                *noted = false;
                tracing::error!(
                    volume = %self.volume.id(), %error,
                    "a failed flush could not be recorded: after a restart the epoch would be served on"
                );
            }
        }
    }
}

fn errno(error: &PoolError) -> Errno {
    match error {
        PoolError::Call { source, .. } => source.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        _ => Errno::EIO,
    }
}

impl BlockDevice for FirstWrite {
    fn size(&self) -> Bytes {
        self.backing.size()
    }

    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.usable()?;
        self.seen(self.backing.read(lba, buffer))
    }

    fn write(&self, lba: Lba, data: &[u8], fua: bool) -> Result<(), DeviceError> {
        self.usable()?;
        self.note_write()?;
        self.seen(self.backing.write(lba, data, fua))
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.usable()?;
        self.seen(self.backing.flush())
    }

    fn write_zeroes(&self, lba: Lba, blocks: u64, unmap: bool) -> Result<(), DeviceError> {
        self.usable()?;
        self.note_write()?;
        self.seen(if self.beside_unsettled.load(Ordering::Acquire) {
            self.write_out_zeroes(lba, blocks)
        } else {
            self.backing.write_zeroes(lba, blocks, unmap)
        })
    }

    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.usable()?;
        if self.beside_unsettled.load(Ordering::Acquire) {
            return self.range(lba, blocks);
        }
        self.seen(self.backing.deallocate(lba, blocks))
    }

    fn mapping(&self, lba: Lba, blocks: u64) -> Result<Extent, DeviceError> {
        self.usable()?;
        self.seen(self.backing.mapping(lba, blocks))
    }

    fn direct(&self, lba: Lba, length: usize, write: bool) -> Option<Direct> {
        let noted = !write || self.written.load(Ordering::Acquire);
        let usable = noted && self.failed_flush.get().is_none();
        usable.then(|| self.backing.direct(lba, length, write))?
    }

    fn durable_write_failed(&self, errno: Errno) -> DeviceError {
        let error = self.backing.durable_write_failed(errno);
        self.look_at(&error);
        error
    }

    fn in_memory(&self) -> bool {
        // The notes are on a disk.
        self.backing.in_memory()
            && self.written.load(Ordering::Acquire)
            && self.failed_flush.get().is_none()
    }
}

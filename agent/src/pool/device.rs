//! The device of a volume: its file, and the note of its first write.
//!
//! Only a volume that was never written may be formatted, so before the first
//! write is let through to the file, the record says on disk that there was one.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::error::PoolError;
use super::lock::PoolLock;
use super::volume::Volume;
use super::{Pool, VOLUMES};
use crate::block::file::FileDevice;
use crate::block::{BlockDevice, DeviceError, Direct, Extent};
use crate::ids::{Bytes, Lba, VolumeId};

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
        Ok(Arc::new(FirstWrite {
            backing,
            written: AtomicBool::new(volume.record().get().ever_written),
            volume,
            _lock: self.lock.clone(),
        }))
    }
}

impl FirstWrite {
    /// Takes note of the volume's new size.
    pub fn grow(&self, size: Bytes) {
        self.backing.grow(size);
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
        self.backing.read(lba, buffer)
    }

    fn write(&self, lba: Lba, data: &[u8], fua: bool) -> Result<(), DeviceError> {
        self.note_write()?;
        self.backing.write(lba, data, fua)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.backing.flush()
    }

    fn write_zeroes(&self, lba: Lba, blocks: u64, unmap: bool) -> Result<(), DeviceError> {
        self.note_write()?;
        self.backing.write_zeroes(lba, blocks, unmap)
    }

    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.backing.deallocate(lba, blocks)
    }

    fn mapping(&self, lba: Lba, blocks: u64) -> Result<Extent, DeviceError> {
        self.backing.mapping(lba, blocks)
    }

    fn direct(&self, lba: Lba, length: usize, write: bool) -> Option<Direct> {
        let noted = !write || self.written.load(Ordering::Acquire);
        noted.then(|| self.backing.direct(lba, length, write))?
    }

    fn durable_write_failed(&self, errno: Errno) -> DeviceError {
        self.backing.durable_write_failed(errno)
    }

    fn in_memory(&self) -> bool {
        // The note of the first write is on a disk.
        self.backing.in_memory() && self.written.load(Ordering::Acquire)
    }
}

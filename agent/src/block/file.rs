//! A volume's file as a block device.
//!
//! Reads and writes are direct (O_DIRECT), so that an acknowledged write is in
//! the disk's hands and never in a page cache that two processes could differ
//! about. A thread that the disk holds in D state keeps the process's
//! descriptors, and so its lock on the pool, after kill -9: that is wanted,
//! since the write it waits for may still land, and a successor must not serve
//! before it has.
//!
//! A flush that fails latches the device: the kernel may have dropped what it
//! could not write and reports that once, so nothing later can be believed.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::{Pod, Zeroable};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::unistd::{Whence, lseek};

use super::device::{BLOCK, BlockDevice, DeviceError, Direct, Extent};
use super::flushes::Flushes;
use crate::ids::{Bytes, Lba};

/// Zeroes written at once where the file system cannot make them itself.
const ZEROES: u64 = 1 << 20;

/// Memory that O_DIRECT takes: aligned to a block, a whole number of them.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; BLOCK as usize]);

/// A [`BlockDevice`] over an open file.
pub struct FileDevice {
    file: OpenFile,
    size: AtomicU64,
    in_memory: bool,
    /// One at a time: of two at once only one is told of a failure.
    flushes: Flushes,
}

struct OpenFile {
    file: File,
    path: PathBuf,
    direct: bool,
    failed_flush: OnceLock<String>,
}

impl FileDevice {
    /// Serves `size` bytes of `file`, which must be open for reading (and for
    /// writing, if it is to be written). `path` only names it in errors.
    ///
    /// Turns O_DIRECT on; where the file system has none (tmpfs before 6.6)
    /// it says so in the log and goes through the page cache.
    ///
    /// # Errors
    /// A size that is not a whole number of blocks; a descriptor whose flags
    /// cannot be read.
    pub fn new(file: File, path: &Path, size: Bytes) -> Result<Self, DeviceError> {
        let failed = |call: &str, errno| DeviceError::Io {
            call: format!("{call} {}", path.display()),
            errno,
        };
        if !size.0.is_multiple_of(BLOCK) {
            return Err(failed(
                "serve a size that is not whole blocks of",
                Errno::EINVAL,
            ));
        }
        let flags =
            fcntl(&file, FcntlArg::F_GETFL).map_err(|errno| failed("fcntl F_GETFL", errno))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_DIRECT;
        let direct = match fcntl(&file, FcntlArg::F_SETFL(flags)) {
            Ok(_) => true,
            Err(errno) => {
                tracing::warn!(
                    file = %path.display(), %errno,
                    "this file system has no direct I/O; going through the page cache"
                );
                false
            }
        };
        // A ring would hand each of its transfers to a kernel thread: tmpfs
        // has none that do not wait (mm/shmem.c sets no FMODE_NOWAIT).
        let in_memory = nix::sys::statfs::fstatfs(&file)
            .is_ok_and(|system| system.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC);
        let path = path.to_owned();
        Ok(Self {
            in_memory,
            file: OpenFile {
                file,
                path,
                direct,
                failed_flush: OnceLock::new(),
            },
            size: AtomicU64::new(size.0),
            flushes: Flushes::default(),
        })
    }

    /// Serves `size` bytes from now on, rounded down to whole blocks. A
    /// smaller size than now changes nothing. The file must be that long already.
    pub fn grow(&self, size: Bytes) {
        self.size
            .fetch_max(size.0 - size.0 % BLOCK, Ordering::AcqRel);
    }

    /// The bytes that `blocks` from `lba` on are: (first, length).
    fn range(&self, lba: Lba, blocks: u64) -> Result<(u64, u64), DeviceError> {
        let size = self.size();
        let range = || {
            let start = lba.0.checked_mul(BLOCK)?;
            let length = blocks.checked_mul(BLOCK)?;
            let end = start.checked_add(length)?;
            (end <= size.0).then_some((start, length))
        };
        range().ok_or(DeviceError::OutOfRange { lba, blocks, size })
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> Bytes {
        Bytes(self.size.load(Ordering::Acquire))
    }

    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        let blocks = self.file.whole_blocks(buffer.len())?;
        let (start, _) = self.range(lba, blocks)?;
        self.file.usable()?;
        if aligned(buffer) {
            return self.file.read(start, buffer);
        }
        let mut pages = pages(blocks);
        self.file
            .read(start, bytemuck::cast_slice_mut(&mut pages))?;
        buffer.copy_from_slice(bytemuck::cast_slice(&pages));
        Ok(())
    }

    fn write(&self, lba: Lba, data: &[u8], fua: bool) -> Result<(), DeviceError> {
        let blocks = self.file.whole_blocks(data.len())?;
        let (start, _) = self.range(lba, blocks)?;
        self.file.usable()?;
        // Through the page cache a failure of the durable half could be told
        // to a flush beside it instead: there it is a write and a flush.
        let durable = fua && self.file.direct;
        if aligned(data) {
            self.file.write(start, data, durable)?;
        } else {
            let mut pages = pages(blocks);
            bytemuck::cast_slice_mut(&mut pages).copy_from_slice(data);
            self.file
                .write(start, bytemuck::cast_slice(&pages), durable)?;
        }
        if fua && !durable {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        // A flush that waited for one that failed has failed as well.
        self.flushes
            .share(|| self.file.usable(), || self.file.flush())
    }

    fn write_zeroes(&self, lba: Lba, blocks: u64, unmap: bool) -> Result<(), DeviceError> {
        let (start, length) = self.range(lba, blocks)?;
        self.file.usable()?;
        if length == 0 {
            Ok(())
        } else if unmap {
            self.file.punch(start, length)
        } else {
            self.file.zero(start, length)
        }
    }

    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.write_zeroes(lba, blocks, true)
    }

    fn mapping(&self, lba: Lba, blocks: u64) -> Result<Extent, DeviceError> {
        let (start, length) = self.range(lba, blocks)?;
        self.file.usable()?;
        let end = start + length;
        let (next, mapped) = match self.file.data_from(start, end)? {
            // A block is mapped as soon as a part of it is.
            data if data < start + BLOCK => {
                let hole = self.file.hole_from(data, end)?;
                (hole.max(start + 1).next_multiple_of(BLOCK), true)
            }
            data => (data - data % BLOCK, false),
        };
        let blocks = (next.min(end) - start) / BLOCK;
        Ok(Extent { blocks, mapped })
    }

    fn direct(&self, lba: Lba, length: usize, _write: bool) -> Option<Direct> {
        let blocks = self.file.whole_blocks(length).ok()?;
        let (offset, _) = self.range(lba, blocks).ok()?;
        let usable = self.file.direct && self.file.failed_flush.get().is_none();
        usable.then(|| Direct {
            file: self.file.file.as_raw_fd(),
            offset,
        })
    }

    fn durable_write_failed(&self, errno: Errno) -> DeviceError {
        self.file.durable_write_failed(errno)
    }

    fn in_memory(&self) -> bool {
        self.in_memory
    }
}

impl OpenFile {
    fn error(&self, call: &str, errno: Errno) -> DeviceError {
        match errno {
            Errno::ENOSPC | Errno::EDQUOT => DeviceError::NoSpace,
            errno => DeviceError::Io {
                call: format!("{call} {}", self.path.display()),
                errno,
            },
        }
    }

    fn usable(&self) -> Result<(), DeviceError> {
        match self.failed_flush.get() {
            Some(why) => Err(DeviceError::FlushFailed(why.clone())),
            None => Ok(()),
        }
    }

    fn latch(&self, call: &str, errno: Errno) -> DeviceError {
        let why = format!("{call} {}: {errno}", self.path.display());
        tracing::error!(%why, "the device serves nothing any more");
        DeviceError::FlushFailed(self.failed_flush.get_or_init(|| why).clone())
    }

    fn whole_blocks(&self, length: usize) -> Result<u64, DeviceError> {
        let length = length as u64;
        if length.is_multiple_of(BLOCK) {
            Ok(length / BLOCK)
        } else {
            Err(self.error("transfer of a part of a block of", Errno::EINVAL))
        }
    }

    fn read(&self, start: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset(start + done as u64);
            match nix::sys::uio::pread(&self.file, &mut buffer[done..], at) {
                // The file is shorter than the volume: it was cut, and what was there is lost.
                Ok(0) => return Err(self.error("read beyond the end of", Errno::EIO)),
                Ok(read) => done += read,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.error("read", errno)),
            }
        }
        Ok(())
    }

    fn write(&self, start: u64, data: &[u8], durable: bool) -> Result<(), DeviceError> {
        let mut done = 0;
        while done < data.len() {
            match self.write_some(start + done as u64, &data[done..], durable) {
                Ok(0) => return Err(self.error("write (nothing was taken) to", Errno::EIO)),
                Ok(written) => done += written,
                Err(Errno::EINTR) => {}
                Err(errno) if durable => return Err(self.durable_write_failed(errno)),
                Err(errno) => return Err(self.error("write", errno)),
            }
        }
        Ok(())
    }

    /// Which half failed, the write or the flush, is not told. Without room
    /// nothing was written, so nothing had to be flushed.
    fn durable_write_failed(&self, errno: Errno) -> DeviceError {
        match self.error("write with RWF_DSYNC", errno) {
            DeviceError::NoSpace => DeviceError::NoSpace,
            _ => self.latch("write with RWF_DSYNC", errno),
        }
    }

    fn write_some(&self, at: u64, data: &[u8], durable: bool) -> Result<usize, Errno> {
        let data = [IoSlice::new(data)];
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        // SAFETY: IoSlice has the layout of iovec (std guarantees it), the one
        // entry points to `data`, which outlives the call, and the call only reads it.
        let written = unsafe {
            libc::pwritev2(
                self.file.as_raw_fd(),
                data.as_ptr().cast(),
                1,
                offset(at),
                flags,
            )
        };
        Errno::result(written).map(isize::cast_unsigned)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        loop {
            match nix::unistd::fdatasync(&self.file) {
                Ok(()) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.latch("fdatasync", errno)),
            }
        }
    }

    /// Where the next data is, from `start` on; `end`, if there is none before.
    ///
    /// What a file system has only reserved is no data to it (lseek(2)): such
    /// an extent becomes data when a write into it ends, ahead of its caller
    /// being told (fs/xfs/xfs_file.c, xfs_dio_write_end_io; fs/ext4/file.c,
    /// ext4_dio_write_end_io), so no acknowledged write is taken for a hole.
    fn data_from(&self, start: u64, end: u64) -> Result<u64, DeviceError> {
        match lseek(&self.file, offset(start), Whence::SeekData) {
            Ok(at) => Ok(at.cast_unsigned().min(end)),
            // Nothing up to the file's end, which must not come too early.
            Err(Errno::ENXIO) if self.length()? >= end => Ok(end),
            Err(errno) => Err(self.error("lseek SEEK_DATA", errno)),
        }
    }

    /// Where the data that begins at `start` ends; at `end` at the latest.
    fn hole_from(&self, start: u64, end: u64) -> Result<u64, DeviceError> {
        match lseek(&self.file, offset(start), Whence::SeekHole) {
            Ok(at) => Ok(at.cast_unsigned().min(end)),
            Err(errno) => Err(self.error("lseek SEEK_HOLE", errno)),
        }
    }

    fn length(&self) -> Result<u64, DeviceError> {
        let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
        let metadata = self.file.metadata();
        let metadata = metadata.map_err(|error| self.error("fstat", errno(error)))?;
        Ok(metadata.len())
    }

    fn punch(&self, start: u64, length: u64) -> Result<(), DeviceError> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.allocate(mode, start, length)
            .map_err(|errno| self.error("fallocate PUNCH_HOLE", errno))
    }

    /// Zeroes that keep their space, by the file system or, where it cannot, by writing them.
    fn zero(&self, start: u64, length: u64) -> Result<(), DeviceError> {
        let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.allocate(mode, start, length) {
            Ok(()) => return Ok(()),
            Err(Errno::EOPNOTSUPP) => {}
            Err(errno) => return Err(self.error("fallocate ZERO_RANGE", errno)),
        }
        let zeroes = pages(length.min(ZEROES) / BLOCK);
        let zeroes: &[u8] = bytemuck::cast_slice(&zeroes);
        let mut done = 0;
        while done < length {
            let some = (length - done).min(ZEROES);
            self.write(start + done, &zeroes[..size(some)], false)?;
            done += some;
        }
        Ok(())
    }

    fn allocate(&self, mode: FallocateFlags, start: u64, length: u64) -> Result<(), Errno> {
        loop {
            match fallocate(&self.file, mode, offset(start), offset(length)) {
                Err(Errno::EINTR) => {}
                other => return other,
            }
        }
    }
}

fn pages(blocks: u64) -> Vec<Page> {
    bytemuck::zeroed_vec(size(blocks))
}

/// Whether O_DIRECT takes this memory.
fn aligned(buffer: &[u8]) -> bool {
    buffer.as_ptr().addr().is_multiple_of(size_of::<Page>())
}

/// A count that came from a buffer's length, or is smaller than one.
fn size(count: u64) -> usize {
    usize::try_from(count).expect("drover is built for 64-bit machines")
}

/// A file offset. What does not fit is beyond every file, and the kernel says so.
fn offset(at: u64) -> i64 {
    i64::try_from(at).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;

//! The block device that a frontend serves.

use std::os::fd::RawFd;

use crate::ids::{Bytes, Lba};

/// Bytes in a logical block. Every volume's size is a multiple of it.
pub const BLOCK: u64 = 4096;

/// Why a device did not do what it was asked. Each frontend has its protocol's
/// own status for each of these.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DeviceError {
    /// Blocks beyond the end.
    #[error("blocks {lba}+{blocks} are beyond the end of the device ({size})")]
    OutOfRange {
        /// First block asked for.
        lba: Lba,
        /// Blocks asked for.
        blocks: u64,
        /// The device's size.
        size: Bytes,
    },
    /// The pool has no room for the write; nothing that was written is lost.
    #[error("the pool is full")]
    NoSpace,
    /// A flush failed once, so nothing later can be promised (the export latches).
    #[error("an earlier flush failed: {0}")]
    FlushFailed(String),
    /// The file or disk beneath failed.
    #[error("{call}: {errno}")]
    Io {
        /// The failed call and its object.
        call: String,
        /// The kernel's reason.
        errno: nix::errno::Errno,
    },
}

/// A transfer that a ring may make itself: a whole number of blocks, at this
/// place of this open file, in memory that O_DIRECT takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Direct {
    /// The open file, for as long as the device is held.
    pub file: RawFd,
    /// Where in it, in bytes.
    pub offset: u64,
}

/// Blocks in a row that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// How many.
    pub blocks: u64,
    /// Whether they may hold something. Otherwise they read as zeroes.
    pub mapped: bool,
}

/// Blocks that can be read and written, and made durable. Each call waits for
/// the device, so it is made on a thread that may wait.
///
/// A write is durable when [`flush`](BlockDevice::flush) that began after the
/// write's end has ended, or when it was written with `fua`.
pub trait BlockDevice: Send + Sync + 'static {
    /// The size now; it grows when the volume is expanded.
    fn size(&self) -> Bytes;

    /// Fills `buffer`, a whole number of blocks, from `lba` on.
    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError>;

    /// Writes `data`, a whole number of blocks, from `lba` on; with `fua` it
    /// is durable when this returns.
    fn write(&self, lba: Lba, data: &[u8], fua: bool) -> Result<(), DeviceError>;

    /// Makes durable every write that ended before this began.
    fn flush(&self) -> Result<(), DeviceError>;

    /// Makes blocks read as zeroes. `unmap` allows the space to be given back.
    fn write_zeroes(&self, lba: Lba, blocks: u64, unmap: bool) -> Result<(), DeviceError>;

    /// Gives back the space of blocks, which then read as zeroes; or, since no
    /// more than a hint is asked for (NVM Command Set 1.0, Dataset Management; SBC-3, UNMAP),
    /// leaves them as they are.
    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError>;

    /// Whether the block at `lba` is mapped, and how many from there on are
    /// alike, `blocks` of them at most. Where that is not known they are mapped.
    ///
    /// What a write put there that ended before this began is never called
    /// unmapped; a block that is being written meanwhile may be told as either.
    fn mapping(&self, _lba: Lba, blocks: u64) -> Result<Extent, DeviceError> {
        let mapped = true;
        Ok(Extent { blocks, mapped })
    }

    /// How a ring may read, or write, `length` bytes from `lba` on by itself;
    /// with RWF_DSYNC what is written with `fua`. None: it may not, and
    /// [`read`](BlockDevice::read) or [`write`](BlockDevice::write) must be
    /// called, now or when the ring's own transfer did not move all of it. Those
    /// say what is wrong, save for [`durable_write_failed`](BlockDevice::durable_write_failed).
    fn direct(&self, _lba: Lba, _length: usize, _write: bool) -> Option<Direct> {
        None
    }

    /// A ring's write with RWF_DSYNC has failed: what [`write`](BlockDevice::write)
    /// with `fua` would have said and done; it may wait as that does. It must not
    /// be tried again instead, since the failure of a flush is told once.
    fn durable_write_failed(&self, errno: nix::errno::Errno) -> DeviceError {
        DeviceError::FlushFailed(format!("write with RWF_DSYNC: {errno}"))
    }

    /// Whether the bytes are in memory, so that reading and writing them waits
    /// for no disk and any thread may do it.
    fn in_memory(&self) -> bool {
        false
    }
}

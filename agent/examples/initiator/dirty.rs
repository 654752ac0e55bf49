//! Pages that are dirty when a gate is closed: nobody calls anything any more
//! for them to be written, so only the `bio` layer can keep them from the data.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use drover::attach::ports::{Access, Disk};

use crate::knock::refused;
use crate::writer::{BLOCK, now, stamped};

/// Where in the raw disk's partition, whose page cache nobody else flushes: the
/// disk's own is flushed by each writer that calls fdatasync.
const OFFSET: u64 = 2 << 20;
/// How old, in hundredths of a second, a dirty page is before the kernel writes
/// it unasked: later than any of this ends.
const EXPIRE: &str = "/proc/sys/vm/dirty_expire_centisecs";
const LONG_AFTER: &str = "360000";

/// A page that was written, and one that was stored to by a mapping.
pub struct Dirty {
    file: File,
    written: u64,
    map: *mut u8,
}

impl Dirty {
    /// Who wrote them, as the blocks themselves say: write(2), a mapping.
    pub const IDS: [u64; 2] = [101, 102];

    /// Leaves both dirty.
    pub fn leave(disk: &Disk, target: &Path, access: &Access) -> Result<Self> {
        fs::write(EXPIRE, LONG_AFTER).with_context(|| format!("write {EXPIRE}"))?;
        let (path, offset): (PathBuf, u64) = match access {
            Access::Block => (format!("{}p1", disk.path().display()).into(), OFFSET),
            Access::Mount { .. } => (target.join("dirty"), 0),
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(*access != Access::Block)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        if *access != Access::Block {
            // Blocks that are there: to be written they need no metadata.
            file.write_all_at(&[7; 2 * BLOCK], 0)?;
            file.sync_all()?;
        }
        // SAFETY: a new mapping, wherever the kernel likes.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BLOCK,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                i64::try_from(offset)? + BLOCK as i64,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("mmap");
        }
        let dirty = Self {
            file,
            written: offset,
            map: map.cast(),
        };
        let block = stamped(Self::IDS[0], now());
        dirty.file.write_all_at(&block, dirty.written)?;
        dirty.store();
        Ok(dirty)
    }

    fn store(&self) {
        let block = stamped(Self::IDS[1], now());
        // SAFETY: both are BLOCK bytes long and do not overlap; nobody unmaps
        // the page, which is in memory and writable.
        unsafe { std::ptr::copy_nonoverlapping(block.as_ptr(), self.map, BLOCK) };
    }

    /// What would have them written is refused by the disk alone: no layer but
    /// `bio` sees these calls.
    pub fn cannot_be_written(&self) -> Result<()> {
        // SAFETY: one page of the mapping, which nobody unmaps.
        let synced = unsafe { libc::msync(self.map.cast(), BLOCK, libc::MS_SYNC) };
        let synced = match synced {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        refused("msync of a page dirty before", synced)?;
        refused("fsync of what was dirty before", self.file.sync_all())
    }
}

impl Drop for Dirty {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing points into it.
        unsafe { libc::munmap(self.map.cast(), BLOCK) };
    }
}

//! A small record in a file that survives a crash at any byte of its write.
//!
//! The file has two slots, allocated and written when it is made, so that a
//! full file system cannot keep a record from being changed. A change goes to
//! the slot that is not the newest valid one, with the next sequence number
//! and a checksum; a reader takes the newest valid slot. So a torn write
//! leaves the record as it was.
//!
//! Reads and writes are O_DIRECT and O_DSYNC: a write that failed stays in no
//! page cache, where the next reader would take it for durable. What is read
//! at open is written once more before anybody acts on it, since it may be the
//! rest of a write that never answered. Two invalid slots are an error that
//! names the file: a damaged record is never taken for a new one.

use std::fs::File;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::PoolError;
use super::files::Root;

/// Bytes of one slot.
pub const SLOT: usize = 16 * 1024;
const HEADER: usize = 24;
const MAGIC: [u8; 8] = *b"drover01";

/// Two slots in memory, aligned as O_DIRECT asks.
#[repr(C, align(4096))]
struct Image([u8; 2 * SLOT]);

impl Image {
    fn zeroed() -> Box<Self> {
        Box::new(Self([0; 2 * SLOT]))
    }
}

/// Writes a slot's bytes, or gives the payload's length back when it does not fit.
pub(super) fn encode(sequence: u64, payload: &[u8], slot: &mut [u8]) -> Result<(), usize> {
    let Some(length) = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= SLOT - HEADER)
    else {
        return Err(payload.len());
    };
    slot.fill(0);
    slot[..8].copy_from_slice(&MAGIC);
    slot[8..16].copy_from_slice(&sequence.to_le_bytes());
    slot[16..20].copy_from_slice(&length.to_le_bytes());
    slot[HEADER..HEADER + payload.len()].copy_from_slice(payload);
    let sum = checksum(slot, payload.len());
    slot[20..24].copy_from_slice(&sum.to_le_bytes());
    Ok(())
}

/// A slot's sequence number and payload, if it is whole.
fn decode(slot: &[u8]) -> Option<(u64, &[u8])> {
    if slot.len() != SLOT || slot[..8] != MAGIC {
        return None;
    }
    let sequence = u64::from_le_bytes(slot[8..16].try_into().ok()?);
    let length = u32::from_le_bytes(slot[16..20].try_into().ok()?) as usize;
    let sum = u32::from_le_bytes(slot[20..24].try_into().ok()?);
    let payload = slot.get(HEADER..HEADER.checked_add(length)?)?;
    (sum == checksum(slot, length)).then_some((sequence, payload))
}

fn checksum(slot: &[u8], length: usize) -> u32 {
    let head = crc32c::crc32c(&slot[..20]);
    crc32c::crc32c_append(head, &slot[HEADER..HEADER + length])
}

/// Which slot counts, its sequence number and its payload.
pub(super) fn newest(image: &[u8]) -> Option<(usize, u64, &[u8])> {
    let (first, second) = image.split_at_checked(SLOT)?;
    let slots = [(0, decode(first)), (1, decode(second))];
    slots
        .into_iter()
        .filter_map(|(index, slot)| slot.map(|(sequence, payload)| (index, sequence, payload)))
        .max_by_key(|&(_, sequence, _)| sequence)
}

/// A record of type `T` in a two-slot file.
#[derive(Debug)]
pub struct SlotFile<T> {
    file: File,
    path: PathBuf,
    /// The slot that holds the newest durable record.
    slot: usize,
    /// Greater than any number that was ever tried.
    sequence: u64,
    _of: PhantomData<fn() -> T>,
}

impl<T: Serialize + DeserializeOwned> SlotFile<T> {
    /// Makes the file with its first record. The caller makes its name durable.
    pub fn create(root: &Root, relative: &Path, value: &T) -> Result<Self, PoolError> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        let path = root.path(relative);
        let file = root.file(relative, flags | OFlag::O_DIRECT | OFlag::O_DSYNC)?;
        file.write_all_at(&Image::zeroed().0, 0)
            .map_err(PoolError::call("write", &path))?;
        let mut made = Self {
            file,
            path,
            slot: 1,
            sequence: 0,
            _of: PhantomData,
        };
        made.put(value)?;
        made.file
            .sync_all()
            .map_err(PoolError::call("fsync", &made.path))?;
        Ok(made)
    }

    /// Opens the file, reads its record and makes that durable.
    pub fn open(root: &Root, relative: &Path) -> Result<(Self, T), PoolError> {
        let path = root.path(relative);
        let damaged = |detail: &str| PoolError::Damaged {
            path: path.clone(),
            detail: detail.to_owned(),
        };
        let file = root.file(relative, OFlag::O_RDWR | OFlag::O_DIRECT | OFlag::O_DSYNC)?;
        let mut image = Image::zeroed();
        let length = file
            .metadata()
            .map_err(PoolError::call("stat", &path))?
            .len();
        if length != image.0.len() as u64 {
            return Err(damaged("its length is not that of two slots"));
        }
        file.read_exact_at(&mut image.0, 0)
            .map_err(PoolError::call("read", &path))?;
        let Some((slot, sequence, payload)) = newest(&image.0) else {
            return Err(damaged("neither of its two slots has a valid checksum"));
        };
        let value: T = serde_json::from_slice(payload)
            .map_err(|error| damaged(&format!("its record cannot be read: {error}")))?;
        let mut opened = Self {
            file,
            path: path.clone(),
            slot,
            sequence,
            _of: PhantomData,
        };
        opened.put(&value)?;
        Ok((opened, value))
    }

    /// Replaces the record; durable when this returns. After an error either
    /// the old or the new one may be found after a crash, and a repeat is safe.
    pub fn put(&mut self, value: &T) -> Result<(), PoolError> {
        let payload = serde_json::to_vec(value)
            .map_err(std::io::Error::from)
            .map_err(PoolError::call("encode", &self.path))?;
        let target = 1 - self.slot;
        let mut image = Image::zeroed();
        self.sequence += 1;
        encode(self.sequence, &payload, &mut image.0[..SLOT]).map_err(|length| {
            PoolError::TooLong {
                path: self.path.clone(),
                length,
                slot: SLOT - HEADER,
            }
        })?;
        self.file
            .write_all_at(&image.0[..SLOT], (target * SLOT) as u64)
            .map_err(PoolError::call("write", &self.path))?;
        self.slot = target;
        Ok(())
    }
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;

//! What the fuzz targets share: a device in memory, and hosts that frame
//! what the fuzzer gives them.
//!
//! A connection is driven by `drover::reactor::inline`, which runs the code
//! that the data path's threads run, on this thread and without sockets. An
//! input is a program: each operation is a byte and what that operation takes.
//!
//! Beyond not to panic, a target keeps its promises whatever it is sent: what
//! it says is well-formed, its gates are empty when all has settled, and when
//! its connections have gone nothing of it is left in memory.

pub mod iscsi;
pub mod nvme;

use std::sync::{Mutex, PoisonError};

use drover::block::{BLOCK, BlockDevice, DeviceError};
use drover::ids::{Bytes, Lba};

/// Blocks of the device: few, so that commands meet.
pub const BLOCKS: u64 = 16;

/// A device in memory.
pub struct Memory(Mutex<Vec<u8>>);

impl Default for Memory {
    fn default() -> Self {
        Self(Mutex::new(vec![0; bytes(BLOCKS)]))
    }
}

fn bytes(blocks: u64) -> usize {
    usize::try_from(blocks * BLOCK).expect("a few blocks")
}

impl Memory {
    fn part<T>(
        &self,
        lba: Lba,
        length: usize,
        then: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, DeviceError> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let size = Bytes(all.len() as u64);
        let blocks = length as u64 / BLOCK;
        let start = lba
            .0
            .checked_mul(BLOCK)
            .and_then(|at| usize::try_from(at).ok());
        let range = start.and_then(|start| Some(start..start.checked_add(length)?));
        let part = range.and_then(|range| all.get_mut(range));
        part.map(then)
            .ok_or(DeviceError::OutOfRange { lba, blocks, size })
    }
}

impl BlockDevice for Memory {
    fn size(&self) -> Bytes {
        Bytes(BLOCKS * BLOCK)
    }

    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.part(lba, buffer.len(), |part| buffer.copy_from_slice(part))
    }

    fn write(&self, lba: Lba, data: &[u8], _fua: bool) -> Result<(), DeviceError> {
        self.part(lba, data.len(), |part| part.copy_from_slice(data))
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn write_zeroes(&self, lba: Lba, blocks: u64, _unmap: bool) -> Result<(), DeviceError> {
        let size = self.size();
        let refused = DeviceError::OutOfRange { lba, blocks, size };
        if blocks > BLOCKS {
            return Err(refused);
        }
        self.part(lba, bytes(blocks), |part| part.fill(0))
    }

    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.write_zeroes(lba, blocks, true)
    }
}

/// A fuzzer's input, taken from its front.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether there is none left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One of these.
    pub fn choose<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::from(self.byte()) % all.len()]
    }

    /// Two bytes, the first the lowest.
    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// So many bytes; zeroes for those that are not there.
    pub fn filled<const N: usize>(&mut self) -> [u8; N] {
        let mut all = [0; N];
        let some = self.take(N);
        all[..some.len()].copy_from_slice(some);
        all
    }

    /// One byte; 0 when there is none left.
    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// Up to `length` bytes.
    pub fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

//! What the I/O commands other than plain reads and writes do on a device.
//!
//! They are called on a thread that may wait, in the memory that they are
//! given, so none needs more because its range is larger.

use super::command::{COPY_RANGE, COPY_TOTAL, Io, MANAGED_BLOCKS, MANAGED_RANGES};
use super::status::Status;
use super::wire::{u16_at, u32_at, u64_at};
use crate::block::{BLOCK, BlockDevice, DeviceError};
use crate::ids::{Bytes, Lba};
use crate::reactor::Failed;

/// Checks what the host sent with `io` against the limits and the device's
/// `size`, ahead of doing anything.
///
/// # Errors
/// The status for the host.
pub fn check(io: Io, data: &[u8], size: Bytes) -> Result<(), Status> {
    let (to, ranges, described) = match io {
        Io::Copy {
            to,
            ranges,
            described,
            ..
        } => (to, ranges, described),
        Io::DatasetManagement { ranges, .. } => return check_managed(data, ranges),
        _ => return Ok(()),
    };
    let mut total = 0;
    for (from, blocks) in sources(data, ranges, described) {
        total += blocks;
        if blocks > COPY_RANGE.into() || total > COPY_TOTAL.into() {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
        }
        inside(from, blocks, size)?;
    }
    inside(to, total, size)
}

/// The limits of Dataset Management: DMRL, DMRSL and DMSL.
fn check_managed(data: &[u8], ranges: u32) -> Result<(), Status> {
    let described = data.chunks_exact(16).take(ranges as usize);
    let blocks: u64 = described.map(|range| u64::from(u32_at(range, 4))).sum();
    if ranges > MANAGED_RANGES.into() || blocks > MANAGED_BLOCKS.into() {
        return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    }
    Ok(())
}

fn inside(lba: Lba, blocks: u64, size: Bytes) -> Result<(), Status> {
    match lba.0.checked_add(blocks) {
        Some(end) if end <= size.0 / BLOCK => Ok(()),
        _ => Err(Status::LBA_OUT_OF_RANGE),
    }
}

/// A Copy's source ranges: first block, blocks.
fn sources(data: &[u8], ranges: u32, described: u32) -> impl Iterator<Item = (Lba, u64)> {
    let ranges = data.chunks_exact(described as usize).take(ranges as usize);
    ranges.map(|range| (Lba(u64_at(range, 8)), u64::from(u16_at(range, 16)) + 1))
}

/// Does `io` on `device`: `data` is what the host sent, `scratch` as much
/// memory as [`Io::scratch`] says. It has passed [`check`]. Plain reads and
/// writes have their own way, since a ring can do them.
///
/// # Errors
/// The device's reason, or where what was compared differs first.
pub fn perform(
    io: Io,
    device: &dyn BlockDevice,
    data: &[u8],
    scratch: &mut [u8],
) -> Result<(), Failed> {
    match io {
        Io::Write { lba, fua, .. } => device.write(lba, data, fua)?,
        Io::Flush => device.flush()?,
        Io::Read { .. } => {}
        Io::Compare { lba, .. } => compare(device, lba, data, scratch)?,
        Io::WriteZeroes {
            lba,
            blocks,
            deallocate,
            fua,
        } => {
            device.write_zeroes(lba, blocks, deallocate)?;
            if fua {
                device.flush()?;
            }
        }
        Io::DatasetManagement {
            deallocate: false, ..
        } => {}
        Io::DatasetManagement { ranges, .. } => {
            for range in data.chunks_exact(16).take(ranges as usize) {
                let (blocks, lba) = (u32_at(range, 4).into(), Lba(u64_at(range, 8)));
                device.deallocate(lba, blocks)?;
            }
        }
        Io::Verify { lba, blocks } => {
            pieces(lba, blocks, scratch.len(), |lba, bytes, _| {
                device.read(lba, &mut scratch[..bytes])
            })?;
        }
        Io::Copy {
            to,
            ranges,
            described,
            fua,
        } => {
            let mut to = to;
            for (from, blocks) in sources(data, ranges, described) {
                pieces(from, blocks, scratch.len(), |lba, bytes, done| {
                    device.read(lba, &mut scratch[..bytes])?;
                    device.write(Lba(to.0 + done), &scratch[..bytes], false)
                })?;
                to = Lba(to.0 + blocks);
            }
            if fua {
                device.flush()?;
            }
        }
    }
    Ok(())
}

fn compare(
    device: &dyn BlockDevice,
    lba: Lba,
    data: &[u8],
    scratch: &mut [u8],
) -> Result<(), Failed> {
    device.read(lba, scratch)?;
    match data.iter().zip(scratch.iter()).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(Failed::Miscompare { at: at as u64 }),
    }
}

/// Calls `each` for `blocks` from `lba` on, in pieces of at most `most` bytes:
/// with the piece's first block, its bytes, and the blocks before it.
fn pieces(
    lba: Lba,
    blocks: u64,
    most: usize,
    mut each: impl FnMut(Lba, usize, u64) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let most = (most as u64 / BLOCK).max(1);
    let mut done = 0;
    while done < blocks {
        let some = (blocks - done).min(most);
        let bytes = usize::try_from(some * BLOCK).expect("no more than `most`");
        each(Lba(lba.0.saturating_add(done)), bytes, done)?;
        done += some;
    }
    Ok(())
}

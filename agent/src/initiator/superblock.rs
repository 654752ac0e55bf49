//! The few bytes of a device that drover reads itself: the size that a file
//! system claims, whether its maker finished, and drover's own format mark.
//!
//! What kind of file system it is, blkid says; this only adds what blkid does
//! not tell. Pure functions over bytes.

use serde::{Deserialize, Serialize};

use crate::ids::{Bytes, VolumeId};

/// What a superblock says of its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Superblock {
    /// How much of the device the file system uses.
    pub size: Bytes,
    /// Whether its maker was ended before it was done (XFS: `sb_inprogress`).
    pub unfinished: bool,
}

/// Reads the superblock of ext4 or XFS from a device's first bytes.
pub(super) fn parse(head: &[u8]) -> Option<Superblock> {
    xfs(head).or_else(|| ext4(head))
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..at + N)?.try_into().ok()
}

/// fs/xfs/libxfs/xfs_format.h, struct xfs_dsb: big-endian.
fn xfs(head: &[u8]) -> Option<Superblock> {
    if bytes::<4>(head, 0)? != *b"XFSB" {
        return None;
    }
    let block = u64::from(u32::from_be_bytes(bytes(head, 4)?));
    let blocks = u64::from_be_bytes(bytes(head, 8)?);
    Some(Superblock {
        size: Bytes(blocks.saturating_mul(block)),
        unfinished: bytes::<1>(head, 126)? != [0],
    })
}

/// fs/ext4/ext4.h, struct ext4_super_block: little-endian, 1024 bytes in.
fn ext4(head: &[u8]) -> Option<Superblock> {
    let head = head.get(1024..)?;
    if u16::from_le_bytes(bytes(head, 0x38)?) != 0xEF53 {
        return None;
    }
    let low = u64::from(u32::from_le_bytes(bytes(head, 0x4)?));
    let wide = u32::from_le_bytes(bytes(head, 0x60)?) & 0x80 != 0;
    let high = u64::from(u32::from_le_bytes(bytes(head, 0x150)?));
    let blocks = if wide { low | high << 32 } else { low };
    let block = 1024_u64.checked_shl(u32::from_le_bytes(bytes(head, 0x18)?))?;
    Some(Superblock {
        size: Bytes(blocks.saturating_mul(block)),
        unfinished: false,
    })
}

/// A block that drover writes to a never-written device before mkfs and takes
/// away after it. mkfs itself makes the volume "ever written", so without it
/// an agent that died during mkfs would leave a volume that is neither blank
/// nor usable. A device that bears it and no finished file system was never
/// handed to a workload, and may be formatted again, on any node.
pub(super) struct FormatMark;

impl FormatMark {
    /// Bytes of the mark: one logical block.
    pub const LEN: u64 = crate::block::BLOCK;

    /// Where it is: inside the device, away from where mkfs.ext4 and mkfs.xfs
    /// write (starts of groups, the middle). Were it overwritten, only the
    /// second chance would be lost: it is taken away only where it is intact.
    pub fn place(size: Bytes) -> u64 {
        size.0 / 16 * 7 / Self::LEN * Self::LEN
    }

    /// The mark of a volume.
    pub fn of(volume: &VolumeId) -> Vec<u8> {
        let mut text = format!("drover is formatting volume {volume}\n").into_bytes();
        text.resize(Self::LEN as usize, 0);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_foreign_bytes_are_no_superblock() {
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(b"XFSB"), None);
        assert_eq!(parse(&[0; 65536]), None);
        let mut ext4 = vec![0_u8; 4096];
        ext4[1024 + 0x38..1024 + 0x3a].copy_from_slice(&0xEF53_u16.to_le_bytes());
        ext4[1024 + 0x18] = 200;
        assert_eq!(parse(&ext4), None, "a block size beyond all bounds");
    }

    #[test]
    fn an_xfs_that_its_maker_did_not_finish_is_told() {
        let mut head = vec![0_u8; 4096];
        head[..4].copy_from_slice(b"XFSB");
        head[4..8].copy_from_slice(&4096_u32.to_be_bytes());
        head[8..16].copy_from_slice(&1000_u64.to_be_bytes());
        let done = parse(&head).unwrap();
        assert_eq!((done.size, done.unfinished), (Bytes(4_096_000), false));
        head[126] = 1;
        assert!(parse(&head).unwrap().unfinished);
    }

    #[test]
    fn the_mark_lies_inside_the_device_and_names_its_volume() {
        let volume: VolumeId = "vol-1".parse().unwrap();
        for size in [256 * 1024, 1 << 20, (1 << 30) + 512, 3 << 40] {
            let place = FormatMark::place(Bytes(size));
            assert_eq!(place % FormatMark::LEN, 0);
            assert!(place >= 65536 && place + FormatMark::LEN <= size, "{size}");
        }
        let other = FormatMark::of(&"vol-2".parse().unwrap());
        assert_ne!(FormatMark::of(&volume), other);
        assert_eq!(other.len() as u64, FormatMark::LEN);
    }
}

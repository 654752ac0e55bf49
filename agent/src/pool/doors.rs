//! The decoders of this room, for the fuzzer (see `crate::doors`).

use super::record::Record;
use super::slots::{SLOT, encode, newest};
use super::superblock::Superblock;
use super::volume::Meta;
use crate::attach::ports::SnapshotInfo;
use crate::doors::{Door, json};

/// Each of them.
pub const ALL: [Door; 6] = [slots, written, record, superblock, volume, snapshot];

/// Two slots, of which each half of the input is the beginning.
fn slots(bytes: &[u8]) -> bool {
    let mut image = vec![0; 2 * SLOT];
    for (slot, half) in image
        .chunks_mut(SLOT)
        .zip(bytes.chunks(bytes.len() / 2 + 1))
    {
        let length = half.len().min(SLOT);
        slot[..length].copy_from_slice(&half[..length]);
    }
    let _ = newest(bytes);
    newest(&image).is_some_and(|(_, _, payload)| record(payload))
}

/// Whole slots, one of which was torn in its write.
fn written(bytes: &[u8]) -> bool {
    let Some(([which, at, with], payload)) = bytes.split_first_chunk() else {
        return false;
    };
    let mut image = vec![0; 2 * SLOT];
    let (first, second) = image.split_at_mut(SLOT);
    let fits = encode(1, b"the one before", first).is_ok() && encode(2, payload, second).is_ok();
    assert_eq!(fits, payload.len() <= SLOT - 24);
    if !fits {
        return false;
    }
    assert_eq!(newest(&image), Some((1, 2, payload)));
    // Whatever one byte became, the record is the new one or the one before.
    let at = SLOT + (usize::from(*which) << 8 | usize::from(*at)) % SLOT;
    image[at] ^= with;
    let found = newest(&image).expect("one slot is whole");
    assert!(found.2 == payload || found.2 == b"the one before");
    true
}

/// A home's record of a volume.
fn record(bytes: &[u8]) -> bool {
    json::<Record>(bytes)
}

fn superblock(bytes: &[u8]) -> bool {
    json::<Superblock>(bytes)
}

fn volume(bytes: &[u8]) -> bool {
    json::<Meta>(bytes)
}

fn snapshot(bytes: &[u8]) -> bool {
    json::<SnapshotInfo>(bytes)
}

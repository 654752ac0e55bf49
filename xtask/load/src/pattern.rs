//! What the bytes of a volume under load look like, so that every read is
//! checked: a figure of a target that answers wrong data is worth nothing.
//!
//! Every 4096 bytes begin with a word that is either the block's own offset,
//! marked, or [`FILLER`]. `load fill` writes offsets; a write under load writes
//! its own offset first and filler after it. Null targets answer filler.

/// How far apart the words are that are checked.
pub const BLOCK: u64 = 4096;

/// The word of a block that tells nothing about its place.
pub const FILLER: u64 = 0xa5a5_5a5a_c3c3_3c3c;

/// The word of the block at `offset` bytes.
pub fn stamp(offset: u64) -> u64 {
    offset ^ 0x6472_6f76_6572_0000
}

/// Checks a piece of a read: `piece` was found at `offset` bytes of the device.
/// A word that two pieces share is left out.
///
/// # Errors
/// The offset of the block that is not what it should be, and its word.
pub fn check(offset: u64, piece: &[u8]) -> Result<(), (u64, u64)> {
    let mut block = offset.next_multiple_of(BLOCK);
    loop {
        let at = usize::try_from(block - offset).unwrap_or(usize::MAX);
        let Some(word) = piece.get(at..).and_then(|rest| rest.first_chunk::<8>()) else {
            return Ok(());
        };
        let word = u64::from_le_bytes(*word);
        if word != stamp(block) && word != FILLER {
            return Err((block, word));
        }
        block += BLOCK;
    }
}

/// `len` bytes as `load fill` writes them at `offset`; both multiples of [`BLOCK`].
pub fn filled(offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut block = offset;
    for chunk in bytes.chunks_exact_mut(4096) {
        chunk[..8].copy_from_slice(&stamp(block).to_le_bytes());
        block += BLOCK;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_out_of_place_is_found_wherever_a_piece_begins() {
        let bytes = filled(40960, 3 * 4096);
        assert_eq!(check(40960, &bytes), Ok(()));
        assert_eq!(check(40960 + 100, &bytes[100..]), Ok(()));
        assert_eq!(check(40960, &bytes[..4098]), Ok(()), "half a word");
        assert_eq!(check(45056, &bytes), Err((45056, stamp(40960))));
        assert_eq!(check(45056 - 97, &bytes[4000..]).unwrap_err().0, 45056);
        let zeroes = [0; 4096];
        assert_eq!(check(8192, &zeroes), Err((8192, 0)));
        assert_eq!(check(8192, &FILLER.to_le_bytes().repeat(512)), Ok(()));
    }
}

//! The parameter list of UNMAP (SBC-3, 5.28).

use super::command::Range;
use super::inquiry::{MAX_UNMAP, MAX_UNMAP_DESCRIPTORS};
use super::sense::Sense;
use crate::ids::Lba;

const HEADER: usize = 8;
const DESCRIPTOR: usize = 16;

/// The ranges in a list, on a device of so many blocks. Those of no blocks are
/// left out.
///
/// # Errors
/// A list that is cut off; more descriptors or blocks than the block limits
/// page says; blocks beyond the end. Then nothing is to be unmapped.
pub fn ranges(list: &[u8], blocks: u64) -> Result<Vec<Range>, Sense> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    let (Some(header), Some(rest)) = (list.get(..HEADER), list.get(HEADER..)) else {
        return Err(Sense::LIST_LENGTH);
    };
    let said = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let rest = &rest[..said.min(rest.len())];
    let count = rest.len() / DESCRIPTOR;
    if u32::try_from(count).unwrap_or(u32::MAX) > MAX_UNMAP_DESCRIPTORS {
        return Err(Sense::parameter(2));
    }
    let mut ranges = Vec::with_capacity(count);
    let mut left = u64::from(MAX_UNMAP);
    for (number, one) in rest.as_chunks::<DESCRIPTOR>().0.iter().enumerate() {
        let (lba, rest) = one.split_first_chunk().unwrap_or((&[0; 8], &[]));
        let (length, _) = rest.split_first_chunk().unwrap_or((&[0; 4], &[]));
        let (lba, length) = (u64::from_be_bytes(*lba), u32::from_be_bytes(*length));
        if lba > blocks || u64::from(length) > blocks - lba {
            return Err(Sense::LBA_RANGE);
        }
        let at = u16::try_from(HEADER + number * DESCRIPTOR + 8).unwrap_or(u16::MAX);
        left = left
            .checked_sub(length.into())
            .ok_or(Sense::parameter(at))?;
        if length > 0 {
            ranges.push(Range {
                lba: Lba(lba),
                blocks: length,
            });
        }
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(pairs: &[(u64, u32)]) -> Vec<u8> {
        let length = u16::try_from(pairs.len() * DESCRIPTOR)
            .unwrap()
            .to_be_bytes();
        let mut list = vec![0, 0, length[0], length[1], 0, 0, 0, 0];
        for (lba, blocks) in pairs {
            list.extend(lba.to_be_bytes());
            list.extend(blocks.to_be_bytes());
            list.extend([0; 4]);
        }
        list
    }

    #[test]
    fn nothing_is_unmapped_by_nothing() {
        assert_eq!(ranges(&[], 10), Ok(vec![]));
        assert_eq!(ranges(&list(&[]), 10), Ok(vec![]));
        assert_eq!(ranges(&list(&[(10, 0)]), 10), Ok(vec![]));
    }

    #[test]
    fn limits_and_the_end_are_kept() {
        let two = ranges(&list(&[(0, 1), (9, 1)]), 10).unwrap();
        assert_eq!(two.len(), 2);
        assert_eq!(ranges(&list(&[(0, 1), (9, 2)]), 10), Err(Sense::LBA_RANGE));
        assert_eq!(ranges(&list(&[(11, 0)]), 10), Err(Sense::LBA_RANGE));
        assert_eq!(ranges(&list(&[(u64::MAX, 1)]), 10), Err(Sense::LBA_RANGE));
        assert_eq!(ranges(&[0; 7], 10), Err(Sense::LIST_LENGTH));
        let many = list(&[(0, 1); 257]);
        assert_eq!(ranges(&many, 10), Err(Sense::parameter(2)));
        let large = list(&[(0, MAX_UNMAP), (0, 1)]);
        assert_eq!(ranges(&large, 1 << 40), Err(Sense::parameter(32)));
    }

    #[test]
    fn descriptors_that_are_cut_off_do_not_count() {
        let mut cut = list(&[(0, 1), (1, 1)]);
        cut.truncate(8 + 31);
        assert_eq!(ranges(&cut, 10).unwrap().len(), 1);
    }

    proptest! {
        #[test]
        fn any_list_is_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..100), blocks in 0_u64..1000) {
            for range in ranges(&bytes, blocks).unwrap_or_default() {
                prop_assert!(range.lba.0 + u64::from(range.blocks) <= blocks);
            }
        }
    }
}

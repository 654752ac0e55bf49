//! GET LBA STATUS: which blocks have space of their own (SBC-3, 5.4).
//!
//! It is a hint with one promise, since a reader may leave out what it is told:
//! a block that is called deallocated reads as zeroes (LBPRZ), as of some
//! moment between the command's arrival and its answer. So a write that was
//! answered before the command was sent is always seen; one that is outstanding
//! beside it is ordered by nothing, as with a READ.

use crate::block::Extent;
use crate::ids::Lba;

/// Descriptors in an answer, at most; an initiator asks again behind them.
const MOST: u32 = 256;
/// How often the device is asked for one answer, at most: what it tells apart
/// can be finer than what is answered.
const LOOKS: u32 = 1024;
const HEADER: u32 = 8;
const DESCRIPTOR: u32 = 16;

const MAPPED: u8 = 0;
const DEALLOCATED: u8 = 1;

/// The parameter data for the blocks from `from` on, up to `end`, the device's:
/// as many descriptors as `allocation` bytes have room for, and one at least.
///
/// # Errors
/// What `look` fails with, which says how the blocks from one on are, and is
/// given the most of them.
pub fn report<E>(
    from: Lba,
    end: u64,
    allocation: u32,
    mut look: impl FnMut(Lba, u64) -> Result<Extent, E>,
) -> Result<Vec<u8>, E> {
    let most = (allocation.saturating_sub(HEADER) / DESCRIPTOR).clamp(1, MOST) as usize;
    let mut runs: Vec<(u64, Extent)> = Vec::new();
    let mut next = from.0;
    for _ in 0..LOOKS {
        if next >= end {
            break;
        }
        let found = look(Lba(next), end - next)?;
        let blocks = found.blocks.clamp(1, end - next);
        let count = runs.len();
        match runs.last_mut() {
            Some((_, run)) if run.mapped == found.mapped => run.blocks += blocks,
            _ if count == most => break,
            _ => runs.push((next, Extent { blocks, ..found })),
        }
        next += blocks;
    }
    let descriptors = runs.iter().flat_map(|(lba, run)| cut(*lba, *run));
    let mut data = vec![0; HEADER as usize];
    for (lba, blocks, status) in descriptors.take(most) {
        data.extend(lba.to_be_bytes());
        data.extend(blocks.to_be_bytes());
        data.extend([status, 0, 0, 0]);
    }
    let length = u32::try_from(data.len() - 4).unwrap_or(u32::MAX);
    data[..4].copy_from_slice(&length.to_be_bytes());
    Ok(data)
}

/// A run as descriptors tell it, whose count has 32 bits.
fn cut(lba: u64, run: Extent) -> impl Iterator<Item = (u64, u32, u8)> {
    let status = if run.mapped { MAPPED } else { DEALLOCATED };
    (0..run.blocks)
        .step_by(u32::MAX as usize)
        .map(move |before| {
            let blocks = u32::try_from(run.blocks - before).unwrap_or(u32::MAX);
            (lba + before, blocks, status)
        })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// What is reported of blocks that are mapped or not, told `step` at a time.
    fn status(blocks: &[bool], from: usize, allocation: u32, step: usize) -> Vec<(u64, u32, u8)> {
        let data = report(
            Lba(from as u64),
            blocks.len() as u64,
            allocation,
            |lba, most| {
                let rest = &blocks[usize::try_from(lba.0).unwrap()..];
                let alike = rest.iter().take_while(|one| **one == rest[0]).count();
                let blocks = (alike.min(step) as u64).min(most);
                let mapped = rest[0];
                Ok::<_, Infallible>(Extent { blocks, mapped })
            },
        );
        descriptors(&data.unwrap())
    }

    fn descriptors(data: &[u8]) -> Vec<(u64, u32, u8)> {
        let length = u32::from_be_bytes(data[..4].try_into().unwrap());
        assert_eq!(length as usize, data.len() - 4);
        let (all, []) = data[8..].as_chunks::<16>() else {
            panic!("descriptors are whole");
        };
        let fields = all.iter().map(|one| {
            let lba = u64::from_be_bytes(one[..8].try_into().unwrap());
            let blocks = u32::from_be_bytes(one[8..12].try_into().unwrap());
            (lba, blocks, one[12])
        });
        fields.collect()
    }

    #[test]
    fn runs_are_told_one_after_the_other() {
        let blocks = [true, true, false, false, false, true];
        let all = [(0, 2, MAPPED), (2, 3, DEALLOCATED), (5, 1, MAPPED)];
        assert_eq!(status(&blocks, 0, 4096, 9), all);
        assert_eq!(
            status(&blocks, 0, 4096, 1),
            all,
            "however finely they are found"
        );
        assert_eq!(status(&blocks, 3, 4096, 9), [(3, 2, DEALLOCATED), all[2]]);
    }

    #[test]
    fn an_answer_has_as_many_descriptors_as_there_is_room_for() {
        let blocks: Vec<bool> = (0..1000).map(|block| block % 2 == 0).collect();
        for (allocation, count) in [(0, 1), (23, 1), (24, 1), (39, 1), (40, 2), (u32::MAX, 256)] {
            assert_eq!(
                status(&blocks, 0, allocation, 1).len(),
                count,
                "{allocation}"
            );
        }
    }

    #[test]
    fn a_run_beyond_32_bits_is_told_in_parts() {
        let end = (1 << 33) + 5;
        let data = report(Lba(0), end, 4096, |_, blocks| {
            let mapped = false;
            Ok::<_, Infallible>(Extent { blocks, mapped })
        });
        let most = u64::from(u32::MAX);
        let expected = [
            (0, u32::MAX, DEALLOCATED),
            (most, u32::MAX, DEALLOCATED),
            (2 * most, 7, DEALLOCATED),
        ];
        assert_eq!(descriptors(&data.unwrap()), expected);
    }

    #[test]
    fn a_device_that_fails_is_not_called_deallocated() {
        assert_eq!(report(Lba(0), 8, 24, |_, _| Err("broken")), Err("broken"));
    }

    proptest! {
        /// Whatever is stored: descriptors adjoin, say what is, and make progress.
        #[test]
        fn what_is_told_is_so(blocks in prop::collection::vec(any::<bool>(), 1..200), from in 0_usize..200, allocation in 0_u32..600, step in 1_usize..9) {
            let from = from % blocks.len();
            let told = status(&blocks, from, allocation, step);
            let mut next = from;
            prop_assert!(!told.is_empty());
            for (lba, count, status) in told {
                prop_assert_eq!(lba, next as u64);
                prop_assert!(count > 0);
                let end = next + count as usize;
                prop_assert!(blocks[next..end].iter().all(|one| *one == (status == MAPPED)));
                next = end;
            }
        }
    }
}

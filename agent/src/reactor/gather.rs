//! Small pieces of what a connection sends, copied together.
//!
//! They lie one behind the other in a ring of blocks that never move, since a
//! driver may be sending from them. The blocks are kept: a connection that has
//! said how much it may have to send ([`Gather::reserve`]) allocates nothing
//! for it afterwards.

use std::collections::VecDeque;

/// Bytes of a block.
const BLOCK: usize = 4 << 10;
/// Blocks that are kept, beyond those that were reserved.
const KEPT: usize = 16;

/// The bytes `head..tail` of its blocks, the first block's beginning being 0.
#[derive(Default)]
pub(super) struct Gather {
    blocks: VecDeque<Box<[u8; BLOCK]>>,
    head: usize,
    tail: usize,
    reserved: usize,
}

impl Gather {
    /// Has room for so many bytes from now on.
    pub fn reserve(&mut self, bytes: usize) {
        // The ring's first block may be used up but for its last byte.
        self.reserved = bytes.div_ceil(BLOCK) + 1;
        while self.blocks.len() < self.reserved {
            self.blocks.push_back(bytemuck::zeroed_box());
        }
    }

    /// Where the first byte lies.
    pub fn head(&self) -> usize {
        self.head
    }

    /// Whether what is put in next is the neighbour of what was put in last.
    pub fn goes_on(&self) -> bool {
        !self.tail.is_multiple_of(BLOCK)
    }

    /// Puts in as much as the last block has room for; how much that was.
    pub fn put(&mut self, bytes: &[u8]) -> usize {
        if self.tail == self.blocks.len() * BLOCK {
            self.blocks.push_back(bytemuck::zeroed_box());
        }
        let at = self.tail % BLOCK;
        let length = bytes.len().min(BLOCK - at);
        self.blocks[self.tail / BLOCK][at..at + length].copy_from_slice(&bytes[..length]);
        self.tail += length;
        length
    }

    /// The `length` bytes at `at`, all in one block.
    pub fn bytes(&self, at: usize, length: usize) -> &[u8] {
        &self.blocks[at / BLOCK][at % BLOCK..][..length]
    }

    /// The first `length` bytes are not needed any more. Nobody may hold any of them.
    pub fn take(&mut self, length: usize) {
        self.head += length;
        if self.head == self.tail {
            (self.head, self.tail) = (0, 0);
            self.blocks.truncate(self.reserved.max(KEPT));
        }
        if self.head >= BLOCK {
            self.blocks.rotate_left(1);
            self.head -= BLOCK;
            self.tail -= BLOCK;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put in comes out, in order, from blocks that stay where they are;
    /// within what was reserved there are never more of them.
    #[test]
    fn bytes_come_out_as_they_were_put_in() {
        let mut gather = Gather::default();
        gather.reserve(3 * BLOCK);
        let blocks = gather.blocks.len();
        let mut pieces = VecDeque::new();
        let (mut next, mut expected, mut held) = (0_u8, 0_u8, 0);
        for turn in 0..20_000_usize {
            let length = 1 + turn * 7 % 300;
            if held + length <= 3 * BLOCK && turn % 900 < 800 {
                let bytes: Vec<u8> = (0..length)
                    .map(|byte| next.wrapping_add(byte as u8))
                    .collect();
                next = next.wrapping_add(length as u8);
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let put = gather.put(rest);
                    pieces.push_back(put);
                    rest = &rest[put..];
                }
                held += length;
            } else if let Some(piece) = pieces.pop_front() {
                let at = gather.head();
                for byte in gather.bytes(at, piece) {
                    assert_eq!(*byte, expected);
                    expected = expected.wrapping_add(1);
                }
                gather.take(piece);
                held -= piece;
            }
            assert_eq!(gather.blocks.len(), blocks);
        }
    }

    #[test]
    fn what_was_needed_once_is_not_kept_for_ever() {
        let mut gather = Gather::default();
        for _ in 0..100 {
            assert_eq!(gather.put(&[1; BLOCK]), BLOCK);
        }
        for _ in 0..100 {
            gather.take(BLOCK);
        }
        assert_eq!(gather.blocks.len(), KEPT);
    }
}

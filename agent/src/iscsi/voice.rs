//! What a connection says: PDUs with their numbers, padding and digests.

use std::ops::Range;

use super::wire::answer::{Answer, Numbers};
use super::wire::{DIGEST, Digests};
use crate::reactor::{Buffer, Link};

/// A connection's numbers, and how its PDUs are made.
#[derive(Debug, Clone, Copy)]
pub struct Voice {
    /// The digests in use.
    pub digests: Digests,
    /// The most data in a PDU that the initiator takes.
    pub max_send: usize,
    numbers: Numbers,
}

impl Voice {
    /// The voice of a connection in its login, whose initiator's first command
    /// will have this number; `window` commands are taken at once.
    pub fn new(command_number: u32, window: u32, max_send: usize) -> Self {
        Self {
            digests: Digests::default(),
            max_send,
            numbers: Numbers {
                status: 1,
                expected: command_number,
                maximum: command_number.wrapping_add(window - 1),
            },
        }
    }

    /// The numbers of an answer without a status number of its own.
    pub fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// The numbers of an answer that takes the next status number.
    pub fn counted(&mut self) -> Numbers {
        let numbers = self.numbers;
        self.numbers.status = numbers.status.wrapping_add(1);
        numbers
    }

    /// How far a command's number is beyond the one that is expected: 0 for
    /// that one; none when it is not taken at all (RFC 7143, 4.2.2.1).
    pub fn ahead(&self, number: u32) -> Option<u32> {
        let window = self.numbers.maximum.wrapping_sub(self.numbers.expected);
        let ahead = number.wrapping_sub(self.numbers.expected);
        // A closed window is one less than nothing.
        (window.wrapping_add(1) < 1 << 31 && ahead < window.wrapping_add(1)).then_some(ahead)
    }

    /// The command that was expected has come.
    pub fn took(&mut self) {
        self.numbers.expected = self.numbers.expected.wrapping_add(1);
    }

    /// There is room for one more command.
    pub fn room(&mut self) {
        self.numbers.maximum = self.numbers.maximum.wrapping_add(1);
    }

    /// Sends a PDU.
    pub fn say(&self, link: &mut Link, answer: Answer, data: &[u8]) {
        let (header, length) = answer.data(data.len()).seal(self.digests);
        link.send(&header[..length]);
        if !data.is_empty() {
            link.send(data);
            self.trail(link, data);
        }
    }

    /// Sends a PDU whose data is this part of a buffer, without copying it.
    pub fn say_buffer(&self, link: &mut Link, answer: Answer, buffer: Buffer, part: Range<usize>) {
        let (header, length) = answer.data(part.len()).seal(self.digests);
        link.send(&header[..length]);
        let digest = self
            .digests
            .data
            .then(|| crc32c::crc32c(&buffer[part.clone()]));
        let padding = part.len().wrapping_neg() % 4;
        link.send_buffer(buffer, part);
        self.end(link, padding, digest);
    }

    fn trail(&self, link: &mut Link, data: &[u8]) {
        let digest = self.digests.data.then(|| crc32c::crc32c(data));
        self.end(link, data.len().wrapping_neg() % 4, digest);
    }

    fn end(&self, link: &mut Link, padding: usize, digest: Option<u32>) {
        const ZEROES: [u8; 3] = [0; 3];
        let mut end = [0; 3 + DIGEST];
        let mut length = padding;
        if let Some(digest) = digest {
            let digest = crc32c::crc32c_append(digest, &ZEROES[..padding]);
            end[length..length + DIGEST].copy_from_slice(&digest.to_le_bytes());
            length += DIGEST;
        }
        if length > 0 {
            link.send(&end[..length]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_moves_and_never_shrinks() {
        let mut voice = Voice::new(u32::MAX, 2, 512);
        assert_eq!(voice.ahead(u32::MAX), Some(0));
        assert_eq!(voice.ahead(0), Some(1));
        assert_eq!(voice.ahead(1), None);
        assert_eq!(voice.ahead(u32::MAX - 1), None);
        voice.took();
        voice.took();
        assert_eq!(voice.ahead(1), None, "closed");
        voice.room();
        assert_eq!(voice.ahead(1), Some(0));
        assert_eq!(voice.ahead(2), None);
    }
}

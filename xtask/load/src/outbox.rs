//! What a connection has yet to send.
//!
//! Headers are gathered in one buffer; payload that nobody looks at is one page
//! of [`pattern::FILLER`] sent again and again, so that a generator of writes
//! or a null target copies nothing of it. All that waits goes out in one call.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, sendmsg};

use crate::pattern;

/// Bytes of filler that one slice points at: few slices for a large payload,
/// and still within the processor's nearest caches.
const FILLER_BYTES: usize = 32 << 10;
/// Slices of one call; Linux takes 1024 (UIO_MAXIOV).
const SLICES: usize = 128;

/// What waits to be sent, in order.
pub struct Outbox {
    bytes: Vec<u8>,
    filler: Box<[u8]>,
    pieces: Vec<Piece>,
    /// The first piece that is not sent whole, and how much of it is.
    next: usize,
    sent: usize,
}

enum Piece {
    Bytes(Range<usize>),
    Filler(usize),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(range) => range.len(),
            Self::Filler(len) => *len,
        }
    }
}

impl Default for Outbox {
    fn default() -> Self {
        let filler = pattern::FILLER
            .to_le_bytes()
            .repeat(FILLER_BYTES / 8)
            .into();
        Self {
            bytes: Vec::new(),
            filler,
            pieces: Vec::new(),
            next: 0,
            sent: 0,
        }
    }
}

impl Outbox {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.next == self.pieces.len()
    }

    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        let end = self.bytes.len();
        match self.pieces.last_mut() {
            Some(Piece::Bytes(range)) if range.end == start => {
                range.end = end;
            }
            _ => self.pieces.push(Piece::Bytes(start..end)),
        }
    }

    /// Adds that many bytes of filler.
    pub fn fill(&mut self, len: usize) {
        let whole = len / FILLER_BYTES;
        let pieces = (0..whole).map(|_| Piece::Filler(FILLER_BYTES));
        self.pieces.extend(pieces);
        if !len.is_multiple_of(FILLER_BYTES) {
            self.pieces.push(Piece::Filler(len % FILLER_BYTES));
        }
    }

    /// Adds a piece of a write's payload: `len` bytes from `at` of the write
    /// that begins at `offset` of the device.
    pub fn push_payload(&mut self, offset: u64, at: usize, len: usize) {
        if at == 0 && len >= 8 {
            self.push(&pattern::stamp(offset).to_le_bytes());
            self.fill(len - 8);
        } else {
            self.fill(len);
        }
    }

    /// Sends what the socket takes at once, or with `wait` all.
    ///
    /// # Errors
    /// The socket's.
    pub fn flush(&mut self, socket: &impl AsFd, wait: bool) -> io::Result<()> {
        let mut flags = MsgFlags::MSG_NOSIGNAL;
        flags.set(MsgFlags::MSG_DONTWAIT, !wait);
        while !self.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            for (slice, piece) in slices.iter_mut().zip(&self.pieces[self.next..]) {
                let skip = if count == 0 { self.sent } else { 0 };
                *slice = IoSlice::new(match piece {
                    Piece::Bytes(range) => &self.bytes[range.start + skip..range.end],
                    Piece::Filler(len) => &self.filler[skip..*len],
                });
                count += 1;
            }
            let fd = socket.as_fd().as_raw_fd();
            match sendmsg::<()>(fd, &slices[..count], &[], flags, None) {
                Ok(sent) => self.advance(sent),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if !wait => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        self.bytes.clear();
        self.pieces.clear();
        self.next = 0;
        Ok(())
    }

    fn advance(&mut self, mut sent: usize) {
        while let Some(piece) = self.pieces.get(self.next) {
            let left = piece.len() - self.sent;
            if sent < left {
                self.sent += sent;
                return;
            }
            sent -= left;
            self.sent = 0;
            self.next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_was_pushed_arrives_in_order_though_the_socket_takes_it_in_bits() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let mut outbox = Outbox::default();
        let mut expected = Vec::new();
        for number in 0..40u8 {
            outbox.push(&[number; 5]);
            outbox.push(&[number, 0]);
            outbox.push_payload(4096, 0, 40_000);
            expected.extend([number; 5]);
            expected.extend([number, 0]);
            expected.extend(pattern::stamp(4096).to_le_bytes());
            expected.extend(pattern::FILLER.to_le_bytes().repeat(4999));
        }
        let mut got = Vec::new();
        let mut buffer = vec![0; 70_001];
        while !outbox.is_empty() {
            outbox.flush(&near, false).unwrap();
            let read = far.read(&mut buffer).unwrap();
            got.extend_from_slice(&buffer[..read]);
        }
        outbox.push(b"end");
        outbox.flush(&near, true).unwrap();
        expected.extend(b"end");
        near.shutdown(std::net::Shutdown::Both).unwrap();
        far.read_to_end(&mut got).unwrap();
        assert!(got == expected);
        let _ = near.read(&mut buffer);
    }
}

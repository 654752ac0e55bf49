//! What came from a socket, cut into headers and payload.
//!
//! One receive brings as much as is there; payload is handed on where it lies,
//! and only a header that was cut in two is moved.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::outbox::Outbox;

/// Large enough that a batch of small answers is one call, small enough for the
/// processor's second-level cache.
const BYTES: usize = 256 << 10;

/// Takes what came, in order. What it answers goes to the outbox.
pub trait Receiver {
    /// Bytes of a header that tell how long it is.
    const PREFIX: usize;

    /// How long the header is that begins with these [`Self::PREFIX`] bytes.
    fn header_len(&self, prefix: &[u8]) -> Result<usize>;

    /// Takes a header; gives how many bytes of payload follow.
    fn header(&mut self, header: &[u8], out: &mut Outbox) -> Result<usize>;

    /// Takes a piece of the payload; `left` bytes of it are still to come.
    fn payload(&mut self, piece: &[u8], left: usize, out: &mut Outbox) -> Result<()>;
}

/// A connection's receive buffer.
pub struct Inbox {
    buffer: Box<[u8]>,
    filled: usize,
    payload_left: usize,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            buffer: vec![0; BYTES].into(),
            filled: 0,
            payload_left: 0,
        }
    }
}

impl Inbox {
    /// Receives once; with `wait` until something comes or the socket's own
    /// receive timeout is over. False when nothing was there.
    ///
    /// # Errors
    /// The socket's, and that the peer closed.
    pub fn receive(&mut self, socket: &impl AsFd, wait: bool) -> Result<bool> {
        let mut flags = MsgFlags::empty();
        flags.set(MsgFlags::MSG_DONTWAIT, !wait);
        let fd = socket.as_fd().as_raw_fd();
        match recv(fd, &mut self.buffer[self.filled..], flags) {
            Ok(0) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(received) => {
                self.filled += received;
                Ok(true)
            }
            Err(Errno::EINTR) => Ok(false),
            Err(Errno::EAGAIN) if !wait => Ok(false),
            Err(Errno::EAGAIN) => bail!("nothing came within the socket's time limit"),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }

    /// Hands out all that is there.
    ///
    /// # Errors
    /// The receiver's.
    pub fn hand_out<R: Receiver>(&mut self, receiver: &mut R, out: &mut Outbox) -> Result<()> {
        let mut at = 0;
        loop {
            let there = &self.buffer[at..self.filled];
            if self.payload_left > 0 {
                let piece = &there[..there.len().min(self.payload_left)];
                if piece.is_empty() {
                    break;
                }
                self.payload_left -= piece.len();
                at += piece.len();
                receiver.payload(piece, self.payload_left, out)?;
                continue;
            }
            let Some(prefix) = there.get(..R::PREFIX) else {
                break;
            };
            let len = receiver.header_len(prefix)?;
            if len > 1024 {
                bail!("a header of {len} bytes");
            }
            let Some(header) = there.get(..len) else {
                break;
            };
            self.payload_left = receiver.header(header, out)?;
            at += len;
        }
        self.buffer.copy_within(at..self.filled, 0);
        self.filled -= at;
        Ok(())
    }
}

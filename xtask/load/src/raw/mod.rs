//! A wire without a protocol: a request of 16 bytes, then data or an answer of 8.
//! What a client reaches here is what sockets and the file allow at all.
//!
//! ```text
//! request: verb u8 · 0 u8 · slot u16 · len u32 · offset u64    then a write's data
//! answer:  slot u16 · errno u16 · len u32                      then a read's data
//! ```
//!
//! All little-endian. Verb [`SIZE`] is answered with eight bytes: the file's size.

pub mod client;
pub mod serve;
mod sync;
mod uring;

use anyhow::{Context, Result, bail};

/// Bytes of a request.
const REQUEST: usize = 16;
/// Bytes of an answer's header.
const ANSWER: usize = 8;
const READ: u8 = 0;
const WRITE: u8 = 1;
const SIZE: u8 = 2;
/// The most that one request may move.
const MAX_LEN: u32 = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    verb: u8,
    slot: u16,
    len: u32,
    offset: u64,
}

impl Request {
    fn encode(self) -> [u8; REQUEST] {
        let mut bytes = [0; REQUEST];
        bytes[0] = self.verb;
        bytes[2..4].copy_from_slice(&self.slot.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.len.to_le_bytes());
        bytes[8..].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let bytes: &[u8; REQUEST] = bytes.first_chunk().context("a request cut short")?;
        let number = u64::from_le_bytes(*bytes.first_chunk().expect("16 bytes begin with 8"));
        let offset = u64::from_le_bytes(*bytes.last_chunk().expect("16 bytes end with 8"));
        let [verb, _, slot_low, slot_high, ..] = *bytes;
        let slot = u16::from_le_bytes([slot_low, slot_high]);
        let len = u32::try_from(number >> 32)?;
        if verb > SIZE || len > MAX_LEN {
            bail!("a request with verb {verb} for {len} bytes");
        }
        Ok(Self {
            verb,
            slot,
            len,
            offset,
        })
    }
}

/// The header of an answer that `len` bytes follow.
fn answer(slot: u16, len: u32) -> [u8; ANSWER] {
    let mut bytes = [0; ANSWER];
    bytes[..2].copy_from_slice(&slot.to_le_bytes());
    bytes[4..].copy_from_slice(&len.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_back_and_a_wrong_one_is_refused() {
        let request = Request {
            verb: WRITE,
            slot: 513,
            len: 65_536,
            offset: 1 << 40,
        };
        assert_eq!(Request::decode(&request.encode()).unwrap(), request);
        let wrong = Request { verb: 3, ..request }.encode();
        assert!(Request::decode(&wrong).is_err());
        let long = Request {
            len: MAX_LEN + 1,
            ..request
        }
        .encode();
        assert!(Request::decode(&long).is_err());
    }
}

//! The client of the wire without a protocol.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, bail};

use super::{ANSWER, READ, REQUEST, Request, SIZE, WRITE};
use crate::drive::{Client, SILENCE};
use crate::inbox::Receiver;
use crate::outbox::Outbox;
use crate::slots::{Io, Slots};

/// One connection.
pub struct Raw {
    slots: Slots,
    /// The read whose data is on its way, and how far it is.
    incoming: Option<(u16, u32)>,
}

/// Connects, and asks how large the file is.
///
/// # Errors
/// The socket's.
pub fn connect(address: SocketAddr) -> Result<(TcpStream, u64)> {
    let mut socket =
        TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    socket.set_nodelay(true).context("set TCP_NODELAY")?;
    socket
        .set_read_timeout(Some(SILENCE))
        .context("set SO_RCVTIMEO")?;
    let request = Request {
        verb: SIZE,
        slot: 0,
        len: 0,
        offset: 0,
    };
    socket
        .write_all(&request.encode())
        .context("ask for the size")?;
    let mut answer = [0; ANSWER + 8];
    socket.read_exact(&mut answer).context("ask for the size")?;
    let size = answer.last_chunk().expect("16 bytes end with 8");
    Ok((socket, u64::from_le_bytes(*size)))
}

impl Raw {
    /// With room for `depth` requests.
    pub fn new(depth: u16) -> Self {
        Self {
            slots: Slots::new(depth),
            incoming: None,
        }
    }
}

impl Receiver for Raw {
    const PREFIX: usize = ANSWER;

    fn header_len(&self, _: &[u8]) -> Result<usize> {
        Ok(ANSWER)
    }

    fn header(&mut self, header: &[u8], _: &mut Outbox) -> Result<usize> {
        let number = u64::from_le_bytes(*header.first_chunk().context("an answer cut short")?);
        let slot = u16::try_from(number & 0xffff)?;
        let errno = number >> 16 & 0xffff;
        if errno != 0 {
            bail!("{:?} failed with errno {errno}", self.slots.io(slot)?);
        }
        let len = u32::try_from(number >> 32)?;
        if len == 0 {
            self.slots.end(slot)?;
        } else {
            self.incoming = Some((slot, 0));
        }
        Ok(usize::try_from(len)?)
    }

    fn payload(&mut self, piece: &[u8], left: usize, _: &mut Outbox) -> Result<()> {
        let Some((slot, at)) = &mut self.incoming else {
            bail!("data where none belongs");
        };
        self.slots.data(*slot, *at, piece)?;
        *at += u32::try_from(piece.len())?;
        if left > 0 {
            Ok(())
        } else {
            self.slots.end(*slot)
        }
    }
}

impl Client for Raw {
    fn room(&self) -> bool {
        true
    }

    fn submit(&mut self, slot: u16, io: Io, out: &mut Outbox) {
        self.slots.begin(slot, io);
        let verb = if io.write { WRITE } else { READ };
        let request = Request {
            verb,
            slot,
            len: io.len,
            offset: io.offset,
        };
        let bytes: [u8; REQUEST] = request.encode();
        out.push(&bytes);
        if io.write {
            out.push_payload(io.offset, 0, usize::try_from(io.len).unwrap_or(0));
        }
    }

    fn slots(&mut self) -> &mut Slots {
        &mut self.slots
    }
}

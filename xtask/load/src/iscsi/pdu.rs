//! Headers of PDUs, by the names and offsets of RFC 7143, section 11.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, bail};

/// Bytes of a basic header segment.
pub const BHS: usize = 48;

/// Opcodes without the immediate bit (11.2.1.2).
pub mod opcode {
    pub const NOP_OUT: u8 = 0x00;
    pub const SCSI_COMMAND: u8 = 0x01;
    pub const LOGIN: u8 = 0x03;
    pub const DATA_OUT: u8 = 0x05;
    pub const LOGOUT: u8 = 0x06;
    pub const NOP_IN: u8 = 0x20;
    pub const SCSI_RESPONSE: u8 = 0x21;
    pub const LOGIN_RESPONSE: u8 = 0x23;
    pub const DATA_IN: u8 = 0x25;
    pub const LOGOUT_RESPONSE: u8 = 0x26;
    pub const R2T: u8 = 0x31;
}

/// The bit of the first byte: outside of the command window's order.
pub const IMMEDIATE: u8 = 0x40;
/// The last PDU of a sequence, and in a login the wish to change the stage.
pub const FINAL: u8 = 0x80;
/// A task or transfer tag that stands for none.
pub const NO_TAG: u32 = 0xffff_ffff;

/// SCSI commands that are used here.
pub mod scsi {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const READ_CAPACITY_16: u8 = 0x10;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8a;
}

/// A basic header segment.
#[derive(Clone, Copy)]
pub struct Header(pub [u8; BHS]);

impl Header {
    /// One with that first byte and those flags.
    pub fn new(opcode: u8, flags: u8) -> Self {
        let mut header = Self([0; BHS]);
        header.0[0] = opcode;
        header.0[1] = flags;
        header
    }

    /// The header that `bytes` begin with; they are at least [`BHS`].
    pub fn of(bytes: &[u8]) -> Result<Self> {
        let bytes = bytes.first_chunk().context("a header cut short")?;
        Ok(Self(*bytes))
    }

    /// Without the immediate bit.
    pub fn opcode(&self) -> u8 {
        self.0[0] & 0x3f
    }

    /// The 32 bits at that offset.
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    /// Sets the 32 bits at that offset.
    pub fn set(&mut self, at: usize, value: u32) -> &mut Self {
        self.0[at..at + 4].copy_from_slice(&value.to_be_bytes());
        self
    }

    /// Initiator task tag.
    pub fn tag(&self) -> u32 {
        self.u32(16)
    }

    /// Bytes of the data segment, without padding.
    pub fn data_len(&self) -> usize {
        usize::from(self.0[5]) << 16 | usize::from(self.0[6]) << 8 | usize::from(self.0[7])
    }

    /// Sets how many bytes of data follow; at most 2^24 - 1.
    pub fn set_data_len(&mut self, len: usize) -> &mut Self {
        let bytes = len.to_be_bytes();
        self.0[5..8].copy_from_slice(&bytes[5..8]);
        self
    }

    /// Bytes of the header with its additional segments.
    pub fn whole_len(prefix: &[u8]) -> Result<usize> {
        let words = prefix.get(4).context("a header cut short")?;
        Ok(BHS + usize::from(*words) * 4)
    }
}

/// `len` with its padding.
pub fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// Sends one PDU and waits until it is gone; for what is not measured.
pub fn write(socket: &mut TcpStream, header: &mut Header, data: &[u8]) -> Result<()> {
    header.set_data_len(data.len());
    let mut bytes = header.0.to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(BHS + padded(data.len()), 0);
    socket.write_all(&bytes).context("send a PDU")
}

/// Waits for one PDU; for what is not measured.
pub fn read(socket: &mut TcpStream) -> Result<(Header, Vec<u8>)> {
    let mut header = [0; BHS];
    socket.read_exact(&mut header).context("receive a PDU")?;
    if header[4] != 0 {
        bail!("an additional header segment, which nothing here asks for");
    }
    let header = Header(header);
    let mut data = vec![0; padded(header.data_len())];
    socket
        .read_exact(&mut data)
        .context("receive a PDU's data")?;
    data.truncate(header.data_len());
    Ok((header, data))
}

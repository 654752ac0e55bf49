//! PDUs, by the names and offsets of the TCP Transport Specification, 3.6.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, bail};

/// Bytes that every header begins with: type, flags, HLEN, PDO, PLEN.
pub const COMMON: usize = 8;
/// Bytes of a command capsule's header.
pub const CAPSULE: usize = 72;
/// Bytes of the headers of H2CData, C2HData, R2T and a response capsule.
pub const SHORT: usize = 24;
/// Bytes of ICReq and ICResp.
pub const IC: usize = 128;

/// PDU types.
pub mod kind {
    pub const IC_REQ: u8 = 0x00;
    pub const IC_RESP: u8 = 0x01;
    pub const COMMAND: u8 = 0x04;
    pub const RESPONSE: u8 = 0x05;
    pub const H2C_DATA: u8 = 0x06;
    pub const C2H_DATA: u8 = 0x07;
    pub const R2T: u8 = 0x09;
}

/// PDU flags.
pub mod flag {
    pub const LAST: u8 = 0x04;
    pub const SUCCESS: u8 = 0x08;
}

/// Opcodes and Fabrics command types.
pub mod opcode {
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const IDENTIFY: u8 = 0x06;
    pub const SET_FEATURES: u8 = 0x09;
    pub const FABRICS: u8 = 0x7f;
    pub const PROPERTY_SET: u8 = 0x00;
    pub const CONNECT: u8 = 0x01;
    pub const PROPERTY_GET: u8 = 0x04;
}

/// Where a command's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    /// It has none.
    None,
    /// Right behind it (SGL descriptor type 0h, subtype 1h).
    InCapsule(u32),
    /// In data PDUs of its own (type 5h, subtype Ah).
    Transport(u32),
}

/// A PDU's header with its first `len` bytes in use.
pub struct Header<const LEN: usize>(pub [u8; LEN]);

impl<const LEN: usize> Header<LEN> {
    /// One whose data, `data` bytes, follow at once.
    pub fn new(kind: u8, flags: u8, data: u32) -> Self {
        let mut header = Self([0; LEN]);
        // Every LEN here is at most 128.
        let len = u8::try_from(LEN).expect("a header is at most 128 bytes long");
        header.0[..3].copy_from_slice(&[kind, flags, len]);
        header.0[3] = if data > 0 { len } else { 0 };
        header.u32(4, u32::from(len) + data);
        header
    }

    /// Sets 16 bits.
    pub fn u16(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets 32 bits.
    pub fn u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets 64 bits.
    pub fn u64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}

/// The 16 bits at that offset of a header that is long enough.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The 32 bits at that offset of a header that is long enough.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

/// The 64 bits at that offset of a header that is long enough.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// A command capsule; what the command itself says goes to offset 8 and beyond.
pub fn command(opcode: u8, id: u16, data: Data) -> Header<CAPSULE> {
    let behind = match data {
        Data::InCapsule(len) => len,
        Data::None | Data::Transport(_) => 0,
    };
    let mut header = Header::<CAPSULE>::new(kind::COMMAND, 0, behind);
    header.0[8] = opcode;
    // PSDT 01b: SGLs (Base 2.0, figure 88).
    header.0[9] = 0x40;
    header.u16(10, id);
    let (len, sgl) = match data {
        Data::None => (0, 0),
        Data::InCapsule(len) => (len, 0x01),
        Data::Transport(len) => (len, 0x5a),
    };
    header.u32(8 + 32, len);
    header.0[8 + 39] = sgl;
    header
}

/// The header's length and that of the data behind it, padding counted as data.
///
/// # Errors
/// When the lengths contradict each other or the type has another header.
pub fn lengths(header: &[u8]) -> Result<(usize, usize)> {
    let len = usize::from(header[2]);
    let whole = usize::try_from(u32_at(header, 4))?;
    let right = match header[0] {
        kind::IC_REQ | kind::IC_RESP => IC,
        kind::COMMAND => CAPSULE,
        kind::RESPONSE | kind::H2C_DATA | kind::C2H_DATA | kind::R2T => SHORT,
        other => bail!("a PDU of type {other:#04x}"),
    };
    if len != right || whole < len {
        bail!(
            "a PDU of type {:#04x} with HLEN {len} and PLEN {whole}",
            header[0]
        );
    }
    if whole > len && usize::from(header[3]) != len {
        bail!(
            "data at {} of a PDU with HLEN {len}: padding, which was not asked for",
            header[3]
        );
    }
    Ok((len, whole - len))
}

/// Sends bytes and waits until they are gone; for what is not measured.
pub fn write(socket: &mut TcpStream, parts: &[&[u8]]) -> Result<()> {
    socket.write_all(&parts.concat()).context("send a PDU")
}

/// Waits for one PDU; for what is not measured.
pub fn read(socket: &mut TcpStream) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut header = vec![0; COMMON];
    socket.read_exact(&mut header).context("receive a PDU")?;
    let (len, data) = lengths(&header)?;
    header.resize(len, 0);
    socket
        .read_exact(&mut header[COMMON..])
        .context("receive a PDU's header")?;
    let mut bytes = vec![0; data];
    socket
        .read_exact(&mut bytes)
        .context("receive a PDU's data")?;
    Ok((header, bytes))
}

/// The status of a response capsule, without the phase bit; 0 is success.
pub fn status(response: &[u8]) -> u16 {
    u16_at(response, 22) >> 1
}

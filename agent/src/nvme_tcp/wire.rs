//! The NVMe/TCP wire format: PDUs as plain values, and the checks that every
//! byte from a peer passes (NVM Express TCP Transport Specification, 3.6).
//!
//! Pure functions over bytes: nothing here reads, allocates or waits. A
//! [`Frame`] says how long each part of a PDU is and is made only of lengths
//! that have been checked, so whoever reads by it never trusts a peer's number.

use std::fmt;

/// Bytes of the header that all PDUs begin with.
pub const COMMON: usize = 8;
/// The longest PDU header (ICReq, ICResp).
pub const LONGEST_HEADER: usize = 128;
/// Bytes of a digest.
pub const DIGEST: usize = 4;
/// The most in-capsule data a command may bring, on every queue.
pub const IN_CAPSULE: u32 = 8192;
/// The most data in one H2CData PDU (MAXH2CDATA).
pub const MAX_H2C_DATA: u32 = 1 << 20;
/// The most padding before data that is put up with; an alignment is at most 128 bytes.
const MAX_PAD: usize = 128;

/// Flag: a header digest follows the header.
pub const FLAG_HDGST: u8 = 1;
/// Flag: a data digest follows the data.
pub const FLAG_DDGST: u8 = 2;
/// Flag: the last data PDU of its command (or R2T).
pub const FLAG_LAST: u8 = 4;
/// Flag: the command succeeded and no response capsule follows.
pub const FLAG_SUCCESS: u8 = 8;

/// A PDU's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Initialize connection request.
    IcReq,
    /// Initialize connection response.
    IcResp,
    /// The host ends the connection.
    H2CTermReq,
    /// The controller ends the connection.
    C2HTermReq,
    /// A command.
    CapsuleCmd,
    /// A command's completion.
    CapsuleResp,
    /// Data to the controller.
    H2CData,
    /// Data to the host.
    C2HData,
    /// Ready to transfer: asks the host for data.
    R2T,
}

impl Kind {
    /// Its code on the wire.
    pub fn code(self) -> u8 {
        match self {
            Self::IcReq => 0x00,
            Self::IcResp => 0x01,
            Self::H2CTermReq => 0x02,
            Self::C2HTermReq => 0x03,
            Self::CapsuleCmd => 0x04,
            Self::CapsuleResp => 0x05,
            Self::H2CData => 0x06,
            Self::C2HData => 0x07,
            Self::R2T => 0x09,
        }
    }

    /// The length of its header, digest not counted.
    pub fn header(self) -> u8 {
        match self {
            Self::IcReq | Self::IcResp => 128,
            Self::CapsuleCmd => 72,
            Self::H2CTermReq
            | Self::C2HTermReq
            | Self::CapsuleResp
            | Self::H2CData
            | Self::C2HData
            | Self::R2T => 24,
        }
    }

    fn of(code: u8) -> Option<Self> {
        [
            Self::IcReq,
            Self::IcResp,
            Self::H2CTermReq,
            Self::C2HTermReq,
            Self::CapsuleCmd,
            Self::CapsuleResp,
            Self::H2CData,
            Self::C2HData,
            Self::R2T,
        ]
        .into_iter()
        .find(|kind| kind.code() == code)
    }

    fn carries_digests(self) -> bool {
        !matches!(
            self,
            Self::IcReq | Self::IcResp | Self::H2CTermReq | Self::C2HTermReq
        )
    }
}

/// Which digests a connection uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digests {
    /// CRC32C of each header.
    pub header: bool,
    /// CRC32C of each PDU's data.
    pub data: bool,
}

/// What is wrong with a PDU: the connection it came on cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{flaw} (FES {:02x}, at byte {field})", self.fes())]
pub struct Malformed {
    /// What is wrong.
    pub flaw: Flaw,
    /// Where in the header the offending field begins.
    pub field: u32,
}

/// Ways in which a PDU is malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// A field of the header has a value that it cannot have.
    HeaderField,
    /// A PDU that has no place at this point, or at all from a host.
    Sequence,
    /// The header digest does not match.
    HeaderDigest,
    /// Data outside of what was asked for.
    OutOfRange,
    /// More data than the limits allow.
    TooLong,
    /// A parameter that is not supported.
    Unsupported,
}

impl Flaw {
    /// A short name, for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::HeaderField => "header-field",
            Self::Sequence => "sequence",
            Self::HeaderDigest => "header-digest",
            Self::OutOfRange => "out-of-range",
            Self::TooLong => "too-long",
            Self::Unsupported => "unsupported",
        }
    }

    /// A malformed PDU with this flaw in the header's field at `field`.
    pub fn at(self, field: u32) -> Malformed {
        Malformed { flaw: self, field }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Malformed {
    /// The fatal error status that a C2HTermReq tells the host.
    pub fn fes(self) -> u16 {
        match self.flaw {
            Flaw::HeaderField => 1,
            Flaw::Sequence => 2,
            Flaw::HeaderDigest => 3,
            Flaw::OutOfRange => 4,
            Flaw::TooLong => 5,
            Flaw::Unsupported => 6,
        }
    }
}

/// The parts of one PDU, by length. All lengths are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Its flags.
    pub flags: u8,
    /// The header's bytes, the common ones among them, digest not counted.
    pub header: usize,
    /// Whether a digest follows the header.
    pub header_digest: bool,
    /// Bytes between the header (and digest) and the data.
    pub pad: usize,
    /// Bytes of data; at most [`IN_CAPSULE`], [`MAX_H2C_DATA`] or, in a TermReq, 128.
    pub data: usize,
    /// Whether a digest follows the data.
    pub data_digest: bool,
}

impl Frame {
    /// Checks the common header of a PDU.
    ///
    /// # Errors
    /// Any length, offset or flag that does not fit the PDU's type, the digests
    /// in use and this controller's limits.
    pub fn check(common: &[u8; COMMON], digests: Digests) -> Result<Self, Malformed> {
        let [code, flags, header, pdo, plen @ ..] = *common;
        let plen = u32::from_le_bytes(plen);
        let kind = Kind::of(code).ok_or(Flaw::HeaderField.at(0))?;
        if header != kind.header() {
            return Err(Flaw::HeaderField.at(2));
        }
        let digested = kind.carries_digests();
        let header_digest = digested && digests.header;
        // A flag for a digest that was not agreed on would shift all that follows.
        if (flags & FLAG_HDGST != 0) != header_digest {
            return Err(Flaw::HeaderField.at(1));
        }
        let header = usize::from(header);
        let before_pad = header + if header_digest { DIGEST } else { 0 };
        let plen = usize::try_from(plen).map_err(|_| Flaw::TooLong.at(4))?;
        if plen < before_pad {
            return Err(Flaw::HeaderField.at(4));
        }
        let mut frame = Self {
            kind,
            flags,
            header,
            header_digest,
            pad: 0,
            data: 0,
            data_digest: false,
        };
        if plen == before_pad {
            return match kind {
                // A data PDU without data has no reason to be.
                Kind::H2CData | Kind::C2HData => Err(Flaw::HeaderField.at(4)),
                _ if flags & FLAG_DDGST != 0 => Err(Flaw::HeaderField.at(1)),
                _ => Ok(frame),
            };
        }
        let limit = match kind {
            Kind::CapsuleCmd => IN_CAPSULE as usize,
            Kind::H2CData | Kind::C2HData => MAX_H2C_DATA as usize,
            Kind::H2CTermReq | Kind::C2HTermReq => {
                // The offending PDU's header follows; PDO says nothing here.
                frame.data = plen - before_pad;
                let fits = frame.data <= LONGEST_HEADER;
                return if fits {
                    Ok(frame)
                } else {
                    Err(Flaw::TooLong.at(4))
                };
            }
            Kind::IcReq | Kind::IcResp | Kind::CapsuleResp | Kind::R2T => {
                return Err(Flaw::HeaderField.at(4));
            }
        };
        frame.data_digest = digests.data;
        if (flags & FLAG_DDGST != 0) != digests.data {
            return Err(Flaw::HeaderField.at(1));
        }
        let pdo = usize::from(pdo);
        frame.pad = pdo.checked_sub(before_pad).ok_or(Flaw::HeaderField.at(3))?;
        let behind_data = if frame.data_digest { DIGEST } else { 0 };
        frame.data = plen
            .checked_sub(pdo + behind_data)
            .ok_or(Flaw::HeaderField.at(4))?;
        if frame.pad > MAX_PAD || !pdo.is_multiple_of(4) {
            return Err(Flaw::HeaderField.at(3));
        }
        if frame.data == 0 {
            return Err(Flaw::HeaderField.at(4));
        }
        if frame.data > limit {
            return Err(Flaw::TooLong.at(4));
        }
        Ok(frame)
    }
}

/// The common header of a PDU with `data` bytes behind its header.
pub fn common(kind: Kind, flags: u8, digests: Digests, data: u32) -> [u8; COMMON] {
    let digested = kind.carries_digests();
    let header = kind.header();
    let mut flags = flags;
    let mut pdo = header;
    if digested && digests.header {
        flags |= FLAG_HDGST;
        pdo += DIGEST as u8;
    }
    let mut plen = u32::from(pdo) + data;
    if digested && digests.data && data > 0 {
        flags |= FLAG_DDGST;
        plen += DIGEST as u32;
    }
    if data == 0 || !digested {
        pdo = 0;
    }
    let [a, b, c, d] = plen.to_le_bytes();
    [kind.code(), flags, header, pdo, a, b, c, d]
}

/// ICReq: how a host wants to use a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcReq {
    /// PDU format version; only 0 exists.
    pub version: u16,
    /// Host PDU data alignment, in dwords, 0's based.
    pub alignment: u8,
    /// The digests it wants.
    pub digests: Digests,
    /// R2Ts it takes at once, 0's based.
    pub max_r2t: u32,
}

impl IcReq {
    /// Reads it from a whole header.
    ///
    /// # Errors
    /// A version or an alignment that is not supported.
    pub fn decode(header: &[u8; 128]) -> Result<Self, Malformed> {
        let request = Self {
            version: u16_at(header, 8),
            alignment: header[10],
            digests: Digests {
                header: header[11] & 1 != 0,
                data: header[11] & 2 != 0,
            },
            max_r2t: u32_at(header, 12),
        };
        if request.version != 0 {
            return Err(Flaw::Unsupported.at(8));
        }
        // Linux skips no padding whatever it asks for; no host is known that asks.
        if request.alignment != 0 {
            return Err(Flaw::Unsupported.at(10));
        }
        if header[11] & !3 != 0 {
            return Err(Flaw::HeaderField.at(11));
        }
        Ok(request)
    }
}

/// The ICResp that answers a request with `digests`.
pub fn ic_resp(digests: Digests) -> [u8; 128] {
    let mut pdu = [0; 128];
    pdu[..COMMON].copy_from_slice(&common(Kind::IcResp, 0, Digests::default(), 0));
    pdu[11] = u8::from(digests.header) | u8::from(digests.data) << 1;
    pdu[12..16].copy_from_slice(&MAX_H2C_DATA.to_le_bytes());
    pdu
}

/// The fields of an H2CData, C2HData or R2T header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    /// The command's identifier.
    pub command: u16,
    /// The transfer tag that the R2T gave.
    pub tag: u16,
    /// Where in the command's data it begins.
    pub offset: u32,
    /// How many bytes.
    pub length: u32,
}

impl Data {
    /// Reads it from a whole header.
    pub fn decode(header: &[u8; 24]) -> Self {
        Self {
            command: u16_at(header, 8),
            tag: u16_at(header, 10),
            offset: u32_at(header, 12),
            length: u32_at(header, 16),
        }
    }

    /// Writes it behind the common header.
    pub fn encode(&self, common: [u8; COMMON]) -> [u8; 24] {
        let mut header = [0; 24];
        header[..8].copy_from_slice(&common);
        header[8..10].copy_from_slice(&self.command.to_le_bytes());
        header[10..12].copy_from_slice(&self.tag.to_le_bytes());
        header[12..16].copy_from_slice(&self.offset.to_le_bytes());
        header[16..20].copy_from_slice(&self.length.to_le_bytes());
        header
    }
}

/// A C2HTermReq for `malformed`, with the header it was found in.
pub fn c2h_term(malformed: Malformed, header: &[u8]) -> Vec<u8> {
    let shown = &header[..header.len().min(LONGEST_HEADER)];
    let length = u32::try_from(shown.len()).expect("at most 128");
    let mut pdu = vec![0; 24];
    pdu[..COMMON].copy_from_slice(&common(Kind::C2HTermReq, 0, Digests::default(), length));
    pdu[8..10].copy_from_slice(&malformed.fes().to_le_bytes());
    pdu[10..14].copy_from_slice(&malformed.field.to_le_bytes());
    pdu.extend_from_slice(shown);
    pdu
}

/// A completion queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Command specific: dwords 0 and 1.
    pub result: u64,
    /// Submission queue head pointer.
    pub sq_head: u16,
    /// The command's identifier.
    pub command: u16,
    /// Status code, type and DNR, without the phase bit: `0x4002` is Invalid Field with DNR.
    pub status: u16,
}

impl Completion {
    /// A whole CapsuleResp, its header digest included where one is used.
    pub fn encode(&self, digests: Digests) -> Short {
        let mut header = [0; 24];
        header[..8].copy_from_slice(&common(Kind::CapsuleResp, 0, digests, 0));
        header[8..16].copy_from_slice(&self.result.to_le_bytes());
        header[16..18].copy_from_slice(&self.sq_head.to_le_bytes());
        header[20..22].copy_from_slice(&self.command.to_le_bytes());
        header[22..24].copy_from_slice(&(self.status << 1).to_le_bytes());
        Short::sealed(header, digests)
    }

    /// Reads it from a whole CapsuleResp header.
    pub fn decode(header: &[u8; 24]) -> Self {
        Self {
            result: u64_at(header, 8),
            sq_head: u16_at(header, 16),
            command: u16_at(header, 20),
            status: u16_at(header, 22) >> 1,
        }
    }
}

/// A header of 24 bytes and its digest, where one is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Short {
    bytes: [u8; 28],
    length: usize,
}

impl Short {
    /// The header as it goes out.
    pub fn sealed(header: [u8; 24], digests: Digests) -> Self {
        let mut bytes = [0; 28];
        bytes[..24].copy_from_slice(&header);
        bytes[24..].copy_from_slice(&crc32c::crc32c(&header).to_le_bytes());
        let length = if digests.header { 28 } else { 24 };
        Self { bytes, length }
    }
}

impl std::ops::Deref for Short {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The 16-bit number at `at`, which must be inside.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The 32-bit number at `at`, which must be inside.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

/// The 64-bit number at `at`, which must be inside.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;

//! The iSCSI wire format of what an initiator sends: the basic header segment
//! and the checks that every byte of it passes (RFC 7143, 11).
//!
//! Pure functions over bytes: nothing here reads, allocates or waits. A
//! [`Frame`] says how long each part of a PDU is and is made only of lengths
//! that have been checked, so whoever reads by it never trusts a peer's number.

pub mod answer;

/// Bytes of the basic header segment.
pub const BHS: usize = 48;
/// Bytes of a digest.
pub const DIGEST: usize = 4;
/// The most additional header segments, in bytes: a long CDB and the length of
/// bidirectional data, with room to spare. The field could say 1020.
pub const MAX_AHS: usize = 256;
/// A task or transfer tag that names nothing (RFC 7143, 11.2.1.8).
pub const NO_TAG: u32 = 0xffff_ffff;
/// The most data in one PDU before a connection has declared more
/// (RFC 7143, 13.12).
pub const DEFAULT_MAX_DATA: usize = 8192;

/// What an initiator sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opcode {
    /// A ping, or the answer to one.
    NopOut,
    /// A SCSI command.
    ScsiCommand,
    /// A task management function.
    TaskManagement,
    /// A step of the login.
    Login,
    /// Text, in the full feature phase.
    Text,
    /// Data for a command.
    DataOut,
    /// The end of a session or a connection.
    Logout,
    /// A request to send something again.
    Snack,
}

impl Opcode {
    /// The opcode in a header's first byte; none when initiators have no such one.
    pub fn of(byte: u8) -> Option<Self> {
        Some(match byte & 0x3f {
            0x00 => Self::NopOut,
            0x01 => Self::ScsiCommand,
            0x02 => Self::TaskManagement,
            0x03 => Self::Login,
            0x04 => Self::Text,
            0x05 => Self::DataOut,
            0x06 => Self::Logout,
            0x10 => Self::Snack,
            _ => return None,
        })
    }
}

/// Which digests a connection uses, from its full feature phase on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digests {
    /// CRC32C of each header.
    pub header: bool,
    /// CRC32C of each PDU's data.
    pub data: bool,
}

/// What is wrong with something that a peer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Flaw {
    /// An opcode that initiators do not have.
    #[error("unknown opcode")]
    Opcode,
    /// A PDU that has no place in this phase of the connection.
    #[error("PDU out of place")]
    Phase,
    /// More data, or more additional headers, than was agreed.
    #[error("PDU too long")]
    TooLong,
    /// A field with a value that it may not have.
    #[error("invalid field")]
    Field,
    /// The header's digest does not match.
    #[error("header digest")]
    HeaderDigest,
    /// The data's digest does not match.
    #[error("data digest")]
    DataDigest,
    /// Data that nobody asked for, or more than was asked for.
    #[error("unexpected data")]
    UnexpectedData,
    /// Data, or a command, out of its order.
    #[error("out of order")]
    Order,
    /// A task tag that is in use.
    #[error("task tag in use")]
    TagInUse,
    /// Text that is no list of keys and values, or too long a one.
    #[error("malformed text")]
    Text,
    /// A retransmission was asked for, which this error recovery level has not.
    #[error("retransmission asked for")]
    Snack,
    /// More immediate commands than there is room for.
    #[error("too many immediate commands")]
    Immediate,
}

impl Flaw {
    /// Its name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Opcode => "opcode",
            Self::Phase => "phase",
            Self::TooLong => "too-long",
            Self::Field => "field",
            Self::HeaderDigest => "header-digest",
            Self::DataDigest => "data-digest",
            Self::UnexpectedData => "unexpected-data",
            Self::Order => "order",
            Self::TagInUse => "tag-in-use",
            Self::Text => "text",
            Self::Snack => "snack",
            Self::Immediate => "immediate",
        }
    }

    /// The reason in a Reject PDU (RFC 7143, 11.17.1).
    pub fn reject(self) -> u8 {
        match self {
            Self::DataDigest => 0x02,
            Self::Snack => 0x03,
            Self::Phase | Self::HeaderDigest | Self::UnexpectedData | Self::Order => 0x04,
            Self::Opcode => 0x05,
            Self::Immediate => 0x06,
            Self::TagInUse => 0x07,
            Self::TooLong | Self::Field | Self::Text => 0x09,
        }
    }

    /// Whether the connection goes on after the Reject: where the stream of
    /// PDUs and the order of commands are still known.
    pub fn survivable(self) -> bool {
        matches!(self, Self::Snack | Self::Immediate)
    }
}

/// The lengths of one PDU's parts, all of them checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Additional header segments, in bytes.
    pub ahs: usize,
    /// Whether a digest follows the headers.
    pub header_digest: bool,
    /// Data, without padding.
    pub data: usize,
    /// Whether a digest follows the data and its padding.
    pub data_digest: bool,
}

impl Frame {
    /// Bytes up to the data.
    pub fn head(&self) -> usize {
        BHS + self.ahs + if self.header_digest { DIGEST } else { 0 }
    }

    /// Bytes of padding that follow the data.
    pub fn padding(&self) -> usize {
        self.data.wrapping_neg() % 4
    }

    /// Bytes that follow the data: padding and digest.
    pub fn trailer(&self) -> usize {
        self.padding()
            + if self.data_digest && self.data > 0 {
                DIGEST
            } else {
                0
            }
    }
}

/// A basic header segment that an initiator sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header([u8; BHS]);

impl Header {
    /// The header in these bytes.
    pub fn new(bytes: [u8; BHS]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8; BHS] {
        &self.0
    }

    /// Its opcode.
    ///
    /// # Errors
    /// When initiators have none of this value.
    pub fn opcode(&self) -> Result<Opcode, Flaw> {
        Opcode::of(self.0[0]).ok_or(Flaw::Opcode)
    }

    /// The lengths of the PDU's parts, on a connection with these digests that
    /// takes at most `max_data` bytes of data in a PDU.
    ///
    /// # Errors
    /// When one is larger than agreed.
    pub fn frame(&self, digests: Digests, max_data: usize) -> Result<Frame, Flaw> {
        let ahs = usize::from(self.0[4]) * 4;
        let data = self.word(4) as usize & 0xff_ffff;
        if ahs > MAX_AHS || data > max_data {
            return Err(Flaw::TooLong);
        }
        Ok(Frame {
            ahs,
            header_digest: digests.header,
            data,
            data_digest: digests.data,
        })
    }

    /// Whether the I bit is set: the command is to be delivered at once.
    pub fn immediate(&self) -> bool {
        self.0[0] & 0x40 != 0
    }

    /// The byte that follows the opcode: flags, whose meaning differs.
    pub fn flags(&self) -> u8 {
        self.0[1]
    }

    /// Whether the F bit is set: the last PDU of its sequence.
    pub fn is_final(&self) -> bool {
        self.0[1] & 0x80 != 0
    }

    /// The LUN field, as it is.
    pub fn lun(&self) -> u64 {
        u64::from_be_bytes(self.part(8))
    }

    /// The initiator task tag.
    pub fn task(&self) -> u32 {
        self.word(16)
    }

    /// The command's number, in the PDUs that have one.
    pub fn command_number(&self) -> u32 {
        self.word(24)
    }

    /// The status number that the initiator expects next.
    pub fn expected_status(&self) -> u32 {
        self.word(28)
    }

    /// The big-endian word at byte `at`; beyond the header's end, 0.
    pub fn word(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.part(at))
    }

    fn part<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut part = [0; N];
        if let Some(bytes) = self.0.get(at..at + N) {
            part.copy_from_slice(bytes);
        }
        part
    }
}

/// A SCSI command (RFC 7143, 11.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScsiCommand {
    /// Whether no unsolicited data PDUs follow.
    pub is_final: bool,
    /// Whether data is expected from the target.
    pub reads: bool,
    /// Whether data is to be sent to the target.
    pub writes: bool,
    /// The task attribute, 0 to 7.
    pub attribute: u8,
    /// Bytes that the initiator expects to send or to receive.
    pub length: u32,
    /// The command descriptor block.
    pub cdb: [u8; 16],
}

impl ScsiCommand {
    /// Task attribute: untagged; taken as simple.
    pub const UNTAGGED: u8 = 0;
    /// Task attribute: simple.
    pub const SIMPLE: u8 = 1;
    /// Task attribute: head of queue.
    pub const HEAD_OF_QUEUE: u8 = 3;

    /// The command in a header.
    pub fn decode(header: &Header) -> Self {
        let flags = header.flags();
        Self {
            is_final: header.is_final(),
            reads: flags & 0x40 != 0,
            writes: flags & 0x20 != 0,
            attribute: flags & 7,
            length: header.word(20),
            cdb: header.part(32),
        }
    }
}

/// Data for a command (RFC 7143, 11.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataOut {
    /// The last of its sequence.
    pub is_final: bool,
    /// The task that it is for.
    pub task: u32,
    /// The transfer that was asked for; [`NO_TAG`] when it comes unasked.
    pub transfer: u32,
    /// Its number within its sequence.
    pub number: u32,
    /// Where in the command's data it belongs.
    pub offset: u32,
}

impl DataOut {
    /// The fields of a header.
    pub fn decode(header: &Header) -> Self {
        Self {
            is_final: header.is_final(),
            task: header.task(),
            transfer: header.word(20),
            number: header.word(36),
            offset: header.word(40),
        }
    }
}

/// A step of the login (RFC 7143, 11.12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoginRequest {
    /// Whether the initiator wants to leave this stage.
    pub transit: bool,
    /// Whether the text goes on in the next request.
    pub goes_on: bool,
    /// The stage it is in.
    pub current: u8,
    /// The stage it wants to go to, with `transit`.
    pub next: u8,
    /// The highest version it speaks.
    pub max_version: u8,
    /// The lowest version it speaks.
    pub min_version: u8,
    /// The initiator's part of the session's id.
    pub isid: [u8; 6],
    /// The target's part; 0 for a new session.
    pub tsih: u16,
    /// The task tag.
    pub task: u32,
    /// The connection's id in its session.
    pub connection: u16,
    /// The number that its first command will have.
    pub command_number: u32,
}

impl LoginRequest {
    /// The fields of a header.
    pub fn decode(header: &Header) -> Self {
        let flags = header.flags();
        Self {
            transit: flags & 0x80 != 0,
            goes_on: flags & 0x40 != 0,
            current: flags >> 2 & 3,
            next: flags & 3,
            max_version: header.0[2],
            min_version: header.0[3],
            isid: header.part(8),
            tsih: u16::from_be_bytes(header.part(14)),
            task: header.task(),
            connection: u16::from_be_bytes(header.part(20)),
            command_number: header.command_number(),
        }
    }
}

/// A task management function (RFC 7143, 11.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskManagement {
    /// Its number, 1 to 127.
    pub function: u8,
    /// The LUN field.
    pub lun: u64,
    /// The task that it is about.
    pub referenced: u32,
    /// That task's command number.
    pub referenced_number: u32,
}

impl TaskManagement {
    /// The fields of a header.
    pub fn decode(header: &Header) -> Self {
        Self {
            function: header.flags() & 0x7f,
            lun: header.lun(),
            referenced: header.word(20),
            referenced_number: header.word(32),
        }
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;

//! Submission queue entries, and the I/O commands among them.
//!
//! [`Io::decode`] decides alone from the entry whether a command is one that
//! this controller serves and within its limits. What is done on a device is
//! [`perform`](super::perform)'s; neither knows connections or gates.

use super::reserve;
use super::status::Status;
use super::wire::{u16_at, u32_at, u64_at};
use crate::block::BLOCK;
use crate::ids::Lba;

/// The one namespace of a subsystem.
pub const NSID: u32 = 1;
/// The most bytes in one transfer (MDTS): four fit in a connection's memory.
pub const MAX_TRANSFER: u32 = 256 << 10;
/// Opcode of all fabrics commands.
pub const FABRICS: u8 = 0x7f;

/// I/O opcodes that are served, with what a namespace's effects log says of each:
/// supported (bit 0), changes the namespace's content (bit 1).
pub const IO_OPCODES: [(u8, u32); 12] = [
    (Io::FLUSH, 1),
    (Io::WRITE, 3),
    (Io::READ, 1),
    (Io::COMPARE, 1),
    (Io::WRITE_ZEROES, 3),
    (Io::DATASET_MANAGEMENT, 3),
    (Io::VERIFY, 1),
    (Io::COPY, 3),
    (reserve::REGISTER, 1),
    (reserve::REPORT, 1),
    (reserve::ACQUIRE, 1),
    (reserve::RELEASE, 1),
];

/// Bytes of one Verify (VSL) and of one Write Zeroes (WZSL) at most: as many as
/// are soon done, since a fence waits for them.
pub const MAX_UNMOVED: u32 = 16 << 20;
/// Ranges of one Dataset Management at most (DMRL): what that field can say.
pub const MANAGED_RANGES: u8 = 255;
/// Blocks in one of its ranges (DMRSL), and in all of them (DMSL), at most: 1 GiB.
pub const MANAGED_BLOCKS: u32 = 262_144;
/// Blocks in one source range of a Copy at most (MSSRL).
pub const COPY_RANGE: u16 = 4096;
/// Blocks in one Copy at most (MCL): 16 MiB.
pub const COPY_TOTAL: u32 = 4096;
/// Source ranges of one Copy at most.
pub const COPY_RANGES: u32 = 128;
/// What Verify and Copy move at once.
pub const CHUNK: u32 = 64 << 10;

/// A submission queue entry.
#[derive(Debug, Clone, Copy)]
pub struct Entry([u8; 64]);

/// Where a command's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Behind the command, in its capsule.
    Capsule,
    /// In the host's memory: sent by H2CData, or asked for by C2HData.
    Host,
}

impl Entry {
    /// An entry of these bytes.
    pub fn new(bytes: [u8; 64]) -> Self {
        Self(bytes)
    }
    /// The opcode.
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }
    /// The command identifier.
    pub fn command(&self) -> u16 {
        u16_at(&self.0, 2)
    }
    /// The namespace.
    pub fn namespace(&self) -> u32 {
        u32_at(&self.0, 4)
    }
    /// A fabrics command's type.
    pub fn fabrics_type(&self) -> u8 {
        self.0[4]
    }
    /// Command dword `number`, 10 to 15.
    pub fn dword(&self, number: usize) -> u32 {
        u32_at(&self.0, number * 4)
    }
    /// The bytes, for fields that are no dwords.
    pub fn bytes(&self) -> &[u8; 64] {
        &self.0
    }

    /// Where `length` bytes of data are, by the entry's SGL descriptor.
    ///
    /// # Errors
    /// A descriptor that is no transport data block or in-capsule offset, or of
    /// another length.
    pub fn data(&self, length: u32) -> Result<Place, Status> {
        let (place, described) = self.descriptor()?;
        if described == length {
            Ok(place)
        } else {
            Err(Status::DATA_SGL_LENGTH_INVALID)
        }
    }

    /// The SGL descriptor: where the data is and how long.
    ///
    /// # Errors
    /// Any other kind of descriptor.
    pub fn descriptor(&self) -> Result<(Place, u32), Status> {
        let length = u32_at(&self.0, 32);
        if self.0[1] >> 6 != 0b01 {
            return Err(Status::INVALID_FIELD);
        }
        match self.0[39] {
            0x01 if u64_at(&self.0, 24) == 0 => Ok((Place::Capsule, length)),
            0x01 => Err(Status::SGL_OFFSET_INVALID),
            0x5a => Ok((Place::Host, length)),
            _ => Err(Status::SGL_DESCRIPTOR_TYPE_INVALID),
        }
    }
}

/// An I/O command that can be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields named as the specification names them")]
pub enum Io {
    Flush,
    Write {
        lba: Lba,
        blocks: u64,
        fua: bool,
    },
    Read {
        lba: Lba,
        blocks: u64,
        fua: bool,
    },
    Compare {
        lba: Lba,
        blocks: u64,
    },
    WriteZeroes {
        lba: Lba,
        blocks: u64,
        deallocate: bool,
        fua: bool,
    },
    DatasetManagement {
        ranges: u32,
        deallocate: bool,
    },
    Verify {
        lba: Lba,
        blocks: u64,
    },
    Copy {
        to: Lba,
        ranges: u32,
        /// Bytes of one source range's description.
        described: u32,
        fua: bool,
    },
}

impl Io {
    /// Opcode of Flush.
    pub const FLUSH: u8 = 0x00;
    /// Opcode of Write.
    pub const WRITE: u8 = 0x01;
    /// Opcode of Read.
    pub const READ: u8 = 0x02;
    /// Opcode of Compare.
    pub const COMPARE: u8 = 0x05;
    /// Opcode of Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Opcode of Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Opcode of Verify.
    pub const VERIFY: u8 = 0x0c;
    /// Opcode of Copy.
    pub const COPY: u8 = 0x19;

    /// Reads a command.
    ///
    /// # Errors
    /// The status for the host: an opcode that is not served, another
    /// namespace, more than one command may move or name, a write where writes are refused.
    pub fn decode(entry: &Entry, read_only: bool) -> Result<Self, Status> {
        let (lba, blocks) = (
            Lba(u64::from(entry.dword(11)) << 32 | u64::from(entry.dword(10))),
            u64::from(entry.dword(12) & 0xffff) + 1,
        );
        let fua = entry.dword(12) & 1 << 30 != 0;
        let io = match entry.opcode() {
            Self::FLUSH => Self::Flush,
            Self::WRITE => Self::Write { lba, blocks, fua },
            Self::READ => Self::Read { lba, blocks, fua },
            Self::COMPARE => Self::Compare { lba, blocks },
            Self::WRITE_ZEROES => {
                let deallocate = entry.dword(12) & 1 << 25 != 0;
                Self::WriteZeroes {
                    lba,
                    blocks,
                    deallocate,
                    fua,
                }
            }
            Self::DATASET_MANAGEMENT => Self::DatasetManagement {
                ranges: (entry.dword(10) & 0xff) + 1,
                deallocate: entry.dword(11) & 1 << 2 != 0,
            },
            Self::VERIFY => Self::Verify { lba, blocks },
            Self::COPY => {
                // NVM Command Set 1.0, 3.2.2: format 1 has room for wider tags only.
                let described = match entry.dword(12) >> 8 & 15 {
                    0 => 32,
                    1 => 40,
                    _ => return Err(Status::INVALID_FIELD),
                };
                let ranges = (entry.dword(12) & 0xff) + 1;
                if ranges > COPY_RANGES {
                    return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
                }
                Self::Copy {
                    to: lba,
                    ranges,
                    described,
                    fua,
                }
            }
            _ => return Err(Status::INVALID_OPCODE),
        };
        // Fused commands: the low bits of the flags.
        if entry.bytes()[1] & 3 != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let all = io == Self::Flush && entry.namespace() == u32::MAX;
        if entry.namespace() != NSID && !all {
            return Err(Status::INVALID_NAMESPACE);
        }
        let (blocks, most) = match io {
            Self::Write { blocks, .. }
            | Self::Read { blocks, .. }
            | Self::Compare { blocks, .. } => (blocks, MAX_TRANSFER),
            Self::Verify { blocks, .. } | Self::WriteZeroes { blocks, .. } => (blocks, MAX_UNMOVED),
            Self::Flush | Self::DatasetManagement { .. } | Self::Copy { .. } => (0, 0),
        };
        if blocks * BLOCK > most.into() {
            return Err(Status::INVALID_FIELD);
        }
        if read_only && io.writes() {
            return Err(Status::NAMESPACE_WRITE_PROTECTED);
        }
        Ok(io)
    }

    /// Whether it changes the namespace's content.
    pub fn writes(self) -> bool {
        match self {
            Self::Write { .. } | Self::WriteZeroes { .. } | Self::Copy { .. } => true,
            Self::DatasetManagement { deallocate, .. } => deallocate,
            Self::Flush | Self::Read { .. } | Self::Compare { .. } | Self::Verify { .. } => false,
        }
    }

    /// Whether a reservation that keeps writers out keeps it out: a Flush
    /// counts as a write (NVM Command Set 1.0, 2.2.2).
    pub fn needs_write(self) -> bool {
        self == Self::Flush || self.writes() || matches!(self, Self::DatasetManagement { .. })
    }

    /// The same, durable when it is answered, if it writes.
    #[must_use]
    pub fn durable(mut self) -> Self {
        if let Self::Write { fua, .. } | Self::WriteZeroes { fua, .. } | Self::Copy { fua, .. } =
            &mut self
        {
            *fua = true;
        }
        self
    }

    /// Bytes that the host sends with it, as its entry describes them.
    ///
    /// # Errors
    /// A descriptor that does not fit the command.
    pub fn incoming(self, entry: &Entry) -> Result<Option<(Place, u32)>, Status> {
        match self {
            Self::Write { blocks, .. } | Self::Compare { blocks, .. } => {
                let length = bytes(blocks);
                entry.data(length).map(|place| Some((place, length)))
            }
            Self::DatasetManagement { ranges, .. } => {
                // Linux sends a whole page, whatever the number of ranges.
                let (place, length) = entry.descriptor()?;
                if length < ranges * 16 || length > 4096 {
                    return Err(Status::DATA_SGL_LENGTH_INVALID);
                }
                Ok(Some((place, length)))
            }
            Self::Copy {
                ranges, described, ..
            } => {
                let length = ranges * described;
                entry.data(length).map(|place| Some((place, length)))
            }
            Self::Flush | Self::Read { .. } | Self::WriteZeroes { .. } | Self::Verify { .. } => {
                Ok(None)
            }
        }
    }

    /// Bytes that the host gets; for these a descriptor of its memory is required.
    ///
    /// # Errors
    /// A descriptor that does not fit the command.
    pub fn outgoing(self, entry: &Entry) -> Result<u32, Status> {
        let Self::Read { blocks, .. } = self else {
            return Ok(0);
        };
        match entry.data(bytes(blocks))? {
            Place::Host => Ok(bytes(blocks)),
            Place::Capsule => Err(Status::SGL_DESCRIPTOR_TYPE_INVALID),
        }
    }

    /// Bytes of memory that it works in, beside the host's data.
    pub fn scratch(self) -> u32 {
        match self {
            Self::Compare { blocks, .. } => bytes(blocks),
            Self::Verify { blocks, .. } => bytes(blocks).min(CHUNK),
            Self::Copy { .. } => CHUNK,
            Self::Flush
            | Self::Write { .. }
            | Self::Read { .. }
            | Self::WriteZeroes { .. }
            | Self::DatasetManagement { .. } => 0,
        }
    }
}

/// At most 65,536 blocks, which 32 bits hold.
fn bytes(blocks: u64) -> u32 {
    u32::try_from(blocks * BLOCK).unwrap_or(u32::MAX)
}

//! Submission queue entries, and the I/O commands among them.
//!
//! [`Io::decode`] decides alone from the entry whether a command is one that
//! this controller serves and within its limits; [`Io::perform`] does it on a
//! device. Neither knows connections or gates.

use super::status::Status;
use super::wire::{u16_at, u32_at, u64_at};
use crate::block::{BLOCK, BlockDevice};
use crate::ids::Lba;

/// The one namespace of a subsystem.
pub const NSID: u32 = 1;
/// The most bytes in one transfer (MDTS).
pub const MAX_TRANSFER: u32 = 1 << 20;
/// Opcode of all fabrics commands.
pub const FABRICS: u8 = 0x7f;

/// I/O opcodes that are served, with what a namespace's effects log says of each:
/// supported (bit 0), changes the namespace's content (bit 1).
pub const IO_OPCODES: [(u8, u32); 6] = [
    (Io::FLUSH, 1),
    (Io::WRITE, 3),
    (Io::READ, 1),
    (Io::WRITE_ZEROES, 3),
    (Io::DATASET_MANAGEMENT, 3),
    (Io::VERIFY, 1),
];

/// Verify reads this much at once.
const VERIFY_CHUNK: u64 = (256 << 10) / BLOCK;

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
}

impl Io {
    /// Opcode of Flush.
    pub const FLUSH: u8 = 0x00;
    /// Opcode of Write.
    pub const WRITE: u8 = 0x01;
    /// Opcode of Read.
    pub const READ: u8 = 0x02;
    /// Opcode of Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Opcode of Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Opcode of Verify.
    pub const VERIFY: u8 = 0x0c;

    /// Reads a command.
    ///
    /// # Errors
    /// The status for the host: an opcode that is not served, another
    /// namespace, more than one transfer may carry, a write where writes are refused.
    pub fn decode(entry: &Entry, read_only: bool) -> Result<Self, Status> {
        let (lba, blocks) = (
            Lba(u64::from(entry.dword(11)) << 32 | u64::from(entry.dword(10))),
            u64::from(entry.dword(12) & 0xffff) + 1,
        );
        let fua = entry.dword(12) & 1 << 30 != 0;
        let io = match entry.opcode() {
            Self::FLUSH => Self::Flush,
            Self::WRITE => Self::Write { lba, blocks, fua },
            Self::READ => Self::Read { lba, blocks },
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
        if let Self::Write { blocks, .. } | Self::Read { blocks, .. } = io
            && blocks * BLOCK > u64::from(MAX_TRANSFER)
        {
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
            Self::Write { .. } | Self::WriteZeroes { .. } => true,
            Self::DatasetManagement { deallocate, .. } => deallocate,
            Self::Flush | Self::Read { .. } | Self::Verify { .. } => false,
        }
    }

    /// Bytes that the host sends with it, as its entry describes them.
    ///
    /// # Errors
    /// A descriptor that does not fit the command.
    pub fn incoming(self, entry: &Entry) -> Result<Option<(Place, u32)>, Status> {
        match self {
            Self::Write { blocks, .. } => {
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

    /// Does it on `device`, with `data` to write or to fill; for Read as long
    /// as [`Self::outgoing`], otherwise as [`Self::incoming`] says.
    ///
    /// # Errors
    /// The status for the host; the device's own reason is logged.
    pub fn perform(self, device: &dyn BlockDevice, data: &mut [u8]) -> Result<(), Status> {
        let done = match self {
            Self::Flush => device.flush(),
            Self::Write { lba, fua, .. } => device.write(lba, data, fua),
            Self::Read { lba, .. } => device.read(lba, data),
            Self::WriteZeroes {
                lba,
                blocks,
                deallocate,
                fua,
            } => match device.write_zeroes(lba, blocks, deallocate) {
                Ok(()) if fua => device.flush(),
                other => other,
            },
            Self::DatasetManagement {
                deallocate: false, ..
            } => Ok(()),
            Self::DatasetManagement { ranges, .. } => {
                let mut done = Ok(());
                for range in data.chunks_exact(16).take(ranges as usize) {
                    let (blocks, lba) = (u32_at(range, 4).into(), Lba(u64_at(range, 8)));
                    done = device.deallocate(lba, blocks);
                    if done.is_err() {
                        break;
                    }
                }
                done
            }
            Self::Verify { lba, blocks } => {
                let mut done = Ok(());
                let mut buffer = vec![0; (VERIFY_CHUNK.min(blocks) * BLOCK) as usize];
                let mut next = 0;
                while next < blocks && done.is_ok() {
                    let some = (blocks - next).min(VERIFY_CHUNK);
                    let buffer = &mut buffer[..(some * BLOCK) as usize];
                    done = device.read(Lba(lba.0.saturating_add(next)), buffer);
                    next += some;
                }
                done
            }
        };
        done.map_err(|error| {
            tracing::warn!(command = ?self, %error, "the device did not do what a host asked");
            match self {
                Self::Read { .. } | Self::Verify { .. } => Status::of_read(&error),
                _ => Status::of_write(&error),
            }
        })
    }
}

/// At most 65,536 blocks, which 32 bits hold.
fn bytes(blocks: u64) -> u32 {
    u32::try_from(blocks * BLOCK).unwrap_or(u32::MAX)
}

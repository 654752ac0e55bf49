//! A command descriptor block, decoded and checked (SPC-4, 6; SBC-3, 5).

use super::opcodes::{Form, Kind};
use super::reservation::{PARAMETERS, Use};
use super::sense::Sense;
use crate::block::BLOCK;
use crate::ids::Lba;

/// The most blocks that one command may transfer, as the block limits page
/// says: 16 MiB, of which only a part is in memory at a time.
pub const MAX_TRANSFER: u32 = 4096;
/// The most blocks of COMPARE AND WRITE, as the block limits page says.
pub const MAX_COMPARE: u8 = 32;
/// The most blocks of WRITE SAME, as the block limits page says: as many as
/// are soon written, since a fence waits for them.
pub const MAX_WRITE_SAME: u32 = 4096;

/// Blocks of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub lba: Lba,
    /// How many.
    pub blocks: u32,
}

impl Range {
    /// Its length in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.blocks) * BLOCK
    }
}

/// A command and its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "each is the standard's name of a command or of its field"
)]
pub enum Command {
    TestUnitReady,
    RequestSense {
        descriptor: bool,
        allocation: u32,
    },
    Inquiry {
        /// The vital product data page; none: standard data.
        page: Option<u8>,
        allocation: u32,
    },
    ModeSense {
        ten: bool,
        no_descriptor: bool,
        long_lba: bool,
        control: u8,
        page: u8,
        subpage: u8,
        allocation: u32,
    },
    ModeSelect {
        ten: bool,
        length: u32,
    },
    Reserve,
    Release,
    StartUnit,
    ReadCapacity10,
    ReadCapacity16 {
        allocation: u32,
    },
    Read {
        range: Range,
        fua: bool,
    },
    Write {
        range: Range,
        fua: bool,
    },
    WriteAndVerify {
        range: Range,
        compare: bool,
    },
    Verify {
        range: Range,
        compare: bool,
    },
    PreFetch {
        range: Range,
    },
    SynchronizeCache,
    WriteSame {
        range: Range,
        unmap: bool,
        no_data: bool,
    },
    Unmap {
        length: u32,
    },
    OrWrite {
        range: Range,
        fua: bool,
    },
    CompareAndWrite {
        range: Range,
        fua: bool,
    },
    GetLbaStatus {
        /// The first block that is asked about.
        lba: Lba,
        allocation: u32,
    },
    PersistentReserveIn {
        action: u8,
        allocation: u32,
    },
    PersistentReserveOut {
        action: u8,
        scope: u8,
        kind: u8,
    },
    ReportLuns {
        select: u8,
        allocation: u32,
    },
    ReportSupportedOpcodes {
        allocation: u32,
    },
}

impl Command {
    /// The command in a CDB of this form, on a device of so many blocks.
    ///
    /// # Errors
    /// A field with a value that it may not have; blocks beyond the end.
    pub fn decode(form: &Form, cdb: &[u8; 16], blocks: u64) -> Result<Self, Sense> {
        let short = |at: usize| u32::from(u16::from_be_bytes([cdb[at], cdb[at + 1]]));
        let long = |at| word(cdb, at);
        let ten = cdb[0] >> 5 == 2;
        let fua = cdb[0] >> 5 != 0 && cdb[1] & 0x08 != 0;
        let compare = cdb[1] & 0x02 != 0;
        Ok(match form.kind {
            Kind::TestUnitReady => Self::TestUnitReady,
            Kind::RequestSense => Self::RequestSense {
                descriptor: cdb[1] & 1 != 0,
                allocation: cdb[4].into(),
            },
            Kind::Inquiry if cdb[1] & 1 == 0 && cdb[2] != 0 => return Err(Sense::cdb(2)),
            Kind::Inquiry => Self::Inquiry {
                page: (cdb[1] & 1 != 0).then_some(cdb[2]),
                allocation: short(3),
            },
            Kind::ModeSense => Self::ModeSense {
                ten,
                no_descriptor: cdb[1] & 0x08 != 0,
                long_lba: cdb[1] & 0x10 != 0,
                control: cdb[2] >> 6,
                page: cdb[2] & 0x3f,
                subpage: cdb[3],
                allocation: if ten { short(7) } else { cdb[4].into() },
            },
            // PF 0 would be a list in no standard's format; SP saves, which is not.
            Kind::ModeSelect if cdb[1] & 0x11 != 0x10 => return Err(Sense::cdb(1)),
            Kind::ModeSelect => Self::ModeSelect {
                ten,
                length: if ten { short(7) } else { cdb[4].into() },
            },
            Kind::Reserve => Self::Reserve,
            Kind::Release => Self::Release,
            // There is nothing to be stopped.
            Kind::StartStopUnit if cdb[4] & 1 == 0 => return Err(Sense::cdb(4)),
            Kind::StartStopUnit => Self::StartUnit,
            Kind::ReadCapacity10 => Self::ReadCapacity10,
            Kind::ReadCapacity16 => Self::ReadCapacity16 {
                allocation: long(10),
            },
            Kind::Read => Self::Read {
                range: range(cdb, blocks, MAX_TRANSFER)?,
                fua,
            },
            Kind::Write => Self::Write {
                range: range(cdb, blocks, MAX_TRANSFER)?,
                fua,
            },
            Kind::WriteAndVerify => Self::WriteAndVerify {
                range: range(cdb, blocks, MAX_TRANSFER)?,
                compare,
            },
            Kind::Verify => Self::Verify {
                range: range(cdb, blocks, MAX_TRANSFER)?,
                compare,
            },
            Kind::PreFetch => Self::PreFetch {
                range: range(cdb, blocks, u32::MAX)?,
            },
            Kind::SynchronizeCache => {
                range(cdb, blocks, u32::MAX)?;
                Self::SynchronizeCache
            }
            Kind::WriteSame => {
                let range = range(cdb, blocks, MAX_WRITE_SAME)?;
                if range.blocks == 0 {
                    // The block limits page's WSNZ bit says so.
                    return Err(Sense::cdb(length_at(cdb)));
                }
                Self::WriteSame {
                    range,
                    unmap: cdb[1] & 0x08 != 0,
                    no_data: cdb[1] & 0x01 != 0,
                }
            }
            Kind::Unmap => Self::Unmap { length: short(7) },
            Kind::OrWrite => Self::OrWrite {
                range: range(cdb, blocks, MAX_TRANSFER)?,
                fua,
            },
            Kind::GetLbaStatus => {
                let lba = long_lba(cdb);
                if lba >= blocks {
                    return Err(Sense::LBA_RANGE);
                }
                Self::GetLbaStatus {
                    lba: Lba(lba),
                    allocation: long(10),
                }
            }
            Kind::CompareAndWrite => Self::CompareAndWrite {
                range: range(cdb, blocks, MAX_COMPARE.into())?,
                fua,
            },
            Kind::PersistentReserveIn => Self::PersistentReserveIn {
                action: cdb[1] & 0x1f,
                allocation: short(7),
            },
            // Ahead of the data: a list may be no longer, whatever its length says.
            Kind::PersistentReserveOut if long(5) != PARAMETERS => {
                return Err(Sense::LIST_LENGTH);
            }
            Kind::PersistentReserveOut => Self::PersistentReserveOut {
                action: cdb[1] & 0x1f,
                scope: cdb[2] >> 4,
                kind: cdb[2] & 0x0f,
            },
            Kind::ReportLuns => match cdb[2] {
                select @ 0..=2 => Self::ReportLuns {
                    select,
                    allocation: long(6),
                },
                _ => return Err(Sense::cdb(2)),
            },
            Kind::ReportSupportedOpcodes => Self::ReportSupportedOpcodes {
                allocation: long(6),
            },
        })
    }

    /// Bytes of data that it takes from the initiator.
    pub fn data_out(&self) -> u64 {
        match self {
            Self::ModeSelect { length, .. } | Self::Unmap { length } => (*length).into(),
            Self::PersistentReserveOut { .. } => PARAMETERS.into(),
            Self::Write { range, .. }
            | Self::OrWrite { range, .. }
            | Self::WriteAndVerify { range, .. }
            | Self::Verify {
                range,
                compare: true,
            } => range.bytes(),
            Self::WriteSame { no_data: false, .. } => BLOCK,
            Self::CompareAndWrite { range, .. } => 2 * range.bytes(),
            _ => 0,
        }
    }

    /// Whether its data, coming in, can be dealt with part by part.
    pub fn in_parts(&self) -> bool {
        matches!(
            self,
            Self::Write { .. }
                | Self::OrWrite { .. }
                | Self::WriteAndVerify { .. }
                | Self::Verify { compare: true, .. }
        )
    }

    /// The same command on the part of its blocks that begins at a byte of its
    /// data and is so many bytes long, where it takes such data.
    #[must_use]
    pub fn part(mut self, from: u32, length: u32) -> Self {
        if let Self::Write { range, .. }
        | Self::OrWrite { range, .. }
        | Self::WriteAndVerify { range, .. }
        | Self::Verify {
            range,
            compare: true,
        } = &mut self
        {
            range.lba.0 += u64::from(from) / BLOCK;
            range.blocks = u32::try_from(u64::from(length).div_ceil(BLOCK)).unwrap_or(u32::MAX);
        }
        self
    }

    /// Whether it changes what is stored, so that it is refused on what is
    /// write protected and counts as a sign of life.
    pub fn writes(&self) -> bool {
        matches!(
            self,
            Self::Write { .. }
                | Self::OrWrite { .. }
                | Self::WriteAndVerify { .. }
                | Self::WriteSame { .. }
                | Self::Unmap { .. }
                | Self::CompareAndWrite { .. }
        )
    }

    /// What it is to a persistent reservation.
    pub fn usage(&self) -> Use {
        match self {
            Self::Read { .. }
            | Self::Verify { .. }
            | Self::PreFetch { .. }
            | Self::GetLbaStatus { .. }
            | Self::ReportSupportedOpcodes { .. } => Use::Read,
            Self::SynchronizeCache | Self::ModeSense { .. } | Self::ModeSelect { .. } => Use::Write,
            command if command.writes() => Use::Write,
            _ => Use::Nothing,
        }
    }

    /// Whether it is answered whatever reserves or fences the unit (SPC-4,
    /// 5.9.1, table of allowed commands).
    pub fn always_allowed(&self) -> bool {
        matches!(
            self,
            Self::Inquiry { .. } | Self::ReportLuns { .. } | Self::RequestSense { .. }
        )
    }
}

fn word(cdb: &[u8; 16], at: usize) -> u32 {
    u32::from_be_bytes([cdb[at], cdb[at + 1], cdb[at + 2], cdb[at + 3]])
}

fn long_lba(cdb: &[u8; 16]) -> u64 {
    u64::from(word(cdb, 2)) << 32 | u64::from(word(cdb, 6))
}

/// The byte where a block command's count of blocks begins.
fn length_at(cdb: &[u8; 16]) -> u16 {
    match cdb[0] >> 5 {
        0 => 4,
        4 if cdb[0] == 0x89 => 13,
        4 => 10,
        5 => 6,
        _ => 7,
    }
}

/// A block command's blocks, all of which there are.
fn range(cdb: &[u8; 16], end: u64, most: u32) -> Result<Range, Sense> {
    let (lba, blocks) = match cdb[0] >> 5 {
        0 => {
            let lba = word(cdb, 0) & 0x1f_ffff;
            let blocks = if cdb[4] == 0 { 256 } else { cdb[4].into() };
            (lba.into(), blocks)
        }
        4 if cdb[0] == 0x89 => (long_lba(cdb), cdb[13].into()),
        4 => (long_lba(cdb), word(cdb, 10)),
        5 => (word(cdb, 2).into(), word(cdb, 6)),
        _ => {
            let blocks = u16::from_be_bytes([cdb[7], cdb[8]]);
            (word(cdb, 2).into(), blocks.into())
        }
    };
    if lba > end || u64::from(blocks) > end - lba {
        return Err(Sense::LBA_RANGE);
    }
    if blocks > most {
        return Err(Sense::cdb(length_at(cdb)));
    }
    Ok(Range {
        lba: Lba(lba),
        blocks,
    })
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;

//! Identify data structures and controller properties, as pages of bytes
//! (NVM Express Base Specification 2.0, 5.17; NVM Command Set 1.0, 4.1.5).

use uuid::Uuid;

use super::command::{
    COPY_RANGE, COPY_RANGES, COPY_TOTAL, MANAGED_BLOCKS, MANAGED_RANGES, MAX_TRANSFER, MAX_UNMOVED,
    NSID,
};
use super::wire::IN_CAPSULE;
use crate::block::BLOCK;
use crate::ids::Bytes;

/// The specification's version that is implemented: 1.4.
pub const VERSION: u32 = 0x0001_0400;
/// Entries in an I/O queue at most.
pub const QUEUE_ENTRIES: u16 = 128;
/// Asynchronous Event Requests that may be outstanding.
pub const EVENT_REQUESTS: u8 = 4;
/// CAP: 128 entries, contiguous queues, ready within 7.5 s, NVM command set.
pub const CAPABILITIES: u64 = (QUEUE_ENTRIES as u64 - 1) | 1 << 16 | 15 << 24 | 1 << 37;
/// The granularity of keep-alive timeouts, in units of 100 ms.
pub const KEEP_ALIVE_GRANULARITY: u16 = 10;
/// OAES and the event configuration: namespace attribute notices.
pub const NAMESPACE_NOTICES: u32 = 1 << 8;
/// OAES and the event configuration: discovery log page changes.
pub const DISCOVERY_NOTICES: u32 = 1 << 31;
/// RESCAP: all six types, keys as of version 1.3.
const RESERVATIONS: u8 = 0b1111_1110;

/// Commands that may be outstanding in all, as controllers must say (MAXCMD).
const MAX_COMMANDS: u16 = QUEUE_ENTRIES;
/// The largest namespace id.
const NAMESPACES: u32 = 1;

/// An Identify page.
pub type Page = [u8; 4096];

/// CNS 01: the controller.
pub fn controller(id: u16, subsystem: &str, namespace: Uuid) -> Page {
    let mut page = [0; 4096];
    let serial = &namespace.simple().to_string()[..20];
    put(&mut page, 4, serial.as_bytes());
    text(&mut page[24..64], "drover");
    text(&mut page[64..72], env!("CARGO_PKG_VERSION"));
    // CMIC, more than one controller: makes Linux build a multipath head, whose
    // I/O waits for the home's return instead of failing after five retries.
    page[76] = 1 << 1;
    page[77] = (MAX_TRANSFER / 4096).trailing_zeros() as u8;
    put(&mut page, 78, &id.to_le_bytes());
    put(&mut page, 80, &VERSION.to_le_bytes());
    put(&mut page, 92, &NAMESPACE_NOTICES.to_le_bytes());
    // CTRATT: 128-bit host identifiers; any command proves life (TBKAS).
    put(&mut page, 96, &(1u32 | 1 << 6).to_le_bytes());
    // CNTRLTYPE: I/O controller.
    page[111] = 1;
    page[258] = 3; // ACL
    page[259] = EVENT_REQUESTS - 1;
    page[260] = 0b11; // FRMW: one slot, read only
    page[261] = 0b110; // LPA: effects log, offsets
    put(&mut page, 266, &343u16.to_le_bytes()); // WCTEMP, CCTEMP in kelvin
    put(&mut page, 268, &353u16.to_le_bytes());
    put(&mut page, 320, &KEEP_ALIVE_GRANULARITY.to_le_bytes());
    page[512] = 0x66;
    page[513] = 0x44;
    put(&mut page, 514, &MAX_COMMANDS.to_le_bytes());
    put(&mut page, 516, &NAMESPACES.to_le_bytes());
    // ONCS: Compare, DSM, Write Zeroes, reservations, Verify, Copy.
    let commands = 1u16 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8;
    put(&mut page, 520, &commands.to_le_bytes());
    // VWC: present; a Flush of all namespaces is served.
    page[525] = 1 | 0b11 << 1;
    // OCFS: both formats of Copy's ranges.
    put(&mut page, 534, &0b11u16.to_le_bytes());
    // SGLS: supported, transport data blocks, offsets in capsules.
    put(&mut page, 536, &(1u32 | 1 << 20 | 1 << 21).to_le_bytes());
    put(&mut page, 540, &NAMESPACES.to_le_bytes());
    let subsystem = &subsystem.as_bytes()[..subsystem.len().min(223)];
    put(&mut page, 768, subsystem);
    put(&mut page, 1792, &((64 + IN_CAPSULE) / 16).to_le_bytes());
    put(&mut page, 1796, &1u32.to_le_bytes());
    page[1803] = 1; // MSDBD
    page
}

/// CNS 06: limits of the NVM command set (NVM Command Set 1.0, 4.1.5.4).
pub fn nvm_controller() -> Page {
    let mut page = [0; 4096];
    // VSL and WZSL: log2 of so many pages.
    page[..2].fill((MAX_UNMOVED / 4096).trailing_zeros() as u8);
    page[3] = MANAGED_RANGES; // DMRL
    put(&mut page, 4, &MANAGED_BLOCKS.to_le_bytes()); // DMRSL
    put(&mut page, 8, &u64::from(MANAGED_BLOCKS).to_le_bytes()); // DMSL
    page
}

/// CNS 00: the namespace; `persistent` is whether reservations may persist.
/// All zeroes once it is gone.
pub fn namespace(size: Bytes, uuid: Uuid, read_only: bool, persistent: bool) -> Page {
    let mut page = [0; 4096];
    let blocks = (size.0 / BLOCK).to_le_bytes();
    for at in [0, 8, 16] {
        put(&mut page, at, &blocks);
    }
    // NMIC: may be attached to several controllers (see CMIC above).
    page[30] = 1;
    page[31] = RESERVATIONS | u8::from(persistent);
    // DLFEAT: what is deallocated reads as zeroes, also by Write Zeroes.
    page[33] = 0b1001;
    page[99] = u8::from(read_only);
    // Copy: MSSRL, MCL, MSRC (0's based).
    put(&mut page, 74, &COPY_RANGE.to_le_bytes());
    put(&mut page, 76, &COPY_TOTAL.to_le_bytes());
    page[80] = (COPY_RANGES - 1) as u8;
    put(&mut page, 104, uuid.as_bytes());
    // The one LBA format: no metadata, 4096 bytes.
    page[130] = BLOCK.trailing_zeros() as u8;
    page
}

/// CNS 02 and the changed-namespace log: ids of namespaces above `above`.
pub fn namespace_list(above: u32, present: bool) -> Page {
    let mut page = [0; 4096];
    if present && above < NSID {
        put(&mut page, 0, &NSID.to_le_bytes());
    }
    page
}

/// CNS 03: the namespace's identifiers.
pub fn descriptors(uuid: Uuid) -> Page {
    let mut page = [0; 4096];
    for (at, kind) in [(0, 3), (20, 2)] {
        put(&mut page, at, &[kind, 16, 0, 0]);
        put(&mut page, at + 4, uuid.as_bytes());
    }
    // The command set: NVM.
    put(&mut page, 40, &[4, 1, 0, 0, 0]);
    page
}

fn put(page: &mut Page, at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Writes an ASCII field, which is filled with spaces.
pub fn text(field: &mut [u8], text: &str) {
    field.fill(b' ');
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text.as_bytes()[..length]);
}

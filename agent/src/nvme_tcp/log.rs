//! Log pages (NVM Express Base Specification 2.0, 5.16).

use super::admin::ADMIN_OPCODES;
use super::command::{FABRICS, IO_OPCODES, NSID};
use super::identify;
use super::reservation::Notice;

/// Error information: entries of 64 bytes.
pub const ERRORS: u8 = 0x01;
/// SMART / health information.
pub const HEALTH: u8 = 0x02;
/// Firmware slot information.
pub const FIRMWARE: u8 = 0x03;
/// Changed namespaces.
pub const CHANGED_NAMESPACES: u8 = 0x04;
/// Commands supported and effects.
pub const EFFECTS: u8 = 0x05;

/// Reservation notifications.
pub const RESERVATIONS: u8 = 0x80;

/// Log page 80h: the oldest notification, its number and how many there are
/// in all; zeroes when there is none.
pub fn reservations(notice: Option<(u64, Notice, usize)>) -> Vec<u8> {
    let mut page = vec![0; 64];
    if let Some((number, notice, all)) = notice {
        page[..8].copy_from_slice(&number.to_le_bytes());
        page[8] = notice as u8;
        page[9] = u8::try_from(all).unwrap_or(u8::MAX);
        page[12..16].copy_from_slice(&NSID.to_le_bytes());
    }
    page
}

/// A whole log page; none that is not kept. `changed` is whether the
/// namespace changed since its log was last read.
pub fn page(id: u8, changed: bool) -> Option<Vec<u8>> {
    match id {
        // One entry, all zeroes: no errors are kept.
        ERRORS => Some(vec![0; 64]),
        HEALTH => {
            let mut page = vec![0; 512];
            page[1..3].copy_from_slice(&300u16.to_le_bytes()); // kelvin
            page[3] = 100; // spare
            page[4] = 10; // its threshold
            Some(page)
        }
        FIRMWARE => {
            let mut page = vec![0; 512];
            page[0] = 1;
            let version = env!("CARGO_PKG_VERSION").as_bytes();
            page[8..16].fill(b' ');
            page[8..8 + version.len().min(8)].copy_from_slice(&version[..version.len().min(8)]);
            Some(page)
        }
        CHANGED_NAMESPACES => Some(identify::namespace_list(0, changed).to_vec()),
        EFFECTS => {
            let mut page = vec![0; 4096];
            let mut put = |at: usize, effects: u32| {
                page[at * 4..at * 4 + 4].copy_from_slice(&effects.to_le_bytes());
            };
            for opcode in ADMIN_OPCODES.into_iter().chain([FABRICS]) {
                put(opcode.into(), 1);
            }
            for (opcode, effects) in IO_OPCODES {
                put(256 + usize::from(opcode), effects);
            }
            Some(page)
        }
        _ => None,
    }
}

/// `length` bytes of a page from `offset` on, with zeroes behind its end.
/// None: the offset is beyond its end.
pub fn part(page: &[u8], offset: u64, length: u32) -> Option<Vec<u8>> {
    let offset = usize::try_from(offset).ok()?;
    let mut part = page.get(offset..)?.to_vec();
    part.resize(length as usize, 0);
    Some(part)
}

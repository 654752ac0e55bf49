//! What the unit says of itself: INQUIRY, READ CAPACITY, REPORT LUNS (SPC-4,
//! 6.6, 6.33 and 7.8; SBC-3, 5.15, 5.16 and 6.6).

use uuid::Uuid;

use super::command::{MAX_COMPARE, MAX_TRANSFER, MAX_WRITE_SAME};
use super::sense::Sense;
use crate::block::BLOCK;

/// Blocks that one UNMAP may give back, all its descriptors together.
pub const MAX_UNMAP: u32 = 1 << 20;
/// Descriptors in one UNMAP.
pub const MAX_UNMAP_DESCRIPTORS: u32 = 256;

/// SAM-5, iSCSI, SPC-4 and SBC-3, no versions claimed (SPC-4, table 147).
const VERSIONS: [u16; 4] = [0x00a0, 0x0960, 0x0460, 0x04c0];
const PAGES: [u8; 7] = [0x00, 0x80, 0x83, 0x86, 0xb0, 0xb1, 0xb2];

/// Who the unit is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Made for this export alone.
    pub uuid: Uuid,
    /// The target's IQN.
    pub target: String,
}

/// The answer to INQUIRY, whole: standard data, or a vital product data page.
///
/// # Errors
/// A page that there is not.
pub fn inquiry(identity: &Identity, page: Option<u8>) -> Result<Vec<u8>, Sense> {
    let body = match page {
        None => return Ok(standard(0)),
        Some(0x00) => PAGES.to_vec(),
        Some(0x80) => serial(identity).into_bytes(),
        Some(0x83) => designators(identity),
        Some(0x86) => extended(),
        Some(0xb0) => limits(),
        Some(0xb1) => characteristics(),
        // Unmap by UNMAP and both WRITE SAME, read as zeroes; thin.
        Some(0xb2) => vec![0, 0xe4, 0x02, 0],
        Some(_) => return Err(Sense::cdb(2)),
    };
    let length = u16::try_from(body.len()).unwrap_or_default().to_be_bytes();
    let mut data = vec![0, page.unwrap_or_default(), length[0], length[1]];
    data.extend(body);
    Ok(data)
}

/// Standard data of a LUN with nothing behind it.
pub fn absent() -> Vec<u8> {
    standard(0x7f)
}

fn standard(peripheral: u8) -> Vec<u8> {
    let mut data = vec![0; 96];
    data[0] = peripheral;
    data[2] = 0x06;
    // HISUP; response data format 2.
    data[3] = 0x12;
    data[4] = 91;
    // CMDQUE.
    data[7] = 0x02;
    data[8..16].copy_from_slice(b"DROVER  ");
    data[16..32].copy_from_slice(b"VOLUME          ");
    data[32..36].copy_from_slice(b"1   ");
    for (at, version) in VERSIONS.iter().enumerate() {
        data[58 + 2 * at..60 + 2 * at].copy_from_slice(&version.to_be_bytes());
    }
    data
}

fn serial(identity: &Identity) -> String {
    identity.uuid.simple().to_string()
}

/// SPC-4, 7.8.6. The unit is named by a locally assigned NAA and by vendor and
/// serial number, the port by its number and its iSCSI name.
fn designators(identity: &Identity) -> Vec<u8> {
    let mut data = Vec::new();
    let mut put = |code_set: u8, kind: u8, name: &[u8]| {
        let length = u8::try_from(name.len()).unwrap_or(u8::MAX);
        data.extend_from_slice(&[code_set, kind, 0, length]);
        data.extend_from_slice(&name[..length.into()]);
    };
    let mut naa = [0; 8];
    naa.copy_from_slice(&identity.uuid.as_bytes()[8..]);
    naa[0] = 0x30 | naa[0] & 0x0f;
    put(0x01, 0x03, &naa);
    put(
        0x02,
        0x01,
        format!("DROVER  {}", serial(identity)).as_bytes(),
    );
    put(0x51, 0x94, &[0, 0, 0, 1]);
    let mut port = format!("{},t,0x0001", identity.target).into_bytes();
    port.push(0);
    port.resize(port.len().next_multiple_of(4), 0);
    put(0x53, 0x98, &port);
    data
}

/// SPC-4, 7.8.7: simple and head of queue tasks, a volatile cache.
fn extended() -> Vec<u8> {
    let mut data = vec![0; 60];
    data[1] = 0x05;
    data[2] = 0x01;
    data
}

/// SBC-3, 6.6.4.
fn limits() -> Vec<u8> {
    let mut data = vec![0; 60];
    let mut put = |at: usize, word: u32| {
        data[at - 4..at].copy_from_slice(&word.to_be_bytes());
    };
    put(8, MAX_TRANSFER);
    put(12, 64);
    put(20, MAX_UNMAP);
    put(24, MAX_UNMAP_DESCRIPTORS);
    put(28, 1);
    put(40, MAX_WRITE_SAME);
    // WSNZ; granularity of transfers.
    data[0] = 0x01;
    data[1] = MAX_COMPARE;
    data[3] = 1;
    data
}

/// SBC-3, 6.6.3: no rotation.
fn characteristics() -> Vec<u8> {
    let mut data = vec![0; 60];
    data[1] = 1;
    data
}

/// READ CAPACITY (10): the last block, or that it does not fit.
pub fn capacity_10(blocks: u64) -> Vec<u8> {
    let last = u32::try_from(blocks.saturating_sub(1)).unwrap_or(u32::MAX);
    [last.to_be_bytes(), block_length()].concat()
}

/// READ CAPACITY (16): thin, reads as zeroes what was given back.
pub fn capacity_16(blocks: u64) -> Vec<u8> {
    let mut data = vec![0; 32];
    data[..8].copy_from_slice(&blocks.saturating_sub(1).to_be_bytes());
    data[8..12].copy_from_slice(&block_length());
    data[14] = 0xc0;
    data
}

/// REPORT LUNS: LUN 0, unless only well known ones are asked for.
pub fn luns(select: u8) -> Vec<u8> {
    if select == 1 {
        return vec![0; 8];
    }
    let mut data = vec![0; 16];
    data[3] = 8;
    data
}

fn block_length() -> [u8; 4] {
    u32::try_from(BLOCK).unwrap_or_default().to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            uuid: Uuid::from_bytes([0xab; 16]),
            target: "iqn.2026-11.io.drover:volume".into(),
        }
    }

    #[test]
    fn every_page_that_is_listed_can_be_read() {
        let list = inquiry(&identity(), Some(0)).unwrap();
        assert_eq!(list[4..], PAGES);
        assert!(PAGES.is_sorted());
        for page in PAGES {
            let data = inquiry(&identity(), Some(page)).unwrap();
            let length = u16::from_be_bytes([data[2], data[3]]);
            assert_eq!((data[1], usize::from(length)), (page, data.len() - 4));
        }
        assert_eq!(inquiry(&identity(), Some(0xb7)), Err(Sense::cdb(2)));
    }

    #[test]
    fn designators_fill_the_page_one_after_the_other() {
        let data = inquiry(&identity(), Some(0x83)).unwrap();
        let mut kinds = Vec::new();
        let mut at = 4;
        while at < data.len() {
            kinds.push(data[at + 1]);
            at += 4 + usize::from(data[at + 3]);
        }
        assert_eq!(at, data.len());
        assert_eq!(kinds, [0x03, 0x01, 0x94, 0x98]);
        assert_eq!(data[8] >> 4, 3, "NAA locally assigned");
    }

    #[test]
    fn what_says_that_space_is_given_back_agrees() {
        let provisioning = inquiry(&identity(), Some(0xb2)).unwrap();
        let limits = inquiry(&identity(), Some(0xb0)).unwrap();
        let thin = capacity_16(8)[14] == 0xc0;
        let unmaps = provisioning[5] & 0x80 != 0 && limits[20..24] != [0; 4];
        let zeroes = provisioning[5] & 0x04 != 0;
        assert!(thin && unmaps && zeroes);
    }

    #[test]
    fn a_size_beyond_32_bits_says_so() {
        assert_eq!(capacity_10(1 << 20), [0, 0x0f, 0xff, 0xff, 0, 0, 0x10, 0]);
        assert_eq!(capacity_10((1 << 32) + 1)[..4], [0xff; 4]);
        assert_eq!(capacity_16((1 << 32) + 1)[..8], [0, 0, 0, 1, 0, 0, 0, 0]);
    }
}

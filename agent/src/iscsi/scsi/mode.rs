//! Mode parameters: what can be asked and set (SPC-4, 6.11 to 6.14 and 7.5;
//! SBC-3, 6.5). Two pages: caching and control.
//!
//! The write cache is on and stays on. Settings end with a reset and are not
//! kept over a restart, and Linux does not read them again then: a host that
//! had switched the cache off would never flush what is in one again.

use super::sense::Sense;
use crate::block::BLOCK;

/// The settings that MODE SELECT changes. They are not kept over a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settings {
    /// Whether sense data comes in descriptor format (D_SENSE).
    pub descriptor_sense: bool,
    /// Whether writes are refused (SWP).
    pub write_protect: bool,
}

/// What MODE SENSE asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// The 10-byte command: its header is longer.
    pub ten: bool,
    /// Leave the block descriptor out.
    pub no_descriptor: bool,
    /// A long block descriptor may be sent.
    pub long_lba: bool,
    /// 0 current, 1 changeable, 2 default, 3 saved values.
    pub control: u8,
    /// The page; 3Fh: all.
    pub page: u8,
    /// The subpage; FFh: all.
    pub subpage: u8,
}

const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const ALL: u8 = 0x3f;

const CACHING_LENGTH: usize = 20;
const CONTROL_LENGTH: usize = 12;

/// The parameter data, whole.
///
/// # Errors
/// A page that there is not, or saved values: none are saved.
pub fn sense(
    asked: &Asked,
    settings: Settings,
    read_only: bool,
    blocks: u64,
) -> Result<Vec<u8>, Sense> {
    let pages: &[u8] = match (asked.page, asked.subpage) {
        (CACHING, 0) => &[CACHING],
        (CONTROL, 0) => &[CONTROL],
        (ALL, 0 | 0xff) => &[CACHING, CONTROL],
        (CACHING | CONTROL | ALL, _) => return Err(Sense::cdb(3)),
        _ => return Err(Sense::cdb(2)),
    };
    let shown = match asked.control {
        0 => settings,
        1 => CHANGEABLE,
        2 => Settings::default(),
        _ => return Err(Sense::SAVING),
    };
    // WP; DPOFUA.
    let device = 0x10
        | if read_only || settings.write_protect {
            0x80
        } else {
            0
        };
    let descriptor = match (asked.no_descriptor, asked.ten && asked.long_lba) {
        (true, _) => Vec::new(),
        (false, true) => {
            let mut long = blocks.to_be_bytes().to_vec();
            long.extend_from_slice(&[0; 4]);
            long.extend_from_slice(&block_length());
            long
        }
        (false, false) => {
            let short = u32::try_from(blocks).unwrap_or(u32::MAX);
            [short.to_be_bytes(), block_length()].concat()
        }
    };
    let length = u8::try_from(descriptor.len()).unwrap_or_default();
    let mut data = if asked.ten {
        let long = u8::from(length == 16);
        vec![0, 0, 0, device, long, 0, 0, length]
    } else {
        vec![0, 0, device, length]
    };
    data.extend(descriptor);
    for page in pages {
        if asked.control == 1 {
            data.extend(page_of(*page, shown, true));
        } else {
            data.extend(page_of(*page, shown, false));
        }
    }
    if asked.ten {
        let rest = u16::try_from(data.len() - 2).unwrap_or(u16::MAX);
        data[..2].copy_from_slice(&rest.to_be_bytes());
    } else {
        data[0] = u8::try_from(data.len() - 1).unwrap_or(u8::MAX);
    }
    Ok(data)
}

const CHANGEABLE: Settings = Settings {
    descriptor_sense: true,
    write_protect: true,
};

/// A page's bytes; `mask`: only what the settings are in it.
fn page_of(page: u8, settings: Settings, mask: bool) -> Vec<u8> {
    let bit = |set: bool, bit: u8| if set { bit } else { 0 };
    if page == CACHING {
        let mut data = vec![0; CACHING_LENGTH];
        data[..2].copy_from_slice(&[CACHING, 18]);
        // WCE.
        data[2] = if mask { 0 } else { 0x04 };
        return data;
    }
    let mut data = vec![0; CONTROL_LENGTH];
    data[..2].copy_from_slice(&[CONTROL, 10]);
    data[2] = bit(settings.descriptor_sense, 0x04);
    data[4] = bit(settings.write_protect, 0x08);
    if !mask {
        // Simple tasks in any order; no limit to being busy.
        data[3] = 0x10;
        data[8..10].copy_from_slice(&[0xff, 0xff]);
    }
    data
}

fn block_length() -> [u8; 4] {
    u32::try_from(BLOCK).unwrap_or_default().to_be_bytes()
}

/// The settings that follow a MODE SELECT parameter list.
///
/// # Errors
/// A list that is cut off, another block length, a page that there is not, a
/// change of what cannot be changed. Then nothing is changed.
pub fn select(list: &[u8], ten: bool, settings: Settings) -> Result<Settings, Sense> {
    if list.is_empty() {
        return Ok(settings);
    }
    let header = if ten { 8 } else { 4 };
    let descriptor = match (list.get(header - 1), ten) {
        (Some(low), true) => u16::from_be_bytes([list[6], *low]).into(),
        (Some(low), false) => usize::from(*low),
        (None, _) => return Err(Sense::LIST_LENGTH),
    };
    let mut at = header + descriptor;
    if list.len() < at {
        return Err(Sense::LIST_LENGTH);
    }
    match descriptor {
        0 => {}
        8 | 16 if list[at - 4] == 0 || descriptor == 16 => {
            let [.., a, b, c] = list[header..at] else {
                return Err(Sense::LIST_LENGTH);
            };
            if [0, a, b, c] != block_length() {
                return Err(wrong(at - 3));
            }
        }
        _ => return Err(wrong(header - 1)),
    }
    let mut next = settings;
    while at < list.len() {
        let page = list[at] & 0x7f;
        let length = match page {
            CACHING => CACHING_LENGTH,
            CONTROL => CONTROL_LENGTH,
            _ => return Err(wrong(at)),
        };
        let given = list.get(at..at + length).ok_or(Sense::LIST_LENGTH)?;
        let now = page_of(page, settings, false);
        let free = page_of(page, CHANGEABLE, true);
        for byte in 1..length {
            let fixed = if byte == 1 { 0xff } else { !free[byte] };
            if (given[byte] ^ now[byte]) & fixed != 0 {
                return Err(wrong(at + byte));
            }
        }
        if page == CONTROL {
            next.descriptor_sense = given[2] & 0x04 != 0;
            next.write_protect = given[4] & 0x08 != 0;
        }
        at += length;
    }
    Ok(next)
}

fn wrong(byte: usize) -> Sense {
    Sense::parameter(u16::try_from(byte).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn asked(page: u8, control: u8) -> Asked {
        Asked {
            ten: false,
            no_descriptor: true,
            long_lba: false,
            control,
            page,
            subpage: 0,
        }
    }

    fn data(asked: &Asked) -> Vec<u8> {
        sense(asked, Settings::default(), false, 1000).unwrap()
    }

    #[test]
    fn all_pages_are_the_pages_together() {
        let all = data(&asked(ALL, 0));
        let each = [data(&asked(CACHING, 0)), data(&asked(CONTROL, 0))];
        assert_eq!(all[4..], [&each[0][4..], &each[1][4..]].concat());
        assert_eq!(usize::from(all[0]), all.len() - 1);
        assert_eq!(all[2], 0x10, "DPOFUA, not write protected");
    }

    #[test]
    fn unknown_pages_and_saved_values_are_refused() {
        let refused = |asked| sense(&asked, Settings::default(), false, 1).unwrap_err();
        assert_eq!(refused(asked(0x1c, 0)), Sense::cdb(2));
        let subpage = Asked {
            subpage: 1,
            ..asked(CONTROL, 0)
        };
        assert_eq!(refused(subpage), Sense::cdb(3));
        assert_eq!(refused(asked(ALL, 3)), Sense::SAVING);
    }

    #[test]
    fn block_descriptors_say_the_size() {
        let short = Asked {
            no_descriptor: false,
            ..asked(CACHING, 0)
        };
        assert_eq!(data(&short)[3..12], [8, 0, 0, 3, 0xe8, 0, 0, 0x10, 0]);
        let long = Asked {
            ten: true,
            long_lba: true,
            ..short
        };
        let data = data(&long);
        assert_eq!((data[4], data[7], data.len()), (1, 16, 8 + 16 + 20));
        assert_eq!(data[8..16], 1000_u64.to_be_bytes());
    }

    #[test]
    fn what_is_read_back_and_changed_is_set() {
        for ten in [false, true] {
            let all = Asked {
                ten,
                no_descriptor: false,
                ..asked(ALL, 0)
            };
            let mut list = data(&all);
            let header = if ten { 8 } else { 4 };
            let pages = header + 8;
            assert_eq!(
                select(&list, ten, Settings::default()),
                Ok(Settings::default())
            );
            list[pages + 20 + 2] |= 0x04;
            list[pages + 20 + 4] |= 0x08;
            let wanted = Settings {
                descriptor_sense: true,
                write_protect: true,
            };
            assert_eq!(select(&list, ten, Settings::default()), Ok(wanted));
            list[pages + 20 + 3] ^= 0x10;
            let refused = select(&list, ten, Settings::default());
            let at = |byte: usize| Sense::parameter(u16::try_from(byte).unwrap());
            assert_eq!(refused, Err(at(pages + 23)));
            list[pages + 2] = 0;
            let refused = select(&list, ten, Settings::default());
            assert_eq!(refused, Err(at(pages + 2)), "the cache stays on");
        }
    }

    #[test]
    fn lists_that_are_cut_off_are_refused() {
        let list = data(&asked(ALL, 0));
        for length in 1..list.len() {
            let complete = length == 4 || length == 24;
            let taken = select(&list[..length], false, Settings::default());
            assert_eq!(taken.is_ok(), complete, "{length}");
        }
    }

    proptest! {
        #[test]
        fn any_list_is_taken_or_refused(list in prop::collection::vec(any::<u8>(), 0..80), ten: bool) {
            let _ = select(&list, ten, Settings::default());
        }
    }
}

//! CDBs, taken apart.

use proptest::prelude::*;

use super::super::opcodes::form;
use super::*;

const BLOCKS: u64 = 1000;

fn decode(bytes: &[u8]) -> Result<Command, Sense> {
    let mut cdb = [0; 16];
    cdb[..bytes.len()].copy_from_slice(bytes);
    Command::decode(form(&cdb)?, &cdb, BLOCKS)
}

proptest! {
    #[test]
    fn any_cdb_is_decoded_or_refused(cdb in prop::array::uniform16(any::<u8>()), known in 0..super::super::opcodes::FORMS.len()) {
        let mut likely = cdb;
        likely[0] = super::super::opcodes::FORMS[known].usage[0];
        for cdb in [cdb, likely] {
            let decoded = form(&cdb).and_then(|form| Command::decode(form, &cdb, BLOCKS));
            if let Ok(Command::Read { range, .. } | Command::Write { range, .. }) = decoded {
                prop_assert!(range.lba.0 + u64::from(range.blocks) <= BLOCKS);
                prop_assert!(range.blocks <= MAX_TRANSFER);
            }
        }
    }
}

#[test]
fn each_group_has_its_own_place_for_blocks() {
    let range = Range {
        lba: Lba(0x0102),
        blocks: 3,
    };
    let read = |fua| Command::Read { range, fua };
    let range_of = |bytes: &[u8]| {
        Command::decode(form(&whole(bytes)).unwrap(), &whole(bytes), 1 << 40).unwrap()
    };
    assert_eq!(range_of(&[0x08, 0, 1, 2, 3, 0]), read(false));
    assert_eq!(range_of(&[0x28, 0x18, 0, 0, 1, 2, 0, 0, 3, 0]), read(true));
    assert_eq!(
        range_of(&[0xa8, 0, 0, 0, 1, 2, 0, 0, 0, 3, 0, 0]),
        read(false)
    );
    assert_eq!(
        range_of(&[0x88, 0x08, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 3, 0, 0]),
        read(true)
    );
}

fn whole(bytes: &[u8]) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[..bytes.len()].copy_from_slice(bytes);
    cdb
}

#[test]
fn no_blocks_in_the_shortest_read_are_256() {
    let Ok(Command::Read { range, .. }) = decode(&[0x08, 0, 0, 0, 0, 0]) else {
        panic!("a read of 256 blocks fits the device");
    };
    assert_eq!(range.blocks, 256);
}

#[test]
fn blocks_beyond_the_end_are_refused_even_if_none() {
    let read = |lba: u32, blocks: u16| {
        let (lba, blocks) = (lba.to_be_bytes(), blocks.to_be_bytes());
        decode(&[
            0x28, 0, lba[0], lba[1], lba[2], lba[3], 0, blocks[0], blocks[1], 0,
        ])
    };
    assert!(read(1000, 0).is_ok());
    assert!(read(999, 1).is_ok());
    assert_eq!(read(1001, 0), Err(Sense::LBA_RANGE));
    assert_eq!(read(1000, 1), Err(Sense::LBA_RANGE));
    assert_eq!(read(u32::MAX, 1), Err(Sense::LBA_RANGE));
    assert_eq!(
        range_limit(),
        Err(Sense::cdb(7)),
        "more than the limits say"
    );
}

fn range_limit() -> Result<Command, Sense> {
    let cdb = whole(&[0x28, 0, 0, 0, 0, 0, 0, 0x10, 1, 0]);
    Command::decode(form(&cdb)?, &cdb, 1 << 40)
}

#[test]
fn write_same_of_nothing_is_refused() {
    assert_eq!(
        decode(&[0x41, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Err(Sense::cdb(7))
    );
    assert_eq!(
        decode(&[0x41, 0x10, 0, 0, 0, 0, 0, 0, 1, 0]),
        Err(Sense::cdb(1)),
        "anchors are not kept"
    );
}

#[test]
fn protection_information_is_not_asked_for() {
    for opcode in [0x28, 0x2a, 0x2e, 0x2f, 0x41] {
        let wrong = decode(&[opcode, 0x20, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(wrong, Err(Sense::cdb(1)), "{opcode:x}");
    }
}

#[test]
fn data_out_is_as_long_as_the_command_says() {
    let out = |bytes: &[u8]| decode(bytes).unwrap().data_out();
    assert_eq!(out(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 2, 0]), 8192);
    assert_eq!(out(&[0x2f, 0, 0, 0, 0, 0, 0, 0, 2, 0]), 0);
    assert_eq!(out(&[0x2f, 2, 0, 0, 0, 0, 0, 0, 2, 0]), 8192);
    assert_eq!(out(&[0x41, 0, 0, 0, 0, 0, 0, 0, 9, 0]), 4096);
    assert_eq!(
        out(&[0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]),
        16384
    );
    assert_eq!(out(&[0x93, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]), 0);
    assert_eq!(out(&[0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0]), 0);
}

#[test]
fn a_page_needs_its_bit() {
    assert_eq!(decode(&[0x12, 0, 0x80, 0, 255, 0]), Err(Sense::cdb(2)));
    assert_eq!(
        decode(&[0x12, 1, 0x80, 1, 0, 0]),
        Ok(Command::Inquiry {
            page: Some(0x80),
            allocation: 256
        })
    );
}

//! SCSI commands, from their CDB to their status.

use std::sync::atomic::Ordering;

use super::*;

#[test]
fn compare_and_write_writes_only_what_matches() {
    let mut one = Initiator::new(OPEN);
    let cdb = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0];
    let data = [vec![0; BLOCK_LENGTH], vec![4; BLOCK_LENGTH]].concat();
    assert_eq!(only(one.run(0x20, data.len(), &cdb, &data)).status(), 0);
    assert_eq!(one.stored(2 * BLOCK_LENGTH), 4);
    let missed = only(one.run(0x20, data.len(), &cdb, &data));
    assert_eq!(missed.sense(), (0xe, 0x1d, 0));
    let short = only(one.run(0x20, 4096, &cdb, &data[..4096]));
    assert_eq!(short.sense(), (5, 0x24, 0));
}

/// In a thread, so that a failure is one and no hang.
#[test]
fn compare_and_write_does_not_wait_for_reads_of_a_session_that_ended() {
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut one = Initiator::new(OPEN);
        one.line.hold(true);
        one.write(0, 1, &[7; BLOCK_LENGTH]);
        let cdb = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0];
        let data = [vec![0; BLOCK_LENGTH], vec![4; BLOCK_LENGTH]].concat();
        one.run(0x20, data.len(), &cdb, &data);
        // The device comes to it last, so whoever waits for it waits for ever.
        one.read(5, 1);
        assert_eq!(one.line.held(), 3);
        one.line.close();
        assert!(one.line.end().is_some());
        one.line.hold(false);
        one.nudge();
        let stored = [one.stored(0), one.stored(2 * BLOCK_LENGTH)];
        done.send(stored).unwrap();
    });
    assert_eq!(ended.recv_timeout(Duration::from_secs(20)), Ok([7, 4]));
}

#[test]
fn a_full_pool_and_a_failed_flush_have_senses_of_their_own() {
    use crate::block::DeviceError;
    let mut one = Initiator::new(OPEN);
    *one.device.failure.lock().unwrap() = Some(DeviceError::NoSpace);
    assert_eq!(only(one.write(0, 1, &[1; 4096])).sense(), (7, 0x27, 7));
    *one.device.failure.lock().unwrap() = Some(DeviceError::FlushFailed("gone".into()));
    let sync = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(only(one.run(0, 0, &sync, &[])).sense(), (4, 0x44, 0));
}

#[test]
fn a_lun_with_nothing_behind_it_answers_what_it_must() {
    let mut one = Initiator::new(OPEN);
    let mut at_lun_1 = |cdb: &[u8]| {
        let mut header = one.command(0xc0, 96, cdb);
        header[9] = 1;
        only(one.send(header, &[]))
    };
    let inquiry = at_lun_1(&[0x12, 0, 0, 0, 96, 0]);
    assert_eq!(inquiry.data[0], 0x7f);
    assert_eq!(at_lun_1(&[0; 6]).sense(), (5, 0x25, 0));
    let luns = at_lun_1(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 96, 0, 0]);
    assert_eq!(luns.data.len(), 16);
}

fn with_lba(opcode: u8, action: u8, lba: u64, word: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[1] = action;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&word.to_be_bytes());
    cdb
}

fn unmap_list(lba: u64, blocks: u32) -> Vec<u8> {
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend(lba.to_be_bytes());
    list.extend(blocks.to_be_bytes());
    list.extend([0; 4]);
    list
}

#[test]
fn get_lba_status_says_what_is_mapped() {
    let mut one = Initiator::new(OPEN);
    only(one.write(3, 2, &[7; 2 * BLOCK_LENGTH]));
    let mut ask = |lba, allocation: u32| {
        let cdb = with_lba(0x9e, 0x12, lba, allocation);
        only(one.run(0x40, allocation as usize, &cdb, &[]))
    };
    let told = |pdu: &Pdu| -> Vec<(u32, u32, u8)> {
        assert_eq!((pdu.status(), pdu.data[8..12].iter().max()), (0, Some(&0)));
        let words = |at: usize| u32::from_be_bytes(pdu.data[at..at + 4].try_into().unwrap());
        assert_eq!(words(0) as usize, pdu.data.len() - 4);
        let starts = (8..pdu.data.len()).step_by(16);
        starts
            .map(|at| (words(at + 4), words(at + 8), pdu.data[at + 12]))
            .collect()
    };
    let all = ask(0, 256);
    assert_eq!(told(&all), [(0, 3, 1), (3, 2, 0), (5, 1019, 1)]);
    assert_eq!(
        (all.header[1] & 6, all.word(44)),
        (2, 256 - 56),
        "underflow"
    );
    assert_eq!(told(&ask(4, 24)), [(4, 1, 0)]);
    assert_eq!(told(&ask(1023, 24)), [(1023, 1, 1)]);
    for lba in [1024, 1025, 1 << 63, u64::MAX] {
        assert_eq!(ask(lba, 24).sense(), (5, 0x21, 0), "{lba}");
    }
    assert_eq!(ask(0, 0).status(), 0);
    assert_eq!(ask(0, 12).data.len(), 12);
    let list = unmap_list(3, 2);
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    assert_eq!(only(one.run(0x20, 24, &unmap, &list)).status(), 0);
    let cdb = with_lba(0x9e, 0x12, 0, 256);
    assert_eq!(told(&only(one.run(0x40, 256, &cdb, &[]))), [(0, 1024, 1)]);
    *one.device.failure.lock().unwrap() = Some(crate::block::DeviceError::NoSpace);
    assert_eq!(
        only(one.run(0x40, 256, &cdb, &[])).sense().0,
        7,
        "and no data"
    );
}

#[test]
fn orwrite_sets_bits_in_every_part_of_it() {
    let mut one = Initiator::new(OPEN);
    let blocks = 130_u8;
    let length = usize::from(blocks) * BLOCK_LENGTH;
    one.device.bytes.lock().unwrap()[..length].fill(0x50);
    let cdb = with_lba(0x8b, 0, 0, blocks.into());
    let mut asked = only(one.run(0x20, length, &cdb, &[3; 4096]));
    while asked.opcode() == 0x31 {
        let (transfer, offset, length) = (asked.word(20), asked.word(40), asked.word(44));
        let data = vec![3; length as usize];
        asked = only(one.data_out(true, transfer, 0, offset as usize, &data));
    }
    assert_eq!(asked.status(), 0);
    assert!(
        one.device.bytes.lock().unwrap()[..length]
            .iter()
            .all(|byte| *byte == 0x53)
    );
    assert_eq!(one.stored(length), 0);
    let with_fua = with_lba(0x8b, 0x08, 200, 1);
    assert_eq!(only(one.run(0x20, 4096, &with_fua, &[1; 4096])).status(), 0);
    assert_eq!(one.device.flushes.lock().unwrap().1, 1);
    let short = only(one.run(0x20, 200, &with_lba(0x8b, 0, 0, 1), &[0x80; 200]));
    assert_eq!(
        (short.status(), short.header[1] & 6, short.word(44)),
        (0, 4, 3896)
    );
    assert_eq!(
        [one.stored(199), one.stored(200)],
        [0xd3, 0x53],
        "the rest stays"
    );
    let protected = only(one.run(0x20, 4096, &with_lba(0x8b, 0x20, 0, 1), &[1; 4096]));
    assert_eq!(protected.sense(), (5, 0x24, 0));
    let beyond = only(one.run(0x20, 4096, &with_lba(0x8b, 0, 1024, 1), &[1; 4096]));
    assert_eq!(beyond.sense(), (5, 0x21, 0));
}

#[test]
fn write_same_takes_one_block_and_fills_all_of_them() {
    let mut one = Initiator::new(OPEN);
    let ten = [0x41, 0, 0, 0, 0, 2, 0, 0, 3, 0];
    assert_eq!(only(one.run(0x20, 4096, &ten, &[9; 4096])).status(), 0);
    assert_eq!(
        [8191, 8192, 5 * 4096 - 1, 5 * 4096].map(|at| one.stored(at)),
        [0, 9, 9, 0]
    );
    let two = only(one.run(0x20, 8192, &ten, &[8; 8192]));
    assert_eq!(
        (two.sense(), two.header[1] & 6, two.word(44)),
        ((5, 0xe, 3), 2, 4096)
    );
    let short = only(one.run(0x20, 200, &ten, &[8; 200]));
    assert_eq!(
        (short.sense(), short.header[1] & 6, short.word(44)),
        ((5, 0xe, 3), 4, 3896)
    );
    let anchored = with_lba(0x93, 0x18, 2, 3);
    assert_eq!(
        only(one.run(0x20, 4096, &anchored, &[0; 4096])).sense(),
        (5, 0x24, 0)
    );
    assert_eq!(one.stored(8192), 9, "nothing of those was done");
    let without_data = with_lba(0x93, 0x09, 2, 1);
    assert_eq!(only(one.run(0, 0, &without_data, &[])).status(), 0);
    assert_eq!([one.stored(8192), one.stored(3 * 4096)], [0, 9]);
    // A block that is not zero is written, unmapping or not.
    let unmapping = with_lba(0x93, 0x08, 2, 1);
    assert_eq!(
        only(one.run(0x20, 4096, &unmapping, &[4; 4096])).status(),
        0
    );
    assert_eq!(one.stored(8192), 4);
}

#[test]
fn verify_compares_or_reads() {
    let mut one = Initiator::new(OPEN);
    only(one.write(0, 1, &[5; 4096]));
    let verify = |compare: u8| [0x2f, compare, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(
        only(one.run(0x20, 4096, &verify(2), &[5; 4096])).status(),
        0
    );
    let mut other = [5; 4096];
    other[77] = 6;
    let missed = only(one.run(0x20, 4096, &verify(2), &other));
    assert_eq!(missed.sense(), (0xe, 0x1d, 0));
    assert_eq!(
        missed.data[2..9],
        [0xf0, 0, 0xe, 0, 0, 0, 77],
        "where it differs"
    );
    assert_eq!(only(one.run(0, 0, &verify(0), &[])).status(), 0);
    assert_eq!(
        only(one.run(0x20, 4096, &verify(6), &[5; 4096])).sense(),
        (5, 0x24, 0)
    );
    let both = [0x2e, 2, 0, 0, 0, 1, 0, 0, 1, 0];
    assert_eq!(only(one.run(0x20, 4096, &both, &[8; 4096])).status(), 0);
    assert_eq!(
        (one.stored(4096), one.device.flushes.lock().unwrap().1),
        (8, 1)
    );
    one.device.unreadable.store(true, Ordering::Relaxed);
    let unread = only(one.run(0, 0, &verify(0), &[]));
    assert_eq!(unread.sense(), (3, 0x11, 0), "it was read");
    // No data, and the whole of what one command may name; beyond it is refused.
    let most = |high| [0x2f, 0, 0, 0, 0, 0, 0, high, 1, 0];
    one.device.unreadable.store(false, Ordering::Relaxed);
    let mut bytes = one.device.bytes.lock().unwrap();
    bytes.resize(5000 * BLOCK_LENGTH, 0);
    drop(bytes);
    assert_eq!(only(one.run(0, 0, &most(15), &[])).status(), 0);
    assert_eq!(only(one.run(0, 0, &most(16), &[])).sense(), (5, 0x24, 0));
}

#[test]
fn what_needs_no_blocks_is_answered() {
    let mut one = Initiator::new(OPEN);
    let prefetch = [0x34, 2, 0, 0, 0, 0, 0, 0, 9, 0];
    assert_eq!(
        only(one.run(0, 0, &prefetch, &[])).status(),
        0,
        "not CONDITION MET"
    );
    for allocation in [0_u8, 1, 15, 16, 32] {
        let cdb = with_lba(0x9e, 0x10, 0, allocation.into());
        let pdu = only(one.run(0x40, allocation.into(), &cdb, &[]));
        assert_eq!((pdu.status(), pdu.data.len()), (0, allocation.into()));
        assert!(
            allocation < 15 || pdu.data[12..14] == [0, 0],
            "no PI, a block is a block"
        );
    }
    let start = |byte| [0x1b, 0, 0, 0, byte, 0];
    assert_eq!(only(one.run(0, 0, &start(1), &[])).status(), 0);
    assert_eq!(only(one.run(0, 0, &start(0), &[])).sense(), (5, 0x24, 0));
    assert_eq!(
        only(one.run(0, 0, &[0xc1, 0, 0, 0, 0, 0], &[])).sense(),
        (5, 0x20, 0)
    );
    assert_eq!(
        only(one.run(0, 0, &[0x1e, 0, 0, 0, 1, 0], &[])).sense(),
        (5, 0x20, 0)
    );
    assert_eq!(
        only(one.run(0, 0, &[0, 0, 0, 0, 0, 4], &[])).sense(),
        (5, 0x24, 0),
        "NACA"
    );
    let nothing = [0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(only(one.run(0, 0, &nothing, &[])).status(), 0);
    let at_the_end = unmap_list(1024, 0);
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    assert_eq!(only(one.run(0x20, 24, &unmap, &at_the_end)).status(), 0);
}

/// MODE SELECT of the control page.
fn select(one: &mut Initiator, descriptor_sense: bool, write_protect: bool) -> Pdu {
    let mut list = vec![0; 16];
    list[4..6].copy_from_slice(&[0x0a, 10]);
    list[6] = if descriptor_sense { 4 } else { 0 };
    list[7] = 0x10;
    list[8] = if write_protect { 8 } else { 0 };
    list[12..14].copy_from_slice(&[0xff, 0xff]);
    only(one.run(0x20, 16, &[0x15, 0x10, 0, 0, 16, 0], &list))
}

#[test]
fn mode_parameters_are_in_force_and_the_other_path_is_told() {
    let mut one = Initiator::new(OPEN);
    let mut two = one.second(2);
    assert_eq!(select(&mut one, true, true).status(), 0);
    let refused = only(one.write(0, 1, &[1; 4096]));
    assert_eq!((refused.data[2], refused.sense()), (0x72, (7, 0x27, 2)));
    let header = |pdu: Pdu| pdu.data[2] & 0x90;
    let sense = [0x1a, 0, 0x0a, 0, 64, 0];
    assert_eq!(
        header(only(one.run(0x40, 64, &sense, &[]))),
        0x90,
        "WP, DPOFUA"
    );
    assert_eq!(only(two.ready()).sense(), (6, 0x2a, 1));
    assert_eq!(only(two.ready()).status(), 0);
    assert_eq!(only(one.ready()).status(), 0, "who changed them knows");
    assert_eq!(select(&mut one, false, false).status(), 0);
    assert_eq!(only(one.write(0, 1, &[1; 4096])).status(), 0);
    let unknown = only(one.run(0x40, 64, &[0x1a, 0, 0x0a, 1, 64, 0], &[]));
    assert_eq!((unknown.data[2], unknown.sense()), (0x70, (5, 0x24, 0)));
    let cut = only(one.run(0x20, 15, &[0x15, 0x10, 0, 0, 15, 0], &[0; 15]));
    assert_eq!(cut.sense().0, 5);
}

#[test]
fn a_read_only_unit_is_read() {
    let device = MemoryDevice::new(16);
    let served = Arc::clone(&device) as Arc<dyn crate::block::BlockDevice>;
    let target = target_of(unit(served, true), None, None, 1);
    let mut one = Initiator::of(&target, &device, 1);
    one.begin(OPEN);
    assert_eq!(only(one.read(0, 1)).status(), 0);
    let orwrite = with_lba(0x8b, 0, 0, 1);
    let same = with_lba(0x93, 0, 0, 1);
    let compare = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
    for (cdb, length) in [(orwrite, 4096), (same, 4096), (compare, 8192)] {
        let refused = only(one.run(0x20, length, &cdb, &vec![1; length]));
        assert_eq!(refused.sense(), (7, 0x27, 1), "{cdb:x?}");
    }
    assert_eq!(only(one.write(0, 1, &[1; 4096])).sense(), (7, 0x27, 1));
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    assert_eq!(
        only(one.run(0x20, 24, &unmap, &unmap_list(0, 1))).sense(),
        (7, 0x27, 1)
    );
    assert_eq!(one.stored(0), 0);
}

#[test]
fn a_unit_attention_waits_for_a_command_that_may_tell_it() {
    let mut one = Initiator::new(OPEN);
    one.target.unit().reset();
    let inquiry = only(one.run(0x40, 96, &[0x12, 0, 0, 0, 96, 0], &[]));
    assert_eq!(inquiry.status(), 0);
    let luns = only(one.run(0x40, 16, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], &[]));
    assert_eq!(luns.status(), 0);
    // Ahead of what is wrong with the command itself.
    assert_eq!(
        only(one.run(0, 0, &[0xc1, 0, 0, 0, 0, 0], &[])).sense(),
        (6, 0x29, 3)
    );
    one.target.unit().reset();
    let sense = only(one.run(0x40, 252, &[0x03, 1, 0, 0, 252, 0], &[]));
    assert_eq!(
        (sense.status(), &sense.data[..4]),
        (0, &[0x72, 6, 0x29, 3][..])
    );
    let none = only(one.run(0x40, 252, &[0x03, 0, 0, 0, 252, 0], &[]));
    assert_eq!((none.data.len(), none.data[2], none.data[12]), (18, 0, 0));
}

#[test]
fn task_attributes_that_are_not_kept_are_refused() {
    let mut one = Initiator::new(OPEN);
    for (attribute, taken) in [(0, true), (1, true), (2, false), (3, true), (4, false)] {
        let mut header = one.command(0x80, 0, &[0; 6]);
        header[1] = 0x80 | attribute;
        let pdu = only(one.send(header, &[]));
        if taken {
            assert_eq!(pdu.status(), 0);
        } else {
            assert_eq!(pdu.sense(), (5, 0x49, 0));
        }
    }
}

#[test]
fn a_parameter_list_is_no_longer_than_it_may_be() {
    let mut one = Initiator::new(OPEN);
    let mut out = [0x5f, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0];
    let huge = only(one.run(0x20, u32::MAX as usize, &out, &[0; 24]));
    assert_eq!(huge.sense(), (5, 0x1a, 0));
    out[5..9].copy_from_slice(&[0, 0, 0, 24]);
    assert_eq!(
        only(one.run(0x20, 23, &out, &[0; 23])).sense(),
        (5, 0x1a, 0)
    );
    let mut list = vec![0; 8 + 16 * 257];
    let length = u16::try_from(list.len() - 8).unwrap().to_be_bytes();
    list[2..4].copy_from_slice(&length);
    let [high, low] = u16::try_from(list.len()).unwrap().to_be_bytes();
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, high, low, 0];
    assert_eq!(
        only(one.run(0x20, list.len(), &unmap, &list)).sense(),
        (5, 0x26, 0)
    );
}

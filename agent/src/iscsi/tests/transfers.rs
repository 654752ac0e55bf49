//! Data, in both directions.

use super::*;

#[test]
fn what_is_written_is_read_with_and_without_digests() {
    for digests in [
        &[][..],
        &[("HeaderDigest", "CRC32C"), ("DataDigest", "CRC32C")],
    ] {
        let mut one = Initiator::new(&[OPEN, digests].concat());
        let data = [0xab; 2 * BLOCK_LENGTH];
        assert_eq!(only(one.write(3, 2, &data)).status(), 0);
        let pdu = only(one.read(3, 2));
        assert_eq!((pdu.header[1], pdu.status()), (0x81, 0), "F and S");
        assert_eq!(pdu.data, data);
    }
}

#[test]
fn reads_are_cut_to_what_the_initiator_takes() {
    let mut one = Initiator::new(&[("MaxRecvDataSegmentLength", "5000")]);
    one.device.bytes.lock().unwrap()[..BLOCK_LENGTH].fill(1);
    let pdus = one.read(0, 3);
    let shape: Vec<_> = pdus
        .iter()
        .map(|pdu| (pdu.header[1], pdu.word(36), pdu.word(40), pdu.data.len()))
        .collect();
    assert_eq!(
        shape,
        [
            (0, 0, 0, 5000),
            (0, 1, 5000, 5000),
            (0x81, 2, 10_000, 3 * BLOCK_LENGTH - 10_000)
        ]
    );
    assert_eq!((pdus[0].data[4095], pdus[0].data[4096]), (1, 0));
}

#[test]
fn a_long_read_ends_its_bursts() {
    let mut one = Initiator::new(OPEN);
    let pdus = one.read(0, 130);
    assert_eq!(pdus.len(), 3);
    let flags: Vec<_> = pdus.iter().map(|pdu| pdu.header[1]).collect();
    assert_eq!(flags, [0x80, 0x80, 0x81]);
    let total: usize = pdus.iter().map(|pdu| pdu.data.len()).sum();
    assert_eq!(total, 130 * BLOCK_LENGTH);
}

#[test]
fn data_is_asked_for_where_it_may_not_come_by_itself() {
    let mut one = Initiator::new(SUPPRESSED);
    let asked = only(one.write(0, 2, &[]));
    assert_eq!(
        (asked.opcode(), asked.word(40), asked.word(44)),
        (0x31, 0, 8192)
    );
    let transfer = asked.word(20);
    assert!(one.data_out(false, transfer, 0, 0, &[1; 5000]).is_empty());
    let end = only(one.data_out(true, transfer, 1, 5000, &[2; 3192]));
    assert_eq!((end.status(), end.word(36)), (0, 1), "one R2T");
    assert_eq!((one.stored(4999), one.stored(5000)), (1, 2));
    let early = one.write(0, 1, &[1; BLOCK_LENGTH]);
    assert_eq!(
        (early[0].opcode(), early[0].header[2]),
        (0x3f, 4),
        "rejected"
    );
    assert!(one.line.end().is_some());
}

#[test]
fn a_long_write_is_asked_for_in_bursts() {
    let mut one = Initiator::new(OPEN);
    let blocks = 130;
    let mut asked = only(one.write(0, blocks, &[3; 4096]));
    let mut spans = Vec::new();
    let end = loop {
        let (transfer, offset, length) = (asked.word(20), asked.word(40), asked.word(44));
        spans.push((offset, length));
        let data = vec![3; length as usize];
        let next = only(one.data_out(true, transfer, 0, offset as usize, &data));
        if next.opcode() == 0x21 {
            break next;
        }
        asked = next;
    };
    assert_eq!(end.status(), 0);
    assert_eq!(spans[0], (4096, 262_144 - 4096));
    assert_eq!(spans[1], (262_144, 262_144));
    assert_eq!(spans[2], (524_288, 8192));
    let stored = one.device.bytes.lock().unwrap();
    let end = usize::from(blocks) * BLOCK_LENGTH;
    assert!(stored[..end].iter().all(|byte| *byte == 3) && stored[end] == 0);
}

#[test]
fn unsolicited_data_follows_its_command() {
    let mut one = Initiator::new(OPEN);
    let header = one.command(0x20, 3 * BLOCK_LENGTH, &write_cdb(0, 3));
    assert!(one.send(header, &[1; BLOCK_LENGTH]).is_empty());
    assert!(one.data_out(false, NO_TAG, 0, 4096, &[2; 4096]).is_empty());
    let end = only(one.data_out(true, NO_TAG, 1, 8192, &[3; 4096]));
    assert_eq!(end.status(), 0);
    assert_eq!([0, 4096, 8192].map(|at| one.stored(at)), [1, 2, 3]);
}

#[test]
fn data_out_of_order_ends_its_command_and_is_not_written() {
    let cases = [(27, 0, 4096), (0, 512, 4096), (0, 0, 4096 * 3)];
    for (number, offset, length) in cases {
        let mut one = Initiator::new(OPEN);
        let header = one.command(0x20, 2 * BLOCK_LENGTH, &write_cdb(0, 2));
        assert!(one.send(header, &[]).is_empty());
        let pdus = one.data_out(true, NO_TAG, number, offset, &vec![7; length]);
        assert_eq!((pdus[0].opcode(), pdus[0].header[2]), (0x3f, 4));
        assert_eq!(pdus[1].sense().0, 0xb);
        assert!(one.data_out(true, NO_TAG, 0, 0, &[7; 8192]).is_empty());
        assert_eq!(only(one.ready()).status(), 0);
        assert_eq!(one.stored(0), 0);
    }
}

#[test]
fn residuals_say_what_was_not_transferred() {
    let mut one = Initiator::new(OPEN);
    for (expected, sent, flag, count) in [
        (0, 0, 4, 4096),
        (200, 200, 4, 3896),
        (10_000, 4096, 2, 5904),
        (4096, 4096, 0, 0),
    ] {
        let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        let pdu = only(one.run(0x40, expected, &read, &[]));
        assert_eq!((pdu.status(), pdu.data.len()), (0, sent), "{expected}");
        assert_eq!((pdu.header[1] & 6, pdu.word(44)), (flag, count));
        let data = vec![9; expected];
        let pdu = only(one.run(0x20, expected, &write_cdb(8, 1), &data));
        assert_eq!(pdu.status(), 0);
        assert_eq!((pdu.header[1] & 6, pdu.word(44)), (flag, count));
    }
    one.device.bytes.lock().unwrap()[..BLOCK_LENGTH].fill(1);
    only(one.run(0x20, 200, &write_cdb(0, 1), &[5; 200]));
    assert_eq!((one.stored(199), one.stored(200)), (5, 1), "the rest stays");
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    for (flags, data) in [(0x20, &[0; BLOCK_LENGTH][..]), (0, &[])] {
        let pdu = only(one.run(flags, BLOCK_LENGTH, &read, data));
        assert_eq!((pdu.status(), pdu.data.len()), (0, 0), "a read is no write");
    }
}

#[test]
fn data_that_goes_another_way_than_its_command_is_refused() {
    let mut one = Initiator::new(OPEN);
    only(one.write(0, 1, &[7; BLOCK_LENGTH]));
    let write_same = [0x93, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
    let compare = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
    for (flags, length, cdb) in [
        (0, BLOCK_LENGTH, &write_cdb(0, 1)[..]),
        (0x40, BLOCK_LENGTH, &write_cdb(0, 1)),
        (0, BLOCK_LENGTH, &write_same),
        (0, 2 * BLOCK_LENGTH, &compare),
    ] {
        let pdu = only(one.run(flags, length, cdb, &[]));
        assert_eq!(pdu.status(), 2, "{flags:x} {cdb:x?}");
        assert_eq!(pdu.sense(), (5, 0x0e, 3), "{flags:x} {cdb:x?}");
        assert_eq!(one.stored(0), 7, "{flags:x} {cdb:x?}");
    }
}

#[test]
fn commands_that_wait_for_memory_do_not_stop_the_stream() {
    let mut one = Initiator::new(OPEN);
    // Each asks for 256 KiB: the budget is for four of them.
    let mut asked = Vec::new();
    let mut tags = Vec::new();
    for lba in 0..6 {
        asked.extend(one.write(lba * 10, 64, &[lba + 1; 4096]));
        tags.push(one.tag);
    }
    assert_eq!(asked.len(), 4);
    let mut ends = 0;
    while let Some(pdu) = asked.pop() {
        if pdu.opcode() == 0x21 {
            assert_eq!(pdu.status(), 0);
            ends += 1;
            continue;
        }
        one.tag = pdu.word(16);
        let fill = u8::try_from(tags.iter().position(|tag| *tag == one.tag).unwrap()).unwrap() + 1;
        let (offset, length) = (pdu.word(40) as usize, pdu.word(44) as usize);
        let more = one.data_out(true, pdu.word(20), 0, offset, &vec![fill; length]);
        assert!(!more.is_empty(), "{:?} {pdu:?}", one.line.end());
        asked.extend(more);
    }
    assert_eq!(ends, 6);
    assert_eq!(one.stored(113 * BLOCK_LENGTH), 6, "no other reaches so far");
    assert_eq!(one.stored(0), 1, "what was put aside was not lost");
}

#[test]
fn any_cut_of_the_stream_is_the_same_stream() {
    for cut in [1, 7, 47, 48, 49, 1000] {
        let mut one = Initiator::new(OPEN);
        let header = one.command(0xa0, 4096, &write_cdb(1, 1));
        let mut bytes = one.bytes(header, &[6; 4096]);
        let header = one.command(0xc0, 4096, &[0x28, 0, 0, 0, 0, 1, 0, 0, 1, 0]);
        bytes.extend(one.bytes(header, &[]));
        let mut said = Vec::new();
        for some in bytes.chunks(cut) {
            said.extend(one.line.send(some));
        }
        let pdus = one.take(said);
        assert_eq!(pdus.len(), 2, "{cut}");
        assert_eq!(pdus[1].data, [6; 4096]);
    }
}

#[test]
fn bursts_are_as_long_as_was_agreed() {
    let keys = [("MaxBurstLength", "8192"), ("FirstBurstLength", "4096")];
    let mut one = Initiator::new(&[OPEN, &keys].concat());
    let over = one.run(0x20, 8192, &write_cdb(0, 2), &[1; 4100]);
    assert_eq!(
        only(over).reject(),
        4,
        "immediate data beyond FirstBurstLength"
    );
    let mut one = Initiator::new(&[OPEN, &keys].concat());
    let header = one.command(0x20, 8192, &write_cdb(0, 2));
    assert!(one.send(header, &[1; 4000]).is_empty());
    let over = one.data_out(true, NO_TAG, 0, 4000, &[1; 100]);
    assert_eq!(
        over[0].reject(),
        4,
        "unsolicited data beyond it, all together"
    );
    assert_eq!(over[1].sense(), (0xb, 0x0c, 0x0c));
    let mut asked = only(one.run(0x20, 5 * BLOCK_LENGTH, &write_cdb(0, 5), &[]));
    let mut numbers = Vec::new();
    while asked.opcode() == 0x31 {
        numbers.push((asked.word(36), asked.word(40), asked.word(44)));
        let data = vec![1; asked.word(44) as usize];
        asked = only(one.data_out(true, asked.word(20), 0, asked.word(40) as usize, &data));
    }
    assert_eq!(numbers, [(0, 0, 8192), (1, 8192, 8192), (2, 16_384, 4096)]);
    let pdus = one.read(0, 5);
    let ends: Vec<_> = pdus
        .iter()
        .map(|pdu| (pdu.header[1], pdu.data.len()))
        .collect();
    assert_eq!(ends, [(0x80, 8192), (0x80, 8192), (0x81, 4096)]);
}

#[test]
fn asked_data_ends_where_it_was_asked_to() {
    for (last, length) in [(true, 4096), (false, 8192), (true, 8196)] {
        let mut one = Initiator::new(SUPPRESSED);
        let asked = only(one.write(0, 2, &[]));
        let transfer = asked.word(20);
        let mut said = one.data_out(last, transfer, 0, 0, &vec![1; length]);
        if !last {
            // It believes that there is more to come, and is heard to its end.
            assert!(one.data_out(false, transfer, 1, 8192, &[1; 512]).is_empty());
            said.extend(one.data_out(true, transfer, 2, 8704, &[1; 512]));
        }
        assert_eq!(
            (said[0].reject(), said[1].sense().0),
            (4, 0xb),
            "{last} {length}"
        );
        assert_eq!(said.len(), 2);
        assert_eq!(only(one.ready()).status(), 0);
        assert_eq!(one.stored(0), 0);
    }
    // Who never comes to the end loses its connection.
    let mut one = Initiator::new(SUPPRESSED);
    let asked = only(one.write(0, 2, &[]));
    assert_eq!(
        only(one.data_out(false, asked.word(20), 1, 0, &[1; 512])).reject(),
        4
    );
    one.line.wait(Duration::from_secs(61));
    assert!(matches!(one.line.end(), Some(End::Late(_))));
    // Of a transfer that nobody asked for: as of a command that was aborted.
    let mut one = Initiator::new(SUPPRESSED);
    let asked = only(one.write(0, 1, &[]));
    assert!(
        one.data_out(true, asked.word(20) ^ 0x10000, 0, 0, &[1; 4096])
            .is_empty()
    );
    let end = only(one.data_out(true, asked.word(20), 0, 0, &[2; 4096]));
    assert_eq!((end.status(), one.stored(0)), (0, 2));
}

#[test]
fn announced_data_that_never_comes_is_overdue() {
    let mut one = Initiator::new(OPEN);
    let header = one.command(0x20, 3 * BLOCK_LENGTH, &write_cdb(0, 3));
    assert!(one.send(header, &[1; 4096]).is_empty());
    let said = one.line.wait(Duration::from_secs(31));
    let asked = only(one.take(said));
    let mut pong = one.pdu(0x40, 0x80);
    pong[16..20].fill(0xff);
    pong[20..24].copy_from_slice(&asked.word(20).to_be_bytes());
    assert!(one.send(pong, &[]).is_empty());
    assert!(one.line.end().is_none());
    one.line.wait(Duration::from_secs(30));
    assert_eq!(one.line.end(), Some(&End::Late("the data of a command")));
}

#[test]
fn data_for_a_command_that_takes_none_is_read_over() {
    let mut one = Initiator::new(OPEN);
    for held in [true, false] {
        one.line.hold(held);
        let flush = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let header = one.command(0x20, BLOCK_LENGTH, &flush);
        let mut said = one.send(header, &[]);
        said.extend(one.data_out(true, NO_TAG, 0, 0, &[1; 4096]));
        one.line.hold(false);
        said.extend(one.nudge());
        let end = only(said);
        assert_eq!((end.status(), end.word(44)), (0, 4096), "{held}");
    }
    assert_eq!(only(one.ready()).status(), 0);
}

#[test]
fn more_is_read_over_than_a_command_takes() {
    let mut one = Initiator::new(OPEN);
    let header = one.command(0x20, 3 * BLOCK_LENGTH, &write_cdb(0, 1));
    assert!(one.send(header, &[1; 4096]).is_empty());
    let end = only(one.data_out(true, NO_TAG, 0, 4096, &[2; 8192]));
    assert_eq!(
        (end.status(), end.header[1] & 6, end.word(44)),
        (0, 2, 8192)
    );
    assert_eq!((one.stored(4095), one.stored(4096)), (1, 0));
}

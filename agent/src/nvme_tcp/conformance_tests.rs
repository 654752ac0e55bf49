//! Rules of the specification, one by one, over whole connections; what
//! docs/nvme-conformance.md points to where no other test proves a line.

use std::time::Duration;

use super::bench_for_tests::*;
use super::controller::Event;
use super::wire::{FLAG_LAST, FLAG_SUCCESS, u16_at, u32_at, u64_at};

const INVALID_FIELD: u16 = 0x4002;

/// An I/O command with these dwords 10 to 12, and no data.
fn plain(opcode: u8, lba: u32, twelve: u32) -> [u8; 64] {
    command(opcode, 0x5a, 0, [lba, 0, twelve])
}

/// Get Log Page, of so many bytes.
fn log(id: u32, bytes: u32) -> [u8; 64] {
    command(2, 0x5a, bytes, [(bytes / 4 - 1) << 16 | id, 0, 0])
}

#[test]
fn sgls_are_as_fabrics_have_them_on_every_queue() {
    let bench = Bench::new();
    let (mut admin, mut io) = bench.host(&bench.a, BOTH);
    // 8192 bytes in a capsule, and not a block more.
    let two = command(1, 0x01, 8192, [0, 0, 1]);
    assert_eq!(io.run(two, &[3; 2 * BYTES]).1.status, 0);
    let behavior = command(9, 0x01, 512, [0x16, 0, 0]);
    assert_eq!(admin.run(behavior, &[0; 512]).1.status, 0);
    for (entry, data, wire) in [
        (two, 2 * BYTES, &mut io),
        (behavior, 512, &mut admin),
        (
            command(2, 0x5a, 4096, [0; 3]),
            0,
            &mut bench.host(&bench.b, NONE).1,
        ),
    ] {
        let data = vec![0; data];
        let mut run = |at: usize, value: u8| {
            let mut entry = entry;
            entry[at] = value;
            wire.run(entry, &data).1.status
        };
        assert_eq!(run(1, 0), INVALID_FIELD, "PSDT 00b: PRPs");
        assert_eq!(run(1, 0x80), INVALID_FIELD, "PSDT 10b: a metadata SGL");
        assert_eq!(run(39, 0x11), 0x4011, "a bit bucket");
        assert_eq!(run(39, 0x40), 0x4011, "a keyed block");
        assert_eq!(run(32, 4), 0x400f, "another length than the command's");
        if !data.is_empty() {
            assert_eq!(run(24, 4), 0x4016, "an offset, where ICDOFF is 0");
        }
    }
    // What goes to the host cannot be in its capsule.
    assert_eq!(io.status(command(2, 0x01, 4096, [0; 3])), 0x4011);
    assert_eq!(admin.status(command(6, 0x01, 4096, [1, 0, 0])), 0x4011);
    assert_eq!((io.end(), admin.end()), (None, None));
}

#[test]
fn success_comes_with_the_last_data_where_flow_control_is_off() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, NONE);
    io.send(read(0, 2), &[]);
    let data = io.answer();
    assert_eq!(
        data.header[1], FLAG_LAST,
        "with flow control a response follows"
    );
    let done = io.answer().completion();
    assert_eq!(
        (done.status, done.sq_head),
        (0, 2),
        "the second of 32 entries"
    );
    for number in 0..40 {
        let head = io.run(plain(0, 0, 0), &[]).1.sq_head;
        assert_eq!(head, (3 + number) % 32, "SQHD goes round");
    }

    let mut admin = bench.open();
    admin.agree(NONE);
    let controller = admin.connect(&bench.b, 0, 0xffff, 0).result as u16;
    assert_eq!(admin.status(property(true, 0x14, 0x0046_0001)), 0);
    let mut io = bench.open();
    io.agree(NONE);
    let done = io.connect_without_flow_control(&bench.b, 1, controller);
    assert_eq!((done.status, done.sq_head), (0, 0xffff), "agreed to");
    io.send(read(0, 2), &[]);
    let data = io.answer();
    assert_eq!(data.header[1], FLAG_LAST | FLAG_SUCCESS);
    assert_eq!((data.header[3], data.data.len()), (24, 2 * BYTES), "PDO");
    assert!(io.answers.is_empty(), "no response follows");
    assert_eq!(
        io.status(plain(0, 0, 0)),
        0,
        "what has no data has a response"
    );
}

#[test]
fn only_what_one_transfer_carries_is_bound_by_mdts() {
    let bench = Bench::new();
    let (mut admin, mut io) = bench.host(&bench.a, NONE);
    let (page, _) = admin.run(command(6, 0x5a, 4096, [1, 0, 0]), &[]);
    let most = 1u32 << page[77];
    assert_eq!(io.run(read(0, most), &[]).1.status, 0);
    for opcode in [1, 2, 5] {
        let beyond = command(opcode, 0x5a, (most + 1) * 4096, [0, 0, most]);
        assert_eq!(io.status(beyond), INVALID_FIELD, "opcode {opcode}");
    }
    for opcode in [0x08, 0x0c] {
        assert_eq!(
            io.status(plain(opcode, 0, BLOCKS as u32 - 1)),
            0,
            "all of it"
        );
        assert_eq!(io.status(plain(opcode, 1, BLOCKS as u32 - 1)), 0x4080);
        assert_eq!(io.status(plain(opcode, u32::MAX, 0)), 0x4080);
    }
    let (page, _) = admin.run(command(6, 0x5a, 4096, [6, 0, 0]), &[]);
    for (opcode, limit) in [(0x0c, page[0]), (0x08, page[1])] {
        let most = 1u32 << limit;
        assert_eq!(io.status(plain(opcode, 0, most - 1)), 0);
        assert_eq!(io.status(plain(opcode, 0, most)), INVALID_FIELD);
    }
    // An address that would wrap round.
    let mut far = plain(0x08, u32::MAX, 0xfff);
    far[44..48].fill(0xff);
    assert_eq!(io.status(far), 0x4080);
    far[0] = 0x02;
    far[48..50].fill(0);
    far[32..36].copy_from_slice(&4096u32.to_le_bytes());
    assert_eq!(io.status(far), 0x4080);
}

#[test]
fn zeroes_are_written_whatever_the_flags() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, NONE);
    for flags in [0, 1 << 25, 1 << 30, 1 << 25 | 1 << 30] {
        assert_eq!(io.run(small_write(5), &[9; BYTES]).1.status, 0);
        assert_eq!(io.status(plain(0x08, 5, flags)), 0);
        assert_eq!(
            io.run(read(5, 1), &[]).0,
            [0; BYTES],
            "DLFEAT: also deallocated"
        );
    }
    let mut elsewhere = plain(0x08, 0, 0);
    elsewhere[4] = 2;
    assert_eq!(io.status(elsewhere), 0x400b);
    // A Flush may be of all namespaces, nothing else may.
    for (opcode, expected) in [(0x00, 0), (0x08, 0x400b), (0x0c, 0x400b)] {
        let mut all = plain(opcode, 0, 0);
        all[4..8].fill(0xff);
        assert_eq!(io.status(all), expected, "opcode {opcode}");
    }
}

#[test]
fn only_deallocation_changes_anything_of_dataset_management() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, NONE);
    assert_eq!(io.run(small_write(7), &[9; BYTES]).1.status, 0);
    let range = |lba: u64, blocks: u32| {
        let mut range = vec![0; 16];
        range[4..8].copy_from_slice(&blocks.to_le_bytes());
        range[8..].copy_from_slice(&lba.to_le_bytes());
        range
    };
    let dsm =
        |count: u32, eleven: u32, length: u32| command(9, 0x01, length, [count - 1, eleven, 0]);
    let one = range(7, 1);
    for hints in [0, 1, 2, 3] {
        assert_eq!(io.run(dsm(1, hints, 16), &one).1.status, 0);
        assert_eq!(io.run(read(7, 1), &[]).0, [9; BYTES], "hints only");
    }
    let most = one.repeat(256);
    assert_eq!(io.run(dsm(256, 4, 4096), &most).1.status, 0x4183, "DMRL");
    let all = [range(0, 1 << 17), range(0, 1 << 17), range(0, 1)].concat();
    assert_eq!(io.run(dsm(3, 4, 48), &all).1.status, 0x4183, "DMSL");
    assert_eq!(io.run(dsm(1, 4, 16), &range(0, 262_145)).1.status, 0x4183);
    assert_eq!(io.run(dsm(1, 4, 16), &range(0, 262_144)).1.status, 0x4080);
    assert_eq!(io.run(read(7, 1), &[]).0, [9; BYTES]);
    assert_eq!(io.run(dsm(255, 4, 4080), &most[..4080]).1.status, 0);
    assert_eq!(io.run(read(7, 1), &[]).0, [0; BYTES]);
    assert_eq!(
        io.run(dsm(2, 4, 16), &one).1.status,
        0x400f,
        "fewer than it says"
    );
    assert_eq!(io.run(dsm(1, 4, 16), &range(BLOCKS, 1)).1.status, 0x4080);
    assert_eq!(
        io.run(dsm(1, 4, 16), &range(u64::MAX, 262_144)).1.status,
        0x4080
    );
    assert_eq!(
        io.run(dsm(1, 4, 16), &range(0, 0)).1.status,
        0,
        "of no blocks"
    );
}

#[test]
fn events_are_limited_masked_and_told_each_for_itself() {
    let bench = Bench::new();
    let (mut admin, _io) = bench.host(&bench.a, NONE);
    let (page, _) = admin.run(command(6, 0x5a, 4096, [1, 0, 0]), &[]);
    let limit = page[259] + 1;
    let events: Vec<_> = (0..limit)
        .map(|_| admin.send(plain(0x0c, 0, 0), &[]))
        .collect();
    assert_eq!(admin.status(plain(0x0c, 0, 0)), 0x4105, "AERL");
    assert_eq!(admin.status(command(9, 0x5a, 0, [0x0b, 1 << 8, 0])), 0);
    let announce = |admin: &mut Wire, event| {
        bench.a.current().unwrap().announce(event);
        admin.wait(Duration::ZERO);
    };
    announce(&mut admin, Event::Namespace);
    let told = admin.answer().completion();
    assert_eq!((told.command, told.result), (events[0], 0x0004_0002));
    announce(&mut admin, Event::Namespace);
    assert!(admin.answers.is_empty(), "masked until its log is read");
    announce(&mut admin, Event::Reservation);
    let told = admin.answer().completion();
    assert_eq!((told.command, told.result), (events[1], 0x0080_0006));
    // Retained, it stays masked; read, the next one is told at once.
    let mut retain = log(4, 4096);
    retain[41] |= 0x80;
    assert_eq!(u32_at(&admin.run(retain, &[]).0, 0), 1);
    announce(&mut admin, Event::Namespace);
    assert!(admin.answers.is_empty());
    assert_eq!(u32_at(&admin.run(log(4, 4096), &[]).0, 0), 1);
    assert_eq!(
        u32_at(&admin.run(log(4, 4096), &[]).0, 0),
        0,
        "no change since"
    );
    announce(&mut admin, Event::Namespace);
    let told = admin.answer().completion();
    assert_eq!((told.command, told.result), (events[2], 0x0004_0002));
    // Without a request an event waits for one.
    assert_eq!(admin.run(log(4, 4096), &[]).1.status, 0);
    assert_eq!(admin.run(log(0x80, 64), &[]).1.status, 0);
    let last = admin.send(plain(0x0c, 0, 0), &[]);
    announce(&mut admin, Event::Namespace);
    assert_eq!(admin.answer().completion().command, events[3]);
    announce(&mut admin, Event::Reservation);
    assert_eq!(admin.answer().completion().command, last);
    assert_eq!(admin.run(log(4, 4096), &[]).1.status, 0);
    announce(&mut admin, Event::Namespace);
    assert!(admin.answers.is_empty(), "no request is left");
    let asked = admin.send(plain(0x0c, 0, 0), &[]);
    assert_eq!(admin.answer().completion().command, asked);
}

#[test]
fn what_is_not_served_is_refused_and_not_advertised() {
    let bench = Bench::new();
    let (mut admin, mut io) = bench.host(&bench.a, NONE);
    // Fabrics: Disconnect, and Connect on a queue that is connected.
    let mut disconnect = command(0x7f, 0x5a, 0, [0; 3]);
    disconnect[4] = 0x08;
    assert_eq!(io.status(disconnect), 0x4001);
    let mut again = command(0x7f, 0x01, 1024, [0; 3]);
    again[4] = 0x01;
    assert_eq!(io.run(again, &[0; 1024]).1.status, 0x400c);
    // Properties are the admin queue's.
    for entry in [property(false, 0x1c, 0), property(true, 0x14, 0)] {
        assert_eq!(io.status(entry), 0x4001);
    }
    // CRTO and the rest of the properties; CAP says neither CRMS (59, 60) nor
    // command sets beside NVM (43), nor a subsystem reset (36).
    let mut get = |offset, wide: u8| {
        let mut get = property(false, offset, 0);
        get[40] = wide;
        admin.run(get, &[]).1
    };
    let capabilities = get(0, 1);
    assert_eq!(capabilities.status, 0);
    assert_eq!(capabilities.result >> 36 & 0xff, 0b10, "CSS: NVM alone");
    assert_eq!(capabilities.result >> 59 & 3, 0, "CRMS");
    assert_eq!(get(0, 0).status, INVALID_FIELD, "CAP has eight bytes");
    assert_eq!(get(0x14, 1).status, INVALID_FIELD, "and CC four");
    for offset in [0x0c, 0x10, 0x20, 0x24, 0x68] {
        assert_eq!(get(offset, 0).status, INVALID_FIELD, "property {offset:#x}");
    }
    for cns in [0x04, 0x05, 0x08, 0x10, 0x13, 0x14, 0x15, 0x1c] {
        let identify = command(6, 0x5a, 4096, [cns, 0, 0]);
        assert_eq!(admin.status(identify), INVALID_FIELD, "CNS {cns:#x}");
    }
    for id in [0x00, 0x06, 0x07, 0x09, 0x0b, 0x0c, 0x0d, 0x70, 0x81] {
        assert_eq!(admin.status(log(id, 512)), 0x4109, "log {id:#x}");
    }
    for feature in [0x01, 0x02, 0x03, 0x04, 0x05, 0x08, 0x0c, 0x0e, 0x10, 0x84] {
        for opcode in [9, 10] {
            let of = command(opcode, 0x5a, 0, [feature, 0, 0]);
            assert_eq!(admin.status(of), INVALID_FIELD, "feature {feature:#x}");
        }
    }
    // No queues to be made, firmware, formats, namespaces or self-tests.
    for opcode in [
        0x00, 0x01, 0x04, 0x05, 0x0d, 0x10, 0x11, 0x14, 0x15, 0x80, 0x81, 0x84,
    ] {
        assert_eq!(
            admin.status(plain(opcode, 0, 0)),
            0x4001,
            "opcode {opcode:#x}"
        );
    }
    for opcode in [0x04, 0x0e ^ 0x80, 0x1d, 0x79, 0x7d, 0x80] {
        assert_eq!(io.status(plain(opcode, 0, 0)), 0x4001, "opcode {opcode:#x}");
    }
    for (fused, wire) in [
        (plain(0x00, 0, 0), &mut io),
        (plain(0x18, 0, 0), &mut admin),
    ] {
        for bits in [1, 2] {
            let mut fused = fused;
            fused[1] |= bits;
            assert_eq!(wire.status(fused), INVALID_FIELD);
        }
    }
}

#[test]
fn every_queue_sees_what_any_other_wrote() {
    let bench = Bench::new();
    let (mut admin, first) = bench.host(&bench.a, NONE);
    let granted = admin.run(command(9, 0x5a, 0, [7, 0x00ff_00ff, 0]), &[]).1;
    assert_eq!(granted.status, 0x400c, "not once queues are connected");
    let granted = admin.run(command(10, 0x5a, 0, [7, 0, 0]), &[]).1;
    assert_eq!(granted.result, 15 << 16 | 15);
    let controller = bench.a.current().unwrap().id();
    let mut queues = vec![first];
    for queue in 2..=16 {
        let mut io = bench.open();
        io.agree(if queue % 2 == 0 { BOTH } else { NONE });
        assert_eq!(io.connect(&bench.a, queue, controller, 0).status, 0);
        queues.push(io);
    }
    for (number, queue) in (1u8..).zip(&mut queues) {
        let done = queue.run(small_write(number.into()), &[number; BYTES]).1;
        assert_eq!(done.status, 0);
    }
    let count = u32::try_from(queues.len()).unwrap();
    for queue in &mut queues {
        let (data, _) = queue.run(read(1, count), &[]);
        let firsts: Vec<_> = data.chunks(BYTES).map(|block| block[0]).collect();
        assert_eq!(firsts, (1..=16).collect::<Vec<u8>>());
    }
    // One queue's connection is lost: the host resets its controller then, the
    // others go on until it does.
    queues.remove(3).inline.close();
    assert_eq!(queues[0].status(read(0, 1)), 0);
    assert_eq!(admin.status(property(false, 0x1c, 0)), 0);
    // The admin queue's is lost: all of them end.
    admin.inline.close();
    for queue in &mut queues {
        queue.wait(Duration::ZERO);
        assert!(queue.end().is_some());
    }
}

#[test]
fn without_an_enabled_controller_no_command_reaches_the_device() {
    let bench = Bench::new();
    let (mut admin, mut io) = bench.host(&bench.a, NONE);
    assert_eq!(io.run(small_write(0), &[1; BYTES]).1.status, 0);
    // A shutdown lets commands in still, an abrupt one too; a disabled one does not.
    assert_eq!(admin.status(property(true, 0x14, 0x0046_8001)), 0);
    assert_eq!(admin.run(property(false, 0x1c, 0), &[]).1.result, 0b1001);
    assert_eq!(io.status(read(0, 1)), 0);
    let late = io.send(write(0, 4), &[]);
    let asked = io.answer().data_header();
    assert_eq!(admin.status(property(true, 0x14, 0x0046_0000)), 0);
    io.send_data(asked, true, &[2; 4 * BYTES]);
    let done = io.answer().completion();
    assert_eq!(
        (done.command, done.status),
        (late, 0x400c),
        "its data came late"
    );
    assert_eq!(
        admin.run(property(false, 0x1c, 0), &[]).1.result & 1,
        0,
        "not ready"
    );
    for entry in [read(0, 1), plain(0x00, 0, 0), plain(0x0e, 15, 0)] {
        assert_eq!(io.status(entry), 0x400c);
    }
    assert_eq!(io.run(small_write(0), &[2; BYTES]).1.status, 0x400c);
    assert_eq!(bench.device.0.lock().unwrap()[0], 1);
    assert_eq!(
        admin.status(property(true, 0x14, 0x0046_0001)),
        0x400c,
        "connect anew"
    );
    let again = bench.host(&bench.a, NONE);
    admin.wait(Duration::ZERO);
    io.wait(Duration::ZERO);
    assert!(admin.end().is_some() && io.end().is_some());
    drop(again);
}

#[test]
fn a_reservation_report_is_extended_and_as_long_as_asked() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, NONE);
    let mut keys = vec![0; 16];
    keys[8] = 10;
    let register = command(0x0d, 0x01, 16, [0; 3]);
    assert_eq!(io.run(register, &keys).1.status, 0);
    let report = |bytes: u32, eleven| command(0x0e, 0x5a, bytes, [bytes / 4 - 1, eleven, 0]);
    assert_eq!(io.status(report(4096, 0)), 0x4018, "hosts have 128 bits");
    let (page, _) = io.run(report(4096, 1), &[]);
    assert_eq!((u32_at(&page, 0), page[4], u16_at(&page, 5)), (1, 0, 1));
    let controller = bench.a.current().unwrap().id();
    assert_eq!((u16_at(&page, 64), page[66]), (controller, 0));
    assert_eq!(u64_at(&page, 72), 10);
    assert_eq!(&page[80..96], bench.a.host().id.as_bytes());
    assert_eq!(io.run(report(64, 1), &[]).0, page[..64], "its beginning");
    assert_eq!(io.status(command(0x0e, 0x5a, 64, [0, 1, 0])), 0x400f);
    // Nothing is made of a page that has no place to go, 4 GiB of it least of all.
    for (bytes, dwords) in [(64, 15), (0xffff_fffc, 0x3fff_fffe)] {
        let in_capsule = command(0x0e, 0x01, bytes, [dwords, 1, 0]);
        assert_eq!(
            io.status(in_capsule),
            0x4011,
            "data for the host, in its capsule"
        );
    }
}

#[test]
fn a_capsule_brings_what_its_command_takes() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, BOTH);
    let verify = command(0x0c, 0x5a, 0, [0; 3]);
    for entry in [
        read(0, 1),
        verify,
        write(0, 1),
        plain(0, 0, 0),
        plain(8, 0, 0),
    ] {
        let status = io.run(entry, &[3; 2 * BYTES]).1.status;
        assert_eq!(status, 0x400f, "opcode {}", entry[0]);
    }
    assert_eq!(io.run(small_write(0), &[3; 2 * BYTES]).1.status, 0x400f);
    assert_eq!(io.run(small_write(0), &[3; BYTES]).1.status, 0);
    assert_eq!(io.end(), None);
}

#[test]
fn an_event_is_told_on_the_admin_queue_whatever_comes_first_on_another() {
    let bench = Bench::new();
    let (mut admin, mut io) = bench.host(&bench.a, NONE);
    let asked = admin.send(plain(0x0c, 0, 0), &[]);
    bench.a.current().unwrap().announce(Event::Reservation);
    let report = command(0x0e, 0x5a, 64, [15, 1, 0]);
    assert_eq!(io.run(report, &[]).1.status, 0);
    assert!(io.answers.is_empty());
    admin.wait(Duration::ZERO);
    assert_eq!(admin.answer().completion().command, asked);
}

//! Whole connections, on the calling thread: what goes in, what comes out.

use super::bench_for_tests::*;
use super::reserve::{Keeper, Reservations};
use super::wire::{Data, Kind};
use crate::block::BLOCK;
use crate::reactor::End;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const CONFLICT: u16 = 0x4083;

fn pattern(blocks: usize) -> Vec<u8> {
    (0..blocks * BYTES).map(|i| (i / 11) as u8).collect()
}

#[test]
fn data_goes_both_ways_whatever_the_digests() {
    for digests in [NONE, BOTH] {
        let bench = Bench::new();
        let (_admin, mut io) = bench.host(&bench.a, digests);
        let data = pattern(64);
        let sent = io.send(write(8, 64), &[]);
        let asked = io.answer().data_header();
        assert_eq!(
            (asked.command, asked.offset, asked.length as usize),
            (sent, 0, data.len())
        );
        for (at, part) in data.chunks(100_000).enumerate() {
            let offset = (at * 100_000) as u32;
            let header = Data {
                offset,
                length: part.len() as u32,
                ..asked
            };
            io.send_data(header, offset as usize + part.len() == data.len(), part);
        }
        assert_eq!(io.answer().completion().status, 0);
        assert_eq!(io.run(read(8, 64), &[]).0, data);
        // Linux's discards: a whole page, whatever the number of ranges.
        let mut ranges = vec![0; 4096];
        (ranges[4], ranges[8]) = (1, 9);
        assert_eq!(io.run(command(9, 1, 4096, [0, 4, 0]), &ranges).1.status, 0);
        assert_eq!(io.run(read(9, 1), &[]).0, vec![0; BYTES]);
        assert_eq!(io.run(read(8, 1), &[]).0, data[..BYTES]);
        assert_eq!(
            io.status(command(0x0c, 0x5a, 0, [0, 0, 0xfff])),
            0,
            "verify all of it"
        );
        assert_eq!(io.status(command(0x0c, 0x5a, 0, [1, 0, 0xfff])), 0x4080);
    }
}

#[test]
fn what_came_byte_by_byte_is_the_same() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, BOTH);
    let mut pdu = super::wire::common(Kind::CapsuleCmd, 0, BOTH, BLOCK as u32).to_vec();
    pdu.extend_from_slice(&small_write(3));
    pdu.extend_from_slice(&crc32c::crc32c(&pdu.clone()).to_le_bytes());
    pdu.extend_from_slice(&[7; BYTES]);
    pdu.extend_from_slice(&crc32c::crc32c(&[7; BYTES]).to_le_bytes());
    for byte in pdu {
        assert!(io.answers.is_empty());
        io.raw(&[byte]);
    }
    assert_eq!(io.answer().completion().status, 0);
    assert_eq!(io.run(read(3, 1), &[]).0, vec![7; BYTES]);
}

#[test]
fn compare_says_whether_it_is_the_same() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, NONE);
    io.run(small_write(1), &[5; BYTES]);
    let compare = |place| command(5, place, BLOCK as u32, [1, 0, 0]);
    assert_eq!(io.run(compare(1), &[5; BYTES]).1.status, 0);
    assert_eq!(io.run(compare(1), &[6; BYTES]).1.status, 0x4285);
    io.send(compare(0x5a), &[]);
    let asked = io.answer().data_header();
    let mut data = vec![5; BYTES];
    data[4095] = 0;
    io.send_data(asked, true, &data);
    assert_eq!(io.answer().completion().status, 0x4285);
    let mut fused = compare(1);
    fused[1] |= 1;
    assert_eq!(io.run(fused, &[5; BYTES]).1.status, 0x4002, "not served");
}

/// A Copy's source range, in either format.
fn range(format: usize, from: u64, blocks: u16) -> Vec<u8> {
    let mut range = vec![0; [32, 40][format]];
    range[8..16].copy_from_slice(&from.to_le_bytes());
    range[16..18].copy_from_slice(&(blocks - 1).to_le_bytes());
    range
}

#[test]
fn copy_joins_ranges_and_writes_nothing_when_one_is_wrong() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, NONE);
    for block in 0..4 {
        io.run(small_write(block), &[block as u8 + 1; BYTES]);
    }
    for format in [0, 1] {
        let mut ranges = range(format, 2, 2);
        ranges.extend(range(format, 0, 1));
        let length = ranges.len() as u32;
        let to = 100 * (format as u32 + 1);
        let copy = command(0x19, 1, length, [to, 0, (format as u32) << 8 | 1]);
        assert_eq!(io.run(copy, &ranges).1.status, 0);
        let (copied, _) = io.run(read(to, 3), &[]);
        let firsts: Vec<_> = copied.chunks(BYTES).map(|block| block[0]).collect();
        assert_eq!(firsts, [3, 4, 1]);
    }
    let run = |io: &mut Wire, dword: u32, to: u32, ranges: &[u8]| {
        let copy = command(0x19, 1, ranges.len() as u32, [to, 0, dword]);
        io.run(copy, ranges).1.status
    };
    let mut wrong = range(0, 0, 1);
    wrong.extend(range(0, BLOCKS - 1, 2));
    assert_eq!(run(&mut io, 1, 300, &wrong), 0x4080, "beyond the end");
    assert_eq!(run(&mut io, 0, BLOCKS as u32, &range(0, 0, 1)), 0x4080);
    assert_eq!(run(&mut io, 0, 300, &range(0, 0, 4097)), 0x4183, "MSSRL");
    assert_eq!(
        run(&mut io, 2 << 8, 300, &range(0, 0, 1)),
        0x4002,
        "no such format"
    );
    assert_eq!(
        run(&mut io, 1, 300, &range(0, 0, 1)),
        0x400f,
        "fewer than it says"
    );
    assert_eq!(run(&mut io, 200, 300, &range(0, 0, 1)), 0x4183, "MSRC");
    assert_eq!(io.run(read(300, 1), &[]).0, vec![0; BYTES]);
}

#[test]
fn who_finds_no_memory_waits_and_the_stream_goes_on() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, NONE);
    let data = pattern(64);
    let sent: Vec<_> = (0..8).map(|at| io.send(write(at * 64, 64), &[])).collect();
    let behind = io.send(read(0, 1), &[]);
    assert_eq!(io.answers.len(), 4, "1 MiB of memory: {:?}", io.answers);
    let mut asked = std::collections::VecDeque::from(std::mem::take(&mut io.answers));
    let mut done = Vec::new();
    while let Some(r2t) = asked.pop_front() {
        io.send_data(r2t.data_header(), true, &data);
        for answer in std::mem::take(&mut io.answers) {
            match answer.kind {
                Kind::R2T => asked.push_back(answer),
                Kind::CapsuleResp => done.push(answer.completion().command),
                _ => assert_eq!(answer.data, data[..BYTES], "read behind the writes"),
            }
        }
    }
    done.sort_unstable();
    assert_eq!(done, [&sent[..], &[behind]].concat());
    assert_eq!(
        bench.device.0.lock().unwrap()[..8 * data.len()],
        data.repeat(8)
    );
}

#[test]
fn commands_keep_their_identifiers_apart() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, NONE);
    io.send(write(0, 4), &[]);
    let asked = io.answer().data_header();
    // The same identifier again, while the first is outstanding.
    let mut again = super::wire::common(Kind::CapsuleCmd, 0, NONE, 0).to_vec();
    let mut entry = read(0, 1);
    entry[2..4].copy_from_slice(&asked.command.to_le_bytes());
    again.extend_from_slice(&entry);
    io.raw(&again);
    assert_eq!(io.answer().completion().status, 0x03);
    io.send_data(asked, true, &pattern(4));
    assert_eq!(io.answer().completion().status, 0);
    io.raw(&again);
    assert_eq!(io.answer().kind, Kind::C2HData, "free again");
    // Data for what was answered is nobody's.
    io.answers.clear();
    io.send_data(asked, true, &pattern(4));
    assert_eq!(io.answer().kind, Kind::C2HTermReq);
    assert_eq!(io.end(), Some(&End::Protocol("malformed PDU")));
    assert!(
        bench
            .metrics()
            .contains(r#"malformed_pdus_total{reason="header-field"} 1"#)
    );
}

#[test]
fn every_wait_for_a_host_ends() {
    let bench = Bench::new();
    let mut silent = bench.open();
    silent.wait(Duration::from_secs(9));
    assert_eq!(silent.end(), None);
    silent.wait(Duration::from_secs(1));
    assert_eq!(silent.end(), Some(&End::Late("Connect")));
    let mut refused = bench.open();
    refused.agree(NONE);
    let unknown = crate::nvme_tcp::subsystem::Parts {
        nqn: "nqn.test:none".to_owned(),
        namespace: bench.a.namespace(),
        host: bench.a.host().clone(),
        read_only: false,
        device: Arc::clone(bench.a.device()),
        reservations: Reservations::volatile(),
        secrets: None,
        discovery: None,
    };
    let unknown = crate::nvme_tcp::subsystem::Subsystem::new(unknown);
    assert_eq!(refused.connect(&unknown, 0, 0xffff, 0).status, 0x181);
    refused.wait(Duration::from_secs(10));
    assert_eq!(refused.end(), Some(&End::Late("Connect")));

    let (admin, mut io) = bench.host(&bench.a, NONE);
    io.send(write(0, 4), &[]);
    io.wait(Duration::from_secs(59));
    assert_eq!(io.end(), None);
    io.wait(Duration::from_secs(1));
    assert!(matches!(io.end(), Some(End::Late(_))));
    let mut admin = admin;
    admin.wait(Duration::ZERO);
    assert_eq!(
        admin.end(),
        Some(&End::Protocol("the association has ended"))
    );

    let mut admin = bench.open();
    admin.agree(NONE);
    assert_eq!(admin.connect(&bench.a, 0, 0xffff, 5000).status, 0);
    for _ in 0..5 {
        admin.wait(Duration::from_secs(4));
        assert_eq!(
            admin.status(command(0x18, 0x5a, 0, [0; 3])),
            0,
            "keep alive"
        );
    }
    admin.wait(Duration::from_secs(5));
    assert_eq!(admin.end(), None, "within its granularity");
    admin.wait(Duration::from_secs(1));
    assert_eq!(admin.end(), Some(&End::Late("keep alive")));
}

#[test]
fn any_command_on_any_queue_keeps_an_association_alive() {
    let bench = Bench::new();
    let mut admin = bench.open();
    admin.agree(NONE);
    let controller = admin.connect(&bench.a, 0, 0xffff, 5000).result as u16;
    admin.status(property(true, 0x14, 0x0046_0001));
    let mut io = bench.open();
    io.agree(NONE);
    assert_eq!(io.connect(&bench.a, 1, controller, 0).status, 0);
    for _ in 0..4 {
        io.wait(Duration::from_secs(4));
        assert_eq!(io.status(read(0, 1)), 0);
        admin.wait(Duration::from_secs(4));
        assert_eq!(admin.end(), None);
    }
}

#[test]
fn an_event_request_can_be_aborted() {
    let bench = Bench::new();
    let (mut admin, _io) = bench.host(&bench.a, NONE);
    let event = admin.send(command(0x0c, 0x5a, 0, [0; 3]), &[]);
    let abort = |queue: u32, command_id: u16| {
        command(8, 0x5a, 0, [u32::from(command_id) << 16 | queue, 0, 0])
    };
    assert_eq!(
        admin.run(abort(1, event), &[]).1.result,
        1,
        "another queue's"
    );
    assert_eq!(admin.run(abort(0, 77), &[]).1.result, 1, "no such command");
    let aborting = admin.send(abort(0, event), &[]);
    let aborted = admin.answer().completion();
    assert_eq!((aborted.command, aborted.status), (event, 0x07));
    let done = admin.answer().completion();
    assert_eq!((done.command, done.result), (aborting, 0));
    bench
        .a
        .current()
        .unwrap()
        .announce(crate::nvme_tcp::controller::Event::Namespace);
    admin.wait(Duration::ZERO);
    assert!(admin.answers.is_empty(), "nobody listens");
}

fn register(io: &mut Wire, action: u32, current: u64, new: u64) -> u16 {
    let mut data = current.to_le_bytes().to_vec();
    data.extend_from_slice(&new.to_le_bytes());
    io.run(command(0x0d, 1, 16, [action, 0, 0]), &data).1.status
}

fn acquire(io: &mut Wire, action: u32, kind: u32, key: u64, preempted: u64) -> u16 {
    let mut data = key.to_le_bytes().to_vec();
    data.extend_from_slice(&preempted.to_le_bytes());
    io.run(command(0x11, 1, 16, [action | kind << 8, 0, 0]), &data)
        .1
        .status
}

fn release(io: &mut Wire, action: u32, kind: u32, key: u64) -> u16 {
    let release = command(0x15, 1, 8, [action | kind << 8, 0, 0]);
    io.run(release, &key.to_le_bytes()).1.status
}

#[test]
fn two_hosts_of_a_volume_keep_each_other_out() {
    let bench = Bench::new();
    let (mut first_admin, mut first) = bench.host(&bench.a, NONE);
    let (_admin, mut second) = bench.host(&bench.b, NONE);
    assert_eq!(acquire(&mut first, 0, 1, 10, 0), CONFLICT, "not registered");
    assert_eq!(register(&mut first, 0, 0, 10), 0);
    assert_eq!(register(&mut second, 0, 0, 20), 0);
    assert_eq!(
        register(&mut first, 3 << 30, 0, 10),
        0x4002,
        "nobody keeps it"
    );
    assert_eq!(acquire(&mut first, 0, 1, 10, 0), 0);
    assert_eq!(second.status(read(0, 1)), 0);
    assert_eq!(second.run(small_write(0), &[1; BYTES]).1.status, CONFLICT);
    assert_eq!(
        second.status(command(0, 0x5a, 0, [0; 3])),
        CONFLICT,
        "flush"
    );
    assert_eq!(first.run(small_write(0), &[2; BYTES]).1.status, 0);
    assert_eq!(release(&mut first, 0, 2, 10), 0x4002, "another type");

    // The report, extended and not.
    let report =
        |bytes: u32, extended: u32| command(0x0e, 0x5a, bytes, [bytes / 4 - 1, extended, 0]);
    assert_eq!(first.status(report(64, 0)), 0x4018);
    let (page, _) = second.run(report(256, 1), &[]);
    assert_eq!((page[4], page[5], page[66], page[130]), (1, 2, 1, 0));

    // The second preempts and aborts: what the first has under way is over,
    // it is told so, and may not write any more.
    let event = first_admin.send(command(0x0c, 0x5a, 0, [0; 3]), &[]);
    assert_eq!(acquire(&mut second, 1, 1, 20, 10), 0);
    first_admin.wait(Duration::ZERO);
    let told = first_admin.answer().completion();
    assert_eq!((told.command, told.result), (event, 0x0080_0006));
    let log = command(2, 0x5a, 64, [15 << 16 | 0x80, 0, 0]);
    let (page, _) = first_admin.run(log, &[]);
    assert_eq!((page[0], page[8], page[9], page[12]), (1, 1, 1, 1));
    assert_eq!(first_admin.run(log, &[]).0, vec![0; 64], "read once");
    assert_eq!(first.run(small_write(0), &[3; BYTES]).1.status, CONFLICT);
    assert_eq!(second.run(small_write(0), &[4; BYTES]).1.status, 0);

    // An export that ends takes its registration along.
    bench.b.gate().close();
    bench.b.take_away();
    bench.b.reservations().leave(&bench.b);
    assert_eq!(first.run(small_write(0), &[5; BYTES]).1.status, 0);
}

#[test]
fn preempt_and_abort_waits_for_what_it_aborts() {
    let bench = Bench::new();
    let (_first_admin, mut first) = bench.host(&bench.a, NONE);
    let (_admin, mut second) = bench.host(&bench.b, NONE);
    register(&mut first, 0, 0, 10);
    register(&mut second, 0, 0, 20);
    assert_eq!(acquire(&mut first, 0, 1, 10, 0), 0);
    first.inline.hold(true);
    first.send(small_write(0), &[1; BYTES]);
    assert_eq!(first.inline.held(), 1);
    let landed = Arc::new(Mutex::new(None));
    std::thread::scope(|scope| {
        let aborting = scope.spawn(|| {
            let status = acquire(&mut second, 2, 1, 20, 10);
            *landed.lock().unwrap() = Some(bench.device.0.lock().unwrap()[0]);
            status
        });
        // The association ends at once, its command is still on its way.
        while !bench.a.current().unwrap().has_ended() {
            std::thread::yield_now();
        }
        assert_eq!(*landed.lock().unwrap(), None, "it waits");
        first.inline.hold(false);
        first.inline.wait(Duration::ZERO);
        assert_eq!(aborting.join().unwrap(), 0);
    });
    assert_eq!(*landed.lock().unwrap(), Some(1), "nothing lands behind it");
}

#[test]
fn who_vanished_is_aborted_all_the_same() {
    let bench = Bench::new();
    let (first_admin, mut first) = bench.host(&bench.a, NONE);
    let (_admin, mut second) = bench.host(&bench.b, NONE);
    register(&mut first, 0, 0, 10);
    register(&mut second, 0, 0, 20);
    assert_eq!(acquire(&mut first, 0, 1, 10, 0), 0);
    // Its connections are gone, its command is still on its way.
    let inside = bench.a.current().unwrap().gate().enter();
    drop((first_admin, first));
    assert!(bench.a.current().is_none());
    std::thread::scope(|scope| {
        let aborting = scope.spawn(|| acquire(&mut second, 2, 1, 20, 10));
        while !bench.a.bars(true) {
            std::thread::yield_now();
        }
        assert!(!aborting.is_finished(), "it waits");
        drop(inside);
        assert_eq!(aborting.join().unwrap(), 0);
    });
}

struct Kept(Arc<Mutex<Vec<u8>>>, bool);

impl Keeper for Kept {
    fn keep(&self, record: &[u8]) -> Result<(), String> {
        if self.1 {
            return Err("no room".to_owned());
        }
        *self.0.lock().unwrap() = record.to_vec();
        Ok(())
    }
}

#[test]
fn what_is_to_persist_does_and_nothing_else() {
    let record = Arc::new(Mutex::new(Vec::new()));
    let kept = |kept: Option<&[u8]>, fails| {
        Reservations::kept(Box::new(Kept(Arc::clone(&record), fails)), kept).unwrap()
    };
    let bench = Bench::with(kept(None, false));
    let (mut admin, mut first) = bench.host(&bench.a, NONE);
    assert_eq!(register(&mut first, 0, 0, 10), 0);
    assert!(record.lock().unwrap().is_empty(), "not to persist");
    let persistence = |set: u8, on: u32| command(set, 0x5a, 0, [0x83, on, 0]);
    assert_eq!(admin.run(persistence(0x0a, 0), &[]).1.result, 0);
    assert_eq!(admin.status(persistence(0x09, 1)), 0);
    assert_eq!(admin.run(persistence(0x0a, 0), &[]).1.result, 1);
    assert_eq!(acquire(&mut first, 0, 2, 10, 0), 0);
    let (page, _) = admin.run(command(6, 0x5a, 4096, [0, 0, 0]), &[]);
    assert_eq!(page[31], 0xff, "RESCAP: all types, and PTPL");

    // A restart: the other host is kept out at once.
    let bytes = record.lock().unwrap().clone();
    let bench = Bench::with(kept(Some(&bytes), false));
    let (_admin, mut first) = bench.host(&bench.a, NONE);
    let (_admin, mut second) = bench.host(&bench.b, NONE);
    assert_eq!(second.status(read(0, 1)), CONFLICT);
    assert_eq!(first.status(read(0, 1)), 0);
    // CPTPL 10b: from now on it does not persist.
    assert_eq!(register(&mut first, 2 << 30, 0, 10), 0);
    let bytes = record.lock().unwrap().clone();
    let bench = Bench::with(kept(Some(&bytes), false));
    let (_admin, mut second) = bench.host(&bench.b, NONE);
    assert_eq!(second.status(read(0, 1)), 0);

    // What cannot be kept has not happened.
    let bench = Bench::with(kept(None, true));
    let (_admin, mut first) = bench.host(&bench.a, NONE);
    assert_eq!(register(&mut first, 3 << 30, 0, 10), 0x4006);
    assert_eq!(acquire(&mut first, 0, 2, 10, 0), CONFLICT, "not registered");
    assert!(Reservations::kept(Box::new(Kept(record, false)), Some(b"x")).is_err());
}

#[test]
fn a_shutdown_flushes_and_completes() {
    let bench = Bench::new();
    let (mut admin, mut io) = bench.host(&bench.a, NONE);
    io.run(small_write(0), &[1; BYTES]);
    assert_eq!(admin.status(property(true, 0x14, 0x0046_4001)), 0);
    let (_, status) = admin.run(property(false, 0x1c, 0), &[]);
    assert_eq!(status.result, 0b1001, "ready, shutdown complete");
}

#[test]
fn a_hosts_behavior_is_kept() {
    let bench = Bench::new();
    let (mut admin, _io) = bench.host(&bench.a, NONE);
    let mut data = vec![0; 512];
    data[0] = 1;
    assert_eq!(
        admin.run(command(9, 1, 512, [0x16, 0, 0]), &data).1.status,
        0
    );
    assert_eq!(
        admin.run(command(0x0a, 0x5a, 512, [0x16, 0, 0]), &[]).0,
        data
    );
    // The same by R2T.
    admin.send(command(9, 0x5a, 512, [0x16, 0, 0]), &[]);
    let asked = admin.answer().data_header();
    data[0] = 0;
    admin.send_data(asked, true, &data);
    assert_eq!(admin.answer().completion().status, 0);
    assert_eq!(
        admin.run(command(0x0a, 0x5a, 512, [0x16, 0, 0]), &[]).0,
        data
    );
}

//! Connect's refusals, one by one, and PDUs that have no place.

use std::sync::Arc;

use super::bench_for_tests::*;
use super::subsystem::LOOK;
use super::wire::{self, Digests, Flaw, Kind};
use crate::reactor::End;

/// A Connect of the admin queue of export `a`: the entry and its data.
fn connect(bench: &Bench) -> ([u8; 64], Vec<u8>) {
    let mut entry = command(0x7f, 0x01, 1024, [0; 3]);
    entry[4] = 1;
    entry[44] = 31;
    let mut data = vec![0; 1024];
    data[..16].copy_from_slice(bench.a.host().id.as_bytes());
    data[16..18].copy_from_slice(&[0xff; 2]);
    data[256..266].copy_from_slice(b"nqn.test:a");
    data[512..522].copy_from_slice(b"nqn.host:1");
    (entry, data)
}

#[test]
fn each_bad_parameter_is_named() {
    type Change = fn(&mut [u8; 64], &mut Vec<u8>);
    let cases: [(&str, Change, (u16, u64)); 15] = [
        ("record format", |e, _| e[40] = 1, (0x4180, 0)),
        ("a queue of one entry", |e, _| e[44] = 0, (0x4182, 44)),
        ("a queue beyond MQES", |e, _| e[44] = 128, (0x4182, 44)),
        (
            "no such queue, no controller",
            |e, _| e[42] = 1,
            (0x4182, 0x1_0010),
        ),
        (
            "a controller chosen by the host",
            |_, d| d[17] = 0,
            (0x4182, 0x1_0010),
        ),
        ("no subsystem", |_, d| d[256] = 0, (0x4182, 0x1_0100)),
        (
            "no end of the subsystem",
            |_, d| d[256..512].fill(b'x'),
            (0x4182, 0x1_0100),
        ),
        ("no text", |_, d| d[257] = 0xff, (0x4182, 0x1_0100)),
        ("no host", |_, d| d[512] = 0, (0x4182, 0x1_0200)),
        ("another host", |_, d| d[521] = b'2', (0x4184, 0)),
        ("another identifier", |_, d| d[0] = 9, (0x4184, 0)),
        ("an unknown subsystem", |_, d| d[265] = b'x', (0x181, 0)),
        ("data elsewhere", |e, _| e[39] = 0x5a, (0x4011, 0)),
        ("less data", |_, d| d.truncate(1020), (0x400f, 0)),
        ("another command", |e, _| e[4] = 4, (0x400c, 0)),
    ];
    for (what, change, expected) in cases {
        let bench = Bench::new();
        let mut wire = bench.open();
        wire.agree(NONE);
        let (mut entry, mut data) = connect(&bench);
        change(&mut entry, &mut data);
        let (_, done) = wire.run(entry, &data);
        assert_eq!((done.status, done.result), expected, "{what}");
        assert!(bench.metrics().contains("refused_connects_total"), "{what}");
        assert_eq!(
            wire.end(),
            None,
            "the host closes, and has read why by then"
        );
        // Whatever it sends now is dropped.
        wire.raw(&[0xff; 64]);
        assert_eq!((wire.end(), wire.answers.len()), (None, 0));
    }
}

#[test]
fn an_io_queue_needs_an_enabled_association_of_the_same_host() {
    let bench = Bench::new();
    let mut admin = bench.open();
    admin.agree(NONE);
    let controller = admin.connect(&bench.a, 0, 0xffff, 0).result as u16;
    let io = |of, queue, controller| {
        let mut io = bench.open();
        io.agree(NONE);
        io.connect(of, queue, controller, 0)
    };
    assert_eq!(io(&bench.a, 1, controller).status, 0x400c, "not enabled");
    assert_eq!(admin.status(property(true, 0x14, 0x0046_0001)), 0);
    assert_eq!(
        io(&bench.b, 1, controller).status,
        0x4182,
        "another's controller"
    );
    let unknown = io(&bench.a, 17, controller);
    assert_eq!((unknown.status, unknown.result), (0x4182, 42));
    assert_eq!(io(&bench.a, 16, controller).status, 0);
    // A queue whose connection has ended is not connected again: its commands
    // would be replayed beside those that are still under way.
    // Not for good: it may connect anew, with all of its queues.
    assert_eq!(io(&bench.a, 16, controller).status, 0x000c);
}

#[test]
fn a_connect_whose_data_is_damaged_may_be_tried_again() {
    let bench = Bench::new();
    let mut wire = bench.open();
    let digests = Digests {
        header: false,
        data: true,
    };
    wire.agree(digests);
    let (entry, data) = connect(&bench);
    let mut pdu = wire::common(Kind::CapsuleCmd, 0, digests, 1024).to_vec();
    pdu.extend_from_slice(&entry);
    pdu.extend_from_slice(&data);
    pdu.extend_from_slice(&[1, 2, 3, 4]);
    wire.raw(&pdu);
    assert_eq!(wire.answer().completion().status, 0x22);
}

/// Every kind of PDU where it has no place: FES 2, at its type.
#[test]
fn pdus_out_of_place_end_the_connection() {
    let before = [Kind::CapsuleCmd, Kind::H2CData];
    let never = [Kind::IcResp, Kind::CapsuleResp, Kind::C2HData, Kind::R2T];
    let whole = |kind: Kind| {
        let data = matches!(kind, Kind::H2CData | Kind::C2HData);
        let mut pdu = wire::common(kind, 0, NONE, if data { 4 } else { 0 }).to_vec();
        pdu.resize(usize::from(kind.header()) + if data { 4 } else { 0 }, 0);
        pdu
    };
    let terminated = |wire: &mut Wire| {
        let answer = wire.answer();
        assert_eq!(answer.kind, Kind::C2HTermReq);
        assert_eq!(wire.end(), Some(&End::Protocol("malformed PDU")));
        (
            wire::u16_at(&answer.header, 8),
            wire::u32_at(&answer.header, 10),
        )
    };
    let bench = Bench::new();
    for kind in before.into_iter().chain(never) {
        let mut wire = bench.open();
        wire.raw(&whole(kind));
        assert_eq!(terminated(&mut wire), (2, 0), "{kind:?} before ICReq");
    }
    for kind in never.into_iter().chain([Kind::IcReq]) {
        let (_admin, mut io) = bench.host(&bench.a, NONE);
        io.raw(&whole(kind));
        assert_eq!(terminated(&mut io), (2, 0), "{kind:?} while it serves");
    }
    let mut wire = bench.open();
    wire.agree(NONE);
    wire.raw(&whole(Kind::H2CData));
    assert_eq!(terminated(&mut wire), (2, 0), "data before Connect");
    let counted = format!(r#"reason="{}"}} 12"#, Flaw::Sequence.name());
    assert!(bench.metrics().contains(&counted), "{}", bench.metrics());

    // A version and an alignment that do not exist.
    for (at, value, expected) in [(8, 1, (6, 8)), (10, 31, (6, 10)), (11, 4, (1, 11))] {
        let mut request = whole(Kind::IcReq);
        request[at] = value;
        let mut wire = bench.open();
        wire.raw(&request);
        assert_eq!(terminated(&mut wire), expected);
    }
    // The host's own complaint is not answered.
    let mut wire = bench.open();
    wire.agree(NONE);
    wire.raw(
        &wire::common(Kind::H2CTermReq, 0, NONE, 0)
            .iter()
            .copied()
            .chain([0; 16])
            .collect::<Vec<_>>(),
    );
    assert!(wire.answers.is_empty());
    assert_eq!(wire.end(), Some(&End::Protocol("the host found an error")));
}

#[test]
fn a_header_that_is_damaged_ends_the_connection() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, BOTH);
    let mut pdu = wire::common(Kind::CapsuleCmd, 0, BOTH, 0).to_vec();
    pdu.extend_from_slice(&read(0, 1));
    pdu.extend_from_slice(&[0; 4]);
    io.raw(&pdu);
    let answer = io.answer();
    assert_eq!((answer.kind, answer.header[8]), (Kind::C2HTermReq, 3));
    assert_eq!(answer.data, pdu[..72], "it is shown what was found");
    // Padding of a whole dword is skipped, as the specification has it.
    let (_admin, mut io) = bench.host(&bench.b, NONE);
    let mut pdu = wire::common(Kind::CapsuleCmd, 0, NONE, 4096).to_vec();
    pdu[3] += 8;
    pdu[4] += 8;
    pdu.extend_from_slice(&small_write(1));
    pdu.extend_from_slice(&[0xee; 8]);
    pdu.extend_from_slice(&[3; BYTES]);
    io.raw(&pdu);
    let done = io.answer().completion();
    assert_eq!(done.status, 0);
    io.answers.clear();
    assert_eq!(io.run(read(1, 1), &[]).0, vec![3; BYTES]);
}

#[test]
fn nothing_is_left_of_hosts_that_vanish() {
    let bench = Bench::new();
    let device = Arc::downgrade(&bench.device);
    let subsystems = [&bench.a, &bench.b].map(Arc::downgrade);
    let mut controllers = Vec::new();
    for _ in 0..3 {
        let (mut admin, mut io) = bench.host(&bench.a, NONE);
        controllers.push(Arc::downgrade(&bench.a.current().unwrap()));
        io.inline.hold(true);
        io.send(small_write(1), &[1; BYTES]);
        assert_eq!(io.inline.held(), 1);
        // One says goodbye and one does not; neither waits for its command.
        admin.inline.close();
        drop(admin);
        assert!(bench.a.current().is_some(), "its I/O queue is connected");
        drop(io);
    }
    assert!(bench.a.current().is_none());
    assert!(controllers.iter().all(|one| one.upgrade().is_none()));
    drop(bench);
    assert!(subsystems.iter().all(|one| one.upgrade().is_none()));
    assert!(device.upgrade().is_none());
}

#[test]
fn who_vanished_still_keeps_its_successor_waiting() {
    let bench = Bench::new();
    let hosts = bench.host(&bench.a, NONE);
    // A command at the device, which outlives its connection.
    let inside = bench.a.current().unwrap().gate().enter();
    drop(hosts);
    assert!(bench.a.current().is_none(), "nobody is connected");
    let mut next = bench.open();
    next.agree(NONE);
    next.send_connect(&bench.a, 0, 0xffff, 0);
    assert!(next.answers.is_empty(), "its command has not settled");
    drop(inside);
    next.wait(LOOK);
    assert_eq!(next.answer().completion().status, 0);
}

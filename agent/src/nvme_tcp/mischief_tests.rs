//! What a host can do wrong: each of it is counted, said once, and nobody
//! else's concern.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::bench_for_tests::*;
use super::queue::DATA_STALLED;
use super::wire::{self, Data, IN_CAPSULE, Kind, MAX_H2C_DATA};

/// What was logged, a line each.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is logged, at the level that drover has where nothing is said of it,
/// while something is done.
fn logged(act: impl FnOnce()) -> Vec<String> {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, act);
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// A host of export `a`, its admin queue and its I/O queue, and what it does.
type Mischief = fn(&Bench, &mut Wire, &mut Wire);

fn raw(bytes: [u8; 8]) -> Vec<u8> {
    let mut pdu = bytes.to_vec();
    pdu.resize(128, 0);
    pdu
}

/// Each, with the metric that counts it; the number is of those per turn.
const ALL: [(&str, Mischief, &str); 13] = [
    (
        "a field that cannot be",
        |_, _, io| io.raw(&raw([4, 0, 24, 0, 24, 0, 0, 0])),
        r#"malformed_pdus_total{reason="header-field"}"#,
    ),
    (
        "a PDU that has no place",
        |_, _, io| io.raw(&wire::ic_resp(NONE)),
        r#"malformed_pdus_total{reason="sequence"}"#,
    ),
    (
        "a capsule that is too long",
        |_, _, io| {
            io.raw(&raw(wire::common(
                Kind::CapsuleCmd,
                0,
                NONE,
                IN_CAPSULE + 4,
            )))
        },
        r#"malformed_pdus_total{reason="too-long"}"#,
    ),
    (
        "too much data",
        |_, _, io| io.raw(&raw(wire::common(Kind::H2CData, 0, NONE, MAX_H2C_DATA + 4))),
        r#"malformed_pdus_total{reason="too-long"}"#,
    ),
    (
        "data in the wrong place",
        |_, _, io| {
            io.send(write(0, 4), &[]);
            let asked = io.answer().data_header();
            let header = Data {
                offset: 4096,
                length: 4096,
                ..asked
            };
            io.send_data(header, false, &[1; BYTES]);
        },
        r#"malformed_pdus_total{reason="out-of-range"}"#,
    ),
    (
        "a version that there is not",
        |bench, _, _| {
            let mut pdu = raw(wire::common(Kind::IcReq, 0, NONE, 0));
            pdu[8] = 1;
            bench.open().raw(&pdu);
        },
        r#"malformed_pdus_total{reason="unsupported"}"#,
    ),
    (
        "a header that is damaged",
        |bench, _, _| {
            let mut wire = bench.open();
            wire.agree(BOTH);
            wire.raw(&raw(wire::common(Kind::CapsuleCmd, 0, BOTH, 0)));
        },
        r#"malformed_pdus_total{reason="header-digest"}"#,
    ),
    (
        "more commands than there is room for",
        |_, _, io| (0..33).for_each(|_| _ = io.send(write(0, 4), &[])),
        r#"malformed_pdus_total{reason="sequence"}"#,
    ),
    (
        "an error that the host found",
        |_, _, io| {
            let mut pdu = wire::common(Kind::H2CTermReq, 0, NONE, 0).to_vec();
            pdu.resize(24, 0);
            io.raw(&pdu);
        },
        "terminations_by_hosts_total",
    ),
    (
        "a Connect of a stranger",
        |bench, _, _| {
            let mut wire = bench.open();
            wire.agree(NONE);
            assert_eq!(wire.connect(&bench.b, 1, 7, 0).status, 0x4182);
        },
        r#"refused_connects_total{reason="invalid"}"#,
    ),
    (
        "blocks that there are not",
        |_, _, io| assert_eq!(io.status(read(BLOCKS as u32, 1)), 0x4080),
        r#"commands_total{opcode="read",result="invalid"}"#,
    ),
    (
        "silence",
        |_, admin, _| {
            let mut set = command(9, 0x5a, 0, [0x0f, 1000, 0]);
            set[4] = 0;
            assert_eq!(admin.status(set), 0);
            admin.wait(Duration::from_secs(5));
            assert!(admin.end().is_some());
        },
        r#"commands_total{opcode="set-features",result="success"}"#,
    ),
    (
        "data that does not come",
        |_, _, io| {
            io.send(write(0, 4), &[]);
            io.wait(DATA_STALLED);
            assert!(io.end().is_some());
        },
        r#"commands_total{opcode="fabrics",result="success"}"#,
    ),
];

fn count(bench: &Bench, metric: &str) -> u64 {
    let metrics = bench.metrics();
    let line = metrics.lines().find(|line| line.contains(metric));
    line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

#[test]
fn it_is_counted_and_said_once_and_nobody_elses_concern() {
    const TURNS: u64 = 4;
    for (what, mischief, metric) in ALL {
        let bench = Bench::new();
        let (mut admin, mut witness) = bench.host(&bench.b, NONE);
        let before = count(&bench, metric);
        let lines = logged(|| {
            for _ in 0..TURNS {
                let (mut admin, mut io) = bench.host(&bench.a, NONE);
                mischief(&bench, &mut admin, &mut io);
            }
        });
        assert!(
            count(&bench, metric) >= before + TURNS,
            "{what}: {}",
            bench.metrics()
        );
        let said = lines.iter().filter(|line| line.contains("WARN")).count();
        assert!((1..=2).contains(&said), "{what}: {lines:#?}");
        let connected = lines.iter().filter(|line| line.contains("connected"));
        assert!(connected.count() <= 1, "{what}: {lines:#?}");
        // The other host's connections go on as if nothing had happened.
        assert_eq!(witness.status(read(0, 1)), 0, "{what}");
        assert_eq!(admin.status(property(false, 0x1c, 0)), 0, "{what}");
        assert_eq!((admin.end(), witness.end()), (None, None), "{what}");
        // And the host itself may come again.
        let (_admin, mut io) = bench.host(&bench.a, NONE);
        assert_eq!(io.status(read(0, 1)), 0, "{what}");
    }
}

#[test]
fn damaged_data_by_r2t_is_not_written() {
    let bench = Bench::new();
    let (_admin, mut io) = bench.host(&bench.a, BOTH);
    io.send(write(0, 2), &[]);
    let asked = io.answer().data_header();
    // The first half is sound, the second is not; the command fails as a whole.
    let half = Data {
        length: 4096,
        ..asked
    };
    io.send_data(half, false, &[1; BYTES]);
    let behind = Data {
        offset: 4096,
        ..half
    };
    let common = wire::common(Kind::H2CData, wire::FLAG_LAST, BOTH, 4096);
    let mut pdu = behind.encode(common).to_vec();
    pdu.extend_from_slice(&crc32c::crc32c(&pdu.clone()).to_le_bytes());
    pdu.extend_from_slice(&[1; BYTES]);
    pdu.extend_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
    io.raw(&pdu);
    assert_eq!(io.answer().completion().status, 0x22, "may be tried again");
    assert_eq!(io.run(read(0, 2), &[]).0, [0; 2 * BYTES]);
    assert_eq!(io.end(), None);
    assert_eq!(
        count(&bench, r#"commands_total{opcode="write",result="digest"}"#),
        1
    );
}

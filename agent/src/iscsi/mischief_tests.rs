//! What an initiator can do wrong: each of it is counted, said once, and
//! nobody else's concern.

use std::io;
use std::sync::Mutex;

use super::*;

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

/// What is warned of while something is done.
fn warned(act: impl FnOnce()) -> Vec<String> {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, act);
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// A request's header.
fn header(one: &Initiator, opcode: u8, flags: u8) -> [u8; BHS] {
    let mut header = [0; BHS];
    (header[0], header[1], header[19]) = (opcode, flags, 9);
    header[20..24].fill(0xff);
    header[24..28].copy_from_slice(&one.number.to_be_bytes());
    header
}

fn send(one: &mut Initiator, opcode: u8, flags: u8, data: &[u8]) {
    let header = header(one, opcode, flags);
    one.send(header, data);
}

type Mischief = fn(&mut Initiator);

/// Each, with the reason that it is counted by.
const ALL: [(&str, Mischief, &str); 8] = [
    (
        "an opcode that there is not",
        |one| send(one, 0x5c, 0x80, &[]),
        "opcode",
    ),
    (
        "a login of who has logged in",
        |one| send(one, 0x43, 0x87, &[]),
        "phase",
    ),
    (
        "more than may be sent at once",
        |one| {
            let mut header = header(one, 0x40, 0x80);
            header[5..8].fill(0xff);
            one.line.send(&header);
        },
        "too-long",
    ),
    (
        "a logout for no reason",
        |one| send(one, 0x46, 0x83, &[]),
        "field",
    ),
    (
        "text that is none",
        |one| send(one, 0x44, 0x80, b"none"),
        "text",
    ),
    (
        "a request for what was sent",
        |one| send(one, 0x10, 0x80, &[]),
        "snack",
    ),
    (
        "a command ahead of its turn",
        |one| {
            one.number += 5;
            one.ready();
        },
        "order",
    ),
    (
        "a tag that is in use",
        |one| {
            one.write(0, 4, &[]);
            one.tag -= 1;
            one.write(0, 4, &[]);
        },
        "tag-in-use",
    ),
];

fn count(metrics: &Metrics, reason: &str) -> u64 {
    let mut registry = prometheus_client::registry::Registry::default();
    metrics.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let name = format!("malformed_pdus_total{{reason=\"{reason}\"}}");
    let line = text.lines().find(|line| line.contains(&name));
    line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

#[test]
fn it_is_counted_and_said_once_and_nobody_elses_concern() {
    const TURNS: u64 = 4;
    for (what, mischief, reason) in ALL {
        let device = MemoryDevice::new(64);
        let served = Arc::clone(&device) as Arc<dyn crate::block::BlockDevice>;
        let target = target(served, None, None, 4);
        let metrics = Metrics::default();
        let directory = Arc::new(OneTarget(Arc::clone(&target)));
        let shared = Shared::new(directory, metrics.clone());
        let session = |isid| {
            let address = ([127, 0, 0, 1], 3260).into();
            let protocol = Iscsi::new(Arc::clone(&shared), address, address, None, Instant::now());
            let mut one = Initiator::of(&target, &device, isid);
            one.line = Inline::new(Box::new(protocol));
            assert_eq!(only(one.log_in(OPEN)).word(36) >> 16, 0, "{what}");
            one
        };
        let mut witness = session(1);
        let lines = warned(|| (0..TURNS).for_each(|_| mischief(&mut session(2))));
        assert!(count(&metrics, reason) >= TURNS, "{what}");
        assert_eq!(lines.len(), 1, "{what}: {lines:#?}");
        assert_eq!(
            only(witness.write(1, 1, &[7; BLOCK_LENGTH])).status(),
            0,
            "{what}"
        );
        assert_eq!(only(witness.read(1, 1)).data, [7; BLOCK_LENGTH], "{what}");
        assert!(witness.line.end().is_none(), "{what}");
        // And the initiator itself may come again.
        assert_eq!(
            only(session(2).read(1, 1)).data,
            [7; BLOCK_LENGTH],
            "{what}"
        );
    }
}

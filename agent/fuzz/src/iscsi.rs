//! iSCSI initiators for the fuzzer: one target, and as many sessions as an
//! input opens.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use drover::iscsi::chap::{self, Algorithm, Credentials};
use drover::iscsi::connection::{Iscsi, Shared};
use drover::iscsi::metrics::Metrics;
use drover::iscsi::scsi::inquiry::Identity;
use drover::iscsi::target::{Access, Directory, Found, Spec, Target};
use drover::iscsi::text;
use drover::iscsi::unit::Unit;
use drover::reactor::inline::Inline;
use uuid::Uuid;

use crate::{Input, Memory};

const TARGET: &str = "iqn.2026-11.io.drover:fuzz:1:a";
const INITIATOR: &str = "iqn.2026-11.org.example:fuzz";
const SECRETS: [&str; 2] = ["a secret of some length", "another secret of that kind"];
/// Connections at once.
const MOST: usize = 4;

struct One(Arc<Target>);

impl Directory for One {
    fn find(&self, target: &str) -> Found {
        match target {
            TARGET => Found::Live(Arc::clone(&self.0)),
            name if name.ends_with("closed") => Found::Closed,
            _ => Found::Unknown,
        }
    }

    fn visible(&self, initiator: &str) -> Vec<String> {
        let visible = self.0.access(initiator).map(|_| TARGET.to_owned());
        visible.into_iter().collect()
    }
}

/// A target, its initiators, and what of it must be gone in the end.
pub struct Scene {
    shared: Arc<Shared>,
    target: Arc<Target>,
    lines: Vec<Line>,
    at: usize,
    held: bool,
    device: Weak<Memory>,
}

impl Scene {
    /// Nobody is connected. With `proof`, initiators must prove who they are.
    pub fn new(proof: bool) -> Self {
        let device = Arc::new(Memory::default());
        let identity = Identity {
            uuid: Uuid::from_u128(7),
            target: TARGET.to_owned(),
        };
        let unit = Unit::new(Arc::clone(&device) as Arc<_>, identity, false, None);
        let unit = unit.expect("nothing is kept of reservations");
        let credentials = |number: usize| Credentials {
            name: ["in", "out"][number].to_owned(),
            secret: SECRETS[number].to_owned(),
        };
        let spec = Spec {
            name: TARGET.to_owned(),
            access: vec![Access {
                initiator: INITIATOR.to_owned(),
                incoming: proof.then(|| credentials(0)),
                outgoing: proof.then(|| credentials(1)),
            }],
            max_sessions: 3,
        };
        let target = Target::new(spec, unit);
        Self {
            shared: Shared::new(Arc::new(One(Arc::clone(&target))), Metrics::default()),
            target,
            lines: Vec::new(),
            at: 0,
            held: false,
            device: Arc::downgrade(&device),
        }
    }

    /// A new connection, which is the one that operations are on from now on.
    pub fn open(&mut self) -> &mut Line {
        if self.lines.len() >= MOST {
            self.lines.remove(0);
        }
        let peer = ([127, 0, 0, 1], 1).into();
        let portal = ([127, 0, 0, 1], 3260).into();
        let shared = Arc::clone(&self.shared);
        let mut inline = Inline::new(Box::new(Iscsi::new(
            shared,
            peer,
            portal,
            None,
            Instant::now(),
        )));
        inline.hold(self.held);
        self.lines.push(Line {
            inline,
            digests: (false, false),
            number: 1,
            tag: 1,
            asked: VecDeque::new(),
            rest: Vec::new(),
            text: Vec::new(),
            framed: true,
            agreed: false,
        });
        self.at = self.lines.len() - 1;
        &mut self.lines[self.at]
    }

    /// Does what the input says, then lets all settle and all go.
    pub fn play(mut self, input: &mut Input) {
        while !input.is_empty() {
            self.operation(input);
        }
        self.release();
        let unit = Arc::downgrade(self.target.unit());
        let target = Arc::downgrade(&self.target);
        let sessions = self.target.unit().sessions();
        let gates: Vec<_> = sessions.iter().map(|one| Arc::clone(one.gate())).collect();
        let sessions: Vec<_> = sessions
            .into_iter()
            .map(|one| Arc::downgrade(&one))
            .collect();
        let device = self.device.clone();
        assert_eq!(self.target.gate().inside(), 0, "all has settled");
        drop(self);
        assert!(
            gates.iter().all(|gate| gate.inside() == 0),
            "all has settled"
        );
        assert!(
            sessions.iter().all(|one| one.upgrade().is_none()),
            "a session is left"
        );
        assert!(
            target.upgrade().is_none() && unit.upgrade().is_none(),
            "the unit is left"
        );
        assert!(device.upgrade().is_none(), "the device is left");
    }

    fn release(&mut self) {
        self.held = false;
        for line in &mut self.lines {
            line.inline.hold(false);
            line.wait(Duration::ZERO);
        }
    }

    fn operation(&mut self, input: &mut Input) {
        if self.lines.is_empty() {
            self.open();
        }
        match input.byte() % 20 {
            12 => self.at = usize::from(input.byte()) % self.lines.len(),
            13 => {
                let kind = input.byte();
                // Commands that exclude each other wait for those of others:
                // nobody else would let them go.
                self.release();
                let line = self.open();
                if kind & 8 == 0 {
                    line.log_in(kind & 3, (kind & 16 != 0, kind & 32 != 0));
                }
            }
            14 => {
                let at = self.at.min(self.lines.len() - 1);
                if input.byte() & 1 == 0 {
                    self.lines[at].inline.close();
                }
                drop(self.lines.remove(at));
            }
            15 if self.lines.len() == 1 => {
                self.held = !self.held;
                self.lines[0].inline.hold(self.held);
                if !self.held {
                    self.release();
                }
            }
            15 => self.release(),
            16 => match input.byte() % 5 {
                0 => self.target.unit().announce_resize(),
                1 => _ = self.target.gate().close(),
                2 => {
                    self.target.gate().close();
                    self.target.take_away();
                }
                3 => self.target.disconnect(),
                _ => self.target.unit().reset(),
            },
            17 => {
                let time = Duration::from_millis(u64::from(input.byte()) * 100);
                self.lines.iter_mut().for_each(|line| line.wait(time));
            }
            number => {
                self.at = self.at.min(self.lines.len() - 1);
                self.lines[self.at].operation(number, input);
            }
        }
    }
}

/// An initiator's end of one connection.
pub struct Line {
    inline: Inline,
    digests: (bool, bool),
    number: u32,
    tag: u32,
    /// Task, transfer tag, offset and length of what was asked for.
    asked: VecDeque<[u32; 4]>,
    rest: Vec<u8>,
    /// The text of the last login or text response.
    text: Vec<u8>,
    /// Whether what comes back can be taken apart.
    framed: bool,
    agreed: bool,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes[at..].first_chunk().expect("a whole header");
    u32::from_be_bytes(*word)
}

impl Line {
    fn raw(&mut self, bytes: &[u8]) {
        let came = self.inline.send(bytes);
        self.take(&came);
    }

    fn wait(&mut self, time: Duration) {
        let came = self.inline.wait(time);
        self.take(&came);
    }

    /// Takes apart what came, all of which must be well-formed.
    fn take(&mut self, came: &[u8]) {
        if !self.framed {
            return;
        }
        self.rest.extend_from_slice(came);
        let mut rest = std::mem::take(&mut self.rest);
        while rest.len() >= 48 {
            let (head, data) = self.digests;
            let length = (word(&rest, 4) & 0xff_ffff) as usize;
            let at = 48 + if head { 4 } else { 0 };
            let padded = length.next_multiple_of(4);
            let whole = at + padded + if data && length > 0 { 4 } else { 0 };
            if rest.len() < whole {
                break;
            }
            let pdu: Vec<u8> = rest.drain(..whole).collect();
            if head {
                assert_eq!(pdu[48..at], crc32c::crc32c(&pdu[..48]).to_le_bytes());
            }
            let bytes = &pdu[at..at + length];
            if data && length > 0 {
                let digest = crc32c::crc32c(&pdu[at..at + padded]).to_le_bytes();
                assert_eq!(pdu[at + padded..], digest);
            }
            assert_eq!(pdu[4], 0, "no additional headers are said");
            match pdu[0] & 0x3f {
                0x31 => {
                    let fields = [16, 20, 40, 44].map(|at| word(&pdu, at));
                    assert!(fields[3] > 0);
                    self.asked.push_back(fields);
                }
                0x23 => {
                    assert!(length <= 8192, "a login's text is as long as it may be");
                    self.text = bytes.to_vec();
                }
                0x24 => self.text = bytes.to_vec(),
                0x20 | 0x21 | 0x22 | 0x25 | 0x26 | 0x32 | 0x3f => {}
                other => panic!("a target says {other:#x}"),
            }
        }
        self.rest = rest;
    }

    fn pdu(&mut self, mut header: [u8; 48], data: &[u8]) {
        let length = u32::try_from(data.len())
            .expect("a few bytes")
            .to_be_bytes();
        header[4] = 0;
        header[5..8].copy_from_slice(&length[1..]);
        let mut pdu = header.to_vec();
        if self.digests.0 {
            pdu.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
        }
        let mut padded = data.to_vec();
        padded.resize(data.len().next_multiple_of(4), 0);
        pdu.extend_from_slice(&padded);
        if self.digests.1 && !data.is_empty() {
            pdu.extend_from_slice(&crc32c::crc32c(&padded).to_le_bytes());
        }
        self.raw(&pdu);
    }

    /// A request's header: opcode and flags, its tag and the next number.
    fn request(&mut self, opcode: u8, flags: u8) -> [u8; 48] {
        let mut header = [0; 48];
        (header[0], header[1]) = (opcode, flags);
        self.tag = self.tag.wrapping_add(1);
        header[16..20].copy_from_slice(&self.tag.to_be_bytes());
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        if opcode & 0x40 == 0 {
            self.number = self.number.wrapping_add(1);
        }
        header
    }

    /// A login request of this initiator port.
    fn login(&mut self, port: u8, flags: u8, text: &[u8]) {
        let mut header = [0; 48];
        (header[0], header[1]) = (0x43, flags);
        (header[8], header[13]) = (0x80, port);
        header[16] = 1;
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        self.pdu(header, text);
    }

    /// Logs in to a normal session, as far as its name is enough.
    pub fn log_in(&mut self, port: u8, (head, data): (bool, bool)) {
        let digest = |on| if on { "CRC32C" } else { "None" };
        let keys = [
            ("InitiatorName", INITIATOR),
            ("TargetName", TARGET),
            ("SessionType", "Normal"),
            ("AuthMethod", "None"),
            ("InitialR2T", "No"),
            ("ImmediateData", "Yes"),
            ("MaxRecvDataSegmentLength", "8192"),
            ("MaxBurstLength", "65536"),
            ("FirstBurstLength", "8192"),
            ("HeaderDigest", digest(head)),
            ("DataDigest", digest(data)),
        ];
        let mut text = Vec::new();
        keys.iter()
            .for_each(|(key, value)| text::put(&mut text, key, value));
        self.text.clear();
        self.login(port, 0x87, &text);
        let pairs = text::parse(&self.text).expect("what is said is text");
        if text::value(&pairs, "DataDigest").is_some() {
            (self.digests, self.agreed) = ((head, data), true);
        }
    }

    fn operation(&mut self, number: u8, input: &mut Input) {
        match number {
            0 => {
                let length = input.byte().into();
                let bytes = input.take(length);
                // A login that agrees on digests may be among them.
                self.framed &= self.agreed;
                self.raw(bytes);
            }
            // A PDU as the fuzzer made it.
            1 => {
                let header = input.filled();
                self.framed &= self.agreed;
                let length = usize::from(input.byte()) * 5;
                self.pdu(header, input.take(length));
            }
            // A SCSI command as the fuzzer made it, in its turn.
            2 => {
                let mut header = self.request(0x01, 0);
                header[1] = input.byte();
                header[20..24].copy_from_slice(&(u32::from(input.byte()) * 256).to_be_bytes());
                header[32..].copy_from_slice(&input.filled::<16>());
                let length = usize::from(input.byte()) * 33;
                self.pdu(header, input.take(length));
            }
            // One that reads or writes blocks.
            3..=5 => self.blocks(number, input),
            // One with a parameter list, or that asks for parameter data.
            6 | 7 => self.parameters(input),
            // What was asked for, whole or in pieces.
            8 | 9 => {
                let Some([task, transfer, offset, length]) = self.asked.pop_front() else {
                    return;
                };
                let piece = if number == 8 {
                    8192
                } else {
                    (1 + u32::from(input.byte())) * 64
                };
                let (fill, mut done, mut sequence) = (input.byte(), 0u32, 0u32);
                while done < length && self.inline.end().is_none() {
                    let some = piece.min(length - done);
                    let mut header = [0; 48];
                    header[0] = 0x05;
                    header[1] = if done + some == length { 0x80 } else { 0 };
                    header[16..20].copy_from_slice(&task.to_be_bytes());
                    header[20..24].copy_from_slice(&transfer.to_be_bytes());
                    header[36..40].copy_from_slice(&sequence.to_be_bytes());
                    header[40..44].copy_from_slice(&(offset + done).to_be_bytes());
                    self.pdu(header, &vec![fill; some as usize]);
                    (done, sequence) = (done + some, sequence + 1);
                }
            }
            // Task management, of the last task or any.
            10 => {
                let mut header = self.request(0x42, 0);
                header[1] = 0x80 | input.byte() % 10;
                let back = u32::from(input.byte());
                let referenced = self.tag.wrapping_sub(1 + back);
                header[20..24].copy_from_slice(&referenced.to_be_bytes());
                self.pdu(header, &[]);
            }
            // Text, ping, logout.
            11 => {
                let kind = input.choose(&[0x04, 0x04, 0x00, 0x06]);
                let mut header = self.request(kind | input.choose(&[0, 0x40]), 0x80);
                header[20..24].fill(0xff);
                if kind == 0x06 {
                    header[1] |= input.byte() % 4;
                }
                let length = input.byte().into();
                self.pdu(header, input.take(length));
            }
            // A login's step, of keys that make sense or any.
            18 => {
                let flags = input.choose(&[0x81, 0x01, 0x87, 0x83, 0x00, 0x40, 0x84, 0x04]);
                let (port, count) = (input.byte() & 3, input.byte() % 8);
                let mut text = Vec::new();
                for _ in 0..count {
                    self.key(&mut text, input);
                }
                self.framed &= self.agreed || !text.windows(6).any(|part| part == b"CRC32C");
                self.login(port, flags, &text);
            }
            _ => {
                let length = input.byte().into();
                self.framed &= self.agreed;
                self.login(0, input.byte(), input.take(length));
            }
        }
    }

    fn key(&mut self, text: &mut Vec<u8>, input: &mut Input) {
        let keys = [
            ("InitiatorName", INITIATOR),
            ("TargetName", TARGET),
            ("TargetName", "iqn.closed"),
            ("SessionType", "Discovery"),
            ("AuthMethod", "CHAP,None"),
            ("CHAP_A", "7,5"),
            ("HeaderDigest", "CRC32C,None"),
            ("MaxRecvDataSegmentLength", "512"),
            ("MaxBurstLength", "0x200"),
            ("DefaultTime2Wait", "2"),
            ("X-com.example.key", "1"),
        ];
        let which = usize::from(input.byte()) % (keys.len() + 2);
        if let Some((key, value)) = keys.get(which) {
            text::put(text, key, value);
        } else if which == keys.len() {
            self.respond(text, input);
        } else {
            let length = usize::from(input.byte() % 32);
            text.extend_from_slice(input.take(length));
            text.push(0);
        }
    }

    /// Answers a challenge as the secret has it, and challenges in turn.
    fn respond(&self, text: &mut Vec<u8>, input: &mut Input) {
        let Ok(pairs) = text::parse(&self.text) else {
            return;
        };
        let value = |key| text::value(&pairs, key);
        let algorithm = value("CHAP_A").and_then(Algorithm::choose);
        let number = value("CHAP_I").and_then(text::number);
        let challenge = value("CHAP_C").and_then(chap::decode);
        let (Some(algorithm), Some(number), Some(challenge)) = (algorithm, number, challenge)
        else {
            return;
        };
        let number = u8::try_from(number).expect("it fits a byte");
        let response = algorithm.response(number, SECRETS[0].as_bytes(), &challenge);
        text::put(text, "CHAP_N", "in");
        text::put(text, "CHAP_R", &chap::encode(&response));
        if input.byte() & 1 == 1 {
            text::put(text, "CHAP_I", "9");
            text::put(text, "CHAP_C", &chap::encode(&input.filled::<16>()));
        }
    }

    fn blocks(&mut self, number: u8, input: &mut Input) {
        let opcode = input.choose(&[
            0x28, 0x88, 0x2a, 0x8a, 0x2e, 0x2f, 0x8f, 0x89, 0x93, 0x41, 0x35, 0x91, 0x34, 0x9e,
        ]);
        let (lba, count) = (input.byte() % 18, input.byte() % 5);
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        if opcode < 0x80 {
            (cdb[5], cdb[8]) = (lba, count);
        } else {
            (cdb[9], cdb[13]) = (lba, count);
        }
        cdb[1] = input.byte();
        let blocks = match opcode {
            0x28 | 0x88 | 0x2a | 0x8a | 0x2e | 0x2f | 0x8f => u32::from(count),
            0x89 => 2 * u32::from(count),
            0x93 | 0x41 => 1,
            0x9e => 0,
            _ => 0,
        };
        let reads = matches!(opcode, 0x28 | 0x88 | 0x9e);
        let expected = if opcode == 0x9e { 512 } else { blocks * 4096 };
        // Data with the command, then unasked, or none of it.
        let (flags, immediate) = match number {
            _ if reads => (0xc0, 0),
            3 => (0xa0, expected.min(8192)),
            4 => (0x20, 0),
            _ => (0xa0, 0),
        };
        let mut header = self.request(0x01, flags);
        header[20..24].copy_from_slice(&expected.to_be_bytes());
        header[32..].copy_from_slice(&cdb);
        let fill = input.byte();
        self.pdu(header, &vec![fill; immediate as usize]);
        if number == 4 && !reads && expected > 0 {
            let some = expected.min(8192);
            let mut unasked = [0; 48];
            (unasked[0], unasked[1]) = (0x05, 0x80);
            unasked[16..20].copy_from_slice(&self.tag.to_be_bytes());
            unasked[20..24].fill(0xff);
            self.pdu(unasked, &vec![fill; some as usize]);
        }
    }

    fn parameters(&mut self, input: &mut Input) {
        let opcode = input.choose(&[
            0x12, 0x1a, 0x5a, 0x15, 0x55, 0x42, 0x5e, 0x5f, 0x5f, 0xa0, 0xa3, 0x03, 0x16, 0x17,
        ]);
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        cdb[1] = input.byte();
        cdb[2] = input.byte();
        let length = match opcode {
            0x15 | 0x55 => 24,
            0x5f => 24,
            0x42 => 40,
            _ => 0,
        };
        match opcode {
            0x15 => cdb[4] = length,
            0x55 | 0x42 | 0x5f => cdb[8] = length,
            0x12 | 0x1a | 0x03 => cdb[4] = 0xff,
            0x16 | 0x17 => cdb[1..3].fill(0),
            0xa0 | 0xa3 => cdb[9] = 0xff,
            _ => cdb[8] = 0xff,
        }
        let reads = length == 0;
        let mut header = self.request(0x01, if reads { 0xc0 } else { 0xa0 });
        let expected = if reads { 0xff } else { u32::from(length) };
        header[20..24].copy_from_slice(&expected.to_be_bytes());
        header[32..].copy_from_slice(&cdb);
        let mut list = vec![0; length.into()];
        let some = usize::from(input.byte()) % 41;
        let some = input.take(some.min(list.len()));
        list[..some.len()].copy_from_slice(some);
        self.pdu(header, &list);
    }
}

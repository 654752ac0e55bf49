//! NVMe/TCP hosts for the fuzzer: two exports of one volume, a host for each,
//! and as many connections as an input opens.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use drover::nvme_tcp::auth::Secrets;
use drover::nvme_tcp::connection::{NvmeTcp, Target};
use drover::nvme_tcp::controller::Event;
use drover::nvme_tcp::dhchap::{Group, Hash};
use drover::nvme_tcp::discovery::{self, Discovery};
use drover::nvme_tcp::metrics::Metrics;
use drover::nvme_tcp::reserve::Reservations;
use drover::nvme_tcp::subsystem::{Directory, Found, Host, Parts, Subsystem};
use drover::nvme_tcp::wire::{
    self, Completion, Data, Digests, FLAG_LAST, FLAG_SUCCESS, Frame, Kind,
};
use drover::reactor::inline::Inline;
use uuid::Uuid;

use crate::{BLOCKS, Input, Memory};

const PLAIN: Digests = Digests {
    header: false,
    data: false,
};
/// Connections at once.
const MOST: usize = 5;
const SECRET: &str = "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";

struct Names(Vec<Arc<Subsystem>>, Arc<Discovery>);

impl Directory for Names {
    fn find(&self, name: &str) -> Found {
        match self.0.iter().find(|one| one.nqn() == name) {
            Some(subsystem) => Found::Live(Arc::clone(subsystem)),
            None if name == discovery::NQN => Found::Discovery(Arc::clone(&self.1)),
            None if name.ends_with("closed") => Found::Closed,
            None => Found::Unknown,
        }
    }
}

/// A target, its hosts, and what of it must be gone in the end.
pub struct Scene {
    target: Arc<Target>,
    subsystems: Vec<Arc<Subsystem>>,
    wires: Vec<Wire>,
    at: usize,
    held: bool,
    device: Weak<Memory>,
}

impl Scene {
    /// Nobody is connected. With `secret`, hosts must prove that they know one.
    pub fn new(secret: bool) -> Self {
        let device = Arc::new(Memory::default());
        let reservations = Reservations::volatile();
        let secrets = secret.then(|| Secrets {
            host: SECRET.parse().expect("a secret"),
            controller: Some(SECRET.parse().expect("a secret")),
            hash: Hash::Sha256,
            group: Group::Null,
        });
        let subsystem = |number: u8| {
            Subsystem::new(Parts {
                nqn: nqn(number),
                namespace: Uuid::from_u128(7),
                host: host(number),
                read_only: false,
                device: Arc::clone(&device) as Arc<_>,
                reservations: Arc::clone(&reservations),
                secrets: secrets.clone(),
                discovery: None,
            })
        };
        let subsystems = vec![subsystem(0), subsystem(1)];
        let discovery = Arc::new(Discovery::default());
        for one in &subsystems {
            discovery.show(one.nqn(), &one.host().nqn);
        }
        let target = Target {
            directory: Arc::new(Names(subsystems.clone(), discovery)),
            metrics: Metrics::default(),
            handshake: Duration::from_secs(10),
        };
        Self {
            target: Arc::new(target),
            subsystems,
            wires: Vec::new(),
            at: 0,
            held: false,
            device: Arc::downgrade(&device),
        }
    }

    /// A new connection, which is the one that operations are on from now on.
    pub fn open(&mut self) -> &mut Wire {
        if self.wires.len() >= MOST {
            self.wires.remove(0);
        }
        let address = [127, 0, 0, 1].into();
        let peer = (address, 1).into();
        let target = Arc::clone(&self.target);
        let mut inline = Inline::new(Box::new(NvmeTcp::new(
            target,
            peer,
            address,
            None,
            Instant::now(),
        )));
        inline.hold(self.held);
        self.wires.push(Wire {
            inline,
            digests: PLAIN,
            next: 1,
            asked: VecDeque::new(),
            last: None,
            rest: Vec::new(),
            framed: true,
            agreed: false,
        });
        self.at = self.wires.len() - 1;
        &mut self.wires[self.at]
    }

    /// An enabled association of a host: its admin queue and an I/O queue.
    pub fn host(&mut self, number: u8, digests: Digests) {
        let admin = self.open();
        admin.agree(digests);
        let controller = admin.connect(number, 0, 0xffff).expect("it may connect");
        admin.enable();
        let io = self.open();
        io.agree(digests);
        io.connect(number, 1, controller).expect("it may connect");
    }

    /// Does what the input says, then lets all settle and all go.
    pub fn play(mut self, input: &mut Input) {
        while !input.is_empty() {
            self.operation(input);
        }
        self.release();
        let gates: Vec<_> = self
            .subsystems
            .iter()
            .map(|one| Arc::clone(one.gate()))
            .collect();
        let controllers: Vec<_> = self
            .subsystems
            .iter()
            .filter_map(|one| one.current())
            .map(|one| (Arc::clone(one.gate()), Arc::downgrade(&one)))
            .collect();
        let subsystems: Vec<_> = self.subsystems.iter().map(Arc::downgrade).collect();
        let device = self.device.clone();
        assert!(
            gates.iter().all(|gate| gate.inside() == 0),
            "all has settled"
        );
        drop(self);
        for (gate, controller) in controllers {
            assert_eq!(gate.inside(), 0, "all has settled");
            assert!(controller.upgrade().is_none(), "a controller is left");
        }
        assert!(
            subsystems.iter().all(|one| one.upgrade().is_none()),
            "a subsystem is left"
        );
        assert!(device.upgrade().is_none(), "the device is left");
    }

    fn release(&mut self) {
        self.held = false;
        for wire in &mut self.wires {
            wire.inline.hold(false);
            wire.wait(Duration::ZERO);
        }
    }

    fn operation(&mut self, input: &mut Input) {
        if self.wires.is_empty() {
            self.open();
        }
        let number = input.byte();
        match number % 20 {
            10 => self.at = usize::from(input.byte()) % self.wires.len(),
            11 => {
                let (kind, of) = (input.byte(), input.byte() & 1);
                let (queue, controller) = (u16::from(input.byte() % 20), input.word());
                let current = self.subsystems[usize::from(of)].current();
                let current = current.map_or(controller, |current| current.id());
                let wire = self.open();
                wire.agree(Digests {
                    header: kind & 1 != 0,
                    data: kind & 2 != 0,
                });
                let controller = if kind & 4 == 0 { current } else { controller };
                let (queue, controller) = if kind & 8 == 0 {
                    (0, 0xffff)
                } else {
                    (queue, controller)
                };
                let of = if kind & 16 == 0 { of } else { 2 };
                let _ = wire.connect(of, queue, controller);
                if kind & 32 == 0 {
                    wire.enable();
                }
            }
            12 => drop(self.wires.remove(self.at.min(self.wires.len() - 1))),
            13 => {
                self.held = !self.held;
                for wire in &mut self.wires {
                    wire.inline.hold(self.held);
                }
            }
            14 => {
                let subsystem = &self.subsystems[usize::from(input.byte()) & 1];
                match input.byte() % 6 {
                    0 => {
                        if let Some(current) = subsystem.current() {
                            current.announce(Event::Namespace);
                        }
                    }
                    1 => _ = subsystem.gate().close(),
                    2 => {
                        subsystem.gate().close();
                        subsystem.take_away();
                    }
                    3 => _ = subsystem.disconnect(),
                    4 => subsystem.reservations().leave(subsystem),
                    _ => subsystem.set_access((input.byte() & 1 != 0, input.byte() & 1 != 0)),
                }
            }
            15 => {
                let time = Duration::from_millis(u64::from(input.byte()) * 100);
                self.wires.iter_mut().for_each(|wire| wire.wait(time));
            }
            number => {
                // What may wait for other hosts' commands is not done while
                // those are held back: nobody else would let them go.
                if matches!(number, 0 | 1 | 4 | 16) {
                    self.release();
                }
                self.at = self.at.min(self.wires.len() - 1);
                self.wires[self.at].operation(number, input);
            }
        }
        if self.wires.is_empty() {
            self.open();
        }
    }
}

fn nqn(number: u8) -> String {
    match number {
        2 => discovery::NQN.to_owned(),
        _ => format!("nqn.2026-11.io.drover:fuzz:1:{number}"),
    }
}

fn host(number: u8) -> Host {
    Host {
        nqn: format!("nqn.2014-08.org.nvmexpress:uuid:fuzz-{number}"),
        id: Uuid::from_u128(1 + u128::from(number)),
    }
}

/// A host's end of one connection.
pub struct Wire {
    pub inline: Inline,
    digests: Digests,
    next: u16,
    /// What the host was asked for and did not send.
    asked: VecDeque<Data>,
    last: Option<Completion>,
    rest: Vec<u8>,
    /// Whether all that was sent agreed with what was agreed on, so that what
    /// comes back can be taken apart.
    framed: bool,
    agreed: bool,
}

/// A command with a data descriptor of `length` bytes.
pub fn command(opcode: u8, descriptor: u8, length: u32) -> [u8; 64] {
    let mut entry = [0; 64];
    (entry[0], entry[1], entry[4], entry[39]) = (opcode, 0x40, 1, descriptor);
    entry[32..36].copy_from_slice(&length.to_le_bytes());
    entry
}

impl Wire {
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
        while let Some(common) = rest.first_chunk() {
            let frame = Frame::check(common, self.digests).expect("what is said is well-formed");
            let digest = |used: bool| if used { 4 } else { 0 };
            let data = frame.header + digest(frame.header_digest) + frame.pad;
            let whole = data + frame.data + digest(frame.data_digest);
            if rest.len() < whole {
                break;
            }
            let header = rest[..frame.header].to_vec();
            let behind = &rest[frame.header..data];
            if frame.header_digest {
                assert_eq!(behind, crc32c::crc32c(&header).to_le_bytes());
            }
            let (sent, behind) = rest[data..whole].split_at(frame.data);
            if frame.data_digest {
                assert_eq!(behind, crc32c::crc32c(sent).to_le_bytes());
            }
            rest.drain(..whole);
            match frame.kind {
                Kind::IcResp => {}
                Kind::CapsuleResp => {
                    let header = header.first_chunk().expect("24 bytes");
                    self.last = Some(Completion::decode(header));
                }
                Kind::R2T => {
                    let asked = Data::decode(header.first_chunk().expect("24 bytes"));
                    assert!(asked.offset == 0 && asked.length > 0);
                    self.asked.push_back(asked);
                }
                Kind::C2HData => {
                    let data = Data::decode(header.first_chunk().expect("24 bytes"));
                    assert_eq!((data.offset, data.length as usize), (0, frame.data));
                    assert!(frame.flags & FLAG_LAST != 0 || frame.flags & FLAG_SUCCESS == 0);
                }
                Kind::C2HTermReq => assert!(self.inline.end().is_some() && rest.is_empty()),
                other => panic!("a controller says {other:?}"),
            }
        }
        self.rest = rest;
    }

    /// Agrees on the wire's form.
    pub fn agree(&mut self, digests: Digests) {
        let mut request = [0; 128];
        request[..8].copy_from_slice(&wire::common(Kind::IcReq, 0, PLAIN, 0));
        request[11] = u8::from(digests.header) | u8::from(digests.data) << 1;
        self.raw(&request);
        (self.digests, self.agreed) = (digests, true);
    }

    /// Connects a queue; the controller's id, if that was not refused.
    pub fn connect(&mut self, of: u8, queue: u16, controller: u16) -> Option<u16> {
        let mut entry = command(0x7f, 0x01, 1024);
        entry[4] = 1;
        entry[42..44].copy_from_slice(&queue.to_le_bytes());
        entry[44] = 31;
        let host = host(of & 1);
        let nqn = nqn(of);
        let mut data = [0; 1024];
        data[..16].copy_from_slice(host.id.as_bytes());
        data[16..18].copy_from_slice(&controller.to_le_bytes());
        data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
        data[512..512 + host.nqn.len()].copy_from_slice(host.nqn.as_bytes());
        self.last = None;
        self.send(entry, &data);
        let done = self.last.filter(|done| done.status == 0)?;
        u16::try_from(done.result & 0xffff).ok()
    }

    /// Enables the controller.
    pub fn enable(&mut self) {
        let mut set = command(0x7f, 0x5a, 0);
        set[4] = 0;
        set[44] = 0x14;
        set[48..52].copy_from_slice(&0x0046_0001u32.to_le_bytes());
        self.send(set, &[]);
    }

    /// Sends a command, with data in its capsule.
    pub fn send(&mut self, mut entry: [u8; 64], data: &[u8]) {
        entry[2..4].copy_from_slice(&self.next.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.capsule(entry, data);
    }

    fn capsule(&mut self, entry: [u8; 64], data: &[u8]) {
        let length = u32::try_from(data.len()).expect("a few bytes");
        let mut pdu = wire::common(Kind::CapsuleCmd, 0, self.digests, length).to_vec();
        pdu.extend_from_slice(&entry);
        self.finish(pdu, data);
    }

    fn finish(&mut self, mut pdu: Vec<u8>, data: &[u8]) {
        if self.digests.header {
            let digest = crc32c::crc32c(&pdu);
            pdu.extend_from_slice(&digest.to_le_bytes());
        }
        pdu.extend_from_slice(data);
        if self.digests.data && !data.is_empty() {
            pdu.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
        }
        self.raw(&pdu);
    }

    fn send_data(&mut self, header: Data, flags: u8, data: &[u8]) {
        let common = wire::common(Kind::H2CData, flags, self.digests, header.length);
        self.finish(header.encode(common).to_vec(), data);
    }

    fn operation(&mut self, number: u8, input: &mut Input) {
        match number {
            0 => {
                let length = input.byte().into();
                let bytes = input.take(length);
                // An ICReq may be among them.
                self.framed &= self.agreed;
                self.raw(bytes);
            }
            // A command as the fuzzer made it, with or without data.
            1 => {
                let entry = input.filled();
                let length = usize::from(input.byte()) * 33;
                self.capsule(entry, input.take(length));
            }
            // An I/O command that makes sense, but for one byte of it.
            2 | 3 => {
                let opcode = input.choose(&[0, 1, 2, 5, 8, 9, 0x0c, 0x19]);
                let (lba, blocks) = (
                    u32::from(input.byte()) % 20,
                    1 + u32::from(input.byte() % 5),
                );
                let (flags, in_capsule) = (input.byte(), number == 2);
                let bytes = blocks * 4096;
                let (length, twelve) = match opcode {
                    0 => (0, 0),
                    9 => (4096, 0),
                    0x19 => (32 * (1 + u32::from(flags & 3)), u32::from(flags & 3)),
                    8 | 0x0c => (0, blocks - 1),
                    _ => (bytes, blocks - 1),
                };
                let in_capsule = in_capsule && opcode != 2 && length <= 8192;
                let descriptor = if in_capsule { 0x01 } else { 0x5a };
                let mut entry = command(opcode, descriptor, length);
                entry[40..44].copy_from_slice(&lba.to_le_bytes());
                let twelve = twelve | u32::from(flags & 0xf0) << 24;
                entry[48..52].copy_from_slice(&twelve.to_le_bytes());
                if opcode == 9 {
                    (entry[40], entry[44]) = (flags & 7, 4);
                }
                self.spoil(&mut entry, input);
                let carried = match (flags & 0x0c, in_capsule) {
                    // Whatever the command says.
                    (0x0c, _) => 4096 * u32::from(flags & 3),
                    (_, true) => length,
                    (_, false) => 0,
                };
                let data = self.payload(opcode, carried, input);
                self.send(entry, &data);
            }
            // Reservations.
            4 => {
                let opcode = input.choose(&[0x0d, 0x0e, 0x11, 0x15]);
                let length = match opcode {
                    0x0e => 64 * (1 + u32::from(input.byte() % 4)),
                    0x15 => 8,
                    _ => 16,
                };
                let place = if opcode == 0x0e { 0x5a } else { 0x01 };
                let mut entry = command(opcode, place, length);
                (entry[40], entry[41]) = (input.byte(), input.byte() % 7);
                if opcode == 0x0e {
                    entry[40..44].copy_from_slice(&(length / 4 - 1).to_le_bytes());
                    entry[44] = 1;
                } else if opcode == 0x0d {
                    entry[43] = input.byte() & 0xc0;
                }
                let mut keys = [0; 16];
                (keys[0], keys[8]) = (input.byte() & 3, input.byte() & 3);
                self.spoil(&mut entry, input);
                let data = if opcode == 0x0e { 0 } else { length as usize };
                self.send(entry, &keys[..data]);
            }
            // What the host was asked for, whole or in pieces.
            5 | 6 => {
                let Some(asked) = self.asked.pop_front() else {
                    return;
                };
                let piece = if number == 5 {
                    asked.length
                } else {
                    (1 + u32::from(input.byte())) * 64
                };
                let fill = input.byte();
                let mut offset = 0;
                while offset < asked.length && self.inline.end().is_none() {
                    let length = piece.min(asked.length - offset);
                    let last = if offset + length == asked.length {
                        FLAG_LAST
                    } else {
                        0
                    };
                    let header = Data {
                        offset,
                        length,
                        ..asked
                    };
                    self.send_data(header, last, &vec![fill; length as usize]);
                    offset += length;
                }
            }
            // Data for a command that may have been asked for some.
            7 => {
                let (tag, offset) = (input.byte(), input.byte());
                let length = u32::from(input.byte()) * 64;
                let header = Data {
                    command: tag.into(),
                    tag: input.byte().into(),
                    offset: u32::from(offset) * 64,
                    length,
                };
                self.send_data(header, input.byte() & 4, &vec![1; length as usize]);
            }
            // An admin command that makes sense, but for one byte of it.
            8 | 9 => {
                let opcode = input.choose(&[0x02, 0x06, 0x08, 0x09, 0x0a, 0x0c, 0x18]);
                let (ten, eleven) = (input.byte(), input.word());
                let length = match opcode {
                    2 => 4 * (1 + u32::from(input.byte())),
                    6 => 4096,
                    9 | 0x0a if ten == 0x16 => 512,
                    0x0a if ten == 0x81 => 16,
                    _ => 0,
                };
                let mut entry = command(opcode, if opcode == 9 { 0x01 } else { 0x5a }, length);
                entry[40] = ten;
                entry[44..46].copy_from_slice(&eleven.to_le_bytes());
                match opcode {
                    2 => entry[42] = u8::try_from(length / 4 - 1).unwrap_or(u8::MAX),
                    8 => entry[42..44].copy_from_slice(&self.next.wrapping_sub(1).to_le_bytes()),
                    _ => {}
                }
                self.spoil(&mut entry, input);
                let data = self.payload(opcode, if opcode == 9 { length } else { 0 }, input);
                self.send(entry, &data);
            }
            // DH-HMAC-CHAP, whatever the message.
            16 => {
                let receive = input.byte() & 1 != 0;
                let length = if receive {
                    u32::from(input.byte()) * 16
                } else {
                    u32::from(input.byte())
                };
                let mut entry = command(0x7f, if receive { 0x5a } else { 0x01 }, length);
                entry[4] = if receive { 6 } else { 5 };
                entry[41..44].copy_from_slice(&[1, 1, 0xe9]);
                entry[44..48].copy_from_slice(&length.to_le_bytes());
                self.spoil(&mut entry, input);
                let mut data = input
                    .take(if receive { 0 } else { length as usize })
                    .to_vec();
                data.resize(if receive { 0 } else { length as usize }, 0);
                self.send(entry, &data);
            }
            // Properties.
            _ => {
                let mut entry = command(0x7f, 0x5a, 0);
                entry[4] = input.choose(&[0, 4]);
                entry[40] = input.choose(&[0, 1]);
                entry[44] = input.choose(&[0, 8, 0x14, 0x1c, 0x68]);
                entry[48..52].copy_from_slice(&input.filled::<4>());
                self.send(entry, &[]);
            }
        }
    }

    /// Changes one byte of an entry, or none.
    fn spoil(&self, entry: &mut [u8; 64], input: &mut Input) {
        // Not the opcode: what may wait for others' commands is only asked for above.
        if let at @ 1..64 = usize::from(input.byte()) {
            entry[at] ^= input.byte();
        }
    }

    fn payload(&self, opcode: u8, length: u32, input: &mut Input) -> Vec<u8> {
        let mut data = vec![0; length as usize];
        if data.is_empty() {
            return data;
        }
        let (first, second) = (input.byte(), input.byte());
        match opcode {
            // Ranges: blocks at 4 and LBA at 8, or LBA at 8 and blocks at 16.
            9 => (data[4], data[8]) = (first, second),
            0x19 => (data[8], data[16]) = (first % 2 * (BLOCKS as u8 - 1), second % 8),
            _ => data.fill(first),
        }
        data
    }
}

//! A target and its hosts on the calling thread, without sockets: PDUs go in,
//! PDUs come out, time passes when told to.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::auth::Secrets;
use super::connection::{HANDSHAKE, NvmeTcp, Target};
use super::discovery::{self, Discovery};
use super::metrics::Metrics;
use super::reserve::Reservations;
use super::subsystem::{Directory, Found, Host, Parts, Subsystem};
use super::wire::{self, Completion, Data, Digests, FLAG_LAST, Frame, Kind};
use crate::block::{BLOCK, BlockDevice, DeviceError};
use crate::ids::{Bytes, Lba};
use crate::reactor::End;
use crate::reactor::inline::Inline;

pub const NONE: Digests = Digests {
    header: false,
    data: false,
};
pub const BOTH: Digests = Digests {
    header: true,
    data: true,
};
pub const BLOCKS: u64 = 4096;
pub const BYTES: usize = BLOCK as usize;

/// A device in memory.
pub struct Memory(pub Mutex<Vec<u8>>);

impl Memory {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![0; (BLOCKS * BLOCK) as usize])))
    }

    fn part<R>(
        &self,
        lba: Lba,
        length: usize,
        f: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R, DeviceError> {
        let start = (lba.0 as usize).saturating_mul(BYTES);
        let mut bytes = self.0.lock().unwrap();
        let size = Bytes(bytes.len() as u64);
        let blocks = (length / BYTES) as u64;
        let part = bytes.get_mut(start..start.saturating_add(length));
        part.map(f)
            .ok_or(DeviceError::OutOfRange { lba, blocks, size })
    }
}

impl BlockDevice for Memory {
    fn size(&self) -> Bytes {
        Bytes(self.0.lock().unwrap().len() as u64)
    }
    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.part(lba, buffer.len(), |part| buffer.copy_from_slice(part))
    }
    fn write(&self, lba: Lba, data: &[u8], _fua: bool) -> Result<(), DeviceError> {
        self.part(lba, data.len(), |part| part.copy_from_slice(data))
    }
    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn write_zeroes(&self, lba: Lba, blocks: u64, _unmap: bool) -> Result<(), DeviceError> {
        self.part(lba, blocks as usize * BYTES, |part| part.fill(0))
    }
    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.write_zeroes(lba, blocks, true)
    }
}

struct Names(HashMap<String, Arc<Subsystem>>, Arc<Discovery>);

impl Directory for Names {
    fn find(&self, subsystem: &str) -> Found {
        match self.0.get(subsystem) {
            Some(subsystem) => Found::Live(Arc::clone(subsystem)),
            None if subsystem == discovery::NQN => Found::Discovery(Arc::clone(&self.1)),
            None => Found::Unknown,
        }
    }
}

/// Two exports of one volume, `a` for host 1 and `b` for host 2.
pub struct Bench {
    pub target: Arc<Target>,
    pub device: Arc<Memory>,
    pub a: Arc<Subsystem>,
    pub b: Arc<Subsystem>,
    pub discovery: Arc<Discovery>,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(Reservations::volatile())
    }

    pub fn with(reservations: Arc<Reservations>) -> Self {
        Self::of(reservations, None)
    }

    pub fn secret(secrets: Secrets) -> Self {
        Self::of(Reservations::volatile(), Some(secrets))
    }

    fn of(reservations: Arc<Reservations>, secrets: Option<Secrets>) -> Self {
        let device = Memory::new();
        let subsystem = |name: &str, id: u128| {
            Subsystem::new(Parts {
                nqn: format!("nqn.test:{name}"),
                namespace: Uuid::from_u128(100 + id),
                host: Host {
                    nqn: format!("nqn.host:{id}"),
                    id: Uuid::from_u128(id),
                },
                read_only: false,
                device: Arc::clone(&device) as Arc<dyn BlockDevice>,
                reservations: Arc::clone(&reservations),
                secrets: secrets.clone(),
                discovery: None,
            })
        };
        let (a, b) = (subsystem("a", 1), subsystem("b", 2));
        let names = [&a, &b].map(|one| (one.nqn().to_owned(), Arc::clone(one)));
        let discovery = Arc::new(Discovery::default());
        let target = Target {
            directory: Arc::new(Names(HashMap::from(names), Arc::clone(&discovery))),
            metrics: Metrics::default(),
            handshake: HANDSHAKE,
        };
        Self {
            target: Arc::new(target),
            device,
            a,
            b,
            discovery,
        }
    }

    pub fn open(&self) -> Wire {
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let protocol = NvmeTcp::new(
            Arc::clone(&self.target),
            peer,
            peer.ip(),
            None,
            Instant::now(),
        );
        Wire {
            inline: Inline::new(Box::new(protocol)),
            digests: NONE,
            next: 1,
            answers: Vec::new(),
        }
    }

    /// An enabled association of `of`: its admin queue and I/O queue 1.
    pub fn host(&self, of: &Arc<Subsystem>, digests: Digests) -> (Wire, Wire) {
        let mut admin = self.open();
        admin.agree(digests);
        let done = admin.connect(of, 0, 0xffff, 0);
        assert_eq!(done.status, 0);
        assert_eq!(admin.status(property(true, 0x14, 0x0046_0001)), 0);
        let mut io = self.open();
        io.agree(digests);
        assert_eq!(io.connect(of, 1, done.result as u16, 0).status, 0);
        (admin, io)
    }

    pub fn metrics(&self) -> String {
        let mut registry = prometheus_client::registry::Registry::default();
        self.target.metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }
}

/// One PDU from the target.
#[derive(Debug, Clone)]
pub struct Answer {
    pub kind: Kind,
    pub header: Vec<u8>,
    pub data: Vec<u8>,
}

impl Answer {
    pub fn completion(&self) -> Completion {
        assert_eq!(self.kind, Kind::CapsuleResp, "{self:?}");
        Completion::decode(self.header.first_chunk().unwrap())
    }

    pub fn data_header(&self) -> Data {
        Data::decode(self.header.first_chunk().unwrap())
    }
}

/// A host's end of one connection.
pub struct Wire {
    pub inline: Inline,
    pub digests: Digests,
    next: u16,
    /// What came and was not taken.
    pub answers: Vec<Answer>,
}

/// A command with a data descriptor of `length` bytes.
pub fn command(opcode: u8, descriptor: u8, length: u32, dwords: [u32; 3]) -> [u8; 64] {
    let mut entry = [0; 64];
    (entry[0], entry[1], entry[4], entry[39]) = (opcode, 0x40, 1, descriptor);
    entry[32..36].copy_from_slice(&length.to_le_bytes());
    for (at, dword) in dwords.into_iter().enumerate() {
        entry[40 + 4 * at..44 + 4 * at].copy_from_slice(&dword.to_le_bytes());
    }
    entry
}

/// Property Set or Get of four bytes.
pub fn property(set: bool, offset: u8, value: u32) -> [u8; 64] {
    let mut entry = command(0x7f, 0x5a, 0, [0, offset.into(), value]);
    entry[4] = if set { 0 } else { 4 };
    entry
}

pub fn read(lba: u32, blocks: u32) -> [u8; 64] {
    command(2, 0x5a, blocks * BLOCK as u32, [lba, 0, blocks - 1])
}

/// A write whose data is asked for.
pub fn write(lba: u32, blocks: u32) -> [u8; 64] {
    command(1, 0x5a, blocks * BLOCK as u32, [lba, 0, blocks - 1])
}

/// A write whose one block comes in its capsule.
pub fn small_write(lba: u32) -> [u8; 64] {
    command(1, 0x01, BLOCK as u32, [lba, 0, 0])
}

impl Wire {
    pub fn raw(&mut self, bytes: &[u8]) {
        let came = self.inline.send(bytes);
        self.take(came);
    }

    pub fn wait(&mut self, time: Duration) {
        let came = self.inline.wait(time);
        self.take(came);
    }

    pub fn end(&self) -> Option<&End> {
        self.inline.end()
    }

    fn take(&mut self, came: Vec<u8>) {
        let mut rest = &came[..];
        while !rest.is_empty() {
            let frame = Frame::check(rest.first_chunk().unwrap(), self.digests).unwrap();
            let (header, behind) = rest.split_at(frame.header);
            rest = behind;
            if frame.header_digest {
                let (digest, behind) = rest.split_at(4);
                assert_eq!(digest, crc32c::crc32c(header).to_le_bytes());
                rest = behind;
            }
            assert_eq!(frame.pad, 0, "Linux skips no padding");
            let (data, behind) = rest.split_at(frame.data);
            rest = behind;
            if frame.data_digest {
                let (digest, behind) = rest.split_at(4);
                assert_eq!(digest, crc32c::crc32c(data).to_le_bytes());
                rest = behind;
            }
            self.answers.push(Answer {
                kind: frame.kind,
                header: header.to_vec(),
                data: data.to_vec(),
            });
        }
    }

    /// The next PDU that came.
    pub fn answer(&mut self) -> Answer {
        assert!(!self.answers.is_empty(), "an answer; end: {:?}", self.end());
        self.answers.remove(0)
    }

    pub fn agree(&mut self, digests: Digests) {
        let mut request = [0; 128];
        request[..8].copy_from_slice(&wire::common(Kind::IcReq, 0, NONE, 0));
        request[11] = u8::from(digests.header) | u8::from(digests.data) << 1;
        self.raw(&request);
        let answer = self.answer();
        assert_eq!(
            (answer.kind, answer.header[11]),
            (Kind::IcResp, request[11])
        );
        self.digests = digests;
    }

    pub fn connect(
        &mut self,
        of: &Subsystem,
        queue: u16,
        controller: u16,
        keep_alive: u32,
    ) -> Completion {
        self.send_connect(of, queue, controller, keep_alive);
        self.answer().completion()
    }

    /// Connects an I/O queue that does without flow control.
    pub fn connect_without_flow_control(
        &mut self,
        of: &Subsystem,
        queue: u16,
        controller: u16,
    ) -> Completion {
        self.send_connect_as(of, queue, controller, 0, 1 << 2);
        self.answer().completion()
    }

    /// Sends a Connect, which may not be answered at once.
    pub fn send_connect(&mut self, of: &Subsystem, queue: u16, controller: u16, keep_alive: u32) {
        self.send_connect_as(of, queue, controller, keep_alive, 0);
    }

    fn send_connect_as(
        &mut self,
        of: &Subsystem,
        queue: u16,
        controller: u16,
        keep_alive: u32,
        attributes: u8,
    ) {
        let mut entry = command(0x7f, 0x01, 1024, [0; 3]);
        entry[4] = 1;
        entry[42..44].copy_from_slice(&queue.to_le_bytes());
        entry[44..46].copy_from_slice(&31u16.to_le_bytes());
        entry[46] = attributes;
        entry[48..52].copy_from_slice(&keep_alive.to_le_bytes());
        let mut data = vec![0; 1024];
        data[..16].copy_from_slice(of.host().id.as_bytes());
        data[16..18].copy_from_slice(&controller.to_le_bytes());
        data[256..256 + of.nqn().len()].copy_from_slice(of.nqn().as_bytes());
        data[512..512 + of.host().nqn.len()].copy_from_slice(of.host().nqn.as_bytes());
        self.send(entry, &data);
    }

    /// Sends a command with data in its capsule; its identifier.
    pub fn send(&mut self, mut entry: [u8; 64], data: &[u8]) -> u16 {
        let command = self.next;
        self.next += 1;
        entry[2..4].copy_from_slice(&command.to_le_bytes());
        let mut pdu = wire::common(Kind::CapsuleCmd, 0, self.digests, data.len() as u32).to_vec();
        pdu.extend_from_slice(&entry);
        self.finish(pdu, data);
        command
    }

    pub fn send_data(&mut self, header: Data, last: bool, data: &[u8]) {
        let flags = if last { FLAG_LAST } else { 0 };
        let common = wire::common(Kind::H2CData, flags, self.digests, data.len() as u32);
        self.finish(header.encode(common).to_vec(), data);
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

    /// Does a command: its data and its completion.
    pub fn run(&mut self, entry: [u8; 64], data: &[u8]) -> (Vec<u8>, Completion) {
        let command = self.send(entry, data);
        let mut read = Vec::new();
        loop {
            let answer = self.answer();
            if answer.kind == Kind::C2HData {
                read = answer.data;
                continue;
            }
            let done = answer.completion();
            assert_eq!(done.command, command);
            return (read, done);
        }
    }

    /// Does a command without data to send; its status.
    pub fn status(&mut self, entry: [u8; 64]) -> u16 {
        self.run(entry, &[]).1.status
    }
}

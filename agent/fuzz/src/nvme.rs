//! An NVMe/TCP host for the fuzzer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use drover::nvme_tcp::connection::{NvmeTcp, Target};
use drover::nvme_tcp::metrics::Metrics;
use drover::nvme_tcp::reserve::Reservations;
use drover::nvme_tcp::subsystem::{Directory, Found, Host, Parts, Subsystem};
use drover::nvme_tcp::wire::{self, Digests, Kind};
use drover::reactor::inline::Inline;
use uuid::Uuid;

use crate::{Input, Memory};

const SUBSYSTEM: &str = "nqn.2026-11.io.drover:fuzz:1:a";
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:fuzz";
const PLAIN: Digests = Digests {
    header: false,
    data: false,
};

struct One(Arc<Subsystem>);

impl Directory for One {
    fn find(&self, subsystem: &str) -> Found {
        if subsystem == SUBSYSTEM {
            Found::Live(Arc::clone(&self.0))
        } else {
            Found::Unknown
        }
    }
}

/// A target with one export of a device in memory.
pub fn target() -> Arc<Target> {
    let subsystem = Subsystem::new(Parts {
        nqn: SUBSYSTEM.to_owned(),
        namespace: Uuid::from_u128(7),
        host: Host {
            nqn: HOST.to_owned(),
            id: Uuid::from_u128(1),
        },
        read_only: false,
        device: Arc::new(Memory::default()),
        reservations: Reservations::volatile(),
        secrets: None,
        discovery: None,
    });
    Arc::new(Target {
        directory: Arc::new(One(subsystem)),
        metrics: Metrics::default(),
        handshake: Duration::from_secs(10),
    })
}

/// A new connection to it.
pub fn connection(target: &Arc<Target>) -> Inline {
    let address = [127, 0, 0, 1].into();
    let peer = (address, 1).into();
    let protocol = NvmeTcp::new(Arc::clone(target), peer, address, None, Instant::now());
    Inline::new(Box::new(protocol))
}

/// Agrees on the wire's form and connects a queue; false if that was refused.
pub fn connect(connection: &mut Inline, queue: u16, controller: u16) -> Option<u16> {
    let mut request = [0; 128];
    request[..8].copy_from_slice(&wire::common(Kind::IcReq, 0, PLAIN, 0));
    connection.send(&request);
    let mut entry = command(0x7f, 0x01, 1024);
    entry[4] = 1;
    entry[42..44].copy_from_slice(&queue.to_le_bytes());
    entry[44] = 31;
    let mut data = [0; 1024];
    data[..16].copy_from_slice(Uuid::from_u128(1).as_bytes());
    data[16..18].copy_from_slice(&controller.to_le_bytes());
    data[256..256 + SUBSYSTEM.len()].copy_from_slice(SUBSYSTEM.as_bytes());
    data[512..512 + HOST.len()].copy_from_slice(HOST.as_bytes());
    let answer = connection.send(&capsule(entry, &data));
    let status = answer.get(22..24)?;
    (status == [0, 0]).then(|| wire::u16_at(&answer, 8))
}

/// Enables the controller.
pub fn enable(connection: &mut Inline) {
    let mut set = command(0x7f, 0x5a, 0);
    set[4] = 0;
    set[44] = 0x14;
    set[48..52].copy_from_slice(&0x0046_0001u32.to_le_bytes());
    connection.send(&capsule(set, &[]));
}

fn command(opcode: u8, descriptor: u8, length: u32) -> [u8; 64] {
    let mut entry = [0; 64];
    (entry[0], entry[1], entry[39]) = (opcode, 0x40, descriptor);
    entry[32..36].copy_from_slice(&length.to_le_bytes());
    entry
}

fn capsule(entry: [u8; 64], data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("a few bytes");
    let mut pdu = wire::common(Kind::CapsuleCmd, 0, PLAIN, length).to_vec();
    pdu.extend_from_slice(&entry);
    pdu.extend_from_slice(data);
    pdu
}

/// Sends the rest of the input: as it is, or framed as commands, data and time.
pub fn play(connection: &mut Inline, input: &mut Input) {
    while !input.0.is_empty() && connection.end().is_none() {
        match input.byte() % 8 {
            0 => {
                let length = input.byte().into();
                connection.send(input.take(length));
            }
            // A command as the fuzzer made it, with or without data.
            1..=4 => {
                let mut entry = [0; 64];
                let from = input.take(64);
                entry[..from.len()].copy_from_slice(from);
                let length = usize::from(input.byte()) * 33;
                connection.send(&capsule(entry, input.take(length)));
            }
            // Data for a command that may have been asked for some.
            5 => {
                let (tag, offset) = (input.byte(), input.byte());
                let length = usize::from(input.byte()) * 64;
                let flags = input.byte() & 4;
                let data = vec![1; length];
                let header = wire::Data {
                    command: tag.into(),
                    tag: tag.into(),
                    offset: u32::from(offset) * 64,
                    length: u32::try_from(length).expect("a few bytes"),
                };
                let common = wire::common(Kind::H2CData, flags, PLAIN, header.length);
                let mut pdu = header.encode(common).to_vec();
                pdu.extend_from_slice(&data);
                connection.send(&pdu);
            }
            6 => connection.hold(input.byte() & 1 == 1),
            _ => {
                connection.wait(Duration::from_millis(u64::from(input.byte()) * 100));
            }
        }
    }
    connection.hold(false);
    connection.wait(Duration::ZERO);
}

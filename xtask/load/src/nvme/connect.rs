//! An association's beginning: a connection a queue, the controller enabled,
//! and what the namespace is.

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::pdu::{self, Data, Header, IC, kind, opcode, u16_at, u32_at, u64_at};
use crate::drive::SILENCE;

const CC: u32 = 0x14;
const CSTS: u32 = 0x1c;
/// Enabled, entries of 64 and 16 bytes (Base 2.0, 3.1.3.5).
const ENABLED: u32 = 1 | 6 << 16 | 4 << 20;
const READY: u64 = 1;
/// Longer than any run: nothing here sends Keep Alive.
const KEEP_ALIVE_MS: u32 = 3_600_000;
/// How long a controller that is still busy with the association before is
/// asked again.
const BUSY: Duration = Duration::from_secs(10);
/// Connect refused for now: controller busy (Fabrics, status type 1h, 81h).
const STATUS_BUSY: u16 = 0x181;
const DO_NOT_RETRY: u16 = 0x4000;

/// Whom to ask for what.
#[derive(Debug, Clone)]
pub struct Place {
    /// Where the target listens.
    pub address: SocketAddr,
    /// The subsystem's NQN.
    pub subsystem: String,
    /// The host's NQN.
    pub host: String,
    /// The host's identifier.
    pub host_id: [u8; 16],
    /// The namespace's identifier.
    pub namespace: u32,
}

/// What a namespace is, and what the controller takes.
#[derive(Debug, Clone, Copy)]
pub struct Namespace {
    /// Its identifier.
    pub id: u32,
    /// Its size in bytes.
    pub bytes: u64,
    /// Bytes of a logical block.
    pub block: u32,
    /// Bytes of a write that may come with its command.
    pub in_capsule: u32,
    /// Bytes that one command may move.
    pub max_transfer: u64,
}

/// One I/O queue's connection.
pub struct Queue {
    /// The connection.
    pub socket: TcpStream,
    /// Bytes that one H2CData may have.
    pub max_data: u32,
}

/// An association; it ends when the admin queue's connection is dropped.
pub struct Association {
    /// Its I/O queues.
    pub queues: Vec<Queue>,
    /// Its namespace.
    pub namespace: Namespace,
    /// The admin queue.
    pub admin: TcpStream,
}

/// Connects an association with `queues` I/O queues of `depth`.
///
/// # Errors
/// What the target refused, and the socket's.
pub fn connect(place: &Place, queues: u16, depth: u16) -> Result<Association> {
    let begin = Instant::now();
    let (mut admin, controller) = loop {
        let mut admin = open(place.address)?.socket;
        match bind(&mut admin, place, 0, 0xffff, 31)? {
            Ok(controller) => break (admin, controller),
            Err(status) if status & !DO_NOT_RETRY == STATUS_BUSY && begin.elapsed() < BUSY => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(status) => bail!(
                "{} refused the admin queue: status {status:#x}",
                place.subsystem
            ),
        }
    };
    let namespace = enable(&mut admin, place.namespace, queues)?;
    let mut opened = Vec::new();
    for number in 1..=queues {
        let mut queue = open(place.address)?;
        let bound = bind(&mut queue.socket, place, number, controller, depth)?;
        if let Err(status) = bound {
            bail!(
                "{} refused queue {number}: status {status:#x}",
                place.subsystem
            );
        }
        opened.push(queue);
    }
    Ok(Association {
        queues: opened,
        namespace,
        admin,
    })
}

fn open(address: SocketAddr) -> Result<Queue> {
    let mut socket =
        TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    socket.set_nodelay(true).context("set TCP_NODELAY")?;
    socket
        .set_read_timeout(Some(SILENCE))
        .context("set SO_RCVTIMEO")?;
    let request = Header::<IC>::new(kind::IC_REQ, 0, 0);
    pdu::write(&mut socket, &[&request.0])?;
    let (answer, _) = pdu::read(&mut socket).context("initialize the connection")?;
    if answer[0] != kind::IC_RESP || answer[10] != 0 || answer[11] != 0 {
        bail!(
            "ICResp of type {:#04x}, CPDA {}, digests {:#x}",
            answer[0],
            answer[10],
            answer[11]
        );
    }
    Ok(Queue {
        socket,
        max_data: u32_at(&answer, 12),
    })
}

/// Connect for one queue: the controller's id, or the status of the refusal.
fn bind(
    socket: &mut TcpStream,
    place: &Place,
    queue: u16,
    controller: u16,
    depth: u16,
) -> Result<Result<u16, u16>> {
    let mut data = [0; 1024];
    data[..16].copy_from_slice(&place.host_id);
    data[16..18].copy_from_slice(&controller.to_le_bytes());
    for (at, name) in [(256, &place.subsystem), (512, &place.host)] {
        if name.len() > 223 {
            bail!("an NQN of more than 223 bytes: {name}");
        }
        data[at..at + name.len()].copy_from_slice(name.as_bytes());
    }
    let mut connect = pdu::command(opcode::FABRICS, 0, Data::InCapsule(1024));
    connect.0[8 + 4] = opcode::CONNECT;
    connect.u16(8 + 42, queue);
    connect.u16(8 + 44, depth);
    connect.u32(8 + 48, if queue == 0 { KEEP_ALIVE_MS } else { 0 });
    let (response, _) = ask(socket, &connect, &data)?;
    Ok(match pdu::status(&response) {
        0 => Ok(u16_at(&response, 8)),
        status => Err(status),
    })
}

/// Sends one command and waits for its response and data.
fn ask(socket: &mut TcpStream, command: &Header<72>, data: &[u8]) -> Result<(Vec<u8>, Vec<u8>)> {
    pdu::write(socket, &[&command.0, data])?;
    let mut found = Vec::new();
    loop {
        let (header, data) = pdu::read(socket)?;
        match header[0] {
            kind::C2H_DATA => {
                found.extend(data);
                if header[1] & pdu::flag::SUCCESS != 0 {
                    return Ok((vec![0; pdu::SHORT], found));
                }
            }
            kind::RESPONSE => return Ok((header, found)),
            other => bail!("a PDU of type {other:#04x}"),
        }
    }
}

/// [`ask`], for a command that must succeed.
fn must(socket: &mut TcpStream, what: &str, command: &Header<72>) -> Result<(Vec<u8>, Vec<u8>)> {
    let (response, data) = ask(socket, command, &[]).with_context(|| what.to_owned())?;
    match pdu::status(&response) {
        0 => Ok((response, data)),
        status => bail!("{what}: status {status:#x}"),
    }
}

fn enable(admin: &mut TcpStream, namespace: u32, queues: u16) -> Result<Namespace> {
    let mut set = pdu::command(opcode::FABRICS, 1, Data::None);
    set.0[8 + 4] = opcode::PROPERTY_SET;
    set.u32(8 + 44, CC);
    set.u64(8 + 48, ENABLED.into());
    must(admin, "enable the controller", &set)?;
    let begin = Instant::now();
    loop {
        let mut get = pdu::command(opcode::FABRICS, 2, Data::None);
        get.0[8 + 4] = opcode::PROPERTY_GET;
        get.u32(8 + 44, CSTS);
        let (response, _) = must(admin, "read the controller's status", &get)?;
        if u64_at(&response, 8) & READY != 0 {
            break;
        }
        if begin.elapsed() > SILENCE {
            bail!("the controller was not ready after {} s", SILENCE.as_secs());
        }
        thread::sleep(Duration::from_millis(5));
    }
    let mut features = pdu::command(opcode::SET_FEATURES, 3, Data::None);
    features.u32(8 + 40, 7);
    let count = u32::from(queues) - 1;
    features.u32(8 + 44, count << 16 | count);
    let (response, _) = must(admin, "ask for I/O queues", &features)?;
    if u32::from(u16_at(&response, 8)) < count {
        bail!(
            "the controller grants {} I/O queues",
            u16_at(&response, 8) + 1
        );
    }
    let controller = identify(admin, 0, 1)?;
    let data = identify(admin, namespace, 0)?;
    let format = 128 + usize::from(data[26] & 0x0f) * 4;
    let block = 1u32
        .checked_shl(data[format + 2].into())
        .context("a logical block's size")?;
    let transfer = match controller[77] {
        0 => u64::MAX,
        shift => 4096u64.checked_shl(shift.into()).unwrap_or(u64::MAX),
    };
    Ok(Namespace {
        id: namespace,
        bytes: u64_at(&data, 0) * u64::from(block),
        block,
        in_capsule: (u32_at(&controller, 1792) * 16).saturating_sub(64),
        max_transfer: transfer,
    })
}

fn identify(admin: &mut TcpStream, namespace: u32, structure: u32) -> Result<Vec<u8>> {
    let mut identify = pdu::command(opcode::IDENTIFY, 4, Data::Transport(4096));
    identify.u32(8 + 4, namespace);
    identify.u32(8 + 40, structure);
    let (_, data) = must(admin, "identify", &identify)?;
    if data.len() != 4096 {
        bail!("Identify brought {} bytes", data.len());
    }
    Ok(data)
}

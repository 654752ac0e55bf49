//! A session's beginning: login, and what the logical unit is.

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::pdu::{self, FINAL, Header, IMMEDIATE, opcode, scsi};
use crate::drive::SILENCE;

/// Operational negotiation to full feature phase, at once (11.12.3).
const OPERATIONAL_TO_FULL: u8 = 0x04 | 0x03;
/// Login status: not now (11.13.5).
const UNAVAILABLE: u16 = 0x0301;
/// How long a target that still settles the session before is asked again.
const BUSY: Duration = Duration::from_secs(10);
/// What open-iscsi offers, so that the targets do what they do for it.
const OFFER: &[(&str, &str)] = &[
    ("HeaderDigest", "None"),
    ("DataDigest", "None"),
    ("InitialR2T", "No"),
    ("ImmediateData", "Yes"),
    ("MaxRecvDataSegmentLength", "262144"),
    ("MaxBurstLength", "16776192"),
    ("FirstBurstLength", "262144"),
    ("MaxConnections", "1"),
    ("MaxOutstandingR2T", "1"),
    ("DefaultTime2Wait", "2"),
    ("DefaultTime2Retain", "0"),
    ("DataPDUInOrder", "Yes"),
    ("DataSequenceInOrder", "Yes"),
    ("ErrorRecoveryLevel", "0"),
];

/// Whom to ask for what.
#[derive(Debug, Clone)]
pub struct Place {
    /// Where the target listens.
    pub address: SocketAddr,
    /// Its IQN.
    pub target: String,
    /// The initiator's IQN.
    pub initiator: String,
    /// The logical unit.
    pub lun: u8,
}

/// A session in full feature phase.
pub struct Session {
    /// Its connection.
    pub socket: TcpStream,
    /// The logical unit as a command names it.
    pub lun: u8,
    /// The next command's number.
    pub command: u32,
    /// The last command number that the target takes.
    pub window_end: u32,
    /// The status number that is expected next.
    pub status: u32,
    /// Bytes of a write that may come with its command.
    pub immediate: u32,
    /// Bytes of data that the target takes in one PDU.
    pub segment: u32,
}

/// What a logical unit is.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// Its size in bytes.
    pub bytes: u64,
    /// Bytes of a logical block.
    pub block: u32,
}

/// Logs in; `number` makes the session differ from others of the same initiator.
///
/// # Errors
/// What the target refused, and the socket's.
pub fn log_in(place: &Place, number: u16) -> Result<(Session, Unit)> {
    let begin = Instant::now();
    loop {
        match attempt(place, number)? {
            Ok(session) => return Ok(session),
            Err(UNAVAILABLE) if begin.elapsed() < BUSY => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(status) => bail!("{} refused the login: status {status:04x}", place.target),
        }
    }
}

/// One login: a session, or the status of the refusal.
fn attempt(place: &Place, number: u16) -> Result<Result<(Session, Unit), u16>> {
    let mut socket = TcpStream::connect(place.address)
        .with_context(|| format!("connect to {}", place.address))?;
    socket.set_nodelay(true).context("set TCP_NODELAY")?;
    socket
        .set_read_timeout(Some(SILENCE))
        .context("set SO_RCVTIMEO")?;
    let mut text = format!(
        "InitiatorName={}\0TargetName={}\0SessionType=Normal\0",
        place.initiator, place.target
    );
    for (key, value) in OFFER {
        text.push_str(&format!("{key}={value}\0"));
    }
    let mut agreed = Agreed::default();
    let mut status = 0;
    let mut data = text.into_bytes();
    let (answer, window_end) = loop {
        let mut login = Header::new(opcode::LOGIN | IMMEDIATE, FINAL | OPERATIONAL_TO_FULL);
        // ISID: a random-format qualifier, 80h (11.12.5).
        login.0[8] = 0x80;
        login.0[12..14].copy_from_slice(&number.to_be_bytes());
        login.set(24, 1).set(28, status);
        pdu::write(&mut socket, &mut login, &data)?;
        let (answer, text) = pdu::read(&mut socket).context("log in")?;
        if answer.opcode() != opcode::LOGIN_RESPONSE {
            bail!("a login was answered with opcode {:#x}", answer.opcode());
        }
        let refusal = u16::from_be_bytes([answer.0[36], answer.0[37]]);
        if refusal != 0 {
            return Ok(Err(refusal));
        }
        status = answer.u32(24).wrapping_add(1);
        agreed.take(&String::from_utf8_lossy(&text));
        if answer.0[1] & (FINAL | 0x03) == FINAL | 0x03 {
            break (answer, answer.u32(32));
        }
        data.clear();
    };
    let mut session = Session {
        socket,
        lun: place.lun,
        command: answer.u32(28),
        window_end,
        status,
        immediate: if agreed.immediate {
            agreed.first_burst.min(agreed.segment)
        } else {
            0
        },
        segment: agreed.segment,
    };
    let unit = session.unit()?;
    Ok(Ok((session, unit)))
}

/// What the target answered, or the defaults of RFC 7143, section 13.
struct Agreed {
    segment: u32,
    first_burst: u32,
    immediate: bool,
}

impl Default for Agreed {
    fn default() -> Self {
        Self {
            segment: 8192,
            first_burst: 65536,
            immediate: true,
        }
    }
}

impl Agreed {
    fn take(&mut self, text: &str) {
        for pair in text.split('\0') {
            let Some((key, value)) = pair.split_once('=') else {
                continue;
            };
            match (key, value.parse::<u32>()) {
                ("MaxRecvDataSegmentLength", Ok(bytes)) => self.segment = bytes,
                ("FirstBurstLength", Ok(bytes)) => self.first_burst = bytes,
                ("ImmediateData", _) => self.immediate = value == "Yes",
                _ => {}
            }
        }
    }
}

impl Session {
    /// Asks until unit attentions are through, then for the capacity.
    fn unit(&mut self) -> Result<Unit> {
        const ATTENTIONS: u32 = 8;
        let mut ready = [0; 16];
        ready[0] = scsi::TEST_UNIT_READY;
        let mut status = 0;
        for _ in 0..ATTENTIONS {
            (status, _) = self.ask(&ready, 0)?;
            if status == 0 {
                break;
            }
        }
        if status != 0 {
            bail!("LUN {} is not ready: SCSI status {status:#04x}", self.lun);
        }
        let mut capacity = [0; 16];
        capacity[0] = scsi::SERVICE_ACTION_IN_16;
        capacity[1] = scsi::READ_CAPACITY_16;
        capacity[13] = 32;
        let (status, data) = self.ask(&capacity, 32)?;
        let (Some(last), Some(block)) = (
            data.first_chunk::<8>(),
            data.get(8..).and_then(|rest| rest.first_chunk::<4>()),
        ) else {
            bail!(
                "READ CAPACITY(16): SCSI status {status:#04x}, {} bytes",
                data.len()
            );
        };
        let block = u32::from_be_bytes(*block);
        let blocks = u64::from_be_bytes(*last) + 1;
        Ok(Unit {
            bytes: blocks * u64::from(block),
            block,
        })
    }

    /// One command of no more than one Data-In; its status and data.
    fn ask(&mut self, cdb: &[u8; 16], expect: u32) -> Result<(u8, Vec<u8>)> {
        const READ: u8 = 0x40;
        const SIMPLE: u8 = 0x01;
        let flags = FINAL | SIMPLE | if expect > 0 { READ } else { 0 };
        let mut header = Header::new(opcode::SCSI_COMMAND, flags);
        header.0[9] = self.lun;
        header.0[32..48].copy_from_slice(cdb);
        header
            .set(20, expect)
            .set(24, self.command)
            .set(28, self.status);
        self.command = self.command.wrapping_add(1);
        pdu::write(&mut self.socket, &mut header, &[])?;
        let mut found = Vec::new();
        loop {
            let (answer, data) = pdu::read(&mut self.socket)?;
            let with_status = answer.opcode() == opcode::SCSI_RESPONSE
                || (answer.opcode() == opcode::DATA_IN && answer.0[1] & 1 != 0);
            if answer.opcode() == opcode::DATA_IN {
                found.extend(data);
            } else if !with_status {
                continue;
            }
            self.window_end = answer.u32(32);
            if with_status {
                self.status = answer.u32(24).wrapping_add(1);
                return Ok((answer.0[3], found));
            }
        }
    }
}

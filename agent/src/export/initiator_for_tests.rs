//! A small iSCSI initiator in user space, for tests: one connection, commands
//! one at a time or as raw PDUs.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::attach::ports::Chap;
use crate::iscsi::chap::{self, Algorithm};
use crate::iscsi::text;

/// Nothing in these tests takes longer than this.
const PATIENCE: Duration = Duration::from_secs(20);
const BHS: usize = 48;
/// Data in one PDU, of a target that has declared nothing else.
const MOST_DATA: usize = 8192;
/// Challenges of the initiator's; any bytes will do in a test.
const CHALLENGE: [u8; 16] = [0x5a; 16];
const IDENTIFIER: u8 = 7;

pub const GOOD: u8 = 0x00;
pub const CHECK_CONDITION: u8 = 0x02;
pub const RESERVATION_CONFLICT: u8 = 0x18;

/// A connection to a target.
#[derive(Debug)]
pub struct TestInitiator {
    pub stream: TcpStream,
    number: u32,
    tag: u32,
}

/// Who logs in to what.
#[derive(Clone)]
pub struct Login {
    pub initiator: String,
    /// None: a discovery session.
    pub target: Option<String>,
    pub chap: Option<Chap>,
}

/// One PDU from the target.
#[derive(Debug)]
pub struct Pdu {
    pub header: [u8; BHS],
    pub data: Vec<u8>,
}

impl Pdu {
    pub fn opcode(&self) -> u8 {
        self.header[0] & 0x3f
    }

    pub fn tag(&self) -> u32 {
        u32::from_be_bytes(self.header[16..20].try_into().unwrap())
    }

    fn pairs(&self) -> Vec<(&str, &str)> {
        text::parse(&self.data).unwrap()
    }

    fn login_status(&self) -> u16 {
        assert_eq!(self.opcode(), 0x23, "{self:?}");
        u16::from_be_bytes(self.header[36..38].try_into().unwrap())
    }
}

impl TestInitiator {
    pub async fn open(address: SocketAddr) -> Self {
        Self {
            stream: TcpStream::connect(address).await.unwrap(),
            number: 1,
            tag: 1,
        }
    }

    /// Opens a connection and logs in, or the refusal's status.
    pub async fn connect(address: SocketAddr, login: &Login) -> Result<Self, u16> {
        let mut this = Self::open(address).await;
        this.log_in(login).await.map(|()| this)
    }

    /// Logs in; with CHAP both sides prove themselves.
    pub async fn log_in(&mut self, login: &Login) -> Result<(), u16> {
        let kind = if login.target.is_some() {
            "Normal"
        } else {
            "Discovery"
        };
        let mut who = vec![
            ("InitiatorName", login.initiator.as_str()),
            ("SessionType", kind),
        ];
        who.extend(login.target.as_deref().map(|target| ("TargetName", target)));
        let Some(chap) = &login.chap else {
            self.step(&who, true).await?;
            return Ok(());
        };
        who.push(("AuthMethod", "CHAP"));
        let answer = self.step(&who, false).await?;
        assert_eq!(text::value(&answer.pairs(), "AuthMethod"), Some("CHAP"));
        let answer = self.step(&[("CHAP_A", "7,5")], false).await?;
        let pairs = answer.pairs();
        assert_eq!(text::value(&pairs, "CHAP_A"), Some("7"));
        let identifier: u8 = text::value(&pairs, "CHAP_I").unwrap().parse().unwrap();
        let challenge = chap::decode(text::value(&pairs, "CHAP_C").unwrap()).unwrap();
        let respond = |identifier: u8, secret: &str, challenge: &[u8]| {
            let response = Algorithm::Sha256.response(identifier, secret.as_bytes(), challenge);
            chap::encode(&response)
        };
        let response = respond(identifier, &chap.initiator.secret, &challenge);
        let (asked, number) = (chap::encode(&CHALLENGE), IDENTIFIER.to_string());
        let proof = [
            ("CHAP_N", chap.initiator.name.as_str()),
            ("CHAP_R", response.as_str()),
            ("CHAP_I", number.as_str()),
            ("CHAP_C", asked.as_str()),
        ];
        let answer = self.step(&proof, true).await?;
        let pairs = answer.pairs();
        assert_eq!(text::value(&pairs, "CHAP_N"), Some(&*chap.target.name));
        let expected = respond(IDENTIFIER, &chap.target.secret, &CHALLENGE);
        assert_eq!(text::value(&pairs, "CHAP_R"), Some(&*expected));
        Ok(())
    }

    /// A step of the security stage; the last one leads to the full feature phase.
    async fn step(&mut self, pairs: &[(&str, &str)], last: bool) -> Result<Pdu, u16> {
        let mut keys = Vec::new();
        for (key, value) in pairs {
            text::put(&mut keys, key, value);
        }
        let mut header = [0; BHS];
        header[0] = 0x43;
        header[1] = if last { 0x83 } else { 0 };
        header[8] = 0x80;
        self.send(header, 1, &keys).await;
        let answer = self.receive().await.expect("an answer to the login");
        match answer.login_status() {
            0 => Ok(answer),
            status => Err(status),
        }
    }

    /// Sends bytes as they are. Of a target that has closed [`Self::receive`] tells.
    pub async fn raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    async fn send(&mut self, mut header: [u8; BHS], tag: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap().to_be_bytes();
        header[5..8].copy_from_slice(&length[1..]);
        header[16..20].copy_from_slice(&tag.to_be_bytes());
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        let mut bytes = header.to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        self.raw(&bytes).await;
    }

    /// The next PDU; none when the target has closed the connection.
    pub async fn receive(&mut self) -> Option<Pdu> {
        let whole = async {
            let mut header = [0; BHS];
            self.stream.read_exact(&mut header).await.ok()?;
            let length = u32::from_be_bytes(header[4..8].try_into().unwrap()) & 0xff_ffff;
            let length = usize::try_from(length).unwrap();
            let mut data = vec![0; length.next_multiple_of(4)];
            self.stream.read_exact(&mut data).await.ok()?;
            data.truncate(length);
            Some(Pdu { header, data })
        };
        tokio::time::timeout(PATIENCE, whole)
            .await
            .expect("a PDU in time")
    }

    /// Sends a command that transfers `length` bytes, of which `data` goes with
    /// it; its tag.
    pub async fn command(&mut self, cdb: &[u8], write: bool, length: usize, data: &[u8]) -> u32 {
        self.tag += 1;
        let mut header = [0; BHS];
        let direction = match (length, write) {
            (0, _) => 0,
            (_, true) => 0x20,
            (_, false) => 0x40,
        };
        header[0] = 0x01;
        header[1] = 0x80 | direction | 1;
        header[20..24].copy_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
        header[32..32 + cdb.len()].copy_from_slice(cdb);
        self.send(header, self.tag, data).await;
        self.number += 1;
        self.tag
    }

    /// Sends the data that an R2T asks for, all of it.
    pub async fn send_data(&mut self, r2t: &Pdu, data: &[u8]) {
        assert_eq!(r2t.opcode(), 0x31, "{r2t:?}");
        // These PDUs have no number of commands.
        let command_number = std::mem::take(&mut self.number);
        let begins = u32::from_be_bytes(r2t.header[40..44].try_into().unwrap());
        for (number, part) in (0_u32..).zip(data.chunks(MOST_DATA)) {
            let mut header = [0; BHS];
            let offset = number * u32::try_from(MOST_DATA).unwrap();
            let last = usize::try_from(offset).unwrap() + part.len() == data.len();
            header[0] = 0x05;
            header[1] = if last { 0x80 } else { 0 };
            header[20..24].copy_from_slice(&r2t.header[20..24]);
            header[36..40].copy_from_slice(&number.to_be_bytes());
            header[40..44].copy_from_slice(&(begins + offset).to_be_bytes());
            self.send(header, r2t.tag(), part).await;
        }
        self.number = command_number;
    }

    /// The end of the command with this tag: its data and its status.
    pub async fn done(&mut self, tag: u32) -> (Vec<u8>, u8) {
        let mut read = Vec::new();
        loop {
            let pdu = self.receive().await.expect("an answer");
            match pdu.opcode() {
                0x25 if pdu.tag() == tag => {
                    read.extend_from_slice(&pdu.data);
                    if pdu.header[1] & 1 != 0 {
                        return (read, pdu.header[3]);
                    }
                }
                0x21 if pdu.tag() == tag => {
                    if pdu.header[3] == CHECK_CONDITION {
                        read = pdu.data[2..].to_vec();
                    }
                    return (read, pdu.header[3]);
                }
                _ => panic!("instead of an answer to {tag}: {pdu:?}"),
            }
        }
    }

    /// Does a command; with CHECK CONDITION, the sense.
    pub async fn run(&mut self, cdb: &[u8], write: bool, length: usize) -> (Vec<u8>, u8) {
        let tag = self.command(cdb, write, length, &[]).await;
        self.done(tag).await
    }

    pub async fn read(&mut self, lba: u8, blocks: u8) -> (Vec<u8>, u8) {
        self.run(&ten(0x28, lba, blocks), false, usize::from(blocks) * 4096)
            .await
    }

    /// Writes one block with the command; its tag.
    pub async fn begin_write(&mut self, lba: u8, byte: u8) -> u32 {
        self.command(&ten(0x2a, lba, 1), true, 4096, &[byte; 4096])
            .await
    }

    pub async fn write(&mut self, lba: u8, byte: u8) -> u8 {
        let tag = self.begin_write(lba, byte).await;
        self.done(tag).await.1
    }

    /// TEST UNIT READY; the sense, if it has something to tell.
    pub async fn ready(&mut self) -> (Vec<u8>, u8) {
        self.run(&[0; 6], false, 0).await
    }

    /// Asks for a task management function; its tag.
    pub async fn manage(&mut self, function: u8) -> u32 {
        self.tag += 1;
        let mut header = [0; BHS];
        header[0] = 0x42;
        header[1] = 0x80 | function;
        header[20..24].copy_from_slice(&u32::MAX.to_be_bytes());
        self.send(header, self.tag, &[]).await;
        self.tag
    }

    /// SendTargets=All: the names.
    pub async fn targets(&mut self) -> Vec<String> {
        let mut header = [0; BHS];
        header[0] = 0x04;
        header[1] = 0x80;
        header[20..24].copy_from_slice(&u32::MAX.to_be_bytes());
        self.send(header, 9, b"SendTargets=All\0").await;
        self.number += 1;
        let answer = self.receive().await.expect("an answer");
        assert_eq!(answer.opcode(), 0x24, "{answer:?}");
        let pairs = answer.data.split(|byte| *byte == 0);
        let pairs = pairs.map(|pair| std::str::from_utf8(pair).unwrap());
        pairs
            .filter_map(|pair| pair.strip_prefix("TargetName=").map(str::to_owned))
            .collect()
    }
}

/// A command of ten bytes.
pub fn ten(opcode: u8, lba: u8, blocks: u8) -> [u8; 10] {
    [opcode, 0, 0, 0, 0, lba, 0, 0, blocks, 0]
}

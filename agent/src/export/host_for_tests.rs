//! A small NVMe/TCP host in user space, for tests: one connection, commands
//! one at a time or as raw PDUs.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use std::net::SocketAddr;
use std::time::Duration;

use crate::nvme_tcp::wire::{self, Completion, Data, Digests, FLAG_LAST, Frame, Kind};

/// Nothing in these tests takes longer than this.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection to a target.
#[derive(Debug)]
pub struct TestHost {
    pub stream: TcpStream,
    pub digests: Digests,
    next: u16,
}

/// Who connects to what.
#[derive(Clone)]
pub struct Login {
    pub subsystem: String,
    pub host: String,
    pub host_id: Uuid,
    pub controller: u16,
    pub queue: u16,
    pub keep_alive: u32,
}

/// One PDU from the target.
#[derive(Debug)]
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
}

/// A 64-byte command for the namespace, with a data descriptor of `length` bytes.
pub fn command(opcode: u8, descriptor: u8, length: u32, dwords: [u32; 3]) -> [u8; 64] {
    let mut entry = [0; 64];
    (entry[0], entry[1], entry[4], entry[39]) = (opcode, 0x40, 1, descriptor);
    entry[32..36].copy_from_slice(&length.to_le_bytes());
    for (at, dword) in dwords.into_iter().enumerate() {
        entry[40 + 4 * at..44 + 4 * at].copy_from_slice(&dword.to_le_bytes());
    }
    entry
}

/// Property Set or Get.
pub fn property(set: bool, wide: bool, offset: u8, value: u32) -> [u8; 64] {
    let mut entry = command(0x7f, 0x5a, 0, [u32::from(wide), offset.into(), value]);
    entry[4] = if set { 0 } else { 4 };
    entry
}

impl TestHost {
    /// Connects TCP and agrees on `digests`.
    pub async fn open(address: SocketAddr, digests: Digests) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut host = Self {
            stream,
            digests: Digests::default(),
            next: 1,
        };
        let mut request = [0; 128];
        request[..8].copy_from_slice(&wire::common(Kind::IcReq, 0, digests, 0));
        request[11] = u8::from(digests.header) | u8::from(digests.data) << 1;
        host.raw(&request).await;
        let answer = host.receive().await.unwrap();
        assert_eq!(
            (answer.kind, answer.header[11]),
            (Kind::IcResp, request[11])
        );
        host.digests = digests;
        host
    }

    /// Opens a connection and connects a queue; the controller id or the refusal's status.
    pub async fn connect(
        address: SocketAddr,
        digests: Digests,
        login: &Login,
    ) -> Result<(Self, u16), u16> {
        let mut host = Self::open(address, digests).await;
        let done = host.log_in(login).await;
        if done.status == 0 {
            Ok((host, done.result as u16))
        } else {
            Err(done.status)
        }
    }

    pub async fn log_in(&mut self, login: &Login) -> Completion {
        let mut entry = command(0x7f, 0x01, 1024, [0; 3]);
        entry[4] = 1;
        entry[42..44].copy_from_slice(&login.queue.to_le_bytes());
        entry[44..46].copy_from_slice(&31u16.to_le_bytes());
        entry[48..52].copy_from_slice(&login.keep_alive.to_le_bytes());
        let mut data = vec![0; 1024];
        data[..16].copy_from_slice(login.host_id.as_bytes());
        data[16..18].copy_from_slice(&login.controller.to_le_bytes());
        data[256..256 + login.subsystem.len()].copy_from_slice(login.subsystem.as_bytes());
        data[512..512 + login.host.len()].copy_from_slice(login.host.as_bytes());
        self.send(entry, &data).await;
        self.receive()
            .await
            .expect("an answer to Connect")
            .completion()
    }

    /// Sends bytes as they are.
    pub async fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Sends a command with data in its capsule; its identifier.
    pub async fn send(&mut self, mut entry: [u8; 64], data: &[u8]) -> u16 {
        let command = self.next;
        self.next += 1;
        entry[2..4].copy_from_slice(&command.to_le_bytes());
        let common = wire::common(Kind::CapsuleCmd, 0, self.digests, data.len() as u32);
        let mut pdu = common.to_vec();
        pdu.extend_from_slice(&entry);
        self.finish(pdu, data).await;
        command
    }

    /// Sends an H2CData PDU.
    pub async fn send_data(&mut self, header: Data, last: bool, data: &[u8]) {
        let flags = if last { FLAG_LAST } else { 0 };
        let common = wire::common(Kind::H2CData, flags, self.digests, data.len() as u32);
        self.finish(header.encode(common).to_vec(), data).await;
    }

    async fn finish(&mut self, mut pdu: Vec<u8>, data: &[u8]) {
        if self.digests.header {
            let digest = crc32c::crc32c(&pdu);
            pdu.extend_from_slice(&digest.to_le_bytes());
        }
        pdu.extend_from_slice(data);
        if self.digests.data && !data.is_empty() {
            pdu.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
        }
        self.raw(&pdu).await;
    }

    /// The next PDU; none when the target has closed the connection.
    pub async fn receive(&mut self) -> Option<Answer> {
        tokio::time::timeout(PATIENCE, self.receive_whole())
            .await
            .expect("a PDU in time")
    }

    async fn receive_whole(&mut self) -> Option<Answer> {
        let mut header = vec![0; 8];
        self.stream.read_exact(&mut header).await.ok()?;
        let frame = Frame::check(header.first_chunk().unwrap(), self.digests).unwrap();
        header.resize(frame.header, 0);
        self.stream.read_exact(&mut header[8..]).await.ok()?;
        if frame.header_digest {
            assert_eq!(
                self.stream.read_u32_le().await.ok()?,
                crc32c::crc32c(&header)
            );
        }
        assert_eq!(frame.pad, 0, "Linux skips no padding");
        let mut data = vec![0; frame.data];
        self.stream.read_exact(&mut data).await.ok()?;
        if frame.data_digest {
            assert_eq!(self.stream.read_u32_le().await.ok()?, crc32c::crc32c(&data));
        }
        Some(Answer {
            kind: frame.kind,
            header,
            data,
        })
    }

    /// Does a command: its data and its completion.
    pub async fn run(&mut self, entry: [u8; 64], data: &[u8]) -> (Vec<u8>, Completion) {
        let command = self.send(entry, data).await;
        let mut read = Vec::new();
        loop {
            let answer = self.receive().await.expect("an answer");
            if answer.kind == Kind::C2HData {
                read = answer.data;
                continue;
            }
            let completion = answer.completion();
            assert_eq!(completion.command, command);
            return (read, completion);
        }
    }

    /// Does a command without data to send; its status.
    pub async fn status(&mut self, entry: [u8; 64]) -> u16 {
        self.run(entry, &[]).await.1.status
    }

    /// The R2T that is next.
    pub async fn r2t(&mut self) -> Data {
        let answer = self.receive().await.expect("an R2T");
        assert_eq!(answer.kind, Kind::R2T, "{answer:?}");
        Data::decode(answer.header.first_chunk().unwrap())
    }

    /// The C2HTermReq that is next, then the end: (FES, field).
    pub async fn terminated(&mut self) -> (u16, u32) {
        let answer = self.receive().await.expect("a C2HTermReq");
        assert_eq!(answer.kind, Kind::C2HTermReq, "{answer:?}");
        let read = (
            wire::u16_at(&answer.header, 8),
            wire::u32_at(&answer.header, 10),
        );
        assert!(
            self.receive().await.is_none(),
            "the connection is closed behind it"
        );
        read
    }

    /// Enables the controller, as a host does after Connect.
    pub async fn enable(&mut self) {
        assert_eq!(
            self.status(property(true, false, 0x14, 0x0046_0001)).await,
            0
        );
        let (_, status) = self.run(property(false, false, 0x1c, 0), &[]).await;
        assert_eq!(status.result & 1, 1, "ready");
    }
}

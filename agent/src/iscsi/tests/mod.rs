//! Whole connections, driven byte for byte by an initiator that says what it is told to.

mod commands;
mod malformed;
mod management;
mod numbers;
mod reserving;
mod sessions;
mod transfers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::chap::{self, Algorithm};
use super::connection::{Iscsi, Shared};
use super::for_tests::{INITIATOR, MemoryDevice, OneTarget, TARGET, target, target_of, unit};
use super::metrics::Metrics;
use super::target::Target;
use super::task::{IMMEDIATE, WINDOW};
use super::text;
use super::wire::{BHS, Digests, Header, NO_TAG};
use crate::block::BLOCK;
use crate::reactor::End;
use crate::reactor::inline::Inline;

const BLOCK_LENGTH: usize = BLOCK as usize;
const WHO: [(&str, &str); 2] = [("InitiatorName", INITIATOR), ("TargetName", TARGET)];
const CONNECTION: u16 = 3;

/// A PDU that the target sent.
#[derive(Debug, Clone)]
struct Pdu {
    header: [u8; BHS],
    data: Vec<u8>,
}

impl Pdu {
    fn opcode(&self) -> u8 {
        self.header[0] & 0x3f
    }
    fn word(&self, at: usize) -> u32 {
        Header::new(self.header).word(at)
    }
    fn login_status(&self) -> u32 {
        assert_eq!(self.opcode(), 0x23, "{self:?}");
        self.word(36) >> 16
    }
    /// Reason of a Reject, whose data is the header that it is about.
    fn reject(&self) -> u8 {
        assert_eq!((self.opcode(), self.data.len()), (0x3f, BHS), "{self:?}");
        self.header[2]
    }
    /// SCSI status of a response, or of a Data-In that brings it.
    fn status(&self) -> u8 {
        assert!(matches!(self.opcode(), 0x21 | 0x25), "{self:?}");
        self.header[3]
    }
    /// Key, ASC and ASCQ of a CHECK CONDITION.
    fn sense(&self) -> (u8, u8, u8) {
        assert_eq!((self.opcode(), self.header[3]), (0x21, 2), "{self:?}");
        let length = u16::from_be_bytes([self.data[0], self.data[1]]);
        assert_eq!(usize::from(length), self.data.len() - 2, "{self:?}");
        if self.data[2] == 0x72 {
            (self.data[3], self.data[4], self.data[5])
        } else {
            (self.data[4], self.data[14], self.data[15])
        }
    }
}

/// An initiator of one connection.
struct Initiator {
    line: Inline,
    target: Arc<Target>,
    device: Arc<MemoryDevice>,
    metrics: Metrics,
    digests: Digests,
    number: u32,
    tag: u32,
    isid: u8,
    tsih: u16,
    rest: Vec<u8>,
}

const CHAP: (&str, &str) = ("user", "a secret of sixteen");

fn line(target: &Arc<Target>, metrics: &Metrics) -> Inline {
    let directory = Arc::new(OneTarget(Arc::clone(target)));
    let shared = Shared::new(directory, metrics.clone());
    let address = ([127, 0, 0, 1], 3260).into();
    let protocol = Iscsi::new(shared, address, address, None, Instant::now());
    Inline::new(Box::new(protocol))
}

impl Initiator {
    fn new(keys: &[(&str, &str)]) -> Self {
        let device = MemoryDevice::new(1024);
        let served = Arc::clone(&device) as Arc<dyn crate::block::BlockDevice>;
        let target = target(served, None, None, 4);
        let mut this = Self::of(&target, &device, 1);
        this.begin(keys);
        this
    }

    fn of(target: &Arc<Target>, device: &Arc<MemoryDevice>, isid: u8) -> Self {
        let metrics = Metrics::default();
        Self {
            line: line(target, &metrics),
            target: Arc::clone(target),
            device: Arc::clone(device),
            metrics,
            digests: Digests::default(),
            number: 1,
            tag: 1,
            isid,
            tsih: 0,
            rest: Vec::new(),
        }
    }

    /// Another connection to the same target, not logged in.
    fn another(&self, isid: u8) -> Self {
        Self::of(&self.target, &self.device, isid)
    }

    /// Another session of the same target.
    fn second(&self, isid: u8) -> Self {
        let mut this = self.another(isid);
        this.begin(OPEN);
        this
    }

    /// Logs in for the first time, and is told that the unit is new to it.
    fn begin(&mut self, keys: &[(&str, &str)]) {
        assert_eq!(only(self.log_in(keys)).login_status(), 0);
        assert_eq!(only(self.ready()).sense(), (6, 0x29, 0));
    }

    /// A login request from stage `current` to `next`, with these keys.
    fn login(&mut self, current: u8, next: Option<u8>, keys: &[(&str, &str)]) -> Vec<Pdu> {
        let mut text = Vec::new();
        for (key, value) in keys {
            text::put(&mut text, key, value);
        }
        let mut header = [0; BHS];
        header[0] = 0x43;
        header[1] = next.map_or(0, |next| 0x80 | next) | current << 2;
        header[8] = 0x80;
        header[13] = self.isid;
        header[14..16].copy_from_slice(&self.tsih.to_be_bytes());
        header[20..22].copy_from_slice(&CONNECTION.to_be_bytes());
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        self.send(header, &text)
    }

    fn log_in(&mut self, keys: &[(&str, &str)]) -> Vec<Pdu> {
        let answer = self.login(1, Some(3), &[&WHO[..], keys].concat());
        let on = |key: &str| keys.contains(&(key, "CRC32C"));
        self.digests = Digests {
            header: on("HeaderDigest"),
            data: on("DataDigest"),
        };
        answer
    }

    /// Logs in by CHAP with this secret, and no other keys.
    fn log_in_by_chap(&mut self, secret: &str) -> Vec<Pdu> {
        self.login(0, None, &[&WHO[..], &[("AuthMethod", "CHAP")]].concat());
        let asked = only(self.login(0, None, &[("CHAP_A", "7")]));
        let asked = text::parse(&asked.data).unwrap();
        let said = |key| text::value(&asked, key).unwrap();
        let challenge = chap::decode(said("CHAP_C")).unwrap();
        let identifier = said("CHAP_I").parse().unwrap();
        let response = Algorithm::Sha256.response(identifier, secret.as_bytes(), &challenge);
        let response = chap::encode(&response);
        let proof = [("CHAP_N", CHAP.0), ("CHAP_R", response.as_str())];
        let answer = self.login(0, Some(1), &proof);
        if answer[0].login_status() != 0 {
            return answer;
        }
        self.login(1, Some(3), &[])
    }

    /// How many PDUs were rejected for this reason.
    fn malformed(&self, reason: &str) -> usize {
        let mut registry = prometheus_client::registry::Registry::default();
        self.metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let line = format!("drover_iscsi_malformed_pdus_total{{reason=\"{reason}\"}} ");
        let count = text.lines().find_map(|one| one.strip_prefix(&line));
        count.map_or(0, |count| count.parse().unwrap())
    }

    fn bytes(&self, mut header: [u8; BHS], data: &[u8]) -> Vec<u8> {
        let length = u32::try_from(data.len()).unwrap().to_be_bytes();
        header[5..8].copy_from_slice(&length[1..]);
        let mut bytes = header.to_vec();
        if self.digests.header {
            bytes.extend(crc32c::crc32c(&header).to_le_bytes());
        }
        let mut padded = data.to_vec();
        padded.resize(data.len().next_multiple_of(4), 0);
        bytes.extend(&padded);
        if self.digests.data && !data.is_empty() {
            bytes.extend(crc32c::crc32c(&padded).to_le_bytes());
        }
        bytes
    }

    fn send(&mut self, header: [u8; BHS], data: &[u8]) -> Vec<Pdu> {
        let bytes = self.bytes(header, data);
        let said = self.line.send(&bytes);
        self.take(said)
    }

    /// Takes the PDUs apart and checks their digests.
    fn take(&mut self, said: Vec<u8>) -> Vec<Pdu> {
        self.rest.extend(said);
        let mut pdus = Vec::new();
        while let Some(header) = self.rest.first_chunk::<BHS>().copied() {
            let length = Header::new(header).word(4) as usize & 0xff_ffff;
            let padded = length.next_multiple_of(4);
            let head = BHS + if self.digests.header { 4 } else { 0 };
            let tail = if self.digests.data && length > 0 {
                4
            } else {
                0
            };
            if self.rest.len() < head + padded + tail {
                break;
            }
            let whole: Vec<u8> = self.rest.drain(..head + padded + tail).collect();
            if self.digests.header {
                assert_eq!(whole[BHS..head], crc32c::crc32c(&header).to_le_bytes());
            }
            let data = &whole[head..head + padded];
            if tail > 0 {
                assert_eq!(whole[head + padded..], crc32c::crc32c(data).to_le_bytes());
            }
            pdus.push(Pdu {
                header,
                data: data[..length].to_vec(),
            });
        }
        pdus
    }

    /// A command's header. `flags`: F 80h, R 40h, W 20h.
    fn command(&mut self, flags: u8, expected: usize, cdb: &[u8]) -> [u8; BHS] {
        let mut header = [0; BHS];
        header[0] = 0x01;
        header[1] = flags | 1;
        self.tag += 1;
        header[16..20].copy_from_slice(&self.tag.to_be_bytes());
        let expected = u32::try_from(expected).unwrap();
        header[20..24].copy_from_slice(&expected.to_be_bytes());
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        self.number += 1;
        header[32..32 + cdb.len()].copy_from_slice(cdb);
        header
    }

    fn run(&mut self, flags: u8, expected: usize, cdb: &[u8], data: &[u8]) -> Vec<Pdu> {
        let header = self.command(0x80 | flags, expected, cdb);
        self.send(header, data)
    }

    fn read(&mut self, lba: u8, blocks: u8) -> Vec<Pdu> {
        let cdb = [0x28, 0, 0, 0, 0, lba, 0, 0, blocks, 0];
        self.run(0x40, usize::from(blocks) * BLOCK_LENGTH, &cdb, &[])
    }

    fn write(&mut self, lba: u8, blocks: u8, immediate: &[u8]) -> Vec<Pdu> {
        let cdb = write_cdb(lba, blocks);
        self.run(0x20, usize::from(blocks) * BLOCK_LENGTH, &cdb, immediate)
    }

    fn ready(&mut self) -> Vec<Pdu> {
        self.run(0, 0, &[0; 6], &[])
    }

    fn data_out(
        &mut self,
        last: bool,
        transfer: u32,
        number: u32,
        offset: usize,
        data: &[u8],
    ) -> Vec<Pdu> {
        let mut header = [0; BHS];
        header[0] = 0x05;
        header[1] = if last { 0x80 } else { 0 };
        header[16..20].copy_from_slice(&self.tag.to_be_bytes());
        header[20..24].copy_from_slice(&transfer.to_be_bytes());
        header[36..40].copy_from_slice(&number.to_be_bytes());
        let offset = u32::try_from(offset).unwrap();
        header[40..44].copy_from_slice(&offset.to_be_bytes());
        self.send(header, data)
    }

    fn manage(&mut self, function: u8, referenced: u32) -> Vec<Pdu> {
        let mut header = [0; BHS];
        header[0] = 0x42;
        header[1] = 0x80 | function;
        header[16..20].copy_from_slice(&0x7777_u32.to_be_bytes());
        header[20..24].copy_from_slice(&referenced.to_be_bytes());
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        self.send(header, &[])
    }

    /// A PDU of this opcode, with the initiator's next number.
    fn pdu(&mut self, opcode: u8, flags: u8) -> [u8; BHS] {
        let mut header = [0; BHS];
        header[0] = opcode;
        header[1] = flags;
        self.tag += 1;
        header[16..20].copy_from_slice(&self.tag.to_be_bytes());
        header[20..24].fill(0xff);
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        header
    }

    fn nudge(&mut self) -> Vec<Pdu> {
        let said = self.line.wait(Duration::from_millis(5));
        self.take(said)
    }

    fn stored(&self, at: usize) -> u8 {
        self.device.bytes.lock().unwrap()[at]
    }
}

fn write_cdb(lba: u8, blocks: u8) -> [u8; 10] {
    [0x2a, 0, 0, 0, 0, lba, 0, 0, blocks, 0]
}

fn only(pdus: Vec<Pdu>) -> Pdu {
    assert_eq!(pdus.len(), 1, "{pdus:?}");
    pdus.into_iter().next().unwrap()
}

const SUPPRESSED: &[(&str, &str)] = &[("InitialR2T", "Yes"), ("ImmediateData", "No")];
const OPEN: &[(&str, &str)] = &[
    ("InitialR2T", "No"),
    ("ImmediateData", "Yes"),
    ("MaxRecvDataSegmentLength", "262144"),
];

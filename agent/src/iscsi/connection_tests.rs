//! Whole connections, driven byte for byte.

use super::super::for_tests::{INITIATOR, MemoryDevice, OneTarget, TARGET, target};
use super::super::text;
use super::super::wire::NO_TAG;
use super::*;
use crate::block::BLOCK;
use crate::reactor::inline::Inline;

const BLOCK_LENGTH: usize = BLOCK as usize;

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
    /// SCSI status of a response, or of a Data-In that brings it.
    fn status(&self) -> u8 {
        assert!(matches!(self.opcode(), 0x21 | 0x25), "{self:?}");
        self.header[3]
    }
    /// Key, ASC and ASCQ of a CHECK CONDITION.
    fn sense(&self) -> (u8, u8, u8) {
        assert_eq!((self.opcode(), self.header[3]), (0x21, 2), "{self:?}");
        (self.data[4], self.data[14], self.data[15])
    }
}

/// An initiator of one connection.
struct Initiator {
    line: Inline,
    target: Arc<target::Target>,
    device: Arc<MemoryDevice>,
    digests: Digests,
    number: u32,
    tag: u32,
    isid: u8,
    rest: Vec<u8>,
}

fn line(target: &Arc<target::Target>) -> Inline {
    let directory = Arc::new(OneTarget(Arc::clone(target)));
    let shared = Shared::new(directory, Metrics::default());
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
        let answer = this.log_in(keys);
        assert_eq!(answer[0].word(36) >> 16, 0);
        this
    }

    fn of(target: &Arc<target::Target>, device: &Arc<MemoryDevice>, isid: u8) -> Self {
        Self {
            line: line(target),
            target: Arc::clone(target),
            device: Arc::clone(device),
            digests: Digests::default(),
            number: 1,
            tag: 1,
            isid,
            rest: Vec::new(),
        }
    }

    /// Another session of the same target.
    fn second(&self, isid: u8) -> Self {
        let mut this = Self::of(&self.target, &self.device, isid);
        assert_eq!(this.log_in(&[])[0].word(36) >> 16, 0);
        this
    }

    fn log_in(&mut self, keys: &[(&str, &str)]) -> Vec<Pdu> {
        let mut text = Vec::new();
        let who = [("InitiatorName", INITIATOR), ("TargetName", TARGET)];
        for (key, value) in who.iter().chain(keys) {
            text::put(&mut text, key, value);
        }
        let mut header = [0; BHS];
        header[0] = 0x43;
        header[1] = 0x80 | 1 << 2 | 3;
        header[8] = 0x80;
        header[13] = self.isid;
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        let answer = self.send(header, &text);
        let on = |key: &str| keys.contains(&(key, "CRC32C"));
        self.digests = Digests {
            header: on("HeaderDigest"),
            data: on("DataDigest"),
        };
        answer
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

#[test]
fn what_is_written_is_read_with_and_without_digests() {
    for digests in [
        &[][..],
        &[("HeaderDigest", "CRC32C"), ("DataDigest", "CRC32C")],
    ] {
        let mut one = Initiator::new(&[OPEN, digests].concat());
        let data = [0xab; 2 * BLOCK_LENGTH];
        assert_eq!(only(one.write(3, 2, &data)).status(), 0);
        let pdu = only(one.read(3, 2));
        assert_eq!((pdu.header[1], pdu.status()), (0x81, 0), "F and S");
        assert_eq!(pdu.data, data);
    }
}

#[test]
fn reads_are_cut_to_what_the_initiator_takes() {
    let mut one = Initiator::new(&[("MaxRecvDataSegmentLength", "5000")]);
    one.device.bytes.lock().unwrap()[..BLOCK_LENGTH].fill(1);
    let pdus = one.read(0, 3);
    let shape: Vec<_> = pdus
        .iter()
        .map(|pdu| (pdu.header[1], pdu.word(36), pdu.word(40), pdu.data.len()))
        .collect();
    assert_eq!(
        shape,
        [
            (0, 0, 0, 5000),
            (0, 1, 5000, 5000),
            (0x81, 2, 10_000, 3 * BLOCK_LENGTH - 10_000)
        ]
    );
    assert_eq!((pdus[0].data[4095], pdus[0].data[4096]), (1, 0));
}

#[test]
fn a_long_read_ends_its_bursts() {
    let mut one = Initiator::new(OPEN);
    let pdus = one.read(0, 130);
    assert_eq!(pdus.len(), 3);
    let flags: Vec<_> = pdus.iter().map(|pdu| pdu.header[1]).collect();
    assert_eq!(flags, [0x80, 0x80, 0x81]);
    let total: usize = pdus.iter().map(|pdu| pdu.data.len()).sum();
    assert_eq!(total, 130 * BLOCK_LENGTH);
}

#[test]
fn data_is_asked_for_where_it_may_not_come_by_itself() {
    let mut one = Initiator::new(SUPPRESSED);
    let asked = only(one.write(0, 2, &[]));
    assert_eq!(
        (asked.opcode(), asked.word(40), asked.word(44)),
        (0x31, 0, 8192)
    );
    let transfer = asked.word(20);
    assert!(one.data_out(false, transfer, 0, 0, &[1; 5000]).is_empty());
    let end = only(one.data_out(true, transfer, 1, 5000, &[2; 3192]));
    assert_eq!((end.status(), end.word(36)), (0, 1), "one R2T");
    assert_eq!((one.stored(4999), one.stored(5000)), (1, 2));
    let early = one.write(0, 1, &[1; BLOCK_LENGTH]);
    assert_eq!(
        (early[0].opcode(), early[0].header[2]),
        (0x3f, 4),
        "rejected"
    );
    assert!(one.line.end().is_some());
}

#[test]
fn a_long_write_is_asked_for_in_bursts() {
    let mut one = Initiator::new(OPEN);
    let blocks = 130;
    let mut asked = only(one.write(0, blocks, &[3; 4096]));
    let mut spans = Vec::new();
    let end = loop {
        let (transfer, offset, length) = (asked.word(20), asked.word(40), asked.word(44));
        spans.push((offset, length));
        let data = vec![3; length as usize];
        let next = only(one.data_out(true, transfer, 0, offset as usize, &data));
        if next.opcode() == 0x21 {
            break next;
        }
        asked = next;
    };
    assert_eq!(end.status(), 0);
    assert_eq!(spans[0], (4096, 262_144 - 4096));
    assert_eq!(spans[1], (262_144, 262_144));
    assert_eq!(spans[2], (524_288, 8192));
    let stored = one.device.bytes.lock().unwrap();
    let end = usize::from(blocks) * BLOCK_LENGTH;
    assert!(stored[..end].iter().all(|byte| *byte == 3) && stored[end] == 0);
}

#[test]
fn unsolicited_data_follows_its_command() {
    let mut one = Initiator::new(OPEN);
    let header = one.command(0x20, 3 * BLOCK_LENGTH, &write_cdb(0, 3));
    assert!(one.send(header, &[1; BLOCK_LENGTH]).is_empty());
    assert!(one.data_out(false, NO_TAG, 0, 4096, &[2; 4096]).is_empty());
    let end = only(one.data_out(true, NO_TAG, 1, 8192, &[3; 4096]));
    assert_eq!(end.status(), 0);
    assert_eq!([0, 4096, 8192].map(|at| one.stored(at)), [1, 2, 3]);
}

#[test]
fn data_out_of_order_ends_its_command_and_is_not_written() {
    let cases = [(27, 0, 4096), (0, 512, 4096), (0, 0, 4096 * 3)];
    for (number, offset, length) in cases {
        let mut one = Initiator::new(OPEN);
        let header = one.command(0x20, 2 * BLOCK_LENGTH, &write_cdb(0, 2));
        assert!(one.send(header, &[]).is_empty());
        let pdus = one.data_out(true, NO_TAG, number, offset, &vec![7; length]);
        assert_eq!((pdus[0].opcode(), pdus[0].header[2]), (0x3f, 4));
        assert_eq!(pdus[1].sense().0, 0xb);
        assert!(one.data_out(true, NO_TAG, 0, 0, &[7; 8192]).is_empty());
        assert_eq!(only(one.ready()).status(), 0);
        assert_eq!(one.stored(0), 0);
    }
}

#[test]
fn residuals_say_what_was_not_transferred() {
    let mut one = Initiator::new(OPEN);
    for (expected, sent, flag, count) in [
        (0, 0, 4, 4096),
        (200, 200, 4, 3896),
        (10_000, 4096, 2, 5904),
        (4096, 4096, 0, 0),
    ] {
        let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        let pdu = only(one.run(0x40, expected, &read, &[]));
        assert_eq!((pdu.status(), pdu.data.len()), (0, sent), "{expected}");
        assert_eq!((pdu.header[1] & 6, pdu.word(44)), (flag, count));
        let data = vec![9; expected];
        let pdu = only(one.run(0x20, expected, &write_cdb(8, 1), &data));
        assert_eq!(pdu.status(), 0);
        assert_eq!((pdu.header[1] & 6, pdu.word(44)), (flag, count));
    }
    one.device.bytes.lock().unwrap()[..BLOCK_LENGTH].fill(1);
    only(one.run(0x20, 200, &write_cdb(0, 1), &[5; 200]));
    assert_eq!((one.stored(199), one.stored(200)), (5, 1), "the rest stays");
    let pdu = only(one.run(0x20, 4096, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 4096]));
    assert_eq!((pdu.status(), pdu.data.len()), (0, 0), "a read is no write");
}

#[test]
fn commands_beyond_the_window_are_ignored_and_gaps_end_the_connection() {
    let mut one = Initiator::new(OPEN);
    one.number += WINDOW;
    assert!(one.ready().is_empty());
    one.number = 0;
    assert!(one.ready().is_empty());
    one.number = 1;
    assert_eq!(only(one.ready()).status(), 0);
    one.number += 1;
    assert_eq!(only(one.ready()).opcode(), 0x3f);
    assert!(one.line.end().is_some());
}

#[test]
fn the_window_closes_while_commands_are_outstanding() {
    let mut one = Initiator::new(OPEN);
    one.line.hold(true);
    for _ in 0..WINDOW {
        assert!(one.read(0, 1).is_empty());
    }
    assert_eq!(one.line.held(), WINDOW as usize);
    assert!(one.read(0, 1).is_empty());
    assert_eq!(one.line.held(), WINDOW as usize, "ignored");
    one.line.hold(false);
    let pdus = one.nudge();
    assert_eq!(pdus.len(), WINDOW as usize);
    let last = pdus.last().unwrap();
    assert_eq!(last.word(32), 1 + WINDOW + WINDOW - 1, "MaxCmdSN");
}

#[test]
fn commands_that_wait_for_memory_do_not_stop_the_stream() {
    let mut one = Initiator::new(OPEN);
    // Each asks for 256 KiB: the budget is for four of them.
    let mut asked = Vec::new();
    let mut tags = Vec::new();
    for lba in 0..6 {
        asked.extend(one.write(lba * 10, 64, &[lba + 1; 4096]));
        tags.push(one.tag);
    }
    assert_eq!(asked.len(), 4);
    let mut ends = 0;
    while let Some(pdu) = asked.pop() {
        if pdu.opcode() == 0x21 {
            assert_eq!(pdu.status(), 0);
            ends += 1;
            continue;
        }
        one.tag = pdu.word(16);
        let fill = u8::try_from(tags.iter().position(|tag| *tag == one.tag).unwrap()).unwrap() + 1;
        let (offset, length) = (pdu.word(40) as usize, pdu.word(44) as usize);
        let more = one.data_out(true, pdu.word(20), 0, offset, &vec![fill; length]);
        assert!(!more.is_empty(), "{:?} {pdu:?}", one.line.end());
        asked.extend(more);
    }
    assert_eq!(ends, 6);
    assert_eq!(one.stored(113 * BLOCK_LENGTH), 6, "no other reaches so far");
    assert_eq!(one.stored(0), 1, "what was put aside was not lost");
}

#[test]
fn an_abort_ends_a_command_without_an_answer() {
    let mut one = Initiator::new(SUPPRESSED);
    only(one.write(0, 1, &[]));
    let tag = one.tag;
    let end = only(one.manage(1, tag));
    assert_eq!((end.opcode(), end.header[2]), (0x22, 0));
    assert!(
        one.data_out(true, 0, 0, 0, &[1; 4096]).is_empty(),
        "read over"
    );
    assert_eq!(only(one.manage(1, tag)).header[2], 1, "no such task");
    assert_eq!(only(one.ready()).status(), 0);
}

#[test]
fn an_abort_waits_for_what_the_device_has() {
    let mut one = Initiator::new(OPEN);
    one.line.hold(true);
    assert!(one.write(0, 1, &[1; 4096]).is_empty());
    let tag = one.tag;
    assert!(one.manage(1, tag).is_empty());
    assert!(one.nudge().is_empty());
    one.line.hold(false);
    let end = only(one.nudge());
    assert_eq!((end.opcode(), end.header[2]), (0x22, 0));
}

#[test]
fn functions_that_are_not_there_say_so() {
    let mut one = Initiator::new(OPEN);
    assert_eq!(only(one.manage(8, 1)).header[2], 4);
    assert_eq!(only(one.manage(3, 1)).header[2], 5);
    for function in [2, 4, 5, 6] {
        assert_eq!(only(one.manage(function, 0)).header[2], 0, "{function}");
    }
}

#[test]
fn a_reset_is_told_on_every_path_and_waits_for_the_others() {
    let mut one = Initiator::new(OPEN);
    let mut two = one.second(2);
    two.line.hold(true);
    assert!(two.read(0, 1).is_empty());
    assert!(one.manage(5, 0).is_empty());
    assert!(two.nudge().is_empty());
    assert!(one.nudge().is_empty(), "the other's read has not settled");
    two.line.hold(false);
    assert!(two.nudge().is_empty(), "no answer to what was aborted");
    assert_eq!(only(one.nudge()).header[2], 0);
    for path in [&mut one, &mut two] {
        assert_eq!(only(path.ready()).sense(), (6, 0x29, 3));
        assert_eq!(only(path.ready()).status(), 0);
    }
}

#[test]
fn a_fence_answers_what_is_outstanding_and_keeps_the_session() {
    let mut one = Initiator::new(OPEN);
    one.line.hold(true);
    assert!(one.read(0, 1).is_empty());
    let gate = Arc::clone(one.target.gate());
    assert_eq!(gate.close(), 1);
    assert_eq!(only(one.read(0, 1)).status(), 0x18);
    one.target.take_away();
    assert_eq!(only(one.nudge()).status(), 0x18, "what the device has");
    assert!(one.target.knows_the_end());
    one.line.hold(false);
    assert!(one.nudge().is_empty(), "answered once");
    assert_eq!(gate.inside(), 0);
    assert_eq!(only(one.write(0, 1, &[1; 4096])).status(), 0x18);
    assert_eq!(one.stored(0), 0);
    let inquiry = only(one.run(0x40, 96, &[0x12, 0, 0, 0, 96, 0], &[]));
    assert_eq!((inquiry.status(), inquiry.data.len()), (0, 96));
    assert_eq!(gate.late(), 2);
    assert!(one.line.end().is_none());
    one.target.disconnect();
    one.nudge();
    assert!(one.line.end().is_some());
    let mut again = Initiator::of(&one.target, &one.device, 1);
    assert_eq!(only(again.log_in(&[])).word(36) >> 16, 0x0204);
}

#[test]
fn a_session_that_comes_again_waits_for_the_one_before() {
    let mut one = Initiator::new(OPEN);
    one.line.hold(true);
    assert!(one.write(0, 1, &[1; 4096]).is_empty());
    let mut again = Initiator::of(&one.target, &one.device, 1);
    assert!(again.log_in(&[]).is_empty(), "it waits");
    assert!(one.nudge().is_empty());
    assert!(one.line.end().is_some(), "the one before has ended");
    let said = again.line.wait(TAKEOVER_WAIT);
    assert_eq!(only(again.take(said)).word(36) >> 16, 0x0301);
    let mut third = Initiator::of(&one.target, &one.device, 1);
    assert!(third.log_in(&[]).is_empty());
    one.line.hold(false);
    one.nudge();
    let answer = only(third.nudge());
    assert_eq!((answer.word(36) >> 16, answer.header[15] > 0), (0, true));
    assert_eq!(only(third.ready()).sense(), (6, 0x29, 7));
    assert_eq!(only(third.ready()).status(), 0);
}

#[test]
fn pings_are_answered_with_their_data() {
    let mut one = Initiator::new(OPEN);
    let mut header = [0; BHS];
    header[0] = 0x40;
    header[1] = 0x80;
    header[19] = 5;
    header[20..24].fill(0xff);
    header[24..28].copy_from_slice(&one.number.to_be_bytes());
    let pong = only(one.send(header, b"ping!"));
    assert_eq!((pong.opcode(), pong.word(16)), (0x20, 5));
    assert_eq!((pong.word(20), &pong.data[..]), (NO_TAG, &b"ping!"[..]));
}

#[test]
fn a_silent_initiator_is_asked_and_then_gone() {
    let mut one = Initiator::new(OPEN);
    let said = one.line.wait(Duration::from_secs(31));
    let ping = only(one.take(said));
    assert_eq!((ping.opcode(), ping.word(16)), (0x20, NO_TAG));
    assert_ne!(ping.word(20), NO_TAG);
    assert!(one.line.end().is_none());
    one.line.wait(Duration::from_secs(30));
    assert!(matches!(one.line.end(), Some(End::Late(_))));
}

#[test]
fn a_login_that_never_ends_is_ended() {
    let device = MemoryDevice::new(8);
    let mut line = line(&target(device, None, None, 1));
    line.wait(Duration::from_secs(9));
    assert!(line.end().is_none());
    line.wait(Duration::from_secs(2));
    assert!(matches!(line.end(), Some(End::Late(_))));
}

#[test]
fn a_logout_is_answered_and_ends_the_session() {
    let mut one = Initiator::new(OPEN);
    let mut header = [0; BHS];
    header[0] = 0x46;
    header[1] = 0x80;
    header[24..28].copy_from_slice(&one.number.to_be_bytes());
    let answer = only(one.send(header, &[]));
    assert_eq!((answer.opcode(), answer.header[2]), (0x26, 0));
    assert!(one.line.end().is_some());
    assert!(one.target.unit().sessions().is_empty());
}

#[test]
fn nothing_is_left_of_initiators_that_vanish() {
    let device = MemoryDevice::new(8);
    let watched = Arc::downgrade(&device);
    let served = Arc::clone(&device) as Arc<dyn crate::block::BlockDevice>;
    let target = target(served, None, None, 2);
    let session = |isid| {
        let mut one = Initiator::of(&target, &device, isid);
        assert_eq!(only(one.log_in(&[])).word(36) >> 16, 0);
        one
    };
    // One closes and one is cut off, each with a command at the device, which
    // settles when nobody asks any more.
    let inside: Vec<_> = [session(1), session(2)]
        .into_iter()
        .map(|mut one| {
            let mut sessions = target.unit().sessions();
            sessions.retain(|session| session.nexus().isid[5] == one.isid);
            let inside = sessions[0].gate().enter().unwrap();
            if one.isid == 1 {
                one.line.close();
            }
            inside
        })
        .collect();
    let sessions = target.unit().sessions();
    assert_eq!(sessions.len(), 2, "their commands have not settled");
    let sessions: Vec<_> = sessions
        .into_iter()
        .map(|one| Arc::downgrade(&one))
        .collect();
    drop(inside);
    drop((target, device));
    assert!(sessions.iter().all(|one| one.upgrade().is_none()));
    assert!(
        watched.upgrade().is_none(),
        "the export lets go of its device"
    );
}

#[test]
fn growth_is_announced() {
    let mut one = Initiator::new(OPEN);
    one.device
        .bytes
        .lock()
        .unwrap()
        .resize(2048 * BLOCK_LENGTH, 0);
    one.target.unit().announce_resize();
    let event = only(one.nudge());
    assert_eq!((event.opcode(), event.header[36]), (0x32, 0));
    assert_eq!(event.data[14..16], [0x2a, 0x09]);
    assert_eq!(only(one.ready()).sense(), (6, 0x2a, 9));
    let capacity = only(one.run(0x40, 8, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]));
    assert_eq!(capacity.data[..4], [0, 0, 7, 0xff]);
}

#[test]
fn compare_and_write_writes_only_what_matches() {
    let mut one = Initiator::new(OPEN);
    let cdb = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0];
    let data = [vec![0; BLOCK_LENGTH], vec![4; BLOCK_LENGTH]].concat();
    assert_eq!(only(one.run(0x20, data.len(), &cdb, &data)).status(), 0);
    assert_eq!(one.stored(2 * BLOCK_LENGTH), 4);
    let missed = only(one.run(0x20, data.len(), &cdb, &data));
    assert_eq!(missed.sense(), (0xe, 0x1d, 0));
    let short = only(one.run(0x20, 4096, &cdb, &data[..4096]));
    assert_eq!(short.sense(), (5, 0x24, 0));
}

#[test]
fn a_full_pool_and_a_failed_flush_have_senses_of_their_own() {
    use crate::block::DeviceError;
    let mut one = Initiator::new(OPEN);
    *one.device.failure.lock().unwrap() = Some(DeviceError::NoSpace);
    assert_eq!(only(one.write(0, 1, &[1; 4096])).sense(), (7, 0x27, 7));
    *one.device.failure.lock().unwrap() = Some(DeviceError::FlushFailed("gone".into()));
    let sync = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(only(one.run(0, 0, &sync, &[])).sense(), (4, 0x44, 0));
}

#[test]
fn without_a_cache_every_write_is_durable() {
    let mut one = Initiator::new(OPEN);
    only(one.write(0, 1, &[1; 4096]));
    assert_eq!(*one.device.flushes.lock().unwrap(), (0, 0));
    let mut list = vec![0; 24];
    list[4..6].copy_from_slice(&[0x08, 18]);
    let select = [0x15, 0x10, 0, 0, 24, 0];
    assert_eq!(only(one.run(0x20, 24, &select, &list)).status(), 0);
    assert_eq!(*one.device.flushes.lock().unwrap(), (1, 0));
    only(one.write(0, 1, &[1; 4096]));
    assert_eq!(*one.device.flushes.lock().unwrap(), (1, 1));
}

#[test]
fn a_lun_with_nothing_behind_it_answers_what_it_must() {
    let mut one = Initiator::new(OPEN);
    let mut at_lun_1 = |cdb: &[u8]| {
        let mut header = one.command(0xc0, 96, cdb);
        header[9] = 1;
        only(one.send(header, &[]))
    };
    let inquiry = at_lun_1(&[0x12, 0, 0, 0, 96, 0]);
    assert_eq!(inquiry.data[0], 0x7f);
    assert_eq!(at_lun_1(&[0; 6]).sense(), (5, 0x25, 0));
    let luns = at_lun_1(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 96, 0, 0]);
    assert_eq!(luns.data.len(), 16);
}

#[test]
fn a_wrong_digest_ends_the_connection() {
    let keys = [
        OPEN,
        &[("DataDigest", "CRC32C"), ("HeaderDigest", "CRC32C")],
    ]
    .concat();
    for at in [20, BHS + 4 + 100] {
        let mut one = Initiator::new(&keys);
        let header = one.command(0xa0, 4096, &write_cdb(0, 1));
        let mut bytes = one.bytes(header, &[1; 4096]);
        bytes[at] ^= 1;
        let said = one.line.send(&bytes);
        let reject = only(one.take(said));
        let reason = if at < BHS { 4 } else { 2 };
        assert_eq!((reject.opcode(), reject.header[2]), (0x3f, reason));
        assert!(one.line.end().is_some());
        assert_eq!(one.stored(0), 0);
    }
}

#[test]
fn any_cut_of_the_stream_is_the_same_stream() {
    for cut in [1, 7, 47, 48, 49, 1000] {
        let mut one = Initiator::new(OPEN);
        let header = one.command(0xa0, 4096, &write_cdb(1, 1));
        let mut bytes = one.bytes(header, &[6; 4096]);
        let header = one.command(0xc0, 4096, &[0x28, 0, 0, 0, 0, 1, 0, 0, 1, 0]);
        bytes.extend(one.bytes(header, &[]));
        let mut said = Vec::new();
        for some in bytes.chunks(cut) {
            said.extend(one.line.send(some));
        }
        let pdus = one.take(said);
        assert_eq!(pdus.len(), 2, "{cut}");
        assert_eq!(pdus[1].data, [6; 4096]);
    }
}

#[path = "mischief_tests.rs"]
mod mischief;

mod any {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever comes: it is answered or ends the connection, nothing else.
        #[test]
        fn bytes_are_survived(logged_in: bool, opcode in 0_u8..0x20, bytes in prop::collection::vec(any::<u8>(), 47..400)) {
            let mut one = Initiator::new(OPEN);
            if !logged_in {
                one.line = line(&one.target);
            }
            let mut likely = vec![opcode | 0x40];
            likely.extend(&bytes);
            likely[4..7].fill(0);
            one.line.send(&likely);
            one.line.send(&bytes);
            one.line.close();
            prop_assert!(one.line.end().is_some());
        }
    }
}

//! A target that does nothing as fast as it can: reads are answered with
//! filler, writes with success. What a client reaches here is its own limit.

use anyhow::{Result, bail};

use super::pdu::{BHS, FINAL, Header, NO_TAG, opcode, padded, scsi};
use crate::inbox::Receiver;
use crate::outbox::Outbox;

/// What READ CAPACITY(16) answers.
const UNIT_BYTES: u64 = 1 << 30;
const BLOCK: u32 = 4096;
/// Commands that a session may have on their way.
const WINDOW: u32 = 1024;
/// What the initiator takes in one PDU; it says so in its login, always the same.
const SEGMENT: usize = 262_144;

/// One connection of it.
#[derive(Default)]
pub struct NullTarget {
    status: u32,
    command: u32,
    /// Bytes that writes still owe, by task tag.
    owed: Vec<u32>,
}

impl NullTarget {
    /// A header of an answer, with its numbers.
    fn answer(&mut self, opcode: u8, flags: u8, request: &Header, counts: bool) -> Header {
        let mut header = Header::new(opcode, flags);
        header.set(16, request.tag()).set(24, self.status);
        header.set(28, self.command).set(32, self.command + WINDOW);
        self.status = self.status.wrapping_add(u32::from(counts));
        header
    }

    fn log_in(&mut self, request: &Header, out: &mut Outbox) {
        let keys = "TargetPortalGroupTag=1\0HeaderDigest=None\0DataDigest=None\0InitialR2T=No\0\
            ImmediateData=Yes\0MaxRecvDataSegmentLength=262144\0MaxBurstLength=16776192\0\
            FirstBurstLength=262144\0MaxConnections=1\0MaxOutstandingR2T=1\0DefaultTime2Wait=2\0\
            DefaultTime2Retain=0\0DataPDUInOrder=Yes\0DataSequenceInOrder=Yes\0\
            ErrorRecoveryLevel=0\0";
        self.command = request.u32(24);
        let mut header = self.answer(opcode::LOGIN_RESPONSE, request.0[1], request, true);
        header.0[8..16].copy_from_slice(&request.0[8..16]);
        header.0[15] = 1;
        header.set_data_len(keys.len());
        out.push(&header.0);
        out.push(keys.as_bytes());
        out.push(&[0; 4][..padded(keys.len()) - keys.len()]);
    }

    fn good(&mut self, request: &Header, out: &mut Outbox) {
        let header = self.answer(opcode::SCSI_RESPONSE, FINAL, request, true);
        out.push(&header.0);
    }

    fn command(&mut self, request: &Header, out: &mut Outbox) -> Result<()> {
        self.command = request.u32(24).wrapping_add(1);
        let expected = request.u32(20);
        match request.0[32] {
            scsi::READ_16 => {
                let (mut at, whole) = (0, usize::try_from(expected)?);
                while at < whole {
                    let len = (whole - at).min(SEGMENT);
                    let last = at + len == whole;
                    let flags = if last { FINAL | 1 } else { 0 };
                    let mut header = self.answer(opcode::DATA_IN, flags, request, last);
                    let place = u32::try_from(at)?;
                    header.set(20, NO_TAG).set(40, place).set_data_len(len);
                    header.set(36, place / 262_144);
                    out.push(&header.0);
                    out.fill(len);
                    at += len;
                }
            }
            scsi::WRITE_16 => {
                let immediate = u32::try_from(request.data_len())?;
                let rest = expected.saturating_sub(immediate);
                if rest == 0 {
                    self.good(request, out);
                    return Ok(());
                }
                let tag = usize::try_from(request.tag())?;
                if tag > usize::from(u16::MAX) {
                    bail!("task tag {tag:#x}");
                }
                if tag >= self.owed.len() {
                    self.owed.resize(tag + 1, 0);
                }
                self.owed[tag] = rest;
                let mut header = self.answer(opcode::R2T, FINAL, request, false);
                header.0[8..16].copy_from_slice(&request.0[8..16]);
                header
                    .set(20, request.tag())
                    .set(40, immediate)
                    .set(44, rest);
                out.push(&header.0);
            }
            scsi::SERVICE_ACTION_IN_16 => {
                let mut data = [0; 32];
                let last = UNIT_BYTES / u64::from(BLOCK) - 1;
                data[..8].copy_from_slice(&last.to_be_bytes());
                data[8..12].copy_from_slice(&BLOCK.to_be_bytes());
                let mut header = self.answer(opcode::DATA_IN, FINAL | 1, request, true);
                header.set(20, NO_TAG).set_data_len(data.len());
                out.push(&header.0);
                out.push(&data);
            }
            _ => self.good(request, out),
        }
        Ok(())
    }

    fn data_out(&mut self, header: &Header, out: &mut Outbox) -> Result<()> {
        let tag = usize::try_from(header.tag())?;
        let len = u32::try_from(header.data_len())?;
        let Some(owed) = self
            .owed
            .get_mut(tag)
            .filter(|owed| **owed >= len && len > 0)
        else {
            bail!("a Data-Out that nobody asked for");
        };
        *owed -= len;
        if *owed == 0 {
            self.good(header, out);
        }
        Ok(())
    }
}

impl Receiver for NullTarget {
    const PREFIX: usize = BHS;

    fn header_len(&self, prefix: &[u8]) -> Result<usize> {
        Header::whole_len(prefix)
    }

    fn header(&mut self, header: &[u8], out: &mut Outbox) -> Result<usize> {
        let header = Header::of(header)?;
        match header.opcode() {
            opcode::LOGIN => self.log_in(&header, out),
            opcode::SCSI_COMMAND => self.command(&header, out)?,
            opcode::DATA_OUT => self.data_out(&header, out)?,
            opcode::NOP_OUT => {}
            opcode::LOGOUT => {
                let answer = self.answer(opcode::LOGOUT_RESPONSE, FINAL, &header, true);
                out.push(&answer.0);
            }
            other => bail!("the initiator sent a PDU with opcode {other:#04x}"),
        }
        Ok(padded(header.data_len()))
    }

    fn payload(&mut self, _: &[u8], _: usize, _: &mut Outbox) -> Result<()> {
        Ok(())
    }
}

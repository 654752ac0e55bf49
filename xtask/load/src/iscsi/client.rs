//! An initiator's full feature phase under load.

use anyhow::{Result, bail};

use super::login::{Session, Unit};
use super::pdu::{BHS, FINAL, Header, IMMEDIATE, NO_TAG, opcode, padded, scsi};
use crate::drive::Client;
use crate::inbox::Receiver;
use crate::outbox::Outbox;
use crate::slots::{Io, Slots};

const READ: u8 = 0x40;
const WRITE: u8 = 0x20;
const SIMPLE: u8 = 0x01;
/// Data-In with the command's status in it (11.7.2).
const WITH_STATUS: u8 = 0x01;

/// An initiator.
pub struct Initiator {
    lun: u8,
    block: u32,
    command: u32,
    window_end: u32,
    status: u32,
    immediate: u32,
    segment: u32,
    slots: Slots,
    /// The Data-In whose payload is on its way: its command, how far it is, how
    /// many bytes of it are data and not padding, and whether it ends the command.
    incoming: Option<Incoming>,
}

struct Incoming {
    slot: u16,
    at: u32,
    ends: bool,
}

impl Initiator {
    /// Of a session that has logged in.
    pub fn new(session: &Session, unit: Unit, depth: u16) -> Self {
        Self {
            lun: session.lun,
            block: unit.block,
            command: session.command,
            window_end: session.window_end,
            status: session.status,
            immediate: session.immediate,
            segment: session.segment,
            slots: Slots::new(depth),
            incoming: None,
        }
    }

    /// Takes over what every PDU of the target says of the numbers.
    fn numbers(&mut self, header: &Header, with_status: bool) {
        if with_status {
            self.status = header.u32(24).wrapping_add(1);
        }
        let end = header.u32(32);
        // Serial number arithmetic: the window never shrinks (RFC 7143, 4.2.2.1).
        if end.wrapping_sub(self.window_end) < 1 << 31 {
            self.window_end = end;
        }
    }

    /// Sends what the target is ready to take.
    fn data_out(&mut self, r2t: &Header, out: &mut Outbox) -> Result<()> {
        let slot = u16::try_from(r2t.tag())?;
        let io = self.slots.io(slot)?;
        let (begin, len) = (r2t.u32(40), r2t.u32(44));
        let end = begin.checked_add(len).filter(|end| *end <= io.len);
        let Some(end) = end.filter(|_| io.write && len > 0) else {
            bail!("R2T for {len} bytes at {begin} of {io:?}");
        };
        let (mut at, mut number) = (begin, 0);
        while at < end {
            let piece = (end - at).min(self.segment);
            let last = if at + piece == end { FINAL } else { 0 };
            let mut header = Header::new(opcode::DATA_OUT, last);
            header.0[9] = self.lun;
            header.set(16, r2t.tag()).set(20, r2t.u32(20));
            header.set(28, self.status).set(36, number).set(40, at);
            let (place, piece_len) = (usize::try_from(at)?, usize::try_from(piece)?);
            header.set_data_len(piece_len);
            out.push(&header.0);
            out.push_payload(io.offset, place, piece_len);
            at += piece;
            number += 1;
        }
        Ok(())
    }

    fn finish(&mut self, slot: u16, response: u8, status: u8) -> Result<()> {
        if response != 0 || status != 0 {
            let io = self.slots.io(slot)?;
            bail!("{io:?} ended with response {response:#04x}, SCSI status {status:#04x}");
        }
        self.slots.end(slot)
    }
}

impl Receiver for Initiator {
    const PREFIX: usize = BHS;

    fn header_len(&self, prefix: &[u8]) -> Result<usize> {
        Header::whole_len(prefix)
    }

    fn header(&mut self, header: &[u8], out: &mut Outbox) -> Result<usize> {
        let header = Header::of(header)?;
        match header.opcode() {
            opcode::DATA_IN => {
                let with_status = header.0[1] & WITH_STATUS != 0;
                self.numbers(&header, with_status);
                let slot = u16::try_from(header.tag())?;
                if with_status && header.0[3] != 0 {
                    self.finish(slot, 0, header.0[3])?;
                }
                self.incoming = Some(Incoming {
                    slot,
                    at: header.u32(40),
                    ends: with_status,
                });
                if header.data_len() == 0 {
                    self.payload(&[], 0, out)?;
                }
                if !header.data_len().is_multiple_of(4) {
                    bail!("a Data-In of {} bytes", header.data_len());
                }
            }
            opcode::SCSI_RESPONSE => {
                self.numbers(&header, true);
                self.finish(u16::try_from(header.tag())?, header.0[2], header.0[3])?;
            }
            opcode::R2T => {
                self.numbers(&header, false);
                self.data_out(&header, out)?;
            }
            opcode::NOP_IN => {
                self.numbers(&header, false);
                if header.u32(20) != NO_TAG {
                    let mut answer = Header::new(opcode::NOP_OUT | IMMEDIATE, FINAL);
                    answer.0[8..16].copy_from_slice(&header.0[8..16]);
                    answer.set(16, NO_TAG).set(20, header.u32(20));
                    answer.set(24, self.command).set(28, self.status);
                    out.push(&answer.0);
                }
            }
            other => bail!("the target sent a PDU with opcode {other:#04x}"),
        }
        Ok(padded(header.data_len()))
    }

    fn payload(&mut self, piece: &[u8], left: usize, _: &mut Outbox) -> Result<()> {
        let Some(incoming) = &mut self.incoming else {
            return Ok(());
        };
        self.slots.data(incoming.slot, incoming.at, piece)?;
        incoming.at += u32::try_from(piece.len())?;
        if left > 0 {
            return Ok(());
        }
        let (slot, ends) = (incoming.slot, incoming.ends);
        self.incoming = None;
        if ends { self.slots.end(slot) } else { Ok(()) }
    }
}

impl Client for Initiator {
    fn room(&self) -> bool {
        self.window_end.wrapping_sub(self.command) < 1 << 31
    }

    fn submit(&mut self, slot: u16, io: Io, out: &mut Outbox) {
        self.slots.begin(slot, io);
        let direction = if io.write { WRITE } else { READ };
        let mut header = Header::new(opcode::SCSI_COMMAND, FINAL | direction | SIMPLE);
        header.0[9] = self.lun;
        header.set(16, slot.into()).set(20, io.len);
        header.set(24, self.command).set(28, self.status);
        self.command = self.command.wrapping_add(1);
        header.0[32] = if io.write {
            scsi::WRITE_16
        } else {
            scsi::READ_16
        };
        let block = io.offset / u64::from(self.block);
        header.0[34..42].copy_from_slice(&block.to_be_bytes());
        header.set(42, io.len / self.block);
        let immediate = if io.write {
            io.len.min(self.immediate)
        } else {
            0
        };
        let immediate = usize::try_from(immediate).unwrap_or(0);
        header.set_data_len(immediate);
        out.push(&header.0);
        if immediate > 0 {
            out.push_payload(io.offset, 0, immediate);
        }
    }

    fn slots(&mut self) -> &mut Slots {
        &mut self.slots
    }
}

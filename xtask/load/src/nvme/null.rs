//! A target that does nothing as fast as it can: reads are answered with
//! filler, writes with success. What a client reaches here is its own limit.

use anyhow::{Result, bail};

use super::pdu::{self, COMMON, Header, IC, SHORT, flag, kind, opcode, u16_at, u32_at, u64_at};
use crate::inbox::Receiver;
use crate::outbox::Outbox;

const NAMESPACE_BYTES: u64 = 1 << 30;
/// Logical blocks of 4096 bytes.
const BLOCK_SHIFT: u8 = 12;
/// Bytes of a write that may come with its command, as the kernel's own target
/// and drover have it for 4 KiB and more.
const IN_CAPSULE: u32 = 8192;
/// Bytes that one H2CData may have.
const MAX_DATA: u32 = 1 << 20;

/// One connection of it.
#[derive(Default)]
pub struct NullTarget {
    admin: bool,
    ready: bool,
    queue_head: u16,
    /// Bytes that writes still owe, by command id.
    owed: Vec<u32>,
}

impl NullTarget {
    fn respond(&mut self, id: u16, result: u64, out: &mut Outbox) {
        self.queue_head = self.queue_head.wrapping_add(1);
        let mut header = Header::<SHORT>::new(kind::RESPONSE, 0, 0);
        header.u64(8, result);
        header.u16(16, self.queue_head);
        header.u16(20, id);
        out.push(&header.0);
    }

    fn data_header(id: u16, len: u32) -> Header<SHORT> {
        let mut header = Header::<SHORT>::new(kind::C2H_DATA, flag::LAST | flag::SUCCESS, len);
        header.u16(8, id);
        header.u32(16, len);
        header
    }

    fn command(&mut self, header: &[u8], in_capsule: usize, out: &mut Outbox) -> Result<()> {
        let id = u16_at(header, 10);
        let len = u32_at(header, 8 + 32);
        match (header[8], self.admin) {
            (opcode::FABRICS, _) => self.fabrics(header, id, out),
            (opcode::SET_FEATURES, true) => {
                // As many queues as asked for.
                self.respond(id, u32_at(header, 8 + 44).into(), out);
            }
            (opcode::IDENTIFY, true) => {
                let mut data = vec![0; 4096];
                if header[8 + 40] == 1 {
                    data[1792..1796].copy_from_slice(&((IN_CAPSULE + 64) / 16).to_le_bytes());
                } else {
                    let blocks = NAMESPACE_BYTES >> BLOCK_SHIFT;
                    data[..8].copy_from_slice(&blocks.to_le_bytes());
                    data[130] = BLOCK_SHIFT;
                }
                out.push(&Self::data_header(id, 4096).0);
                out.push(&data);
            }
            (opcode::READ, false) => {
                out.push(&Self::data_header(id, len).0);
                out.fill(usize::try_from(len)?);
            }
            (opcode::WRITE, false) if in_capsule > 0 => self.respond(id, 0, out),
            (opcode::WRITE, false) => {
                let index = usize::from(id);
                if index >= self.owed.len() {
                    self.owed.resize(index + 1, 0);
                }
                self.owed[index] = len;
                let mut r2t = Header::<SHORT>::new(kind::R2T, 0, 0);
                r2t.u16(8, id);
                r2t.u16(10, id);
                r2t.u32(16, len);
                out.push(&r2t.0);
            }
            (other, _) => bail!("a command with opcode {other:#04x}"),
        }
        Ok(())
    }

    fn fabrics(&mut self, header: &[u8], id: u16, out: &mut Outbox) {
        let result = match header[8 + 4] {
            opcode::CONNECT => {
                self.admin = u16_at(header, 8 + 42) == 0;
                1
            }
            opcode::PROPERTY_SET => {
                self.ready = u64_at(header, 8 + 48) & 1 != 0;
                0
            }
            _ => u64::from(self.ready),
        };
        self.respond(id, result, out);
    }

    fn written(&mut self, header: &[u8], len: usize, out: &mut Outbox) -> Result<()> {
        let id = u16_at(header, 8);
        let len = u32::try_from(len)?;
        let owed = self.owed.get_mut(usize::from(id));
        let Some(owed) = owed.filter(|owed| **owed >= len && len > 0) else {
            bail!("an H2CData that nobody asked for");
        };
        *owed -= len;
        if *owed == 0 {
            self.respond(id, 0, out);
        }
        Ok(())
    }
}

impl Receiver for NullTarget {
    const PREFIX: usize = COMMON;

    fn header_len(&self, prefix: &[u8]) -> Result<usize> {
        Ok(pdu::lengths(prefix)?.0)
    }

    fn header(&mut self, header: &[u8], out: &mut Outbox) -> Result<usize> {
        let (_, data) = pdu::lengths(header)?;
        match header[0] {
            kind::IC_REQ => {
                let mut answer = Header::<IC>::new(kind::IC_RESP, 0, 0);
                answer.u32(12, MAX_DATA);
                out.push(&answer.0);
            }
            kind::COMMAND => self.command(header, data, out)?,
            kind::H2C_DATA => self.written(header, data, out)?,
            other => bail!("the host sent a PDU of type {other:#04x}"),
        }
        Ok(data)
    }

    fn payload(&mut self, _: &[u8], _: usize, _: &mut Outbox) -> Result<()> {
        Ok(())
    }
}

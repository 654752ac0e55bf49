//! A host's I/O queue under load.

use anyhow::{Result, bail};

use super::connect::Namespace;
use super::pdu::{self, COMMON, Data, Header, SHORT, flag, kind, opcode, u16_at, u32_at};
use crate::drive::Client;
use crate::inbox::Receiver;
use crate::outbox::Outbox;
use crate::slots::{Io, Slots};

/// One I/O queue of a host.
pub struct Host {
    namespace: Namespace,
    max_data: u32,
    slots: Slots,
    incoming: Option<Incoming>,
}

/// A C2HData whose payload is on its way.
struct Incoming {
    slot: u16,
    at: u32,
    /// It stands for the command's success too.
    ends: bool,
}

impl Host {
    /// Of a queue that is connected.
    pub fn new(namespace: Namespace, max_data: u32, depth: u16) -> Self {
        let slots = Slots::new(depth);
        Self {
            namespace,
            max_data: max_data.max(4096),
            slots,
            incoming: None,
        }
    }

    fn data(&self, r2t: &[u8], out: &mut Outbox) -> Result<()> {
        let slot = u16_at(r2t, 8);
        let io = self.slots.io(slot)?;
        let (begin, len) = (u32_at(r2t, 12), u32_at(r2t, 16));
        let end = begin.checked_add(len).filter(|end| *end <= io.len);
        let Some(end) = end.filter(|_| io.write && len > 0) else {
            bail!("R2T for {len} bytes at {begin} of {io:?}");
        };
        let mut at = begin;
        while at < end {
            let piece = (end - at).min(self.max_data);
            let flags = if at + piece == end { flag::LAST } else { 0 };
            let mut header = Header::<SHORT>::new(kind::H2C_DATA, flags, piece);
            header.u16(8, slot);
            header.u16(10, u16_at(r2t, 10));
            header.u32(12, at);
            header.u32(16, piece);
            out.push(&header.0);
            out.push_payload(io.offset, usize::try_from(at)?, usize::try_from(piece)?);
            at += piece;
        }
        Ok(())
    }
}

impl Receiver for Host {
    const PREFIX: usize = COMMON;

    fn header_len(&self, prefix: &[u8]) -> Result<usize> {
        Ok(pdu::lengths(prefix)?.0)
    }

    fn header(&mut self, header: &[u8], out: &mut Outbox) -> Result<usize> {
        let (_, data) = pdu::lengths(header)?;
        match header[0] {
            kind::C2H_DATA => {
                let ends = header[1] & flag::SUCCESS != 0;
                let (slot, at) = (u16_at(header, 8), u32_at(header, 12));
                if usize::try_from(u32_at(header, 16))? != data || data == 0 {
                    bail!(
                        "a C2HData with DATAL {} and {data} bytes",
                        u32_at(header, 16)
                    );
                }
                self.incoming = Some(Incoming { slot, at, ends });
            }
            kind::RESPONSE => {
                let (slot, status) = (u16_at(header, 20), pdu::status(header));
                if status != 0 {
                    bail!("{:?} ended with status {status:#x}", self.slots.io(slot)?);
                }
                self.slots.end(slot)?;
            }
            kind::R2T => self.data(header, out)?,
            other => bail!("the target sent a PDU of type {other:#04x}"),
        }
        Ok(data)
    }

    fn payload(&mut self, piece: &[u8], left: usize, _: &mut Outbox) -> Result<()> {
        let Some(incoming) = &mut self.incoming else {
            bail!("data where none belongs");
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

impl Client for Host {
    fn room(&self) -> bool {
        true
    }

    fn submit(&mut self, slot: u16, io: Io, out: &mut Outbox) {
        self.slots.begin(slot, io);
        let in_capsule = io.write && io.len <= self.namespace.in_capsule;
        let data = if in_capsule {
            Data::InCapsule(io.len)
        } else {
            Data::Transport(io.len)
        };
        let opcode = if io.write {
            opcode::WRITE
        } else {
            opcode::READ
        };
        let mut header = pdu::command(opcode, slot, data);
        header.u32(8 + 4, self.namespace.id);
        header.u64(8 + 40, io.offset / u64::from(self.namespace.block));
        // Blocks count from 0. The size is a multiple of the block's, at most 1 MiB.
        let blocks = io.len / self.namespace.block;
        header.u16(8 + 48, u16::try_from(blocks - 1).unwrap_or(u16::MAX));
        out.push(&header.0);
        if in_capsule {
            out.push_payload(io.offset, 0, usize::try_from(io.len).unwrap_or(0));
        }
    }

    fn slots(&mut self) -> &mut Slots {
        &mut self.slots
    }
}

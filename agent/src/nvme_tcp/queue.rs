//! One connection's queue pair: which commands are outstanding, what data they
//! wait for, and what is to be sent.
//!
//! Every command is answered once: whoever answers takes its entry out of the
//! table first. Memory is bounded: commands by the queue's depth, their data
//! by a budget that a command waits for before it holds any.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::metrics::Metrics;
use super::status::Status;
use super::wire::{
    self, Completion, Data, Digests, FLAG_LAST, FLAG_SUCCESS, Flaw, Kind, Malformed,
};

/// Bytes of one permit of the budget.
const UNIT: u32 = 4096;
/// Bytes of data that the commands of one connection hold at most: four of the largest.
const BUDGET: u32 = 4 << 20;

/// What the writer sends.
pub enum Outgoing {
    /// One or several whole PDUs.
    Pdu(Vec<u8>),
    /// A data PDU, and what follows it.
    Data {
        /// Its header.
        header: Vec<u8>,
        /// The data.
        data: Vec<u8>,
        /// The data's digest and the response, where there is one.
        behind: Vec<u8>,
        /// The data's place in the budget, given back when it is sent.
        permit: Option<OwnedSemaphorePermit>,
    },
    /// Nothing more: flush and end.
    Last,
}

/// How a connection is used, from its Connect on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The queue id; 0 is the admin queue.
    pub id: u16,
    /// Entries of the queue.
    pub depth: u16,
    /// The digests in use.
    pub digests: Digests,
    /// Whether the host does without submission queue flow control.
    pub no_flow_control: bool,
}

/// One command's place in the table; whoever has it may try to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The command identifier.
    pub command: u16,
    opcode: u8,
    /// Tells apart two commands that used the same identifier one after the other.
    sequence: u64,
}

/// Data that a command waits for.
pub struct Transfer {
    slot: Slot,
    buffer: Vec<u8>,
    filled: usize,
    damaged: bool,
    done: oneshot::Sender<Result<Vec<u8>, Status>>,
}

struct Outstanding {
    slot: Slot,
    /// Whether the host was asked for data, and not all of it has come.
    asked: bool,
}

#[derive(Default)]
struct Table {
    commands: HashMap<u16, Outstanding>,
    transfers: HashMap<u16, Transfer>,
    sequence: u64,
    head: u16,
    ended: bool,
}

/// One connection's queue pair.
pub struct Queue {
    shape: Shape,
    metrics: Metrics,
    table: Mutex<Table>,
    budget: Arc<Semaphore>,
    out: mpsc::UnboundedSender<Outgoing>,
}

impl Queue {
    /// A queue pair and what its writer has to send.
    pub fn new(shape: Shape, metrics: Metrics) -> (Arc<Self>, mpsc::UnboundedReceiver<Outgoing>) {
        // Unbounded in type only: at most three PDUs per outstanding command.
        let (out, sending) = mpsc::unbounded_channel();
        let budget = Arc::new(Semaphore::new((BUDGET / UNIT) as usize));
        let queue = Self {
            shape,
            metrics,
            table: Mutex::default(),
            budget,
            out,
        };
        (Arc::new(queue), sending)
    }

    /// How the connection is used.
    pub fn shape(&self) -> Shape {
        self.shape
    }
    /// The target's counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // No code panics while it holds the lock.
        self.table
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Takes a command in. None: its identifier is in use (and is answered so).
    ///
    /// # Errors
    /// More commands than the queue has entries.
    pub fn begin(&self, command: u16, opcode: u8) -> Result<Option<Slot>, Malformed> {
        let mut table = self.table();
        if table.commands.len() >= self.shape.depth.into() {
            return Err(Flaw::Sequence.at(wire::COMMON as u32));
        }
        table.head = (table.head + 1) % self.shape.depth;
        table.sequence += 1;
        let slot = Slot {
            command,
            opcode,
            sequence: table.sequence,
        };
        if table.commands.contains_key(&command) {
            let status = Status::COMMAND_ID_CONFLICT;
            let response = self.response(&table, slot, 0, status);
            drop(table);
            self.send(Outgoing::Pdu(response));
            return Ok(None);
        }
        table
            .commands
            .insert(command, Outstanding { slot, asked: false });
        Ok(Some(slot))
    }

    /// Waits for room for `length` bytes of data.
    pub async fn room(&self, length: u32) -> Option<OwnedSemaphorePermit> {
        // Closed when the connection has ended.
        Arc::clone(&self.budget)
            .acquire_many_owned(length.div_ceil(UNIT).min(BUDGET / UNIT))
            .await
            .ok()
    }

    /// Answers a command.
    pub fn answer(&self, slot: Slot, result: u64, status: Status) {
        let mut table = self.table();
        if Self::take(&mut table, slot) {
            let response = self.response(&table, slot, result, status);
            drop(table);
            self.send(Outgoing::Pdu(response));
            self.count(slot, status);
        }
    }

    /// Answers the Asynchronous Event Request with this identifier.
    pub fn answer_event(&self, command: u16, result: u32) {
        let slot = self.table().commands.get(&command).map(|o| o.slot);
        if let Some(slot) = slot {
            self.answer(slot, result.into(), Status::SUCCESS);
        }
    }

    /// Answers a command with data, and success.
    pub fn answer_data(&self, slot: Slot, data: Vec<u8>, permit: Option<OwnedSemaphorePermit>) {
        let digests = self.shape.digests;
        let length = u32::try_from(data.len()).expect("checked against MDTS");
        let mut behind = Vec::with_capacity(32);
        if digests.data {
            behind.extend_from_slice(&crc32c::crc32c(&data).to_le_bytes());
        }
        let mut table = self.table();
        if !Self::take(&mut table, slot) {
            return;
        }
        let mut flags = FLAG_LAST;
        if self.shape.no_flow_control {
            flags |= FLAG_SUCCESS;
        } else {
            behind.extend(self.response(&table, slot, 0, Status::SUCCESS));
        }
        drop(table);
        let common = wire::common(Kind::C2HData, flags, digests, length);
        let header = Data {
            command: slot.command,
            tag: 0,
            offset: 0,
            length,
        };
        let mut header = header.encode(common).to_vec();
        wire::seal(&mut header, digests);
        self.send(Outgoing::Data {
            header,
            data,
            behind,
            permit,
        });
        self.count(slot, Status::SUCCESS);
    }

    /// Asks the host for a command's data. None: the connection has ended, or
    /// the command was answered already.
    pub fn ask(
        &self,
        slot: Slot,
        length: u32,
    ) -> Option<oneshot::Receiver<Result<Vec<u8>, Status>>> {
        let (done, data) = oneshot::channel();
        let mut table = self.table();
        if table.ended {
            return None;
        }
        let outstanding = table
            .commands
            .get_mut(&slot.command)
            .filter(|o| o.slot == slot)?;
        outstanding.asked = true;
        let buffer = vec![0; length as usize];
        let transfer = Transfer {
            slot,
            buffer,
            filled: 0,
            damaged: false,
            done,
        };
        table.transfers.insert(slot.command, transfer);
        drop(table);
        let header = Data {
            command: slot.command,
            tag: slot.command,
            offset: 0,
            length,
        };
        let digests = self.shape.digests;
        let mut pdu = header
            .encode(wire::common(Kind::R2T, 0, digests, 0))
            .to_vec();
        wire::seal(&mut pdu, digests);
        self.send(Outgoing::Pdu(pdu));
        Some(data)
    }

    /// The transfer that an H2CData PDU goes on with. It is out of the table
    /// until it is given back by [`Self::received`].
    ///
    /// # Errors
    /// Data that was not asked for, out of order, or beyond what was asked for.
    pub fn transfer(&self, data: Data, length: usize, last: bool) -> Result<Transfer, Malformed> {
        let mut table = self.table();
        let transfer = table
            .transfers
            .remove(&data.tag)
            .ok_or(Flaw::HeaderField.at(10))?;
        if data.command != transfer.slot.command {
            return Err(Flaw::HeaderField.at(8));
        }
        if data.length as usize != length {
            return Err(Flaw::HeaderField.at(16));
        }
        if data.offset as usize != transfer.filled {
            return Err(Flaw::OutOfRange.at(12));
        }
        let left = transfer.buffer.len() - transfer.filled;
        if length > left {
            return Err(Flaw::OutOfRange.at(16));
        }
        if last != (length == left) {
            return Err(Flaw::HeaderField.at(1));
        }
        Ok(transfer)
    }

    /// Where a transfer's next `length` bytes go; its checks were made by [`Self::transfer`].
    pub fn window(transfer: &mut Transfer, length: usize) -> &mut [u8] {
        &mut transfer.buffer[transfer.filled..transfer.filled + length]
    }

    /// `length` more bytes have come; `sound` is whether their digest matched.
    pub fn received(&self, mut transfer: Transfer, length: usize, sound: bool) {
        transfer.filled += length;
        transfer.damaged |= !sound;
        let mut table = self.table();
        if table.ended {
            return;
        }
        if transfer.filled < transfer.buffer.len() {
            table.transfers.insert(transfer.slot.command, transfer);
            return;
        }
        if let Some(outstanding) = table.commands.get_mut(&transfer.slot.command) {
            outstanding.asked = false;
        }
        drop(table);
        let data = if transfer.damaged {
            Err(Status::TRANSIENT_TRANSPORT_ERROR)
        } else {
            Ok(transfer.buffer)
        };
        // Nobody waits any more: the command was answered meanwhile.
        let _ = transfer.done.send(data);
    }

    /// Answers every command with `status`, but not one whose host is sending
    /// data: it would use the memory of a request that has ended.
    pub fn answer_all(&self, status: Status) {
        let slots: Vec<_> = {
            let table = self.table();
            table
                .commands
                .values()
                .filter(|o| !o.asked)
                .map(|o| o.slot)
                .collect()
        };
        for slot in slots {
            self.answer(slot, 0, status);
        }
    }

    /// Sends bytes that belong to no command.
    pub fn send(&self, outgoing: Outgoing) {
        // The writer has gone: so has the connection.
        let _ = self.out.send(outgoing);
    }

    /// The connection has ended: commands that wait for data or room give up.
    pub fn end(&self) {
        let mut table = self.table();
        table.ended = true;
        table.transfers.clear();
        table.commands.clear();
        self.budget.close();
    }

    fn take(table: &mut Table, slot: Slot) -> bool {
        let mine = table
            .commands
            .get(&slot.command)
            .is_some_and(|o| o.slot == slot);
        if mine {
            table.commands.remove(&slot.command);
        }
        mine
    }

    fn response(&self, table: &Table, slot: Slot, result: u64, status: Status) -> Vec<u8> {
        let sq_head = if self.shape.no_flow_control {
            0
        } else {
            table.head
        };
        Completion {
            result,
            sq_head,
            command: slot.command,
            status: status.0,
        }
        .encode(self.shape.digests)
    }

    fn count(&self, slot: Slot, status: Status) {
        self.metrics
            .command(self.shape.id == 0, slot.opcode, status);
    }
}

//! A connection whose thread gives the file's I/O to io_uring, all requests at
//! once, and waits for the socket there too.

use std::fs::File;
use std::io::IoSlice;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types};

use super::serve::{Aligned, send};
use super::{ANSWER, MAX_LEN, READ, REQUEST, Request, SIZE, WRITE, answer};
use crate::inbox::{Inbox, Receiver};
use crate::outbox::Outbox;

/// Requests that a connection may have in flight.
const SLOTS: u16 = 256;
/// The user data of the wait for the socket; slots are smaller.
const SOCKET: u64 = u64::MAX;

/// Serves a connection until the client closes it.
pub fn serve(file: &File, bytes: u64, socket: &TcpStream) -> Result<()> {
    let mut ring = IoUring::new(u32::from(SLOTS) + 8).context("io_uring_setup")?;
    let mut server = Server {
        bytes,
        buffers: (0..SLOTS).map(|_| None).collect(),
        ready: Vec::new(),
        write: None,
    };
    let (mut inbox, mut unused) = (Inbox::default(), Outbox::default());
    let outcome = run(
        &mut ring,
        &mut server,
        file,
        socket,
        &mut inbox,
        &mut unused,
    );
    let flying = |slot: &Option<Slot>| slot.as_ref().is_some_and(|slot| slot.flying);
    // The kernel may still write to the buffers; they must outlive that.
    while server.buffers.iter().any(flying) {
        ring.submit_and_wait(1).context("io_uring_enter")?;
        let ended: Vec<u64> = ring.completion().map(|entry| entry.user_data()).collect();
        for slot in ended.into_iter().filter(|data| *data != SOCKET) {
            if let Some(slot) = &mut server.buffers[usize::try_from(slot)?] {
                slot.flying = false;
            }
        }
    }
    outcome
}

fn run(
    ring: &mut IoUring,
    server: &mut Server,
    file: &File,
    socket: &TcpStream,
    inbox: &mut Inbox,
    unused: &mut Outbox,
) -> Result<()> {
    let mut watched = false;
    let mut ended: Vec<(u64, i32)> = Vec::new();
    loop {
        if inbox.receive(socket, false)? {
            inbox.hand_out(server, unused)?;
            unused.flush(socket, true)?;
        } else if !watched {
            let readable = u32::try_from(nix::libc::POLLIN)?;
            let watch = opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), readable);
            push(ring, &watch.build().user_data(SOCKET))?;
            watched = true;
        }
        for slot in std::mem::take(&mut server.ready) {
            push(ring, &server.entry(slot, file)?)?;
        }
        // With the socket unwatched there may be more to receive at once.
        ring.submit_and_wait(usize::from(watched))
            .context("io_uring_enter")?;
        ended.clear();
        ended.extend(
            ring.completion()
                .map(|entry| (entry.user_data(), entry.result())),
        );
        server.answer(&ended, socket)?;
        watched &= !ended.iter().any(|(data, _)| *data == SOCKET);
    }
}

fn push(ring: &mut IoUring, entry: &io_uring::squeue::Entry) -> Result<()> {
    // SAFETY: a read or write points into a slot's buffer, which lives in
    // `Server` until the operation has ended (`serve` waits for all).
    unsafe { ring.submission().push(entry) }.context("the submission queue is full")
}

struct Server {
    bytes: u64,
    buffers: Vec<Option<Slot>>,
    /// Slots whose I/O can begin.
    ready: Vec<u16>,
    /// The write whose data is on its way, and how much of it came.
    write: Option<(u16, usize)>,
}

struct Slot {
    request: Request,
    buffer: Aligned,
    flying: bool,
}

impl Server {
    fn slot(&mut self, slot: u64) -> Result<&mut Slot> {
        let slot = self.buffers.get_mut(usize::try_from(slot)?);
        slot.and_then(Option::as_mut).context("no such slot")
    }

    fn take(&mut self, request: Request) -> Result<()> {
        let place = self.buffers.get_mut(usize::from(request.slot));
        let place = place.with_context(|| format!("slot {} of {SLOTS}", request.slot))?;
        let slot = place.get_or_insert_with(|| Slot {
            request,
            buffer: Aligned::new(MAX_LEN as usize),
            flying: false,
        });
        if slot.flying {
            bail!("slot {} is in use", request.slot);
        }
        slot.request = request;
        Ok(())
    }

    fn entry(&mut self, number: u16, file: &File) -> Result<io_uring::squeue::Entry> {
        let slot = self.slot(number.into())?;
        slot.flying = true;
        let Request {
            verb, len, offset, ..
        } = slot.request;
        let fd = types::Fd(file.as_raw_fd());
        let pointer = slot.buffer.bytes_mut().as_mut_ptr();
        let entry = if verb == WRITE {
            opcode::Write::new(fd, pointer, len).offset(offset).build()
        } else {
            opcode::Read::new(fd, pointer, len).offset(offset).build()
        };
        Ok(entry.user_data(number.into()))
    }

    /// Sends what ended.
    fn answer(&mut self, ended: &[(u64, i32)], socket: &TcpStream) -> Result<()> {
        let mut headers: Vec<[u8; ANSWER]> = Vec::with_capacity(ended.len());
        let slots = || ended.iter().filter(|(data, _)| *data != SOCKET);
        for (data, result) in slots() {
            let slot = self.slot(*data)?;
            slot.flying = false;
            let request = slot.request;
            if u32::try_from(*result) != Ok(request.len) {
                bail!("{request:?} came to {result}");
            }
            let len = if request.verb == READ { request.len } else { 0 };
            headers.push(answer(request.slot, len));
        }
        let mut slices = Vec::with_capacity(headers.len() * 2);
        for ((data, _), header) in slots().zip(&headers) {
            slices.push(IoSlice::new(header));
            let slot = self.buffers[usize::try_from(*data)?].as_ref();
            if let Some(slot) = slot.filter(|slot| slot.request.verb == READ) {
                let len = usize::try_from(slot.request.len)?;
                slices.push(IoSlice::new(&slot.buffer.bytes()[..len]));
            }
        }
        send(socket, &mut slices).context("send")
    }
}

impl Receiver for Server {
    const PREFIX: usize = REQUEST;

    fn header_len(&self, _: &[u8]) -> Result<usize> {
        Ok(REQUEST)
    }

    fn header(&mut self, header: &[u8], out: &mut Outbox) -> Result<usize> {
        let request = Request::decode(header)?;
        if request.verb == SIZE {
            out.push(&answer(request.slot, 8));
            out.push(&self.bytes.to_le_bytes());
            return Ok(0);
        }
        self.take(request)?;
        if request.verb == READ {
            self.ready.push(request.slot);
            return Ok(0);
        }
        self.write = Some((request.slot, 0));
        Ok(usize::try_from(request.len)?)
    }

    fn payload(&mut self, piece: &[u8], left: usize, _: &mut Outbox) -> Result<()> {
        let Some((number, at)) = self.write else {
            bail!("data where none belongs");
        };
        let slot = self.slot(number.into())?;
        slot.buffer.bytes_mut()[at..at + piece.len()].copy_from_slice(piece);
        self.write = (left > 0).then_some((number, at + piece.len()));
        if left == 0 {
            self.ready.push(number);
        }
        Ok(())
    }
}

//! A connection whose thread does the file's I/O itself.

use std::fs::File;
use std::io::IoSlice;
use std::net::TcpStream;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};

use super::serve::{Aligned, send};
use super::{ANSWER, READ, REQUEST, Request, SIZE, answer};
use crate::inbox::{Inbox, Receiver};
use crate::outbox::Outbox;

/// What is read or written before it is sent or received further: within the
/// processor's second-level cache.
const STAGE: usize = 256 << 10;

/// Serves a connection until the client closes it.
pub fn serve(file: &File, bytes: u64, socket: &TcpStream) -> Result<()> {
    let mut server = Server {
        file,
        bytes,
        reads: Vec::new(),
        ends: Vec::new(),
        write: None,
        stage: Aligned::new(STAGE),
        staged: 0,
        pool: Aligned::new(STAGE),
    };
    let (mut inbox, mut unused) = (Inbox::default(), Outbox::default());
    loop {
        inbox.receive(socket, true)?;
        inbox.hand_out(&mut server, &mut unused)?;
        unused.flush(socket, true)?;
        server.answer(socket)?;
    }
}

struct Server<'a> {
    file: &'a File,
    bytes: u64,
    reads: Vec<Request>,
    /// Writes that are done.
    ends: Vec<u16>,
    /// The write whose data is on its way; what of it is on the file.
    write: Option<(Request, u64)>,
    stage: Aligned,
    staged: usize,
    pool: Aligned,
}

enum Piece {
    Header([u8; ANSWER]),
    Data(Range<usize>),
}

impl Server<'_> {
    fn answer(&mut self, socket: &TcpStream) -> Result<()> {
        let ends = self.ends.drain(..);
        let mut pieces: Vec<Piece> = ends.map(|slot| Piece::Header(answer(slot, 0))).collect();
        let mut used = 0;
        for read in self.reads.drain(..) {
            pieces.push(Piece::Header(answer(read.slot, read.len)));
            let (mut at, len) = (0, usize::try_from(read.len)?);
            while at < len {
                if used == STAGE {
                    flush(socket, &pieces, self.pool.bytes())?;
                    pieces.clear();
                    used = 0;
                }
                let piece = (len - at).min(STAGE - used);
                let into = &mut self.pool.bytes_mut()[used..used + piece];
                let offset = read.offset + u64::try_from(at)?;
                self.file
                    .read_exact_at(into, offset)
                    .context("read the file")?;
                pieces.push(Piece::Data(used..used + piece));
                used += piece;
                at += piece;
            }
        }
        flush(socket, &pieces, self.pool.bytes())
    }
}

fn flush(socket: &TcpStream, pieces: &[Piece], pool: &[u8]) -> Result<()> {
    let mut slices: Vec<IoSlice<'_>> = pieces
        .iter()
        .map(|piece| match piece {
            Piece::Header(bytes) => IoSlice::new(bytes),
            Piece::Data(range) => IoSlice::new(&pool[range.clone()]),
        })
        .collect();
    send(socket, &mut slices).context("send")
}

impl Receiver for Server<'_> {
    const PREFIX: usize = REQUEST;

    fn header_len(&self, _: &[u8]) -> Result<usize> {
        Ok(REQUEST)
    }

    fn header(&mut self, header: &[u8], out: &mut Outbox) -> Result<usize> {
        let request = Request::decode(header)?;
        match request.verb {
            SIZE => {
                out.push(&answer(request.slot, 8));
                out.push(&self.bytes.to_le_bytes());
                Ok(0)
            }
            READ => {
                self.reads.push(request);
                Ok(0)
            }
            _ => {
                self.write = Some((request, 0));
                Ok(usize::try_from(request.len)?)
            }
        }
    }

    fn payload(&mut self, mut piece: &[u8], left: usize, _: &mut Outbox) -> Result<()> {
        let Some((request, written)) = &mut self.write else {
            bail!("data where none belongs");
        };
        while !piece.is_empty() {
            let len = piece.len().min(STAGE - self.staged);
            let (now, later) = piece.split_at(len);
            self.stage.bytes_mut()[self.staged..self.staged + len].copy_from_slice(now);
            self.staged += len;
            piece = later;
            let over = left == 0 && piece.is_empty();
            if self.staged == STAGE || over {
                let bytes = &self.stage.bytes()[..self.staged];
                let offset = request.offset + *written;
                self.file
                    .write_all_at(bytes, offset)
                    .context("write the file")?;
                *written += u64::try_from(self.staged)?;
                self.staged = 0;
            }
            if over {
                self.ends.push(request.slot);
            }
        }
        Ok(())
    }
}

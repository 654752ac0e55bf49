//! One connection under load: as many commands in flight as wanted, sent and
//! received in batches.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::histogram::Histogram;
use crate::inbox::{Inbox, Receiver};
use crate::outbox::Outbox;
use crate::slots::{Io, Slots};

/// The longest that a target may stay silent.
pub const SILENCE: Duration = Duration::from_secs(30);

/// A wire's side of the load: commands in, ends of commands out.
pub trait Client: Receiver {
    /// Whether the target takes one more command now.
    fn room(&self) -> bool;

    /// Sends a command under a number that is free.
    fn submit(&mut self, slot: u16, io: Io, out: &mut Outbox);

    /// What is in flight.
    fn slots(&mut self) -> &mut Slots;
}

/// Which commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mix {
    /// Reads alone.
    Read,
    /// Writes alone.
    Write,
    /// Seven reads to three writes.
    Mixed,
}

/// Where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Order {
    /// Anywhere, aligned to the size.
    Random,
    /// One after the other, round and round.
    Sequential,
}

/// The load on one connection.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Which commands.
    pub mix: Mix,
    /// Where.
    pub order: Order,
    /// Bytes of each.
    pub size: u32,
    /// How many are in flight.
    pub depth: u16,
    /// Bytes of the device that are used, from its beginning.
    pub span: u64,
    /// Another number, another sequence.
    pub seed: u64,
}

/// When what counts begins and ends; all connections share it.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// From then on commands are counted.
    pub begin: Instant,
    /// Until then.
    pub end: Instant,
}

/// What one connection did in the window.
#[derive(Default)]
pub struct Tally {
    /// Latencies of the commands that ended in the window.
    pub latency: Histogram,
}

/// Makes commands.
struct Source {
    work: Work,
    state: u64,
    next: u64,
    blocks: u64,
}

impl Source {
    fn new(work: Work) -> Result<Self> {
        let blocks = work.span / u64::from(work.size);
        if blocks == 0 {
            bail!(
                "the device is smaller than one command of {} bytes",
                work.size
            );
        }
        // An odd multiplier spreads neighbouring seeds; xorshift must not begin at 0.
        let state = (work.seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let next = state % blocks;
        Ok(Self {
            work,
            state,
            next,
            blocks,
        })
    }

    fn random(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn io(&mut self) -> Io {
        let write = match self.work.mix {
            Mix::Read => false,
            Mix::Write => true,
            Mix::Mixed => self.random() % 10 >= 7,
        };
        let block = match self.work.order {
            Order::Random => self.random() % self.blocks,
            Order::Sequential => {
                self.next = (self.next + 1) % self.blocks;
                self.next
            }
        };
        let size = self.work.size;
        Io {
            write,
            offset: block * u64::from(size),
            len: size,
        }
    }
}

/// Keeps a connection busy until the window ends, then waits for what is in flight.
///
/// # Errors
/// The socket's, a command that failed, data that is wrong, or a target that
/// was silent for [`SILENCE`].
pub fn drive<C: Client>(
    client: &mut C,
    socket: &TcpStream,
    work: Work,
    window: Window,
) -> Result<Tally> {
    socket
        .set_read_timeout(Some(SILENCE))
        .context("set SO_RCVTIMEO")?;
    let mut source = Source::new(work)?;
    let (mut inbox, mut out) = (Inbox::default(), Outbox::default());
    let mut free: Vec<u16> = (0..work.depth).rev().collect();
    let mut begun = vec![window.begin; usize::from(work.depth)];
    let mut tally = Tally::default();
    let mut now = Instant::now();
    loop {
        let over = now >= window.end;
        if over && free.len() == usize::from(work.depth) {
            return Ok(tally);
        }
        while !over && client.room() {
            let Some(slot) = free.pop() else { break };
            begun[usize::from(slot)] = now;
            client.submit(slot, source.io(), &mut out);
        }
        out.flush(socket, false).context("send")?;
        if !out.is_empty() {
            ready(socket)?;
        }
        let wait = out.is_empty();
        inbox.receive(socket, wait).context("receive")?;
        inbox.hand_out(client, &mut out)?;
        now = Instant::now();
        let counts = (window.begin..window.end).contains(&now);
        for slot in client.slots().done().drain(..) {
            if counts {
                let took = now - begun[usize::from(slot)];
                tally.latency.add(u64::try_from(took.as_nanos())?);
            }
            free.push(slot);
        }
    }
}

/// Waits until something can be sent or received.
fn ready(socket: &TcpStream) -> Result<()> {
    let mut fds = [PollFd::new(
        socket.as_fd(),
        PollFlags::POLLIN | PollFlags::POLLOUT,
    )];
    match poll(&mut fds, PollTimeout::try_from(SILENCE)?) {
        Ok(0) => bail!(
            "the target took and sent nothing for {} s",
            SILENCE.as_secs()
        ),
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno).context("poll"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(mix: Mix, order: Order) -> Source {
        let (size, depth, span, seed) = (4096, 1, 40_960 + 100, 3);
        Source::new(Work {
            mix,
            order,
            size,
            depth,
            span,
            seed,
        })
        .unwrap()
    }

    #[test]
    fn commands_lie_within_the_device_and_reach_all_of_it() {
        for order in [Order::Random, Order::Sequential] {
            let mut source = source(Mix::Mixed, order);
            let mut seen = [false; 10];
            let mut writes = 0;
            for _ in 0..10_000 {
                let io = source.io();
                assert!(
                    io.offset.is_multiple_of(4096) && io.offset + 4096 <= 40_960,
                    "{io:?}"
                );
                seen[usize::try_from(io.offset / 4096).unwrap()] = true;
                writes += u32::from(io.write);
            }
            assert_eq!(seen, [true; 10]);
            assert!((2_700..3_300).contains(&writes), "{writes}");
        }
    }

    #[test]
    fn a_device_too_small_for_one_command_is_refused() {
        let work = source(Mix::Read, Order::Random).work;
        assert!(Source::new(Work { span: 4095, ..work }).is_err());
    }
}

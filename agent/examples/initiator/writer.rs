//! A stale workload: a process that writes to a volume in one way, until it is
//! refused, and then sits on what it has open.
//!
//! Each block says who wrote it and when, so that what landed in the data can be
//! told from what did not.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types};

/// Bytes of a block.
pub const BLOCK: usize = 4096;
const MAGIC: &[u8; 8] = b"drvrgate";
/// How many blocks a writer goes round.
const ROUND: u64 = 64;

/// Now, CLOCK_MONOTONIC in ns: the same in every process.
pub fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A way to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Direct,
    Buffered,
    Mapped,
    Uring,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Direct, Self::Buffered, Self::Mapped, Self::Uring];

    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Buffered => "buffered",
            Self::Mapped => "mapped",
            Self::Uring => "uring",
        }
    }

    fn named(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.with_context(|| format!("{name:?} is no way to write"))
    }
}

/// Who wrote a block and when; none: no writer did.
pub fn stamp(block: &[u8]) -> Option<(u64, u64)> {
    let word = |at: usize| {
        block
            .get(at..at + 8)?
            .try_into()
            .ok()
            .map(u64::from_le_bytes)
    };
    (block.get(..8)? == MAGIC).then_some((word(8)?, word(16)?))
}

/// A block that says who wrote it and when.
pub fn stamped(id: u64, begun: u64) -> [u8; BLOCK] {
    let mut block = [0xa5; BLOCK];
    block[..8].copy_from_slice(MAGIC);
    block[8..16].copy_from_slice(&id.to_le_bytes());
    block[16..24].copy_from_slice(&begun.to_le_bytes());
    block
}

/// Memory that O_DIRECT takes.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

struct Writer {
    id: u64,
    block: Box<Aligned>,
    file: File,
    offset: u64,
    ring: Option<IoUring>,
    map: *mut u8,
}

impl Writer {
    fn open(kind: Kind, id: u64, path: &str, offset: u64) -> Result<Self> {
        let direct = matches!(kind, Kind::Direct | Kind::Uring);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(!path.starts_with("/dev/"))
            .truncate(false)
            .custom_flags(if direct { libc::O_DIRECT } else { 0 })
            .open(path)
            .with_context(|| format!("open {path}"))?;
        let length = BLOCK * ROUND as usize;
        if file.metadata()?.is_file() {
            file.set_len(offset + length as u64)?;
        }
        let ring = match kind {
            Kind::Uring => {
                let ring = IoUring::new(4)?;
                ring.submitter().register_files(&[file.as_raw_fd()])?;
                Some(ring)
            }
            _ => None,
        };
        let mut map = std::ptr::null_mut();
        if kind == Kind::Mapped {
            // SAFETY: a new mapping, wherever the kernel likes.
            let made = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    length,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED,
                    file.as_raw_fd(),
                    offset as i64,
                )
            };
            if made == libc::MAP_FAILED {
                bail!("mmap {path}: {}", io::Error::last_os_error());
            }
            map = made.cast();
        }
        let block = Box::new(Aligned([0; BLOCK]));
        Ok(Self {
            id,
            block,
            file,
            offset,
            ring,
            map,
        })
    }

    /// Writes block `n` and makes it durable; when that began.
    fn write(&mut self, kind: Kind, n: u64) -> (u64, io::Result<()>) {
        let begun = now();
        self.block.0 = stamped(self.id, begun);
        let at = self.offset + n % ROUND * BLOCK as u64;
        let result = match kind {
            Kind::Direct => self.file.write_all_at(&self.block.0, at),
            Kind::Buffered => self
                .file
                .write_all_at(&self.block.0, at)
                .and_then(|()| self.file.sync_data()),
            Kind::Mapped => self.store(n),
            Kind::Uring => self.submit(at),
        };
        (begun, result)
    }

    fn store(&mut self, n: u64) -> io::Result<()> {
        // SAFETY: block `n % ROUND` lies in the mapping, which nobody unmaps.
        // A page that cannot be had ends this process by SIGBUS, as it would
        // any workload.
        let at = unsafe { self.map.add((n % ROUND) as usize * BLOCK) };
        // SAFETY: as above; both are BLOCK bytes long and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.block.0.as_ptr(), at, BLOCK) };
        // SAFETY: as above.
        match unsafe { libc::msync(at.cast(), BLOCK, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn submit(&mut self, at: u64) -> io::Result<()> {
        let Some(ring) = &mut self.ring else {
            return Err(io::Error::other("no ring"));
        };
        let entry = opcode::Write::new(types::Fixed(0), self.block.0.as_ptr(), BLOCK as u32)
            .offset(at)
            .build();
        // SAFETY: the block lives until the ring has answered, just below.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        let done = ring.completion().next();
        match done.map(|entry| entry.result()) {
            Some(n) if n == BLOCK as i32 => Ok(()),
            Some(n) if n < 0 => Err(io::Error::from_raw_os_error(-n)),
            other => Err(io::Error::other(format!("a ring's answer: {other:?}"))),
        }
    }
}

/// `KIND ID PATH OFFSET`. Says `up` after the first write and `refused BEGUN
/// ENDED ERRNO` (times of the refused call) after the last, and ends with its
/// standard input.
pub fn main(mut args: impl Iterator<Item = String>) -> Result<()> {
    let mut next = |what| args.next().with_context(|| format!("no {what}"));
    let kind = Kind::named(&next("kind")?)?;
    let id = next("id")?.parse()?;
    let path = next("path")?;
    let mut writer = Writer::open(kind, id, &path, next("offset")?.parse()?)?;
    for n in 0.. {
        match writer.write(kind, n) {
            (_, Ok(())) if n == 0 => println!("up"),
            (_, Ok(())) => std::thread::sleep(Duration::from_millis(2)),
            (begun, Err(error)) => {
                let ended = now();
                let errno = error.raw_os_error().unwrap_or(0);
                println!("refused {begun} {ended} {errno}");
                break;
            }
        }
    }
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

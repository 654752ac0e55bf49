//! Replays what dm-log-writes logged, for the proof of power loss.
//!
//! The log (Documentation/admin-guide/device-mapper/log-writes.rst, and
//! drivers/md/dm-log-writes.c) holds writes in the order in which they became
//! durable: what was not flushed is not in it yet. So the first N entries,
//! where entry N is a flush, a FUA write or a mark, are just what a disk holds
//! that loses its power then and all of its cache with it.
//!
//! Without TARGET it lists those boundaries, a line each: the entry's number,
//! counted from 1, and `flush`, `fua` or `mark NAME`. With TARGET it writes a
//! range of the log there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use nix::fcntl::{FallocateFlags, fallocate};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1 << 0;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
/// A write is one bio: far less than this.
const MAX_DATA: u64 = 256 << 20;

#[derive(Parser)]
struct Arguments {
    /// The log's device, or its image.
    log: PathBuf,
    /// Where to replay it; a file is made as large as need be.
    target: Option<PathBuf>,
    /// The first entry to replay, counted from 1.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// The last one.
    #[arg(long, default_value_t = u64::MAX)]
    to: u64,
}

/// A log, and where in it we are.
struct Log {
    file: File,
    block: u64,
    entries: u64,
    read: u64,
    at: u64,
}

struct Entry {
    number: u64,
    flags: u64,
    /// Where on the disk, in bytes.
    offset: u64,
    length: u64,
    /// Where in the log its data is.
    data: u64,
    mark: String,
}

impl Log {
    fn open(path: &PathBuf) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let mut head = [0; 28];
        file.read_exact_at(&mut head, 0)
            .context("read the log's head")?;
        ensure!(word(&head, 0) == MAGIC, "{} is no log", path.display());
        ensure!(word(&head, 8) == VERSION, "a log of another version");
        let block = word(&[&head[24..28], &[0; 4]].concat(), 0);
        ensure!(matches!(block, 512..=4096), "blocks of {block} bytes");
        Ok(Self {
            file,
            block,
            entries: word(&head, 16),
            read: 0,
            at: block,
        })
    }

    fn next(&mut self) -> anyhow::Result<Option<Entry>> {
        if self.read == self.entries {
            return Ok(None);
        }
        let mut head = vec![0; usize::try_from(self.block)?];
        self.file.read_exact_at(&mut head, self.at)?;
        let [sector, sectors, flags, text] = [0, 8, 16, 24].map(|at| word(&head, at));
        let scaled = |count: u64| count.checked_mul(self.block).context("beyond any disk");
        let (offset, length) = (scaled(sector)?, scaled(sectors)?);
        let data = self.at + self.block;
        let text = head.get(32..32 + usize::try_from(text)?);
        let mark = text.context("a mark that is longer than its block")?;
        let mark = String::from_utf8_lossy(mark)
            .trim_end_matches('\0')
            .to_owned();
        self.read += 1;
        self.at = data;
        if flags & DISCARD == 0 {
            ensure!(length <= MAX_DATA, "entry {} has {length} bytes", self.read);
            self.at += length;
        }
        Ok(Some(Entry {
            number: self.read,
            flags,
            offset,
            length,
            data,
            mark,
        }))
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn replay(log: &File, entry: &Entry, target: &File) -> anyhow::Result<()> {
    if entry.length == 0 {
        return Ok(());
    }
    if entry.flags & DISCARD != 0 {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, length) = (entry.offset.try_into()?, entry.length.try_into()?);
        return fallocate(target, hole, offset, length).context("punch a hole for a discard");
    }
    let mut data = vec![0; usize::try_from(entry.length)?];
    log.read_exact_at(&mut data, entry.data)?;
    target.write_all_at(&data, entry.offset)?;
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut log = Log::open(&arguments.log)?;
    let target = match &arguments.target {
        None => None,
        Some(path) => Some(
            File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .with_context(|| format!("open {}", path.display()))?,
        ),
    };
    while let Some(entry) = log.next()? {
        let number = entry.number;
        match &target {
            Some(target) if (arguments.from..=arguments.to).contains(&number) => {
                replay(&log.file, &entry, target).with_context(|| format!("entry {number}"))?;
            }
            Some(_) => {}
            None if entry.flags & MARK != 0 => println!("{number} mark {}", entry.mark),
            None if entry.flags & FUA != 0 => println!("{number} fua"),
            None if entry.flags & FLUSH != 0 => println!("{number} flush"),
            None => {}
        }
    }
    if arguments.to != u64::MAX && arguments.to > log.entries {
        bail!("the log ends with entry {}", log.entries);
    }
    Ok(())
}

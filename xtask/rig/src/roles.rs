//! The processes that use volumes: an honest workload, a rogue writer, and a
//! reader that hangs. Each is a process of its own, as it would be on a node.

pub mod holder;
pub mod stale;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use clap::Subcommand;
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What a block of the rogue's begins with.
const STAMP: u64 = 0x726f_6775_6521_2121;
/// The size of the rogue's writes, and of the workload's.
pub const BLOCK: usize = 4096;

/// Blocks that the reader reads, the first of its device.
const READ_BLOCKS: u64 = 1024;

/// Who is asked to end does so within this. Linux gives an admin command 60 s
/// (nvme_core.admin_timeout), also one of a reconnect whose home was killed in its
/// midst; a write may wait for two of them, and a machine with much else to do
/// takes its own time.
const ENDED: Duration = Duration::from_secs(300);

/// The name of the reader's process: a backup tool's that drover knows.
pub const READER: &str = "restic";

/// A process that uses a volume.
#[derive(Subcommand)]
pub enum Role {
    /// Writes, syncs and checks a file until SIGTERM, then prints a Work line
    Workload {
        /// The file
        file: PathBuf,
        /// Its size
        #[arg(long)]
        mib: u64,
        /// The seed of what is written where
        #[arg(long)]
        seed: u64,
    },
    /// Ignores SIGTERM and writes stamped blocks to a device, over the blocks of one file
    Rogue {
        /// The device
        device: PathBuf,
        /// Where on it, in bytes
        #[arg(long)]
        at: u64,
        /// Blocks there
        #[arg(long)]
        blocks: u64,
        /// Where a line is added for every write
        #[arg(long)]
        log: PathBuf,
    },
    /// Reads some of a device again and again under a backup tool's name; on SIGUSR1
    /// it hangs, and holds the device open
    Reader {
        /// The device
        device: PathBuf,
    },
    /// Writes a raw volume and reads it back, and knows what must be on it
    Holder(holder::Holder),
    /// Keeps the device of an epoch that has ended, and writes
    Stale(stale::Stale),
}

/// What a workload did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// The file's checksum at the end, read back from its pages.
    pub sha256: String,
    /// Blocks written and synced.
    pub written: u64,
    /// Blocks read back and found as written.
    pub verified: u64,
    /// The longest any write and its sync took.
    pub longest_ms: u64,
}

/// One write of the rogue's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RogueWrite {
    /// Its number, from 1; what it wrote carries it.
    pub number: u64,
    /// When it began, on the kernel's monotonic clock.
    pub began_ns: u64,
    /// When it was answered.
    pub ended_ns: u64,
    /// The error, if it was refused.
    pub error: Option<String>,
}

/// The kernel's monotonic clock.
///
/// # Errors
/// Never on Linux.
pub fn now_ns() -> anyhow::Result<u64> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    Ok(u64::try_from(now.as_nanos())?)
}

/// Plays a role to its end.
///
/// # Errors
/// When it cannot be played.
pub fn play(role: Role) -> anyhow::Result<()> {
    match role {
        Role::Workload { file, mib, seed } => workload(&file, mib << 20, seed),
        Role::Rogue {
            device,
            at,
            blocks,
            log,
        } => rogue(&device, at, blocks, &log),
        Role::Reader { device } => reader(&device),
        Role::Holder(of) => holder::play(&of),
        Role::Stale(of) => stale::play(&of),
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn note_stop(_: i32) {
    STOP.store(true, Ordering::SeqCst);
}

/// Small, seedable random numbers (splitmix64).
pub struct Dice(pub u64);

impl Dice {
    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound.max(1)
    }

    fn block(&mut self) -> Vec<u8> {
        (0..BLOCK / 8)
            .flat_map(|_| self.roll().to_le_bytes())
            .collect()
    }
}

/// The checksum of a file.
///
/// # Errors
/// When it cannot be read.
pub fn checksum(file: &Path) -> anyhow::Result<String> {
    let mut file = File::open(file).with_context(|| format!("open {}", file.display()))?;
    let mut digest = Sha256::new();
    std::io::copy(&mut file, &mut digest)?;
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn workload(path: &Path, size: u64, seed: u64) -> anyhow::Result<()> {
    // SAFETY: the handler only stores to an atomic.
    unsafe { signal(Signal::SIGTERM, SigHandler::Handler(note_stop)) }?;
    let mut dice = Dice(seed);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    let mut work = Work {
        sha256: String::new(),
        written: 0,
        verified: 0,
        longest_ms: 0,
    };
    if file.metadata()?.len() < size {
        for index in 0..size / BLOCK as u64 {
            file.write_all_at(&dice.block(), index * BLOCK as u64)
                .context("fill")?;
            work.written += 1;
        }
        file.sync_all().context("sync the filled file")?;
    }
    println!("ready");
    while !STOP.load(Ordering::SeqCst) {
        let at = dice.below(size / BLOCK as u64) * BLOCK as u64;
        let block = dice.block();
        let start = Instant::now();
        file.write_all_at(&block, at)
            .with_context(|| format!("write at {at}"))?;
        file.sync_data()
            .with_context(|| format!("sync after the write at {at}"))?;
        work.longest_ms = work
            .longest_ms
            .max(u64::try_from(start.elapsed().as_millis())?);
        work.written += 1;
        let mut back = vec![0; BLOCK];
        file.read_exact_at(&mut back, at)
            .with_context(|| format!("read at {at}"))?;
        ensure!(back == block, "the block at {at} is not what was written");
        work.verified += 1;
        std::thread::sleep(Duration::from_millis(2));
    }
    file.sync_all().context("last sync")?;
    drop(file);
    work.sha256 = checksum(path)?;
    println!("{}", serde_json::to_string(&work)?);
    Ok(())
}

#[repr(C, align(4096))]
struct Aligned([u8; BLOCK]);

fn rogue(device: &Path, at: u64, blocks: u64, log: &Path) -> anyhow::Result<()> {
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { signal(Signal::SIGTERM, SigHandler::SigIgn) }?;
    let direct = libc::O_DIRECT | libc::O_DSYNC;
    let device = OpenOptions::new()
        .write(true)
        .custom_flags(direct)
        .open(device)?;
    let mut log = OpenOptions::new().create(true).append(true).open(log)?;
    let mut block = Aligned([0; BLOCK]);
    println!("ready");
    for number in 1.. {
        block.0[..8].copy_from_slice(&STAMP.to_le_bytes());
        block.0[8..16].copy_from_slice(&u64::to_le_bytes(number));
        let began_ns = now_ns()?;
        let answer = device.write_all_at(&block.0, at + number % blocks * BLOCK as u64);
        let write = RogueWrite {
            number,
            began_ns,
            ended_ns: now_ns()?,
            error: answer.err().map(|error| error.to_string()),
        };
        writeln!(log, "{}", serde_json::to_string(&write)?)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The rogue's numbers that stand in a file.
///
/// # Errors
/// When it cannot be read.
pub fn rogue_numbers(file: &Path) -> anyhow::Result<Vec<u64>> {
    let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
    let word = |block: &[u8], at: usize| {
        block
            .get(at..at + 8)
            .and_then(|word| word.try_into().ok())
            .map(u64::from_le_bytes)
    };
    let blocks = bytes
        .chunks(BLOCK)
        .filter(|block| word(block, 0) == Some(STAMP));
    Ok(blocks.filter_map(|block| word(block, 8)).collect())
}

fn reader(device: &Path) -> anyhow::Result<()> {
    // SAFETY: the handler only stores to an atomic.
    unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(note_stop)) }?;
    fs::write("/proc/self/comm", READER).context("take a name")?;
    // Past the page cache: what is read again is read from the device again.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .with_context(|| format!("open {}", device.display()))?;
    let mut block = Aligned([0; BLOCK]);
    for number in 0.. {
        if STOP.load(Ordering::SeqCst) {
            break;
        }
        file.read_exact_at(&mut block.0, number % READ_BLOCKS * BLOCK as u64)
            .context("read")?;
        if number == 0 {
            println!("ready");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// A role that plays, until it is dropped.
pub struct Playing {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Playing {
    /// Starts a role and waits until it says that it is ready.
    ///
    /// # Errors
    /// When it ends before that.
    pub fn start(words: &[&str]) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("role")
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start the {}", words[0]))?;
        let output = child
            .stdout
            .take()
            .ok_or_else(|| anyhow!("no pipe to the {}", words[0]))?;
        let mut playing = Self {
            child,
            output: BufReader::new(output),
        };
        let mut line = String::new();
        playing.output.read_line(&mut line)?;
        ensure!(
            line.trim() == "ready",
            "the {} did not become ready: {line:?}",
            words[0]
        );
        Ok(playing)
    }

    /// Starts a workload on a file.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn workload(file: &Path, mib: u64, seed: u64) -> anyhow::Result<Self> {
        let file = file.to_string_lossy();
        let (mib, seed) = (mib.to_string(), seed.to_string());
        Self::start(&["workload", &file, "--mib", &mib, "--seed", &seed])
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn tell(&self, what: Signal) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.pid())?);
        kill(pid, what).with_context(|| format!("send {what}"))
    }

    /// Asks a workload to end, and returns what it did.
    ///
    /// # Errors
    /// When it met an error of its own, or does not end within [`ENDED`].
    pub fn finish(self) -> anyhow::Result<Work> {
        self.end()
    }

    /// Asks for the end, and returns what the last line says.
    ///
    /// # Errors
    /// As [`Playing::finish`].
    pub fn end<T: DeserializeOwned>(mut self) -> anyhow::Result<T> {
        self.tell(Signal::SIGTERM).context("ask for the end")?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(start.elapsed() < ENDED, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        ensure!(status.success(), "it met an error: {status}");
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("its last line {line:?}"))
    }

    /// Whether it still plays.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn plays(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }
}

impl Drop for Playing {
    /// Ends the process; one that hangs in the kernel ends when it is let go.
    fn drop(&mut self) {
        if self.child.kill().is_ok() {
            let start = Instant::now();
            while matches!(self.child.try_wait(), Ok(None)) && start.elapsed().as_secs() < 5 {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

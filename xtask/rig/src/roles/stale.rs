//! A writer that keeps the device of an epoch that has ended. It waits; on
//! SIGUSR1 it writes over the first blocks, on SIGUSR2 over all, and never ends
//! by itself.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{SigHandler, Signal, signal};

use super::{Aligned, BLOCK, RogueWrite, now_ns};

/// What a block of a stale writer's begins with.
const STAMP: u64 = 0x7374_616c_6521_2121;
/// Between two writes.
const PAUSE: Duration = Duration::from_millis(3);

static ASKED: AtomicU64 = AtomicU64::new(0);

extern "C" fn note_some(_: i32) {
    ASKED.fetch_max(1, Ordering::SeqCst);
}

extern "C" fn note_all(_: i32) {
    ASKED.fetch_max(2, Ordering::SeqCst);
}

/// What a stale writer does.
#[derive(Debug, clap::Args)]
pub struct Stale {
    /// The device
    device: PathBuf,
    /// Blocks of the volume
    #[arg(long)]
    blocks: u64,
    /// Blocks, the first of them, that it writes over from SIGUSR1 on
    #[arg(long)]
    free: u64,
    /// Where a line is added for every write
    #[arg(long)]
    log: PathBuf,
}

/// Plays the stale writer.
///
/// # Errors
/// When the device or the log cannot be opened, or the log cannot be written.
pub fn play(stale: &Stale) -> anyhow::Result<()> {
    // SAFETY: ignoring a signal runs no code of ours, and the handlers only
    // store to an atomic.
    unsafe {
        signal(Signal::SIGTERM, SigHandler::SigIgn)?;
        signal(Signal::SIGUSR1, SigHandler::Handler(note_some))?;
        signal(Signal::SIGUSR2, SigHandler::Handler(note_all))?;
    }
    let device = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&stale.device)
        .with_context(|| format!("open {}", stale.device.display()))?;
    let mut log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&stale.log)?;
    println!("ready");
    let mut block = Aligned([0; BLOCK]);
    block.0[..8].copy_from_slice(&STAMP.to_le_bytes());
    let mut number = 0;
    loop {
        let over = match ASKED.load(Ordering::SeqCst) {
            0 => 0,
            1 => stale.free,
            _ => stale.blocks,
        };
        if over > 0 {
            number += 1;
            block.0[8..16].copy_from_slice(&u64::to_le_bytes(number));
            let began_ns = now_ns()?;
            let answer = device.write_all_at(&block.0, number % over * BLOCK as u64);
            let write = RogueWrite {
                number,
                began_ns,
                ended_ns: now_ns()?,
                error: answer.err().map(|error| error.to_string()),
            };
            writeln!(log, "{}", serde_json::to_string(&write)?)?;
        }
        std::thread::sleep(PAUSE);
    }
}

/// The writes in a stale writer's log.
///
/// # Errors
/// When it cannot be read, or a line is not a write's.
pub fn writes(log: &Path) -> anyhow::Result<Vec<RogueWrite>> {
    let text = std::fs::read_to_string(log).with_context(|| format!("read {}", log.display()))?;
    // The last line may be being written.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("{line:?}")))
        .collect()
}

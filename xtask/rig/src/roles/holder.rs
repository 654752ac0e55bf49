//! The rightful holder of a raw volume, and the oracle of what must be on it.
//!
//! Every block says which holder wrote it last, and how often. Beside the volume
//! lies a ledger: per block, what was acknowledged, and what is perhaps there
//! because its write was not answered. The ledger is handed from holder to
//! holder. Each begins by reading the whole volume: a block that is neither is a
//! lost write, or somebody else's.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{SigHandler, Signal, signal};
use serde::{Deserialize, Serialize};

use super::{Aligned, BLOCK, Dice, STOP, note_stop};

/// What a block of a holder's begins with.
const STAMP: u64 = 0x686f_6c64_6572_2121;
/// A block that nobody has written.
const NEVER: u64 = 0;
/// A block in which anything may stand, until a holder writes it.
const ANYTHING: u64 = u64::MAX;
/// Writes of a holder at once, each over blocks of its own.
const WRITERS: u64 = 4;
/// One write in so many is read back.
const READ_BACK: u64 = 8;

/// What a holder does.
#[derive(Debug, clap::Args)]
pub struct Holder {
    /// The device
    device: std::path::PathBuf,
    /// What is known of each block; made when it is not there
    #[arg(long)]
    ledger: std::path::PathBuf,
    /// Blocks of the volume
    #[arg(long)]
    blocks: u64,
    /// The first so many are written before anything is believed of them: stale
    /// writers were at them until the grant
    #[arg(long)]
    free: u64,
    /// The holder's number, which its blocks carry
    #[arg(long)]
    number: u64,
}

/// What a holder did.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Writes that were acknowledged.
    pub written: u64,
    /// Blocks that were read and found as they must be.
    pub verified: u64,
}

/// Per block two numbers: what was acknowledged, and what was begun last.
struct Ledger(File);

impl Ledger {
    fn open(path: &Path, blocks: u64) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let file = file.with_context(|| format!("open {}", path.display()))?;
        file.set_len(blocks * 16)?;
        Ok(Self(file))
    }

    fn of(&self, block: u64) -> anyhow::Result<[u64; 2]> {
        let mut bytes = [0; 16];
        self.0.read_exact_at(&mut bytes, block * 16)?;
        let (acknowledged, begun) = bytes.split_at(8);
        Ok([
            u64::from_le_bytes(acknowledged.try_into()?),
            u64::from_le_bytes(begun.try_into()?),
        ])
    }

    fn acknowledged(&self, block: u64, what: u64) -> anyhow::Result<()> {
        Ok(self.0.write_all_at(&what.to_le_bytes(), block * 16)?)
    }

    fn begun(&self, block: u64, what: u64) -> anyhow::Result<()> {
        Ok(self.0.write_all_at(&what.to_le_bytes(), block * 16 + 8)?)
    }
}

/// A block as a holder writes it.
fn fill(block: &mut Aligned, at: u64, what: u64) {
    let mut dice = Dice(what ^ at.rotate_left(32));
    for (index, word) in block.0.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => STAMP,
            1 => what,
            2 => at,
            _ => dice.roll(),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// What a block says that it is; an error if no holder wrote it so, and there.
fn read(block: &Aligned, at: u64) -> anyhow::Result<u64> {
    if block.0.iter().all(|byte| *byte == 0) {
        return Ok(NEVER);
    }
    let word = |index: usize| -> anyhow::Result<u64> {
        Ok(u64::from_le_bytes(block.0[index * 8..][..8].try_into()?))
    };
    let (stamp, what) = (word(0)?, word(1)?);
    let mut whole = Aligned([0; BLOCK]);
    fill(&mut whole, at, what);
    ensure!(
        whole.0 == block.0,
        "block {at} is nobody's: it begins with {stamp:#x} {what:#x}"
    );
    Ok(what)
}

fn name(what: u64) -> String {
    match what {
        NEVER => "nothing".into(),
        ANYTHING => "anything".into(),
        what => format!("write {} of holder {}", what & 0xffff_ffff, what >> 32),
    }
}

/// Plays the holder until SIGTERM, then prints a [`Held`] line.
///
/// # Errors
/// When a block is not what it must be, or a write or read fails.
pub fn play(holder: &Holder) -> anyhow::Result<()> {
    // SAFETY: the handler only stores to an atomic.
    unsafe { signal(Signal::SIGTERM, SigHandler::Handler(note_stop)) }?;
    let ledger = Ledger::open(&holder.ledger, holder.blocks)?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&holder.device);
    let device = device.with_context(|| format!("open {}", holder.device.display()))?;
    let mut held = Held::default();
    for at in 0..holder.blocks {
        if at < holder.free {
            ledger.acknowledged(at, ANYTHING)?;
        } else {
            found(&device, &ledger, at)?;
            held.verified += 1;
        }
    }
    let first = holder.number << 32;
    let mut block = Aligned([0; BLOCK]);
    for at in 0..holder.free {
        write(&device, &ledger, at, first, &mut block)?;
        held.written += 1;
    }
    println!("ready");
    let parts = std::thread::scope(|scope| {
        let (device, ledger) = (&device, &ledger);
        let begin = |part| scope.spawn(move || keep(holder, part, device, ledger));
        let parts: Vec<_> = (0..WRITERS).map(begin).collect();
        let ends = parts.into_iter().map(|part| part.join());
        ends.collect::<Vec<_>>()
    });
    for part in parts {
        let part = match part {
            Ok(part) => part?,
            Err(_) => bail!("a writer panicked"),
        };
        held.written += part.written;
        held.verified += part.verified;
    }
    println!("{}", serde_json::to_string(&held)?);
    Ok(())
}

/// Reads a block: it must be what was acknowledged, or what was begun. What is
/// found once is there, and must stay.
fn found(device: &File, ledger: &Ledger, at: u64) -> anyhow::Result<()> {
    let mut block = Aligned([0; BLOCK]);
    device
        .read_exact_at(&mut block.0, at * BLOCK as u64)
        .with_context(|| format!("read block {at}"))?;
    let [acknowledged, begun] = ledger.of(at)?;
    if acknowledged == ANYTHING {
        return Ok(());
    }
    let what = read(&block, at)?;
    ensure!(
        what == acknowledged || what == begun,
        "block {at} holds {}, but {} was acknowledged and {} begun",
        name(what),
        name(acknowledged),
        name(begun)
    );
    ledger.acknowledged(at, what)?;
    ledger.begun(at, what)
}

fn write(
    device: &File,
    ledger: &Ledger,
    at: u64,
    what: u64,
    block: &mut Aligned,
) -> anyhow::Result<()> {
    fill(block, at, what);
    ledger.begun(at, what)?;
    device
        .write_all_at(&block.0, at * BLOCK as u64)
        .with_context(|| format!("write block {at}"))?;
    ledger.acknowledged(at, what)
}

/// Writes blocks of one part until the end is asked for, and reads some back.
fn keep(holder: &Holder, part: u64, device: &File, ledger: &Ledger) -> anyhow::Result<Held> {
    let mut dice = Dice(holder.number * WRITERS + part);
    let (mut held, mut block) = (Held::default(), Aligned([0; BLOCK]));
    let mut number = part;
    while !STOP.load(Ordering::SeqCst) {
        number += WRITERS;
        let at = dice.below(holder.blocks / WRITERS) * WRITERS + part;
        write(device, ledger, at, holder.number << 32 | number, &mut block)?;
        held.written += 1;
        if dice.below(READ_BACK) == 0 {
            let at = dice.below(holder.blocks / WRITERS) * WRITERS + part;
            found(device, ledger, at)?;
            held.verified += 1;
        }
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(at: u64, what: u64) -> Aligned {
        let mut block = Aligned([0; BLOCK]);
        fill(&mut block, at, what);
        block
    }

    /// A device of two blocks, and a ledger in which `ledger` stands for the first.
    fn scene(on_disk: &Aligned, ledger: [u64; 2]) -> (File, Ledger) {
        let folder = std::env::temp_dir().join(format!(
            "rig-holder-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::create_dir_all(&folder).expect("a folder");
        let file = Ledger::open(&folder.join("device"), 2 * BLOCK as u64 / 16)
            .expect("a file")
            .0;
        file.write_all_at(&on_disk.0, 0).expect("a block");
        let kept = Ledger::open(&folder.join("ledger"), 2).expect("a ledger");
        kept.acknowledged(0, ledger[0]).expect("an entry");
        kept.begun(0, ledger[1]).expect("an entry");
        std::fs::remove_dir_all(&folder).expect("removed");
        (file, kept)
    }

    #[test]
    fn what_was_acknowledged_or_begun_is_found() {
        for on_disk in [7, 8] {
            let (device, ledger) = scene(&block(0, on_disk), [7, 8]);
            found(&device, &ledger, 0).expect("one of the two");
            assert_eq!(ledger.of(0).expect("an entry"), [on_disk, on_disk]);
        }
        let (device, ledger) = scene(&Aligned([0; BLOCK]), [NEVER, 8]);
        found(&device, &ledger, 0).expect("not written yet");
    }

    #[test]
    fn a_lost_a_foreign_and_a_torn_block_are_told() {
        let lost = scene(&block(0, 6), [7, 8]);
        let gone = scene(&Aligned([0; BLOCK]), [7, 7]);
        let elsewhere = scene(&block(1, 7), [7, 7]);
        let mut torn = block(0, 7);
        torn.0[BLOCK - 1] ^= 1;
        for (device, ledger) in [lost, gone, elsewhere, scene(&torn, [7, 7])] {
            found(&device, &ledger, 0).expect_err("it is not what must be there");
        }
    }

    #[test]
    fn anything_may_stand_where_stale_writers_were() {
        let mut foreign = block(0, 7);
        foreign.0[0] ^= 1;
        let (device, ledger) = scene(&foreign, [ANYTHING, 3]);
        found(&device, &ledger, 0).expect("nothing is believed of it");
    }
}

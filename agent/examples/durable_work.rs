//! Work whose every step is made durable before the next, and the check that a
//! file system still has all of it: the workload of the proof of power loss.
//!
//! A step, in the folder:
//! - makes a file of its own, syncs it and the folder;
//! - writes over one block of `base`, a file of fixed size, in place, and syncs it;
//! - appends a block to `journal`, and syncs it;
//! - every third step, replaces `current` by a rename, and syncs the folder.
//!
//! Then it puts the mark `step-N` into the log of a dm-log-writes device. All
//! bytes follow from the step and the file, so the check needs nothing but the
//! number of the last step that must be there; later steps may be there too, a
//! block of them wholly or not at all.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::{Parser, Subcommand};

const BLOCK: usize = 4096;
/// Blocks in `base`.
const BASE: u64 = 64;
/// `current` is replaced so often.
const REPLACED: u64 = 3;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Works.
    Write {
        folder: PathBuf,
        #[arg(long)]
        steps: u64,
        /// The dm-log-writes device that is told of each step.
        #[arg(long)]
        mark: Option<String>,
    },
    /// Checks that all is there up to a step.
    Check {
        folder: PathBuf,
        #[arg(long)]
        steps: u64,
    },
}

/// A block that says whose it is, and cannot be another's.
fn block(file: &str, step: u64, number: u64) -> Vec<u8> {
    let name = file.bytes().fold(0, |sum: u64, byte| {
        sum.wrapping_mul(31).wrapping_add(byte.into())
    });
    let mut state = (name ^ step.rotate_left(20) ^ number.rotate_left(44)) | 1;
    let mut bytes = step.to_le_bytes().to_vec();
    while bytes.len() < BLOCK {
        // xorshift64* (Vigna, 2016).
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let word = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn whole(file: &str, step: u64) -> Vec<u8> {
    // 4 to 128 KiB.
    let blocks = 1 + step * 7 % 32;
    let blocks = (0..blocks).map(|number| block(file, step, number));
    blocks.flatten().collect()
}

fn sync_folder(folder: &Path) -> anyhow::Result<()> {
    File::open(folder)?.sync_all().context("sync the folder")
}

fn work(folder: &Path, steps: u64, mark: Option<&str>) -> anyhow::Result<()> {
    let base = File::create(folder.join("base"))?;
    for number in 0..BASE {
        base.write_all_at(&block("base", 0, number), number * BLOCK as u64)?;
    }
    base.sync_all()?;
    let journal = File::create(folder.join("journal"))?;
    sync_folder(folder)?;
    for step in 1..=steps {
        let own = folder.join(format!("step-{step}"));
        fs::write(&own, whole("own", step))?;
        File::open(&own)?.sync_all()?;
        sync_folder(folder)?;
        let number = step * 11 % BASE;
        base.write_all_at(&block("base", step, number), number * BLOCK as u64)?;
        base.sync_data()?;
        journal.write_all_at(&block("journal", step, 0), (step - 1) * BLOCK as u64)?;
        journal.sync_data()?;
        if step.is_multiple_of(REPLACED) {
            let new = folder.join("current.new");
            fs::write(&new, whole("current", step))?;
            File::open(&new)?.sync_all()?;
            fs::rename(&new, folder.join("current"))?;
            sync_folder(folder)?;
        }
        if let Some(device) = mark {
            let told = Command::new("dmsetup")
                .args(["message", device, "0", "mark"])
                .arg(format!("step-{step}"))
                .status()?;
            ensure!(told.success(), "dmsetup message: {told}");
        }
    }
    Ok(())
}

/// What is lost or wrong, a line each.
fn check(folder: &Path, steps: u64) -> anyhow::Result<Vec<String>> {
    let mut wrong = Vec::new();
    let mut missing = |what: String| wrong.push(what);
    if steps == 0 {
        return Ok(wrong);
    }
    for step in 1..=steps {
        match fs::read(folder.join(format!("step-{step}"))) {
            Ok(bytes) if bytes == whole("own", step) => {}
            Ok(bytes) => missing(format!("step-{step} has {} other bytes", bytes.len())),
            Err(error) => missing(format!("step-{step}: {error}")),
        }
    }
    let read = |name: &str| -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(folder.join(name))?.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read("base") {
        Err(error) => missing(format!("base: {error}")),
        Ok(bytes) if bytes.len() != BASE as usize * BLOCK => {
            missing(format!("base has {} bytes", bytes.len()));
        }
        Ok(bytes) => {
            for (number, found) in (0..).zip(bytes.chunks_exact(BLOCK)) {
                let last = (1..=steps).rev().find(|step| step * 11 % BASE == number);
                let least = last.unwrap_or(0);
                let step = found[..8].try_into().map_or(0, u64::from_le_bytes);
                let sound = found == block("base", step, number);
                if !sound || step < least {
                    missing(format!("base, block {number}: step {step} for {least}"));
                }
            }
        }
    }
    match read("journal") {
        Err(error) => missing(format!("journal: {error}")),
        Ok(bytes) => {
            for step in 1..=steps {
                let at = (step as usize - 1) * BLOCK;
                if bytes.get(at..at + BLOCK) != Some(&block("journal", step, 0)[..]) {
                    missing(format!("journal: record {step}"));
                }
            }
        }
    }
    let least = steps - steps % REPLACED;
    if least > 0 {
        match read("current") {
            Err(error) => missing(format!("current: {error}")),
            Ok(bytes) => {
                let step = bytes
                    .first_chunk()
                    .map_or(0, |word| u64::from_le_bytes(*word));
                if step < least || bytes != whole("current", step) {
                    missing(format!("current: step {step} for {least}"));
                }
            }
        }
    }
    Ok(wrong)
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().what {
        What::Write {
            folder,
            steps,
            mark,
        } => work(&folder, steps, mark.as_deref()),
        What::Check { folder, steps } => {
            let wrong = check(&folder, steps)?;
            for line in &wrong {
                println!("lost: {line}");
            }
            if !wrong.is_empty() {
                bail!("{} things are lost of {steps} steps", wrong.len());
            }
            println!("all of {steps} steps is there");
            Ok(())
        }
    }
}

//! `cargo xtask demo`: a volume moves from node to node while a backup holds it.
//!
//! The rig (xtask/rig) tells the story. This brings it to a kernel that has
//! NVMe/TCP: this machine's, where it has it and the user is root, else a VM's.
//! Its last line is one JSON object, with at least [`KEYS`].

use std::fs;
use std::io::{IsTerminal, stdout};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::vm::{self, Kernel, VmSpec};
use crate::{build, places, process, say, setup};

const LIMIT: Duration = Duration::from_secs(1200);
const MEMORY_MIB: u32 = 3072;

/// What the outcome says at least; each is measured in that run.
const KEYS: &[&str] = &[
    "ok",
    "kernel",
    "emulated",
    "unpublish_ms",
    "publish_ms",
    "stage_ms",
    "publish_to_first_write_ms",
    "move_ms",
    "drover_ms",
    "rogue_writes_refused",
    "rogue_writes_landed",
    "data_sha256_match",
    "backup_resumed",
    "backup_bytes_uploaded_twice",
    "verdicts",
    "receipt",
];

/// How the demo runs.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print the outcome as one JSON object on the last line
    #[arg(long)]
    json: bool,
    /// In a VM, even where this machine's kernel has NVMe/TCP
    #[arg(long)]
    vm: bool,
    /// The VM's kernel: 6.12, 6.1, or the path of an image
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    setup::run()?;
    let folder = build::programs(true)?;
    let mut outcome = None;
    let mut hear = |line: &str| match line.strip_prefix('{') {
        Some(_) => outcome = Some(line.to_owned()),
        None => println!("{line}"),
    };
    let good = if !arguments.vm && has_nvme_tcp()? {
        let scratch = places::Scratch::new("demo")?;
        let mut rig = Command::new(folder.join("rig"));
        rig.args(&tell(&folder, scratch.path())?[1..]);
        let ended = process::stream(&mut rig, LIMIT, &mut hear)?;
        scratch.remove()?;
        ended.status.is_some_and(|status| status.success())
    } else {
        let command = tell(&folder, Path::new("/dev/shm/demo"))?;
        let mut spec = VmSpec::new(arguments.kernel.clone(), LIMIT, command);
        spec.memory_mib = MEMORY_MIB;
        if stdout().is_terminal() {
            spec.environment
                .push((say::FORCE_COLOURS.into(), "1".into()));
        }
        say::note(&format!(
            "booting a VM with Linux {} (emulated)",
            arguments.kernel.name()
        ));
        let ended = vm::run(&spec, &mut hear)?;
        if !ended.success() {
            say::note(&ended.describe());
        }
        ended.success()
    };
    let outcome = outcome.context("the demo ended without an outcome")?;
    let whole = is_whole_and_ok(&serde_json::from_str(&outcome)?)?;
    if arguments.json {
        println!("{outcome}");
    }
    Ok(if good && whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The rig's command line for the story.
fn tell(folder: &Path, scratch: &Path) -> Result<Vec<String>> {
    Ok(vec![
        text(&folder.join("rig"))?,
        "demo".into(),
        "--json".into(),
        "--drover".into(),
        text(&folder.join("drover"))?,
        "--scratch".into(),
        text(scratch)?,
    ])
}

/// Whether this machine's kernel has NVMe/TCP, and the user may use it.
fn has_nvme_tcp() -> Result<bool> {
    if fs::metadata("/proc/self")
        .context("look at /proc/self")?
        .uid()
        != 0
    {
        return Ok(false);
    }
    let mut modprobe = Command::new("modprobe");
    modprobe
        .args(["--quiet", "nvme-tcp"])
        .env("PATH", places::path()?);
    let loaded = process::read(&mut modprobe, Duration::from_secs(20)).is_ok();
    Ok(loaded && Path::new("/dev/nvme-fabrics").exists())
}

/// Whether the outcome says all it must, and that all went well.
fn is_whole_and_ok(outcome: &Value) -> Result<bool> {
    let missing: Vec<&str> = KEYS
        .iter()
        .filter(|key| outcome.get(**key).is_none())
        .copied()
        .collect();
    if !missing.is_empty() {
        bail!("the demo's outcome does not say {}", missing.join(", "));
    }
    Ok(outcome["ok"] == Value::Bool(true))
}

fn text(path: &Path) -> Result<String> {
    Ok(path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_must_say_all_and_be_ok() {
        let mut whole: serde_json::Map<String, Value> = KEYS
            .iter()
            .map(|key| ((*key).to_owned(), Value::from(0)))
            .collect();
        assert!(!is_whole_and_ok(&whole.clone().into()).unwrap());
        whole.insert("ok".into(), true.into());
        assert!(is_whole_and_ok(&whole.clone().into()).unwrap());
        whole.remove("receipt");
        assert!(
            is_whole_and_ok(&whole.into())
                .unwrap_err()
                .to_string()
                .contains("receipt")
        );
    }
}

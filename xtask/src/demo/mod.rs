//! `cargo xtask demo`: a volume moves from node to node while a backup holds it.
//!
//! This file brings the demo to a kernel that has NVMe/TCP: this machine's,
//! where it has it and the user is root, else a VM's. There [`scene`] sets
//! up what the story needs and [`story`] tells and measures it. The outcome comes
//! back as one JSON object, with at least [`KEYS`].

mod scene;
mod story;

use std::fs;
use std::io::{IsTerminal, stdout};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::vm::{self, Kernel, VmSpec};
use crate::{build, places, process, say, setup};
use scene::Scene;

const LIMIT: Duration = Duration::from_secs(1200);
const MEMORY_MIB: u32 = 3072;
const OUTCOME: &str = "demo.json";

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

/// What the part that runs on the demo's kernel is told.
#[derive(clap::Args)]
pub struct InsideArguments {
    /// The drover binary
    #[arg(long)]
    drover: PathBuf,
    /// The folder for logs and the outcome
    #[arg(long)]
    results: PathBuf,
    /// The processor is emulated
    #[arg(long)]
    emulated: bool,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    setup::run()?;
    let drover = build::drover(false)?;
    let scratch = places::Scratch::new("demo")?;
    let good = if !arguments.vm && has_nvme_tcp()? {
        let results = scratch.path().to_owned();
        inside(&InsideArguments {
            drover,
            results,
            emulated: false,
        })? == ExitCode::SUCCESS
    } else {
        in_vm(arguments, &drover, scratch.path())?
    };
    let path = scratch.path().join(OUTCOME);
    let outcome = fs::read_to_string(&path).with_context(|| {
        format!(
            "the demo left no outcome; logs: {}",
            scratch.path().display()
        )
    })?;
    let good = good && is_whole_and_ok(&serde_json::from_str(&outcome)?)?;
    if good {
        scratch.remove()?;
    } else {
        say::note(&format!("logs: {}", scratch.path().display()));
    }
    if arguments.json {
        println!("{}", outcome.trim());
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn in_vm(arguments: &Arguments, drover: &Path, results: &Path) -> Result<bool> {
    let command = vec![
        text(&build::xtask()?)?,
        "demo-inside".into(),
        "--emulated".into(),
        "--drover".into(),
        text(drover)?,
        "--results".into(),
        text(results)?,
    ];
    let mut spec = VmSpec::new(arguments.kernel.clone(), LIMIT, command);
    spec.memory_mib = MEMORY_MIB;
    spec.writable.push(results.to_owned());
    if stdout().is_terminal() {
        spec.environment
            .push((say::FORCE_COLOURS.into(), "1".into()));
    }
    say::note(&format!(
        "booting a VM with Linux {} (emulated)",
        arguments.kernel.name()
    ));
    let outcome = vm::run(&spec, &mut |line| println!("{line}"))?;
    if !outcome.success() {
        say::note(&outcome.describe());
    }
    Ok(outcome.success())
}

/// The part that runs on the demo's kernel.
pub fn inside(arguments: &InsideArguments) -> Result<ExitCode> {
    let scene = Scene::set(&arguments.drover, &arguments.results, arguments.emulated)?;
    let outcome = story::tell(&scene)?;
    let path = arguments.results.join(OUTCOME);
    fs::write(&path, outcome.to_string()).with_context(|| format!("write {}", path.display()))?;
    Ok(if is_whole_and_ok(&outcome)? {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
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

//! Watches disks as an agent does, and tells what eBPF programs cost, for
//! `cargo xtask bench trace`.
//!
//! `watch on DISK...` has the programs of the evidence and of the gates in the
//! kernel until its standard input ends. `watch cost` prints a line for each program
//! in the kernel: nanoseconds that it has run, how often, and its name, since the
//! kernel counts that (`kernel.bpf_stats_enabled`).

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::Context;
use clap::{Parser, Subcommand};
use drover::evidence::{Evidence, EvidenceConfig, Label};
use drover::fence::Gates;
use drover::ids::{Diskseq, NodeId};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Watch until standard input ends
    On {
        /// Disks, as /sys/block names them
        disks: Vec<String>,
    },
    /// Print what each program in the kernel has cost
    Cost,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    match Arguments::parse().command {
        Command::On { disks } => watch(&disks),
        Command::Cost => cost(),
    }
}

fn watch(disks: &[String]) -> anyhow::Result<()> {
    let node: NodeId = format!("watch.{}", std::process::id()).parse()?;
    let evidence = Evidence::start(EvidenceConfig::default())?;
    let gates = Gates::start(&node);
    let labels: anyhow::Result<HashMap<Diskseq, Label>> =
        disks.iter().map(|disk| labelled(disk, &node)).collect();
    evidence.label(labels?);
    let evidence_runs = evidence.describe().programs.into_iter();
    let mut running: Vec<String> = evidence_runs
        .filter(|program| program.failure.is_none())
        .map(|program| program.hook.to_owned())
        .collect();
    let layers = gates.layers().into_iter();
    running.extend(
        layers
            .filter(|report| report.failure.is_none())
            .map(|report| format!("gate {:?}", report.layer)),
    );
    println!("watching with {}", running.join(", "));
    let read = std::io::stdin().read_to_end(&mut Vec::new());
    let pins = gates.pins().to_owned();
    drop((evidence, gates));
    // Where nothing could be loaded, nothing is pinned.
    if pins.exists() {
        fs::remove_dir_all(&pins).with_context(|| format!("remove {}", pins.display()))?;
    }
    read.context("read standard input").map(drop)
}

fn labelled(disk: &str, node: &NodeId) -> anyhow::Result<(Diskseq, Label)> {
    let path = format!("/sys/block/{disk}/diskseq");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let label = Label {
        volume: format!("vol-{disk}").parse()?,
        pvc: disk.to_owned(),
        namespace: "bench".to_owned(),
        node: node.to_string(),
    };
    Ok((Diskseq(text.trim().parse()?), label))
}

/// `run_time_ns` and `run_cnt` of every program (kernel/bpf/syscall.c,
/// `bpf_prog_show_fdinfo`).
fn cost() -> anyhow::Result<()> {
    for program in aya::programs::loaded_programs() {
        let program = program?;
        // One that has gone since it was listed costs nothing any more.
        let Ok(fd) = program.fd() else { continue };
        let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let value = |key: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|value| value.trim().parse().ok())
                .unwrap_or(0)
        };
        let (ns, runs) = (value("run_time_ns:"), value("run_cnt:"));
        println!("{ns} {runs} {}", program.name_as_str().unwrap_or("?"));
    }
    Ok(())
}

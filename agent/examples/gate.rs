//! How fast a node's gate takes hold, for `cargo xtask bench fence`: for each
//! disk, one thread reads it all the time while its gate is closed.
//!
//! Prints a line `value node_gate drover MICROSECONDS` a disk, from the call
//! that closes the gate to the first read that was refused.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use drover::attach::ports::{Disk, GateLayer, NodeGate};
use drover::fence::Gates;
use drover::ids::{Diskseq, Epoch, NodeId, VolumeId};

#[derive(Parser)]
struct Arguments {
    /// Disks, as /sys/block names them; none may be in use
    disks: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let node: NodeId = format!("gate.{}", std::process::id()).parse()?;
    let gates = Gates::start(&node);
    let pins = gates.pins().to_owned();
    let files = gates
        .layers()
        .into_iter()
        .find(|report| report.layer == GateLayer::Files);
    if let Some(why) = files.and_then(|report| report.failure) {
        bail!("this kernel's gate does not refuse calls on open files: {why}");
    }
    let measured = arguments
        .disks
        .iter()
        .try_for_each(|disk| measure(&gates, disk));
    drop(gates);
    // Where nothing could be loaded, nothing is pinned.
    if pins.exists() {
        std::fs::remove_dir_all(&pins).with_context(|| format!("remove {}", pins.display()))?;
    }
    measured
}

fn measure(gates: &Gates, name: &str) -> anyhow::Result<()> {
    let path = format!("/sys/block/{name}/diskseq");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let disk = Disk {
        name: name.to_owned(),
        diskseq: Diskseq(text.trim().parse()?),
    };
    let volume: VolumeId = format!("vol-{name}").parse()?;
    let file = File::open(disk.path()).with_context(|| format!("open {name}"))?;
    let (refused, when) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut block = [0; 4096];
        while file.read_at(&mut block, 0).is_ok() {}
        // Nobody hears it when the time was over.
        let _ = refused.send(Instant::now());
    });
    std::thread::sleep(Duration::from_millis(20));
    let begin = Instant::now();
    gates.close(&disk, &volume, Epoch(1))?;
    let Ok(end) = when.recv_timeout(Duration::from_secs(10)) else {
        bail!("reads of {name} go on behind its closed gate");
    };
    let took = end.duration_since(begin);
    println!("value node_gate drover {:.1}", took.as_secs_f64() * 1e6);
    if reader.join().is_err() {
        bail!("the reader of {name} panicked");
    }
    Ok(())
}

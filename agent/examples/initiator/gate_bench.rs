//! How fast a gate closes, beside `nvme disconnect` in the same run: from the
//! call to the first I/O that a reader, who never stops, is refused.
//!
//! Prints one JSON object a line; times are of whatever machine this is, so
//! under emulation only the ratio says something.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use drover::attach::ports::{Access, NodeGate, Staging};
use drover::fence::Gates;
use drover::ids::Epoch;

use crate::scene::{Open, Scene, initiator_with};
use crate::writer::now;

/// How often each is done; a percentile of fewer would say nothing.
const ROUNDS: u64 = 21;

/// A reader that reads the disk's first block until it is refused; when that was.
struct Reader {
    thread: std::thread::JoinHandle<u64>,
    reads: Arc<AtomicU64>,
}

impl Reader {
    fn start(path: &Path) -> Result<Self> {
        #[repr(align(4096))]
        struct Block([u8; 4096]);
        let file: File = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)?;
        let reads = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&reads);
        let thread = std::thread::spawn(move || {
            let mut block = Box::new(Block([0; 4096]));
            while file.read_at(&mut block.0, 0).is_ok() {
                count.fetch_add(1, Ordering::Relaxed);
            }
            now()
        });
        let this = Self { thread, reads };
        while this.reads.load(Ordering::Relaxed) < 10 {
            std::thread::yield_now();
        }
        Ok(this)
    }

    fn refused(self) -> Result<u64> {
        let ended = self.thread.join();
        ended.map_err(|_| anyhow::anyhow!("the reader panicked"))
    }
}

fn percentile(sorted: &[f64], part: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * part).round() as usize]
}

fn print(figure: &str, samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    let (p50, p99) = (percentile(samples, 0.5), percentile(samples, 0.99));
    for (name, value) in [("p50", p50), ("p99", p99)] {
        let runs = samples.len();
        println!(
            r#"{{"figure":"{figure}_us_{name}","unit":"us","drover":{value:.1},"runs":{runs}}}"#
        );
    }
    p50
}

/// Prints node_gate_us, nvme_disconnect_us and their ratio.
pub async fn run(open: Open) -> Result<()> {
    let (mut call, mut gate, mut disconnect) = (Vec::new(), Vec::new(), Vec::new());
    let gates = Gates::start(&"node-a".parse()?);
    let (scene, backing, _file) = Scene::new("bench", 16)?;
    let node = initiator_with(&scene.control, Arc::clone(&gates) as Arc<dyn NodeGate>)?;
    for round in 1..=2 * ROUNDS {
        let mut export = open(&scene.volume, round, &backing)?;
        scene.grant(round, &*export, true)?;
        node.stage(&scene.stage(&Access::Block)).await?;
        let (disk, _) = node.disk(&scene.volume)?.context("no disk")?;
        let reader = Reader::start(&disk.path())?;
        let begun = now();
        if round % 2 == 0 {
            let layers = gates.close(&disk, &scene.volume, Epoch(round))?;
            let returned = now();
            ensure!(
                !layers.is_empty(),
                "this kernel offers no layer: {:?}",
                gates.layers()
            );
            gate.push((reader.refused()? - begun) as f64 / 1e3);
            call.push((returned - begun) as f64 / 1e3);
        } else {
            let name = export.target().name;
            let out = Command::new("nvme")
                .args(["disconnect", "-n", &name])
                .output();
            let out = out.context("run nvme")?;
            ensure!(out.status.success(), "nvme disconnect: {out:?}");
            disconnect.push((reader.refused()? - begun) as f64 / 1e3);
        }
        node.unstage(&scene.volume, &scene.folder.join("staging"))
            .await?;
        export.fence()?;
    }
    print("node_gate_call", &mut call);
    let ours = print("node_gate", &mut gate);
    let theirs = print("nvme_disconnect", &mut disconnect);
    println!(
        r#"{{"figure":"node_gate_vs_nvme_disconnect","unit":"x","drover":{ours:.1},"peer":"nvme disconnect","peer_value":{theirs:.1},"ratio":{:.1},"runs":{ROUNDS}}}"#,
        theirs / ours
    );
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!(r#"{{"kernel":"{}"}}"#, kernel.trim());
    Ok(())
}

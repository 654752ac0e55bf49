//! The node's gate, proved alone: the home here is the kernel's own target and
//! fences nothing, so what does not land, only the node has kept from landing.
//!
//! For a raw disk, ext4 and XFS, with stale writers of every kind at work:
//! the disk is shut by an agent that is then killed (kill -9); the first call of
//! each writer after that fails, and every other way in is refused; the next
//! agent finds the gate closed and lets go of the disk; no process is left in D
//! state; no block that was begun after the closing is in the data; and the
//! volume is attached again under its next epoch.
//!
//! On a kernel that lets a program override what a function returns, `bio` must
//! be among the layers. Then stores to pages that were mapped are refused too,
//! and what was dirty at the closing never gets to the data (`dirty`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drover::attach::ports::{Access, Disk, GateLayer, Node, NodeAnswer, NodeGate, Staging};
use drover::fence::Gates;
use drover::ids::{Diskseq, Epoch};
use drover::initiator::Initiator;

use crate::dirty::Dirty;
use crate::knock::{Before, refused};
use crate::scene::{Open, Scene, initiator_with};
use crate::writer::{BLOCK, Kind, now, stamp};

/// Against hanging only: the machine is emulated.
const PATIENCE: Duration = Duration::from_secs(60);
const NODE: &str = "node-a";
/// Each writer's part of the volume.
const PART: u64 = 1 << 20;

/// A stale writer.
struct Stale {
    name: String,
    kind: Kind,
    id: u64,
    child: Child,
    lines: Receiver<String>,
    refused: Option<(u64, u64)>,
}

impl Drop for Stale {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn this_program(words: &[&str]) -> Result<(Child, Receiver<String>)> {
    let mut child = Command::new("/proc/self/exe")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().context("its output")?;
    let (to, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            if to.send(line).is_err() {
                break;
            }
        }
    });
    Ok((child, lines))
}

impl Stale {
    fn start(name: &str, kind: Kind, id: u64, path: &Path, offset: u64) -> Result<Self> {
        let (path, id_text, offset) = (path.to_string_lossy(), id.to_string(), offset.to_string());
        let (child, lines) = this_program(&["writer", kind.name(), &id_text, &path, &offset])?;
        let stale = Self {
            name: name.to_owned(),
            kind,
            id,
            child,
            lines,
            refused: None,
        };
        let first = stale.lines.recv_timeout(PATIENCE);
        ensure!(first.as_deref() == Ok("up"), "{name}: {first:?}");
        Ok(stale)
    }

    /// Waits until it is refused, or ended by SIGBUS where it was mapped.
    fn wait_refused(&mut self) -> Result<()> {
        let line = match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => bail!("{} writes on", self.name),
            Err(RecvTimeoutError::Disconnected) => {
                let ended = self.child.wait()?;
                let signal = ended.signal();
                ensure!(
                    self.kind == Kind::Mapped && signal == Some(libc::SIGBUS),
                    "{}: {ended}",
                    self.name
                );
                println!("  {}: ended by SIGBUS", self.name);
                self.refused = Some((now(), now()));
                return Ok(());
            }
        };
        let words: Vec<&str> = line.split(' ').collect();
        let ["refused", begun, ended, errno] = words[..] else {
            bail!("{}: {line:?}", self.name);
        };
        println!("  {}: refused, errno {errno}", self.name);
        ensure!(errno != "0", "{}: {line}", self.name);
        self.refused = Some((begun.parse()?, ended.parse()?));
        Ok(())
    }
}

/// The agent that is killed: shuts a disk, says when and how, and waits.
pub fn hold(mut args: impl Iterator<Item = String>) -> Result<()> {
    let mut next = || args.next().context("no argument");
    let disk = Disk {
        name: next()?,
        diskseq: Diskseq(next()?.parse()?),
    };
    let volume = next()?.parse()?;
    let gates = Gates::start(&NODE.parse()?);
    println!("ready");
    io::stdin().read_exact(&mut [0])?;
    let begun = now();
    let layers = gates.close(&disk, &volume, Epoch(1))?;
    let ended = now();
    let names: Vec<&str> = layers.iter().map(|layer| layer.name()).collect();
    println!("closed {begun} {ended} {}", names.join(","));
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// States of every thread of a process.
fn states(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| {
            let stat = fs::read_to_string(task.path().join("stat")).ok()?;
            stat.rsplit_once(") ")?.1.chars().next()
        })
        .collect()
}

/// Blocks in the data that were begun after their writer was to be refused.
fn late(backing: &Path, limit: impl Fn(u64) -> u64) -> Result<Vec<(u64, u64)>> {
    let mut file = File::open(backing)?;
    let mut block = vec![0; BLOCK];
    let mut found = Vec::new();
    let mut seen = 0;
    while file.read_exact(&mut block).is_ok() {
        if let Some((id, begun)) = stamp(&block) {
            seen += 1;
            if begun > limit(id) {
                found.push((id, begun));
            }
        }
    }
    ensure!(seen > 0, "no writer's block is in the data at all");
    println!("  {seen} blocks of the writers are in the data");
    Ok(found)
}

fn writers(disk: &Disk, target: &Path, access: &Access) -> Result<Vec<Stale>> {
    let mut all = Vec::new();
    for (n, kind) in (1..).zip(Kind::ALL) {
        let (path, offset) = match access {
            Access::Block => (target.to_owned(), n * PART),
            Access::Mount { .. } => (target.join(kind.name()), 0),
        };
        all.push(Stale::start(kind.name(), kind, n, &path, offset)?);
    }
    if *access == Access::Block {
        // A partition of the disk, by the kernel's own call.
        let made = Command::new("addpart")
            .arg(disk.path())
            .args(["1", "16384", "8192"])
            .status()?;
        ensure!(made.success(), "addpart: {made}");
        let part = PathBuf::from(format!("{}p1", disk.path().display()));
        let begun = Instant::now();
        while !part.exists() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(50));
        }
        all.push(Stale::start("partition", Kind::Direct, 9, &part, 0)?);
    }
    Ok(all)
}

fn disk_of(node: &Initiator, scene: &Scene) -> Result<Disk> {
    let found = node.disk(&scene.volume)?;
    Ok(found.context("no disk is attached")?.0)
}

/// All of it for one way to use a volume. `bio`: this kernel offers that layer.
pub async fn proof(name: &str, access: Access, mib: u64, bio: bool, open: Open) -> Result<()> {
    println!("{name}");
    let (scene, backing, _file) = Scene::new(name, mib)?;
    let (volume, target) = (&scene.volume, scene.folder.join("pod/target"));
    let first = open(volume, 1, &backing)?;
    scene.grant(1, &*first, false)?;
    let gates = Gates::start(&NODE.parse()?);
    for report in gates.layers() {
        println!("  layer {}: {:?}", report.layer.name(), report.failure);
    }
    for hook in gates.hooks().iter().filter(|hook| !hook.holds) {
        println!("  hook {}: {:?}", hook.hook.name(), hook.failure);
    }
    let node = initiator_with(&scene.control, Arc::clone(&gates) as Arc<dyn NodeGate>)?;
    node.stage(&scene.stage(&access)).await?;
    node.publish(&scene.publish(&access)).await?;
    let disk = disk_of(&node, &scene)?;
    let mut stale = writers(&disk, &target, &access)?;
    let before = Before::open(&disk, &target, &access)?;
    drop((node, gates));

    // Shut by an agent that is then killed.
    let dirty = Dirty::leave(&disk, &target, &access)?;
    let diskseq = disk.diskseq.0.to_string();
    let (mut agent, said) = this_program(&["gate-hold", &disk.name, &diskseq, volume.as_str()])?;
    ensure!(said.recv_timeout(PATIENCE)? == "ready");
    agent.stdin.as_mut().context("its input")?.write_all(b"x")?;
    let line = said.recv_timeout(PATIENCE)?;
    println!("  {line}");
    let words: Vec<&str> = line.split(' ').collect();
    let ["closed", begun, closed, layers] = words[..] else {
        bail!("{line:?}");
    };
    let (begun, closed): (u64, u64) = (begun.parse()?, closed.parse()?);
    for layer in [GateLayer::Files, GateLayer::Opens] {
        ensure!(layers.split(',').any(|l| l == layer.name()), "{layers}");
    }
    let has_bio = layers.split(',').any(|l| l == GateLayer::Bio.name());
    ensure!(has_bio == bio, "layers {layers}, bio offered: {bio}");
    agent.kill()?;
    agent.wait()?;

    // Stores to pages that are mapped already are met by the bio layer only.
    for writer in stale.iter_mut().filter(|w| bio || w.kind != Kind::Mapped) {
        writer.wait_refused()?;
        let (call, _) = writer.refused.context("it was refused")?;
        println!(
            "    its call began {} us after the map's update began",
            call as i64 / 1000 - begun as i64 / 1000
        );
    }
    before.knock(&disk)?;
    if bio {
        dirty.cannot_be_written()?;
    }

    // The next agent finds it shut, and lets go.
    let gates = Gates::start(&NODE.parse()?);
    ensure!(gates.is_closed(&disk)?, "{:?}", gates.closed());
    refused(
        "write after the restart",
        before.file.write_at(&[9; 512], 8192),
    )?;
    let node = initiator_with(&scene.control, Arc::clone(&gates) as Arc<dyn NodeGate>)?;
    let answer = node.release(volume, Epoch(1)).await;
    let released = now();
    println!("  {answer:?}");
    let NodeAnswer::Shut { gate, .. } = answer else {
        bail!("{answer:?}");
    };
    for layer in [
        GateLayer::Files,
        GateLayer::Opens,
        GateLayer::Shutdown,
        GateLayer::Removal,
    ] {
        ensure!(gate.layers.contains(&layer), "{:?}", gate.layers);
    }
    ensure!(node.attached()?.is_empty() && !disk.path().exists());
    for writer in stale.iter_mut().filter(|w| w.refused.is_none()) {
        writer.wait_refused()?;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    for pid in stale
        .iter()
        .map(|w| w.child.id())
        .chain([std::process::id()])
    {
        let states = states(pid);
        ensure!(!states.contains('D'), "process {pid} hangs: {states}");
    }
    let mapped = stale.iter().find(|w| w.kind == Kind::Mapped).map(|w| w.id);
    let found = late(&backing, |id| {
        if Dirty::IDS.contains(&id) {
            // Dirty at the closing: in the data none may be, or any.
            if bio { 0 } else { u64::MAX }
        } else if Some(id) == mapped && !bio {
            released
        } else {
            closed
        }
    })?;
    ensure!(
        found.is_empty(),
        "in the data, begun after the closing: {found:?}"
    );
    let passed = gates.refused()?;
    println!(
        "  refused: {:?}",
        passed.iter().filter(|(_, n)| *n > 0).collect::<Vec<_>>()
    );
    drop((stale, before, dirty));

    // The next epoch.
    ensure!(gates.closed().is_empty(), "{:?}", gates.closed());
    let second = open(volume, 2, &backing)?;
    scene.grant(2, &*second, true)?;
    node.unpublish(volume, &target).await?;
    node.stage(&scene.stage(&access)).await?;
    node.publish(&scene.publish(&access)).await?;
    ensure!(disk_of(&node, &scene)?.diskseq != disk.diskseq);
    let path = match access {
        Access::Block => target.clone(),
        Access::Mount { .. } => target.join("direct"),
    };
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    file.write_all_at(&[1; BLOCK], 0)?;
    file.sync_all()?;
    drop(file);
    node.unpublish(volume, &target).await?;
    node.unstage(volume, &scene.folder.join("staging")).await?;
    ensure!(node.attached()?.is_empty());
    let (mut first, mut second) = (first, second);
    first.fence()?;
    second.fence()
}

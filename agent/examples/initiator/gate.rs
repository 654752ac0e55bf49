//! The node's gate, proved alone: the home here is the kernel's own target and
//! fences nothing, so what does not land, only the node has kept from landing.
//!
//! For a raw disk, ext4 and XFS, with stale writers of every kind at work:
//! the disk is shut by an agent that is then killed (kill -9); the first call of
//! each writer after that fails, and every other way in is refused; the next
//! agent finds the gate closed and lets go of the disk; no process is left in D
//! state; no block that was begun after the closing is in the data; and the
//! volume is attached again under its next epoch.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
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

/// A call that must fail.
fn refused<T>(what: &str, result: io::Result<T>) -> Result<()> {
    match result {
        Ok(_) => bail!("{what} was let through"),
        Err(error) => {
            println!("  {what}: {error}");
            // What fails since it was called wrongly proves nothing.
            let sound = [libc::EIO, libc::EPERM, libc::ENODEV, libc::ENXIO];
            ensure!(
                error.raw_os_error().is_some_and(|e| sound.contains(&e)),
                "{what}: {error}"
            );
            Ok(())
        }
    }
}

fn called(result: i64) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// What was opened while the gate was open.
struct Before {
    file: File,
    passthrough: Option<File>,
    folder: Option<PathBuf>,
}

impl Before {
    fn open(disk: &Disk, target: &Path, access: &Access) -> Result<Self> {
        let folder = matches!(access, Access::Mount { .. }).then(|| target.to_owned());
        let path = folder
            .as_ref()
            .map_or(target.to_owned(), |f| f.join("held"));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(folder.is_some())
            .truncate(false)
            .open(&path)?;
        if folder.is_some() {
            file.write_all_at(&[7; BLOCK], 0)?;
            file.sync_all()?;
        }
        let generic = disk.name.replacen("nvme", "ng", 1);
        let passthrough = OpenOptions::new()
            .read(true)
            .open(Path::new("/dev").join(generic))
            .ok();
        Ok(Self {
            file,
            passthrough,
            folder,
        })
    }

    /// Every way in but those of the writers.
    fn knock(&self, disk: &Disk) -> Result<()> {
        let fd = self.file.as_raw_fd();
        let node = disk.path();
        refused("open read-only", File::open(&node))?;
        refused("open to write", OpenOptions::new().write(true).open(&node))?;
        refused("write", self.file.write_at(&[9; 512], 8192))?;
        refused("read", self.file.read_at(&mut [0; 512], 0))?;
        // SAFETY: the descriptor is open; the call takes numbers only.
        let punched = unsafe { libc::fallocate(fd, 3, 0, 4096) };
        refused("fallocate", called(punched.into()))?;
        // SAFETY: a new mapping, wherever the kernel likes; it is not to come about.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        refused("mmap", called(if map == libc::MAP_FAILED { -1 } else { 0 }))?;
        let mut at = 0;
        let (pipe_out, mut pipe_in) = io::pipe()?;
        let (out, into) = (pipe_out.as_raw_fd(), pipe_in.as_raw_fd());
        let null = std::ptr::null_mut();
        // SAFETY: the descriptors are open, and the offset is an i64.
        let spliced = unsafe { libc::splice(fd, &raw mut at, into, null, 4096, 0) };
        refused("splice from it", called(spliced as i64))?;
        pipe_in.write_all(&[9; 4096])?;
        // SAFETY: as above.
        let spliced = unsafe { libc::splice(out, null, fd, &raw mut at, 4096, 0) };
        refused("splice to it", called(spliced as i64))?;
        match &self.folder {
            None => {
                const BLKZEROOUT: libc::c_ulong = 0x127f;
                let range = [0_u64, 4096];
                // SAFETY: the kernel reads two u64.
                let zeroed = unsafe { libc::ioctl(fd, BLKZEROOUT, &raw const range) };
                refused("ioctl BLKZEROOUT", called(zeroed.into()))?;
            }
            Some(folder) => {
                refused("open a file", File::open(folder.join("held")))?;
                refused("create", File::create(folder.join("new")))?;
                refused("mkdir", fs::create_dir(folder.join("folder")))?;
                refused("unlink", fs::remove_file(folder.join("held")))?;
                refused("rename", fs::rename(folder.join("held"), folder.join("x")))?;
                refused("truncate", self.file.set_len(0))?;
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
                refused("chmod", self.file.set_permissions(mode))?;
                refused("list", fs::read_dir(folder).map(|_| ()))?;
            }
        }
        self.pass_through()?;
        if self.folder.is_some() {
            mounts(&node)?;
        }
        Ok(())
    }

    fn pass_through(&self) -> Result<()> {
        let Some(generic) = &self.passthrough else {
            println!("  passthrough: this kernel has no ng device");
            return Ok(());
        };
        const NVME_IOCTL_ID: libc::c_ulong = 0x4e40;
        // SAFETY: the descriptor is open; the call takes no more.
        let asked = unsafe { libc::ioctl(generic.as_raw_fd(), NVME_IOCTL_ID) };
        refused("passthrough", called(asked.into()))
    }
}

/// One more mount of a file system that is mounted.
fn mounts(node: &Path) -> Result<()> {
    let point = Path::new("/run/initiator/knock");
    fs::create_dir_all(point)?;
    for fs in ["ext4", "xfs"] {
        let mount = Command::new("mount")
            .args(["-t", fs])
            .arg(node)
            .arg(point)
            .output()?;
        let said = String::from_utf8_lossy(&mount.stderr);
        ensure!(!mount.status.success(), "mounted as {fs}");
        println!("  mount as {fs}: {}", said.trim());
    }
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

/// All of it for one way to use a volume.
pub async fn proof(name: &str, access: Access, mib: u64, open: Open) -> Result<()> {
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
    let bio = layers.split(',').any(|l| l == GateLayer::Bio.name());
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

    // The next agent finds it shut, and lets go.
    let gates = Gates::start(&NODE.parse()?);
    ensure!(gates.is_closed(&disk), "{:?}", gates.closed());
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
        if Some(id) == mapped && !bio {
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
    drop((stale, before));

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

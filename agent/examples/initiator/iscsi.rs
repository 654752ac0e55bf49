//! drover's own iSCSI target in a process of its own, which can be killed.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drover::attach::ports::{Access, Chap, Credentials, Node, Protocol, Staging, Target};
use drover::ids::{Bytes, Epoch, VolumeId};
use drover::initiator::IQN_PREFIX;
use uuid::Uuid;

use crate::scene::{Export, HOST_IQN, Open, Scene, initiator};

/// One export, served by a child.
struct Served {
    target: Target,
    backing: PathBuf,
    server: Child,
}

/// How to open exports.
pub fn exports() -> Open {
    |volume, epoch, backing| Ok(Box::new(Served::open(volume, epoch, backing)?))
}

impl Served {
    fn open(volume: &VolumeId, epoch: u64, backing: &Path) -> Result<Self> {
        static PORT: AtomicU16 = AtomicU16::new(3260);
        let port = PORT.fetch_add(1, Ordering::Relaxed);
        let credentials = |name: &str| Credentials {
            name: format!("iqn.{name}"),
            secret: Uuid::new_v4().simple().to_string(),
        };
        let target = Target {
            protocol: Protocol::Iscsi,
            name: format!("{IQN_PREFIX}{volume}:{epoch}:r{epoch}"),
            unit: Uuid::new_v4(),
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            proves: true,
            chap: Some(Chap {
                initiator: credentials("initiator"),
                target: credentials("target"),
            }),
        };
        let server = serve(&target, backing)?;
        Ok(Self {
            target,
            backing: backing.to_owned(),
            server,
        })
    }

    /// kill -9.
    fn kill(&mut self) -> Result<()> {
        self.server.kill()?;
        self.server.wait()?;
        Ok(())
    }

    fn again(&mut self) -> Result<()> {
        self.server = serve(&self.target, &self.backing)?;
        Ok(())
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        let stdin = self.server.stdin.as_mut().context("its input")?;
        writeln!(stdin, "{command}")?;
        Ok(())
    }
}

fn serve(target: &Target, backing: &Path) -> Result<Child> {
    let program = std::env::current_exe()?.with_file_name("iscsi_target");
    let chap = target.chap.as_ref().context("secrets")?;
    let pair = |of: &Credentials| format!("{}:{}", of.name, of.secret);
    let mut server = Command::new(program)
        .arg("--file")
        .arg(backing)
        .args(["--listen", &target.address.to_string()])
        .args(["--iqn", &target.name])
        .args(["--initiator", HOST_IQN])
        .args(["--chap", &pair(&chap.initiator)])
        .args(["--chap-out", &pair(&chap.target)])
        .args(["--uuid", &target.unit.to_string(), "--sessions", "1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start iscsi_target, which is built beside this")?;
    let mut lines = BufReader::new(server.stdout.take().context("its output")?).lines();
    match lines.next() {
        Some(Ok(line)) if line.starts_with("serving") => {}
        other => bail!("iscsi_target said {other:?}"),
    }
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            println!("  target: {line}");
        }
    });
    Ok(server)
}

impl Export for Served {
    fn target(&self) -> Target {
        self.target.clone()
    }

    fn resized(&mut self, size: Bytes) -> Result<()> {
        self.tell(&format!("grow {}", size.0))?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }

    fn fence(&mut self) -> Result<()> {
        self.tell("fence")?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// A block of 4 KiB that tells its number, aligned as O_DIRECT asks.
#[repr(align(4096))]
struct Block([u8; 4096]);

impl Block {
    fn of(number: u64) -> Self {
        let mut block = Self([0; 4096]);
        for word in block.0.chunks_exact_mut(8) {
            word.copy_from_slice(&number.to_le_bytes());
        }
        block
    }
}

/// The home is killed ten times under I/O: no write fails, and each one that
/// was acknowledged is there. Then it is killed for good under I/O, and the
/// node lets go all the same.
pub async fn ten_kills() -> Result<()> {
    println!("ten kills");
    let (scene, backing, _file) = Scene::new("kills", 64)?;
    let volume = &scene.volume;
    let mut export = Served::open(volume, 1, &backing)?;
    scene.grant(1, &export, false)?;
    let node = initiator(&scene.control)?;
    node.stage(&scene.stage(&Access::Block)).await?;
    node.publish(&scene.publish(&Access::Block)).await?;

    let device = scene.folder.join("pod/target");
    let written = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let disk = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(0o40000)
        .open(&device)?;
    let writer = std::thread::spawn({
        let (written, stop) = (Arc::clone(&written), Arc::clone(&stop));
        move || -> std::io::Result<()> {
            for number in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                disk.write_all_at(&Block::of(number).0, number % 16384 * 4096)?;
                written.store(number + 1, Ordering::Relaxed);
            }
            Ok(())
        }
    });
    let reach = |more: u64| {
        let (written, from) = (Arc::clone(&written), written.load(Ordering::Relaxed));
        async move {
            let started = Instant::now();
            while written.load(Ordering::Relaxed) < from + more {
                ensure!(started.elapsed() < Duration::from_secs(60), "no I/O");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(started.elapsed())
        }
    };
    reach(100).await?;
    for kill in 1..=10 {
        export.kill()?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let before = written.load(Ordering::Relaxed);
        export.again()?;
        let took = reach(100).await.with_context(|| format!("kill {kill}"))?;
        println!("  kill {kill}: I/O went on after {took:?}, {before} blocks");
        ensure!(!writer.is_finished(), "a write failed");
    }
    stop.store(true, Ordering::Relaxed);
    match writer.join() {
        Ok(result) => result.context("a write failed over a kill")?,
        Err(_) => bail!("the writer panicked"),
    }
    let count = written.load(Ordering::Relaxed);
    let disk = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(0o40000)
        .open(&device)?;
    let mut block = Block::of(0);
    for number in count.saturating_sub(16384)..count {
        disk.read_exact_at(&mut block.0, number % 16384 * 4096)?;
        ensure!(block.0 == Block::of(number).0, "block {number} is lost");
    }
    println!("  {count} blocks, none lost");

    export.kill()?;
    let hung = std::thread::spawn(move || disk.write_all_at(&Block::of(1).0, 0));
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(!hung.is_finished(), "a write did not wait for its home");
    let started = Instant::now();
    let answer = node.release(volume, Epoch(1)).await;
    println!("  gone for good: {answer:?} after {:?}", started.elapsed());
    ensure!(node.attached()?.is_empty(), "still attached");
    match hung.join() {
        Ok(Err(error)) => println!("  the write that waited: {error}"),
        other => bail!("the write that waited ended with {other:?}"),
    }
    node.unpublish(volume, &device).await?;
    Ok(())
}

/// Cuts the connection at each write command until it has done so this often.
struct Cutter {
    left: AtomicU32,
}

impl Cutter {
    /// Listens where the export is said to be.
    fn start(to: SocketAddr, times: u32) -> Result<(SocketAddr, Arc<Self>)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let cutter = Arc::new(Self {
            left: AtomicU32::new(times),
        });
        let own = Arc::clone(&cutter);
        std::thread::spawn(move || {
            for host in listener.incoming().map_while(Result::ok) {
                let own = Arc::clone(&own);
                std::thread::spawn(move || own.carry(host, to));
            }
        });
        Ok((address, cutter))
    }

    fn carry(&self, mut host: TcpStream, to: SocketAddr) -> std::io::Result<()> {
        let mut home = TcpStream::connect(to)?;
        let (mut back, mut down) = (home.try_clone()?, host.try_clone()?);
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut back, &mut down);
            let _ = down.shutdown(Shutdown::Both);
        });
        let mut head = [0_u8; 48];
        loop {
            let read = host.read_exact(&mut head);
            // A SCSI Command with its W bit (RFC 7143, 11.3).
            let write = head[0] & 0x3f == 0x01 && head[1] & 0x20 != 0;
            let cut = write
                && self
                    .left
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                    .is_ok();
            if read.is_err() || cut {
                let _ = host.shutdown(Shutdown::Both);
                return home.shutdown(Shutdown::Both);
            }
            let data = u32::from_be_bytes([0, head[5], head[6], head[7]]);
            let mut body = vec![0; (data.next_multiple_of(4)) as usize];
            host.read_exact(&mut body)?;
            home.write_all(&head)?;
            home.write_all(&body)?;
        }
    }
}

/// One and the same write loses its home ten times in a row, and succeeds.
pub async fn ten_cuts() -> Result<()> {
    println!("ten cuts");
    let (scene, backing, _file) = Scene::new("cuts", 64)?;
    let mut export = Served::open(&scene.volume, 1, &backing)?;
    let (address, cutter) = Cutter::start(export.target.address, 10)?;
    export.target.address = address;
    scene.grant(1, &export, false)?;
    let node = initiator(&scene.control)?;
    node.stage(&scene.stage(&Access::Block)).await?;
    node.publish(&scene.publish(&Access::Block)).await?;
    let device = scene.folder.join("pod/target");
    let disk = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(0o40000)
        .open(&device)?;
    let started = Instant::now();
    let written = tokio::task::spawn_blocking(move || disk.write_all_at(&Block::of(7).0, 4096));
    let written = tokio::time::timeout(Duration::from_secs(240), written).await??;
    println!("  {written:?} after {:?}", started.elapsed());
    ensure!(cutter.left.load(Ordering::SeqCst) == 0, "not cut as often");
    written.context("a write that was cut ten times")?;
    node.unpublish(&scene.volume, &device).await?;
    node.unstage(&scene.volume, &scene.folder.join("staging"))
        .await?;
    ensure!(node.attached()?.is_empty());
    Ok(())
}

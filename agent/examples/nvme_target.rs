//! Serves one file over NVMe/TCP, for tests with real initiators.
//!
//! Lines on standard input drive it: `fence` ends the export as a home does
//! and prints what it came to, `grow BYTES` expands it, `late` prints how many
//! commands were refused since the fence, `stop` (or end of file) ends it.

#[path = "said/mod.rs"]
mod said;
#[path = "trial/mod.rs"]
mod trial;

use std::io::{Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use drover::attach::ports::{HostIdentity, Protocol};
use drover::block::BlockDevice;
use drover::block::file::FileDevice;
use drover::config::Span;
use drover::export::{ExportSpec, Exports, Keeper, Kept, Proof};
use drover::ids::{Bytes, Epoch, VolumeId};
use drover::nvme_tcp::auth::Secrets;
use drover::nvme_tcp::dhchap::{Group, Hash, Secret};
use drover::reactor::{Engine, POLL, Reactors, Settings};
use uuid::Uuid;

#[derive(Parser)]
struct Arguments {
    /// The file to serve, whole.
    #[arg(long)]
    file: PathBuf,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:4420")]
    listen: SocketAddr,
    /// Subsystem NQN.
    #[arg(long)]
    subsystem: String,
    /// Namespace UUID.
    #[arg(long)]
    namespace: Uuid,
    /// The host's NQN.
    #[arg(long)]
    host: String,
    /// The host's identifier.
    #[arg(long)]
    host_id: Uuid,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// Threads of the data path.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// What they use, io-uring or threads; io_uring where the kernel allows it unless given.
    #[arg(long)]
    engine: Option<Engine>,
    /// How long they look out before they sleep.
    #[arg(long)]
    poll: Option<Span>,
    /// Where to listen for discovery as well.
    #[arg(long)]
    discovery: Option<SocketAddr>,
    /// The file that keeps reservations.
    #[arg(long)]
    reservations: Option<PathBuf>,
    /// The host's DH-HMAC-CHAP secret.
    #[arg(long)]
    secret: Option<Secret>,
    /// The controller's, for hosts that want it proved.
    #[arg(long)]
    controller_secret: Option<Secret>,
    /// The preferred hash, by its number in the specification.
    #[arg(long, default_value_t = 1)]
    hash: u8,
    /// The preferred Diffie-Hellman group, by its number in the specification.
    #[arg(long, default_value_t = 0)]
    group: u8,
    /// An identity that was closed before; may be repeated.
    #[arg(long)]
    closed: Vec<String>,
    /// How it is put to the test.
    #[command(flatten)]
    trial: trial::Trial,
}

/// Keeps reservations in a file.
struct InFile(PathBuf);

impl Keeper for InFile {
    fn keep(&self, state: Option<&[u8]>) -> Result<(), String> {
        let new = self.0.with_extension("new");
        std::fs::write(&new, state.unwrap_or_default())
            .and_then(|()| std::fs::File::open(&new)?.sync_all())
            .and_then(|()| std::fs::rename(&new, &self.0))
            .map_err(|error| format!("write {}: {error}", self.0.display()))
    }
}

fn secrets(arguments: &Arguments) -> anyhow::Result<Option<Secrets>> {
    let Some(host) = arguments.secret.clone() else {
        return Ok(None);
    };
    Ok(Some(Secrets {
        host,
        controller: arguments.controller_secret.clone(),
        hash: Hash::of(arguments.hash).context("no such hash")?,
        group: Group::of(arguments.group).context("no such group")?,
    }))
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    let mut held = arguments.trial.begin()?;
    let volume: VolumeId = "vm-test".parse()?;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&arguments.file);
    let file = file.with_context(|| format!("open {}", arguments.file.display()))?;
    // A block device has no length of a file.
    let size = Bytes((&file).seek(SeekFrom::End(0))?);
    let device = Arc::new(FileDevice::new(file, &arguments.file, size)?);
    let reactors = Reactors::start(Settings {
        threads: arguments.threads,
        engine: arguments.engine,
        poll: arguments.poll.map_or(POLL, |span| span.0),
        held: std::mem::take(&mut held.by_rings),
    })?;
    let exports = Exports::new(reactors);
    for closed in &arguments.closed {
        exports.remember_closed(closed);
    }
    let spec = ExportSpec {
        volume: volume.clone(),
        epoch: Epoch(1),
        protocol: Protocol::NvmeTcp,
        name: arguments.subsystem.clone(),
        unit: arguments.namespace,
        host: HostIdentity::of(arguments.host.clone(), arguments.host_id),
        read_only: arguments.read_only,
        proof: secrets(&arguments)?.map(Proof::DhHmacChap),
    };
    if !arguments.closed.contains(&arguments.subsystem) {
        let served = arguments.trial.device(&device);
        let kept = arguments.reservations.clone().map(|path| Kept {
            state: std::fs::read(&path).ok(),
            keeper: Box::new(InFile(path)),
        });
        exports.open(spec, served, kept)?;
    }
    let listener = tokio::net::TcpListener::bind(arguments.listen).await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    if let Some(address) = arguments.discovery {
        let listener = tokio::net::TcpListener::bind(address).await?;
        tokio::spawn(Arc::clone(&exports).serve_discovery(listener, stopped.clone()));
    }
    let serving = Arc::clone(&exports).serve(Protocol::NvmeTcp, listener, stopped);
    let serving = tokio::spawn(serving);
    println!("serving {size}");

    let mut lines = said::lines();
    while let Some(line) = lines.recv().await {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["fence"] => {
                let closing = exports
                    .close(&arguments.subsystem)
                    .context("no live export")?;
                let settled = closing.settled(Duration::from_secs(10)).await;
                let (inside, ended) = (closing.inside_at_close, closing.end().await);
                println!("fenced inside={inside} settled={settled:?} {ended:?}");
            }
            ["grow", bytes] => {
                let bytes: u64 = bytes.parse()?;
                std::fs::File::options()
                    .write(true)
                    .open(&arguments.file)?
                    .set_len(bytes)?;
                device.grow(Bytes(bytes));
                exports.resized(&volume);
                println!("grown {}", device.size());
            }
            ["late"] => println!("late {}", exports.late_refused(&arguments.subsystem)),
            ["stop"] => break,
            _ => bail!("no such command: {line}"),
        }
    }
    stop.send_replace(true);
    serving.await?;
    Ok(())
}

//! Serves one file over NVMe/TCP, for tests with real initiators.
//!
//! Lines on standard input drive it: `fence` ends the export as a home does
//! and prints what it came to, `grow BYTES` expands it, `late` prints how many
//! commands were refused since the fence, `stop` (or end of file) ends it.

use std::io::BufRead;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use drover::attach::ports::HostIdentity;
use drover::block::BlockDevice;
use drover::block::file::FileDevice;
use drover::export::{ExportSpec, Exports};
use drover::ids::{Bytes, Epoch, VolumeId};
use drover::reactor::{Engine, Reactors, Settings};
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
    /// An identity that was closed before; may be repeated.
    #[arg(long)]
    closed: Vec<String>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    let volume: VolumeId = "vm-test".parse()?;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&arguments.file);
    let file = file.with_context(|| format!("open {}", arguments.file.display()))?;
    let size = Bytes(file.metadata()?.len());
    let device = Arc::new(FileDevice::new(file, &arguments.file, size)?);
    let reactors = Reactors::start(Settings {
        threads: arguments.threads,
        engine: arguments.engine,
        held: Vec::new(),
    })?;
    let exports = Exports::new(reactors);
    for closed in &arguments.closed {
        exports.remember_closed(closed);
    }
    let spec = ExportSpec {
        volume: volume.clone(),
        epoch: Epoch(1),
        subsystem: arguments.subsystem.clone(),
        namespace: arguments.namespace,
        host: HostIdentity {
            nqn: arguments.host,
            id: arguments.host_id,
        },
        read_only: arguments.read_only,
    };
    if !arguments.closed.contains(&arguments.subsystem) {
        exports.open(spec, Arc::clone(&device) as Arc<dyn BlockDevice>);
    }
    let listener = tokio::net::TcpListener::bind(arguments.listen).await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let serving = tokio::spawn(Arc::clone(&exports).serve(listener, stopped));
    println!("serving {size}");

    let (said, mut lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if said.send(line).is_err() {
                return;
            }
        }
    });
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

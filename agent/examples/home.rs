//! A home with one volume, for `cargo xtask bench fence` and the VM's scripts.
//!
//! Lines on standard input drive it: `export EPOCH` grants the volume over
//! NVMe/TCP and prints the subsystem and the namespace; `fence EPOCH` fences it
//! and prints how long that took, from the call to its settlement, in
//! microseconds, how many commands were inside, how they ended, and how many
//! had not; `accept EPOCH COUNT` is the operator's word on so many. A fence or
//! a word that is refused prints `refused` with the reason. `stop` ends it.

#[path = "said/mod.rs"]
mod said;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Parser;
use drover::attach::ports::{
    Content, ExportRequest, FenceRequest, Home as _, HomeError, HostIdentity, Protocol, Recorded,
    Settlement,
};
use drover::block::file::FileDevice;
use drover::export::Exports;
use drover::home::{Frontend, Home, HomeConfig};
use drover::ids::{Bytes, Epoch, NodeId, VolumeId};
use drover::pool::{Pool, PoolConfig};
use drover::reactor::{POLL, Reactors, Settings};
use uuid::Uuid;

#[derive(Parser)]
struct Arguments {
    /// The pool's folder.
    #[arg(long)]
    pool: PathBuf,
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
    /// The host's NQN.
    #[arg(long)]
    host: String,
    /// The host's identifier.
    #[arg(long)]
    host_id: Uuid,
    /// The volume's size in MiB.
    #[arg(long, default_value_t = 1024)]
    mib: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    let node: NodeId = "bench".parse()?;
    let volume: VolumeId = "vol-bench".parse()?;
    let settings = PoolConfig {
        lock_wait: Duration::from_secs(1),
        low_water: Bytes(1 << 20),
        overcommit_percent: 1000,
        require_reflink: false,
    };
    let pool = Pool::open(&arguments.pool, &node, settings)?;
    let reactors = Reactors::start(Settings {
        threads: 1,
        engine: None,
        poll: POLL,
        held: vec![pool.lock().file().try_clone()?.into()],
    })?;
    let exports = Exports::new(reactors);
    let home = Home::new(
        pool,
        Arc::clone(&exports) as Arc<dyn Frontend>,
        Arc::new(|file, path, size| Ok(Arc::new(FileDevice::new(file, path, size)?) as Arc<_>)),
        HomeConfig::at(arguments.listen, arguments.listen),
    );
    home.create(&volume, Bytes(arguments.mib << 20), &Content::Empty)
        .await?;
    let listener = tokio::net::TcpListener::bind(arguments.listen).await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let serving = Arc::clone(&exports).serve(Protocol::NvmeTcp, listener, stopped);
    let serving = tokio::spawn(serving);
    println!("serving");

    let mut lines = said::lines();
    while let Some(line) = lines.recv().await {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["export", epoch] => {
                let request = ExportRequest {
                    volume: volume.clone(),
                    epoch: Epoch(epoch.parse()?),
                    node: node.clone(),
                    host: HostIdentity::of(arguments.host.clone(), arguments.host_id),
                    protocol: Protocol::NvmeTcp,
                    read_only: false,
                };
                let target = home.export(&request).await?.target;
                println!("exported {} {}", target.name, target.unit);
            }
            ["fence", epoch] => {
                let request = FenceRequest {
                    volume: volume.clone(),
                    epoch: Epoch(epoch.parse()?),
                    recorded: Recorded::default(),
                };
                let begin = Instant::now();
                let fenced = home.fence(&request).await;
                tell("fenced", begin, fenced);
            }
            ["accept", epoch, count] => {
                let (epoch, count) = (Epoch(epoch.parse()?), count.parse()?);
                let begin = Instant::now();
                let accepted = home.accept_unsettled(&volume, epoch, count).await;
                tell("accepted", begin, accepted);
            }
            ["stop"] => break,
            _ => bail!("no such command: {line}"),
        }
    }
    stop.send_replace(true);
    serving.await?;
    Ok(())
}

fn tell(what: &str, begin: Instant, ended: Result<Settlement, HomeError>) {
    let took = begin.elapsed().as_micros();
    match ended {
        Ok(settlement) => println!(
            "{what} {took} {} {:?} {}",
            settlement.inside_at_close, settlement.settled_by, settlement.unsettled
        ),
        Err(error) => println!("refused {error}"),
    }
}

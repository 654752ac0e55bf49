//! Serves one file over iSCSI, for tests with real initiators.
//!
//! Lines on standard input drive it: `fence` ends the export as a home does
//! and prints what it came to, `grow BYTES` expands it, `late` prints how many
//! commands were refused since the fence, `metrics` prints the counters,
//! `stop` (or end of file) ends it.

#[path = "trial/mod.rs"]
mod trial;

use std::fs;
use std::io::{BufRead, Seek, SeekFrom};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::Parser;
use drover::block::BlockDevice;
use drover::block::file::FileDevice;
use drover::config::Span;
use drover::ids::Bytes;
use drover::iscsi::chap::Credentials;
use drover::iscsi::connection::{Iscsi, Shared};
use drover::iscsi::metrics::Metrics;
use drover::iscsi::scsi::inquiry::Identity;
use drover::iscsi::scsi::reservation::{Keeper, State};
use drover::iscsi::target::{Access, Directory, Found, Spec, Target};
use drover::iscsi::unit::Unit;
use drover::reactor::{Engine, POLL, Reactors, Settings};
use uuid::Uuid;

#[derive(Parser)]
struct Arguments {
    /// The file to serve, whole.
    #[arg(long)]
    file: PathBuf,
    /// Where to listen; may be repeated.
    #[arg(long, default_value = "127.0.0.1:3260")]
    listen: Vec<SocketAddr>,
    /// The target's IQN.
    #[arg(long)]
    iqn: String,
    /// An initiator that may log in; may be repeated.
    #[arg(long, required = true)]
    initiator: Vec<String>,
    /// What initiators must prove: NAME:SECRET.
    #[arg(long)]
    chap: Option<String>,
    /// What the target proves when it is asked to: NAME:SECRET.
    #[arg(long)]
    chap_out: Option<String>,
    /// The unit's UUID.
    #[arg(long, default_value = "5d2c2f6e-3c47-4f0c-9a55-6d1c7f0a3b11")]
    uuid: Uuid,
    /// Sessions at once.
    #[arg(long, default_value_t = 16)]
    sessions: usize,
    /// Where persistent reservations are kept.
    #[arg(long)]
    reservations: Option<PathBuf>,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// Threads of the data path.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Use epoll and threads that wait, not io_uring.
    #[arg(long)]
    no_uring: bool,
    /// How long the threads look out before they sleep.
    #[arg(long)]
    poll: Option<Span>,
    /// The target was served and never will be again: every login is refused.
    #[arg(long)]
    closed: bool,
    /// How it is put to the test.
    #[command(flatten)]
    trial: trial::Trial,
}

/// Keeps reservations in a file.
struct InFile(PathBuf);

impl Keeper for InFile {
    fn load(&self) -> Result<Option<State>, String> {
        match fs::read(&self.0) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| error.to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    fn keep(&self, state: Option<&State>) -> Result<(), String> {
        let text = serde_json::to_vec(&state).map_err(|error| error.to_string())?;
        let new = self.0.with_extension("new");
        let kept = fs::write(&new, text)
            .and_then(|()| fs::File::open(&new)?.sync_all())
            .and_then(|()| fs::rename(&new, &self.0));
        kept.map_err(|error| error.to_string())
    }
}

/// The one target, until it is closed.
struct One {
    target: Arc<Target>,
    closed: AtomicBool,
}

impl Directory for One {
    fn find(&self, target: &str) -> Found {
        if target != self.target.name() {
            Found::Unknown
        } else if self.closed.load(Ordering::Acquire) {
            Found::Closed
        } else {
            Found::Live(Arc::clone(&self.target))
        }
    }

    fn visible(&self, initiator: &str) -> Vec<String> {
        let mine = self.target.access(initiator).is_some();
        let mine = mine && !self.closed.load(Ordering::Acquire);
        mine.then(|| self.target.name().to_owned())
            .into_iter()
            .collect()
    }
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    let mut held = arguments.trial.begin()?;
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&arguments.file);
    let file = file.with_context(|| format!("open {}", arguments.file.display()))?;
    // A block device has no length of a file.
    let size = Bytes((&file).seek(SeekFrom::End(0))?);
    let device = Arc::new(FileDevice::new(file, &arguments.file, size)?);
    let target = target(&arguments, arguments.trial.device(&device))?;
    let one = Arc::new(One {
        target: Arc::clone(&target),
        closed: AtomicBool::new(arguments.closed),
    });
    let metrics = Metrics::default();
    let mut registry = prometheus_client::registry::Registry::default();
    metrics.register(&mut registry);
    let shared = Shared::new(Arc::clone(&one) as Arc<dyn Directory>, metrics);
    let reactors = Reactors::start(Settings {
        threads: arguments.threads,
        engine: arguments.no_uring.then_some(Engine::Threads),
        poll: arguments.poll.map_or(POLL, |span| span.0),
        held: std::mem::take(&mut held.by_rings),
    })?;
    for address in &arguments.listen {
        let listener =
            TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
        let (shared, reactors) = (Arc::clone(&shared), Arc::clone(&reactors));
        std::thread::spawn(move || accept(&listener, &shared, &reactors));
    }
    println!("serving {size}");

    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["fence"] => fence(&one),
            ["grow", bytes] => {
                let bytes: u64 = bytes.parse()?;
                let file = fs::File::options().write(true).open(&arguments.file)?;
                file.set_len(bytes)?;
                device.grow(Bytes(bytes));
                target.unit().announce_resize();
                println!("grown {}", device.size());
            }
            ["late"] => println!("late {}", target.gate().late()),
            ["metrics"] => {
                let mut text = String::new();
                prometheus_client::encoding::text::encode(&mut text, &registry)?;
                println!("{text}");
            }
            ["stop"] => break,
            _ => bail!("no such command: {line}"),
        }
    }
    Ok(())
}

fn target(arguments: &Arguments, device: Arc<dyn BlockDevice>) -> anyhow::Result<Arc<Target>> {
    let incoming = arguments.chap.as_deref().map(credentials).transpose()?;
    let outgoing = arguments.chap_out.as_deref().map(credentials).transpose()?;
    let access = arguments.initiator.iter().map(|initiator| Access {
        initiator: initiator.clone(),
        incoming: incoming.clone(),
        outgoing: outgoing.clone(),
    });
    let spec = Spec {
        name: arguments.iqn.clone(),
        access: access.collect(),
        max_sessions: arguments.sessions,
    };
    let identity = Identity {
        uuid: arguments.uuid,
        target: arguments.iqn.clone(),
    };
    let keeper = arguments.reservations.clone();
    let keeper = keeper.map(|path| Box::new(InFile(path)) as Box<dyn Keeper>);
    let unit = Unit::new(device, identity, arguments.read_only, keeper);
    Ok(Target::new(spec, unit.map_err(|why| anyhow!(why))?))
}

fn credentials(text: &str) -> anyhow::Result<Credentials> {
    let (name, secret) = text.split_once(':').context("NAME:SECRET")?;
    Ok(Credentials {
        name: name.to_owned(),
        secret: secret.to_owned(),
    })
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, reactors: &Reactors) {
    for socket in listener.incoming().filter_map(Result::ok) {
        let (Ok(peer), Ok(portal)) = (socket.peer_addr(), socket.local_addr()) else {
            continue;
        };
        let now = Instant::now();
        let protocol = Iscsi::new(Arc::clone(shared), peer, portal, None, now);
        if let Err(error) = reactors.serve(socket, Box::new(protocol)) {
            tracing::warn!(%error, "serve a connection");
        }
    }
}

/// Closes the gate, waits for what is inside, tells the initiators, and drops
/// their sessions when they know.
fn fence(one: &One) {
    let target = &one.target;
    let begun = Instant::now();
    let inside = target.gate().close();
    while target.gate().inside() > 0 {
        std::thread::sleep(Duration::from_micros(100));
    }
    let settled = begun.elapsed();
    one.closed.store(true, Ordering::Release);
    let sessions = target.connections();
    target.take_away();
    let (told, late) = (Instant::now(), target.gate().late());
    while !target.knows_the_end() && told.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let known = target.knows_the_end();
    std::thread::sleep(Duration::from_millis(500));
    target.disconnect();
    println!(
        "fenced inside={inside} settled={settled:?} sessions={sessions} known={known} late={late}"
    );
}

//! `load run`: connects, keeps all connections busy, and says what came of it.

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;

use crate::drive::{Client, Mix, Order, Tally, Window, Work, drive};
use crate::{iscsi, nvme, processor, raw};

/// What `load run` is told.
#[derive(clap::Args)]
pub struct Arguments {
    /// The wire
    #[arg(long)]
    wire: Wire,
    /// Where the target listens
    #[arg(long)]
    address: SocketAddr,
    /// The target's IQN or subsystem NQN
    #[arg(long, default_value = "")]
    target: String,
    /// The initiator's IQN or the host's NQN
    #[arg(long, default_value = "iqn.2026-01.io.drover:load")]
    initiator: String,
    /// The host's identifier (NVMe): 32 hexadecimal digits, hyphens allowed
    #[arg(long, default_value = "00000000-0000-4000-8000-00000000000a", value_parser = host_id)]
    host_id: [u8; 16],
    /// The logical unit (iSCSI) or the namespace (NVMe)
    #[arg(long, default_value_t = 1)]
    unit: u8,
    /// Reads, writes, or seven reads to three writes
    #[arg(long, default_value = "read")]
    mix: Mix,
    /// Anywhere, or one after the other
    #[arg(long, default_value = "random")]
    order: Order,
    /// Bytes of a command
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..=1 << 20))]
    size: u32,
    /// Commands in flight on each connection
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    depth: u16,
    /// Sessions, associations, or plain connections
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    sessions: u16,
    /// I/O queues of an association (NVMe)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Seconds that count
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Seconds before them
    #[arg(long, default_value_t = 0.5)]
    warm_up: f64,
    /// The target's process, for its processor time and memory
    #[arg(long)]
    server_pid: Option<u32>,
}

/// A wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// iSCSI, RFC 7143
    Iscsi,
    /// NVMe over TCP
    Nvme,
    /// Requests and answers, and no protocol
    Raw,
}

/// What came of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    wire: Wire,
    size: u32,
    depth: u16,
    connections: usize,
    seconds: f64,
    commands: u64,
    iops: f64,
    bytes_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    /// Processor time of this process a command.
    client_cpu_us: f64,
    /// Processor time of the server a command, where its process was named.
    server_cpu_us: Option<f64>,
    /// Anonymous memory that the server has resident at the window's end.
    server_rss_kib: Option<u64>,
}

fn host_id(text: &str) -> Result<[u8; 16], String> {
    let digits = text.replace('-', "");
    let wrong = |_| format!("{text:?} is no identifier of 32 hexadecimal digits");
    let number = u128::from_str_radix(&digits, 16).map_err(wrong)?;
    Ok(number.to_be_bytes())
}

/// One connection that is ready for load.
type Ready = Box<dyn FnOnce(Work, Window) -> Result<Tally> + Send>;

fn ready<C: Client + Send + 'static>(mut client: C, socket: TcpStream) -> Ready {
    Box::new(move |work, window| drive(&mut client, &socket, work, window))
}

/// Connections that are ready, the device's size and its block's.
struct Connected {
    ready: Vec<Ready>,
    bytes: u64,
    block: u32,
    /// What must stay open while the load runs.
    admin: Vec<TcpStream>,
}

fn connect(arguments: &Arguments) -> Result<Connected> {
    let mut connected = Connected {
        ready: Vec::new(),
        bytes: 0,
        block: 512,
        admin: Vec::new(),
    };
    for number in 0..arguments.sessions {
        match arguments.wire {
            Wire::Iscsi => {
                let place = iscsi::login::Place {
                    address: arguments.address,
                    target: arguments.target.clone(),
                    initiator: arguments.initiator.clone(),
                    lun: arguments.unit,
                };
                let (session, unit) = iscsi::login::log_in(&place, number)?;
                let client = iscsi::client::Initiator::new(&session, unit, arguments.depth);
                connected.ready.push(ready(client, session.socket));
                (connected.bytes, connected.block) = (unit.bytes, unit.block);
            }
            Wire::Nvme => {
                let place = nvme::connect::Place {
                    address: arguments.address,
                    subsystem: arguments.target.clone(),
                    host: arguments.initiator.clone(),
                    host_id: arguments.host_id,
                    namespace: arguments.unit.into(),
                };
                let association =
                    nvme::connect::connect(&place, arguments.queues, arguments.depth)?;
                let namespace = association.namespace;
                if u64::from(arguments.size) > namespace.max_transfer {
                    bail!(
                        "the controller takes {} bytes a command",
                        namespace.max_transfer
                    );
                }
                for queue in association.queues {
                    let client =
                        nvme::client::Host::new(namespace, queue.max_data, arguments.depth);
                    connected.ready.push(ready(client, queue.socket));
                }
                connected.admin.push(association.admin);
                (connected.bytes, connected.block) = (namespace.bytes, namespace.block);
            }
            Wire::Raw => {
                let (socket, bytes) = raw::client::connect(arguments.address)?;
                let client = raw::client::Raw::new(arguments.depth);
                connected.ready.push(ready(client, socket));
                connected.bytes = bytes;
            }
        }
    }
    Ok(connected)
}

/// Processor time so far: this process's and the server's.
fn used(server: Option<u32>) -> Result<(Duration, Option<Duration>)> {
    Ok((processor::own()?, server.map(processor::of).transpose()?))
}

/// The command.
///
/// # Errors
/// When a connection could not be made, or one command of all failed.
pub fn run(arguments: &Arguments) -> Result<Report> {
    let connected = connect(arguments)?;
    if !arguments.size.is_multiple_of(connected.block) {
        bail!(
            "{} bytes are no whole blocks of {}",
            arguments.size,
            connected.block
        );
    }
    let seconds = |number: f64| {
        Duration::try_from_secs_f64(number).with_context(|| format!("{number} seconds"))
    };
    let begin = Instant::now() + seconds(arguments.warm_up)?;
    let window = Window {
        begin,
        end: begin + seconds(arguments.seconds)?,
    };
    let connections = connected.ready.len();
    let mut threads = Vec::new();
    for (number, ready) in connected.ready.into_iter().enumerate() {
        let work = Work {
            mix: arguments.mix,
            order: arguments.order,
            size: arguments.size,
            depth: arguments.depth,
            span: connected.bytes,
            seed: u64::try_from(number)?,
        };
        threads.push(thread::spawn(move || ready(work, window)));
    }
    thread::sleep(window.begin.saturating_duration_since(Instant::now()));
    let before = used(arguments.server_pid)?;
    thread::sleep(window.end.saturating_duration_since(Instant::now()));
    let after = used(arguments.server_pid)?;
    let resident = arguments
        .server_pid
        .map(processor::resident_kib)
        .transpose()?;
    let mut whole = Tally::default();
    for thread in threads {
        let tally = thread
            .join()
            .map_err(|_| anyhow!("a connection's thread panicked"))?;
        whole.latency.merge(&tally?.latency);
    }
    drop(connected.admin);
    let commands = whole.latency.total();
    if commands == 0 {
        bail!("no command ended within {} s", arguments.seconds);
    }
    let count = commands as f64;
    let each = |used: Duration| used.as_secs_f64() * 1e6 / count;
    let micros = |parts| whole.latency.quantile(parts) as f64 / 1e3;
    let iops = count / arguments.seconds;
    Ok(Report {
        wire: arguments.wire,
        size: arguments.size,
        depth: arguments.depth,
        connections,
        seconds: arguments.seconds,
        commands,
        iops,
        bytes_per_s: iops * f64::from(arguments.size),
        p50_us: micros(5_000),
        p99_us: micros(9_900),
        p999_us: micros(9_990),
        client_cpu_us: each(after.0 - before.0),
        server_cpu_us: after
            .1
            .zip(before.1)
            .map(|(after, before)| each(after.saturating_sub(before))),
        server_rss_kib: resident,
    })
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;

//! What the NVMe/TCP target counts.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::command::{FABRICS, Io};
use super::reserve;
use super::status::Status;
use super::wire::Flaw;

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// What one connection's reads and writes count, found once so that none of
/// them takes a lock.
#[derive(Debug, Clone)]
pub struct Hot {
    reads: Counter,
    writes: Counter,
    bytes_read: Counter,
    bytes_written: Counter,
}

impl Hot {
    /// Counts a Read that succeeded.
    pub fn read(&self, bytes: usize) {
        self.reads.inc();
        self.bytes_read.inc_by(bytes as u64);
    }

    /// Counts a Write that succeeded.
    pub fn wrote(&self, bytes: usize) {
        self.writes.inc();
        self.bytes_written.inc_by(bytes as u64);
    }
}

/// Counters and gauges; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    connections: Gauge,
    associations: Gauge,
    commands: Family<Labels<2>, Counter>,
    bytes: Family<Labels<1>, Counter>,
    malformed: Family<Labels<1>, Counter>,
    terminated_by_host: Counter,
    refused: Family<Labels<1>, Counter>,
    evicted: Counter,
    logged: Logged,
    late: Counter<u64, AtomicU64>,
}

/// What was last logged about whom, so that no peer fills the log.
#[derive(Debug, Clone, Default)]
struct Logged(Arc<Mutex<HashMap<(IpAddr, &'static str), Instant>>>);

/// Who is at the other end of a connection, for what is said about it: each
/// complaint is logged once a minute, and counted every time by who makes it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where it comes from.
    pub address: SocketAddr,
    metrics: Metrics,
}

impl Peer {
    /// Whether a complaint for `reason` is to be logged.
    pub fn may_log(&self, reason: &'static str) -> bool {
        self.metrics.may_log(self.address.ip(), reason)
    }
}

/// One peer's same complaint is logged this often at most.
const LOG_AGAIN: Duration = Duration::from_secs(60);
/// Peers and reasons that are remembered; beyond them nothing is logged for a while.
const LOGGED: usize = 1024;

/// One more, until it is dropped.
pub struct Counting(Gauge);

impl Drop for Counting {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// Registers everything, under names that begin with `drover_`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("drover_nvme");
        registry.register(
            "connections",
            "Open NVMe/TCP connections",
            self.connections.clone(),
        );
        registry.register(
            "associations",
            "Hosts' associations (one admin queue each)",
            self.associations.clone(),
        );
        registry.register("commands", "Commands answered", self.commands.clone());
        registry.register_with_unit(
            "data",
            "Data of I/O commands, as the host sees it",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register(
            "malformed_pdus",
            "PDUs that ended a connection",
            self.malformed.clone(),
        );
        registry.register(
            "terminations_by_hosts",
            "Connections that a host ended over what it was sent",
            self.terminated_by_host.clone(),
        );
        registry.register(
            "refused_connects",
            "Connect commands refused",
            self.refused.clone(),
        );
        registry.register(
            "evicted_connections",
            "Connections closed before Connect, to make room for newer ones",
            self.evicted.clone(),
        );
        registry.register(
            "late_commands",
            "Commands refused because their export's gate was closed",
            self.late.clone(),
        );
    }

    /// Counts a connection until the returned value is dropped.
    pub fn connection(&self) -> Counting {
        self.connections.inc();
        Counting(self.connections.clone())
    }

    /// Counts an association until the returned value is dropped.
    pub fn association(&self) -> Counting {
        self.associations.inc();
        Counting(self.associations.clone())
    }

    /// Counts a command that was answered.
    pub fn command(&self, admin: bool, opcode: u8, status: Status) {
        let labels = [("opcode", name(admin, opcode)), ("result", status.class())];
        self.commands.get_or_create(&labels).inc();
    }

    /// The counters of a connection's reads and writes.
    pub fn hot(&self) -> Hot {
        let command = |opcode| {
            let labels = [("opcode", name(false, opcode)), ("result", "success")];
            self.commands.get_or_create_owned(&labels)
        };
        let bytes = |direction| {
            let labels = [("direction", direction)];
            self.bytes.get_or_create_owned(&labels)
        };
        Hot {
            reads: command(Io::READ),
            writes: command(Io::WRITE),
            bytes_read: bytes("read"),
            bytes_written: bytes("write"),
        }
    }

    /// Counts a malformed PDU.
    pub fn malformed(&self, flaw: Flaw) {
        self.malformed
            .get_or_create(&[("reason", flaw.name())])
            .inc();
    }

    /// Counts a connection that a host ended over what it was sent.
    pub fn terminated_by_host(&self) {
        self.terminated_by_host.inc();
    }

    /// Who is at the other end of a connection that comes from `address`.
    pub fn peer(&self, address: SocketAddr) -> Peer {
        let metrics = self.clone();
        Peer { address, metrics }
    }

    /// Counts a Connect that was refused.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&[("reason", reason)]).inc();
    }

    /// Whether a complaint about `peer` for `reason` is to be logged: once a minute.
    fn may_log(&self, peer: IpAddr, reason: &'static str) -> bool {
        let now = Instant::now();
        // No code panics while it holds the lock.
        let mut logged = self.logged.0.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.len() >= LOGGED {
            logged.retain(|_, at| now.duration_since(*at) < LOG_AGAIN);
        }
        match logged.get(&(peer, reason)) {
            Some(at) if now.duration_since(*at) < LOG_AGAIN => false,
            _ if logged.len() >= LOGGED => false,
            _ => {
                logged.insert((peer, reason), now);
                true
            }
        }
    }

    /// Counts a connection that had to make room.
    pub fn evicted(&self) {
        self.evicted.inc();
    }

    /// Counts a command that came after the closing of its gate.
    pub fn late(&self) {
        self.late.inc();
    }
}

/// An opcode's name: few values, whatever a host sends.
fn name(admin: bool, opcode: u8) -> &'static str {
    match (admin, opcode) {
        (_, FABRICS) => "fabrics",
        (true, 0x02) => "get-log-page",
        (true, 0x06) => "identify",
        (true, 0x08) => "abort",
        (true, 0x09) => "set-features",
        (true, 0x0a) => "get-features",
        (true, 0x0c) => "async-event-request",
        (true, 0x18) => "keep-alive",
        (false, Io::FLUSH) => "flush",
        (false, Io::WRITE) => "write",
        (false, Io::READ) => "read",
        (false, Io::COMPARE) => "compare",
        (false, Io::COPY) => "copy",
        (false, Io::WRITE_ZEROES) => "write-zeroes",
        (false, Io::DATASET_MANAGEMENT) => "dataset-management",
        (false, Io::VERIFY) => "verify",
        (false, reserve::REGISTER) => "reservation-register",
        (false, reserve::REPORT) => "reservation-report",
        (false, reserve::ACQUIRE) => "reservation-acquire",
        (false, reserve::RELEASE) => "reservation-release",
        _ => "other",
    }
}

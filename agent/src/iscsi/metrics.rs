//! What the iSCSI target counts.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::scsi::opcodes::Kind;
use super::scsi::sense::Status;
use super::wire::Flaw;

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// The same complaint about the same peer is logged again after this.
const QUIET: Duration = Duration::from_secs(60);
/// Complaints that are remembered; while they are so many, others are not logged.
const REMEMBERED: usize = 1024;

/// Counters and gauges; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    connections: Gauge,
    sessions: Gauge,
    commands: Family<Labels<2>, Counter>,
    bytes: Family<Labels<1>, Counter>,
    malformed: Family<Labels<1>, Counter>,
    refused: Family<Labels<1>, Counter>,
    evicted: Counter,
    late: Counter<u64, AtomicU64>,
    complaints: Arc<Mutex<HashMap<(IpAddr, &'static str), Instant>>>,
}

/// One more, until it is dropped.
pub struct Counting(Gauge);

impl Drop for Counting {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The counters of plain reads and writes, at hand without a lock.
#[derive(Debug, Clone)]
pub struct Hot {
    reads: Counter,
    writes: Counter,
    read: Counter,
    written: Counter,
}

impl Hot {
    /// Counts a read that succeeded, and its data.
    pub fn read(&self, bytes: u32) {
        self.reads.inc();
        self.read.inc_by(bytes.into());
    }

    /// Counts a write that succeeded, and its data.
    pub fn written(&self, bytes: u32) {
        self.writes.inc();
        self.written.inc_by(bytes.into());
    }
}

impl Metrics {
    /// Registers everything, under names that begin with `drover_`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("drover_iscsi");
        registry.register(
            "connections",
            "Open iSCSI connections",
            self.connections.clone(),
        );
        registry.register(
            "sessions",
            "Initiators' normal sessions",
            self.sessions.clone(),
        );
        registry.register("commands", "SCSI commands answered", self.commands.clone());
        registry.register_with_unit(
            "data",
            "Data of plain reads and writes, as the initiator sees it",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register(
            "malformed_pdus",
            "PDUs that were rejected",
            self.malformed.clone(),
        );
        registry.register("refused_logins", "Logins refused", self.refused.clone());
        registry.register(
            "evicted_connections",
            "Connections closed before their login, to make room for newer ones",
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

    /// Counts a session until the returned value is dropped.
    pub fn session(&self) -> Counting {
        self.sessions.inc();
        Counting(self.sessions.clone())
    }

    /// The counters of plain reads and writes.
    pub fn hot(&self) -> Hot {
        let commands = |kind: Kind| {
            let labels = [("command", kind.name()), ("result", Status::Good.name())];
            self.commands.get_or_create(&labels).clone()
        };
        let bytes = |direction| {
            self.bytes
                .get_or_create(&[("direction", direction)])
                .clone()
        };
        Hot {
            reads: commands(Kind::Read),
            writes: commands(Kind::Write),
            read: bytes("read"),
            written: bytes("write"),
        }
    }

    /// Counts a command that was answered; none: one that is not known.
    pub fn command(&self, kind: Option<Kind>, status: Status) {
        let kind = kind.map_or("other", Kind::name);
        let labels = [("command", kind), ("result", status.name())];
        self.commands.get_or_create(&labels).inc();
    }

    /// Counts a malformed PDU; whether it is to be logged.
    pub fn malformed(&self, peer: IpAddr, flaw: Flaw) -> bool {
        let labels = [("reason", flaw.name())];
        self.malformed.get_or_create(&labels).inc();
        self.may_log(peer, flaw.name())
    }

    /// Counts a login that was refused; whether it is to be logged.
    pub fn refused(&self, peer: IpAddr, reason: &'static str) -> bool {
        self.refused.get_or_create(&[("reason", reason)]).inc();
        self.may_log(peer, reason)
    }

    /// Whether something about `peer` for `reason` is to be logged: once in a while.
    pub fn may_log(&self, peer: IpAddr, reason: &'static str) -> bool {
        let now = Instant::now();
        let mut complaints = self
            .complaints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if complaints.len() >= REMEMBERED {
            complaints.retain(|_, at| now.duration_since(*at) < QUIET);
        }
        let fresh = complaints
            .get(&(peer, reason))
            .is_none_or(|at| now.duration_since(*at) >= QUIET);
        let logged = fresh && complaints.len() < REMEMBERED;
        if logged {
            complaints.insert((peer, reason), now);
        }
        logged
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_logged_once_per_peer_and_reason() {
        let (metrics, one, other) = (Metrics::default(), [127, 0, 0, 1], [127, 0, 0, 2]);
        assert!(metrics.malformed(one.into(), Flaw::Order));
        assert!(!metrics.malformed(one.into(), Flaw::Order));
        assert!(metrics.malformed(one.into(), Flaw::Field));
        assert!(metrics.malformed(other.into(), Flaw::Order));
        let labels = [("reason", "order")];
        assert_eq!(metrics.malformed.get_or_create(&labels).get(), 3);
    }
}

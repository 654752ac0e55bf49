//! What the NVMe/TCP target counts.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::command::{FABRICS, Io};
use super::status::Status;
use super::wire::Flaw;

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// Counters and gauges; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    connections: Gauge,
    associations: Gauge,
    commands: Family<Labels<2>, Counter>,
    bytes: Family<Labels<1>, Counter>,
    malformed: Family<Labels<1>, Counter>,
    refused: Family<Labels<1>, Counter>,
    evicted: Counter,
    late: Counter<u64, AtomicU64>,
}

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

    /// Counts data that a host has read.
    pub fn read(&self, bytes: usize) {
        self.bytes
            .get_or_create(&[("direction", "read")])
            .inc_by(bytes as u64);
    }

    /// Counts data that a host has written.
    pub fn written(&self, bytes: usize) {
        self.bytes
            .get_or_create(&[("direction", "write")])
            .inc_by(bytes as u64);
    }

    /// Counts a malformed PDU.
    pub fn malformed(&self, flaw: Flaw) {
        self.malformed
            .get_or_create(&[("reason", flaw.name())])
            .inc();
    }

    /// Counts a Connect that was refused.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&[("reason", reason)]).inc();
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
        (false, Io::WRITE_ZEROES) => "write-zeroes",
        (false, Io::DATASET_MANAGEMENT) => "dataset-management",
        (false, Io::VERIFY) => "verify",
        _ => "other",
    }
}

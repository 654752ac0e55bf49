//! What the streams of an agent count for Prometheus.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::spec::Phase;

/// Counters over all streams.
#[derive(Debug, Default)]
pub(super) struct Meters {
    phases: Family<[(&'static str, &'static str); 1], Gauge>,
    read: Counter,
    uploaded: Counter,
    failures: Counter,
}

impl Meters {
    /// Adds them to a registry.
    pub(super) fn register(&self, registry: &mut Registry) {
        for phase in Phase::ALL {
            self.phase(phase);
        }
        registry.register(
            "drover_backup_streams",
            "Backup and restore streams that are listed, by phase",
            self.phases.clone(),
        );
        registry.register_with_unit(
            "drover_backup_read",
            "Read from snapshots by backup streams",
            Unit::Bytes,
            self.read.clone(),
        );
        registry.register_with_unit(
            "drover_backup_uploaded",
            "Written to repositories by backup streams",
            Unit::Bytes,
            self.uploaded.clone(),
        );
        registry.register(
            "drover_backup_failures",
            "Backup and restore streams that failed",
            self.failures.clone(),
        );
    }

    /// A stream came into a phase.
    pub(super) fn entered(&self, phase: Phase) {
        self.phase(phase).inc();
    }

    /// A stream left a phase, or is listed no more.
    pub(super) fn left(&self, phase: Phase) {
        self.phase(phase).dec();
    }

    /// Bytes were read and uploaded.
    pub(super) fn moved(&self, read: u64, uploaded: u64) {
        self.read.inc_by(read);
        self.uploaded.inc_by(uploaded);
    }

    /// A stream failed.
    pub(super) fn failed(&self) {
        self.failures.inc();
    }

    fn phase(&self, phase: Phase) -> Gauge {
        let name = match phase {
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Interrupted => "interrupted",
            Phase::Done => "done",
            Phase::Failed => "failed",
        };
        self.phases.get_or_create(&[("phase", name)]).clone()
    }
}

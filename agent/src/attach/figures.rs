//! The arbiter's metrics.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::ports::{GateLayer, NodeAnswer, SettledBy};
use super::proof::Receipt;
use super::record::TicketKind;
use super::state::{Stage, VolumeState, kind_name};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResult {
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByLayer {
    layer: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPhase {
    phase: &'static str,
}

/// What is counted.
pub(super) struct Figures {
    publishes: Family<ByResult, Counter>,
    unpublishes: Family<ByResult, Counter>,
    fences: Family<ByResult, Counter>,
    receipt_seconds: Histogram,
    settle_seconds: Histogram,
    late_refused: Counter,
    gate_layers: Family<ByLayer, Counter>,
    expired: Counter,
    tickets: Family<ByKind, Gauge>,
    volumes: Family<ByPhase, Gauge>,
}

impl Figures {
    pub(super) fn new() -> Self {
        let figures = Self {
            publishes: Family::default(),
            unpublishes: Family::default(),
            fences: Family::default(),
            // 0.5 ms to 16 s.
            receipt_seconds: Histogram::new(exponential_buckets(0.0005, 2.0, 16)),
            // 0.1 ms to 105 s: a disk that hangs holds them.
            settle_seconds: Histogram::new(exponential_buckets(0.0001, 4.0, 11)),
            late_refused: Counter::default(),
            gate_layers: Family::default(),
            expired: Counter::default(),
            tickets: Family::default(),
            volumes: Family::default(),
        };
        // A series that is there from the start can be told from a missing one.
        for layer in GateLayer::ALL {
            drop(figures.gate_layers.get_or_create(&by_layer(layer)));
        }
        for stage in Stage::ALL {
            drop(figures.volumes.get_or_create(&by_phase(stage)));
        }
        for kind in [
            TicketKind::Workload,
            TicketKind::Backup,
            TicketKind::Restore,
            TicketKind::Maintenance,
        ] {
            drop(figures.tickets.get_or_create(&by_kind(kind)));
        }
        figures
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "drover_publishes",
            "Publishes of a volume to a node, by result",
            self.publishes.clone(),
        );
        registry.register(
            "drover_unpublishes",
            "Unpublishes of a volume, by result",
            self.unpublishes.clone(),
        );
        registry.register(
            "drover_fences",
            "Receipts of fences, by how the commands inside came to their end, and failed attempts",
            self.fences.clone(),
        );
        registry.register_with_unit(
            "drover_fence_receipt",
            "Time from asking a home to end an epoch until the receipt",
            Unit::Seconds,
            self.receipt_seconds.clone(),
        );
        registry.register_with_unit(
            "drover_fence_settle",
            "Time from the closing of an epoch's gate until the last command inside had ended",
            Unit::Seconds,
            self.settle_seconds.clone(),
        );
        registry.register(
            "drover_fence_late_commands_refused",
            "Commands that came after the gate of their epoch had closed, up to its receipt",
            self.late_refused.clone(),
        );
        registry.register(
            "drover_fence_node_layers",
            "Layers of their gate that old nodes shut beside a fence",
            self.gate_layers.clone(),
        );
        registry.register(
            "drover_ticket_leases_expired",
            "Tickets that ended because they were not renewed",
            self.expired.clone(),
        );
        registry.register(
            "drover_tickets",
            "Tickets now, by kind",
            self.tickets.clone(),
        );
        registry.register(
            "drover_volumes",
            "Volumes now, by phase",
            self.volumes.clone(),
        );
    }

    pub(super) fn published(&self, ok: bool) {
        self.publishes.get_or_create(&by_result(ok)).inc();
    }

    pub(super) fn unpublished(&self, ok: bool) {
        self.unpublishes.get_or_create(&by_result(ok)).inc();
    }

    pub(super) fn fence_failed(&self) {
        self.fences
            .get_or_create(&ByResult { result: "failed" })
            .inc();
    }

    pub(super) fn fenced(&self, receipt: &Receipt) {
        let result = match receipt.settled_by() {
            SettledBy::NothingOpen => "nothing-open",
            SettledBy::Drained => "drained",
            SettledBy::ExitBarrier => "exit-barrier",
            SettledBy::Operator => "operator",
        };
        self.fences.get_or_create(&ByResult { result }).inc();
        self.receipt_seconds.observe(receipt.took().as_secs_f64());
        if matches!(
            receipt.settled_by(),
            SettledBy::Drained | SettledBy::ExitBarrier
        ) {
            self.settle_seconds
                .observe(receipt.settle_time().as_secs_f64());
        }
        self.late_refused.inc_by(receipt.late_refused());
    }

    /// The old node has answered.
    pub(super) fn answered(&self, answer: &NodeAnswer) {
        if let NodeAnswer::Shut { gate, .. } = answer {
            for layer in &gate.layers {
                self.gate_layers.get_or_create(&by_layer(*layer)).inc();
            }
        }
    }

    pub(super) fn lease_expired(&self) {
        self.expired.inc();
    }

    /// A volume went from one state to another (none: it was not, or is no more).
    pub(super) fn moved(&self, from: Option<&VolumeState>, to: Option<&VolumeState>) {
        if let Some(state) = from {
            self.volumes.get_or_create(&by_phase(state.stage())).dec();
            for claim in &state.claims {
                self.tickets
                    .get_or_create(&by_kind(claim.ticket.kind))
                    .dec();
            }
        }
        if let Some(state) = to {
            self.volumes.get_or_create(&by_phase(state.stage())).inc();
            for claim in &state.claims {
                self.tickets
                    .get_or_create(&by_kind(claim.ticket.kind))
                    .inc();
            }
        }
    }
}

fn by_result(ok: bool) -> ByResult {
    ByResult {
        result: if ok { "ok" } else { "error" },
    }
}

fn by_layer(layer: GateLayer) -> ByLayer {
    ByLayer {
        layer: layer.name(),
    }
}

fn by_kind(kind: TicketKind) -> ByKind {
    ByKind {
        kind: kind_name(kind),
    }
}

fn by_phase(stage: Stage) -> ByPhase {
    ByPhase {
        phase: stage.name(),
    }
}

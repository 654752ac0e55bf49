//! What the initiator counts.

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::child::Children;

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Operation {
    Stage,
    Unstage,
    Publish,
    Unpublish,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Outcome {
    Ok,
    Error,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    operation: Operation,
    result: Outcome,
}

/// The initiator's metrics.
#[derive(Debug, Clone)]
pub(super) struct Metrics {
    seconds: Family<Labels, Histogram>,
}

impl Metrics {
    pub(super) fn new() -> Self {
        fn buckets() -> Histogram {
            Histogram::new([
                0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
            ])
        }
        Self {
            seconds: Family::new_with_constructor(buckets),
        }
    }

    pub(super) fn register(&self, children: &Children, registry: &mut Registry) {
        registry.register(
            "drover_node_operation_seconds",
            "Time that a node operation of CSI took, by operation and result",
            self.seconds.clone(),
        );
        registry.register(
            "drover_node_children_overdue",
            "Children (tools and kernel calls) that were not done by their deadline",
            children.overdue.clone(),
        );
        registry.register(
            "drover_node_children_held",
            "Killed children that the kernel holds still",
            children.held.clone(),
        );
    }

    pub(super) fn observe(&self, operation: Operation, ok: bool, took: Duration) {
        let result = if ok { Outcome::Ok } else { Outcome::Error };
        self.seconds
            .get_or_create(&Labels { operation, result })
            .observe(took.as_secs_f64());
    }
}

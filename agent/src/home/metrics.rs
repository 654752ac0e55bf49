//! The home's metrics: the pool's room, and fences.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::attach::ports::{HomeError, Settlement};
use crate::pool::Pool;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FenceLabels {
    result: &'static str,
}

/// Counters of what the home did.
pub struct Metrics {
    fences: Family<FenceLabels, Counter>,
    settle: Histogram,
    unserved: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            fences: Family::default(),
            // 10 us to 5 s.
            settle: Histogram::new(exponential_buckets(1e-5, 2.0, 20)),
            unserved: Gauge::default(),
        }
    }
}

impl Metrics {
    /// Registers them, and what the pool says of itself at each scrape.
    pub fn register(&self, pool: &Arc<Pool>, registry: &mut Registry) {
        registry.register(
            "drover_home_fences",
            "Fences asked of this home, by what came of them",
            self.fences.clone(),
        );
        registry.register_with_unit(
            "drover_home_fence_settle",
            "Time from the closing of a gate until no command was inside",
            Unit::Seconds,
            self.settle.clone(),
        );
        registry.register(
            "drover_home_exports_unserved",
            "Exports that the records hold open and that could not be opened again; they are tried again",
            self.unserved.clone(),
        );
        registry.register_collector(Box::new(PoolCollector {
            pool: Arc::clone(pool),
        }));
    }

    /// Counts one fence.
    pub fn count(&self, fenced: &Result<Settlement, HomeError>) {
        let result = match fenced {
            Ok(_) => "settled",
            Err(HomeError::StaleEpoch { .. }) => "stale",
            Err(HomeError::RecordBehind { .. }) => "behind",
            Err(HomeError::Unsettled { .. }) => "unsettled",
            Err(HomeError::NoVolume(_)) => "no_volume",
            Err(
                HomeError::Unreachable { .. }
                | HomeError::Used(_)
                | HomeError::StillInside { .. }
                | HomeError::NotYet(_)
                | HomeError::NoSnapshot(_)
                | HomeError::NoSpace { .. }
                | HomeError::Unsupported(_)
                | HomeError::Failed(_),
            ) => "failed",
        };
        self.fences.get_or_create(&FenceLabels { result }).inc();
    }

    /// How many exports wait to be opened again.
    pub fn unserved(&self, count: usize) {
        self.unserved.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Notes how long the commands inside a gate took to end.
    pub fn settled(&self, time: Duration) {
        self.settle.observe(time.as_secs_f64());
    }
}

#[derive(Debug)]
struct PoolCollector {
    pool: Arc<Pool>,
}

impl Collector for PoolCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let census = match self.pool.census() {
            Ok(census) => census,
            Err(error) => {
                tracing::warn!(%error, "the pool's metrics are left out");
                return Ok(());
            }
        };
        let bytes = Some(&Unit::Bytes);
        let gauges = [
            (
                "drover_pool_size",
                "Size of the pool's file system",
                bytes,
                census.capacity.total.0,
            ),
            (
                "drover_pool_available",
                "What new volumes can still be given",
                bytes,
                census.capacity.available.0,
            ),
            (
                "drover_pool_provisioned",
                "Sum of the sizes of all volumes",
                bytes,
                census.provisioned.0,
            ),
            (
                "drover_pool_volumes",
                "Volumes in the pool",
                None,
                census.volumes,
            ),
            (
                "drover_pool_volumes_damaged",
                "Volumes whose files cannot be used",
                None,
                census.damaged,
            ),
            (
                "drover_pool_snapshots",
                "Snapshots in the pool",
                None,
                census.snapshots,
            ),
        ];
        for (name, help, unit, value) in gauges {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            let metric =
                encoder.encode_descriptor(name, help, unit, EncodeMetric::metric_type(&gauge))?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}

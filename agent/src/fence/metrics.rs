//! Layers, closed gates and refusals as Prometheus metrics.

use std::fmt;
use std::sync::Arc;

use drover_ebpf::gate::Hook;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::Gates;

/// Reads the gates at each scrape.
pub struct Metrics(pub Arc<Gates>);

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("fence::Metrics")
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut layers = encoder.encode_descriptor(
            "drover_gate_layer_up",
            "1 for each layer of this node's gates that its kernel offers, 0 for each that it does not",
            None,
            MetricType::Gauge,
        )?;
        for report in self.0.layers() {
            let labels: &[(&str, &str)] = &[("layer", report.layer.name())];
            let up = i64::from(report.failure.is_none());
            ConstGauge::new(up).encode(layers.encode_family(&labels)?)?;
        }
        let closed = encoder.encode_descriptor(
            "drover_gate_closed",
            "Disks of this node whose gate is closed and that have not gone yet",
            None,
            MetricType::Gauge,
        )?;
        let count = i64::try_from(self.0.closed().len()).unwrap_or(i64::MAX);
        ConstGauge::new(count).encode(closed)?;
        // What cannot be read is left out: a 0 would be a lie.
        let Ok(rows) = self.0.refused() else {
            return Ok(());
        };
        let mut refused = encoder.encode_descriptor(
            "drover_gate_refused",
            "What closed gates refused, by hook; passthrough is counted under its hook too",
            None,
            MetricType::Counter,
        )?;
        for (hook, count) in rows {
            let labels: &[(&str, &str)] = &[("hook", Hook::name(hook))];
            ConstCounter::new(count).encode(refused.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

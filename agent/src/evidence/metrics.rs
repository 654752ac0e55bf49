//! The counts as Prometheus metrics, read from the kernel at each scrape.

use std::fmt;
use std::sync::Arc;

use drover_ebpf::{BUCKETS, DISCARD, FLUSH, IoCount, Latency, READ, WRITE};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::disks::Queue;
use super::loader::Losses;
use super::{Evidence, EvidenceError, Label};
use crate::ids::Diskseq;

/// The finest and the coarsest bound shown: 2^13 ns is 8 us, 2^35 ns 34 s.
const BOUNDS: std::ops::RangeInclusive<usize> = 13..=35;

/// A disk by the names it has in metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    device: String,
    /// None: nobody knows whose it is.
    label: Option<Label>,
}

/// All counts.
pub(super) struct Scrape {
    io: Vec<(Named, IoCount)>,
    latency: Vec<(Named, u32, Latency)>,
    queues: Vec<(Named, Queue)>,
    losses: Losses,
}

impl Named {
    /// Empty labels are none to Prometheus: a disk that is no volume's has its name only.
    fn labels<'a>(&'a self, key: &'a str, value: &'a str) -> [(&'a str, &'a str); 6] {
        let of = |what: fn(&Label) -> &str| self.label.as_ref().map_or("", what);
        [
            ("device", &self.device),
            (key, value),
            ("volume", of(|label| label.volume.as_str())),
            ("pvc", of(|label| &label.pvc)),
            ("namespace", of(|label| &label.namespace)),
            ("node", of(|label| &label.node)),
        ]
    }
}

impl Evidence {
    /// All counts of disks that are there; none without evidence.
    pub(super) fn scrape(&self) -> Result<Option<Scrape>, EvidenceError> {
        if self.inner.kernel.is_err() {
            return Ok(None);
        }
        let (books, names) = self.inner.books()?;
        let labels = self.inner.labels();
        let named = |disk: Diskseq| {
            Some(Named {
                device: names.name(disk)?.to_owned(),
                label: labels.get(&disk).cloned(),
            })
        };
        let io = books.disks().into_iter();
        let mut io: Vec<_> = io.filter_map(|(d, n)| Some((named(d)?, n))).collect();
        io.sort_by(|a, b| a.0.device.cmp(&b.0.device));
        let latency = self.inner.latencies(&names)?.into_iter();
        let latency = latency.filter_map(|((disk, d), sum)| Some((named(disk)?, d, sum)));
        let queues = io.iter().map(|(named, _)| named.clone());
        let queues = queues.filter_map(|named| Some((Queue::of(&named.device)?, named)));
        Ok(Some(Scrape {
            latency: latency.collect(),
            queues: queues.map(|(queue, named)| (named, queue)).collect(),
            io,
            losses: books.losses,
        }))
    }
}

/// Reads the evidence at each scrape.
pub struct Metrics(pub Arc<Evidence>);

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("evidence::Metrics")
    }
}

fn direction(code: u32) -> &'static str {
    match code {
        READ => "read",
        WRITE => "write",
        FLUSH => "flush",
        DISCARD => "discard",
        _ => "other",
    }
}

fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: &[(&[(&str, &str)], u64)],
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in rows {
        ConstCounter::new(*value).encode(family.encode_family(labels)?)?;
    }
    Ok(())
}

/// Which counter of a metric, by the direction it is shown under.
type Pick = (&'static str, fn(&IoCount) -> u64);

fn per_disk(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    scrape: &Scrape,
    picks: &[Pick],
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (disk, count) in &scrape.io {
        for (direction, pick) in picks {
            ConstCounter::new(pick(count))
                .encode(family.encode_family(&disk.labels("direction", direction))?)?;
        }
    }
    Ok(())
}

/// Counts up to each bound. What took from 2^n to 2^(n+1) ns belongs below the
/// bound 2^(n+1).
fn buckets(counts: &[u64; BUCKETS]) -> (u64, Vec<(f64, u64)>) {
    let mut below = 0;
    let mut shown = Vec::new();
    for (n, count) in counts.iter().enumerate() {
        below += count;
        if BOUNDS.contains(&(n + 1)) {
            let from = if n + 1 == *BOUNDS.start() {
                below
            } else {
                *count
            };
            shown.push(((1_u64 << (n + 1)) as f64 / 1e9, from));
        }
    }
    let within: u64 = shown.iter().map(|(_, count)| count).sum();
    shown.push((f64::INFINITY, below - within));
    (below, shown)
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let report = self.0.describe();
        let up = encoder.encode_descriptor(
            "drover_evidence_up",
            "1 when the kernel tells all that a verdict needs, 0 when every verdict is Unknown",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(i64::from(report.blind.is_none())).encode(up)?;
        let mut kind = encoder.encode_descriptor(
            "drover_evidence_cgroup_info",
            "the kind of cgroup hierarchy whose ids are counted",
            None,
            MetricType::Gauge,
        )?;
        let labels: &[(&str, &str)] = &[("kind", &report.cgroup)];
        ConstGauge::new(1_i64).encode(kind.encode_family(&labels)?)?;
        let mut programs = encoder.encode_descriptor(
            "drover_evidence_program_up",
            "1 for each eBPF program that runs, 0 for each that this kernel refused",
            None,
            MetricType::Gauge,
        )?;
        for program in &report.programs {
            let labels: &[(&str, &str)] = &[("program", program.name), ("hook", program.hook)];
            let runs = i64::from(program.failure.is_none());
            ConstGauge::new(runs).encode(programs.encode_family(&labels)?)?;
        }
        // A scrape that finds nothing leaves its series out: a 0 would be a lie.
        let Ok(Some(scrape)) = self.0.scrape() else {
            return Ok(());
        };
        let lost = &scrape.losses;
        counter(
            &mut encoder,
            "drover_evidence_lost_events",
            "events that were not counted, by cause",
            &[
                (&[("cause", "io_map_full")], lost.io.events),
                (&[("cause", "latency_map_full")], lost.latency.events),
                (&[("cause", "program_missed")], lost.missed),
            ],
        )?;
        per_disk(
            &mut encoder,
            "drover_device_io",
            "block I/O submitted, in operations",
            &scrape,
            &[
                ("read", |c| c.reads),
                ("write", |c| c.writes),
                ("flush", |c| c.flushes),
                ("discard", |c| c.discards),
            ],
        )?;
        per_disk(
            &mut encoder,
            "drover_device_io_bytes",
            "block I/O submitted, in bytes",
            &scrape,
            &[("read", |c| c.read_bytes), ("write", |c| c.written_bytes)],
        )?;
        latencies(&mut encoder, &scrape)?;
        queues(&mut encoder, &scrape)
    }
}

/// A histogram of times, as one of a disk's directions has it.
type Times = (
    &'static str,
    &'static str,
    fn(&Latency) -> (&[u64; BUCKETS], u64),
);

const TIMES: [Times; 2] = [
    (
        "drover_device_io_seconds",
        "time from a request's allocation to its completion",
        |l| (&l.buckets, l.sum_ns),
    ),
    (
        "drover_device_service_seconds",
        "the part of it that the device had the request, where the queue keeps that time",
        |l| (&l.device_buckets, l.device_sum_ns),
    ),
];

fn latencies(encoder: &mut DescriptorEncoder<'_>, scrape: &Scrape) -> fmt::Result {
    for (name, help, of) in TIMES {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (disk, code, latency) in &scrape.latency {
            let (counts, sum_ns) = of(latency);
            let (count, buckets) = buckets(counts);
            family
                .encode_family(&disk.labels("direction", direction(*code)))?
                .encode_histogram::<NoLabelSet>(sum_ns as f64 / 1e9, count, &buckets, None)?;
        }
    }
    let mut family = encoder.encode_descriptor(
        "drover_device_queue_seconds",
        "what the requests of drover_device_service_seconds waited before the device had them",
        None,
        MetricType::Counter,
    )?;
    for (disk, code, latency) in &scrape.latency {
        let waited = latency.queue_sum_ns as f64 / 1e9;
        ConstCounter::new(waited)
            .encode(family.encode_family(&disk.labels("direction", direction(*code)))?)?;
    }
    for (name, help, pick) in [
        (
            "drover_device_io_errors",
            "requests that ended with an error",
            (|l| l.errors) as fn(&Latency) -> u64,
        ),
        (
            "drover_device_io_untimed",
            "requests without a start time (the queue's iostats are off)",
            |l| l.untimed,
        ),
    ] {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (disk, code, latency) in &scrape.latency {
            ConstCounter::new(pick(latency))
                .encode(family.encode_family(&disk.labels("direction", direction(*code)))?)?;
        }
    }
    Ok(())
}

/// What the kernel itself keeps of each disk.
fn queues(encoder: &mut DescriptorEncoder<'_>, scrape: &Scrape) -> fmt::Result {
    let mut family = encoder.encode_descriptor(
        "drover_device_io_in_flight",
        "I/O that the disk has not answered yet, by the kernel's own count",
        None,
        MetricType::Gauge,
    )?;
    for (disk, queue) in &scrape.queues {
        let flight = queue.in_flight;
        for (direction, count) in [("read", flight.reads), ("write", flight.writes)] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            ConstGauge::new(count)
                .encode(family.encode_family(&disk.labels("direction", direction))?)?;
        }
    }
    let mut family = encoder.encode_descriptor(
        "drover_device_times_info",
        "where a disk's times are taken: at its requests, at those of its paths, or nowhere",
        None,
        MetricType::Gauge,
    )?;
    for (disk, queue) in &scrape.queues {
        let labels = disk.labels("source", queue.timed.name());
        ConstGauge::new(1_i64).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_in_one_bucket() {
        let counts: [u64; BUCKETS] = std::array::from_fn(|n| n as u64 + 1);
        let all: u64 = counts.iter().sum();
        let (count, shown) = buckets(&counts);
        assert_eq!(count, all);
        assert_eq!(shown.iter().map(|(_, n)| n).sum::<u64>(), all);
        // What took 2^12 to 2^13 ns, and all that was faster.
        assert_eq!(shown[0], (8192.0 / 1e9, (1..=13).sum()));
        assert_eq!(shown[1], (16384.0 / 1e9, 14));
        assert_eq!(shown.last().unwrap().0, f64::INFINITY);
        assert_eq!(shown.len(), BOUNDS.count() + 1);
    }
}

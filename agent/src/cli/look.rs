//! What an agent tells of its volumes, asked again and again, and what two
//! answers say of the time between them. For `top` and `trace`.

use std::time::{Duration, SystemTime};

use anyhow::ensure;
use serde_json::{Value, json};
use tonic::transport::Channel;

use super::args::Agent;
use super::verbs::{CALL, refusal};
use crate::config::Span;
use crate::ids::VolumeId;
use crate::rpc::agent_client::{channel, within};
use crate::rpc::pb;
use crate::rpc::pb::node_client::NodeClient;

/// The shortest pause between two looks.
const SHORTEST: Duration = Duration::from_millis(100);

/// How often to look.
///
/// # Errors
/// When it would ask the agent without a pause.
pub fn interval(every: Span) -> anyhow::Result<Duration> {
    ensure!(
        every.0 >= SHORTEST,
        "--interval {:?}: at least {SHORTEST:?}",
        every.0
    );
    Ok(every.0)
}

/// An agent that is asked.
pub struct Watch<'a> {
    client: NodeClient<Channel>,
    agent: &'a Agent,
}

impl<'a> Watch<'a> {
    /// Asks this agent.
    pub fn new(agent: &'a Agent) -> Self {
        let client = NodeClient::new(channel(&agent.agent.into()));
        Self { client, agent }
    }

    /// What it knows now: of one volume, with its journal from `since` on, or
    /// of all that it has to do with.
    ///
    /// # Errors
    /// When it does not answer, or knows no such volume.
    pub async fn look(
        &mut self,
        volume: Option<&VolumeId>,
        since: Option<SystemTime>,
    ) -> anyhow::Result<pb::LookAnswer> {
        let request = pb::LookRequest {
            volume: volume.map(ToString::to_string).unwrap_or_default(),
            notes_since: since.map(Into::into),
        };
        let answer = self.client.look(within(CALL, request)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| refusal("agent", self.agent.agent, &status))
    }
}

/// When the agent answered.
pub fn time(answer: &pb::LookAnswer) -> SystemTime {
    let time = answer.time.and_then(|time| SystemTime::try_from(time).ok());
    time.unwrap_or_else(SystemTime::now)
}

/// What was done on a device within some time.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rates {
    /// Reads a second.
    pub reads: f64,
    /// Bytes read a second.
    pub read_bytes: f64,
    /// Writes a second.
    pub writes: f64,
    /// Bytes written a second.
    pub written_bytes: f64,
    /// 99 of 100 reads took less than so many ns; none: none was timed.
    pub read_p99_ns: Option<u64>,
    /// The same of writes.
    pub write_p99_ns: Option<u64>,
    /// Requests that failed.
    pub errors: u64,
}

/// The rates between two looks at a volume. None where there is nothing to
/// compare: no device, another device, or counts that began anew.
pub fn rates(before: &pb::VolumeLook, after: &pb::VolumeLook, time: Duration) -> Option<Rates> {
    let (from, to) = (before.device.as_ref()?, after.device.as_ref()?);
    if (&from.disk, from.epoch) != (&to.disk, to.epoch) || time.is_zero() {
        return None;
    }
    let (earlier, later) = (from.io.as_ref()?, to.io.as_ref()?);
    let rate = |of: fn(&pb::IoCounts) -> u64| {
        let grown = of(later).checked_sub(of(earlier))?;
        Some(grown as f64 / time.as_secs_f64())
    };
    let errors = |device: &pb::DeviceLook| device.latency.values().map(|l| l.errors).sum::<u64>();
    Some(Rates {
        reads: rate(|io| io.reads)?,
        read_bytes: rate(|io| io.read_bytes)?,
        writes: rate(|io| io.writes)?,
        written_bytes: rate(|io| io.written_bytes)?,
        read_p99_ns: p99(from.latency.get("read"), to.latency.get("read")),
        write_p99_ns: p99(from.latency.get("write"), to.latency.get("write")),
        errors: errors(to).saturating_sub(errors(from)),
    })
}

/// Below what 99 of 100 requests stayed that ended between two histograms: the
/// upper bound of a bucket, so it is true, if not sharp.
fn p99(before: Option<&pb::Latencies>, after: Option<&pb::Latencies>) -> Option<u64> {
    let none = pb::Latencies::default();
    let (before, after) = (before.unwrap_or(&none), after?);
    let earlier = before.buckets.iter().copied().chain(std::iter::repeat(0));
    let grown = after.buckets.iter().zip(earlier);
    let grown: Vec<u64> = grown.map(|(a, b)| a.saturating_sub(b)).collect();
    let all: u64 = grown.iter().sum();
    let wanted = all - all / 100;
    let mut below = 0;
    let bucket = grown.iter().position(|count| {
        below += count;
        all > 0 && below >= wanted
    })?;
    1_u64.checked_shl(u32::try_from(bucket + 1).ok()?)
}

/// The nodes that hold a volume: those of its workloads.
pub fn holders(look: &pb::VolumeLook) -> Vec<&str> {
    let tickets = look.record.iter().flat_map(|record| &record.tickets);
    let workloads = tickets.filter(|ticket| ticket.kind == "workload");
    workloads.map(|ticket| ticket.node.as_str()).collect()
}

/// A lease's rest in seconds.
pub fn lease(ticket: &pb::Ticket) -> Option<u64> {
    let lease = ticket.lease.and_then(|l| Duration::try_from(l).ok());
    lease.map(|lease| lease.as_secs())
}

/// A stream's rest in seconds.
pub fn eta(stream: &pb::BackupProgress) -> Option<u64> {
    let eta = stream.eta.and_then(|eta| Duration::try_from(eta).ok());
    eta.map(|eta| eta.as_secs())
}

/// How much of a stream is done, in per cent; none: its size is not known yet.
pub fn part(stream: &pb::BackupProgress) -> Option<u64> {
    stream
        .bytes_done
        .saturating_mul(100)
        .checked_div(stream.bytes_total)
}

/// A volume as `top --json` prints it.
pub fn line(answer: &pb::LookAnswer, look: &pb::VolumeLook, rates: Option<&Rates>) -> Value {
    let record = look.record.as_ref();
    let device = look.device.as_ref();
    let ticket = |t: &pb::Ticket| {
        json!({
            "ticket": t.ticket, "kind": t.kind, "node": t.node, "owner": t.owner,
            "interruptible": t.interruptible, "lease_seconds": lease(t),
        })
    };
    let stream = |s: &pb::BackupProgress| {
        json!({
            "ticket": s.ticket, "phase": s.phase, "bytes_total": s.bytes_total,
            "bytes_done": s.bytes_done, "bytes_per_second": s.bytes_per_second,
            "percent": part(s), "eta_seconds": eta(s),
        })
    };
    let flow = |f: &pb::Flow| json!({ "bytes": f.bytes, "last_ms": f.last_ms });
    let reader = |r: &pb::ReaderLook| {
        json!({
            "ticket": (!r.ticket.is_empty()).then_some(&r.ticket), "who": r.who, "motion": r.motion,
            "read": r.read.as_ref().map(flow), "sent": r.sent.as_ref().map(flow),
            "wrote": r.wrote.as_ref().map(flow),
        })
    };
    let judgement = device.and_then(|d| d.judgement.as_ref());
    json!({
        "time": super::print::moment(time(answer)), "node": answer.node,
        "volume": look.volume,
        "name": record.map(|r| &r.name), "pvc": record.map(|r| &r.pvc),
        "namespace": record.map(|r| &r.namespace), "home": record.map(|r| &r.home),
        "epoch": record.map(|r| r.epoch), "holders": holders(look),
        "tickets": record.map(|r| r.tickets.iter().map(ticket).collect::<Vec<_>>()),
        "disk": device.map(|d| &d.disk),
        "verdict": judgement.map(|j| &j.verdict), "reason": judgement.map(|j| &j.reason),
        "reads_in_flight": device.and_then(|d| d.reads_in_flight),
        "writes_in_flight": device.and_then(|d| d.writes_in_flight),
        "reads_per_second": rates.map(|r| r.reads),
        "read_bytes_per_second": rates.map(|r| r.read_bytes),
        "writes_per_second": rates.map(|r| r.writes),
        "written_bytes_per_second": rates.map(|r| r.written_bytes),
        "read_p99_below_ns": rates.and_then(|r| r.read_p99_ns),
        "write_p99_below_ns": rates.and_then(|r| r.write_p99_ns),
        "errors": rates.map(|r| r.errors),
        "streams": look.streams.iter().map(stream).collect::<Vec<_>>(),
        "readers": look.readers.iter().map(reader).collect::<Vec<_>>(),
        "readers_silent": answer.readers_silent,
        "controller_silent": answer.controller_silent,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashMap;

    use super::*;

    /// A volume with a device that has done so many reads, each within 2^n ns.
    pub fn look(reads: u64, buckets: &[u64]) -> pb::VolumeLook {
        let times = pb::Latencies {
            buckets: buckets.to_vec(),
            errors: 0,
        };
        pb::VolumeLook {
            volume: "v".into(),
            device: Some(pb::DeviceLook {
                disk: "nvme0n1".into(),
                epoch: 3,
                io: Some(pb::IoCounts {
                    reads,
                    read_bytes: reads * 4096,
                    ..Default::default()
                }),
                latency: HashMap::from([("read".into(), times)]),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let (before, after) = (look(100, &[0, 100]), look(300, &[0, 298, 2]));
        let rates = rates(&before, &after, Duration::from_secs(2)).unwrap();
        assert_eq!((rates.reads, rates.read_bytes), (100.0, 409_600.0));
        assert_eq!((rates.read_p99_ns, rates.write_p99_ns), (Some(4), None));
        let slow = look(300, &[0, 296, 4]);
        let slow = super::rates(&before, &slow, Duration::from_secs(1)).unwrap();
        assert_eq!(slow.read_p99_ns, Some(8), "more than one in a hundred");
    }

    #[test]
    fn counts_that_begin_anew_are_no_rates() {
        let second = Duration::from_secs(1);
        let (before, after) = (look(100, &[]), look(99, &[]));
        assert_eq!(
            rates(&before, &after, second),
            None,
            "an agent that restarted"
        );
        let mut other = look(200, &[]);
        other.device.as_mut().unwrap().epoch = 4;
        assert_eq!(rates(&before, &other, second), None, "another export");
        other.device = None;
        assert_eq!(rates(&before, &other, second), None);
        assert_eq!(rates(&before, &look(200, &[]), Duration::ZERO), None);
        let idle = rates(&before, &before, second).unwrap();
        assert_eq!((idle.reads, idle.read_p99_ns), (0.0, None));
    }

    #[test]
    fn a_line_has_every_field_also_of_what_is_not_known() {
        let answer = pb::LookAnswer::default();
        let line = line(&answer, &pb::VolumeLook::default(), None);
        for field in ["epoch", "disk", "verdict", "reads_per_second", "tickets"] {
            assert_eq!(line.get(field), Some(&Value::Null), "{field}");
        }
        assert_eq!(line["streams"], json!([]));
    }

    #[test]
    fn a_tool_known_by_its_name_has_a_stream_and_no_ticket() {
        let flow = |bytes, last_ms| Some(pb::Flow { bytes, last_ms });
        let reader = |ticket: &str| pb::ReaderLook {
            ticket: ticket.into(),
            who: "pid 9 (restic)".into(),
            read: flow(4096, Some(7)),
            sent: None,
            wrote: flow(0, None),
            motion: "reads-only".into(),
        };
        let look = pb::VolumeLook {
            readers: vec![reader(""), reader("t-1")],
            ..Default::default()
        };
        let line = line(&pb::LookAnswer::default(), &look, None);
        let stream = |ticket: Value| {
            json!({
                "ticket": ticket, "who": "pid 9 (restic)", "motion": "reads-only",
                "read": { "bytes": 4096, "last_ms": 7 }, "sent": null,
                "wrote": { "bytes": 0, "last_ms": null },
            })
        };
        assert_eq!(
            line["readers"],
            json!([stream(Value::Null), stream("t-1".into())])
        );
    }
}

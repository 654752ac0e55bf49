//! Messages to types and back. A message that does not convert is refused
//! with its field's name.

mod journal;

use std::fmt::Display;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use tonic::Status;

use super::pb;
use crate::attach::ports::{
    Attachment, Chap, Content, Credentials, ExportRequest, Exported, FenceRequest, GateLayer,
    GateReport, Holder, HostIdentity, Judgement, NAME_MAX, NodeAnswer, Protocol, SettledBy,
    Settlement, SnapshotInfo, Target, Verdict, is_iqn,
};
use crate::attach::record::{
    NodeRecord, Registration, SnapshotRecord, Ticket, TicketKind, VolumeView,
};
use crate::ids::{Bytes, Epoch};

/// A field that does not hold what it must.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field {field}: {why}")]
pub struct Malformed {
    field: &'static str,
    why: String,
}

impl From<Malformed> for Status {
    fn from(malformed: Malformed) -> Self {
        Self::invalid_argument(malformed.to_string())
    }
}

/// Reads a text field as `T`.
///
/// # Errors
/// When the text is no `T`, with the field's name.
pub fn text<T: FromStr<Err: Display>>(field: &'static str, value: &str) -> Result<T, Malformed> {
    value.parse().map_err(|e: T::Err| Malformed {
        field,
        why: e.to_string(),
    })
}

/// Reads a text field as `T`, or none when it is empty.
///
/// # Errors
/// When the text is no `T`, with the field's name.
pub fn optional<T: FromStr<Err: Display>>(
    field: &'static str,
    value: &str,
) -> Result<Option<T>, Malformed> {
    if value.is_empty() {
        Ok(None)
    } else {
        text(field, value).map(Some)
    }
}

/// Reads a message that must be set.
///
/// # Errors
/// When it is not set, with the field's name.
pub fn set<T>(field: &'static str, value: Option<T>) -> Result<T, Malformed> {
    value.ok_or_else(|| Malformed {
        field,
        why: "is not set".into(),
    })
}

/// Reads a length of time that must be set and not negative.
///
/// # Errors
/// When it is not, with the field's name.
pub fn span(
    field: &'static str,
    value: Option<prost_types::Duration>,
) -> Result<Duration, Malformed> {
    let value = set(field, value)?;
    value.try_into().map_err(|_| Malformed {
        field,
        why: "is negative or too long".into(),
    })
}

/// Writes a length of time.
pub fn span_message(value: Duration) -> prost_types::Duration {
    let nanos = i32::try_from(value.subsec_nanos()).unwrap_or(0);
    prost_types::Duration {
        seconds: i64::try_from(value.as_secs()).unwrap_or(i64::MAX),
        nanos,
    }
}

/// Reads a moment.
///
/// # Errors
/// When it is out of the clock's range, with the field's name.
pub fn moment(
    field: &'static str,
    value: Option<prost_types::Timestamp>,
) -> Result<SystemTime, Malformed> {
    let value = set(field, value)?;
    value.try_into().map_err(|_| Malformed {
        field,
        why: "is out of range".into(),
    })
}

impl From<&HostIdentity> for pb::Host {
    fn from(host: &HostIdentity) -> Self {
        Self {
            nqn: host.nqn.clone(),
            id: host.id.to_string(),
            iqn: host.iqn.clone(),
            proves: host.proves,
        }
    }
}

impl TryFrom<pb::Host> for HostIdentity {
    type Error = Malformed;
    fn try_from(host: pb::Host) -> Result<Self, Malformed> {
        if !host.nqn.starts_with("nqn.") || host.nqn.len() > NAME_MAX {
            let why = format!("{:?} is no NVMe qualified name", host.nqn);
            return Err(Malformed {
                field: "host.nqn",
                why,
            });
        }
        let derived = Self {
            proves: host.proves,
            ..Self::of(host.nqn, text("host.id", &host.id)?)
        };
        if host.iqn.is_empty() {
            return Ok(derived);
        }
        if !is_iqn(&host.iqn) {
            let why = format!("{:?} is no iSCSI qualified name in lower case", host.iqn);
            return Err(Malformed {
                field: "host.iqn",
                why,
            });
        }
        Ok(Self {
            iqn: host.iqn,
            ..derived
        })
    }
}

impl From<&Content> for pb::Content {
    fn from(content: &Content) -> Self {
        use pb::content::Source;
        let source = match content {
            Content::Empty => None,
            Content::Snapshot(id) => Some(Source::Snapshot(id.to_string())),
            Content::Volume(id) => Some(Source::Volume(id.to_string())),
        };
        Self { source }
    }
}

impl TryFrom<Option<pb::Content>> for Content {
    type Error = Malformed;
    fn try_from(content: Option<pb::Content>) -> Result<Self, Malformed> {
        use pb::content::Source;
        Ok(match content.and_then(|c| c.source) {
            None => Self::Empty,
            Some(Source::Snapshot(id)) => Self::Snapshot(text("content.snapshot", &id)?),
            Some(Source::Volume(id)) => Self::Volume(text("content.volume", &id)?),
        })
    }
}

/// Reads a protocol's name; empty means NVMe/TCP.
///
/// # Errors
/// When there is no such protocol.
pub fn protocol(field: &'static str, name: &str) -> Result<Protocol, Malformed> {
    if name.is_empty() {
        return Ok(Protocol::NvmeTcp);
    }
    Protocol::named(name).ok_or_else(|| Malformed {
        field,
        why: format!(
            "{name:?} is no protocol that drover serves; {} are",
            Protocol::ALL.map(Protocol::name).join(" and ")
        ),
    })
}

impl From<&Credentials> for pb::Credentials {
    fn from(credentials: &Credentials) -> Self {
        Self {
            name: credentials.name.clone(),
            secret: credentials.secret.clone(),
        }
    }
}

impl TryFrom<Option<pb::Credentials>> for Credentials {
    type Error = Malformed;
    fn try_from(credentials: Option<pb::Credentials>) -> Result<Self, Malformed> {
        let credentials = set("chap", credentials)?;
        if credentials.name.is_empty() || credentials.secret.is_empty() {
            return Err(Malformed {
                field: "chap",
                why: "has no name or no secret".into(),
            });
        }
        Ok(Self {
            name: credentials.name,
            secret: credentials.secret,
        })
    }
}

impl From<&Chap> for pb::Chap {
    fn from(chap: &Chap) -> Self {
        Self {
            initiator: Some((&chap.initiator).into()),
            target: Some((&chap.target).into()),
        }
    }
}

impl TryFrom<pb::Chap> for Chap {
    type Error = Malformed;
    fn try_from(chap: pb::Chap) -> Result<Self, Malformed> {
        Ok(Self {
            initiator: chap.initiator.try_into()?,
            target: chap.target.try_into()?,
        })
    }
}

impl From<&ExportRequest> for pb::ExportRequest {
    fn from(request: &ExportRequest) -> Self {
        Self {
            volume: request.volume.to_string(),
            epoch: request.epoch.0,
            node: request.node.to_string(),
            host: Some((&request.host).into()),
            read_only: request.read_only,
            protocol: request.protocol.name().into(),
        }
    }
}

impl TryFrom<pb::ExportRequest> for ExportRequest {
    type Error = Malformed;
    fn try_from(request: pb::ExportRequest) -> Result<Self, Malformed> {
        Ok(Self {
            volume: text("volume", &request.volume)?,
            epoch: Epoch(request.epoch),
            node: text("node", &request.node)?,
            host: set("host", request.host)?.try_into()?,
            protocol: protocol("protocol", &request.protocol)?,
            read_only: request.read_only,
        })
    }
}

impl From<&Exported> for pb::ExportAnswer {
    fn from(exported: &Exported) -> Self {
        Self {
            epoch: exported.epoch.0,
            name: exported.target.name.clone(),
            unit: exported.target.unit.to_string(),
            address: exported.target.address.to_string(),
            ever_written: exported.ever_written,
            protocol: exported.target.protocol.name().into(),
            chap: exported.target.chap.as_ref().map(Into::into),
            proves: exported.target.proves,
        }
    }
}

impl TryFrom<pb::ExportAnswer> for Exported {
    type Error = Malformed;
    fn try_from(answer: pb::ExportAnswer) -> Result<Self, Malformed> {
        Ok(Self {
            epoch: Epoch(answer.epoch),
            target: Target {
                protocol: protocol("protocol", &answer.protocol)?,
                name: answer.name,
                unit: text("unit", &answer.unit)?,
                address: text("address", &answer.address)?,
                chap: answer.chap.map(TryInto::try_into).transpose()?,
                proves: answer.proves,
            },
            ever_written: answer.ever_written,
        })
    }
}

impl From<&FenceRequest> for pb::FenceRequest {
    fn from(request: &FenceRequest) -> Self {
        Self {
            volume: request.volume.to_string(),
            epoch: request.epoch.0,
            granted: request.granted,
        }
    }
}

impl TryFrom<pb::FenceRequest> for FenceRequest {
    type Error = Malformed;
    fn try_from(request: pb::FenceRequest) -> Result<Self, Malformed> {
        Ok(Self {
            volume: text("volume", &request.volume)?,
            epoch: Epoch(request.epoch),
            granted: request.granted,
        })
    }
}

impl From<NodeAnswer> for pb::ReleaseAnswer {
    fn from(answer: NodeAnswer) -> Self {
        let (clean, held_by, gate) = match answer {
            NodeAnswer::Clean => (true, String::new(), None),
            NodeAnswer::Held(what) | NodeAnswer::Silent(what) => (false, what, None),
            NodeAnswer::Shut { gate, held } => {
                (held.is_none(), held.unwrap_or_default(), Some(gate))
            }
        };
        Self {
            clean,
            held_by,
            gate: gate.map(|gate| pb::ShutGate {
                layers: gate.layers.iter().map(|l| l.name().to_owned()).collect(),
                shut_in: Some(span_message(gate.shut_in)),
                took: Some(span_message(gate.took)),
            }),
        }
    }
}

impl TryFrom<pb::ReleaseAnswer> for NodeAnswer {
    type Error = Malformed;
    fn try_from(message: pb::ReleaseAnswer) -> Result<Self, Malformed> {
        let held = (!message.clean).then_some(message.held_by);
        let Some(gate) = message.gate else {
            return Ok(held.map_or(Self::Clean, Self::Held));
        };
        // A layer that only a newer node knows is left out.
        let layers = gate.layers.iter().filter_map(|name| GateLayer::named(name));
        let gate = GateReport {
            layers: layers.collect(),
            shut_in: span("gate.shut_in", gate.shut_in)?,
            took: span("gate.took", gate.took)?,
        };
        Ok(Self::Shut { gate, held })
    }
}

impl From<&Settlement> for pb::FenceAnswer {
    fn from(settlement: &Settlement) -> Self {
        use pb::fence_answer::SettledBy as Wire;
        let settled_by = match settlement.settled_by {
            SettledBy::NothingOpen => Wire::NothingOpen,
            SettledBy::Drained => Wire::Drained,
            SettledBy::ExitBarrier => Wire::ExitBarrier,
        };
        Self {
            volume: settlement.volume.to_string(),
            epoch: settlement.epoch.0,
            node: settlement
                .node
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            sessions_ended: settlement.sessions_ended,
            inside_at_close: settlement.inside_at_close,
            settled_by: settled_by.into(),
            settle_time: Some(span_message(settlement.settle_time)),
            late_refused: settlement.late_refused,
            last_write: settlement.last_write.map(Into::into),
        }
    }
}

impl TryFrom<pb::FenceAnswer> for Settlement {
    type Error = Malformed;
    fn try_from(answer: pb::FenceAnswer) -> Result<Self, Malformed> {
        use pb::fence_answer::SettledBy as Wire;
        let settled_by = match Wire::try_from(answer.settled_by) {
            Ok(Wire::NothingOpen) => SettledBy::NothingOpen,
            Ok(Wire::Drained) => SettledBy::Drained,
            Ok(Wire::ExitBarrier) => SettledBy::ExitBarrier,
            Err(unknown) => {
                return Err(Malformed {
                    field: "settled_by",
                    why: unknown.to_string(),
                });
            }
        };
        Ok(Self {
            volume: text("volume", &answer.volume)?,
            epoch: Epoch(answer.epoch),
            node: optional("node", &answer.node)?,
            sessions_ended: answer.sessions_ended,
            inside_at_close: answer.inside_at_close,
            settled_by,
            settle_time: span("settle_time", answer.settle_time)?,
            late_refused: answer.late_refused,
            last_write: answer
                .last_write
                .map(|t| moment("last_write", Some(t)))
                .transpose()?,
        })
    }
}

impl From<&SnapshotInfo> for pb::SnapshotAnswer {
    fn from(info: &SnapshotInfo) -> Self {
        Self {
            snapshot: info.id.to_string(),
            volume: info.volume.to_string(),
            size: info.size.0,
            taken: Some(info.taken.into()),
            ready: true,
            ..Self::default()
        }
    }
}

impl TryFrom<pb::SnapshotAnswer> for SnapshotInfo {
    type Error = Malformed;
    fn try_from(answer: pb::SnapshotAnswer) -> Result<Self, Malformed> {
        Ok(Self {
            id: text("snapshot", &answer.snapshot)?,
            volume: text("volume", &answer.volume)?,
            size: Bytes(answer.size),
            taken: moment("taken", answer.taken)?,
        })
    }
}

impl From<&SnapshotRecord> for pb::SnapshotAnswer {
    fn from(record: &SnapshotRecord) -> Self {
        Self {
            name: record.name.clone(),
            home: record.home.to_string(),
            ready: record.ready,
            ..(&record.info).into()
        }
    }
}

impl From<&Attachment> for pb::AttachmentAnswer {
    fn from(attachment: &Attachment) -> Self {
        Self {
            volume: attachment.volume.to_string(),
            size: attachment.size.0,
            export: Some((&attachment.exported).into()),
            read_only: attachment.read_only,
            busy_deadline: Some(span_message(attachment.busy_deadline)),
        }
    }
}

impl TryFrom<pb::AttachmentAnswer> for Attachment {
    type Error = Malformed;
    fn try_from(answer: pb::AttachmentAnswer) -> Result<Self, Malformed> {
        Ok(Self {
            volume: text("volume", &answer.volume)?,
            size: Bytes(answer.size),
            exported: set("export", answer.export)?.try_into()?,
            read_only: answer.read_only,
            busy_deadline: span("busy_deadline", answer.busy_deadline)?,
        })
    }
}

impl From<&Registration> for pb::RegisterRequest {
    fn from(registration: &Registration) -> Self {
        let attached = registration.attached.iter();
        Self {
            node: registration.node.to_string(),
            incarnation: registration.incarnation.clone(),
            host: Some((&registration.host).into()),
            agent: registration.agent.to_string(),
            has_pool: registration.has_pool,
            attached: attached
                .map(|(volume, epoch)| pb::VolumeEpoch {
                    volume: volume.to_string(),
                    epoch: epoch.0,
                })
                .collect(),
        }
    }
}

impl TryFrom<pb::RegisterRequest> for Registration {
    type Error = Malformed;
    fn try_from(request: pb::RegisterRequest) -> Result<Self, Malformed> {
        if request.incarnation.is_empty() {
            return Err(Malformed {
                field: "incarnation",
                why: "is empty".into(),
            });
        }
        let attached = request.attached.iter();
        Ok(Self {
            node: text("node", &request.node)?,
            incarnation: request.incarnation,
            host: set("host", request.host)?.try_into()?,
            agent: text("agent", &request.agent)?,
            has_pool: request.has_pool,
            attached: attached
                .map(|a| Ok((text("attached.volume", &a.volume)?, Epoch(a.epoch))))
                .collect::<Result<_, Malformed>>()?,
        })
    }
}

fn ticket_kind(kind: TicketKind) -> &'static str {
    match kind {
        TicketKind::Workload => "workload",
        TicketKind::Backup => "backup",
        TicketKind::Restore => "restore",
        TicketKind::Maintenance => "maintenance",
    }
}

impl From<&Ticket> for pb::Ticket {
    fn from(ticket: &Ticket) -> Self {
        let left = |end: SystemTime| end.duration_since(SystemTime::now()).unwrap_or_default();
        Self {
            ticket: ticket.id.to_string(),
            kind: ticket_kind(ticket.kind).into(),
            node: ticket.node.to_string(),
            owner: ticket.owner.clone(),
            interruptible: ticket.interruptible,
            home_side: ticket.home_side,
            lease: ticket.lease_ends.map(|end| span_message(left(end))),
        }
    }
}

impl TryFrom<pb::Ticket> for Ticket {
    type Error = Malformed;
    fn try_from(ticket: pb::Ticket) -> Result<Self, Malformed> {
        let kinds = [
            TicketKind::Workload,
            TicketKind::Backup,
            TicketKind::Restore,
            TicketKind::Maintenance,
        ];
        let kind = kinds
            .into_iter()
            .find(|kind| ticket_kind(*kind) == ticket.kind);
        let lease = ticket
            .lease
            .map(|lease| span("lease", Some(lease)))
            .transpose()?;
        Ok(Self {
            id: text("ticket", &ticket.ticket)?,
            kind: kind.ok_or_else(|| Malformed {
                field: "kind",
                why: format!(
                    "{:?} is none of workload, backup, restore, maintenance",
                    ticket.kind
                ),
            })?,
            node: text("node", &ticket.node)?,
            owner: ticket.owner,
            interruptible: ticket.interruptible,
            home_side: ticket.home_side,
            lease_ends: lease.map(|lease| SystemTime::now() + lease),
        })
    }
}

/// StorageClass parameters that CSI's provisioner adds with --extra-create-metadata.
const PVC: &str = "csi.storage.k8s.io/pvc/name";
const PVC_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";

impl From<&VolumeView> for pb::Volume {
    fn from(view: &VolumeView) -> Self {
        let given = |key| view.spec.parameters.get(key).cloned().unwrap_or_default();
        Self {
            pvc: given(PVC),
            namespace: given(PVC_NAMESPACE),
            volume: view.spec.id.to_string(),
            name: view.spec.name.clone(),
            size: view.spec.size.0,
            home: view.spec.home.to_string(),
            epoch: view.epoch.0,
            protocol: view.spec.protocol.name().into(),
            tickets: view.tickets.iter().map(Into::into).collect(),
        }
    }
}

impl From<&NodeRecord> for pb::NodeView {
    fn from(record: &NodeRecord) -> Self {
        Self {
            node: record.node.to_string(),
            incarnation: record.incarnation.clone(),
            agent: record.agent.to_string(),
            has_pool: record.has_pool,
            seen: Some(record.seen.into()),
            lost: record.lost.is_some(),
        }
    }
}

/// A verdict's name, as its JSON form has it.
pub fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Live => "live",
        Verdict::BackupRunning => "backup-running",
        Verdict::BackupStale => "backup-stale",
        Verdict::Quiet => "quiet",
        Verdict::Unknown => "unknown",
    }
}

impl From<&Holder> for pb::Holder {
    fn from(holder: &Holder) -> Self {
        Self {
            pid: holder.pid,
            name: holder.name.clone(),
            cgroup: holder.cgroup.clone(),
            writable: holder.writable,
            registered: holder.registered,
            last_read_ms: holder.last_read_ms,
            last_write_ms: holder.last_write_ms,
            read_bytes: holder.read_bytes,
            written_bytes: holder.written_bytes,
            pod: holder
                .pod
                .as_ref()
                .map(|p| p.uid.clone())
                .unwrap_or_default(),
            container: holder
                .pod
                .as_ref()
                .and_then(|p| p.container.clone())
                .unwrap_or_default(),
        }
    }
}

/// A judgement about the disk named `disk`.
pub fn judgement_message(judgement: &Judgement, disk: &str) -> pb::JudgeAnswer {
    pb::JudgeAnswer {
        verdict: verdict_name(judgement.verdict).into(),
        reason: judgement.reason.clone(),
        holders: judgement.holders.iter().map(Into::into).collect(),
        disk: disk.into(),
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;

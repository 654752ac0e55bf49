//! Messages to types and back. A message that does not convert is refused
//! with its field's name.

mod export;
mod fence;
mod journal;
mod judgement;

pub use judgement::judgement_message;

use std::fmt::Display;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use tonic::Status;

use super::pb;
use crate::attach::ports::{
    Attachment, Content, HostIdentity, LateCommands, NAME_MAX, Protocol, SnapshotInfo, is_iqn,
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
        let late = registration.late.iter();
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
            late: late
                .map(|late| pb::LateCommands {
                    volume: late.volume.to_string(),
                    epoch: late.epoch.0,
                    commands: late.commands,
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
        let late = request.late.iter();
        Ok(Self {
            node: text("node", &request.node)?,
            incarnation: request.incarnation,
            host: set("host", request.host)?.try_into()?,
            agent: text("agent", &request.agent)?,
            has_pool: request.has_pool,
            attached: attached
                .map(|a| Ok((text("attached.volume", &a.volume)?, Epoch(a.epoch))))
                .collect::<Result<_, Malformed>>()?,
            late: late
                .map(|late| {
                    Ok(LateCommands {
                        volume: text("late.volume", &late.volume)?,
                        epoch: Epoch(late.epoch),
                        commands: late.commands,
                    })
                })
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

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;

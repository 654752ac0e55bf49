//! Who holds a device, and what that means.

use crate::attach::ports::{Holder, Judgement, Pod, Verdict};
use crate::rpc::pb;

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

impl From<pb::Holder> for Holder {
    fn from(holder: pb::Holder) -> Self {
        let container = Some(holder.container).filter(|id| !id.is_empty());
        let pod = (!holder.pod.is_empty()).then_some(Pod {
            uid: holder.pod,
            container,
        });
        Self {
            pid: holder.pid,
            name: holder.name,
            cgroup: holder.cgroup,
            pod,
            writable: holder.writable,
            registered: holder.registered,
            last_read_ms: holder.last_read_ms,
            last_write_ms: holder.last_write_ms,
            read_bytes: holder.read_bytes,
            written_bytes: holder.written_bytes,
        }
    }
}

/// A judgement that came over the wire. A verdict that only a newer node knows
/// is `Unknown`, which is treated as the worst.
impl From<pb::JudgeAnswer> for Judgement {
    fn from(answer: pb::JudgeAnswer) -> Self {
        Self {
            verdict: Verdict::named(&answer.verdict).unwrap_or(Verdict::Unknown),
            reason: answer.reason,
            holders: answer.holders.into_iter().map(Into::into).collect(),
        }
    }
}

/// A judgement about the disk named `disk`.
pub fn judgement_message(judgement: &Judgement, disk: &str) -> pb::JudgeAnswer {
    pb::JudgeAnswer {
        verdict: judgement.verdict.name().into(),
        reason: judgement.reason.clone(),
        holders: judgement.holders.iter().map(Into::into).collect(),
        disk: disk.into(),
    }
}

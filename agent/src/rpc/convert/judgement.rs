//! Who holds a device, and what that means.

use crate::attach::ports::{Holder, Judgement, Verdict};
use crate::rpc::pb;

/// A verdict's name, as its JSON form has it.
fn verdict_name(verdict: Verdict) -> &'static str {
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

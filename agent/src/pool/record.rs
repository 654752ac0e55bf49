//! The home's record of one volume: the fence of record.
//!
//! It is right even if all else is stale: which epoch is the highest that this
//! home ever heard of, whether its export is open, to whom, and under which
//! identity. Whoever changes it has it on disk before anybody is answered.
//! Which change follows which is decided in `crate::home`; this module only
//! keeps it.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::PoolError;
use super::slots::SlotFile;
use crate::attach::ports::{Chap, HostIdentity, Protocol, Settlement};
use crate::ids::{Epoch, NodeId, VolumeId};

/// How many closed identities a record remembers. The host of an older one is
/// answered "not now" for ever instead of "never" after the home has restarted.
pub const CLOSED_KEPT: usize = 32;

/// How much of the reason of a failed flush a record keeps, in characters.
pub const REASON_KEPT: usize = 256;

/// An export's identity and rights, as the record keeps them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenExport {
    /// The epoch it was opened at.
    pub epoch: Epoch,
    /// The node it is for.
    pub node: NodeId,
    /// The one host that may connect.
    pub host: HostIdentity,
    /// The protocol it is exported over.
    #[serde(default)]
    pub protocol: Protocol,
    /// Subsystem NQN or target IQN, made for this export alone.
    #[serde(alias = "subsystem")]
    pub name: String,
    /// Identity of the namespace or LUN, made for this export alone.
    #[serde(alias = "namespace")]
    pub unit: Uuid,
    /// What both sides prove, where they do. The file is its owner's alone
    /// (mode 0600) and goes with the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chap: Option<Chap>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Why a flush failed, if one did: what was written may be lost, so nothing
    /// is served under this identity any more, whoever opens it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed_flush: Option<String>,
}

/// Whether a volume's export is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum ExportState {
    /// Its host may use it.
    Open {
        /// Under this identity.
        export: OpenExport,
    },
    /// No command enters any more, and those inside had not all settled yet
    /// when this was written. It never opens again, and nothing else is opened.
    Closing {
        /// What was open.
        export: OpenExport,
        /// Commands inside when the gate closed.
        inside: u32,
    },
    /// Nothing is open, and nothing is on the way.
    Closed,
}

/// What a home knows of one volume, durably.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The volume; a record that was put into another's folder is refused.
    pub volume: VolumeId,
    /// The highest epoch this home ever took note of.
    pub highest: Epoch,
    /// Whether its export is open.
    pub export: ExportState,
    /// Whether anything may ever have been written to the volume.
    pub ever_written: bool,
    /// Whether a restore writes the file now, or was cut short while it did: its
    /// worker may have outlived the agent, so no lock tells when it has ended.
    #[serde(default)]
    pub restoring: bool,
    /// What the closing of `highest` came to; kept so that a repeated fence
    /// gets the same answer. None while open and before the first fence.
    pub settlement: Option<Settlement>,
    /// An epoch that this record was found to have lost: the pool is
    /// an old copy, and the volume serves nothing until an operator accepts it.
    pub behind: Option<Epoch>,
    /// Names of exports (subsystem NQNs, target IQNs) that were closed for good, the newest last,
    /// [`CLOSED_KEPT`] at most.
    pub closed: Vec<String>,
}

impl Record {
    /// The record of a new volume.
    pub fn new(volume: VolumeId, ever_written: bool) -> Self {
        Self {
            volume,
            highest: Epoch(0),
            export: ExportState::Closed,
            ever_written,
            restoring: false,
            settlement: None,
            behind: None,
            closed: Vec::new(),
        }
    }

    /// Notes that a flush of the open export failed; whether it is noted now.
    pub fn note_failed_flush(&mut self, why: &str) -> bool {
        let ExportState::Open { export } = &mut self.export else {
            return false;
        };
        export
            .failed_flush
            .get_or_insert_with(|| why.chars().take(REASON_KEPT).collect());
        true
    }

    /// Why a flush of the open export failed, if one did.
    pub fn failed_flush(&self) -> Option<&str> {
        match &self.export {
            ExportState::Open { export } => export.failed_flush.as_deref(),
            ExportState::Closing { .. } | ExportState::Closed => None,
        }
    }

    /// Notes an identity as closed for good.
    pub fn remember_closed(&mut self, name: &str) {
        if !self.closed.iter().any(|known| known == name) {
            self.closed.push(name.to_owned());
        }
        let surplus = self.closed.len().saturating_sub(CLOSED_KEPT);
        self.closed.drain(..surplus);
    }
}

/// A volume's record and its file. Changes are one at a time.
#[derive(Debug)]
pub struct RecordFile {
    inner: Mutex<(SlotFile<Record>, Record)>,
    /// The newest durable record, to be read without waiting for a disk.
    seen: Mutex<Record>,
}

impl RecordFile {
    /// Takes a file whose record is `record`, and checks that it is of `volume`.
    pub fn new(
        file: SlotFile<Record>,
        record: Record,
        volume: &VolumeId,
        path: PathBuf,
    ) -> Result<Self, PoolError> {
        if record.volume != *volume {
            return Err(PoolError::Damaged {
                path,
                detail: format!("it is the record of volume {}", record.volume),
            });
        }
        Ok(Self {
            seen: Mutex::new(record.clone()),
            inner: Mutex::new((file, record)),
        })
    }

    /// The newest durable record. Never waits for a disk.
    pub fn get(&self) -> Record {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Changes the record; durable when this returns. An unchanged one is not
    /// written. After an error the record is as it was.
    pub fn update(&self, change: impl FnOnce(&mut Record)) -> Result<Record, PoolError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = inner.1.clone();
        change(&mut next);
        if next != inner.1 {
            inner.0.put(&next)?;
            inner.1.clone_from(&next);
            self.seen
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone_from(&next);
        }
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_from_before_iscsi_reads_on() {
        let text = r#"{"is":"open","export":{"epoch":7,"node":"a",
            "host":{"nqn":"nqn.h","id":"00000000-0000-0000-0000-000000000001"},
            "subsystem":"nqn.s","namespace":"00000000-0000-0000-0000-000000000002",
            "read_only":false}}"#;
        let ExportState::Open { export } = serde_json::from_str(text).unwrap() else {
            panic!("not open");
        };
        assert_eq!(
            (export.protocol, &*export.name),
            (Protocol::NvmeTcp, "nqn.s")
        );
        assert_eq!(export.unit, Uuid::from_u128(2));
        assert_eq!(export.host, HostIdentity::of("nqn.h", Uuid::from_u128(1)));
        assert_eq!((export.chap, export.failed_flush), (None, None));
    }

    #[test]
    fn the_secrets_of_an_export_are_in_its_record_and_never_shown() {
        let chap = Chap::fresh("iqn.h", "iqn.t");
        let export = OpenExport {
            epoch: Epoch(1),
            node: "a".parse().unwrap(),
            host: HostIdentity::of("nqn.h", Uuid::nil()),
            protocol: Protocol::Iscsi,
            name: "iqn.t".into(),
            unit: Uuid::nil(),
            chap: Some(chap.clone()),
            read_only: false,
            failed_flush: None,
        };
        let text = serde_json::to_string(&export).unwrap();
        assert!(text.contains(&chap.initiator.secret) && text.contains(&chap.target.secret));
        assert_eq!(serde_json::from_str::<OpenExport>(&text).unwrap(), export);
        let shown = format!("{export:?}");
        assert!(!shown.contains(&chap.initiator.secret), "{shown}");
        assert!(!shown.contains(&chap.target.secret), "{shown}");
    }
}

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
use crate::attach::ports::{HostIdentity, Settlement};
use crate::ids::{Epoch, NodeId, VolumeId};

/// How many closed identities a record remembers. The host of an older one is
/// answered "not now" for ever instead of "never" after the home has restarted.
pub const CLOSED_KEPT: usize = 32;

/// An export's identity and rights, as the record keeps them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenExport {
    /// The epoch it was opened at.
    pub epoch: Epoch,
    /// The node it is for.
    pub node: NodeId,
    /// The one host that may connect.
    pub host: HostIdentity,
    /// Subsystem NQN, made for this export alone.
    pub subsystem: String,
    /// Namespace UUID, made for this export alone.
    pub namespace: Uuid,
    /// Whether writes are refused.
    pub read_only: bool,
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
    /// What the closing of `highest` came to; kept so that a repeated fence
    /// gets the same answer. None while open and before the first fence.
    pub settlement: Option<Settlement>,
    /// A granted epoch that this record was found to be behind of: the pool is
    /// an old copy, and the volume serves nothing until an operator accepts it.
    pub behind: Option<Epoch>,
    /// Subsystem NQNs that were closed for good, the newest last,
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
            settlement: None,
            behind: None,
            closed: Vec::new(),
        }
    }

    /// Notes an identity as closed for good.
    pub fn remember_closed(&mut self, subsystem: &str) {
        if !self.closed.iter().any(|known| known == subsystem) {
            self.closed.push(subsystem.to_owned());
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

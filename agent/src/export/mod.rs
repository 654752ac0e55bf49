//! Live exports: the listener, the sessions of each, and their end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::attach::ports::HostIdentity;
use crate::block::BlockDevice;
use crate::ids::{Epoch, VolumeId};

/// An export's identity and rights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSpec {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch it is of.
    pub epoch: Epoch,
    /// Subsystem NQN, made for this export alone.
    pub subsystem: String,
    /// Namespace UUID, made for this export alone.
    pub namespace: Uuid,
    /// The one host that may connect.
    pub host: HostIdentity,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// The exports that a target serves now, and the identities it knows as closed.
pub struct Exports {}

#[expect(
    clippy::todo,
    unused_variables,
    clippy::unused_async,
    reason = "being written"
)]
impl Exports {
    /// None yet.
    pub fn new() -> Arc<Self> {
        todo!()
    }
    /// Serves one more export. The same identity again: nothing changes.
    pub fn open(&self, spec: ExportSpec, device: Arc<dyn BlockDevice>) {
        todo!()
    }
    /// Remembers an identity as closed: Connect is refused for good (DNR). Unknown ones are refused without DNR.
    pub fn remember_closed(&self, subsystem: &str) {
        todo!()
    }
    /// Closes the gate at once: when this returns, no command of the export enters. None: no such export is live.
    pub fn close(&self, subsystem: &str) -> Option<Closing> {
        todo!()
    }
    /// Tells the hosts of a volume's exports that its size has changed.
    pub fn resized(&self, volume: &VolumeId) {
        todo!()
    }
    /// Commands refused since a closed export's gate closed; 0 for an unknown one.
    pub fn late_refused(&self, subsystem: &str) -> u64 {
        todo!()
    }
    /// When the volume's live export saw its last write.
    pub fn last_write(&self, volume: &VolumeId) -> Option<SystemTime> {
        todo!()
    }
    /// Accepts connections until `stop` ends. Call it when every export is restored.
    pub async fn serve(
        self: Arc<Self>,
        listener: tokio::net::TcpListener,
        stop: tokio::sync::watch::Receiver<bool>,
    ) {
        todo!()
    }
}

/// An export whose gate is closed and whose hosts do not know it yet.
pub struct Closing {
    /// Commands inside when the gate closed.
    pub inside_at_close: u32,
}

/// What ending the hosts' sessions came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Connections that were ended.
    pub sessions: u32,
    /// Commands refused since the gate closed.
    pub late_refused: u64,
    /// The export's last write.
    pub last_write: Option<SystemTime>,
}

#[expect(
    clippy::todo,
    unused_variables,
    clippy::unused_async,
    reason = "being written"
)]
impl Closing {
    /// Waits until no command is inside; how long that took since the gate closed, or how many are inside still.
    pub async fn settled(&self, deadline: Duration) -> Result<Duration, u32> {
        todo!()
    }
    /// Tells the hosts (final status for all I/O, namespace gone, connections closed) and drops the identity for good.
    pub async fn end(self) -> Ended {
        todo!()
    }
}

//! The gate of a workload's node: what shuts a disk there when its epoch has ended.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Disk, NodeError, micros};
use crate::ids::{Epoch, VolumeId};

/// One way in which a node shuts a disk, in the order in which they close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GateLayer {
    /// Every bio fails, the kernel's own too.
    Bio,
    /// Calls on files fail: of the disk, and of a file system on it.
    Files,
    /// The disk is opened and mounted no more.
    Opens,
    /// The file system on it is shut down: what is dirty stays unwritten.
    Shutdown,
    /// The disk is gone from the node.
    Removal,
}

impl GateLayer {
    /// All of them, in their order.
    pub const ALL: [Self; 5] = [
        Self::Bio,
        Self::Files,
        Self::Opens,
        Self::Shutdown,
        Self::Removal,
    ];

    /// As metrics, receipts and the wire call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bio => "bio",
            Self::Files => "files",
            Self::Opens => "opens",
            Self::Shutdown => "shutdown",
            Self::Removal => "removal",
        }
    }

    /// The layer of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|layer| layer.name() == name)
    }
}

/// What was shut on a node, and how fast. A courtesy: no receipt depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateReport {
    /// The layers that closed, in their order. Of several disks: those that
    /// closed on each.
    pub layers: Vec<GateLayer>,
    /// From the call until those of eBPF (bio, files, opens) were shut.
    #[serde(with = "micros")]
    pub shut_in: Duration,
    /// From the call until the last layer had closed.
    #[serde(with = "micros")]
    pub took: Duration,
}

impl GateReport {
    /// The report in words.
    pub fn describe(&self) -> String {
        let names: Vec<&str> = self.layers.iter().map(|layer| layer.name()).collect();
        if names.is_empty() {
            return "no layer of its gate".to_owned();
        }
        format!(
            "its gate ({}) in {:?}, the eBPF part of it in {:?}",
            names.join(", "),
            self.took,
            self.shut_in
        )
    }
}

/// Shuts disks of this node, by eBPF. Never waits for a disk.
pub trait NodeGate: Send + Sync {
    /// Shuts a disk; the layers that refuse from now on. What is shut already
    /// stays so. Nothing opens a disk again: a new epoch has a new one.
    ///
    /// # Errors
    /// [`NodeError::Failed`] when the kernel does not take it.
    fn close(
        &self,
        disk: &Disk,
        volume: &VolumeId,
        epoch: Epoch,
    ) -> Result<Vec<GateLayer>, NodeError>;
    /// Whether a disk was shut, by this agent or by one before it.
    ///
    /// # Errors
    /// [`NodeError::Failed`] when the kernel does not tell: the disk is then
    /// neither used nor ended.
    fn is_closed(&self, disk: &Disk) -> Result<bool, NodeError>;
    /// Forgets disks that have gone.
    fn sweep(&self);
    /// Where a child lets itself through, to shut down the file system on a
    /// disk that is shut. None: nothing would stop it.
    fn exemptions(&self) -> Option<PathBuf>;
}

//! A fence, as a home is asked and as it answers.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::micros;
use crate::ids::{Epoch, NodeId, VolumeId};

/// End every export of a volume up to `epoch`, for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceRequest {
    /// The volume.
    pub volume: VolumeId,
    /// This epoch and all before it end.
    pub epoch: Epoch,
    /// How far the home's record is known to have come. A home whose record is
    /// behind it has lost its record, and says so.
    pub recorded: Recorded,
}

/// How far a home's record of a volume has come. It only goes forward: an
/// epoch opens, then it closes, then a later one opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Recorded {
    /// The highest epoch in it.
    #[serde(rename = "recorded")]
    pub epoch: Epoch,
    /// Whether that epoch's end is in it too.
    #[serde(rename = "recorded_end", default)]
    pub ended: bool,
}

impl Recorded {
    /// An epoch is in it, and as far as is known not its end.
    pub fn begin_of(epoch: Epoch) -> Self {
        Self {
            epoch,
            ended: false,
        }
    }

    /// The end of an epoch is in it, and of all before.
    pub fn end_of(epoch: Epoch) -> Self {
        Self { epoch, ended: true }
    }
}

/// How the commands that were inside a gate when it closed came to their end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SettledBy {
    /// There was no export to close: none was ever opened at this epoch.
    NothingOpen,
    /// Each ended by itself.
    Drained,
    /// Their process had died; its lock on the pool came free only after them.
    ExitBarrier,
    /// Some have not ended, and an operator said not to wait for them: they may
    /// still land over what the next holder writes.
    Operator,
}

/// What a home found and did when it fenced. The arbiter makes a receipt of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settlement {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch that is closed, and all before it.
    pub epoch: Epoch,
    /// Who held it, if anybody did.
    pub node: Option<NodeId>,
    /// Connections (admin and I/O queues) that were ended.
    pub sessions_ended: u32,
    /// Commands inside the gate at the moment it closed.
    pub inside_at_close: u32,
    /// How those came to their end.
    pub settled_by: SettledBy,
    /// How many of them had not, by the operator's word.
    #[serde(default)]
    pub unsettled: u32,
    /// From the closing of the gate until the last of them had ended; zero
    /// where that was not seen.
    #[serde(with = "micros")]
    pub settle_time: Duration,
    /// Commands refused since the gate closed (so far).
    pub late_refused: u64,
    /// When the home saw this export's last write.
    pub last_write: Option<SystemTime>,
}

/// Commands of an ended epoch that its home refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LateCommands {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch that was closed, as the receipt names it.
    pub epoch: Epoch,
    /// How many have come since its gate closed, by now.
    pub commands: u64,
}

//! What the table asks of an export, whichever protocol serves it.

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::block::gate::Gate;
use crate::iscsi::target::Target;
use crate::nvme_tcp::subsystem::Subsystem;

/// An export as its protocol serves it.
pub trait Served: Send + Sync {
    /// The gate that each of its commands enters.
    fn gate(&self) -> &Arc<Gate>;
    /// Connections of its host now.
    fn connections(&self) -> u32;
    /// When a command that writes was last let in.
    fn last_write(&self) -> Option<SystemTime>;
    /// Tells the host that the size has changed.
    fn resized(&self);
    /// Tells the host of the end: all I/O gets the final status from now on,
    /// also what is outstanding. The gate is closed.
    fn take_away(&self);
    /// Whether the host knows the end.
    fn knows_the_end(&self) -> bool;
    /// How the host takes leave.
    fn farewell(&self, logout: Duration) -> Farewell;
    /// Ends the host's connections.
    fn disconnect(&self);
}

/// How long an ended export's connections stay: until the host has left by
/// itself, or these have passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Farewell {
    /// For the host to know the end.
    pub to_know: Duration,
    /// For it to leave, from then on.
    pub to_leave: Duration,
}

/// An export's protocol, and its side of it.
#[derive(Clone)]
pub enum Side {
    /// NVMe over TCP.
    NvmeTcp(Arc<Subsystem>),
    /// iSCSI.
    Iscsi(Arc<Target>),
}

impl Deref for Side {
    type Target = dyn Served;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::NvmeTcp(subsystem) => &**subsystem,
            Self::Iscsi(target) => &**target,
        }
    }
}

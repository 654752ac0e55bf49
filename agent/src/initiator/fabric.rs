//! What this node's kernel has attached: the edge that tests replace.
//!
//! The kernel is the only memory of what is attached; drover keeps none beside
//! it. An export's name carries volume and epoch
//! ([`ExportName`]), so a restarted agent reads from sysfs all it must know.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::attach::ports::{Disk, NAME_MAX, NodeError, Protocol, Target, is_iqn};
use crate::ids::{Bytes, Epoch, VolumeId};

/// The beginning of every subsystem NQN of drover's.
pub const NQN_PREFIX: &str = "nqn.2026-11.io.drover:";
/// The beginning of every target IQN of drover's.
pub const IQN_PREFIX: &str = "iqn.2026-11.io.drover:";

/// An export's name, a subsystem NQN or a target IQN:
/// `nqn.2026-11.io.drover:VOLUME:EPOCH:RANDOM`, or the same with `iqn`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExportName {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch it was made for.
    pub epoch: Epoch,
    /// The protocol it is reached by.
    pub protocol: Protocol,
    text: String,
}

/// A text that is no export's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of an export of drover's ({NQN_PREFIX}VOLUME:EPOCH:RANDOM, or iqn)")]
pub struct NotOurs(String);

impl ExportName {
    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for ExportName {
    type Err = NotOurs;
    fn from_str(text: &str) -> Result<Self, NotOurs> {
        let parse = || {
            let (protocol, rest) = match text.strip_prefix(NQN_PREFIX) {
                Some(rest) => (Protocol::NvmeTcp, rest),
                None => (Protocol::Iscsi, text.strip_prefix(IQN_PREFIX)?),
            };
            let mut parts = rest.split(':');
            let volume = parts.next()?.parse().ok()?;
            let epoch = parts.next()?;
            let random = parts.next()?;
            // One spelling per export: "7", never "+7" or "007".
            let number: u64 = epoch.parse().ok()?;
            let sound = text.len() <= NAME_MAX
                && (protocol == Protocol::NvmeTcp || is_iqn(text))
                && parts.next().is_none()
                && number.to_string() == epoch
                && !random.is_empty()
                && random
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || c == '-');
            sound.then(|| Self {
                volume,
                epoch: Epoch(number),
                protocol,
                text: text.to_owned(),
            })
        };
        parse().ok_or_else(|| NotOurs(text.chars().take(300).collect()))
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A device number, `MAJOR:MINOR` as sysfs and mountinfo write it.
///
/// The kernel gives one to another disk only when the last mount and the last
/// opener of the first have gone, so a mount's number is of the disk below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DevNumber {
    /// The driver's part; 0: no block device is below.
    pub major: u32,
    /// The device's part.
    pub minor: u32,
}

impl FromStr for DevNumber {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.trim().split_once(':').ok_or(())?;
        Ok(Self {
            major: major.parse().map_err(|_| ())?,
            minor: minor.parse().map_err(|_| ())?,
        })
    }
}

impl fmt::Display for DevNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The disk of an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name and sequence number.
    pub disk: Disk,
    /// Its device number.
    pub number: DevNumber,
    /// Its size now.
    pub size: Bytes,
    /// The namespace's or LUN's identity.
    pub unit: Option<Uuid>,
    /// Whether the kernel refuses writes to it.
    pub read_only: bool,
}

/// One export that this node's kernel is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Which.
    pub name: ExportName,
    /// This host's links to it (NVMe controllers, iSCSI sessions), with the
    /// state of each.
    pub links: Vec<(String, String)>,
    /// Its disk, once the kernel has made it.
    pub device: Option<Device>,
}

/// The kernel's initiator.
#[async_trait]
pub trait Fabric: Send + Sync {
    /// Every drover export that this host is connected to, in order of name.
    /// Reads sysfs only, which no I/O can hold up.
    fn attached(&self) -> Result<Vec<Attached>, NodeError>;

    /// Whether the kernel can prove itself over NVMe/TCP (DH-HMAC-CHAP).
    async fn proves(&self) -> bool {
        false
    }
    /// Connects to an export. Does not wait for its disk. How long the kernel took.
    async fn connect(&self, target: &Target) -> Result<Duration, NodeError>;
    /// Ends this host's links to an export; what is in flight fails.
    /// None: success. How long the kernel took.
    async fn disconnect(&self, name: &ExportName) -> Result<Duration, NodeError>;
    /// Removes what earlier connects left that came to nothing or were cut off,
    /// to this volume's exports or to any.
    fn tidy(&self, _: Option<&VolumeId>) -> Result<(), NodeError> {
        Ok(())
    }
    /// Lets the kernel try a command of this disk again however often its link
    /// is lost under it. For every disk before its first use: a connect whose
    /// caller was killed may have made it.
    fn try_without_end(&self, _: &ExportName, _: &Device) -> Result<(), NodeError> {
        Ok(())
    }
    /// Lets the kernel look at the disk again (its size has changed).
    async fn rescan(&self, name: &ExportName) -> Result<(), NodeError>;
    /// Whether a block device with this number is there.
    fn is_there(&self, number: DevNumber) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_nqn_of_ours_is_taken_apart() {
        let name: ExportName = "nqn.2026-11.io.drover:vol-1:7:ab12".parse().unwrap();
        assert_eq!((name.volume.as_str(), name.epoch), ("vol-1", Epoch(7)));
        assert_eq!(name.as_str(), "nqn.2026-11.io.drover:vol-1:7:ab12");
    }

    #[test]
    fn an_iqn_of_ours_is_taken_apart() {
        let text = "iqn.2026-11.io.drover:vol-1:7:ab12";
        let name: ExportName = text.parse().unwrap();
        assert_eq!((name.volume.as_str(), name.epoch), ("vol-1", Epoch(7)));
        assert_eq!((name.protocol, name.as_str()), (Protocol::Iscsi, text));
        for iqn in [
            "iqn.2026-11.io.drover:vol-1:7:AB",
            "iqn.2026-11.io.drover.node:vol-1:7:ab",
            "iqn.2026-11.io.drover:vol-1:7",
        ] {
            assert!(iqn.parse::<ExportName>().is_err(), "{iqn:?} was taken");
        }
    }

    #[test]
    fn what_only_looks_like_ours_is_left_alone() {
        for nqn in [
            "",
            "nqn.2014-08.org.nvmexpress.discovery",
            "nqn.2026-11.io.drover:vol-1:7",
            "nqn.2026-11.io.drover:vol-1:7:",
            "nqn.2026-11.io.drover:vol-1:+7:ab",
            "nqn.2026-11.io.drover:vol-1:07:ab",
            "nqn.2026-11.io.drover:vol-1:-1:ab",
            "nqn.2026-11.io.drover:../x:7:ab",
            "nqn.2026-11.io.drover:vol-1:7:ab:cd",
            "nqn.2026-11.io.drover:vol-1:7:ab,hostnqn=x",
            "nqn.2026-11.io.drover:vol-1:7:ab\n",
            "nqn.2026-11.io.drover:vol-1:99999999999999999999:ab",
        ] {
            assert!(nqn.parse::<ExportName>().is_err(), "{nqn:?} was taken");
        }
    }
}

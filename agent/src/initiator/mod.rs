//! The workload node's side: connects to exports, makes and mounts file
//! systems, hands them to pods, and lets go again.
//!
//! It owns nothing that must survive it. What is attached stands in sysfs
//! ([`fabric`], [`nvme`], [`iscsi`]), what is mounted in mountinfo, what this node may use
//! is the controller's to say; so a restarted agent goes on where the one
//! before stopped, and nothing is disconnected because an agent restarted.
//! Two things are kept in memory: since when a NodeUnstage has been refused
//! because somebody holds the device, a clock that starts afresh with the agent
//! and when the volume is staged again; and which mounts are drover's own
//! ([`places`]).
//!
//! Per volume one operation at a time. Whatever may wait for an attached
//! device runs in a child with a deadline ([`child`]).
//!
//! A volume at a staging path, as the kernel shows it:
//!
//! ```text
//!            stage                     publish
//!  nothing --------> connected -------------------> bound to a target
//!     ^              (+ mounted at the staging <---
//!     |               path, unless raw block)   unpublish
//!     |   unstage        |
//!     +------------------+  by the verdict on who holds the disk (unstage.rs)
//! ```
//!
//! It refuses: to format what was ever written or cannot be read ([`device`]),
//! to unmount what is not the volume's, to cut off a live holder before its
//! deadline while the volume is this node's, and to use a disk whose gate is
//! closed ([`gate`]).

mod child;
mod child_calls;
mod child_ops;
mod device;
#[cfg(any(test, fuzzing))]
pub(crate) mod doors;
mod fabric;
mod fabrics;
mod gate;
mod iscsi;
mod metrics;
mod mountinfo;
mod node;
mod nursery;
mod nursery_main;
mod nvme;
mod open_iscsi;
mod places;
mod publish;
mod records_lock;
mod refusals;
mod staging;
mod steps;
mod superblock;
mod sysfs;
mod unstage;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio::sync::OwnedMutexGuard;

pub use child::Children;
pub use device::DeviceDeadlines;
pub use fabric::{
    Attached, DevNumber, Device, ExportName, Fabric, IQN_PREFIX, NQN_PREFIX, NotOurs,
};
pub use fabrics::Fabrics;
pub use iscsi::Iscsi;
pub use nursery_main::child_main;
pub use nvme::{FabricDeadlines, Nvme};
pub use open_iscsi::OpenIscsi;
pub use sysfs::Roots;

use crate::attach::ports::{
    Attachment, Control, ControlError, Disk, HostIdentity, NodeError, NodeGate, Note, Witness,
};
use crate::ids::{Epoch, NodeId, VolumeId};
use child_ops::Op;
use device::Devices;
use metrics::{Metrics, Operation};
use mountinfo::Mount;
use places::Places;
use refusals::Refusals;
use steps::Steps;

/// How an initiator is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The node's name.
    pub node: NodeId,
    /// Deadlines of what is done to devices.
    pub device: DeviceDeadlines,
    /// How long the controller may take to answer.
    pub control: Duration,
    /// How long a call waits for another one on the same volume.
    pub turn: Duration,
    /// How long a live holder may keep NodeUnstage from ending where the
    /// controller cannot be asked.
    pub busy_deadline: Duration,
}

impl Settings {
    /// The defaults for a node.
    pub fn of(node: NodeId) -> Self {
        Self {
            node,
            device: DeviceDeadlines::default(),
            control: Duration::from_secs(10),
            turn: Duration::from_secs(30),
            busy_deadline: Duration::from_secs(120),
        }
    }
}

/// The workload node's side of every volume on this node. Performs
/// [`Staging`](crate::attach::ports::Staging) and
/// [`Node`](crate::attach::ports::Node).
pub struct Initiator {
    settings: Settings,
    fabric: Arc<dyn Fabric>,
    devices: Devices,
    control: Arc<dyn Control>,
    witness: Arc<dyn Witness>,
    gate: Arc<dyn NodeGate>,
    metrics: Metrics,
    places: Places,
    turns: Mutex<HashMap<VolumeId, Arc<tokio::sync::Mutex<()>>>>,
    refusals: Refusals,
}

/// A disk of this node that is a volume.
#[derive(Debug, Clone)]
pub struct AttachedDisk {
    /// Whose bytes it shows.
    pub volume: VolumeId,
    /// The epoch of its export.
    pub epoch: Epoch,
    /// The disk.
    pub disk: Disk,
    /// Where drover has it mounted.
    pub mounts: Vec<PathBuf>,
}

/// Whose a mount is.
#[derive(Debug)]
enum Whose {
    /// It shows the disk of this export of the volume.
    Volume(Attached),
    /// Its disk has gone.
    Dead,
    /// Something else.
    Foreign,
}

impl Initiator {
    /// An initiator over any fabric.
    pub fn new(
        settings: Settings,
        fabric: Arc<dyn Fabric>,
        children: Children,
        control: Arc<dyn Control>,
        witness: Arc<dyn Witness>,
        gate: Arc<dyn NodeGate>,
    ) -> Arc<Self> {
        let devices = Devices::new(children, settings.device);
        Arc::new(Self {
            settings,
            fabric,
            devices,
            control,
            witness,
            gate,
            metrics: Metrics::new(),
            places: Places::default(),
            turns: Mutex::default(),
            refusals: Refusals::default(),
        })
    }

    /// The kernel's own initiator, as this binary's agent uses it.
    pub fn of_this_kernel(
        settings: Settings,
        host: HostIdentity,
        control: Arc<dyn Control>,
        witness: Arc<dyn Witness>,
        gate: Arc<dyn NodeGate>,
    ) -> Arc<Self> {
        let children = Children::of_this_binary();
        let deadlines = FabricDeadlines::default();
        let roots = Roots::default();
        let fabric = Fabrics {
            nvme: Nvme::new(roots.clone(), host.clone(), children.clone(), deadlines),
            iscsi: Iscsi::new(roots, host, children.clone(), OpenIscsi::of_this_host()),
        };
        Self::new(settings, Arc::new(fabric), children, control, witness, gate)
    }

    /// Whether this node's kernel can prove itself over NVMe/TCP, for the
    /// agent's registration.
    pub async fn proves(&self) -> bool {
        self.fabric.proves().await
    }

    /// The exports that this node's kernel is connected to now, for the
    /// agent's registration.
    pub fn attached(&self) -> Result<Vec<(VolumeId, Epoch)>, NodeError> {
        let mut found: Vec<_> = self
            .fabric
            .attached()?
            .into_iter()
            .map(|attached| (attached.name.volume, attached.name.epoch))
            .collect();
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// Every disk that a volume has here. While one export is followed by
    /// another, a volume has two.
    pub fn disks(&self) -> Result<Vec<AttachedDisk>, NodeError> {
        let attached = self.fabric.attached()?;
        let mounts = mountinfo::mounts()?;
        let disks = attached.into_iter().filter_map(|attached| {
            let device = attached.device?;
            Some(AttachedDisk {
                mounts: self.places.of(&attached.name.volume, &mounts, &device),
                volume: attached.name.volume,
                epoch: attached.name.epoch,
                disk: device.disk,
            })
        });
        Ok(disks.collect())
    }

    /// The disk of a volume's newest export here, and where drover has it
    /// mounted. None: it is not attached, or has no disk yet.
    pub fn disk(&self, volume: &VolumeId) -> Result<Option<(Disk, Vec<PathBuf>)>, NodeError> {
        let attached = self.attached_of(volume)?;
        let newest = attached
            .into_iter()
            .max_by_key(|attached| attached.name.epoch);
        let Some(device) = newest.and_then(|attached| attached.device) else {
            return Ok(None);
        };
        let own = self.places.of(volume, &mountinfo::mounts()?, &device);
        Ok(Some((device.disk, own)))
    }

    /// At start: says what an earlier agent left attached, and takes its mounts
    /// for drover's own. No attachment is changed; what leads to none is tidied up.
    pub fn adopt(&self) -> Result<Vec<Attached>, NodeError> {
        if let Err(error) = self.fabric.tidy(None) {
            tracing::warn!(%error, "something that an earlier agent left stays on this host");
        }
        let found = self.fabric.attached()?;
        let mounts = mountinfo::mounts()?;
        for attached in &found {
            let volume = &attached.name.volume;
            if let Some(device) = &attached.device {
                for mount in mounts.iter().filter(|mount| mount.shows(device)) {
                    self.places.add(volume, &mount.point);
                }
            }
            tracing::info!(
                volume = %attached.name.volume,
                epoch = %attached.name.epoch,
                disk = attached.device.as_ref().map(|d| d.disk.name.as_str()),
                links = ?attached.links,
                "adopted an attachment"
            );
        }
        Ok(found)
    }

    /// Adds this initiator's metrics to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.metrics.register(&self.devices.children, registry);
    }

    /// Waits for this volume's turn.
    async fn turn(&self, volume: &VolumeId) -> Result<OwnedMutexGuard<()>, NodeError> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            turns.entry(volume.clone()).or_default().clone()
        };
        tokio::time::timeout(self.settings.turn, turn.lock_owned())
            .await
            .map_err(|_| {
                NodeError::Busy(format!(
                    "another operation on volume {volume} is under way on this node for more than {:?}; try again",
                    self.settings.turn
                ))
            })
    }

    /// What this node may use of the volume now.
    async fn attachment(&self, volume: &VolumeId) -> Result<Attachment, ControlError> {
        let answer = self.control.attachment(volume, &self.settings.node);
        match tokio::time::timeout(self.settings.control, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(ControlError::Unreachable(format!(
                "no answer within {:?} to what volume {volume} is to node {}",
                self.settings.control, self.settings.node
            ))),
        }
    }

    /// The volume's exports that are attached here.
    fn attached_of(&self, volume: &VolumeId) -> Result<Vec<Attached>, NodeError> {
        let mut all = self.fabric.attached()?;
        all.retain(|attached| attached.name.volume == *volume);
        Ok(all)
    }

    fn whose(&self, mount: &Mount, attached: &[Attached]) -> Whose {
        let shown = attached
            .iter()
            .find(|a| a.device.as_ref().is_some_and(|d| mount.shows(d)));
        match shown {
            Some(attached) => Whose::Volume(attached.clone()),
            None if mount.is_dead_node()
                || (mount.number.major != 0 && !self.fabric.is_there(mount.number)) =>
            {
                Whose::Dead
            }
            None => Whose::Foreign,
        }
    }

    /// Detaches a mount from the tree; what still uses it goes on by itself.
    async fn detach(&self, point: &Path, steps: &mut Steps) -> Result<(), NodeError> {
        let op = Op::Unmount {
            path: point.to_owned(),
            detach: true,
        };
        let deadline = self.settings.device.unmount;
        let (_, took) = self.devices.children.run(&op, deadline).await?;
        steps.kernel("detach", took);
        Ok(())
    }

    /// Disconnects and waits until the kernel no longer shows the export; what
    /// the gates know of disks that have gone is forgotten, however it ends.
    async fn disconnect(&self, name: &ExportName, steps: &mut Steps) -> Result<(), NodeError> {
        let result = self.end_links(name, steps).await;
        self.gate.sweep();
        result
    }

    async fn end_links(&self, name: &ExportName, steps: &mut Steps) -> Result<(), NodeError> {
        let started = Instant::now();
        self.fabric.disconnect(name).await?;
        let deadline = self.settings.device.appear;
        while self.fabric.attached()?.iter().any(|a| a.name == *name) {
            if started.elapsed() > deadline {
                return Err(NodeError::Deadline {
                    what: format!("the kernel's end of {name}"),
                    deadline,
                });
            }
            tokio::time::sleep(POLL).await;
        }
        steps.kernel("disconnect", started.elapsed());
        Ok(())
    }

    /// Writes a line of the journal, without making anybody wait for it.
    fn note(&self, kind: &str, volume: &VolumeId, text: String, detail: Value) {
        tracing::info!(%volume, kind, "{text}");
        let note = Note {
            time: SystemTime::now(),
            volume: Some(volume.clone()),
            node: Some(self.settings.node.clone()),
            kind: kind.to_owned(),
            text,
            detail,
        };
        let control = self.control.clone();
        let deadline = self.settings.control;
        tokio::spawn(async move {
            if tokio::time::timeout(deadline, control.note(note))
                .await
                .is_err()
            {
                tracing::warn!("the controller did not take a line of the journal in time");
            }
        });
    }

    fn observe<T>(
        &self,
        operation: Operation,
        steps: &Steps,
        result: Result<T, NodeError>,
    ) -> Result<T, NodeError> {
        self.metrics
            .observe(operation, result.is_ok(), steps.elapsed());
        if let Err(error) = &result {
            tracing::warn!(?operation, %error, "a node operation failed");
        }
        result
    }
}

/// How often sysfs is read while something is waited for.
const POLL: Duration = Duration::from_millis(5);

/// A path as mountinfo writes it: its folder resolved, its last part as it is,
/// so that nothing mounted there is touched. None: the folder does not exist.
fn resolve(path: &Path) -> Result<Option<PathBuf>, NodeError> {
    let parts = (path.is_absolute(), path.parent(), path.file_name());
    let (true, Some(folder), Some(name)) = parts else {
        return Err(NodeError::Failed(format!(
            "path {} must be absolute and name a file or folder",
            path.display()
        )));
    };
    match folder.canonicalize() {
        Ok(folder) => Ok(Some(folder.join(OsStr::new(name)))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(NodeError::Failed(format!(
            "resolve {}: {e}",
            folder.display()
        ))),
    }
}

#[cfg(test)]
#[path = "bench_tests.rs"]
mod bench;

#[cfg(test)]
#[path = "gate_tests.rs"]
mod gate_when;

#[cfg(test)]
#[path = "held_tests.rs"]
mod held;

#[cfg(test)]
#[path = "life_tests.rs"]
mod life;

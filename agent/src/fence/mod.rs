//! The node's gates: a disk whose epoch has ended refuses at once, by eBPF.
//!
//! When a fence ends an epoch, the old node's kernel may go on for minutes with
//! what it has of the volume: writers that retry, dirty pages, processes in D
//! state. So its disk is shut there first, in this order ([`GateLayer`]):
//!
//! | layer      | how                                         | what it stops                          |
//! |------------|---------------------------------------------|----------------------------------------|
//! | `bio`      | kprobe on `should_fail_bio` that overrides  | every bio: writeback, journals, mmap   |
//! |            | its return (CONFIG_BPF_KPROBE_OVERRIDE)     |                                        |
//! | `files`    | LSM programs (`bpf` in the kernel's `lsm=`) | calls on files: read, write, io_uring, |
//! |            |                                             | splice, fallocate, clone, ioctl, mmap, |
//! |            |                                             | truncate, names, attributes, mounts    |
//! | `opens`    | device program of the root cgroup           | opens by device number: /dev, mount,   |
//! |            |                                             | device mapper, swap; EPERM             |
//! | `shutdown` | XFS_IOC_GOINGDOWN, EXT4_IOC_SHUTDOWN        | the file system: dirty pages, journal, |
//! |            | ([`shutdown`], in a child)                  | msync and fsync of what was mapped     |
//! | `removal`  | the initiator disconnects                   | all else                               |
//!
//! The first three are one change of a map, some microseconds, and wait for
//! nothing; they are here. The other two are the initiator's. Where a kernel
//! offers none of the three, the last two do it all, later. The home's gate is
//! the fence in any case: no receipt depends on a node.
//!
//! A gate's key is the disk's sequence number, which the kernel gives once. So
//! no gate is ever opened: the volume's next epoch comes as another disk, and
//! the entry of a disk that has gone is garbage ([`Gates::sweep`]).
//!
//! Maps and links are pinned in bpffs, a folder for each node name. So a gate
//! stays closed when the agent is killed. Its successor, of whatever version,
//! loads programs of its own over the same maps and puts each link in the place
//! of the old one only when it is attached: no instant passes without either.
//!
//! What no layer but `bio` stops, before the file system is shut down or the
//! disk gone: stores to pages that are mapped already and their writeback,
//! fsync of what was dirty, and users inside the kernel (loop, device mapper,
//! nvmet, swap) that had the disk before. Passthrough (/dev/ng*, /dev/sg*,
//! /dev/bsg/*) is refused by `files` and, for new opens, by `opens`, and counted
//! as `passthrough`.
//!
//! It refuses to run anything else on a disk, and opens none.

mod cgroup;
mod detached;
mod exempt;
mod layout;
mod loader;
mod maps;
mod metrics;
mod numbers;
mod pins;
pub mod shutdown;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_ebpf::gate::{Gate, Hook};
use prometheus_client::registry::Registry;

use self::maps::Maps;
use self::numbers::Numbers;
use crate::attach::ports::{Disk, GateLayer, NodeError, NodeGate};
use crate::evidence::btf::BtfError;
use crate::ids::{Epoch, NodeId, VolumeId};

/// Why a gate, or a part of it, is not there.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// A file of the kernel's could not be read.
    #[error("read {}: {error}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The kernel's types are not what drover knows.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// The eBPF object, or a program of it, could not be loaded.
    #[error("{0}")]
    Load(String),
    /// Something could not be pinned, or its place in bpffs not be made.
    #[error("{call} {}: {error}", path.display())]
    Pin {
        /// The call.
        call: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A map could not be read or changed.
    #[error("eBPF map {map}: {why}")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        why: String,
    },
}

/// What came of one hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookReport {
    /// Which.
    pub hook: Hook,
    /// Why no program of this agent sits there.
    pub failure: Option<String>,
    /// Whether a program refuses there: this agent's, or one that an earlier
    /// agent left.
    pub holds: bool,
}

/// What came of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerReport {
    /// Which.
    pub layer: GateLayer,
    /// Why this kernel does not offer it; none: it does.
    pub failure: Option<String>,
}

/// A gate that is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// The disk's sequence number.
    pub diskseq: u64,
    /// The volume, as far as its name can be read.
    pub volume: String,
    /// The epoch that ended.
    pub epoch: Epoch,
}

/// What the layer `files` is made of on every kernel. Not of it: the hooks that
/// came with later kernels (file_ioctl_compat, file_truncate, uring_cmd), and
/// path_truncate; to set a size asks inode_setattr as well.
const FILES: [Hook; 18] = [
    Hook::FileOpen,
    Hook::FilePermission,
    Hook::FileIoctl,
    Hook::MmapFile,
    Hook::FileMprotect,
    Hook::InodeCreate,
    Hook::InodeLink,
    Hook::InodeUnlink,
    Hook::InodeSymlink,
    Hook::InodeMkdir,
    Hook::InodeRmdir,
    Hook::InodeMknod,
    Hook::InodeRename,
    Hook::InodeSetattr,
    Hook::InodeSetxattr,
    Hook::InodeRemovexattr,
    Hook::SbSetMntOpts,
    Hook::SbRemount,
];

/// This node's gates.
pub struct Gates {
    sys: PathBuf,
    pins: PathBuf,
    kernel: Result<Mutex<Maps>, String>,
    hooks: Vec<HookReport>,
}

impl Gates {
    /// Loads the programs and takes over what an earlier agent of this node
    /// left closed. Where nothing can be loaded, the gates say why and close
    /// nothing.
    pub fn start(node: &NodeId) -> Arc<Self> {
        let (pins, loaded) = match pins::folder(node) {
            Ok(pins) => {
                let loaded = loader::load(&pins);
                (pins, loaded)
            }
            Err(error) => (PathBuf::new(), Err(error)),
        };
        let (kernel, hooks) = match loaded {
            Ok((maps, hooks)) => (Ok(Mutex::new(maps)), hooks),
            Err(error) => (Err(error.to_string()), Vec::new()),
        };
        let gates = Arc::new(Self {
            sys: "/sys".into(),
            pins,
            kernel,
            hooks,
        });
        gates.sweep();
        gates.tell();
        gates
    }

    fn tell(&self) {
        for hook in &self.hooks {
            if let Some(why) = &hook.failure {
                tracing::debug!(hook = hook.hook.name(), %why, "gate: this kernel refused a program");
            }
        }
        for report in self.layers() {
            let layer = report.layer.name();
            match report.failure {
                None => tracing::info!(layer, "gate: layer is up"),
                Some(why) => tracing::warn!(layer, %why, "gate: layer is not to be had"),
            }
        }
        for closed in self.closed() {
            tracing::info!(
                volume = closed.volume,
                epoch = %closed.epoch,
                diskseq = closed.diskseq,
                "gate: an earlier agent has closed it"
            );
        }
    }

    fn maps(&self) -> Option<MutexGuard<'_, Maps>> {
        // A panic elsewhere leaves nothing half done: every change is one call.
        let maps = self.kernel.as_ref().ok()?;
        Some(maps.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What came of each hook; none where nothing could be loaded.
    pub fn hooks(&self) -> &[HookReport] {
        &self.hooks
    }

    /// What came of each layer.
    pub fn layers(&self) -> Vec<LayerReport> {
        let of = |layer| LayerReport {
            layer,
            failure: match layer {
                GateLayer::Bio => self.failure(Hook::Bio),
                GateLayer::Files => FILES.iter().find_map(|hook| {
                    let why = self.failure(*hook)?;
                    Some(format!("{}: {why}", hook.name()))
                }),
                GateLayer::Opens => self.failure(Hook::Opens),
                // Every kernel has them; whether they did is said each time.
                GateLayer::Shutdown | GateLayer::Removal => None,
            },
        };
        GateLayer::ALL.into_iter().map(of).collect()
    }

    fn failure(&self, hook: Hook) -> Option<String> {
        if let Err(why) = &self.kernel {
            return Some(why.clone());
        }
        let report = self.hooks.iter().find(|report| report.hook == hook);
        match report {
            Some(report) if report.holds => None,
            Some(report) => Some(report.failure.clone().unwrap_or_default()),
            None => Some("the object has no such program".to_owned()),
        }
    }

    /// Every gate that is closed.
    pub fn closed(&self) -> Vec<Closed> {
        let Some(maps) = self.maps() else {
            return Vec::new();
        };
        match maps.gates() {
            Ok(gates) => gates
                .into_iter()
                .map(|(diskseq, gate)| Closed {
                    diskseq,
                    volume: name_of(&gate),
                    epoch: Epoch(gate.epoch),
                })
                .collect(),
            Err(error) => {
                tracing::warn!(%error, "the closed gates cannot be listed");
                Vec::new()
            }
        }
    }

    /// How often each hook refused.
    ///
    /// # Errors
    /// [`GateError::Map`].
    pub fn refused(&self) -> Result<Vec<(Hook, u64)>, GateError> {
        match self.maps() {
            Some(maps) => maps.refused(),
            None => Ok(Vec::new()),
        }
    }

    /// Shows layers, closed gates and refusals as metrics.
    pub fn register_metrics(self: &Arc<Self>, registry: &mut Registry) {
        registry.register_collector(Box::new(metrics::Metrics(Arc::clone(self))));
    }

    /// Where maps and links are pinned.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    fn forget_gone(&self) -> Result<(), GateError> {
        let Some(mut maps) = self.maps() else {
            return Ok(());
        };
        let closed = maps.gates()?;
        let there = match closed.is_empty() {
            true => HashSet::new(),
            false => numbers::disks(&self.sys)?,
        };
        let kept: HashSet<u64> = closed
            .iter()
            .map(|(diskseq, _)| *diskseq)
            .filter(|diskseq| there.contains(diskseq))
            .collect();
        maps.keep(&kept)
    }
}

fn name_of(gate: &Gate) -> String {
    let text = gate.volume.split(|byte| *byte == 0).next();
    String::from_utf8_lossy(text.unwrap_or_default()).into_owned()
}

fn gate_of(volume: &VolumeId, epoch: Epoch) -> Gate {
    let mut gate = Gate {
        epoch: epoch.0,
        closed_ns: boottime(),
        volume: [0; 64],
    };
    let name = volume.as_str().as_bytes();
    let length = name.len().min(gate.volume.len());
    gate.volume[..length].copy_from_slice(&name[..length]);
    gate
}

fn boottime() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    // It fails for unknown clocks only.
    let now = std::time::Duration::from(now.expect("every kernel has CLOCK_BOOTTIME"));
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

impl NodeGate for Gates {
    fn close(
        &self,
        disk: &Disk,
        volume: &VolumeId,
        epoch: Epoch,
    ) -> Result<Vec<GateLayer>, NodeError> {
        let Some(mut maps) = self.maps() else {
            return Ok(Vec::new());
        };
        let failed = |error: GateError| {
            NodeError::Failed(format!("close the gate of {}: {error}", disk.name))
        };
        let gate = gate_of(volume, epoch);
        maps.close(disk.diskseq.0, &gate).map_err(failed)?;
        // The disk itself is shut; now what leads to it under another number.
        let opens = Numbers::of(&self.sys, disk).and_then(|numbers| {
            for path in &numbers.paths {
                maps.close(*path, &gate)?;
            }
            maps.lead(&numbers.nodes, disk.diskseq.0)
        });
        if let Err(error) = &opens {
            tracing::warn!(disk = disk.name, %error, "gate: new opens are not refused by number");
        }
        Ok(self
            .layers()
            .into_iter()
            .filter(|report| report.failure.is_none())
            .map(|report| report.layer)
            .filter(|layer| match layer {
                GateLayer::Bio | GateLayer::Files => true,
                GateLayer::Opens => opens.is_ok(),
                GateLayer::Shutdown | GateLayer::Removal => false,
            })
            .collect())
    }

    fn is_closed(&self, disk: &Disk) -> Result<bool, NodeError> {
        let Some(maps) = self.maps() else {
            return Ok(false);
        };
        maps.is_closed(disk.diskseq.0).map_err(|error| {
            NodeError::Failed(format!(
                "tell whether the gate of {} is closed: {error}",
                disk.name
            ))
        })
    }

    fn sweep(&self) {
        if let Err(error) = self.forget_gone() {
            tracing::warn!(%error, "gates of disks that have gone are not forgotten yet");
        }
    }

    fn exemptions(&self) -> Option<PathBuf> {
        self.kernel.is_ok().then(|| self.pins.join(maps::EXEMPT))
    }
}

#[cfg(test)]
mod root_tests;

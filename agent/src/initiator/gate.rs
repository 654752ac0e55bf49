//! Shutting a disk here, layer by layer: by eBPF at once, then the file system
//! on it, and then the disk is disconnected.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::child_ops::{Answer, Node, Op};
use super::fabric::{Attached, Device};
use super::mountinfo;
use super::steps::Steps;
use super::{Initiator, POLL};
use crate::attach::ports::{GateLayer, GateReport, NodeError};
use crate::ids::{Epoch, VolumeId};

/// How long the shutdown of a file system may hold up the disk's removal,
/// which ends what the shutdown waits for.
const SHUTDOWN: Duration = Duration::from_secs(2);
/// How often an agent that has just started tries to end what one before it
/// had shut and not yet let go of.
const AGAIN: Duration = Duration::from_secs(5);
/// How often the gates of disks that have gone are forgotten.
const SWEEP: Duration = Duration::from_secs(2);

/// What was shut so far.
#[derive(Debug)]
pub(super) struct Shutting {
    started: Instant,
    layers: Vec<GateLayer>,
    shut_in: Duration,
}

impl Shutting {
    /// The same for receipts and notes.
    pub(super) fn report(&self) -> GateReport {
        GateReport {
            layers: self.layers.clone(),
            shut_in: self.shut_in,
            took: self.started.elapsed(),
        }
    }

    /// Keeps of the layers those that closed on every disk.
    pub(super) fn closed(&mut self, layer: GateLayer, everywhere: bool) {
        if everywhere {
            self.layers.push(layer);
        }
    }
}

/// Where the file system on a disk is mounted, as far as it is seen here.
pub(super) fn shown(device: &Device) -> Option<PathBuf> {
    let mut mounts = mountinfo::mounts().ok()?.into_iter();
    let mount = mounts.find(|m| m.number == device.number)?;
    Some(mount.point)
}

impl Initiator {
    /// Shuts the disks of attachments by eBPF. It waits for nothing, not for
    /// the volume's turn either.
    pub(super) fn shut(&self, ended: &[Attached]) -> Shutting {
        let started = Instant::now();
        let mut layers: Option<Vec<GateLayer>> = None;
        for attached in ended {
            let Some(device) = &attached.device else {
                continue;
            };
            let name = &attached.name;
            let closed = self
                .gate
                .close(&device.disk, &name.volume, name.epoch)
                .unwrap_or_else(|error| {
                    tracing::warn!(volume = %name.volume, %error, "a gate is not closed");
                    Vec::new()
                });
            match &mut layers {
                None => layers = Some(closed),
                Some(all) => all.retain(|layer| closed.contains(layer)),
            }
        }
        Shutting {
            started,
            layers: layers.unwrap_or_default(),
            shut_in: started.elapsed(),
        }
    }

    /// Shuts the file system on a disk down, wherever it is mounted, within a
    /// deadline. Whether that is done; true as well where none is mounted.
    pub(super) async fn shut_file_system(&self, device: &Device, steps: &mut Steps) -> bool {
        let op = Op::ShutDown {
            device: Node::from(&device.disk),
            shown: shown(device),
            exemptions: self.gate.exemptions(),
        };
        match self.devices.children.run(&op, SHUTDOWN).await {
            Ok((Answer::ShutDown { mounted }, took)) => {
                if mounted {
                    steps.kernel("shutdown", took);
                }
                true
            }
            Ok((other, _)) => {
                tracing::warn!(?other, "a shutdown was answered with something else");
                false
            }
            Err(error) => {
                tracing::warn!(disk = device.disk.name, %error, "the file system is not shut down; its disk goes all the same");
                false
            }
        }
    }

    /// What is shut for good and still attached: an agent before this one had
    /// no time to let go of it.
    pub(super) fn left_shut(&self) -> Result<Vec<Attached>, NodeError> {
        self.only_shut(self.fabric.attached()?)
    }

    fn only_shut(&self, attached: Vec<Attached>) -> Result<Vec<Attached>, NodeError> {
        let mut shut = Vec::new();
        for attached in attached {
            if self.is_shut(&attached)? {
                shut.push(attached);
            }
        }
        Ok(shut)
    }

    /// Ends what an earlier agent had shut. A closed gate is never opened, so
    /// whether the volume's epoch has ended or its holder was only cut off, its
    /// disk has to go; a new epoch, or a new connection of this one, brings
    /// another.
    pub(super) async fn finish_shut(&self) {
        loop {
            let left = match self.left_shut() {
                Ok(left) => left,
                Err(error) => {
                    tracing::warn!(%error, "cannot tell what an earlier agent has shut");
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            };
            if left.is_empty() {
                return;
            }
            for attached in left {
                let name = &attached.name;
                tracing::info!(volume = %name.volume, epoch = %name.epoch, "ending what an earlier agent had shut");
                if let Err(error) = self.end_shut(&name.volume, name.epoch).await {
                    tracing::warn!(volume = %name.volume, %error, "what an earlier agent had shut is attached still");
                }
            }
            tokio::time::sleep(POLL).await;
            if self.left_shut().is_ok_and(|left| !left.is_empty()) {
                tokio::time::sleep(AGAIN).await;
            }
        }
    }

    /// As long as the agent runs: ends what an earlier one had shut, and forgets
    /// disks that have gone. The kernel gives the number of one that went late,
    /// after its disconnect had been given up, to another disk at once.
    pub async fn keep_gates(&self) {
        let sweeps = async {
            loop {
                self.gate.sweep();
                tokio::time::sleep(SWEEP).await;
            }
        };
        let ((), ()) = tokio::join!(self.finish_shut(), sweeps);
    }

    /// Ends those of a volume's disks that are shut when its turn comes: until
    /// then the same epoch may have been staged anew, on a disk that lives.
    async fn end_shut(&self, volume: &VolumeId, epoch: Epoch) -> Result<(), NodeError> {
        let _turn = self.turn(volume).await?;
        let ended = self.only_shut(self.ended(volume, epoch)?)?;
        let mut shutting = self.shut(&ended);
        self.end(volume, epoch, &ended, &mut shutting).await?;
        Ok(())
    }
}

//! NodeStage: from the controller's answer to a mounted file system.
//!
//! Idempotent by looking, not by remembering: a volume is staged when its
//! current export's disk is what is mounted at the staging path. What an
//! earlier epoch left there is dead (the home fenced it before it granted the
//! new one), and is cleaned away first.

use std::path::Path;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::device::MountJob;
use super::fabric::{Attached, Device, ExportName};
use super::metrics::Operation;
use super::mountinfo::{self, Mount, name_of};
use super::steps::Steps;
use super::{Initiator, POLL, Whose, resolve};
use crate::attach::ports::{
    Access, Attachment, FsType, NodeError, PublishRequest, StageRequest, Staging, Target, Usage,
};
use crate::ids::{Bytes, VolumeId};

#[async_trait]
impl Staging for Initiator {
    async fn stage(&self, request: &StageRequest) -> Result<(), NodeError> {
        let mut steps = Steps::begin();
        let result = self.stage_in_turn(request, &mut steps).await;
        self.observe(Operation::Stage, &steps, result)
    }

    async fn unstage(&self, volume: &VolumeId, staging: &Path) -> Result<(), NodeError> {
        let mut steps = Steps::begin();
        let result = self.unstage_in_turn(volume, staging, &mut steps).await;
        self.observe(Operation::Unstage, &steps, result)
    }

    async fn publish(&self, request: &PublishRequest) -> Result<(), NodeError> {
        let mut steps = Steps::begin();
        let result = self.publish_in_turn(request, &mut steps).await;
        self.observe(Operation::Publish, &steps, result)
    }

    async fn unpublish(&self, volume: &VolumeId, target: &Path) -> Result<(), NodeError> {
        let mut steps = Steps::begin();
        let result = self.unpublish_in_turn(volume, target, &mut steps).await;
        self.observe(Operation::Unpublish, &steps, result)
    }

    async fn stats(&self, volume: &VolumeId, path: &Path) -> Result<Usage, NodeError> {
        self.room_at(volume, path).await
    }

    async fn expand(
        &self,
        volume: &VolumeId,
        path: &Path,
        at_least: Bytes,
    ) -> Result<Bytes, NodeError> {
        let _turn = self.turn(volume).await?;
        self.grow_at(volume, path, at_least).await
    }
}

/// What stage found at its staging path.
enum Found {
    /// Nothing.
    Nothing,
    /// The volume, as it was asked for.
    Staged,
    /// A mount of a disk that has gone or of an ended epoch.
    Leftover,
}

impl Initiator {
    async fn stage_in_turn(
        &self,
        request: &StageRequest,
        steps: &mut Steps,
    ) -> Result<(), NodeError> {
        let volume = &request.volume;
        let _turn = self.turn(volume).await?;
        let asked = Instant::now();
        let attachment = self.attachment(volume).await?;
        steps.own("controller", asked.elapsed());
        let name = name_of_export(volume, &attachment)?;
        make_folder(&request.staging)?;
        let staging = resolve(&request.staging)?.ok_or_else(|| {
            NodeError::Failed(format!(
                "staging path {} has gone",
                request.staging.display()
            ))
        })?;

        let attached = self.attached_of(volume)?;
        if let Some(newer) = attached.iter().find(|a| a.name.epoch > name.epoch) {
            return Err(NodeError::Failed(format!(
                "volume {volume} is attached here at epoch {}, and the controller says {}: its store is behind; unstage the volume first",
                newer.name.epoch, name.epoch
            )));
        }
        match self.at_staging(request, &attachment, &name, &attached, &staging)? {
            Found::Staged => {
                self.places.add(volume, &staging);
                self.refusals.forget(volume);
                return Ok(());
            }
            Found::Leftover => self.detach(&staging, steps).await?,
            Found::Nothing => {}
        }
        // Also this very export, where its disk was shut: a closed gate is
        // never opened, and the export has not ended, so it is connected anew.
        let mut connected_before = false;
        let mut over = Vec::new();
        for attached in &attached {
            if attached.name == name && !self.is_shut(attached)? {
                connected_before = true;
            } else {
                over.push(&attached.name);
            }
        }
        for over in over {
            self.disconnect(over, steps).await?;
        }

        if !connected_before {
            let took = self.fabric.connect(&attachment.exported.target).await?;
            steps.kernel("connect", took);
        }
        let result = self
            .make_ready(request, &attachment, &name, &staging, steps)
            .await;
        if result.is_ok() {
            self.places.add(volume, &staging);
            self.refusals.forget(volume);
        }
        match &result {
            // A raw block volume that was connected already: a repeat.
            Ok(()) if connected_before && request.access == Access::Block => {}
            Ok(()) => self.note(
                "staged",
                volume,
                format!(
                    "volume {volume} is staged on {} at epoch {}",
                    self.settings.node, name.epoch
                ),
                steps.detail(),
            ),
            // A refusal is final, so nothing that this call attached is left.
            // After a deadline a retry finds the connection and goes on.
            Err(NodeError::Unusable(_) | NodeError::Incompatible(_)) if !connected_before => {
                if let Err(error) = self.disconnect(&name, steps).await {
                    tracing::warn!(%volume, %error, "cannot disconnect a volume that cannot be staged");
                }
            }
            Err(_) => {}
        }
        result
    }

    async fn make_ready(
        &self,
        request: &StageRequest,
        attachment: &Attachment,
        name: &ExportName,
        staging: &Path,
        steps: &mut Steps,
    ) -> Result<(), NodeError> {
        let waited = Instant::now();
        let device = self.disk_of(name, &attachment.exported.target).await?;
        steps.kernel("disk", waited.elapsed());
        if let Err(error) = self.fabric.try_without_end(name, &device) {
            tracing::warn!(%name, %error, "a command that meets the end of its home again and again may fail");
        }
        // Its number may be that of a shut disk that has gone since.
        self.gate.sweep();
        match &request.access {
            Access::Block => Ok(()),
            Access::Mount { fs, flags } => {
                let job = MountJob {
                    volume: &request.volume,
                    disk: &device.disk,
                    ever_written: attachment.exported.ever_written,
                    read_only: attachment.read_only,
                    fs: *fs,
                    flags,
                    point: staging,
                };
                self.devices.mount(&job, steps).await
            }
        }
    }

    /// Judges what is mounted at the staging path, and whether the volume is
    /// in use in another way.
    fn at_staging(
        &self,
        request: &StageRequest,
        attachment: &Attachment,
        name: &ExportName,
        attached: &[Attached],
        staging: &Path,
    ) -> Result<Found, NodeError> {
        let volume = &request.volume;
        let mounts = mountinfo::mounts()?;
        let device = attached
            .iter()
            .find(|a| a.name == *name)
            .and_then(|a| a.device.as_ref());
        let Some(mount) = mountinfo::at(&mounts, staging) else {
            return match (&request.access, device) {
                (Access::Mount { .. }, Some(device))
                    if mounts.iter().any(|m| m.is_node_of(device)) =>
                {
                    Err(NodeError::Incompatible(format!(
                        "volume {volume} is published on this node as a raw block device, and a file system was asked for"
                    )))
                }
                _ => Ok(Found::Nothing),
            };
        };
        match self.whose(mount, attached) {
            Whose::Volume(a) if a.name == *name && !self.is_shut(&a)? => match &request.access {
                Access::Mount { fs, .. } => {
                    same(volume, mount, *fs, attachment.read_only)?;
                    Ok(Found::Staged)
                }
                Access::Block => Err(NodeError::Incompatible(format!(
                    "volume {volume} is staged at {} as a file system ({}), and a raw block device was asked for",
                    staging.display(),
                    mount.fs
                ))),
            },
            Whose::Volume(_) | Whose::Dead => Ok(Found::Leftover),
            Whose::Foreign => Err(NodeError::Incompatible(format!(
                "staging path {} of volume {volume} has something else mounted on it ({} on {}); unmount it first",
                staging.display(),
                mount.fs,
                mount.number
            ))),
        }
    }

    /// Whether an attachment's disk was shut for good.
    pub(super) fn is_shut(&self, attached: &Attached) -> Result<bool, NodeError> {
        match &attached.device {
            Some(device) => self.gate.is_closed(&device.disk),
            None => Ok(false),
        }
    }

    /// Waits for the kernel to make the disk, and checks that it is the one.
    async fn disk_of(&self, name: &ExportName, target: &Target) -> Result<Device, NodeError> {
        // The kernel shows a disk's folder ahead of what is in it.
        self.poll_disk(name, self.settings.device.appear, |device| {
            device.size > Bytes(0) && device.unit.is_some()
        })
        .await
        .and_then(|device| match device.unit {
            Some(found) if found == target.unit => Ok(device),
            found => Err(NodeError::Unusable(format!(
                "{} of export {name} has the identity {}, and {} was granted: it is not the volume's",
                device.disk.name,
                found.map_or("none".to_owned(), |uuid| uuid.to_string()),
                target.unit
            ))),
        })
    }

    /// Waits until the export's disk is there and is as wanted.
    pub(super) async fn poll_disk(
        &self,
        name: &ExportName,
        deadline: Duration,
        wanted: impl Fn(&Device) -> bool + Send,
    ) -> Result<Device, NodeError> {
        let started = Instant::now();
        loop {
            let found = self
                .fabric
                .attached()?
                .into_iter()
                .find(|a| a.name == *name);
            let states = match found {
                Some(Attached {
                    device: Some(device),
                    ..
                }) if wanted(&device) => return Ok(device),
                Some(Attached { links, .. }) => format!("links: {links:?}"),
                None => "no link is left: the home refused it".to_owned(),
            };
            if started.elapsed() >= deadline {
                return Err(NodeError::Deadline {
                    what: format!("the disk of export {name} ({states})"),
                    deadline,
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

/// The export's name, which must be of this volume and epoch.
fn name_of_export(volume: &VolumeId, attachment: &Attachment) -> Result<ExportName, NodeError> {
    let exported = &attachment.exported;
    let name: ExportName = exported
        .target
        .name
        .parse()
        .map_err(|error| NodeError::Failed(format!("the controller's answer: {error}")))?;
    if name.volume == *volume && name.epoch == exported.epoch {
        Ok(name)
    } else {
        Err(NodeError::Failed(format!(
            "the controller's answer for volume {volume} at epoch {} names the export {name}",
            exported.epoch
        )))
    }
}

/// Whether a mount of the volume is what was asked for.
pub(super) fn same(
    volume: &VolumeId,
    mount: &Mount,
    fs: FsType,
    read_only: bool,
) -> Result<(), NodeError> {
    let mode = |read_only| if read_only { "read-only" } else { "read-write" };
    if mount.is(fs) && mount.read_only == read_only {
        return Ok(());
    }
    Err(NodeError::Incompatible(format!(
        "volume {volume} is at {} already, as {} and {}; {} and {} was asked for",
        mount.point.display(),
        mount.fs,
        mode(mount.read_only),
        name_of(fs),
        mode(read_only)
    )))
}

/// Makes the staging folder, unless something is there.
fn make_folder(path: &Path) -> Result<(), NodeError> {
    // mkdir itself never looks below what is mounted there.
    match std::fs::create_dir(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(NodeError::Failed(format!("mkdir {}: {e}", path.display()))),
    }
}

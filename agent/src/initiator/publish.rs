//! NodePublish, NodeUnpublish, room and growth: what is done at a path where a
//! volume is already.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::child_ops::{Answer, Node, Op};
use super::fabric::{Attached, Device, ExportName};
use super::mountinfo::{self, Mount};
use super::staging::same;
use super::steps::Steps;
use super::{Initiator, Whose, resolve};
use crate::attach::ports::{Access, FsType, NodeError, PublishRequest, Usage};
use crate::ids::{Bytes, VolumeId};

/// Mounts stacked on one path that unpublish takes away before it gives up.
pub(super) const STACKED: usize = 16;

/// What a target is to become.
struct Binding {
    source: PathBuf,
    device: Device,
    read_only: bool,
}

impl Initiator {
    pub(super) async fn publish_in_turn(
        &self,
        request: &PublishRequest,
        steps: &mut Steps,
    ) -> Result<(), NodeError> {
        let volume = &request.volume;
        let _turn = self.turn(volume).await?;
        let attached = self.attached_of(volume)?;
        let mounts = mountinfo::mounts()?;
        let binding = self.binding(request, &attached, &mounts)?;
        if self.gate.is_closed(&binding.device.disk)? {
            return Err(NodeError::Unusable(format!(
                "the gate of {} is closed: it was cut off from volume {volume}; unstage the volume and stage it again",
                binding.device.disk.name
            )));
        }
        let target = make_parent(&request.target)?;
        if let Some(mount) = mountinfo::at(&mounts, &target) {
            match self.whose(mount, &attached) {
                Whose::Volume(_) if mount.shows(&binding.device) => {
                    as_asked(request, mount, &binding)?;
                    self.places.add(volume, &target);
                    return Ok(());
                }
                Whose::Volume(_) | Whose::Dead => self.detach(&target, steps).await?,
                Whose::Foreign => {
                    return Err(NodeError::Incompatible(format!(
                        "target path {} of volume {volume} has something else mounted on it ({} on {})",
                        target.display(),
                        mount.fs,
                        mount.number
                    )));
                }
            }
        }
        match request.access {
            Access::Block => {
                self.set_mode(&request.volume, &binding, &mounts, steps)
                    .await?;
                make_file(&target)?;
            }
            Access::Mount { .. } => make_folder(&target)?,
        }
        let op = Op::Bind {
            source: binding.source,
            target: target.clone(),
            read_only: binding.read_only,
        };
        let deadline = self.settings.device.call;
        let (_, took) = self.devices.children.run(&op, deadline).await?;
        steps.kernel("bind", took);
        self.places.add(volume, &target);
        self.note(
            "node-published",
            volume,
            format!("volume {volume} is at {}", target.display()),
            steps.detail(),
        );
        Ok(())
    }

    /// What to bind: the staged file system, or the disk's node.
    fn binding(
        &self,
        request: &PublishRequest,
        attached: &[Attached],
        mounts: &[Mount],
    ) -> Result<Binding, NodeError> {
        let volume = &request.volume;
        let not_staged = || NodeError::NotStaged {
            volume: volume.clone(),
            path: request.staging.clone(),
        };
        let staging = resolve(&request.staging)?.ok_or_else(not_staged)?;
        let mount = mountinfo::at(mounts, &staging);
        match (&request.access, mount) {
            (Access::Mount { fs, .. }, Some(mount)) => {
                let Whose::Volume(Attached {
                    device: Some(device),
                    ..
                }) = self.whose(mount, attached)
                else {
                    return Err(not_staged());
                };
                same(volume, mount, *fs, mount.read_only)?;
                Ok(Binding {
                    source: staging,
                    device,
                    read_only: request.read_only || mount.read_only,
                })
            }
            (Access::Mount { .. }, None) => Err(not_staged()),
            (Access::Block, Some(mount)) => Err(NodeError::Incompatible(format!(
                "volume {volume} is staged at {} as a file system ({}), and a raw block device was asked for",
                staging.display(),
                mount.fs
            ))),
            (Access::Block, None) => {
                let [
                    Attached {
                        device: Some(device),
                        ..
                    },
                ] = attached
                else {
                    return Err(not_staged());
                };
                Ok(Binding {
                    source: device.disk.path(),
                    device: device.clone(),
                    read_only: request.read_only,
                })
            }
        }
    }

    /// A read-only bind of a device node stops no write to the device, so the
    /// disk itself is told; it has one mode for all who use it.
    async fn set_mode(
        &self,
        volume: &VolumeId,
        binding: &Binding,
        mounts: &[Mount],
        steps: &mut Steps,
    ) -> Result<(), NodeError> {
        let device = &binding.device;
        let other = mounts.iter().find(|m| {
            m.is_node_of(device) && m.read_only != binding.read_only && !devtmpfs_itself(m)
        });
        if let Some(other) = other {
            return Err(NodeError::Incompatible(format!(
                "volume {volume} is published at {} in the other mode (read-only or read-write), and a raw block device has one mode for all",
                other.point.display()
            )));
        }
        if device.read_only != binding.read_only {
            let op = Op::SetReadOnly {
                device: Node::from(&device.disk),
                read_only: binding.read_only,
            };
            let deadline = self.settings.device.call;
            let (_, took) = self.devices.children.run(&op, deadline).await?;
            steps.kernel("set-mode", took);
        }
        Ok(())
    }

    pub(super) async fn unpublish_in_turn(
        &self,
        volume: &VolumeId,
        target: &Path,
        steps: &mut Steps,
    ) -> Result<(), NodeError> {
        let _turn = self.turn(volume).await?;
        let Some(target) = resolve(target)? else {
            return Ok(());
        };
        let attached = self.attached_of(volume)?;
        let mut changed = false;
        for _ in 0..STACKED {
            let mounts = mountinfo::mounts()?;
            let Some(mount) = mountinfo::at(&mounts, &target) else {
                break;
            };
            if matches!(self.whose(mount, &attached), Whose::Foreign) {
                return Err(NodeError::Failed(format!(
                    "target path {} has something mounted on it that is not volume {volume} ({} on {}); it is left alone",
                    target.display(),
                    mount.fs,
                    mount.number
                )));
            }
            let op = Op::Unmount {
                path: target.clone(),
                detach: false,
            };
            match self
                .devices
                .children
                .run(&op, self.settings.device.unmount)
                .await
            {
                Ok((_, took)) => steps.kernel("umount", took),
                // Kubelet says that the pod has ended. Who is left below the
                // target keeps what it has open, and NodeUnstage judges it.
                Err(error) if error.errno() == Some(Errno::EBUSY) => {
                    self.detach(&target, steps).await?;
                }
                Err(error) => return Err(error.into()),
            }
            changed = true;
        }
        if mountinfo::at(&mountinfo::mounts()?, &target).is_some() {
            return Err(NodeError::Failed(format!(
                "target path {} has more than {STACKED} mounts on it",
                target.display()
            )));
        }
        self.places.remove(volume, &target);
        remove_empty(&target)?;
        if changed {
            self.note(
                "node-unpublished",
                volume,
                format!("volume {volume} is no longer at {}", target.display()),
                steps.detail(),
            );
        }
        Ok(())
    }

    pub(super) async fn room_at(&self, volume: &VolumeId, path: &Path) -> Result<Usage, NodeError> {
        let (mount, _, device) = self.volume_at(volume, path)?;
        if mount.is_node_of(&device) {
            return Ok(Usage {
                bytes: [device.size.0, 0, 0],
                inodes: None,
            });
        }
        let op = Op::Room { path: mount.point };
        match self
            .devices
            .children
            .run(&op, self.settings.device.call)
            .await?
        {
            (Answer::Room(room), _) => Ok(Usage {
                bytes: room.bytes,
                inodes: Some(room.inodes),
            }),
            (other, _) => Err(NodeError::Failed(format!(
                "statvfs was answered with {other:?}"
            ))),
        }
    }

    pub(super) async fn grow_at(
        &self,
        volume: &VolumeId,
        path: &Path,
        at_least: Bytes,
    ) -> Result<Bytes, NodeError> {
        let (mount, name, _) = self.volume_at(volume, path)?;
        let enough = |device: &Device| device.size >= at_least;
        // The home's event about the new size comes by itself; where it was
        // lost, the kernel is asked to look.
        let appear = self.settings.device.appear;
        let device = match self.poll_disk(&name, appear / 10, enough).await {
            Err(NodeError::Deadline { .. }) => {
                self.fabric.rescan(&name).await?;
                self.poll_disk(&name, appear, enough).await?
            }
            other => other?,
        };
        let fs = [FsType::Ext4, FsType::Xfs]
            .into_iter()
            .find(|fs| mount.is(*fs));
        if let Some(fs) = fs {
            let mut steps = Steps::begin();
            self.devices
                .grow(&device.disk, fs, &mount.point, &mut steps)
                .await?;
        }
        Ok(device.size)
    }

    /// The volume's mount at exactly this path.
    fn volume_at(
        &self,
        volume: &VolumeId,
        path: &Path,
    ) -> Result<(Mount, ExportName, Device), NodeError> {
        let not_there = || NodeError::NotThere {
            volume: volume.clone(),
            path: path.to_owned(),
        };
        let place = resolve(path)?.ok_or_else(not_there)?;
        let mounts = mountinfo::mounts()?;
        let mount = mountinfo::at(&mounts, &place).ok_or_else(not_there)?;
        match self.whose(mount, &self.attached_of(volume)?) {
            Whose::Volume(Attached {
                name,
                device: Some(device),
                ..
            }) => Ok((mount.clone(), name, device)),
            Whose::Dead => Err(NodeError::Unusable(format!(
                "the disk of what is mounted at {} has gone: its epoch has ended; unpublish and unstage it",
                path.display()
            ))),
            Whose::Volume(_) | Whose::Foreign => Err(not_there()),
        }
    }
}

/// A mount of a folder of devtmpfs, not of a node in it.
fn devtmpfs_itself(mount: &Mount) -> bool {
    mount.root == Path::new("/")
}

/// Whether what is at the target is what was asked for.
fn as_asked(request: &PublishRequest, mount: &Mount, binding: &Binding) -> Result<(), NodeError> {
    match &request.access {
        Access::Mount { fs, .. } => same(&request.volume, mount, *fs, binding.read_only),
        Access::Block
            if mount.is_node_of(&binding.device) && mount.read_only == binding.read_only =>
        {
            Ok(())
        }
        Access::Block => Err(NodeError::Incompatible(format!(
            "volume {} is at {} already in another way",
            request.volume,
            mount.point.display()
        ))),
    }
}

/// The target as mountinfo would write it, its folder made where it is missing.
fn make_parent(target: &Path) -> Result<PathBuf, NodeError> {
    if let Some(found) = resolve(target)? {
        return Ok(found);
    }
    let folder = target.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)
        .map_err(|e| NodeError::Failed(format!("mkdir -p {}: {e}", folder.display())))?;
    resolve(target)?
        .ok_or_else(|| NodeError::Failed(format!("target path {} has gone", target.display())))
}

fn make_folder(target: &Path) -> Result<(), NodeError> {
    match fs::create_dir(target) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(NodeError::Failed(format!(
            "mkdir {}: {e}",
            target.display()
        ))),
        _ => Ok(()),
    }
}

fn make_file(target: &Path) -> Result<(), NodeError> {
    let made = OpenOptions::new().write(true).create_new(true).open(target);
    match made {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(NodeError::Failed(format!(
            "create {}: {e}",
            target.display()
        ))),
        _ => Ok(()),
    }
}

/// Removes the target that publish made. A folder with something in it stays
/// and is an error: that would be somebody's data.
fn remove_empty(target: &Path) -> Result<(), NodeError> {
    let failed = |call: &str, e: std::io::Error| match e.kind() {
        ErrorKind::NotFound => Ok(()),
        _ => Err(NodeError::Failed(format!(
            "{call} {}: {e}",
            target.display()
        ))),
    };
    let found = match fs::symlink_metadata(target) {
        Ok(found) => found,
        Err(e) => return failed("stat", e),
    };
    if found.is_dir() {
        fs::remove_dir(target).or_else(|e| failed("rmdir", e))
    } else if found.is_file() && found.len() > 0 {
        Err(NodeError::Failed(format!(
            "target path {} is a file with something in it; it is left alone",
            target.display()
        )))
    } else {
        fs::remove_file(target).or_else(|e| failed("unlink", e))
    }
}

//! NodeUnstage: unmount, judge who is left, disconnect.
//!
//! Kubelet calls it only after every pod has left. Whoever holds the disk then
//! is a backup, or a process that no pod owns, and refusing for ever would be
//! the very fault that drover ends. So:
//!
//! | who is left                           | the volume is this node's      | its epoch has ended |
//! |---------------------------------------|--------------------------------|---------------------|
//! | nobody                                | sync, disconnect               | the same            |
//! | registered readers only               | sync, cut them off, disconnect | the same            |
//! | a writer, somebody unexplained, or a  | refuse until the deadline that | sync and cut off    |
//! | file system still claims the disk     | began with the first refusal,  | at once             |
//! |                                       | then sync and cut off          |                     |
//!
//! Cutting off ends nobody's process: its reads and writes fail with EIO. The
//! disk's gate is closed, the file system shut down, its mounts are detached,
//! and the disk is disconnected. A sync goes before that, with a deadline, and
//! reaches the file system also where this namespace shows no mount of it. Where
//! the epoch has ended it is tried as well: the home refuses it at once if it has
//! fenced the epoch, and what it takes before that is the workload's.
//!
//! That only readers are left, the openers say of the device alone: a file that
//! is registered with an io_uring or on its way over a socket, or a kernel's own
//! (nfsd, overlayfs, loop), no iterator sees. So a file system that readers keep
//! busy is made read-only first. The kernel refuses that while a file is open for
//! writing through any mount, and then that writer is a holder like any other;
//! afterwards nothing is acknowledged any more that the cut would lose.
//!
//! "Claims the disk" is the kernel's own word: an open with O_EXCL fails with
//! EBUSY while a super block lives, in any mount namespace, and also while an
//! earlier umount is still writing back. A sync or umount that hangs has its
//! deadline and is then a holder like any other.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde_json::json;

use super::child::ChildError;
use super::child_ops::{Node, Op};
use super::fabric::{Attached, Device, ExportName};
use super::gate::shown;
use super::mountinfo;
use super::publish::STACKED;
use super::steps::Steps;
use super::{Initiator, Whose, resolve};
use crate::attach::ports::{ControlError, Judgement, NodeError, Verdict};
use crate::ids::VolumeId;

/// What keeps a disk from being let go, besides those the witness knows.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Claim {
    /// Nothing: it could be claimed, and its cache is written back.
    Free,
    /// The staging mount is busy.
    Mounted,
    /// It is busy, and its file system takes no writes any more.
    ReadOnly,
    /// A super block or a tool has claimed it, or it does not answer; in words.
    Held(String),
}

/// Whether the volume is still this node's.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    /// It is, and a live holder has so long.
    Current(Duration),
    /// It is not: the home has fenced it, or is about to.
    Ended,
}

/// What to do about an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Nobody is left.
    Disconnect,
    /// Only registered readers are left: sync, detach, disconnect.
    CutReaders,
    /// Somebody else is left and has no more time, or the epoch has ended.
    CutHolders,
    /// Somebody else is left and has this much time.
    Refuse(Duration),
}

/// The table of this module's doc.
fn decide(verdict: Verdict, claim: &Claim, standing: &Standing, waited: Duration) -> Ending {
    match (verdict, claim) {
        (Verdict::Quiet, Claim::Free) => return Ending::Disconnect,
        (Verdict::BackupRunning | Verdict::BackupStale, Claim::Free | Claim::ReadOnly) => {
            return Ending::CutReaders;
        }
        // Quiet and yet busy: somebody is there whom the witness does not see.
        (Verdict::Quiet, Claim::Mounted | Claim::ReadOnly | Claim::Held(_))
        | (Verdict::BackupRunning | Verdict::BackupStale, Claim::Mounted | Claim::Held(_))
        | (Verdict::Live | Verdict::Unknown, _) => {}
    }
    match standing {
        Standing::Ended => Ending::CutHolders,
        Standing::Current(deadline) => match deadline.checked_sub(waited) {
            None | Some(Duration::ZERO) => Ending::CutHolders,
            Some(left) => Ending::Refuse(left),
        },
    }
}

/// How often a busy mount or disk, or one with a stranger on it, is tried,
/// [`PAUSE`] apart, before it counts as held: a process that only looks (statfs, blkid, a copy of the mount namespace
/// that ends) keeps it for a moment, and kubelet's next call comes much later.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(50);

/// The holders in words, and what the claim met.
fn who(judgement: &Judgement, claim: &Claim) -> String {
    let mut all = judgement.holders_in_words();
    match claim {
        Claim::Free => {}
        Claim::Mounted | Claim::ReadOnly => all.push("the staging mount is busy".to_owned()),
        Claim::Held(why) => all.push(why.clone()),
    }
    if all.is_empty() {
        judgement.reason.clone()
    } else {
        format!("{} ({})", all.join("; "), judgement.reason)
    }
}

impl Initiator {
    pub(super) async fn unstage_in_turn(
        &self,
        volume: &VolumeId,
        staging: &Path,
        steps: &mut Steps,
    ) -> Result<(), NodeError> {
        let _turn = self.turn(volume).await?;
        let attached = self.attached_of(volume)?;
        let mut claim = Claim::Free;
        let mut changed = !attached.is_empty();
        let place = resolve(staging)?;
        if let Some(place) = &place {
            claim = self
                .unmount_staging(volume, place, &attached, &mut changed, steps)
                .await?;
        }
        let mut cut = Vec::new();
        for attached in &attached {
            cut.extend(
                self.let_go(attached, place.as_deref(), &claim, steps)
                    .await?,
            );
        }
        if let Err(error) = self.fabric.tidy(Some(volume)) {
            tracing::warn!(%volume, %error, "something of its exports is left on this host");
        }
        if let Some(place) = &place {
            self.places.remove(volume, place);
        }
        if changed {
            let text = if cut.is_empty() {
                format!("volume {volume} is unstaged from {}", self.settings.node)
            } else {
                format!(
                    "volume {volume} is unstaged from {}; cut off: {}",
                    self.settings.node,
                    cut.join("; ")
                )
            };
            let mut detail = steps.detail();
            detail["cut_off"] = json!(cut);
            self.note("unstaged", volume, text, detail);
        }
        Ok(())
    }

    /// Unmounts the staging path as often as something of the volume's is there.
    async fn unmount_staging(
        &self,
        volume: &VolumeId,
        staging: &Path,
        attached: &[Attached],
        changed: &mut bool,
        steps: &mut Steps,
    ) -> Result<Claim, NodeError> {
        let (mut unmounted, mut busy) = (0, 0);
        while unmounted < STACKED {
            let mounts = mountinfo::mounts()?;
            let Some(mount) = mountinfo::at(&mounts, staging) else {
                return Ok(Claim::Free);
            };
            let dead = match self.whose(mount, attached) {
                Whose::Volume(_) => false,
                Whose::Dead => true,
                Whose::Foreign => {
                    return Err(NodeError::Failed(format!(
                        "staging path {} has something mounted on it that is not volume {volume} ({} on {}); it is left alone",
                        staging.display(),
                        mount.fs,
                        mount.number
                    )));
                }
            };
            let op = Op::Unmount {
                path: staging.to_owned(),
                detach: false,
            };
            *changed = true;
            let deadline = self.settings.device.unmount;
            match self.devices.children.run(&op, deadline).await {
                Ok((_, took)) => {
                    unmounted += 1;
                    steps.kernel("umount", took);
                }
                // Nothing can be saved any more, and nobody can write.
                Err(_) if dead => {
                    unmounted += 1;
                    self.detach(staging, steps).await?;
                }
                Err(error) if error.errno() == Some(Errno::EBUSY) => {
                    busy += 1;
                    if busy == TRIES {
                        return Ok(Claim::Mounted);
                    }
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => match NodeError::from(error) {
                    hangs @ NodeError::Deadline { .. } => {
                        return Ok(Claim::Held(hangs.to_string()));
                    }
                    other => return Err(other),
                },
            }
        }
        Err(NodeError::Failed(format!(
            "staging path {} has more than {STACKED} mounts on it",
            staging.display()
        )))
    }

    /// Ends one attachment, or says who keeps it. Whom it cut off, if anybody.
    async fn let_go(
        &self,
        attached: &Attached,
        staging: Option<&Path>,
        unmounted: &Claim,
        steps: &mut Steps,
    ) -> Result<Option<String>, NodeError> {
        let name = &attached.name;
        let Some(device) = &attached.device else {
            self.disconnect(name, steps).await?;
            return Ok(None);
        };
        let mut claim = match unmounted {
            Claim::Free => self.claim(device, steps).await,
            busy => busy.clone(),
        };
        let own: Vec<PathBuf> = staging.into_iter().map(Path::to_owned).collect();
        let judgement = self.judge(device, &own, steps).await;
        let readers = [Verdict::BackupRunning, Verdict::BackupStale];
        if claim == Claim::Mounted && readers.contains(&judgement.verdict) {
            claim = self.end_writes(device, steps).await;
        }

        let waited = self.refusals.waited(name);
        // Who is let go at once in any case need not ask the controller.
        let mut ending = decide(
            judgement.verdict,
            &claim,
            &Standing::Current(Duration::MAX),
            waited,
        );
        if matches!(ending, Ending::Refuse(_)) {
            let standing = self.standing(name).await;
            ending = decide(judgement.verdict, &claim, &standing, waited);
        }
        let who = who(&judgement, &claim);
        let cut = match ending {
            Ending::Refuse(left) => {
                let why = format!(
                    "volume {} cannot be unstaged yet, {} is held by {who}; it is cut off in {:.0} s",
                    name.volume,
                    device.disk.name,
                    left.as_secs_f64()
                );
                // Kubelet asks again and again; the journal hears it once.
                if self.refusals.note(name, judgement) {
                    let detail = steps.detail();
                    self.note("unstage-refused", &name.volume, why.clone(), detail);
                }
                return Err(NodeError::Busy(why));
            }
            Ending::Disconnect => None,
            Ending::CutReaders | Ending::CutHolders => {
                self.write_back(device, steps).await;
                self.cut_off(attached, device, steps).await?;
                Some(who)
            }
        };
        self.disconnect(name, steps).await?;
        self.refusals.forget(&name.volume);
        Ok(cut)
    }

    /// Judges who holds the disk. A stranger who only reads gets a moment to be
    /// gone: udev looks at every disk that a writer has just closed.
    async fn judge(&self, device: &Device, own: &[PathBuf], steps: &mut Steps) -> Judgement {
        let asked = Instant::now();
        let mut judgement = self.witness.judge(&device.disk, own).await;
        for _ in 1..TRIES {
            let stranger = judgement.holders.iter().any(|h| !h.registered);
            if judgement.verdict != Verdict::Unknown || !stranger {
                break;
            }
            tokio::time::sleep(PAUSE).await;
            judgement = self.witness.judge(&device.disk, own).await;
        }
        steps.own("judge", asked.elapsed());
        judgement
    }

    /// Makes the file system read-only that readers keep busy, unless a writer
    /// keeps it too.
    async fn end_writes(&self, device: &Device, steps: &mut Steps) -> Claim {
        let op = Op::EndWrites {
            device: Node::from(&device.disk),
        };
        // Busy for a reader, too, for the moment in which a file's time is noted.
        match self.unless_busy(&op, "read-only", steps).await {
            Ok(()) => Claim::ReadOnly,
            Err(error) if error.errno() == Some(Errno::EBUSY) => Claim::Held(format!(
                "a file on {} that is open for writing",
                device.disk.name
            )),
            Err(error) => Claim::Held(error.to_string()),
        }
    }

    /// Has a child do something with the disk, and again while it is busy, up to
    /// [`TRIES`] times.
    async fn unless_busy(
        &self,
        op: &Op,
        step: &'static str,
        steps: &mut Steps,
    ) -> Result<(), ChildError> {
        let mut tries = 1;
        loop {
            match self
                .devices
                .children
                .run(op, self.settings.device.sync)
                .await
            {
                Ok((_, took)) => {
                    steps.kernel(step, took);
                    return Ok(());
                }
                Err(error) if error.errno() == Some(Errno::EBUSY) && tries < TRIES => {
                    tries += 1;
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Claims the disk for a moment and writes its cache back.
    async fn claim(&self, device: &Device, steps: &mut Steps) -> Claim {
        let op = Op::SyncDevice {
            device: Node::from(&device.disk),
        };
        let error = match self.unless_busy(&op, "sync", steps).await {
            Ok(()) => return Claim::Free,
            Err(error) => error,
        };
        match error.errno() {
            Some(Errno::EBUSY) => Claim::Held(format!(
                "a file system or tool that has claimed {}",
                device.disk.name
            )),
            // The disk has gone or fails for good, as after a fence:
            // there is nothing left that could be written back.
            Some(errno) => {
                tracing::warn!(disk = device.disk.name, %errno, %error, "the disk took no sync");
                Claim::Free
            }
            None => Claim::Held(error.to_string()),
        }
    }

    /// Whether the attachment's epoch is still the one that counts.
    async fn standing(&self, name: &ExportName) -> Standing {
        match self.attachment(&name.volume).await {
            Ok(now) if now.exported.target.name == name.as_str() => {
                Standing::Current(now.busy_deadline)
            }
            Ok(_) | Err(ControlError::NotPublished { .. }) => Standing::Ended,
            // A controller that knows nothing of the volume may have an old store.
            Err(
                error @ (ControlError::NoVolume(_)
                | ControlError::Unreachable(_)
                | ControlError::Failed(_)),
            ) => {
                tracing::warn!(volume = %name.volume, %error, "cannot ask whether the volume is still this node's");
                Standing::Current(self.settings.busy_deadline)
            }
        }
    }

    /// Writes the disk back, within its deadline; wherever its file system is
    /// mounted, or only kept by an open file.
    async fn write_back(&self, device: &Device, steps: &mut Steps) {
        let sync = Op::WriteBack {
            device: Node::from(&device.disk),
            shown: shown(device),
        };
        let deadline = self.settings.device.sync;
        match self.devices.children.run(&sync, deadline).await {
            Ok((_, took)) => steps.kernel("sync", took),
            Err(error) => {
                tracing::warn!(disk = device.disk.name, %error, "no sync before the holders are cut off");
            }
        }
    }

    /// Shuts the disk and the file system on it, and takes every mount of it
    /// out of this namespace's tree.
    async fn cut_off(
        &self,
        attached: &Attached,
        device: &Device,
        steps: &mut Steps,
    ) -> Result<(), NodeError> {
        let shutting = self.shut(std::slice::from_ref(attached));
        steps.own("gate", shutting.report().shut_in);
        self.shut_file_system(device, steps).await;
        let mounts = mountinfo::mounts()?;
        let points = mounts.iter().rev().filter(|m| m.shows(device));
        for point in points.map(|m| m.point.as_path()) {
            self.detach(point, steps).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "unstage_tests.rs"]
mod tests;

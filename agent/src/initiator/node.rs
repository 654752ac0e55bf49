//! What the controller asks of this node. Best effort: no receipt depends on it.

use std::time::{Duration, Instant};

use async_trait::async_trait;

use serde_json::json;

use super::fabric::Attached;
use super::gate::Shutting;
use super::mountinfo;
use super::steps::Steps;
use super::{Initiator, POLL};
use crate::attach::ports::{GateLayer, Judgement, Node, NodeAnswer, NodeError, Verdict};
use crate::ids::{Epoch, TicketId, VolumeId};

/// How many holders of a shut disk a receipt tells at most.
const HOLDERS: usize = 16;
/// How long the look at them may hold up the disk's removal, which ends what
/// they hold.
const LOOK: Duration = Duration::from_secs(1);

#[async_trait]
impl Node for Initiator {
    /// The home has fenced these epochs, so what is attached of them is dead.
    /// It is shut at once, whatever else goes on with the volume here, and then
    /// disconnected, that nothing hangs there. Mounts are left to NodeUnstage
    /// and NodeUnpublish, which find them dead.
    async fn release(&self, volume: &VolumeId, epoch: Epoch) -> NodeAnswer {
        let ended = match self.ended(volume, epoch) {
            Ok(ended) => ended,
            Err(error) => return NodeAnswer::Held(error.to_string()),
        };
        let mut shutting = self.shut(&ended);
        let judgement = self.judge_shut(&ended).await;
        let held = match self.release_in_turn(volume, epoch, &mut shutting).await {
            Ok(held) if held.is_empty() => None,
            Ok(held) => Some(format!("still mounted: {}", held.join(", "))),
            Err(error) => Some(error.to_string()),
        };
        match held {
            None if ended.is_empty() => NodeAnswer::Clean,
            Some(held) if ended.is_empty() => NodeAnswer::Held(held),
            held => NodeAnswer::Shut {
                gate: shutting.report(),
                judgement: judgement.map(Box::new),
                held,
            },
        }
    }

    /// Foreign readers cannot be asked to stop; this only sees whether they have.
    async fn interrupt(&self, volume: &VolumeId, _ticket: &TicketId, grace: Duration) -> bool {
        let started = Instant::now();
        loop {
            match self.readers_are_gone(volume).await {
                Ok(true) => return true,
                Ok(false) => {}
                Err(error) => tracing::warn!(%volume, %error, "cannot tell who reads the volume"),
            }
            if started.elapsed() >= grace {
                return false;
            }
            tokio::time::sleep(POLL * 10).await;
        }
    }
}

impl Initiator {
    /// What is attached of a volume's epochs up to `epoch`.
    pub(super) fn ended(
        &self,
        volume: &VolumeId,
        epoch: Epoch,
    ) -> Result<Vec<Attached>, NodeError> {
        let mut ended = self.attached_of(volume)?;
        ended.retain(|attached| attached.name.epoch <= epoch);
        Ok(ended)
    }

    /// Who holds the disks that have just been shut, for the receipt; none where
    /// there is none. Of several disks, the worst verdict. Of one that the kernel
    /// was quicker to remove, what NodeUnstage saw last. It asks no disk.
    async fn judge_shut(&self, ended: &[Attached]) -> Option<Judgement> {
        let look = tokio::time::timeout(LOOK, self.worst_of(ended)).await;
        look.unwrap_or_else(|_| {
            Some(Judgement {
                verdict: Verdict::Unknown,
                reason: format!("who holds it was not told within {LOOK:?}"),
                holders: Vec::new(),
            })
        })
    }

    async fn worst_of(&self, ended: &[Attached]) -> Option<Judgement> {
        let mut worst: Option<Judgement> = None;
        for attached in ended {
            let Some(device) = &attached.device else {
                continue;
            };
            let volume = &attached.name.volume;
            let own = mountinfo::mounts().map(|mounts| self.places.of(volume, &mounts, device));
            let own = own.unwrap_or_default();
            let mut found = self.witness.judge(&device.disk, &own).await;
            if !self.fabric.is_there(device.number) {
                found = self.refusals.judge_gone(&attached.name, found);
            }
            found.holders.truncate(HOLDERS);
            let rank = |judged: &Judgement| Verdict::ALL.iter().position(|v| *v == judged.verdict);
            if worst
                .as_ref()
                .is_none_or(|worst| rank(&found) < rank(worst))
            {
                worst = Some(found);
            }
        }
        worst
    }

    /// Ends what has been fenced; the mounts that are left of it.
    async fn release_in_turn(
        &self,
        volume: &VolumeId,
        epoch: Epoch,
        shutting: &mut Shutting,
    ) -> Result<Vec<String>, NodeError> {
        let _turn = self.turn(volume).await?;
        let ended = self.ended(volume, epoch)?;
        // What was being attached when the others were shut.
        self.shut(&ended);
        self.end(volume, epoch, &ended, shutting).await
    }

    /// Disconnects what is shut; the mounts that are left of it. The caller has
    /// the volume's turn.
    pub(super) async fn end(
        &self,
        volume: &VolumeId,
        epoch: Epoch,
        ended: &[Attached],
        shutting: &mut Shutting,
    ) -> Result<Vec<String>, NodeError> {
        let mut steps = Steps::begin();
        let mut held = Vec::new();
        let mut down = true;
        for device in ended.iter().filter_map(|attached| attached.device.as_ref()) {
            down &= self.shut_file_system(device, &mut steps).await;
        }
        shutting.closed(GateLayer::Shutdown, down && !ended.is_empty());
        for attached in ended {
            self.disconnect(&attached.name, &mut steps).await?;
            let Some(device) = &attached.device else {
                continue;
            };
            let mounts = mountinfo::mounts()?;
            let points = mounts.iter().filter(|m| m.number == device.number);
            held.extend(points.map(|m| m.point.display().to_string()));
        }
        shutting.closed(GateLayer::Removal, true);
        if !ended.is_empty() {
            self.refusals.forget(volume);
        }
        if !ended.is_empty() {
            let text = format!(
                "node {} let go of volume {volume} up to epoch {epoch}",
                self.settings.node
            );
            let mut detail = steps.detail();
            detail["gate"] = json!(shutting.report());
            self.note("released", volume, text, detail);
        }
        Ok(held)
    }

    async fn readers_are_gone(&self, volume: &VolumeId) -> Result<bool, NodeError> {
        for attached in self.attached_of(volume)? {
            let Some(device) = attached.device else {
                continue;
            };
            let own = self.places.of(volume, &mountinfo::mounts()?, &device);
            let found = self.witness.judge(&device.disk, &own).await;
            let reading = found.holders.iter().any(|holder| holder.registered);
            if reading || found.verdict == Verdict::Unknown {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

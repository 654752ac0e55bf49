//! What the controller asks of this node. Best effort: no receipt depends on it.

use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::mountinfo;
use super::steps::Steps;
use super::{Initiator, POLL};
use crate::attach::ports::{Node, NodeAnswer, NodeError, Verdict};
use crate::ids::{Epoch, TicketId, VolumeId};

#[async_trait]
impl Node for Initiator {
    /// The home has fenced these epochs, so what is attached of them is dead:
    /// it is disconnected, that nothing hangs there. Mounts are left to
    /// NodeUnstage and NodeUnpublish, which find them dead.
    async fn release(&self, volume: &VolumeId, epoch: Epoch) -> NodeAnswer {
        match self.release_in_turn(volume, epoch).await {
            Ok(held) if held.is_empty() => NodeAnswer::Clean,
            Ok(held) => NodeAnswer::Held(format!("still mounted: {}", held.join(", "))),
            Err(error) => NodeAnswer::Held(error.to_string()),
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
    async fn release_in_turn(
        &self,
        volume: &VolumeId,
        epoch: Epoch,
    ) -> Result<Vec<String>, NodeError> {
        let _turn = self.turn(volume).await?;
        let mut steps = Steps::begin();
        let mut held = Vec::new();
        let mut ended = self.attached_of(volume)?;
        ended.retain(|attached| attached.name.epoch <= epoch);
        for attached in &ended {
            self.disconnect(&attached.name, &mut steps).await?;
            let Some(device) = &attached.device else {
                continue;
            };
            let mounts = mountinfo::mounts()?;
            let points = mounts.iter().filter(|m| m.number == device.number);
            held.extend(points.map(|m| m.point.display().to_string()));
        }
        if !ended.is_empty() {
            let text = format!(
                "node {} let go of volume {volume} up to epoch {epoch}",
                self.settings.node
            );
            self.note("released", volume, text, steps.detail());
        }
        Ok(held)
    }

    async fn readers_are_gone(&self, volume: &VolumeId) -> Result<bool, NodeError> {
        for attached in self.attached_of(volume)? {
            let Some(device) = attached.device else {
                continue;
            };
            let own: Vec<_> = mountinfo::mounts()?
                .into_iter()
                .filter(|m| m.shows(&device))
                .map(|m| m.point)
                .collect();
            let found = self.witness.judge(&device.disk, &own).await;
            let reading = found.holders.iter().any(|holder| holder.registered);
            if reading || found.verdict == Verdict::Unknown {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

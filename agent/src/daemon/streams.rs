//! Tells the controller how the agent's backup streams are doing: a stream
//! that progresses keeps its ticket, one that ended gives it back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::json;
use tokio::time::MissedTickBehavior;

use crate::attach::ports::{Control, ControlError, Note};
use crate::backup::Phase;
use crate::backup::keeper::{Job, Keeper, KeptStream};
use crate::ids::{NodeId, TicketId};
use crate::rpc::controller_client::ControllerClient;
use crate::rpc::controller_service::BACKUP_LEASE;

/// Reports one agent's streams.
pub(super) struct Reporter {
    node: NodeId,
    keeper: Arc<Keeper>,
    control: ControllerClient,
    /// What was last told of each stream: its phase, and bytes moved.
    told: Mutex<HashMap<TicketId, (Phase, u64)>>,
}

impl Reporter {
    pub(super) fn new(node: NodeId, keeper: Arc<Keeper>, control: ControllerClient) -> Self {
        Self {
            node,
            keeper,
            control,
            told: Mutex::default(),
        }
    }

    /// Tells what is new of every stream, every so often and at each stream's
    /// end. What cannot be told now is told the next time.
    pub(super) async fn run(&self, every: Duration) {
        let mut every = tokio::time::interval(every);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = every.tick() => {}
                () = self.keeper.an_end() => {}
            }
            self.look_after_streams().await;
        }
    }

    async fn look_after_streams(&self) {
        for kept in self.keeper.list() {
            let id = kept.job.id().clone();
            if let Err(error) = self.tell(&kept).await {
                tracing::debug!(stream = %id, %error, "the controller was not told of a stream");
            }
        }
    }

    async fn tell(&self, kept: &KeptStream) -> Result<(), ControlError> {
        let id = kept.job.id();
        let phase = kept
            .progress
            .as_ref()
            .map_or(Phase::Interrupted, |p| p.phase);
        if phase.ended() && !kept.at_rest {
            return Ok(());
        }
        let moved = kept
            .progress
            .as_ref()
            .map_or(0, |p| p.bytes_done + p.bytes_uploaded);
        let before = self.told().insert(id.clone(), (phase, moved));
        let told = match (phase, before) {
            (_, Some(before)) if before == (phase, moved) => Ok(()),
            (Phase::Starting | Phase::Running, _) => {
                self.control
                    .renew_ticket(kept.job.volume(), id, BACKUP_LEASE)
                    .await
            }
            (Phase::Interrupted | Phase::Done | Phase::Failed, Some((told, _)))
                if told == phase =>
            {
                Ok(())
            }
            (Phase::Interrupted, _) => self.interrupted(kept).await,
            (Phase::Done | Phase::Failed, _) => self.ended(kept, phase).await,
        };
        match &told {
            Ok(()) if phase.ended() => self.keeper.told(id),
            Ok(()) => {}
            Err(_) => drop(self.told().remove(id)),
        }
        told
    }

    async fn interrupted(&self, kept: &KeptStream) -> Result<(), ControlError> {
        // A restore that an agent's end cut short has left half a volume.
        if matches!(kept.job, Job::Restore(_)) {
            return self.ended(kept, Phase::Failed).await;
        }
        self.control
            .end_ticket(kept.job.volume(), kept.job.id(), "the backup was stopped")
            .await
    }

    async fn ended(&self, kept: &KeptStream, phase: Phase) -> Result<(), ControlError> {
        let (id, volume) = (kept.job.id(), kept.job.volume());
        let error = kept.progress.as_ref().and_then(|p| p.error.clone());
        let done = phase == Phase::Done;
        match &kept.job {
            Job::Restore(_) if !done => self.control.delete_volume(volume).await?,
            Job::Backup(spec) if done || kept.beyond_resume => {
                self.control.delete_snapshot(&spec.snapshot).await?;
            }
            _ => {}
        }
        let what = match (&kept.job, done) {
            (Job::Backup(_), true) => "backup is whole",
            (Job::Backup(_), false) => "backup failed",
            (Job::Restore(_), true) => "restore is whole",
            (Job::Restore(_), false) => "restore failed, and its volume is deleted",
        };
        let why = error
            .clone()
            .map_or_else(|| what.to_owned(), |error| format!("{what}: {error}"));
        self.control.end_ticket(volume, id, &why).await?;
        self.control.note(self.note(kept, phase, why)).await;
        let resumable = matches!(kept.job, Job::Backup(_)) && !done && !kept.beyond_resume;
        let kept = if resumable {
            self.keeper.mark_stopped(id)
        } else {
            self.keeper.forget(id)
        };
        kept.map_err(|error| ControlError::Failed(error.to_string()))
    }

    fn note(&self, kept: &KeptStream, phase: Phase, text: String) -> Note {
        Note {
            time: SystemTime::now(),
            volume: Some(kept.job.volume().clone()),
            node: Some(self.node.clone()),
            kind: if phase == Phase::Done {
                "backup-done"
            } else {
                "backup-failed"
            }
            .into(),
            text: format!("{}: {text}", kept.job.id()),
            detail: json!({ "ticket": kept.job.id(), "progress": kept.progress }),
        }
    }

    fn told(&self) -> std::sync::MutexGuard<'_, HashMap<TicketId, (Phase, u64)>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

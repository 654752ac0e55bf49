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

/// A restore's ticket ends so long after its last progress. To read a large
/// repository's index, and to sync what was written at the end, moves no bytes.
const RESTORE_LEASE: Duration = Duration::from_secs(600);
/// A restore that has lost its ticket may take so long to stop by itself.
const GRACE: Duration = Duration::from_secs(1);

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
            (Phase::Starting | Phase::Running, _) => self.renew(kept).await,
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

    /// A restore whose ticket has ended stops: its volume goes, or is another's.
    async fn renew(&self, kept: &KeptStream) -> Result<(), ControlError> {
        let (id, volume) = (kept.job.id(), kept.job.volume());
        let lease = match kept.job {
            Job::Backup(_) => BACKUP_LEASE,
            Job::Restore(_) => RESTORE_LEASE,
        };
        let renewed = self.control.renew_ticket(volume, id, lease).await;
        let refused = matches!(
            renewed,
            Err(ControlError::NoVolume(_) | ControlError::Failed(_))
        );
        if refused && matches!(kept.job, Job::Restore(_)) {
            let stopped = self.keeper.interrupt(id, GRACE).await;
            tracing::warn!(stream = %id, ?stopped, "a restore has lost its ticket");
        }
        renewed
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
        // Before the ticket ends: an agent that is killed then has an heir that knows.
        if done && let Err(error) = self.keeper.mark_whole(id) {
            tracing::warn!(stream = %id, %error, "is whole, and an agent after this one will not know");
        }
        let what = match (&kept.job, done) {
            (Job::Backup(_), true) => "backup is whole",
            (Job::Backup(_), false) => "backup failed",
            (Job::Restore(_), true) => "restore is whole",
            (Job::Restore(_), false) => "restore failed",
        };
        let why = error
            .clone()
            .map_or_else(|| what.to_owned(), |error| format!("{what}: {error}"));
        match &kept.job {
            // Only while its ticket stands: else the volume may be in use by now.
            Job::Restore(_) if !done => self.control.fail_restore(volume, id, &why).await?,
            Job::Backup(spec) if done || kept.beyond_resume => {
                self.control.delete_snapshot(&spec.snapshot).await?;
                self.control.end_ticket(volume, id, &why).await?;
            }
            Job::Backup(_) | Job::Restore(_) => self.control.end_ticket(volume, id, &why).await?,
        }
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

#[cfg(test)]
#[path = "streams_tests.rs"]
mod tests;

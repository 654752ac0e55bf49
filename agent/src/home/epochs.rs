//! Exports fenced, and taken up after a restart. Every function here runs under
//! the volume's `epochs` lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Inner;
use super::decide::{self, FenceMove};
use super::frontend::ClosedGate;
use super::site::{InHand, Serving, Site};
use crate::attach::ports::{FenceRequest, HomeError, SettledBy, Settlement};
use crate::ids::{Epoch, VolumeId};
use crate::pool::Volume;
use crate::pool::record::{ExportState, OpenExport, Record};

/// A settlement of an epoch at which nothing was open.
pub(super) fn nothing_open(volume: &VolumeId, epoch: Epoch) -> Settlement {
    Settlement {
        volume: volume.clone(),
        epoch,
        node: None,
        sessions_ended: 0,
        inside_at_close: 0,
        settled_by: SettledBy::NothingOpen,
        unsettled: 0,
        settle_time: Duration::ZERO,
        late_refused: 0,
        last_write: None,
    }
}

impl Inner {
    /// Ends what is open up to an epoch, or answers as it did before. The gate
    /// is closed already.
    pub(super) async fn fence(
        self: &Arc<Self>,
        request: &FenceRequest,
    ) -> Result<Settlement, HomeError> {
        let (volume, site) = self.both(&request.volume)?;
        let record = volume.record().get();
        match decide::fence(&record, request) {
            FenceMove::Refuse(error) => Err(error),
            FenceMove::Repeat(mut settlement) => {
                if settlement.settled_by != SettledBy::NothingOpen {
                    settlement.late_refused = self.late_refused(&record, settlement.late_refused);
                }
                Ok(settlement)
            }
            FenceMove::Note { highest } => {
                let settlement = nothing_open(volume.id(), highest);
                self.record_closed(&volume, &site, None, settlement).await
            }
            FenceMove::Close {
                export,
                inside,
                highest,
            } => self.close(&volume, &site, export, inside, highest, 0).await,
            FenceMove::Behind { recorded } => {
                Err(self.found_behind(&volume, &site, record, recorded).await)
            }
        }
    }

    /// Marks an old copy, on disk, and ends what it had open; the refusal.
    pub(super) async fn found_behind(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        site: &Arc<Site>,
        record: Record,
        recorded: Epoch,
    ) -> HomeError {
        let home = record.highest;
        let marked = self.change(volume, move |record| record.behind = Some(recorded));
        if let Err(error) = marked.await {
            return error;
        }
        tracing::error!(
            volume = %volume.id(), %home, %recorded,
            "the record is behind an epoch it had recorded: the pool is an old copy; the volume is not served"
        );
        self.end_behind(volume, site, record).await;
        HomeError::RecordBehind { home, recorded }
    }

    /// Ends what an old copy had open. The mark in the record keeps it from
    /// opening again, whatever comes of this.
    pub(super) async fn end_behind(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        site: &Arc<Site>,
        record: Record,
    ) {
        site.close(record.highest, self.frontend.as_ref());
        let (export, inside) = match record.export {
            ExportState::Closed => return,
            ExportState::Open { export } => (export, 0),
            ExportState::Closing { export, inside } => (export, inside),
        };
        let ended = self
            .close(volume, site, export, inside, record.highest, 0)
            .await;
        if let Err(error) = ended {
            tracing::warn!(volume = %volume.id(), %error, "an old copy's export has not ended yet");
        }
    }

    /// Settles a closed gate, tells the host and records the closing. The gate
    /// comes first, so that neither a full pool nor a slow log can let a
    /// command in; the settlement is answered last, when all of it is done, so
    /// that a crash in between leaves no proof. So many commands as `accepted`
    /// may be inside still, by the operator's word.
    async fn close(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        site: &Arc<Site>,
        export: OpenExport,
        inside_noted: u32,
        highest: Epoch,
        accepted: u32,
    ) -> Result<Settlement, HomeError> {
        let mut settlement = nothing_open(volume.id(), highest);
        settlement.node = Some(export.node.clone());
        let gate = match site.take_closing() {
            InHand::Gate(gate) => gate,
            InHand::Ended(mut ended) => {
                ended.epoch = highest;
                return self.record_closed(volume, site, Some(export), ended).await;
            }
            InHand::Nothing => {
                // Its process is dead, and this one got the pool's lock only
                // when the last of that one's commands had ended.
                self.frontend.remember_closed(&export.name);
                settlement.settled_by = SettledBy::ExitBarrier;
                settlement.inside_at_close = inside_noted;
                settlement.late_refused = self.frontend.late_refused(&export.name);
                return self
                    .record_closed(volume, site, Some(export), settlement)
                    .await;
            }
            InHand::Lost => return Err(lost_gate(volume.id())),
        };
        let settlement = self
            .settle(volume, site, &export, gate, settlement, accepted)
            .await?;
        site.now().serving = Serving::Ended(settlement.clone());
        if settlement.settled_by == SettledBy::Drained {
            self.metrics.settled(settlement.settle_time);
        }
        self.record_closed(volume, site, Some(export), settlement)
            .await
    }

    /// Records the closing and waits for the commands inside, in parallel; then
    /// tells the hosts. On failure the closed gate goes back to its place.
    async fn settle(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        site: &Arc<Site>,
        export: &OpenExport,
        gate: Box<dyn ClosedGate>,
        mut settlement: Settlement,
        accepted: u32,
    ) -> Result<Settlement, HomeError> {
        settlement.inside_at_close = gate.inside_at_close();
        let closing = ExportState::Closing {
            export: export.clone(),
            inside: settlement.inside_at_close,
        };
        let highest = settlement.epoch;
        let note = self.change(volume, move |record| {
            record.highest = highest;
            record.export = closing;
        });
        let (noted, settled) = tokio::join!(note, gate.settled(self.config.settle));
        let settled = match settled {
            Ok(time) => Ok((SettledBy::Drained, 0, time)),
            Err(inside) if inside <= accepted => Ok((SettledBy::Operator, inside, Duration::ZERO)),
            Err(inside) => Err(HomeError::Unsettled { inside }),
        };
        let mut ends = noted.and(settled);
        if matches!(ends, Ok((SettledBy::Operator, ..))) {
            let volume = Arc::clone(volume);
            let abandoned = self.blocking(move |_| {
                volume.abandon();
                Ok(())
            });
            ends = abandoned.await.and(ends);
        }
        match ends {
            Ok((by, unsettled, time)) => {
                let ended = gate.end().await;
                self.frontend.remember_closed(&export.name);
                settlement.settled_by = by;
                settlement.unsettled = unsettled;
                settlement.settle_time = time;
                settlement.sessions_ended = ended.sessions;
                settlement.late_refused = ended.late_refused;
                settlement.last_write = ended.last_write;
                Ok(settlement)
            }
            Err(error) => {
                site.now().serving = Serving::Closing(Some(gate));
                Err(error)
            }
        }
    }

    /// Records that nothing is open up to the settlement's epoch. Only then is
    /// there a settlement to show.
    async fn record_closed(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        site: &Arc<Site>,
        export: Option<OpenExport>,
        settlement: Settlement,
    ) -> Result<Settlement, HomeError> {
        let kept = settlement.clone();
        let name = export.as_ref().map(|export| export.name.clone());
        self.change(volume, move |record| {
            record.highest = kept.epoch;
            record.export = ExportState::Closed;
            if let Some(export) = export {
                record.remember_closed(&export.name);
            }
            record.settlement = Some(kept);
        })
        .await?;
        site.now().serving = Serving::Nothing;
        if let Some(name) = name {
            let (id, epoch) = (volume.id(), settlement.epoch);
            self.late.ended(id, epoch, &name, Instant::now());
        }
        Ok(settlement)
    }

    /// Takes up one volume's exports as its record holds them: whether one is
    /// open now, and how many identities are remembered as closed.
    pub(super) async fn take_up(
        self: &Arc<Self>,
        volume: &VolumeId,
    ) -> Result<(bool, u32), HomeError> {
        let (volume, site) = self.both(volume)?;
        let record = volume.record().get();
        for name in &record.closed {
            self.frontend.remember_closed(name);
        }
        let closed = u32::try_from(record.closed.len()).unwrap_or(u32::MAX);
        if let Some(error) = decide::behind(&record) {
            return Err(error);
        }
        match &record.export {
            ExportState::Closed => Ok((false, closed)),
            ExportState::Closing { export, .. } => {
                self.frontend.remember_closed(&export.name);
                Ok((false, closed + 1))
            }
            ExportState::Open { export } => {
                self.serve(&volume, &site, export).await?;
                Ok((true, closed))
            }
        }
    }

    /// Makes an old copy the one that counts.
    pub(super) async fn accept(self: &Arc<Self>, volume: &VolumeId) -> Result<Epoch, HomeError> {
        let (volume, site) = self.both(volume)?;
        let record = volume.record().get();
        let Some(recorded) = record.behind else {
            return Ok(record.highest);
        };
        self.end_behind(&volume, &site, record).await;
        if volume.record().get().export != ExportState::Closed {
            return Err(HomeError::Failed(format!(
                "volume {}: the old copy's own export has not ended; ask again",
                volume.id()
            )));
        }
        let settlement = nothing_open(volume.id(), recorded);
        self.change(&volume, move |record| {
            record.behind = None;
            record.highest = recorded;
            record.settlement = Some(settlement);
        })
        .await?;
        Ok(recorded)
    }

    /// Ends an epoch whose fence waits for commands, no more of them than
    /// `accepted`, without their end. One that has ended: as its fence answered.
    pub(super) async fn accept_unsettled(
        self: &Arc<Self>,
        volume: &VolumeId,
        epoch: Epoch,
        accepted: u32,
    ) -> Result<Settlement, HomeError> {
        let (volume, site) = self.both(volume)?;
        let record = volume.record().get();
        match (record.export, record.settlement) {
            (ExportState::Closing { export, inside }, _) if record.highest == epoch => {
                let closed = self.close(&volume, &site, export, inside, epoch, accepted);
                let settlement = closed.await?;
                tracing::warn!(
                    volume = %volume.id(), %epoch, unsettled = settlement.unsettled,
                    "ended by the operator's word, without waiting for the commands inside"
                );
                Ok(settlement)
            }
            (ExportState::Closed, Some(settlement)) if record.highest == epoch => Ok(settlement),
            _ => Err(HomeError::Failed(format!(
                "volume {}: no fence of epoch {epoch} waits for commands here; its home is at epoch {}",
                volume.id(),
                record.highest
            ))),
        }
    }

    /// Changes a volume's record; on disk when this returns.
    pub(super) async fn change(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        change: impl FnOnce(&mut Record) + Send + 'static,
    ) -> Result<Record, HomeError> {
        let volume = Arc::clone(volume);
        self.blocking(move |_| volume.record().update(change)).await
    }

    /// How many commands came late for the identity closed last, by now.
    fn late_refused(&self, record: &Record, before: u64) -> u64 {
        let last = record.closed.last();
        last.map_or(before, |last| self.frontend.late_refused(last).max(before))
    }
}

/// The refusal while a restore writes.
pub(super) fn being_restored(volume: &VolumeId) -> HomeError {
    HomeError::Failed(format!(
        "volume {volume} is being restored; wait for the restore's end, or interrupt it"
    ))
}

fn lost_gate(volume: &VolumeId) -> HomeError {
    HomeError::Failed(format!(
        "volume {volume}: its gate is out of reach, so nobody can tell whether commands are inside; \
         only a restart of the agent ends them for sure"
    ))
}

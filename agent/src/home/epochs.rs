//! Exports opened and fenced. Every function here runs under the volume's
//! `epochs` lock.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::Inner;
use super::decide::{self, ExportMove, FenceMove};
use super::frontend::ClosedGate;
use super::site::{InHand, Serving, Site};
use crate::attach::ports::{
    Chap, ExportRequest, Exported, FenceRequest, HomeError, NAME_MAX, Protocol, SettledBy,
    Settlement, Target, is_iqn,
};
use crate::block::BlockDevice;
use crate::export::{Ended, ExportSpec};
use crate::ids::{Epoch, VolumeId};
use crate::pool::Volume;
use crate::pool::device::FirstWrite;
use crate::pool::record::{ExportState, OpenExport, Record};

/// A subsystem NQN or target IQN that no other export has or had.
fn new_name(protocol: Protocol, volume: &VolumeId, epoch: Epoch) -> String {
    let kind = match protocol {
        Protocol::NvmeTcp => "nqn",
        Protocol::Iscsi => "iqn",
    };
    let once = Uuid::new_v4().simple();
    format!("{kind}.2026-11.io.drover:{volume}:{epoch}:{once}")
}

/// A settlement of an epoch at which nothing was open.
pub(super) fn nothing_open(volume: &VolumeId, epoch: Epoch) -> Settlement {
    Settlement {
        volume: volume.clone(),
        epoch,
        node: None,
        sessions_ended: 0,
        inside_at_close: 0,
        settled_by: SettledBy::NothingOpen,
        settle_time: Duration::ZERO,
        late_refused: 0,
        last_write: None,
    }
}

impl Inner {
    /// Opens an export, or answers as it did before.
    pub(super) async fn export(
        self: &Arc<Self>,
        request: &ExportRequest,
    ) -> Result<Exported, HomeError> {
        let (volume, site) = self.both(&request.volume)?;
        let (floor, restoring) = {
            let now = site.now();
            (now.floor, now.restoring)
        };
        if request.epoch == Epoch(0) {
            return Err(HomeError::Failed(format!(
                "volume {}: epoch 0 is before the first and is never exported",
                request.volume
            )));
        }
        if let Some(why) = self.unfit(request) {
            return Err(HomeError::Failed(format!(
                "volume {}, node {}: {why}",
                request.volume, request.node
            )));
        }
        let export = match decide::export(&volume.record().get(), floor, request) {
            ExportMove::Refuse(error) => return Err(error),
            ExportMove::Repeat(export) => {
                self.serve(&volume, &site, &export).await?;
                export
            }
            ExportMove::Open => {
                if restoring {
                    return Err(being_restored(&request.volume));
                }
                self.open_new(&volume, &site, request).await?
            }
        };
        Ok(Exported {
            epoch: export.epoch,
            target: Target {
                protocol: export.protocol,
                address: self.config.address(export.protocol),
                name: export.name,
                unit: export.unit,
                chap: None,
            },
            ever_written: volume.record().get().ever_written,
        })
    }

    /// The secrets of what the record holds open at an epoch.
    pub(super) fn secrets(&self, volume: &VolumeId, epoch: Epoch) -> Result<Chap, HomeError> {
        let record = self.pool.volume(volume)?.record().get();
        if let Some(error) = decide::behind(&record) {
            return Err(error);
        }
        match record.export {
            ExportState::Open { export } if export.epoch == epoch => export.chap.ok_or_else(|| {
                HomeError::Failed(format!("volume {volume} is not exported over iSCSI"))
            }),
            ExportState::Open { .. } | ExportState::Closing { .. } | ExportState::Closed => {
                Err(HomeError::StaleEpoch {
                    home: record.highest,
                })
            }
        }
    }

    /// Why this home cannot export as it is asked to.
    fn unfit(&self, request: &ExportRequest) -> Option<String> {
        let host = &request.host;
        match request.protocol {
            protocol if !self.frontend.serves(protocol) => Some(format!(
                "this home does not export over {}",
                protocol.name()
            )),
            Protocol::NvmeTcp if host.nqn.is_empty() || host.nqn.len() > NAME_MAX => {
                Some(format!("the host NQN must have 1 to {NAME_MAX} bytes"))
            }
            Protocol::Iscsi if !is_iqn(&host.iqn) => Some(format!(
                "the initiator name {:?} is no IQN in lower case of at most {NAME_MAX} bytes",
                host.iqn
            )),
            Protocol::NvmeTcp | Protocol::Iscsi => None,
        }
    }

    async fn open_new(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        site: &Arc<Site>,
        request: &ExportRequest,
    ) -> Result<OpenExport, HomeError> {
        let name = new_name(request.protocol, &request.volume, request.epoch);
        let chap = match request.protocol {
            Protocol::NvmeTcp => None,
            Protocol::Iscsi => Some(Chap::fresh(&request.host.iqn, &name)),
        };
        let export = OpenExport {
            epoch: request.epoch,
            node: request.node.clone(),
            host: request.host.clone(),
            protocol: request.protocol,
            name,
            unit: Uuid::new_v4(),
            chap,
            read_only: request.read_only,
        };
        // Before the record says open: a volume that cannot be served is not granted.
        let device = self.device(volume).await?;
        let noted = export.clone();
        self.change(volume, move |record| {
            record.highest = noted.epoch;
            record.settlement = None;
            record.export = ExportState::Open { export: noted };
        })
        .await?;
        self.let_in(volume, site, &export, device)?;
        Ok(export)
    }

    async fn device(self: &Arc<Self>, volume: &Volume) -> Result<Arc<FirstWrite>, HomeError> {
        let id = volume.id().clone();
        self.blocking(move |inner| inner.pool.device(&id, &inner.open))
            .await
    }

    /// Serves a recorded export, if it is not served yet.
    async fn serve(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        site: &Arc<Site>,
        export: &OpenExport,
    ) -> Result<(), HomeError> {
        if matches!(site.now().serving, Serving::Open { .. }) {
            return Ok(());
        }
        let device = self.device(volume).await?;
        self.let_in(volume, site, export, device)
    }

    /// Lets the hosts of a recorded export in, unless a fence was quicker.
    fn let_in(
        &self,
        volume: &Volume,
        site: &Site,
        export: &OpenExport,
        device: Arc<FirstWrite>,
    ) -> Result<(), HomeError> {
        {
            let mut now = site.now();
            if now.floor >= export.epoch || !matches!(now.serving, Serving::Nothing) {
                if matches!(now.serving, Serving::Nothing) {
                    // Recorded as open, never opened: the fence that waits for
                    // this call must not look for a dead process's commands.
                    let mut settlement = nothing_open(volume.id(), export.epoch);
                    settlement.node = Some(export.node.clone());
                    now.serving = Serving::Ended(settlement);
                }
                return Err(HomeError::StaleEpoch { home: now.floor });
            }
            let spec = ExportSpec {
                volume: volume.id().clone(),
                epoch: export.epoch,
                subsystem: export.name.clone(),
                namespace: export.unit,
                host: export.host.clone(),
                protocol: export.protocol,
                chap: export.chap.clone(),
                read_only: export.read_only,
                secret: None,
            };
            self.frontend.open(spec, Arc::clone(&device) as _);
            now.serving = Serving::Open {
                epoch: export.epoch,
                name: export.name.clone(),
                device: Arc::clone(&device),
            };
        }
        // The volume may have grown between the device's opening and now.
        if device.size() < volume.size() {
            device.grow(volume.size());
            self.frontend.resized(volume.id());
        }
        Ok(())
    }

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
            } => self.close(&volume, &site, export, inside, highest).await,
            FenceMove::Behind { granted } => {
                self.change(&volume, move |record| record.behind = Some(granted))
                    .await?;
                tracing::error!(
                    volume = %volume.id(), home = %record.highest, %granted,
                    "the record is behind a granted epoch: the pool is an old copy; the volume is not served"
                );
                self.end_behind(&volume, &site, record.clone()).await;
                Err(HomeError::RecordBehind {
                    home: record.highest,
                    granted,
                })
            }
        }
    }

    /// Ends what an old copy had open. The mark in the record keeps it from
    /// opening again, whatever comes of this.
    async fn end_behind(self: &Arc<Self>, volume: &Arc<Volume>, site: &Arc<Site>, record: Record) {
        let (export, inside) = match record.export {
            ExportState::Closed => return,
            ExportState::Open { export } => (export, 0),
            ExportState::Closing { export, inside } => (export, inside),
        };
        let ended = self
            .close(volume, site, export, inside, record.highest)
            .await;
        if let Err(error) = ended {
            tracing::warn!(volume = %volume.id(), %error, "an old copy's export has not ended yet");
        }
    }

    /// Settles a closed gate, tells the host and records the closing. The gate
    /// comes first, so that neither a full pool nor a slow log can let a
    /// command in; the settlement is answered last, when all of it is done, so
    /// that a crash in between leaves no proof.
    async fn close(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        site: &Arc<Site>,
        export: OpenExport,
        inside_noted: u32,
        highest: Epoch,
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
        settlement.settled_by = SettledBy::Drained;
        settlement.inside_at_close = gate.inside_at_close();
        let ended = self.settle(volume, site, &export, gate, highest).await?;
        settlement.settle_time = ended.0;
        settlement.sessions_ended = ended.1.sessions;
        settlement.late_refused = ended.1.late_refused;
        settlement.last_write = ended.1.last_write;
        site.now().serving = Serving::Ended(settlement.clone());
        self.metrics.settled(settlement.settle_time);
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
        highest: Epoch,
    ) -> Result<(Duration, Ended), HomeError> {
        let closing = ExportState::Closing {
            export: export.clone(),
            inside: gate.inside_at_close(),
        };
        let note = self.change(volume, move |record| {
            record.highest = highest;
            record.export = closing;
        });
        let (noted, settled) = tokio::join!(note, gate.settled(self.config.settle));
        let unfinished = match (noted, settled) {
            (Ok(_), Ok(time)) => {
                let ended = gate.end().await;
                self.frontend.remember_closed(&export.name);
                return Ok((time, ended));
            }
            (Err(error), _) => error,
            (Ok(_), Err(inside)) => HomeError::Unsettled { inside },
        };
        site.now().serving = Serving::Closing(Some(gate));
        Err(unfinished)
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
        let Some(granted) = record.behind else {
            return Ok(record.highest);
        };
        self.end_behind(&volume, &site, record).await;
        if volume.record().get().export != ExportState::Closed {
            return Err(HomeError::Failed(format!(
                "volume {}: the old copy's own export has not ended; ask again",
                volume.id()
            )));
        }
        let settlement = nothing_open(volume.id(), granted);
        self.change(&volume, move |record| {
            record.behind = None;
            record.highest = granted;
            record.settlement = Some(settlement);
        })
        .await?;
        Ok(granted)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_identity_is_a_valid_name_and_never_the_same() {
        let volume: VolumeId = "v".repeat(63).parse().unwrap();
        for (protocol, kind) in [(Protocol::NvmeTcp, "nqn"), (Protocol::Iscsi, "iqn")] {
            let one = new_name(protocol, &volume, Epoch(u64::MAX));
            assert!(one.len() <= NAME_MAX, "{} bytes", one.len());
            let begins = format!("{kind}.2026-11.io.drover:{volume}:{}:", u64::MAX);
            assert!(one.starts_with(&begins), "{one}");
            assert_eq!(is_iqn(&one), protocol == Protocol::Iscsi);
            assert_ne!(one, new_name(protocol, &volume, Epoch(u64::MAX)));
        }
    }
}

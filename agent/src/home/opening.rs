//! Exports opened, or opened again. Every function here runs under the volume's
//! `epochs` lock.

use std::sync::Arc;

use uuid::Uuid;

use super::Inner;
use super::decide::{self, ExportMove};
use super::epochs::{being_restored, nothing_open};
use super::site::{Serving, Site};
use crate::attach::ports::{
    Chap, Disclosure, ExportRequest, Exported, HomeError, NAME_MAX, Protocol, Target, is_iqn,
};
use crate::block::BlockDevice;
use crate::export::{ExportSpec, Keeper, Kept, OpenError, Proof};
use crate::ids::{Epoch, VolumeId};
use crate::pool::device::FirstWrite;
use crate::pool::record::{ExportState, OpenExport};
use crate::pool::{Pool, Volume};

/// A subsystem NQN or target IQN that no other export has or had.
fn new_name(protocol: Protocol, volume: &VolumeId, epoch: Epoch) -> String {
    let kind = match protocol {
        Protocol::NvmeTcp => "nqn",
        Protocol::Iscsi => "iqn",
    };
    let once = Uuid::new_v4().simple();
    format!("{kind}.2026-11.io.drover:{volume}:{epoch}:{once}")
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
        let record = volume.record().get();
        let export = match decide::export(&record, floor, request) {
            ExportMove::Refuse(error) => return Err(error),
            ExportMove::Behind { recorded } => {
                return Err(self.found_behind(&volume, &site, record, recorded).await);
            }
            ExportMove::Repeat(export) => {
                self.serve(&volume, &site, &export).await?;
                *export
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
                proves: export.chap.is_some(),
                chap: None,
            },
            ever_written: volume.record().get().ever_written,
        })
    }

    /// What its host may know of what the record holds open at an epoch.
    pub(super) fn disclose(
        &self,
        volume: &VolumeId,
        epoch: Epoch,
    ) -> Result<Disclosure, HomeError> {
        let record = self.pool.volume(volume)?.record().get();
        if let Some(error) = decide::behind(&record) {
            return Err(error);
        }
        match record.export {
            ExportState::Open { export } if export.epoch == epoch => Ok(Disclosure {
                chap: export.chap,
                ever_written: record.ever_written,
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
            Protocol::NvmeTcp if !request.host.proves => {
                tracing::warn!(
                    volume = %request.volume, node = %request.node,
                    "the node's kernel has no DH-HMAC-CHAP: its host NQN alone opens the export"
                );
                None
            }
            Protocol::NvmeTcp => Some(Chap::fresh(&request.host.nqn, &name)),
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
            failed_flush: None,
        };
        // Before the record says open: a volume that cannot be served is not granted.
        let device = self.device(volume).await?;
        let noted = export.clone();
        // Before it as well: those of the export before this one may be damaged.
        let reservations = self.reservations(volume, &export, true).await?;
        self.change(volume, move |record| {
            record.highest = noted.epoch;
            record.settlement = None;
            record.export = ExportState::Open { export: noted };
        })
        .await?;
        self.let_in(volume, site, &export, device, reservations)?;
        Ok(export)
    }

    /// Who keeps an export's reservations, and what was kept before. A new
    /// export begins with none.
    async fn reservations(
        self: &Arc<Self>,
        volume: &Volume,
        export: &OpenExport,
        new: bool,
    ) -> Result<Kept, HomeError> {
        let (id, name) = (volume.id().clone(), export.name.clone());
        self.blocking(move |inner| {
            let state = if new {
                inner.pool.begin_reservations(&id, &name)?;
                None
            } else {
                inner.pool.resume_reservations(&id, &name)?
            };
            let pool = Arc::clone(&inner.pool);
            let keeper = Box::new(InPool { pool, id, name });
            Ok(Kept { keeper, state })
        })
        .await
    }

    async fn device(self: &Arc<Self>, volume: &Volume) -> Result<Arc<FirstWrite>, HomeError> {
        let id = volume.id().clone();
        self.blocking(move |inner| inner.pool.device(&id, &inner.open))
            .await
    }

    /// Serves a recorded export, if it is not served yet.
    pub(super) async fn serve(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        site: &Arc<Site>,
        export: &OpenExport,
    ) -> Result<(), HomeError> {
        if matches!(site.now().serving, Serving::Open { .. }) {
            return Ok(());
        }
        let device = self.device(volume).await?;
        let reservations = self.reservations(volume, export, false).await?;
        self.let_in(volume, site, export, device, reservations)
    }

    /// Lets the hosts of a recorded export in, unless a fence was quicker.
    fn let_in(
        &self,
        volume: &Volume,
        site: &Site,
        export: &OpenExport,
        device: Arc<FirstWrite>,
        reservations: Kept,
    ) -> Result<(), HomeError> {
        let not_opened =
            |error: OpenError| HomeError::Failed(format!("volume {}: {error}", volume.id()));
        let proof = export.chap.as_ref();
        let proof = proof.map(|chap| Proof::of(export.protocol, chap));
        let proof = proof.transpose().map_err(not_opened)?;
        if self.frontend.unsettled(volume.id()).is_some() {
            device.beside_unsettled();
        }
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
                name: export.name.clone(),
                unit: export.unit,
                host: export.host.clone(),
                protocol: export.protocol,
                proof,
                read_only: export.read_only,
            };
            let opened = self
                .frontend
                .open(spec, Arc::clone(&device) as _, reservations);
            opened.map_err(not_opened)?;
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
}

/// Keeps the reservations of one export beside its volume's record.
struct InPool {
    pool: Arc<Pool>,
    id: VolumeId,
    name: String,
}

impl Keeper for InPool {
    fn keep(&self, state: Option<&[u8]>) -> Result<(), String> {
        let kept = self.pool.keep_reservations(&self.id, &self.name, state);
        kept.map_err(|error| error.to_string())
    }
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

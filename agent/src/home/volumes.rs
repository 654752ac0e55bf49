//! Volumes made, grown, copied and deleted, and claimed for restores.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::epochs::being_restored;
use super::site::{Serving, Site};
use super::{Home, Inner, decide, exclusively};
use crate::attach::ports::{Content, HomeError, SnapshotInfo};
use crate::block::BlockDevice;
use crate::export::Unsettled;
use crate::ids::{Bytes, Epoch, SnapshotId, VolumeId};
use crate::pool::lock::PoolLock;
use crate::pool::record::ExportState;
use crate::pool::{PoolError, Volume};

/// A claim on a volume's file. A restore that is whole says so with
/// [`finish`](Self::finish), when its last write has ended. One that is dropped
/// leaves half a volume, which is exported to nobody: its worker may still write.
#[must_use]
pub struct RestoreTarget {
    volume: Arc<Volume>,
    site: Arc<Site>,
    _lock: PoolLock,
}

impl RestoreTarget {
    /// The file to write.
    pub fn path(&self) -> &Path {
        self.volume.path()
    }

    /// The volume's size; the file is that long and must stay so.
    pub fn size(&self) -> Bytes {
        self.volume.size()
    }

    /// Notes that the restore is whole and that its worker has ended: from now
    /// on the file is a volume like others.
    pub fn finish(self) {
        let noted = self
            .volume
            .record()
            .update(|record| record.restoring = false);
        if let Err(error) = noted {
            tracing::error!(
                volume = %self.volume.id(), %error,
                "the end of a restore could not be recorded: the volume counts as half restored"
            );
        }
    }
}

impl Drop for RestoreTarget {
    fn drop(&mut self) {
        self.site.now().restoring = false;
    }
}

/// How often commands that must leave are looked for.
const LOOK: Duration = Duration::from_millis(20);

impl Home {
    /// Makes a volume, under its `data` lock. One that is there answers by what
    /// it was made as, and needs no source: that may be gone by now.
    pub(super) async fn make(
        self,
        id: VolumeId,
        size: Bytes,
        content: Content,
    ) -> Result<(), HomeError> {
        let there = !matches!(self.inner.pool.volume(&id), Err(PoolError::NoVolume(_)));
        let (inner, new) = (Arc::clone(&self.inner), id.clone());
        let made = match &content {
            Content::Volume(source) if !there => {
                let (of, content) = (source.clone(), content.clone());
                let clone = async move {
                    inner.must_be_whole(&of).await?;
                    inner.create(new, size, content).await
                };
                self.data(source, "clone", clone).await
            }
            Content::Empty | Content::Snapshot(_) | Content::Volume(_) => {
                inner.create(new, size, content).await
            }
        };
        if made.is_err() && !there {
            self.inner.forget(&id);
        }
        made
    }
}

impl Inner {
    async fn create(
        self: &Arc<Self>,
        id: VolumeId,
        size: Bytes,
        content: Content,
    ) -> Result<(), HomeError> {
        self.blocking(move |inner| inner.pool.create(&id, size, &content))
            .await
    }

    /// Refuses to copy what a restore writes, what is an old copy, and what a
    /// copy would stop.
    async fn must_be_whole(&self, volume: &VolumeId) -> Result<(), HomeError> {
        let (of, site) = self.both(volume)?;
        let record = of.record().get();
        if let Some(error) = decide::behind(&record).or_else(|| decide::restoring(&record)) {
            return Err(error);
        }
        if site.now().restoring {
            return Err(being_restored(volume));
        }
        self.must_be_settled(volume).await
    }

    /// Refuses what the file system lets wait for all direct I/O on the file
    /// (FICLONE, ftruncate: inode_dio_wait under the inode's lock), while
    /// commands of an ended export have not left: an operator may have said
    /// that they never will, and the next holder's I/O would wait for that lock.
    /// Each fence under writes has some for a moment, so they have as long to
    /// leave as a fence gives them.
    async fn must_be_settled(&self, volume: &VolumeId) -> Result<(), HomeError> {
        let leave = async {
            while self.frontend.unsettled(volume).is_some() {
                tokio::time::sleep(LOOK).await;
            }
        };
        // Whether they left or the time did, they are looked at once more.
        let _ = tokio::time::timeout(self.config.settle, leave).await;
        match self.frontend.unsettled(volume) {
            None => Ok(()),
            Some(Unsettled { epoch, inside }) => Err(HomeError::StillInside {
                volume: volume.clone(),
                epoch,
                inside,
            }),
        }
    }

    pub(super) async fn snapshot(
        self: &Arc<Self>,
        volume: VolumeId,
        id: SnapshotId,
    ) -> Result<SnapshotInfo, HomeError> {
        self.must_be_whole(&volume).await?;
        self.blocking(move |inner| inner.pool.snapshot(&volume, &id))
            .await
    }

    pub(super) async fn expand(
        self: &Arc<Self>,
        volume: VolumeId,
        size: Bytes,
    ) -> Result<Bytes, HomeError> {
        let (of, site) = self.both(&volume)?;
        if site.now().restoring {
            return Err(being_restored(&volume));
        }
        if size > of.size() {
            self.must_be_settled(&volume).await?;
        }
        let id = volume.clone();
        let size = self
            .blocking(move |inner| inner.pool.expand(&id, size))
            .await?;
        let device = match &site.now().serving {
            Serving::Open { device, .. } => Some(Arc::clone(device)),
            Serving::Nothing | Serving::Closing(_) | Serving::Ended(_) => None,
        };
        if let Some(device) = device
            && device.size() < size
        {
            device.grow(size);
            self.frontend.resized(&volume);
        }
        Ok(size)
    }

    pub(super) async fn delete(
        self: &Arc<Self>,
        volume: &VolumeId,
        unused: bool,
    ) -> Result<(), HomeError> {
        let site = self.known(volume)?;
        let inner = Arc::clone(self);
        let id = volume.clone();
        let lock = Arc::clone(&site.epochs);
        let what = format!("delete volume {volume}");
        exclusively(lock, what, self.config.data_deadline, async move {
            inner.delete_closed(&id, unused).await
        })
        .await
    }

    async fn delete_closed(self: &Arc<Self>, id: &VolumeId, unused: bool) -> Result<(), HomeError> {
        let (volume, site) = self.both(id)?;
        let mut record = volume.record().get();
        if record.behind.is_some() {
            // Whoever asks knows that nobody counts on it, and fences it no more.
            self.end_behind(&volume, &site, record).await;
            record = volume.record().get();
        }
        let stale = HomeError::StaleEpoch {
            home: record.highest,
        };
        let refusal = match &record.export {
            ExportState::Open { .. } | ExportState::Closing { .. } => Some(stale),
            ExportState::Closed if unused && (record.highest > Epoch(0) || record.ever_written) => {
                Some(stale)
            }
            ExportState::Closed => {
                let now = site.now();
                if now.restoring {
                    Some(being_restored(id))
                } else if matches!(now.serving, Serving::Nothing) {
                    None
                } else {
                    Some(HomeError::Failed(format!(
                        "volume {id}: its last export has not ended; ask again"
                    )))
                }
            }
        };
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        let gone = id.clone();
        self.blocking(move |inner| inner.pool.delete(&gone)).await?;
        self.forget(id);
        Ok(())
    }

    pub(super) async fn claim(self: &Arc<Self>, id: &VolumeId) -> Result<RestoreTarget, HomeError> {
        let (volume, site) = self.both(id)?;
        let record = volume.record().get();
        if let Some(error) = decide::behind(&record).or_else(|| decide::restoring(&record)) {
            return Err(error);
        }
        let exported = record.highest > Epoch(0) || record.export != ExportState::Closed;
        if record.ever_written || exported {
            return Err(HomeError::Used(id.clone()));
        }
        {
            let mut now = site.now();
            if now.restoring {
                return Err(being_restored(id));
            }
            now.restoring = true;
        }
        // From here on the claim's own end takes this mark away, whatever happens.
        let target = RestoreTarget {
            volume: Arc::clone(&volume),
            site,
            _lock: self.pool.lock().clone(),
        };
        self.change(&volume, |record| {
            record.ever_written = true;
            record.restoring = true;
        })
        .await?;
        Ok(target)
    }
}

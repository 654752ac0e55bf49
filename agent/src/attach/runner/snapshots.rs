//! Snapshots: recorded as intended, taken at home, recorded as whole.
//!
//! A crash in between leaves a record that is not whole. It is finished at the
//! next start, so that neither a name nor space is lost, and whoever asks for
//! the same name again gets that snapshot; but a backup's, whose name nobody else
//! has, is given up, since who was to read it has gone. A deletion is recorded
//! before the home is asked, too: see `ending`.

use std::sync::Arc;
use std::time::SystemTime;

use super::backups::is_a_backups;
use super::perform::{HOME, within};
use super::{Arbiter, ArbiterError, Inner};
use serde::{Deserialize, Serialize};

use crate::attach::ports::{HomeError, SnapshotInfo};
use crate::attach::record::SnapshotRecord;
use crate::ids::{SnapshotId, VolumeId};
use crate::store::{Key, Kind, Stored, Version};
use ending::{delete, remove_behind, until_done};

mod ending;

pub(super) use ending::{abandon, abandon_behind};

/// What the store keeps of a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    #[serde(flatten)]
    record: SnapshotRecord,
    /// It is being deleted.
    condemned: bool,
}

impl Arbiter {
    /// Takes a snapshot, or answers with the one that has this name.
    ///
    /// # Errors
    /// `Incompatible` where the name is of another volume's snapshot, `NoVolume`,
    /// `Unavailable`, and what the home refuses.
    pub async fn create_snapshot(
        &self,
        volume: &VolumeId,
        name: &str,
    ) -> Result<SnapshotRecord, ArbiterError> {
        create(&self.inner, volume, name).await
    }

    /// Deletes a snapshot; where its home does not answer, that goes on behind.
    /// Unknown snapshot: success.
    ///
    /// # Errors
    /// `InUse` while a volume is being made from it, `Unavailable`, and what the home refuses.
    pub async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), ArbiterError> {
        delete(&self.inner, snapshot).await
    }

    /// All snapshots that are whole, in order of id.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotRecord>, ArbiterError> {
        whole(&self.inner).await
    }
}

fn key(snapshot: &SnapshotId) -> Key {
    Key {
        kind: Kind::Snapshot,
        id: snapshot.as_str().to_owned(),
    }
}

fn read(key: &Key, stored: &Stored) -> Result<Kept, ArbiterError> {
    serde_json::from_slice(&stored.bytes)
        .map_err(|error| ArbiterError::Failed(format!("read record {key}: {error}")))
}

fn bytes(kept: &Kept) -> Result<Vec<u8>, ArbiterError> {
    serde_json::to_vec(kept).map_err(|error| {
        ArbiterError::Failed(format!(
            "record of snapshot {}: {error}",
            kept.record.info.id
        ))
    })
}

async fn all(inner: &Inner) -> Result<Vec<Kept>, ArbiterError> {
    let stored = inner.store.list(Kind::Snapshot).await?;
    stored
        .iter()
        .map(|(key, stored)| read(key, stored))
        .collect()
}

async fn one(
    inner: &Inner,
    snapshot: &SnapshotId,
) -> Result<Option<(Kept, Version)>, ArbiterError> {
    let key = key(snapshot);
    match inner.store.get(&key).await? {
        None => Ok(None),
        Some(stored) => Ok(Some((read(&key, &stored)?, stored.version))),
    }
}

/// The snapshots that are whole, in order of id.
pub(super) async fn whole(inner: &Inner) -> Result<Vec<SnapshotRecord>, ArbiterError> {
    let kept = all(inner).await?.into_iter();
    Ok(kept
        .filter(|kept| kept.record.ready && !kept.condemned)
        .map(|kept| kept.record)
        .collect())
}

/// One whole snapshot.
pub(super) async fn whole_one(
    inner: &Inner,
    snapshot: &SnapshotId,
) -> Result<SnapshotRecord, ArbiterError> {
    match one(inner, snapshot).await? {
        Some((kept, _)) if kept.record.ready && !kept.condemned => Ok(kept.record),
        _ => Err(ArbiterError::NoSnapshot(snapshot.clone())),
    }
}

pub(super) async fn create(
    inner: &Arc<Inner>,
    volume: &VolumeId,
    name: &str,
) -> Result<SnapshotRecord, ArbiterError> {
    let (inner, volume, name) = (Arc::clone(inner), volume.clone(), name.to_owned());
    // Once begun it runs to its end, whether or not the caller still waits.
    let taking = tokio::spawn(async move {
        let record = intend(&inner, &volume, &name).await?;
        if record.ready {
            return Ok(record);
        }
        finish(&inner, &record.info.id).await
    });
    taking.await.unwrap_or_else(|error| {
        Err(ArbiterError::Failed(format!(
            "a snapshot was cut off: {error}"
        )))
    })
}

/// Finds the record of this name, or records a new intent.
async fn intend(
    inner: &Arc<Inner>,
    volume: &VolumeId,
    name: &str,
) -> Result<SnapshotRecord, ArbiterError> {
    let mut names = inner.snapshot_names.lock().await;
    let found = all(inner)
        .await?
        .into_iter()
        .find(|kept| kept.record.name == name && !kept.condemned)
        .map(|kept| kept.record);
    if let Some(record) = found {
        names.remove(name);
        if record.info.volume != *volume {
            return Err(ArbiterError::Incompatible(format!(
                "snapshot {} already has the name {name:?}, and is of volume {}",
                record.info.id, record.info.volume
            )));
        }
        return Ok(record);
    }
    let (_, state) = inner.existing(volume)?;
    // Where the store did not say whether it took the intent, the next attempt
    // uses the same id, so that there can never be two.
    let id = names
        .get(name)
        .map_or_else(SnapshotId::random, |begun| begun.info.id.clone());
    let record = SnapshotRecord {
        info: SnapshotInfo {
            id: id.clone(),
            volume: volume.clone(),
            size: state.spec.size,
            taken: SystemTime::now(),
        },
        name: name.to_owned(),
        home: state.spec.home.clone(),
        ready: false,
    };
    names.insert(name.to_owned(), record.clone());
    let kept = Kept {
        record,
        condemned: false,
    };
    inner.store.put(&key(&id), None, bytes(&kept)?).await?;
    names.remove(name);
    Ok(kept.record)
}

/// Has the home take an intended snapshot, and records that it is whole.
async fn finish(inner: &Arc<Inner>, id: &SnapshotId) -> Result<SnapshotRecord, ArbiterError> {
    let gone = || ArbiterError::NoSnapshot(id.clone());
    let volume = one(inner, id).await?.ok_or_else(gone)?.0.record.info.volume;
    let slot = inner.slot(&volume);
    // One at a time, so that clearing away a failed one never meets a good one.
    let _busy = match &slot {
        Some(slot) => Some(slot.snapshotting.lock().await),
        None => None,
    };
    let (mut kept, version) = one(inner, id).await?.ok_or_else(gone)?;
    if kept.condemned {
        return Err(gone());
    }
    if kept.record.ready {
        return Ok(kept.record);
    }
    let node = kept.record.home.clone();
    let home = inner.home(&node)?;
    match within(&node, "snapshot", HOME, home.snapshot(&volume, id)).await {
        Ok(info) if info.id == *id && info.volume == volume => {
            kept.record.info = info;
            kept.record.ready = true;
            inner
                .store
                .put(&key(id), Some(version), bytes(&kept)?)
                .await?;
            Ok(kept.record)
        }
        Ok(info) => Err(ArbiterError::Failed(format!(
            "home {node} was asked for snapshot {id} of {volume} and answered {} of {}",
            info.id, info.volume
        ))),
        Err(error @ (HomeError::Unreachable { .. } | HomeError::NotYet(_))) => Err(error.into()),
        Err(error) => {
            within(&node, "delete_snapshot", HOME, home.delete_snapshot(id)).await?;
            inner.store.delete(&key(id), version).await?;
            Err(error.into())
        }
    }
}

/// Finishes what an earlier process began with snapshots.
pub(super) async fn take_up(inner: &Arc<Inner>) -> Result<(), ArbiterError> {
    for kept in all(inner).await? {
        let Kept { record, condemned } = kept;
        if condemned {
            remove_behind(inner, &record);
        } else if record.ready {
            // A backup's, too: its stream, at work or stopped, may need it.
        } else if is_a_backups(&record.name) {
            // Whoever was to read it ended with that process.
            abandon_behind(inner, record.name);
        } else {
            finish_behind(inner, record.info.id);
        }
    }
    Ok(())
}

fn finish_behind(inner: &Arc<Inner>, id: SnapshotId) {
    let inner = Arc::clone(inner);
    tokio::spawn(async move {
        let attempt = async || match finish(&inner, &id).await {
            Err(error) if error.may_pass() => Err(error),
            _ => Ok(()),
        };
        until_done(&inner, id.as_str(), attempt).await;
    });
}

#[cfg(test)]
#[path = "snapshots_tests.rs"]
mod tests;

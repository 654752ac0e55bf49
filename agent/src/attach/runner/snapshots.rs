//! Snapshots: recorded as intended, taken at home, recorded as whole.
//!
//! A crash in between leaves a record that is not whole. It is finished at the
//! next start, so that neither a name nor space is lost, and whoever asks for
//! the same name again gets that snapshot.

use std::sync::Arc;
use std::time::SystemTime;

use super::perform::{HOME, within};
use super::slot::Slot;
use super::{ArbiterError, Inner};
use crate::attach::ports::{Content, HomeError, SnapshotInfo};
use crate::attach::record::SnapshotRecord;
use crate::ids::{SnapshotId, VolumeId};
use crate::store::{Key, Kind, StoreError, Stored, Version};

fn key(snapshot: &SnapshotId) -> Key {
    Key {
        kind: Kind::Snapshot,
        id: snapshot.as_str().to_owned(),
    }
}

fn read(key: &Key, stored: &Stored) -> Result<SnapshotRecord, ArbiterError> {
    serde_json::from_slice(&stored.bytes)
        .map_err(|error| ArbiterError::Failed(format!("read record {key}: {error}")))
}

fn bytes(record: &SnapshotRecord) -> Result<Vec<u8>, ArbiterError> {
    serde_json::to_vec(record).map_err(|error| {
        ArbiterError::Failed(format!("record of snapshot {}: {error}", record.info.id))
    })
}

async fn all(inner: &Inner) -> Result<Vec<SnapshotRecord>, ArbiterError> {
    let stored = inner.store.list(Kind::Snapshot).await?;
    stored
        .iter()
        .map(|(key, stored)| read(key, stored))
        .collect()
}

async fn one(
    inner: &Inner,
    snapshot: &SnapshotId,
) -> Result<Option<(SnapshotRecord, Version)>, ArbiterError> {
    let key = key(snapshot);
    match inner.store.get(&key).await? {
        None => Ok(None),
        Some(stored) => Ok(Some((read(&key, &stored)?, stored.version))),
    }
}

/// The snapshots that are whole, in order of id.
pub(super) async fn whole(inner: &Inner) -> Result<Vec<SnapshotRecord>, ArbiterError> {
    let mut records = all(inner).await?;
    records.retain(|record| record.ready);
    Ok(records)
}

/// One whole snapshot.
pub(super) async fn whole_one(
    inner: &Inner,
    snapshot: &SnapshotId,
) -> Result<SnapshotRecord, ArbiterError> {
    match one(inner, snapshot).await? {
        Some((record, _)) if record.ready => Ok(record),
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
        .find(|record| record.name == name);
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
        .entry(name.to_owned())
        .or_insert_with(SnapshotId::random);
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
    inner.store.put(&key(id), None, bytes(&record)?).await?;
    names.remove(name);
    Ok(record)
}

/// Has the home take an intended snapshot, and records that it is whole.
async fn finish(inner: &Arc<Inner>, id: &SnapshotId) -> Result<SnapshotRecord, ArbiterError> {
    let gone = || ArbiterError::NoSnapshot(id.clone());
    let volume = one(inner, id).await?.ok_or_else(gone)?.0.info.volume;
    let slot = inner.slot(&volume);
    // One at a time, so that clearing away a failed one never meets a good one.
    let _busy = match &slot {
        Some(slot) => Some(slot.snapshotting.lock().await),
        None => None,
    };
    let (mut record, version) = one(inner, id).await?.ok_or_else(gone)?;
    if record.ready {
        return Ok(record);
    }
    let node = record.home.clone();
    let home = inner.home(&node)?;
    match within(&node, "snapshot", HOME, home.snapshot(&volume, id)).await {
        Ok(info) if info.id == *id && info.volume == volume => {
            record.info = info;
            record.ready = true;
            inner
                .store
                .put(&key(id), Some(version), bytes(&record)?)
                .await?;
            Ok(record)
        }
        Ok(info) => Err(ArbiterError::Failed(format!(
            "home {node} was asked for snapshot {id} of {volume} and answered {} of {}",
            info.id, info.volume
        ))),
        Err(error @ HomeError::Unreachable { .. }) => Err(error.into()),
        Err(error) => {
            within(&node, "delete_snapshot", HOME, home.delete_snapshot(id)).await?;
            inner.store.delete(&key(id), version).await?;
            Err(error.into())
        }
    }
}

pub(super) async fn delete(inner: &Arc<Inner>, id: &SnapshotId) -> Result<(), ArbiterError> {
    let Some((record, _)) = one(inner, id).await? else {
        return Ok(());
    };
    inner.no_making_of(&Content::Snapshot(id.clone()))?;
    let slot: Option<Arc<Slot>> = inner.slot(&record.info.volume);
    let _busy = match &slot {
        Some(slot) => Some(slot.snapshotting.lock().await),
        None => None,
    };
    let home = inner.home(&record.home)?;
    match within(
        &record.home,
        "delete_snapshot",
        HOME,
        home.delete_snapshot(id),
    )
    .await
    {
        Ok(()) | Err(HomeError::NoSnapshot(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let Some((_, version)) = one(inner, id).await? else {
        return Ok(());
    };
    match inner.store.delete(&key(id), version).await {
        Ok(()) => Ok(()),
        // Somebody else deleted it at the same time.
        Err(StoreError::Conflict(_)) if one(inner, id).await?.is_none() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Finishes the snapshots that an earlier process intended.
pub(super) async fn take_up(inner: &Arc<Inner>) -> Result<(), ArbiterError> {
    for record in all(inner).await? {
        if record.ready {
            continue;
        }
        let inner = Arc::clone(inner);
        tokio::spawn(async move {
            while !inner.stopped() {
                match finish(&inner, &record.info.id).await {
                    Err(error @ ArbiterError::Unavailable(_)) => {
                        tracing::warn!(snapshot = %record.info.id, %error, "not finished yet");
                    }
                    _ => return,
                }
                tokio::time::sleep(super::slot::PAUSE.1).await;
            }
        });
    }
    Ok(())
}

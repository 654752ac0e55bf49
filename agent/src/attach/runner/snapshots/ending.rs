//! How a snapshot ends: condemned in the store, removed at its home, forgotten.
//!
//! ```text
//!   intended, whole --> condemned --> gone
//!           delete, abandon       the home has removed it
//! ```
//!
//! A condemned snapshot is in no list, so nobody would ask for its end again.
//! It is tried until it is gone, by this process or by the next one. One that
//! was only intended may still be on its way to being taken.

use std::collections::HashSet;
use std::future::Future;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use super::super::perform::{HOME, within};
use super::super::slot::{PAUSE, Slot};
use super::super::{ArbiterError, Inner};
use super::{Kept, all, bytes, key, one};
use crate::attach::ports::{Content, HomeError};
use crate::attach::record::SnapshotRecord;
use crate::ids::SnapshotId;
use crate::store::{StoreError, Version};

/// A home that was asked to take a snapshot may know of none for so long, and
/// take it then: it first waits 2 s for commands inside a closed gate. To be
/// asked to delete it, it must know of it.
const BEGUN: Duration = Duration::from_secs(3);

/// Deletes a snapshot. Once that is recorded it goes on to its end, whether or
/// not the caller still waits, the home answers, or this process lives.
pub(super) async fn delete(inner: &Arc<Inner>, id: &SnapshotId) -> Result<(), ArbiterError> {
    let (inner, id) = (Arc::clone(inner), id.clone());
    let deleting = tokio::spawn(async move {
        let removed = remove(&inner, &id).await;
        if removed.is_err() && is_condemned(&inner, &id).await {
            go_on(&inner, id, Duration::ZERO);
        }
        removed
    });
    deleting.await.unwrap_or_else(|error| {
        Err(ArbiterError::Failed(format!(
            "the deletion of a snapshot was cut off: {error}"
        )))
    })
}

/// Whether its end is known to be recorded.
async fn is_condemned(inner: &Inner, id: &SnapshotId) -> bool {
    matches!(one(inner, id).await, Ok(Some((kept, _))) if kept.condemned)
}

/// One attempt, from wherever the last one came to.
async fn remove(inner: &Inner, id: &SnapshotId) -> Result<(), ArbiterError> {
    let Some((Kept { record, .. }, _)) = one(inner, id).await? else {
        return Ok(());
    };
    let slot: Option<Arc<Slot>> = inner.slot(&record.info.volume);
    let _busy = match &slot {
        Some(slot) => Some(slot.snapshotting.lock().await),
        None => None,
    };
    let Some(version) = condemn(inner, id).await? else {
        return Ok(());
    };
    let home = inner.home(&record.home)?;
    let deleting = home.delete_snapshot(id);
    match within(&record.home, "delete_snapshot", HOME, deleting).await {
        Ok(()) | Err(HomeError::NoSnapshot(_)) => {}
        Err(error) => return Err(error.into()),
    }
    match inner.store.delete(&key(id), version).await {
        Ok(()) => Ok(()),
        // Somebody else deleted it at the same time.
        Err(StoreError::Conflict(_)) if one(inner, id).await?.is_none() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Records that a snapshot is being deleted: it is none to anybody any more.
async fn condemn(inner: &Inner, id: &SnapshotId) -> Result<Option<Version>, ArbiterError> {
    inner.no_making_of(&Content::Snapshot(id.clone()))?;
    let Some((mut kept, version)) = one(inner, id).await? else {
        return Ok(None);
    };
    if kept.condemned {
        return Ok(Some(version));
    }
    kept.condemned = true;
    let bytes = bytes(&kept)?;
    Ok(Some(inner.store.put(&key(id), Some(version), bytes).await?))
}

/// Gives up what was begun under a name, whole or not, and has it deleted
/// behind. Nobody may be at work under that name any more.
///
/// # Errors
/// Those of the store, where it is not known to be condemned.
pub(in super::super) async fn abandon(inner: &Arc<Inner>, name: &str) -> Result<(), ArbiterError> {
    settle_intent(inner, name).await?;
    for Kept { record, .. } in all(inner).await? {
        if record.name == name {
            condemn(inner, &record.info.id).await?;
            remove_behind(inner, &record);
        }
    }
    Ok(())
}

/// Where the store did not say whether it took an intent, it may take it yet. So
/// it is asked for a condemned one of the same id: whichever comes first wins,
/// and the other is a conflict.
async fn settle_intent(inner: &Inner, name: &str) -> Result<(), ArbiterError> {
    let mut names = inner.snapshot_names.lock().await;
    let Some(record) = names.get(name).cloned() else {
        return Ok(());
    };
    let key = key(&record.info.id);
    if inner.store.get(&key).await?.is_none() {
        let condemned = true;
        let kept = Kept { record, condemned };
        inner.store.put(&key, None, bytes(&kept)?).await?;
    }
    names.remove(name);
    Ok(())
}

/// Gives it up as soon as the store answers.
pub(in super::super) fn abandon_behind(inner: &Arc<Inner>, name: String) {
    let inner = Arc::clone(inner);
    tokio::spawn(async move {
        until_done(&inner, &name, || abandon(&inner, &name)).await;
    });
}

/// Goes on with a deletion until the snapshot is gone.
pub(super) fn remove_behind(inner: &Arc<Inner>, condemned: &SnapshotRecord) {
    let first = if condemned.ready {
        Duration::ZERO
    } else {
        BEGUN
    };
    go_on(inner, condemned.info.id.clone(), first);
}

fn go_on(inner: &Arc<Inner>, id: SnapshotId, first: Duration) {
    if !removing(inner).insert(id.clone()) {
        return;
    }
    let inner = Arc::clone(inner);
    tokio::spawn(async move {
        if !first.is_zero() {
            tokio::time::sleep(first).await;
        }
        until_done(&inner, id.as_str(), || remove(&inner, &id)).await;
        removing(&inner).remove(&id);
    });
}

fn removing(inner: &Inner) -> MutexGuard<'_, HashSet<SnapshotId>> {
    inner
        .removing
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Tries again and again, with growing pauses, and says why where that is new.
pub(super) async fn until_done<F>(inner: &Inner, snapshot: &str, mut attempt: impl FnMut() -> F)
where
    F: Future<Output = Result<(), ArbiterError>>,
{
    let (mut pause, longest) = PAUSE;
    let mut told = None;
    while !inner.stopped() {
        let Err(error) = attempt().await else {
            return;
        };
        if told.as_ref() != Some(&error) {
            tracing::warn!(snapshot, %error, "not finished yet");
        }
        told = Some(error);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

//! The journal: what happened, and the receipts, in the store.
//!
//! Notes and receipts are records of their own under ids that sort by time.
//! Each kind keeps its last [`KEPT`]; older ones are dropped as new ones come.
//! A note is best effort: where the store cannot take it, it is logged and
//! lost. A receipt is not: without it in the store the fence is repeated.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::Mutex;

use super::ports::{LateCommands, NodeAnswer, Note};
use super::proof::Receipt;
use crate::ids::{Epoch, NodeId, VolumeId};
use crate::store::{Key, Kind, StateStore, StoreError, Version};

/// How many notes, and how many receipts, are kept.
pub const KEPT: usize = 10_000;

/// Which notes and receipts are asked for; the default is all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Only of this volume.
    pub volume: Option<VolumeId>,
    /// Only of this node.
    pub node: Option<NodeId>,
    /// Only receipts.
    pub receipts: bool,
    /// Only what happened since.
    pub since: Option<SystemTime>,
}

impl Wanted {
    fn takes(&self, note: &Note) -> bool {
        (self.volume.is_none() || note.volume == self.volume)
            && (self.node.is_none() || note.node == self.node)
            && self.since.is_none_or(|since| note.time >= since)
    }
}

/// What happened, oldest first.
pub struct Journal {
    store: Arc<dyn StateStore>,
    notes: Mutex<Shelf>,
    receipts: Mutex<Shelf>,
    /// What receipts say already of what came late.
    late: Mutex<HashMap<(VolumeId, Epoch), u64>>,
}

/// The records of one kind, oldest first.
struct Shelf {
    kind: Kind,
    kept: VecDeque<(String, Version)>,
    most: usize,
    next: u64,
}

impl Shelf {
    async fn load(store: &dyn StateStore, kind: Kind, most: usize) -> Result<Self, StoreError> {
        let kept: VecDeque<_> = store
            .list(kind)
            .await?
            .into_iter()
            .map(|(key, stored)| (key.id, stored.version))
            .collect();
        Ok(Self {
            kind,
            kept,
            most,
            next: 0,
        })
    }

    fn key(&self, id: &str) -> Key {
        Key {
            kind: self.kind,
            id: id.to_owned(),
        }
    }

    async fn add(
        &mut self,
        store: &dyn StateStore,
        id: String,
        bytes: Vec<u8>,
    ) -> Result<(), StoreError> {
        let version = store.put(&self.key(&id), None, bytes).await?;
        self.kept.push_back((id, version));
        while self.kept.len() > self.most {
            let Some((id, version)) = self.kept.pop_front() else {
                break;
            };
            match store.delete(&self.key(&id), version).await {
                // Changed or removed by another hand: no longer this shelf's to drop.
                Ok(()) | Err(StoreError::Conflict(_)) => {}
                Err(error) => {
                    self.kept.push_front((id, version));
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

impl Journal {
    /// Reads which notes and receipts there are.
    ///
    /// # Errors
    /// The store's.
    pub async fn load(store: Arc<dyn StateStore>) -> Result<Self, StoreError> {
        Self::keeping(store, KEPT).await
    }

    async fn keeping(store: Arc<dyn StateStore>, most: usize) -> Result<Self, StoreError> {
        let notes = Shelf::load(store.as_ref(), Kind::Note, most).await?;
        let receipts = Shelf::load(store.as_ref(), Kind::Receipt, most).await?;
        Ok(Self {
            store,
            notes: Mutex::new(notes),
            receipts: Mutex::new(receipts),
            late: Mutex::default(),
        })
    }

    /// Adds a note; where that fails, logs it.
    pub async fn note(&self, note: &Note) {
        tracing::info!(
            kind = note.kind,
            volume = note.volume.as_ref().map(VolumeId::as_str),
            node = note.node.as_ref().map(NodeId::as_str),
            "{}",
            note.text
        );
        let mut shelf = self.notes.lock().await;
        let stamp = micros(note.time);
        shelf.next += 1;
        // Two notes of one microsecond keep their order; two runs never share
        // an id, since the random tail differs.
        let tail = uuid::Uuid::new_v4().simple().to_string();
        let id = format!("{stamp:020}-{:012}-{}", shelf.next, &tail[..8]);
        let bytes = match serde_json::to_vec(note) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(%error, "a note cannot be written as JSON");
                return;
            }
        };
        if let Err(error) = shelf.add(self.store.as_ref(), id, bytes).await {
            tracing::warn!(%error, "the journal could not take a note");
        }
    }

    /// Keeps a receipt. Durable when this returns.
    ///
    /// # Errors
    /// The store's: the receipt may or may not be there.
    pub async fn keep(&self, receipt: &Receipt) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(receipt).map_err(no_json)?;
        let mut shelf = self.receipts.lock().await;
        shelf
            .add(self.store.as_ref(), receipt.id().to_owned(), bytes)
            .await
    }

    /// Adds the old node's answer to a receipt that is kept. Best effort.
    pub async fn answered(&self, receipt: &Receipt, answer: NodeAnswer) {
        let mut shelf = self.receipts.lock().await;
        let place = shelf.kept.iter().rposition(|(id, _)| id == receipt.id());
        if let Some(place) = place {
            let answered = |kept: Receipt| kept.with_answer(answer);
            self.amend(&mut shelf, place, answered).await;
        }
    }

    /// Adds to the receipts of these epochs what has come late by now. Best
    /// effort: homes say it again, so one call is enough at a time, and only
    /// news is looked into.
    pub async fn late(&self, all: &[LateCommands]) {
        let Ok(mut said) = self.late.try_lock() else {
            return;
        };
        if said.len() > KEPT {
            said.clear();
        }
        for late in all {
            let of = (late.volume.clone(), late.epoch);
            if said.get(&of) == Some(&late.commands) || !self.count_late(late).await {
                continue;
            }
            said.insert(of, late.commands);
        }
    }

    /// Whether the epoch's receipts say so now: there is one, and all do.
    async fn count_late(&self, late: &LateCommands) -> bool {
        let mut shelf = self.receipts.lock().await;
        let is_its = Receipt::is_of(&late.volume, late.epoch);
        let places = (0..shelf.kept.len()).filter(|place| is_its(&shelf.kept[*place].0));
        let places: Vec<_> = places.collect();
        let mut done = !places.is_empty();
        for place in places {
            let counted = |kept: Receipt| kept.with_late(late.commands);
            done &= self.amend(&mut shelf, place, counted).await;
        }
        done
    }

    /// Changes one of the receipts that are kept; whether that is done.
    async fn amend(
        &self,
        shelf: &mut Shelf,
        place: usize,
        change: impl FnOnce(Receipt) -> Receipt,
    ) -> bool {
        let key = shelf.key(&shelf.kept[place].0);
        match self.amended(&key, change).await {
            Ok(Some(version)) => shelf.kept[place].1 = version,
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%key, %error, "a receipt could not be added to");
                return false;
            }
        }
        true
    }

    /// The receipt's version then; none: it is gone.
    async fn amended(
        &self,
        key: &Key,
        change: impl FnOnce(Receipt) -> Receipt,
    ) -> Result<Option<Version>, StoreError> {
        let Some(stored) = self.store.get(key).await? else {
            return Ok(None);
        };
        let kept: Receipt = serde_json::from_slice(&stored.bytes).map_err(no_json)?;
        let changed = change(kept.clone());
        if changed == kept {
            return Ok(Some(stored.version));
        }
        let bytes = serde_json::to_vec(&changed).map_err(no_json)?;
        let put = self.store.put(key, Some(stored.version), bytes);
        put.await.map(Some)
    }

    /// Notes and receipts, oldest first.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(&self, wanted: &Wanted) -> Result<Vec<Note>, StoreError> {
        let notes = match wanted.receipts {
            true => Vec::new(),
            false => self.store.list(Kind::Note).await?,
        };
        let receipts = self.store.list(Kind::Receipt).await?;
        let mut all = Vec::with_capacity(notes.len() + receipts.len());
        for (key, stored) in notes {
            match serde_json::from_slice::<Note>(&stored.bytes) {
                Ok(note) => all.push((key.id, note)),
                Err(error) => tracing::warn!(%key, %error, "a note cannot be read"),
            }
        }
        for (key, stored) in receipts {
            match serde_json::from_slice::<Receipt>(&stored.bytes) {
                Ok(receipt) => all.push((key.id, receipt.to_note())),
                Err(error) => tracing::warn!(%key, %error, "a receipt cannot be read"),
            }
        }
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(all
            .into_iter()
            .map(|(_, note)| note)
            .filter(|note| wanted.takes(note))
            .collect())
    }
}

fn no_json(error: serde_json::Error) -> StoreError {
    StoreError::Unavailable(format!("receipt as JSON: {error}"))
}

fn micros(time: SystemTime) -> u128 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_micros()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::attach::ports::{FenceRequest, Recorded, SettledBy, Settlement};
    use crate::store::EmbeddedStore;

    fn note(volume: &str, text: &str, at: u64) -> Note {
        Note {
            time: SystemTime::UNIX_EPOCH + Duration::from_millis(at),
            volume: Some(volume.parse().unwrap()),
            node: None,
            kind: "test".to_owned(),
            text: text.to_owned(),
            detail: serde_json::Value::Null,
        }
    }

    fn receipt(at: u64) -> Receipt {
        let asked = FenceRequest {
            volume: "v".parse().unwrap(),
            epoch: Epoch(3),
            recorded: Recorded::default(),
        };
        let settlement = Settlement {
            volume: asked.volume.clone(),
            epoch: asked.epoch,
            node: Some("a".parse().unwrap()),
            sessions_ended: 1,
            inside_at_close: 0,
            settled_by: SettledBy::Drained,
            unsettled: 0,
            settle_time: Duration::ZERO,
            late_refused: 0,
            last_write: None,
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(at);
        Receipt::new(&asked, settlement, Duration::ZERO, now).unwrap()
    }

    #[tokio::test]
    async fn it_lists_notes_and_receipts_by_time_and_keeps_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn StateStore> =
            Arc::new(EmbeddedStore::open(folder.path().join("state")).unwrap());
        let journal = Journal::keeping(Arc::clone(&store), 3).await.unwrap();
        for (i, volume) in ["v", "w", "v", "v"].into_iter().enumerate() {
            let i = i as u64;
            journal
                .note(&note(volume, &format!("note {i}"), i * 10))
                .await;
        }
        let kept = receipt(25);
        journal.keep(&kept).await.unwrap();
        let texts = |notes: Vec<Note>| -> Vec<String> {
            notes
                .into_iter()
                .map(|note| note.text.chars().take(7).collect())
                .collect()
        };
        assert_eq!(
            texts(journal.list(&Wanted::default()).await.unwrap()),
            ["note 1 ".trim(), "note 2", "epoch 3", "note 3"].map(|text| text.to_owned())
        );
        let wanted =
            |volume: Option<&str>, node: Option<&str>, receipts, since: Option<u64>| Wanted {
                volume: volume.map(|name| name.parse().unwrap()),
                node: node.map(|name| name.parse().unwrap()),
                receipts,
                since: since.map(|at| SystemTime::UNIX_EPOCH + Duration::from_millis(at)),
            };
        for (wanted, expected) in [
            (wanted(Some("v"), None, false, None), 3),
            (wanted(Some("w"), None, false, None), 1),
            (wanted(None, None, true, None), 1),
            (wanted(Some("w"), None, true, None), 0),
            (wanted(None, Some("a"), false, None), 1),
            (wanted(None, Some("b"), false, None), 0),
            (wanted(None, None, false, Some(25)), 2),
            (wanted(None, None, true, Some(26)), 0),
        ] {
            assert_eq!(
                journal.list(&wanted).await.unwrap().len(),
                expected,
                "{wanted:?}"
            );
        }

        // Loaded again, it goes on where it was: the answer finds its receipt,
        // and the bound still holds.
        let journal = Journal::keeping(store, 3).await.unwrap();
        let late = |volume: &str, commands| LateCommands {
            volume: volume.parse().unwrap(),
            epoch: kept.closed(),
            commands,
        };
        journal.late(&[late("v", 2)]).await;
        journal.answered(&kept, NodeAnswer::Clean).await;
        journal.late(&[late("v", 5), late("w", 9)]).await;
        journal.late(&[late("v", 5)]).await;
        journal.note(&note("v", "note 4", 40)).await;
        let all = journal.list(&Wanted::default()).await.unwrap();
        assert_eq!(all.len(), 4);
        assert_eq!(all[1].detail["answer"], "clean");
        assert_eq!(all[1].detail["late_since"], 5);
    }
}

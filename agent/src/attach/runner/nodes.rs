//! Nodes: who they are, and which of them is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use super::{ArbiterError, Inner, exists};
use crate::attach::ports::Note;
use crate::attach::record::{NodeRecord, Registration};
use crate::attach::state::{Event, Phase, Stage};
use crate::ids::{Epoch, NodeId, VolumeId};
use crate::store::{Key, Kind, StateStore};

/// A registration that says nothing new is written this seldom.
const SEEN: Duration = Duration::from_secs(60);

/// Reads every node's record.
pub(super) async fn load(
    store: &dyn StateStore,
) -> Result<BTreeMap<NodeId, NodeRecord>, ArbiterError> {
    let mut nodes = BTreeMap::new();
    for (key, stored) in store.list(Kind::Node).await? {
        let record: NodeRecord = serde_json::from_slice(&stored.bytes)
            .map_err(|error| ArbiterError::Failed(format!("read record {key}: {error}")))?;
        nodes.insert(record.node.clone(), record);
    }
    Ok(nodes)
}

impl Inner {
    pub(super) fn node_record(&self, node: &NodeId) -> Result<NodeRecord, ArbiterError> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes
            .get(node)
            .cloned()
            .ok_or_else(|| ArbiterError::NoNode(node.clone()))
    }

    /// The nodes that are lost now.
    pub(super) fn lost(&self) -> BTreeSet<NodeId> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes
            .values()
            .filter(|record| record.lost.is_some())
            .map(|record| record.node.clone())
            .collect()
    }

    pub(super) async fn register(self: &Arc<Self>, said: Registration) -> Result<(), ArbiterError> {
        let one = self.registering.lock().await;
        let before = self.node_record(&said.node).ok();
        let was_lost = before.as_ref().and_then(|record| record.lost.clone());
        let clean = |lost: &String| *lost != said.incarnation || said.attached.is_empty();
        let lost = was_lost.clone().filter(|lost| !clean(lost));
        let back = was_lost.is_some() && lost.is_none();
        let record = NodeRecord {
            node: said.node.clone(),
            incarnation: said.incarnation,
            host: said.host,
            agent: said.agent,
            has_pool: said.has_pool,
            seen: SystemTime::now(),
            lost,
        };
        let news = before.is_none_or(|before| {
            let same = NodeRecord {
                seen: before.seen,
                ..record.clone()
            } == before;
            let age = record.seen.duration_since(before.seen);
            !same || age.unwrap_or(SEEN) >= SEEN
        });
        if news {
            self.keep_node(record).await?;
        }
        drop(one);
        if back {
            let text = format!("node {} has come back clean", said.node);
            self.tell_of_node(&said.node, "node-back", text);
        }
        for (volume, epoch) in said.attached {
            self.check_attached(volume, &said.node, epoch);
        }
        if !said.late.is_empty() {
            // A node that is known waits for no receipts.
            let this = Arc::clone(self);
            tokio::spawn(async move { this.journal.late(&said.late).await });
        }
        Ok(())
    }

    /// Tells a node to let go of an attachment that has ended. What the records
    /// know nothing of is left alone: it may be the records that are old.
    fn check_attached(self: &Arc<Self>, volume: VolumeId, node: &NodeId, epoch: Epoch) {
        let Some(slot) = self.slot(&volume) else {
            return;
        };
        let state = slot.state();
        if !exists(state.stage()) || epoch > state.offered {
            return;
        }
        let counts = match &state.phase {
            Phase::Attached { holder, .. } | Phase::Exporting { holder, .. } => {
                holder.node == *node && state.epoch == epoch
            }
            _ => false,
        };
        if !counts && state.stage() != Stage::Creating {
            self.release_stale(volume, node.clone(), epoch);
        }
    }

    /// Writes a node's record; the caller holds `registering`.
    async fn keep_node(&self, record: NodeRecord) -> Result<(), ArbiterError> {
        let key = Key {
            kind: Kind::Node,
            id: record.node.as_str().to_owned(),
        };
        let bytes = serde_json::to_vec(&record)
            .map_err(|error| ArbiterError::Failed(format!("record {key} as JSON: {error}")))?;
        let version = self.store.get(&key).await?.map(|stored| stored.version);
        self.store.put(&key, version, bytes).await?;
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.insert(record.node.clone(), record);
        Ok(())
    }

    /// Once begun it runs to its end, whether or not the caller still waits: a
    /// word that is in the store and not in memory would be lost with the node's
    /// next registration, and one that ended only some claims leaves the others.
    pub(super) async fn node_lost(self: &Arc<Self>, node: &NodeId) -> Result<(), ArbiterError> {
        let (inner, node) = (Arc::clone(self), node.clone());
        let losing = tokio::spawn(async move { inner.lose(&node).await });
        losing.await.unwrap_or_else(|error| {
            Err(ArbiterError::Failed(format!(
                "the loss of a node was cut off: {error}"
            )))
        })
    }

    async fn lose(self: &Arc<Self>, node: &NodeId) -> Result<(), ArbiterError> {
        let one = self.registering.lock().await;
        let mut record = self.node_record(node)?;
        if record.lost.as_ref() != Some(&record.incarnation) {
            record.lost = Some(record.incarnation.clone());
            let incarnation = record.incarnation.clone();
            self.keep_node(record).await?;
            let text = format!("incarnation {incarnation} of node {node} was declared lost");
            self.tell_of_node(node, "node-lost", text);
        }
        drop(one);
        let mut failed = None;
        for slot in self.slots() {
            match self.apply(&slot, Event::NodeLost(node.clone())).await {
                Ok(_) | Err(ArbiterError::NoVolume(_)) => {}
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Ends what an earlier process could not end after a node was declared lost.
    pub(super) fn take_up_lost(self: &Arc<Self>) {
        for node in self.lost() {
            let inner = Arc::clone(self);
            tokio::spawn(async move {
                while !inner.stopped() {
                    match inner.node_lost(&node).await {
                        Ok(()) => return,
                        Err(error) => {
                            tracing::warn!(%node, %error, "its claims have not ended yet")
                        }
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    // It may have come back meanwhile.
                    if !inner.lost().contains(&node) {
                        return;
                    }
                }
            });
        }
    }

    fn tell_of_node(&self, node: &NodeId, kind: &str, text: String) {
        self.tell(Note {
            time: SystemTime::now(),
            volume: None,
            node: Some(node.clone()),
            kind: kind.to_owned(),
            text,
            detail: serde_json::json!({}),
        });
    }
}

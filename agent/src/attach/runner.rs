//! The arbiter's runner: persists what [`super::state`] decides, performs it
//! through [`super::ports`], and feeds the results back.
//!
//! It owns the volumes' records in the store and is their only writer. Per
//! volume one step at a time; a step is persisted by compare-and-swap before
//! anything is done about it, and runs to its end even when its caller has gone.
//! Where the store does not say whether it took a change, the record is read
//! again, and whatever it then says is taken up.
//!
//! It refuses to wait without end: every call of a home, a node or the store
//! has a deadline, and a caller is told what has not happened yet. It retries
//! behind, with growing pauses, until the intent is done or superseded.
//!
//! `slot` is one volume's step, `perform` its actions, `provision` the making
//! and growing of volumes, `tickets` the claims beside the workload's, `restores`
//! what a restore is given and loses, `backups` the same of a backup, `reaper` the
//! end of leases.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::figures::Figures;
use super::journal::{Journal, Wanted};
use super::ports::{Attachment, Capacity, Note, Ports};
use super::record::{AccessMode, NewVolume, NodeRecord, Registration, SnapshotRecord, VolumeView};
use super::state::{Event, Holder, Phase, Stage, VolumeState};
use crate::ids::{Bytes, Epoch, NodeId, SnapshotId, VolumeId};
use crate::store::{Kind, StateStore};

mod backups;
mod error;
mod nodes;
mod perform;
mod provision;
mod reaper;
mod restores;
mod slot;
mod snapshots;
mod tickets;
#[cfg(test)]
pub(crate) mod world_for_tests;

pub use error::ArbiterError;
use slot::{Seen, Slot};

/// How long unpublish may take before it says that the store does not answer.
const UNPUBLISH: Duration = Duration::from_millis(900);
/// How long making or deleting a volume is waited for before `NotYet`.
const PROVISION: Duration = Duration::from_secs(8);
/// Notes that may wait for the store; more are logged only.
const BACKLOG: usize = 1024;

/// The arbiter: decides by [`super::state`] and acts through [`super::ports`].
///
/// When it is dropped, what it was doing ends at the next step.
pub struct Arbiter {
    inner: Arc<Inner>,
}

impl Drop for Arbiter {
    fn drop(&mut self) {
        self.inner.stopped.store(true, Ordering::SeqCst);
        self.inner.leases_changed.notify_one();
    }
}

/// What the arbiter's tasks share.
struct Inner {
    store: Arc<dyn StateStore>,
    ports: Arc<dyn Ports>,
    journal: Arc<Journal>,
    lines: mpsc::Sender<Line>,
    figures: Figures,
    volumes: RwLock<BTreeMap<VolumeId, Arc<Slot>>>,
    /// Held while a volume's name is looked up and taken.
    naming: tokio::sync::Mutex<()>,
    nodes: RwLock<BTreeMap<NodeId, NodeRecord>>,
    /// Held while a node's record is changed.
    registering: tokio::sync::Mutex<()>,
    /// Snapshots that are being recorded as intended, by name.
    snapshot_names: tokio::sync::Mutex<HashMap<String, SnapshotRecord>>,
    /// Attachments that nodes are being told to let go of.
    releasing: Mutex<HashSet<(VolumeId, NodeId)>>,
    /// Snapshots that are being deleted behind.
    removing: Mutex<HashSet<SnapshotId>>,
    leases_changed: Notify,
    stopped: AtomicBool,
}

/// What the journal's writer is given.
enum Line {
    Note(Note),
    Written(oneshot::Sender<()>),
}

async fn write_journal(journal: Arc<Journal>, mut lines: mpsc::Receiver<Line>) {
    while let Some(line) = lines.recv().await {
        match line {
            Line::Note(note) => journal.note(&note).await,
            Line::Written(tell) => {
                // Nobody waits any more: nothing to tell.
                let _ = tell.send(());
            }
        }
    }
}

impl Inner {
    fn slot(&self, volume: &VolumeId) -> Option<Arc<Slot>> {
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.get(volume).cloned()
    }

    fn slots(&self) -> Vec<Arc<Slot>> {
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.values().cloned().collect()
    }

    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Hands a note to the journal's writer.
    fn tell(&self, note: Note) {
        if let Err(error) = self.lines.try_send(Line::Note(note)) {
            let text = match error.into_inner() {
                Line::Note(note) => note.text,
                Line::Written(_) => String::new(),
            };
            tracing::warn!(text, "the journal is behind; this note is not in it");
        }
    }

    /// The slot of a volume that exists for its users.
    fn existing(&self, volume: &VolumeId) -> Result<(Arc<Slot>, Arc<VolumeState>), ArbiterError> {
        let slot = self
            .slot(volume)
            .ok_or_else(|| ArbiterError::NoVolume(volume.clone()))?;
        let state = slot.state();
        if exists(state.stage()) {
            Ok((slot, state))
        } else {
            Err(ArbiterError::NoVolume(volume.clone()))
        }
    }
}

/// Whether a volume at this stage is one for its users: made, and not condemned.
fn exists(stage: Stage) -> bool {
    match stage {
        Stage::Idle | Stage::Closing | Stage::Handing | Stage::Exporting | Stage::Attached => true,
        Stage::Creating | Stage::Ending | Stage::Deleting | Stage::Gone => false,
    }
}

fn view(state: &VolumeState) -> VolumeView {
    VolumeView {
        spec: state.spec.clone(),
        epoch: state.epoch,
        tickets: state
            .claims
            .iter()
            .map(|claim| claim.ticket.clone())
            .collect(),
        published: state
            .workload()
            .map(|claim| claim.ticket.node.clone())
            .into_iter()
            .collect(),
    }
}

impl Arbiter {
    /// Reads every record and takes up what an earlier process left unfinished.
    ///
    /// # Errors
    /// `Unavailable` when the store cannot be read, `Failed` with the record's
    /// key when one of them is not of this version.
    pub async fn start(
        store: Arc<dyn StateStore>,
        ports: Arc<dyn Ports>,
    ) -> Result<Arc<Self>, ArbiterError> {
        let journal = Arc::new(Journal::load(Arc::clone(&store)).await?);
        let (lines, written) = mpsc::channel(BACKLOG);
        let nodes = nodes::load(store.as_ref()).await?;
        let inner = Arc::new(Inner {
            store,
            ports,
            journal: Arc::clone(&journal),
            lines,
            figures: Figures::new(),
            volumes: RwLock::default(),
            naming: tokio::sync::Mutex::default(),
            nodes: RwLock::new(nodes),
            registering: tokio::sync::Mutex::default(),
            snapshot_names: tokio::sync::Mutex::default(),
            releasing: Mutex::default(),
            removing: Mutex::default(),
            leases_changed: Notify::new(),
            stopped: AtomicBool::new(false),
        });
        for (key, stored) in inner.store.list(Kind::Volume).await? {
            let state: VolumeState = serde_json::from_slice(&stored.bytes)
                .map_err(|error| ArbiterError::Failed(format!("read record {key}: {error}")))?;
            inner.adopt_new(state, Some(stored.version));
        }
        tokio::spawn(write_journal(journal, written));
        tokio::spawn(reaper::run(Arc::downgrade(&inner)));
        inner.take_up_lost();
        for slot in inner.slots() {
            inner.mend(&slot);
        }
        snapshots::take_up(&inner).await?;
        Ok(Arc::new(Self { inner }))
    }

    /// Makes a volume, or answers with the one that has this name. The request
    /// again gives the same answer.
    ///
    /// # Errors
    /// `Incompatible` where the name is another volume's, `OutOfRange`,
    /// `NoSpace`, `NoNode`, `NoVolume`/`NoSnapshot` for a missing source,
    /// `NotYet` while the home is being asked, `Unavailable`.
    pub async fn create_volume(&self, request: NewVolume) -> Result<VolumeView, ArbiterError> {
        self.inner.create_volume(request, None).await
    }

    /// Deletes a volume; its snapshots and clones stay. Unknown volume: success.
    ///
    /// # Errors
    /// `InUse` while it is published, claimed or being cloned, `NotYet` while
    /// its receipt or its home is waited for (the deletion goes on behind),
    /// `Unavailable`.
    pub async fn delete_volume(&self, volume: &VolumeId) -> Result<(), ArbiterError> {
        let Some(slot) = self.inner.slot(volume) else {
            return Ok(());
        };
        self.inner.not_being_cloned(volume)?;
        match self.inner.apply(&slot, Event::Delete).await {
            Ok(_) => {}
            Err(ArbiterError::NoVolume(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
        slot.nudge.notify_one();
        let asked = Instant::now();
        slot.wait(PROVISION, |seen| match seen.state.stage() {
            Stage::Gone => Some(Ok(())),
            _ => still(seen, asked),
        })
        .await
    }

    /// One volume.
    ///
    /// # Errors
    /// `NoVolume`.
    pub async fn volume(&self, volume: &VolumeId) -> Result<VolumeView, ArbiterError> {
        Ok(view(&self.inner.existing(volume)?.1))
    }

    /// All volumes, in order of id.
    ///
    /// # Errors
    /// None in this version; a store shared with other controllers will have some.
    pub async fn volumes(&self) -> Result<Vec<VolumeView>, ArbiterError> {
        let states = self.inner.slots().into_iter().map(|slot| slot.state());
        Ok(states
            .filter(|state| exists(state.stage()))
            .map(|state| view(&state))
            .collect())
    }

    /// Gives the volume to a node. Answers when the export is open at the home,
    /// or with `NotYet` at the deadline (the work goes on behind).
    ///
    /// # Errors
    /// `HeldBy` another live workload's node, `InUse` by a ticket, `Incompatible`
    /// with how the node has it already, `NodeLost`, `NoNode`, `NoVolume`,
    /// `NotYet`, `Unavailable`, and what the home refuses for good.
    pub async fn publish(
        &self,
        volume: &VolumeId,
        node: &NodeId,
        mode: AccessMode,
        deadline: Duration,
    ) -> Result<Epoch, ArbiterError> {
        let result = self.publish_to(volume, node, mode, deadline).await;
        self.inner.figures.published(result.is_ok());
        result
    }

    async fn publish_to(
        &self,
        volume: &VolumeId,
        node: &NodeId,
        mode: AccessMode,
        deadline: Duration,
    ) -> Result<Epoch, ArbiterError> {
        let asked = Instant::now();
        let (slot, _) = self.inner.existing(volume)?;
        let holder = Holder {
            node: node.clone(),
            host: self.inner.node_record(node)?.host,
            mode,
        };
        let event = Event::Publish {
            holder,
            lost: self.inner.lost(),
        };
        let decided = timeout(deadline, self.inner.apply(&slot, event));
        decided.await.unwrap_or_else(|_| {
            Err(ArbiterError::Unavailable(format!(
                "volume {volume}: the store took no decision within {deadline:?}"
            )))
        })?;
        slot.nudge.notify_one();
        let left = deadline.saturating_sub(asked.elapsed());
        slot.wait(left, |seen| {
            let state = &seen.state;
            match (&state.phase, state.holder()) {
                (Phase::Attached { holder, .. }, _) if holder.node == *node => {
                    Some(Ok(state.epoch))
                }
                (_, Some(holder)) if holder.node == *node => still(seen, asked),
                _ => Some(Err(ArbiterError::NotYet(format!(
                    "volume {volume} was unpublished from node {node} meanwhile"
                )))),
            }
        })
        .await
    }

    /// Ends a workload's claim. Answers as soon as that is durable, or with
    /// `Unavailable` within a second. `None`: from every node. Unknown volume
    /// or node: success.
    ///
    /// # Errors
    /// `Unavailable` when the store did not say that it is durable.
    pub async fn unpublish(
        &self,
        volume: &VolumeId,
        node: Option<&NodeId>,
    ) -> Result<(), ArbiterError> {
        let Some(slot) = self.inner.slot(volume) else {
            return Ok(());
        };
        let ending = self.inner.apply(&slot, Event::Unpublish(node.cloned()));
        let result = match timeout(UNPUBLISH, ending).await {
            Ok(Ok(_) | Err(ArbiterError::NoVolume(_))) => Ok(()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ArbiterError::Unavailable(format!(
                "volume {volume}: the store did not answer within {UNPUBLISH:?}"
            ))),
        };
        self.inner.figures.unpublished(result.is_ok());
        result
    }

    /// What `node` may use now, with what only the home knows. Waits 2 s for that.
    ///
    /// # Errors
    /// `NoVolume`, `NotPublished`, `NotYet` while it is on its way to the node.
    pub async fn attachment(
        &self,
        volume: &VolumeId,
        node: &NodeId,
    ) -> Result<Attachment, ArbiterError> {
        let (_, state) = self.inner.existing(volume)?;
        match (&state.phase, state.holder()) {
            (Phase::Attached { holder, exported }, _) if holder.node == *node => {
                let mut exported = exported.clone();
                let told = self.inner.disclosed(&state).await;
                // The grant's own word is as old as the epoch. Where the home is
                // silent the volume counts as written, and is never formatted.
                exported.ever_written = told.as_ref().is_none_or(|told| told.ever_written);
                if exported.target.proves {
                    exported.target.chap = told.and_then(|told| told.chap);
                }
                Ok(Attachment {
                    volume: volume.clone(),
                    size: state.spec.size,
                    exported,
                    read_only: holder.mode == AccessMode::SingleReader,
                    busy_deadline: state.spec.busy_deadline,
                })
            }
            (_, Some(holder)) if holder.node == *node => Err(ArbiterError::NotYet(format!(
                "volume {volume} is on its way to node {node} ({})",
                state.stage().name()
            ))),
            _ => Err(ArbiterError::NotPublished {
                volume: volume.clone(),
                node: node.clone(),
            }),
        }
    }

    /// Grows a volume to at least `at_least`, and returns its size.
    ///
    /// # Errors
    /// `NoVolume`, `OutOfRange`, and what the home refuses.
    pub async fn expand(
        &self,
        volume: &VolumeId,
        at_least: Bytes,
        at_most: Option<Bytes>,
    ) -> Result<Bytes, ArbiterError> {
        self.inner.expand(volume, at_least, at_most).await
    }

    /// Room in the pool of `home`, or the largest room any pool has.
    ///
    /// # Errors
    /// `NoNode`, `Unavailable`.
    pub async fn capacity(&self, home: Option<&NodeId>) -> Result<Capacity, ArbiterError> {
        self.inner.capacity(home).await
    }

    /// Takes an agent's word for who and where its node is. A lost node comes
    /// back when it has rebooted, or has nothing attached.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn register(&self, registration: Registration) -> Result<(), ArbiterError> {
        self.inner.register(registration).await
    }

    /// All nodes that ever registered, in order of name.
    ///
    /// # Errors
    /// None in this version.
    pub async fn nodes(&self) -> Result<Vec<NodeRecord>, ArbiterError> {
        let nodes = self.inner.nodes.read();
        let nodes = nodes.unwrap_or_else(PoisonError::into_inner);
        Ok(nodes.values().cloned().collect())
    }

    /// Says of the node's present incarnation that it will not write again by
    /// itself: its tickets end, its exports are fenced. Saying it again is fine.
    ///
    /// # Errors
    /// `NoNode`, `Unavailable` (say it again).
    pub async fn node_lost(&self, node: &NodeId) -> Result<(), ArbiterError> {
        self.inner.node_lost(node).await
    }

    /// Adds a line to the journal. Best effort.
    pub async fn note(&self, note: Note) {
        self.inner.tell(note);
    }

    /// The journal, oldest first, with receipts in it.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn notes(&self, wanted: &Wanted) -> Result<Vec<Note>, ArbiterError> {
        let (tell, written) = oneshot::channel();
        let flushed = async {
            if self.inner.lines.send(Line::Written(tell)).await.is_ok() {
                // An error means that the writer has ended: nothing will come.
                let _ = written.await;
            }
        };
        // A slow store only costs the newest lines.
        let _ = timeout(Duration::from_secs(2), flushed).await;
        Ok(self.inner.journal.list(wanted).await?)
    }

    /// Adds the arbiter's metrics.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.inner.figures.register(registry);
    }
}

/// What a waiter makes of a volume that is not there yet: an error that came
/// up since it asked and that waiting will not mend ends the wait.
fn still<T>(seen: &Seen, asked: Instant) -> Option<Result<T, ArbiterError>> {
    let trouble = seen.trouble.as_ref()?;
    (trouble.at >= asked && !trouble.error.may_pass()).then(|| Err(trouble.error.clone()))
}

#[cfg(test)]
#[path = "runner_tests.rs"]
mod tests;

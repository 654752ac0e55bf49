//! One volume: its last durable state, and the next step of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

use super::{ArbiterError, Inner};
use crate::attach::action::Action;
use crate::attach::state::{Event, Phase, Stage, VolumeState};
use crate::ids::{ActionId, TicketId, VolumeId};
use crate::store::{Key, Kind, StoreError, Version};

/// How often a step is tried when others change the record meanwhile.
const TRIES: u32 = 5;
/// Pauses between attempts to reach a store or a home.
pub(super) const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A volume.
pub(super) struct Slot {
    id: VolumeId,
    cell: tokio::sync::Mutex<Cell>,
    seen: watch::Sender<Seen>,
    leases: Mutex<HashMap<TicketId, Instant>>,
    /// Somebody waits: try again now.
    pub(super) nudge: Notify,
    /// Held while a snapshot of the volume is made or deleted.
    pub(super) snapshotting: tokio::sync::Mutex<()>,
}

/// What only a step may touch.
struct Cell {
    /// The version of the last durable state; none: it is not known to be in the store.
    version: Option<Version>,
    /// The store did not say whether it took the last change.
    stale: bool,
    /// A task is at work to find that out, and to take up what is pending.
    mending: bool,
}

impl Cell {
    fn mended(&mut self, event: &Event) {
        if *event == Event::Resume {
            self.mending = false;
        }
    }
}

/// What everybody may see: the last durable state, and what is in its way.
#[derive(Clone)]
pub(super) struct Seen {
    pub(super) state: Arc<VolumeState>,
    pub(super) trouble: Option<Trouble>,
}

/// Why the pending intent is not done yet.
#[derive(Clone)]
pub(super) struct Trouble {
    pub(super) error: ArbiterError,
    pub(super) at: Instant,
}

impl Slot {
    /// A slot that nobody has taken up yet: [`Inner::mend`] it.
    fn new(state: VolumeState, version: Option<Version>) -> Self {
        let slot = Self {
            id: state.spec.id.clone(),
            cell: tokio::sync::Mutex::new(Cell {
                version,
                stale: version.is_none(),
                mending: true,
            }),
            leases: Mutex::default(),
            nudge: Notify::new(),
            snapshotting: tokio::sync::Mutex::default(),
            seen: watch::Sender::new(Seen {
                state: Arc::new(state),
                trouble: None,
            }),
        };
        slot.start_leases(None);
        slot
    }

    pub(super) fn id(&self) -> &VolumeId {
        &self.id
    }

    /// The last durable state.
    pub(super) fn state(&self) -> Arc<VolumeState> {
        Arc::clone(&self.seen.borrow().state)
    }

    pub(super) fn waits_for(&self, action: ActionId) -> bool {
        self.seen.borrow().state.pending == Some(action)
    }

    /// Says why the intent is not done yet.
    pub(super) fn trouble(&self, action: ActionId, error: ArbiterError) {
        self.seen.send_if_modified(|seen| {
            let mine = seen.state.pending == Some(action);
            if mine {
                seen.trouble = Some(Trouble {
                    error,
                    at: Instant::now(),
                });
            }
            mine
        });
    }

    /// Says why nothing at all can be done at the moment.
    fn trouble_now(&self, error: ArbiterError) {
        self.seen.send_modify(|seen| {
            seen.trouble = Some(Trouble {
                error,
                at: Instant::now(),
            });
        });
    }

    /// Waits until `ready` says so; at the deadline, says what is in the way.
    pub(super) async fn wait<T>(
        &self,
        deadline: Duration,
        mut ready: impl FnMut(&Seen) -> Option<Result<T, ArbiterError>>,
    ) -> Result<T, ArbiterError> {
        let mut changes = self.seen.subscribe();
        let found = async {
            loop {
                let result = ready(&changes.borrow_and_update());
                if let Some(result) = result {
                    return result;
                }
                if changes.changed().await.is_err() {
                    return Err(ArbiterError::NoVolume(self.id.clone()));
                }
            }
        };
        if let Ok(result) = timeout(deadline, found).await {
            return result;
        }
        let seen = self.seen.borrow().clone();
        let text = format!(
            "volume {} is still {} after {deadline:?}",
            self.id,
            seen.state.stage().name()
        );
        Err(match seen.trouble.map(|trouble| trouble.error) {
            None => ArbiterError::NotYet(text),
            Some(ArbiterError::Unavailable(why)) => {
                ArbiterError::Unavailable(format!("{text}: {why}"))
            }
            Some(ArbiterError::NotYet(why)) => ArbiterError::NotYet(format!("{text}: {why}")),
            Some(error) => error,
        })
    }

    /// The tickets whose lease has run out, and when the next one will.
    pub(super) fn overdue(&self, now: Instant) -> (Vec<TicketId>, Option<Instant>) {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let due = leases.iter().filter(|(_, ends)| **ends <= now);
        let due = due.map(|(ticket, _)| ticket.clone()).collect();
        let next = leases.values().filter(|ends| **ends > now).min().copied();
        (due, next)
    }

    fn ran_out(&self, ticket: &TicketId) -> bool {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases
            .get(ticket)
            .is_some_and(|ends| *ends <= Instant::now())
    }

    /// Starts the leases that are new or renewed, by the monotonic clock.
    fn start_leases(&self, before: Option<&VolumeState>) {
        let state = self.state();
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.retain(|ticket, _| {
            let mut claims = state.claims.iter();
            claims.any(|claim| claim.ticket.id == *ticket && claim.lease_us.is_some())
        });
        for claim in &state.claims {
            let Some(lease_us) = claim.lease_us else {
                continue;
            };
            let same = before.is_some_and(|before| before.claims.contains(claim));
            if !same || !leases.contains_key(&claim.ticket.id) {
                // A century is as good as for ever, and does not overflow.
                let lease = Duration::from_micros(lease_us).min(Duration::from_secs(3_000_000_000));
                leases.insert(claim.ticket.id.clone(), Instant::now() + lease);
            }
        }
    }
}

impl Inner {
    /// Adds a volume's slot. [`mend`](Self::mend) takes it up.
    pub(super) fn adopt_new(&self, state: VolumeState, version: Option<Version>) -> Arc<Slot> {
        self.figures.moved(None, Some(&state));
        let slot = Arc::new(Slot::new(state, version));
        let mut volumes = self
            .volumes
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        volumes.insert(slot.id.clone(), Arc::clone(&slot));
        slot
    }

    /// Takes one step of a volume: decides, persists, and sets going what follows.
    /// Once begun it runs to its end, whether or not the caller still waits.
    pub(super) async fn apply(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        event: Event,
    ) -> Result<Arc<VolumeState>, ArbiterError> {
        let (inner, slot) = (Arc::clone(self), Arc::clone(slot));
        let step = tokio::spawn(async move { inner.turn(&slot, event).await });
        match step.await {
            Ok(result) => result,
            Err(error) => Err(ArbiterError::Failed(format!("a step was cut off: {error}"))),
        }
    }

    async fn turn(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        mut event: Event,
    ) -> Result<Arc<VolumeState>, ArbiterError> {
        let mut cell = slot.cell.lock().await;
        for _ in 0..TRIES {
            if cell.stale {
                self.reload(slot, &mut cell).await?;
            }
            match &mut event {
                // Who is lost is asked under the volume's lock: whoever is
                // declared lost later finds the new ticket when it sweeps.
                Event::Publish { lost, .. } => *lost = self.lost(),
                // Renewed while the reaper was on its way.
                Event::Expired(ticket) if !slot.ran_out(ticket) => return Ok(slot.state()),
                _ => {}
            }
            let before = slot.state();
            let (next, actions) = before
                .step(event.clone(), SystemTime::now())
                .map_err(|refusal| ArbiterError::refused(&slot.id, refusal))?;
            if next == *before {
                cell.mended(&event);
                return Ok(before);
            }
            match self.persist(&next, cell.version).await {
                Ok(version) => {
                    cell.version = version;
                    cell.mended(&event);
                    self.show(slot, next);
                    for action in actions {
                        self.act(slot, action);
                    }
                    return Ok(slot.state());
                }
                Err(StoreError::Conflict(_)) => cell.stale = true,
                Err(error) => {
                    cell.stale = true;
                    if !std::mem::replace(&mut cell.mending, true) {
                        self.mend(slot);
                    }
                    return Err(error.into());
                }
            }
        }
        Err(ArbiterError::NotYet(format!(
            "volume {}: its record kept changing in the store",
            slot.id
        )))
    }

    async fn persist(
        &self,
        next: &VolumeState,
        expected: Option<Version>,
    ) -> Result<Option<Version>, StoreError> {
        let key = key(&next.spec.id);
        if next.stage() == Stage::Gone {
            if let Some(expected) = expected {
                self.store.delete(&key, expected).await?;
            }
            return Ok(None);
        }
        let bytes = serde_json::to_vec(next)
            .map_err(|error| StoreError::Unavailable(format!("record {key} as JSON: {error}")))?;
        self.store.put(&key, expected, bytes).await.map(Some)
    }

    /// Finds out what the store holds, after it did not say.
    async fn reload(&self, slot: &Arc<Slot>, cell: &mut Cell) -> Result<(), ArbiterError> {
        let key = key(&slot.id);
        let present = slot.state();
        match self.store.get(&key).await? {
            Some(stored) => {
                let state = serde_json::from_slice(&stored.bytes)
                    .map_err(|error| ArbiterError::Failed(format!("read record {key}: {error}")))?;
                cell.version = Some(stored.version);
                self.show(slot, state);
            }
            // Its first record never arrived, or is still on its way: whichever
            // comes first wins, and the other is a conflict.
            None if cell.version.is_none() && present.stage() == Stage::Creating => {
                match self.persist(&present, None).await {
                    Ok(version) => cell.version = version,
                    Err(StoreError::Conflict(_)) => {
                        return Err(ArbiterError::NotYet(format!(
                            "volume {} was recorded just now",
                            slot.id
                        )));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            None => {
                let unmade = match &present.phase {
                    Phase::Deleting { unmade } | Phase::Gone { unmade } => unmade.clone(),
                    _ => None,
                };
                let mut gone = (*present).clone();
                gone.phase = Phase::Gone { unmade };
                gone.pending = None;
                cell.version = None;
                cell.stale = false;
                self.show(slot, gone);
                return Err(ArbiterError::NoVolume(slot.id.clone()));
            }
        }
        cell.stale = false;
        Ok(())
    }

    /// Lets everybody see a state that is durable.
    fn show(&self, slot: &Arc<Slot>, next: VolumeState) {
        let before = slot.state();
        let gone = next.stage() == Stage::Gone;
        if before.stage() != Stage::Gone {
            self.figures.moved(Some(&before), (!gone).then_some(&next));
        }
        slot.seen.send_modify(|seen| {
            if seen.state.pending != next.pending {
                seen.trouble = None;
            }
            seen.state = Arc::new(next);
        });
        slot.start_leases(Some(&before));
        self.leases_changed.notify_one();
        if gone {
            let mut volumes = self.volumes.write().unwrap_or_else(PoisonError::into_inner);
            volumes.remove(&slot.id);
        }
    }

    /// Takes up what the record says is pending, as soon as the store answers.
    pub(super) fn mend(self: &Arc<Self>, slot: &Arc<Slot>) {
        let (inner, slot) = (Arc::clone(self), Arc::clone(slot));
        tokio::spawn(async move {
            let (mut pause, longest) = PAUSE;
            while !inner.stopped() {
                match inner.turn(&slot, Event::Resume).await {
                    Ok(_) | Err(ArbiterError::NoVolume(_)) => return,
                    Err(error) => {
                        tracing::warn!(volume = %slot.id, %error, "could not take up a volume");
                        slot.trouble_now(error);
                    }
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        });
    }

    fn act(self: &Arc<Self>, slot: &Arc<Slot>, action: Action) {
        match action {
            Action::Note(note) => self.tell(note),
            Action::Intent(intent) => {
                tokio::spawn(Arc::clone(self).perform(Arc::clone(slot), intent));
            }
            Action::Interrupt {
                ticket,
                node,
                grace,
            } => {
                tokio::spawn(Arc::clone(self).interrupt(slot.id.clone(), ticket, node, grace));
            }
        }
    }
}

fn key(volume: &VolumeId) -> Key {
    Key {
        kind: Kind::Volume,
        id: volume.as_str().to_owned(),
    }
}

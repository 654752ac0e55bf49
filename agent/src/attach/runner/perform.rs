//! Performs what was decided, again and again until it is done or superseded.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout};

use super::slot::{PAUSE, Slot};
use super::{ArbiterError, Inner};
use crate::attach::action::{Intent, Task};
use crate::attach::ports::{COPY, Disclosure, FenceRequest, HomeError, NodeAnswer};
use crate::attach::proof::Receipt;
use crate::attach::state::{Event, Outcome, VolumeState};
use crate::ids::{Epoch, NodeId, TicketId, VolumeId};

/// How long a home may take for a call.
pub(super) const HOME: Duration = Duration::from_secs(10);
/// How long a home may take for a fence; it answers `Unsettled` before.
const FENCE: Duration = Duration::from_secs(5);
/// How long a home may take to say what a node may know of its export.
const DISCLOSE: Duration = Duration::from_secs(2);
/// How long the old node may take to say that it has let go.
const RELEASE: Duration = Duration::from_secs(2);

impl Inner {
    /// Performs an intent until its result is taken or nobody waits for it.
    pub(super) async fn perform(self: Arc<Self>, slot: Arc<Slot>, intent: Intent) {
        let (mut pause, longest) = PAUSE;
        let mut first = true;
        while !self.stopped() && slot.waits_for(intent.id) {
            let attempt = self.attempt(&slot, &intent, std::mem::take(&mut first));
            let error = match attempt.await {
                Ok(outcome) => {
                    let refusal = match &outcome {
                        Outcome::Refused(error) => Some(refused(&intent, error)),
                        _ => None,
                    };
                    let event = Event::Result {
                        action: intent.id,
                        epoch: intent.epoch,
                        outcome,
                    };
                    let taken = self.apply(&slot, event).await;
                    taken.err().or(refusal)
                }
                Err(error) => Some(error),
            };
            if !slot.waits_for(intent.id) {
                return;
            }
            if let Some(error) = error {
                tracing::debug!(volume = %slot.id(), task = intent.task.name(), %error, "tried");
                slot.trouble(intent.id, error);
            }
            // Whoever comes and waits has it tried at once.
            let _ = timeout(pause, slot.nudge.notified()).await;
            pause = (pause * 2).min(longest);
        }
    }

    /// What a node must prove to the volume's open export, and whether that was
    /// written by now. None when the home does not say so in time: who only asks
    /// whether it is still the holder need not wait for a home that is away.
    pub(super) async fn disclosed(&self, state: &VolumeState) -> Option<Disclosure> {
        let home = self.ports.home(&state.spec.home)?;
        let asked = home.disclose(&state.spec.id, state.epoch);
        match timeout(DISCLOSE, asked).await {
            Ok(Ok(told)) => return Some(told),
            Ok(Err(error)) => {
                tracing::warn!(volume = %state.spec.id, %error, "the home does not say how its export stands");
            }
            Err(_) => {
                tracing::warn!(volume = %state.spec.id, "the home does not say in time how its export stands");
            }
        }
        None
    }

    async fn attempt(
        self: &Arc<Self>,
        slot: &Slot,
        intent: &Intent,
        first: bool,
    ) -> Result<Outcome, ArbiterError> {
        let node = &intent.home;
        let Some(home) = self.ports.home(node) else {
            return Ok(Outcome::Refused(HomeError::Unreachable {
                node: node.clone(),
                detail: "it has not registered since this controller started".to_owned(),
            }));
        };
        let name = intent.task.name();
        let result = match &intent.task {
            Task::Create { size, content } => {
                within(node, name, COPY, home.create(slot.id(), *size, content))
                    .await
                    .map(|()| Outcome::Created)
            }
            Task::Export(grant) => within(node, name, HOME, home.export(grant.request()))
                .await
                .map(Outcome::Exported),
            Task::Delete { unused } => within(node, name, HOME, home.delete(slot.id(), *unused))
                .await
                .map(|()| Outcome::Deleted),
            Task::Fence { request, holder } => {
                let answer = match holder {
                    Some(holder) if first => Some(self.release(request, holder)),
                    _ => None,
                };
                let asked = Instant::now();
                match within(node, name, FENCE, home.fence(request)).await {
                    Ok(settlement) => {
                        let now = SystemTime::now();
                        let receipt = Receipt::new(request, settlement, asked.elapsed(), now)
                            .map_err(|error| ArbiterError::Failed(error.to_string()))?;
                        self.journal.keep(&receipt).await?;
                        self.figures.fenced(&receipt);
                        self.add_answer(receipt.clone(), answer);
                        Ok(Outcome::Fenced(receipt))
                    }
                    Err(error) => {
                        self.figures.fence_failed();
                        Err(error)
                    }
                }
            }
        };
        Ok(result.unwrap_or_else(Outcome::Refused))
    }

    /// Tells the old node, beside the fence; its answer is waited for elsewhere.
    fn release(
        &self,
        request: &FenceRequest,
        holder: &NodeId,
    ) -> tokio::task::JoinHandle<NodeAnswer> {
        let port = self.ports.node(holder);
        let (volume, epoch) = (request.volume.clone(), request.epoch);
        tokio::spawn(async move {
            match port {
                Some(port) => released(timeout(RELEASE, port.release(&volume, epoch)).await.ok()),
                None => NodeAnswer::Silent("it has not registered".to_owned()),
            }
        })
    }

    fn add_answer(
        self: &Arc<Self>,
        receipt: Receipt,
        answer: Option<tokio::task::JoinHandle<NodeAnswer>>,
    ) {
        let inner = Arc::clone(self);
        if let Some(answer) = answer {
            tokio::spawn(async move {
                if let Ok(answer) = answer.await {
                    inner.figures.answered(&answer);
                    inner.journal.answered(&receipt, answer).await;
                }
            });
        }
    }

    /// Tells a node to let go of an attachment that does not count. Best effort, once at a time.
    pub(super) fn release_stale(self: &Arc<Self>, volume: VolumeId, node: NodeId, epoch: Epoch) {
        let Some(port) = self.ports.node(&node) else {
            return;
        };
        let subject = (volume, node);
        let fresh = self.releasing().insert(subject.clone());
        if !fresh {
            return;
        }
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            let answer = released(timeout(RELEASE, port.release(&subject.0, epoch)).await.ok());
            tracing::info!(volume = %subject.0, node = %subject.1, %epoch, ?answer, "stale attachment");
            inner.releasing().remove(&subject);
        });
    }

    fn releasing(
        &self,
    ) -> std::sync::MutexGuard<'_, std::collections::HashSet<(VolumeId, NodeId)>> {
        self.releasing
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Tells the owner of an ended ticket to stop. Best effort: who is not
    /// reached learns it when it renews.
    pub(super) async fn interrupt(
        self: Arc<Self>,
        volume: VolumeId,
        ticket: TicketId,
        node: NodeId,
        grace: Duration,
    ) {
        let Some(port) = self.ports.node(&node) else {
            return;
        };
        let stop = port.interrupt(&volume, &ticket, grace);
        let stopped = timeout(grace + RELEASE, stop).await.unwrap_or(false);
        tracing::info!(%volume, %ticket, %node, stopped, "interrupted");
    }
}

/// A home's refusal in the arbiter's words. Of commands still inside it says
/// where they are, since that disk is all that can be looked after, and with
/// which word an operator ends the wait.
fn refused(intent: &Intent, error: &HomeError) -> ArbiterError {
    match (error, &intent.task) {
        (HomeError::Unsettled { inside }, Task::Fence { request, .. }) => {
            ArbiterError::NotYet(format!(
                "home {}: {error}; what follows waits for them: look at that node's disk (dmesg, \
                 processes in D state). If they can never end: drover volume accept-unsettled {} \
                 --epoch {} --inside {inside}",
                intent.home, request.volume, request.epoch
            ))
        }
        (other, _) => other.clone().into(),
    }
}

fn released(answer: Option<NodeAnswer>) -> NodeAnswer {
    answer.unwrap_or_else(|| NodeAnswer::Silent(format!("no answer within {RELEASE:?}")))
}

/// A home's call with a deadline.
pub(super) async fn within<T>(
    node: &NodeId,
    name: &str,
    deadline: Duration,
    call: impl Future<Output = Result<T, HomeError>>,
) -> Result<T, HomeError> {
    match timeout(deadline, call).await {
        Ok(result) => result,
        Err(_) => Err(HomeError::Unreachable {
            node: node.clone(),
            detail: format!("no answer to {name} within {deadline:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::ports::{FenceRequest, Recorded};
    use crate::ids::{ActionId, Epoch};

    #[test]
    fn commands_still_inside_are_told_with_their_home() {
        let intent = Intent {
            id: ActionId(1),
            epoch: Epoch(4),
            home: "h".parse().unwrap(),
            task: Task::Fence {
                request: FenceRequest {
                    volume: "v".parse().unwrap(),
                    epoch: Epoch(4),
                    recorded: Recorded::begin_of(Epoch(4)),
                },
                holder: None,
            },
        };
        let error = refused(&intent, &HomeError::Unsettled { inside: 3 });
        let ArbiterError::NotYet(text) = error else {
            panic!("{error}");
        };
        assert!(text.starts_with("home h: 3 commands are still inside the closed gate"));
        assert!(text.ends_with("drover volume accept-unsettled v --epoch 4 --inside 3"));
    }
}

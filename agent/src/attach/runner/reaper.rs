//! Ends what is stale: tickets whose lease has run out.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::Inner;
use crate::attach::state::Event;

/// How long the reaper sleeps when no lease is near its end, or the store failed it.
const IDLE: Duration = Duration::from_secs(1);

/// Runs until the arbiter is dropped.
pub(super) async fn run(inner: Weak<Inner>) {
    while let Some(inner) = inner.upgrade() {
        if inner.stopped() {
            return;
        }
        let now = Instant::now();
        let mut wake = now + IDLE;
        for slot in inner.slots() {
            let (due, next) = slot.overdue(now);
            wake = next.map_or(wake, |next| wake.min(next));
            for ticket in due {
                let event = Event::Expired(ticket.clone());
                match inner.apply(&slot, event).await {
                    Ok(state) => {
                        let mut claims = state.claims.iter();
                        if !claims.any(|claim| claim.ticket.id == ticket) {
                            inner.figures.lease_expired();
                        }
                    }
                    Err(error) => {
                        tracing::warn!(volume = %slot.id(), %ticket, %error, "not reaped yet");
                    }
                }
            }
        }
        let asleep = Arc::clone(&inner);
        drop(inner);
        let changed = asleep.leases_changed.notified();
        let _ = timeout(wake.saturating_duration_since(Instant::now()), changed).await;
    }
}

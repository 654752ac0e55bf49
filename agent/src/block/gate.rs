//! The epoch gate: lets the commands of one attachment in, or keeps them out.
//!
//! There is one gate per (volume, epoch, node), and one per association of an
//! export. A command enters before it touches the device and leaves when it
//! has settled, whatever became of the connection that brought it.
//!
//! ```text
//!            enter: inside + 1            enter: refused, late + 1
//!            leave: inside - 1            leave: inside - 1
//!   open ───────────── close ─────────► closed ── inside = 0 ──► settled
//! ```
//!
//! Whether the gate is open and how many are inside is one atomic word, so
//! closing is one operation: after it nobody enters, and the number it returns
//! is exact. A closed gate never opens again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

const CLOSED: u64 = 1 << 63;

/// Keeps the commands of one attachment in or out.
#[derive(Debug, Default)]
pub struct Gate {
    /// [`CLOSED`] or not, and the number of commands inside.
    state: AtomicU64,
    late: AtomicU64,
    closed_at: OnceLock<Instant>,
    settled_at: OnceLock<Instant>,
    settled: Notify,
}

/// One command's stay inside a gate. It leaves when this is dropped.
#[derive(Debug)]
#[must_use = "a pass that is dropped has left the gate"]
pub struct Pass {
    gate: Arc<Gate>,
}

impl Gate {
    /// An open gate with nobody inside.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Lets a command in; none when the gate is closed, and then it is counted as late.
    pub fn enter(self: &Arc<Self>) -> Option<Pass> {
        let entered = self
            .state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
                (state & CLOSED == 0).then_some(state + 1)
            });
        if entered.is_err() {
            self.late.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(Pass {
            gate: Arc::clone(self),
        })
    }

    /// Closes the gate and returns how many commands are inside. Closing it
    /// again changes nothing and returns how many are inside by then.
    pub fn close(&self) -> u32 {
        // Set first, so that nobody can be seen to settle before the closing.
        let closed_at = *self.closed_at.get_or_init(Instant::now);
        let before = self.state.fetch_or(CLOSED, Ordering::AcqRel);
        let inside = count(before);
        if inside == 0 {
            self.settled_at.get_or_init(|| closed_at);
            self.settled.notify_waiters();
        }
        inside
    }

    /// Whether the gate is closed.
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }

    /// How many commands are inside now.
    pub fn inside(&self) -> u32 {
        count(self.state.load(Ordering::Acquire))
    }

    /// How many commands were refused because the gate was closed.
    pub fn late(&self) -> u64 {
        self.late.load(Ordering::Relaxed)
    }

    /// Waits, at most for `deadline`, until the gate is closed and empty.
    ///
    /// Returns the time from the closing until the last command left.
    ///
    /// # Errors
    /// How many commands are inside still at the deadline (0 if the gate was
    /// never closed and happens to be empty).
    pub async fn settled(&self, deadline: Duration) -> Result<Duration, u32> {
        let all_left = async {
            loop {
                // Registered before the look, so that no leaving falls between.
                let notified = self.settled.notified();
                if self.state.load(Ordering::Acquire) == CLOSED {
                    return;
                }
                notified.await;
            }
        };
        match tokio::time::timeout(deadline, all_left).await {
            Ok(()) => {
                let closed_at = *self.closed_at.get_or_init(Instant::now);
                let settled_at = *self.settled_at.get_or_init(Instant::now);
                Ok(settled_at.saturating_duration_since(closed_at))
            }
            Err(_) => Err(self.inside()),
        }
    }
}

impl Pass {
    /// Whether the gate was closed behind it.
    pub fn is_stale(&self) -> bool {
        self.gate.is_closed()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let before = self.gate.state.fetch_sub(1, Ordering::AcqRel);
        if before == CLOSED | 1 {
            self.gate.settled_at.get_or_init(Instant::now);
            self.gate.settled.notify_waiters();
        }
    }
}

fn count(state: u64) -> u32 {
    u32::try_from(state & !CLOSED).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;

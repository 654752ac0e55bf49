//! Threads that may wait: for what a ring does not do, and where there is none.
//!
//! A disk that hangs keeps a thread for each of its jobs, so each device has
//! [lanes](super::lanes) of its own: one for each of what its jobs wait for.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::bell::{Inbox, Message};
use super::driver::Key;
use super::lanes::Lanes;
use super::link::Begun;
use super::protocol::Operation;
use super::serve::COMMANDS;
use crate::block::gate::Pass;

/// As many at once.
const MOST: usize = 512;
/// Kept when there is nothing to do.
const KEPT: usize = 2;
/// One beyond those that had nothing to do for so long ends.
const IDLE: Duration = Duration::from_secs(10);
const STACK: usize = 256 << 10;

/// An operation, and who is told of its end.
pub struct Job {
    /// The thread's whose connection began it.
    pub inbox: Arc<Inbox>,
    /// The connection.
    pub key: Key,
    /// What is to be done.
    pub begun: Begun,
}

/// What a lane's jobs wait for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Waits {
    /// The device alone: reads, writes and flushes.
    Device,
    /// Other jobs as well: a call that writes alone waits for the writes that are
    /// under way, which must never be behind it.
    Jobs,
    /// Neither: what holds no gate, such as the arithmetic of a host that has to
    /// prove itself. No command waits behind it.
    Nothing,
}

/// A device, by its place in memory, and a lane of its. A device that comes to be
/// where another was shares its lanes for a moment.
type LaneKey = (usize, Waits);

impl Job {
    fn lane(&self) -> LaneKey {
        let device = Arc::as_ptr(&self.begun.device).addr();
        let waits = match self.begun.operation {
            Operation::Call(_) if self.begun.passes.iter().all(Option::is_none) => Waits::Nothing,
            Operation::Call(_) => Waits::Jobs,
            Operation::Read { .. } | Operation::Write { .. } | Operation::Flush => Waits::Device,
        };
        (device, waits)
    }

    fn perform(self) {
        let Begun {
            tag,
            device,
            operation,
            passes,
        } = self.begun;
        // It has not reached the disk, so whoever waits for the gate need not
        // wait for it as well.
        let outcome = if passes.iter().flatten().any(Pass::is_stale) {
            operation.refused()
        } else {
            operation.perform(&*device)
        };
        drop(passes);
        self.inbox.post(Message::Done(self.key, tag, outcome));
    }
}

/// Threads that do jobs.
pub struct Workers {
    state: Mutex<State>,
    more: Condvar,
    /// Run by each thread at its start.
    prepare: fn(),
}

struct State {
    jobs: Lanes<LaneKey, Job>,
    idle: usize,
    threads: usize,
}

impl Workers {
    /// Starts the threads that are kept; each runs `prepare` first.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(prepare: fn()) -> io::Result<Arc<Self>> {
        let workers = Arc::new(Self {
            state: Mutex::new(State {
                jobs: Lanes::new(COMMANDS),
                idle: 0,
                threads: 0,
            }),
            more: Condvar::new(),
            prepare,
        });
        for _ in 0..KEPT {
            workers.spawn(&mut workers.state())?;
        }
        Ok(workers)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a job done soon.
    pub fn run(self: &Arc<Self>, job: Job) {
        let mut state = self.state();
        state.jobs.push(job.lane(), job);
        if state.idle < state.jobs.ready()
            && state.threads < MOST
            && let Err(error) = self.spawn(&mut state)
        {
            // The threads there are will come to it.
            tracing::warn!(%error, threads = state.threads, "start one more thread for files");
        }
        drop(state);
        self.more.notify_one();
    }

    fn spawn(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let workers = Arc::clone(self);
        std::thread::Builder::new()
            .name("drover-file".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                (workers.prepare)();
                workers.work();
            })?;
        state.threads += 1;
        Ok(())
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some((lane, job)) = state.jobs.take() {
                drop(state);
                job.perform();
                state = self.state();
                state.jobs.ended(lane);
                continue;
            }
            state.idle += 1;
            let waited = self.more.wait_timeout(state, IDLE);
            let (woken, time) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if time.timed_out() && state.jobs.ready() == 0 && state.threads > KEPT {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
#[path = "workers_tests.rs"]
mod tests;

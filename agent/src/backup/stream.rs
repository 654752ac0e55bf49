//! The agent's side of backup and restore streams.
//!
//! ```text
//! Starting -> Running -> Done
//!     \          |-----> Failed
//!      `---------+-----> Interrupted      (the same id again: Starting)
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::time::timeout;

use super::child::{Silent, Wish, Worker};
use super::error::BackupError;
use super::meters::Meters;
use super::spec::{
    BackupInfo, Counts, Event, Job, Outcome, Phase, Progress, RepositorySpec, RestoreSpec,
    StreamSpec,
};
use crate::ids::{Bytes, TicketId, VolumeId};

/// How long a killed worker has to be gone before it counts as held by the kernel.
const KILL_BOUND: Duration = Duration::from_millis(200);

/// Ended streams that are still listed, at most.
const ENDED_KEPT: usize = 64;

/// Numbers closer together than this say nothing about a rate.
const RATE_EVERY: Duration = Duration::from_millis(150);

/// The streams of an agent.
pub struct Streams {
    program: PathBuf,
    streams: Mutex<BTreeMap<TicketId, Arc<Stream>>>,
    meters: Arc<Meters>,
}

/// One backup or restore.
pub struct Stream {
    id: TicketId,
    volume: VolumeId,
    job: Job,
    began: Instant,
    progress: watch::Sender<Progress>,
    outcome: watch::Sender<Option<Outcome>>,
    wish: watch::Sender<Wish>,
    pid: u32,
    meters: Arc<Meters>,
}

impl Streams {
    /// None yet. `program` is drover's own binary, an absolute path.
    pub fn new(program: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            program,
            streams: Mutex::default(),
            meters: Arc::default(),
        })
    }

    /// Adds what the streams count to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.meters.register(registry);
    }

    /// Starts a backup, or resumes it where its cursor is. Running already: gives that one.
    ///
    /// # Errors
    /// The worker cannot be started, or the id is running for something else.
    pub async fn start(&self, spec: StreamSpec) -> Result<Arc<Stream>, BackupError> {
        let (id, volume, size) = (spec.id.clone(), spec.volume.clone(), spec.size);
        self.run(id, volume, size, Job::Backup(spec)).await
    }

    /// Starts a restore, from the beginning. Running already: gives that one.
    ///
    /// # Errors
    /// The worker cannot be started, or the id is running for something else.
    pub async fn restore(&self, spec: RestoreSpec) -> Result<Arc<Stream>, BackupError> {
        let size = spec.size.unwrap_or_default();
        let (id, volume) = (spec.id.clone(), spec.volume.clone());
        self.run(id, volume, size, Job::Restore(spec)).await
    }

    /// Every stream that runs, and those that ended last.
    pub fn list(&self) -> Vec<Arc<Stream>> {
        self.lock().values().cloned().collect()
    }

    /// A stream by its id.
    pub fn get(&self, id: &TicketId) -> Option<Arc<Stream>> {
        self.lock().get(id).cloned()
    }

    /// Drover's backups in a repository, oldest first.
    ///
    /// # Errors
    /// The repository's, or that it did not answer within `deadline`.
    pub async fn list_backups(
        &self,
        repo: RepositorySpec,
        deadline: Duration,
    ) -> Result<Vec<BackupInfo>, BackupError> {
        let what = format!("listing repository {}", repo.path.display());
        let (wish, wished) = watch::channel(Wish::Run);
        let mut worker = Worker::start(&self.program, &Job::List(repo), wished).await?;
        let listed = timeout(deadline, async {
            while let Some(event) = worker.next().await {
                match event {
                    Event::Backups(backups) => return Some(Ok(backups)),
                    Event::Failed(error) => return Some(Err(error)),
                    Event::Progress(_) | Event::Done(_) | Event::Interrupted => {}
                }
            }
            None
        })
        .await;
        let seconds = deadline.as_secs();
        match listed {
            Ok(Some(listed)) => {
                tokio::spawn(worker.reaped());
                listed
            }
            Ok(None) => match timeout(deadline, worker.reaped()).await {
                Ok(Silent::Died(error)) => Err(error),
                Ok(Silent::Killed) | Err(_) => Err(BackupError::Deadline { what, seconds }),
            },
            Err(_) => {
                wish.send_replace(Wish::Kill);
                tokio::spawn(async move {
                    worker.reaped().await;
                    drop(wish);
                });
                Err(BackupError::Deadline { what, seconds })
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<TicketId, Arc<Stream>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(
        &self,
        id: TicketId,
        volume: VolumeId,
        size: Bytes,
        job: Job,
    ) -> Result<Arc<Stream>, BackupError> {
        if let Some(running) = Self::running(&self.lock(), &id, &job)? {
            return Ok(running);
        }
        let (wish, wished) = watch::channel(Wish::Run);
        let worker = Worker::start(&self.program, &job, wished).await?;
        let stream = Arc::new(Stream {
            id,
            volume,
            job,
            began: Instant::now(),
            progress: watch::Sender::new(Progress::starting(size)),
            outcome: watch::Sender::new(None),
            wish,
            pid: worker.pid(),
            meters: self.meters.clone(),
        });
        // Two calls may have got here at once: the first stays.
        let admitted = self.admit(&stream);
        if matches!(&admitted, Ok(first) if Arc::ptr_eq(first, &stream)) {
            tokio::spawn(stream.follow(worker));
        } else {
            stream.wish.send_replace(Wish::Kill);
            tokio::spawn(async move {
                worker.reaped().await;
                drop(stream);
            });
        }
        admitted
    }

    /// Lists a new stream, unless one of its id is running; gives the one that is listed then.
    fn admit(&self, stream: &Arc<Stream>) -> Result<Arc<Stream>, BackupError> {
        let mut streams = self.lock();
        if let Some(running) = Self::running(&streams, &stream.id, &stream.job)? {
            return Ok(running);
        }
        self.meters.entered(Phase::Starting);
        if let Some(before) = streams.insert(stream.id.clone(), stream.clone()) {
            self.meters.left(before.phase());
        }
        self.forget_oldest(&mut streams);
        Ok(stream.clone())
    }

    /// The running stream of this id, if there is one and it does the same.
    fn running(
        streams: &BTreeMap<TicketId, Arc<Stream>>,
        id: &TicketId,
        job: &Job,
    ) -> Result<Option<Arc<Stream>>, BackupError> {
        let running = streams.get(id).filter(|stream| !stream.phase().ended());
        match running.cloned() {
            Some(stream) if stream.does(job) => Ok(Some(stream)),
            Some(stream) => Err(BackupError::Busy {
                id: id.clone(),
                volume: stream.volume.clone(),
            }),
            None => Ok(None),
        }
    }

    fn forget_oldest(&self, streams: &mut BTreeMap<TicketId, Arc<Stream>>) {
        loop {
            let ended = streams.values().filter(|stream| stream.phase().ended());
            if ended.clone().count() <= ENDED_KEPT {
                return;
            }
            let Some(oldest) = ended.min_by_key(|stream| stream.began) else {
                return;
            };
            let (id, phase) = (oldest.id.clone(), oldest.phase());
            streams.remove(&id);
            self.meters.left(phase);
        }
    }
}

impl Stream {
    /// Its id.
    pub fn id(&self) -> &TicketId {
        &self.id
    }

    /// The volume it reads or writes.
    pub fn volume(&self) -> &VolumeId {
        &self.volume
    }

    /// Its worker's process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How far it is, now and from now on.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// How it ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome.borrow().clone()
    }

    /// Waits until it has ended.
    pub async fn ended(&self) -> Outcome {
        let mut outcome = self.outcome.subscribe();
        let ended = outcome.wait_for(Option::is_some).await;
        // The sender is a field of this stream, so it cannot be gone.
        ended
            .ok()
            .and_then(|outcome| outcome.clone())
            .unwrap_or(Outcome::Abandoned)
    }

    /// Asks it to stop, and kills it when it has not within `grace`. Answers
    /// within `grace` and a quarter of a second, whatever hangs.
    pub async fn interrupt(&self, grace: Duration) -> Outcome {
        self.wish(Wish::Stop);
        if let Ok(outcome) = timeout(grace, self.ended()).await {
            return outcome;
        }
        self.wish(Wish::Kill);
        if let Ok(outcome) = timeout(KILL_BOUND, self.ended()).await {
            return outcome;
        }
        self.end(Outcome::Abandoned);
        self.ended().await
    }

    fn wish(&self, wish: Wish) {
        self.wish.send_if_modified(|now| {
            let more = wish > *now;
            if more {
                *now = wish;
            }
            more
        });
    }

    fn phase(&self) -> Phase {
        self.progress.borrow().phase
    }

    /// Whether it does what another request of its id asks for.
    fn does(&self, job: &Job) -> bool {
        match (&self.job, job) {
            (Job::Backup(a), Job::Backup(b)) => {
                (&a.volume, &a.snapshot, &a.repo.path) == (&b.volume, &b.snapshot, &b.repo.path)
            }
            (Job::Restore(a), Job::Restore(b)) => {
                (&a.target, &a.which, &a.repo.path) == (&b.target, &b.which, &b.repo.path)
            }
            _ => false,
        }
    }

    /// Follows its worker to the end.
    async fn follow(self: Arc<Self>, mut worker: Worker) {
        let mut rate = Rate::new(Instant::now());
        let mut last = None;
        while let Some(event) = worker.next().await {
            match event {
                Event::Progress(counts) => self.count(&counts, &mut rate),
                Event::Done(id) => last = Some(Outcome::Done(id)),
                Event::Interrupted => last = Some(Outcome::Interrupted),
                Event::Failed(error) => last = Some(Outcome::Failed(error)),
                Event::Backups(_) => {}
            }
        }
        let silent = worker.reaped().await;
        self.end(last.unwrap_or(match silent {
            Silent::Killed => Outcome::Killed,
            Silent::Died(error) => Outcome::Failed(error),
        }));
    }

    fn count(&self, counts: &Counts, rate: &mut Rate) {
        self.progress.send_modify(|progress| {
            if progress.phase.ended() {
                return;
            }
            self.meters.moved(
                counts.read.saturating_sub(progress.bytes_read),
                counts.uploaded.saturating_sub(progress.bytes_uploaded),
            );
            if counts.done > 0 || counts.uploaded > 0 {
                self.enter(progress, Phase::Running);
            }
            if counts.total > 0 {
                progress.bytes_total = counts.total;
            }
            progress.bytes_done = counts.done;
            progress.bytes_held = counts.held;
            progress.bytes_resumed = counts.resumed;
            progress.bytes_read = counts.read;
            progress.bytes_uploaded = counts.uploaded;
            progress.bytes_uncommitted = counts.uncommitted;
            progress.rate = rate.of(
                counts.done - counts.resumed.min(counts.done),
                Instant::now(),
            );
            let left = progress.bytes_total.saturating_sub(counts.done);
            progress.eta_seconds = left.checked_div(progress.rate);
        });
    }

    fn enter(&self, progress: &mut Progress, phase: Phase) {
        if progress.phase != phase {
            self.meters.left(progress.phase);
            self.meters.entered(phase);
            progress.phase = phase;
        }
    }

    /// The first end counts.
    fn end(&self, outcome: Outcome) {
        self.outcome.send_if_modified(|ended| {
            if ended.is_some() {
                return false;
            }
            self.progress.send_modify(|progress| {
                progress.rate = 0;
                progress.eta_seconds = None;
                progress.bytes_done = progress.bytes_held;
                match &outcome {
                    Outcome::Done(id) => {
                        progress.bytes_done = progress.bytes_total;
                        progress.bytes_held = progress.bytes_total;
                        progress.restic_snapshot = Some(id.clone());
                        self.enter(progress, Phase::Done);
                    }
                    Outcome::Interrupted | Outcome::Killed | Outcome::Abandoned => {
                        self.enter(progress, Phase::Interrupted);
                    }
                    Outcome::Failed(error) => {
                        progress.error = Some(error.to_string());
                        self.meters.failed();
                        self.enter(progress, Phase::Failed);
                    }
                }
            });
            *ended = Some(outcome);
            true
        });
    }
}

/// A smoothed rate.
struct Rate {
    at: Instant,
    done: u64,
    per_second: f64,
}

impl Rate {
    fn new(at: Instant) -> Self {
        Self {
            at,
            done: 0,
            per_second: 0.0,
        }
    }

    /// Bytes a second, when so much is done at this time.
    fn of(&mut self, done: u64, at: Instant) -> u64 {
        let time = at.saturating_duration_since(self.at);
        if time >= RATE_EVERY {
            let now = done.saturating_sub(self.done) as f64 / time.as_secs_f64();
            self.per_second = match self.per_second {
                0.0 => now,
                before => 0.8 * before + 0.2 * now,
            };
            (self.at, self.done) = (at, done);
        }
        self.per_second as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_follows_what_is_done_and_never_jumps() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        assert_eq!(rate.of(100, start), 0, "no time has passed");
        let second = Duration::from_secs(1);
        assert_eq!(rate.of(1000, start + second), 1000);
        assert_eq!(rate.of(1000, start + 2 * second), 800);
        assert_eq!(rate.of(500, start + 3 * second), 640, "never negative");
    }
}

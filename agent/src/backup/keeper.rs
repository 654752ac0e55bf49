//! Streams that outlive the agent: what was begun is on disk before it
//! begins, and goes on by itself when the agent is back.
//!
//! Owns one folder with a file for each stream, readable by root alone since
//! it holds the repository's password. A stream that an operator stopped stays
//! stopped; one that ended is forgotten when whoever waits for its end
//! (its ticket, its snapshot) has been told.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use super::{BackupError, Outcome, Progress, RestoreSpec, Stream, StreamSpec, Streams};
use crate::ids::{SnapshotId, TicketId, VolumeId};

/// What a stream does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// Back a snapshot up.
    Backup(StreamSpec),
    /// Restore a backup.
    Restore(RestoreSpec),
}

impl Job {
    /// The stream's id, and its ticket's.
    pub fn id(&self) -> &TicketId {
        match self {
            Self::Backup(spec) => &spec.id,
            Self::Restore(spec) => &spec.id,
        }
    }

    /// The volume it is of.
    pub fn volume(&self) -> &VolumeId {
        match self {
            Self::Backup(spec) => &spec.volume,
            Self::Restore(spec) => &spec.volume,
        }
    }

    /// The snapshot it reads, if it reads one.
    pub fn snapshot(&self) -> Option<&SnapshotId> {
        match self {
            Self::Backup(spec) => Some(&spec.snapshot),
            Self::Restore(_) => None,
        }
    }
}

/// A stream's file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Kept {
    job: Job,
    /// Whether an operator stopped it: it does not go on by itself when the
    /// agent is back.
    stopped: bool,
    /// Whether it is whole: nothing is left to do but to tell of it.
    #[serde(default)]
    whole: bool,
}

/// A stream as it is now.
#[derive(Clone)]
pub struct KeptStream {
    /// What it does.
    pub job: Job,
    /// How far it is; none: it was stopped before this agent started. One that
    /// was whole by then is done, of unknown size.
    pub progress: Option<Progress>,
    /// Whether it failed so that no resume can help: its snapshot is gone.
    pub beyond_resume: bool,
    /// Whether it runs no more and holds nothing here any more.
    pub at_rest: bool,
}

/// What has become of a stream's end.
///
/// ```text
/// Ahead -> AtRest -> Told      (resumed: a new one, Ahead)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// It runs, or what it held here is not yet given back.
    Ahead,
    /// It holds nothing here any more; its ticket still stands.
    AtRest,
    /// The controller has ended its ticket.
    Told,
}

/// A stream that was begun or joined, for whoever follows it.
#[derive(Debug)]
pub struct Followed {
    /// What it does.
    pub job: Job,
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
    /// What has become of its end.
    pub end: watch::Receiver<End>,
}

/// Why a stream is not kept.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A file of the keeper's cannot be read or written.
    #[error("{call} {}: {source}", path.display())]
    Io {
        /// The call.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// No such stream.
    #[error("this agent has no backup stream {0}")]
    NoStream(TicketId),
    /// A restore that has ended.
    #[error("restore {0} has ended and does not go on: start it again, under another name")]
    Restore(TicketId),
    /// The stream did not start.
    #[error(transparent)]
    Backup(#[from] BackupError),
}

struct Entry {
    kept: Kept,
    /// None: it was stopped before this agent started.
    run: Option<Run>,
}

#[derive(Clone)]
struct Run {
    stream: Arc<Stream>,
    end: watch::Sender<End>,
}

impl Run {
    fn followed(&self, job: &Job) -> Followed {
        Followed {
            job: job.clone(),
            progress: self.stream.progress(),
            end: self.end.subscribe(),
        }
    }
}

/// The streams of one agent.
pub struct Keeper {
    folder: PathBuf,
    streams: Arc<Streams>,
    entries: Mutex<BTreeMap<TicketId, Entry>>,
    ended: Arc<Notify>,
}

impl Keeper {
    /// Reads the folder and lets every stream go on that was not stopped.
    ///
    /// # Errors
    /// When the folder cannot be read. A file that makes no sense is left
    /// where it is and logged.
    pub async fn open(folder: PathBuf, streams: Arc<Streams>) -> Result<Arc<Self>, KeeperError> {
        let failed = |call, path: &Path| {
            let path = path.to_owned();
            move |source| KeeperError::Io { call, path, source }
        };
        fs::create_dir_all(&folder).map_err(failed("create", &folder))?;
        let keeper = Arc::new(Self {
            folder: folder.clone(),
            streams,
            entries: Mutex::default(),
            ended: Arc::default(),
        });
        for file in fs::read_dir(&folder).map_err(failed("read", &folder))? {
            let path = file.map_err(failed("read", &folder))?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let bytes = fs::read(&path).map_err(failed("read", &path))?;
            match serde_json::from_slice::<Kept>(&bytes) {
                Ok(kept) => keeper.take_up(kept).await,
                Err(error) => {
                    tracing::error!(file = %path.display(), %error, "a stream's file makes no sense; it is left alone");
                }
            }
        }
        Ok(keeper)
    }

    /// A backup goes on where its cursor is. A restore does not: nothing kept
    /// its target from other use while no agent ran.
    async fn take_up(&self, kept: Kept) {
        let id = kept.job.id().clone();
        let mut run = None;
        if !kept.stopped && !kept.whole && matches!(kept.job, Job::Backup(_)) {
            match self.launch(&kept.job, || ()).await {
                Ok(launched) => run = Some(launched),
                Err(error) => tracing::error!(stream = %id, %error, "a stream did not go on"),
            }
        }
        self.entries().insert(id, Entry { kept, run });
    }

    /// Begins a stream; it is on disk before it begins. When it has ended, and
    /// before anybody is told, `whole` is called where it is done, and with all
    /// that it holds dropped where it is not.
    ///
    /// # Errors
    /// When its file cannot be written or it does not start.
    pub async fn start(
        &self,
        job: Job,
        whole: impl FnOnce() + Send + 'static,
    ) -> Result<Followed, KeeperError> {
        let kept = Kept {
            job,
            stopped: false,
            whole: false,
        };
        self.write(&kept)?;
        match self.launch(&kept.job, whole).await {
            Ok(run) => Ok(self.enter(kept, run)),
            Err(error) => {
                self.remove_file(kept.job.id())?;
                Err(error.into())
            }
        }
    }

    /// Lets a stopped backup go on, or joins a stream that runs.
    ///
    /// # Errors
    /// When there is none, it is a restore that has ended (its target is not
    /// its own any more), its file cannot be written, or it does not start.
    pub async fn resume(&self, id: &TicketId) -> Result<Followed, KeeperError> {
        let mut kept = self.kept(id)?;
        if let Some(run) = self.running(id) {
            return Ok(run.followed(&kept.job));
        }
        if matches!(kept.job, Job::Restore(_)) {
            return Err(KeeperError::Restore(id.clone()));
        }
        (kept.stopped, kept.whole) = (false, false);
        self.write(&kept)?;
        let run = self.launch(&kept.job, || ()).await?;
        Ok(self.enter(kept, run))
    }

    fn enter(&self, kept: Kept, run: Run) -> Followed {
        let (id, followed) = (kept.job.id().clone(), run.followed(&kept.job));
        let run = Some(run);
        self.entries().insert(id, Entry { kept, run });
        followed
    }

    /// Waits until a stream is [`End::AtRest`]; one that came to rest while
    /// nobody waited counts.
    pub async fn an_end(&self) {
        self.ended.notified().await;
    }

    /// Notes that the controller knows of a stream's end.
    pub fn told(&self, id: &TicketId) {
        if let Some(run) = self.entries().get(id).and_then(|entry| entry.run.as_ref()) {
            run.end.send_if_modified(|end| {
                let at_rest = *end == End::AtRest;
                if at_rest {
                    *end = End::Told;
                }
                at_rest
            });
        }
    }

    /// Stops a stream within `grace` and a little, whatever hangs.
    ///
    /// # Errors
    /// When there is none or its file cannot be written.
    pub async fn interrupt(&self, id: &TicketId, grace: Duration) -> Result<Outcome, KeeperError> {
        self.mark_stopped(id)?;
        let run = self.entries().get(id).and_then(|entry| entry.run.clone());
        match run {
            Some(run) => Ok(run.stream.interrupt(grace).await),
            None => Ok(Outcome::Interrupted),
        }
    }

    /// Notes that a stream does not go on by itself.
    ///
    /// # Errors
    /// When there is none or its file cannot be written.
    pub fn mark_stopped(&self, id: &TicketId) -> Result<(), KeeperError> {
        self.mark(id, |kept| kept.stopped = true)
    }

    /// Notes that a stream is whole. On disk when this returns, so that it is
    /// whole to the next agent too, whatever its end has undone by then.
    ///
    /// # Errors
    /// When there is none or its file cannot be written.
    pub fn mark_whole(&self, id: &TicketId) -> Result<(), KeeperError> {
        self.mark(id, |kept| kept.whole = true)
    }

    fn mark(&self, id: &TicketId, mark: impl FnOnce(&mut Kept)) -> Result<(), KeeperError> {
        let mut kept = self.kept(id)?;
        mark(&mut kept);
        self.write(&kept)?;
        if let Some(entry) = self.entries().get_mut(id) {
            entry.kept = kept;
        }
        Ok(())
    }

    /// Removes a stream's file: nothing of it is to be done any more. It is
    /// listed until the agent ends.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn forget(&self, id: &TicketId) -> Result<(), KeeperError> {
        self.remove_file(id)
    }

    /// Every stream, by id.
    pub fn list(&self) -> Vec<KeptStream> {
        let entries = self.entries();
        let gone = |run: &Run| {
            matches!(
                run.stream.outcome(),
                Some(Outcome::Failed(BackupError::SnapshotGone { .. }))
            )
        };
        let view = |entry: &Entry| KeptStream {
            job: entry.kept.job.clone(),
            at_rest: entry
                .run
                .as_ref()
                .is_none_or(|run| *run.end.borrow() > End::Ahead),
            progress: match &entry.run {
                Some(run) => Some(run.stream.progress().borrow().clone()),
                None => entry.kept.whole.then(Progress::whole),
            },
            beyond_resume: entry.run.as_ref().is_some_and(gone),
        };
        entries.values().map(view).collect()
    }

    fn kept(&self, id: &TicketId) -> Result<Kept, KeeperError> {
        let entries = self.entries();
        let entry = entries
            .get(id)
            .ok_or_else(|| KeeperError::NoStream(id.clone()))?;
        Ok(entry.kept.clone())
    }

    fn running(&self, id: &TicketId) -> Option<Run> {
        let run = self.entries().get(id)?.run.clone()?;
        let ended = run.stream.progress().borrow().phase.ended();
        (!ended).then_some(run)
    }

    async fn launch(
        &self,
        job: &Job,
        whole: impl FnOnce() + Send + 'static,
    ) -> Result<Run, BackupError> {
        let stream = match job {
            Job::Backup(spec) => self.streams.start(spec.clone()).await,
            Job::Restore(spec) => self.streams.restore(spec.clone()).await,
        }?;
        let run = Run {
            stream,
            end: watch::Sender::new(End::Ahead),
        };
        let (ending, ended) = (run.clone(), Arc::clone(&self.ended));
        tokio::spawn(async move {
            match ending.stream.ended().await {
                Outcome::Done(_) => whole(),
                Outcome::Interrupted
                | Outcome::Killed
                | Outcome::Abandoned
                | Outcome::Failed(_) => drop(whole),
            }
            ending.end.send_replace(End::AtRest);
            ended.notify_one();
        });
        Ok(run)
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, BTreeMap<TicketId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, id: &TicketId) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }

    fn write(&self, kept: &Kept) -> Result<(), KeeperError> {
        let path = self.path(kept.job.id());
        let fresh = path.with_extension("new");
        let written = (|| {
            let mut options = fs::OpenOptions::new();
            let mut file = options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(&serde_json::to_vec(kept)?)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            fs::File::open(&self.folder)?.sync_all()
        })();
        written.map_err(|source| KeeperError::Io {
            call: "write",
            path,
            source,
        })
    }

    fn remove_file(&self, id: &TicketId) -> Result<(), KeeperError> {
        let path = self.path(id);
        let removed = match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            // Also what was removed before may not be durable yet.
            _ => fs::File::open(&self.folder).and_then(|folder| folder.sync_all()),
        };
        removed.map_err(|source| KeeperError::Io {
            call: "remove",
            path,
            source,
        })
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;

//! The agent's gRPC services: the home's side and the workload's side of one node.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::convert::{judgement_message, moment, optional, set, span, span_message, text};
use super::pb;
use super::refusal::home_status;
use crate::attach::ports::{
    Content, Disk, ExportRequest, FenceRequest, Home as _, Judgement, NodeAnswer,
};
use crate::backup::keeper::{End, Followed, Job, Keeper, KeeperError, KeptStream};
use crate::backup::{
    BackupError, Outcome, Phase, Progress, RepositorySpec, RestoreSpec, Secret, StreamSpec,
    Streams, Which,
};
use crate::home::Home;
use crate::ids::{Bytes, Epoch, NodeId, SnapshotId, TicketId, VolumeId};
use crate::joined::Joined;

/// A repository may take so long to be opened and listed.
const INSPECT: Duration = Duration::from_secs(55);
/// Who follows a stream waits so long for its ticket's end: a controller that
/// starts anew is back by then.
const TOLD: Duration = Duration::from_secs(10);

type Following = Pin<Box<dyn Stream<Item = Result<pb::BackupProgress, Status>> + Send>>;
type Answer<T> = Result<Response<T>, Status>;

/// The home's side.
pub struct HomeService {
    node: NodeId,
    home: Option<Home>,
    streams: Arc<Streams>,
    keeper: Arc<Keeper>,
}

impl HomeService {
    /// Answers for `home`; a node without a pool has none, and says so.
    pub fn new(
        node: NodeId,
        home: Option<Home>,
        streams: Arc<Streams>,
        keeper: Arc<Keeper>,
    ) -> Self {
        Self {
            node,
            home,
            streams,
            keeper,
        }
    }

    fn home(&self) -> Result<&Home, Status> {
        self.home.as_ref().ok_or_else(|| {
            Status::unimplemented(format!(
                "node {} has no pool: its agent was started without --pool",
                self.node
            ))
        })
    }
}

#[tonic::async_trait]
impl pb::home_server::Home for HomeService {
    type StartBackupStream = Following;
    type ResumeBackupStream = Following;
    type StartRestoreStream = Following;

    async fn create(&self, request: Request<pb::CreateRequest>) -> Answer<pb::Nothing> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let content = Content::try_from(request.content)?;
        let made = self
            .home()?
            .create(&volume, Bytes(request.size), &content)
            .await;
        made.map_err(|e| home_status(&e))?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn delete(&self, request: Request<pb::DeleteRequest>) -> Answer<pb::Nothing> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        self.home()?
            .delete(&volume, request.unused)
            .await
            .map_err(|e| home_status(&e))?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn expand(&self, request: Request<pb::ExpandRequest>) -> Answer<pb::ExpandAnswer> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let size = self.home()?.expand(&volume, Bytes(request.size)).await;
        Ok(Response::new(pb::ExpandAnswer {
            size: size.map_err(|e| home_status(&e))?.0,
        }))
    }

    async fn snapshot(&self, request: Request<pb::SnapshotRequest>) -> Answer<pb::SnapshotAnswer> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let snapshot = text("snapshot", &request.snapshot)?;
        let info = self.home()?.snapshot(&volume, &snapshot).await;
        Ok(Response::new((&info.map_err(|e| home_status(&e))?).into()))
    }

    async fn delete_snapshot(&self, request: Request<pb::SnapshotName>) -> Answer<pb::Nothing> {
        let snapshot = text("snapshot", &request.into_inner().snapshot)?;
        self.home()?
            .delete_snapshot(&snapshot)
            .await
            .map_err(|e| home_status(&e))?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn get_capacity(&self, _: Request<pb::Nothing>) -> Answer<pb::CapacityAnswer> {
        let capacity = self.home()?.capacity().await.map_err(|e| home_status(&e))?;
        let (available, total) = (capacity.available.0, capacity.total.0);
        Ok(Response::new(pb::CapacityAnswer { available, total }))
    }

    async fn export(&self, request: Request<pb::ExportRequest>) -> Answer<pb::ExportAnswer> {
        let request = ExportRequest::try_from(request.into_inner())?;
        let exported = self
            .home()?
            .export(&request)
            .await
            .map_err(|e| home_status(&e))?;
        Ok(Response::new((&exported).into()))
    }

    async fn get_secrets(&self, request: Request<pb::VolumeEpoch>) -> Answer<pb::SecretsAnswer> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let told = self.home()?.disclose(&volume, Epoch(request.epoch)).await;
        Ok(Response::new((&told.map_err(|e| home_status(&e))?).into()))
    }

    async fn fence(&self, request: Request<pb::FenceRequest>) -> Answer<pb::FenceAnswer> {
        let request = FenceRequest::try_from(request.into_inner())?;
        let settlement = self
            .home()?
            .fence(&request)
            .await
            .map_err(|e| home_status(&e))?;
        Ok(Response::new((&settlement).into()))
    }

    async fn accept_old_copy(
        &self,
        request: Request<pb::VolumeName>,
    ) -> Answer<pb::AcceptOldCopyAnswer> {
        let volume = text("volume", &request.into_inner().volume)?;
        let epoch = self.home()?.accept_old_copy(&volume).await;
        let epoch = epoch.map_err(|e| home_status(&e))?.0;
        Ok(Response::new(pb::AcceptOldCopyAnswer { epoch }))
    }

    async fn accept_unsettled(
        &self,
        request: Request<pb::AcceptUnsettledRequest>,
    ) -> Answer<pb::FenceAnswer> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let (epoch, inside) = (Epoch(request.epoch), request.inside);
        let settled = self.home()?.accept_unsettled(&volume, epoch, inside).await;
        let settlement = settled.map_err(|e| home_status(&e))?;
        Ok(Response::new((&settlement).into()))
    }

    async fn start_backup(&self, request: Request<pb::StartBackupRequest>) -> Answer<Following> {
        let request = request.into_inner();
        let snapshot: SnapshotId = text("snapshot", &request.snapshot)?;
        let job = Job::Backup(StreamSpec {
            id: text("ticket", &request.ticket)?,
            volume: text("volume", &request.volume)?,
            file: self.snapshot_path(&snapshot)?,
            snapshot,
            size: Bytes(request.size),
            home: self.node.clone(),
            repo: repository(request.repository)?,
            slice: crate::backup::SliceLimits::default(),
        });
        self.begin(job, || ()).await
    }

    async fn resume_backup(&self, request: Request<pb::ResumeBackupRequest>) -> Answer<Following> {
        let id: TicketId = text("ticket", &request.into_inner().ticket)?;
        let followed = self.keeper.resume(&id).await;
        followed
            .map(|followed| Response::new(follow(followed, TOLD)))
            .map_err(|e| keeper_status(&e))
    }

    async fn interrupt_backup(
        &self,
        request: Request<pb::InterruptBackupRequest>,
    ) -> Answer<pb::InterruptBackupAnswer> {
        let request = request.into_inner();
        let id = text("ticket", &request.ticket)?;
        let grace = span("grace", request.grace)?.min(Duration::from_secs(60));
        let outcome = self
            .keeper
            .interrupt(&id, grace)
            .await
            .map_err(|e| keeper_status(&e))?;
        let outcome = match outcome {
            Outcome::Done(snapshot) => format!("it was done: {snapshot}"),
            Outcome::Interrupted => "stopped".into(),
            Outcome::Killed => "killed; its last slice will be read again".into(),
            Outcome::Abandoned => "left: it hangs in the kernel and does nothing more".into(),
            Outcome::Failed(error) => format!("it had failed: {error}"),
        };
        Ok(Response::new(pb::InterruptBackupAnswer { outcome }))
    }

    async fn list_streams(&self, _: Request<pb::Nothing>) -> Answer<pb::ListStreamsAnswer> {
        let streams = self.keeper.list().into_iter().map(|kept| {
            let KeptStream { job, progress, .. } = kept;
            progress_message(&job, progress.as_ref())
        });
        Ok(Response::new(pb::ListStreamsAnswer {
            streams: streams.collect(),
        }))
    }

    async fn inspect_backup(
        &self,
        request: Request<pb::InspectBackupRequest>,
    ) -> Answer<pb::BackupView> {
        self.home()?;
        let request = request.into_inner();
        let repo = repository(request.repository)?;
        let backups = self
            .streams
            .list_backups(repo.clone(), INSPECT)
            .await
            .map_err(|e| backup_status(&e))?;
        let wanted = request.repository_snapshot;
        let mut whole = backups.into_iter().filter(|backup| backup.complete);
        let found = match wanted.as_str() {
            "" | "latest" => whole.max_by_key(|backup| backup.time),
            id => whole.find(|backup| id.len() >= 8 && backup.restic_id.starts_with(id)),
        };
        let missing = BackupError::NoBackup {
            repo: repo.path,
            wanted,
        };
        let found = found.ok_or_else(|| backup_status(&missing))?;
        Ok(Response::new(pb::BackupView {
            repository_snapshot: found.restic_id,
            volume: found.volume.to_string(),
            size: found.size.0,
        }))
    }

    async fn start_restore(&self, request: Request<pb::StartRestoreRequest>) -> Answer<Following> {
        let request = request.into_inner();
        let volume: VolumeId = text("volume", &request.volume)?;
        let claim = self
            .home()?
            .restore_target(&volume)
            .await
            .map_err(|e| home_status(&e))?;
        let job = Job::Restore(RestoreSpec {
            id: text("ticket", &request.ticket)?,
            target: claim.path().to_owned(),
            volume,
            repo: repository(request.repository)?,
            which: Which::Restic(request.repository_snapshot),
            size: None,
        });
        self.begin(job, move || claim.finish()).await
    }
}

impl HomeService {
    fn snapshot_path(&self, snapshot: &SnapshotId) -> Result<PathBuf, Status> {
        let path = self.home()?.pool().snapshot_path(snapshot);
        path.map_err(|error| home_status(&error.into()))
    }

    async fn begin(&self, job: Job, whole: impl FnOnce() + Send + 'static) -> Answer<Following> {
        let followed = self.keeper.start(job, whole).await;
        followed
            .map(|followed| Response::new(follow(followed, TOLD)))
            .map_err(|e| keeper_status(&e))
    }
}

fn repository(message: Option<pb::Repository>) -> Result<RepositorySpec, Status> {
    let message = set("repository", message)?;
    if !message.path.starts_with('/') || message.path.contains("/../") {
        let why = format!("repository.path {:?}: not an absolute path", message.path);
        return Err(Status::invalid_argument(why));
    }
    if message.password.is_empty() {
        return Err(Status::invalid_argument("repository.password is empty"));
    }
    let limit = message.limit_upload.checked_mul(1024);
    let limit =
        limit.ok_or_else(|| Status::invalid_argument("repository.limit_upload is too large"))?;
    Ok(RepositorySpec {
        path: message.path.into(),
        password: Secret::new(message.password),
        limit_upload: (limit > 0).then_some(limit),
    })
}

fn keeper_status(error: &KeeperError) -> Status {
    match error {
        KeeperError::NoStream(_) => Status::not_found(error.to_string()),
        KeeperError::Restore(_) => Status::failed_precondition(error.to_string()),
        KeeperError::Io { .. } => Status::unavailable(error.to_string()),
        KeeperError::Backup(error) => backup_status(error),
    }
}

fn backup_status(error: &BackupError) -> Status {
    Status::failed_precondition(error.to_string())
}

/// Progress messages until the stream has ended. The last comes when its ticket
/// has ended too, so that who hears it can use the volume; or after `patience`.
fn follow(followed: Followed, patience: Duration) -> Following {
    let Followed { job, progress, end } = followed;
    let begun = (WatchStream::new(progress), end, job, false);
    Box::pin(futures::stream::unfold(
        begun,
        move |(mut changes, mut end, job, ended)| async move {
            if ended {
                return None;
            }
            let progress = changes.next().await?;
            let ended = progress.phase.ended();
            if ended {
                let told = end.wait_for(|end| *end == End::Told);
                if tokio::time::timeout(patience, told).await.is_err() {
                    tracing::warn!(stream = %job.id(), "has ended, and the controller has not heard of it");
                }
            }
            let message = progress_message(&job, Some(&progress));
            Some((Ok(message), (changes, end, job, ended)))
        },
    ))
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Interrupted => "interrupted",
        Phase::Done => "done",
        Phase::Failed => "failed",
    }
}

/// How a stream is doing, as a message; without progress it has been interrupted.
pub fn progress_message(job: &Job, progress: Option<&Progress>) -> pb::BackupProgress {
    let message = pb::BackupProgress {
        ticket: job.id().to_string(),
        volume: job.volume().to_string(),
        snapshot: job.snapshot().map(ToString::to_string).unwrap_or_default(),
        phase: phase_name(Phase::Interrupted).into(),
        ..Default::default()
    };
    let Some(progress) = progress else {
        return message;
    };
    pb::BackupProgress {
        phase: phase_name(progress.phase).into(),
        bytes_total: progress.bytes_total,
        bytes_done: progress.bytes_done,
        bytes_resumed: progress.bytes_resumed,
        bytes_uploaded: progress.bytes_uploaded,
        bytes_uncommitted: progress.bytes_uncommitted,
        bytes_per_second: progress.rate,
        eta: progress
            .eta_seconds
            .map(|eta| span_message(Duration::from_secs(eta))),
        repository_snapshot: progress.restic_snapshot.clone().unwrap_or_default(),
        error: progress.error.clone().unwrap_or_default(),
        ..message
    }
}

/// What the workload's side of a node can do, as its daemon has wired it.
#[tonic::async_trait]
pub trait Workload: Send + Sync + 'static {
    /// Lets go of what is left of attachments up to `epoch`.
    async fn release(&self, volume: &VolumeId, epoch: Epoch) -> NodeAnswer;
    /// Stops what holds a ticket; true when it has stopped.
    async fn interrupt(&self, volume: &VolumeId, ticket: &TicketId, grace: Duration) -> bool;
    /// Takes a ticket for a foreign reader of a volume's device here.
    async fn register_reader(
        &self,
        volume: &VolumeId,
        reader: pb::register_reader_request::Reader,
    ) -> Result<TicketId, Status>;
    /// Judges who holds a volume's device here.
    async fn judge(&self, volume: &VolumeId) -> Result<(Disk, Judgement), Status>;
    /// All that is known here of one volume, or of every one that this node has
    /// to do with; of one also its journal from `notes_since` on.
    async fn look(
        &self,
        volume: Option<VolumeId>,
        notes_since: Option<SystemTime>,
    ) -> Result<pb::LookAnswer, Status>;
}

/// The workload's side.
pub struct NodeService<W> {
    workload: Arc<W>,
    releases: Joined<(VolumeId, Epoch), NodeAnswer>,
}

impl<W: Workload> NodeService<W> {
    /// Answers for `workload`.
    pub fn new(workload: Arc<W>) -> Self {
        Self {
            workload,
            releases: Joined::default(),
        }
    }
}

#[tonic::async_trait]
impl<W: Workload> pb::node_server::Node for NodeService<W> {
    async fn release(&self, request: Request<pb::ReleaseRequest>) -> Answer<pb::ReleaseAnswer> {
        let request = request.into_inner();
        let volume: VolumeId = text("volume", &request.volume)?;
        let workload = self.workload.clone();
        let epoch = Epoch(request.epoch);
        // To its end: a controller that no longer waits still wants it gone, and
        // asks again.
        let key = (volume.clone(), epoch);
        let release = || async move { workload.release(&volume, epoch).await };
        let answer = self.releases.join(key, release).await;
        let answer = answer.ok_or_else(|| Status::internal("Release was lost: it panicked"))?;
        Ok(Response::new(answer.into()))
    }

    async fn interrupt(
        &self,
        request: Request<pb::InterruptRequest>,
    ) -> Answer<pb::InterruptAnswer> {
        let request = request.into_inner();
        let (volume, ticket) = (
            text("volume", &request.volume)?,
            text("ticket", &request.ticket)?,
        );
        let grace = span("grace", request.grace)?;
        let stopped = self.workload.interrupt(&volume, &ticket, grace).await;
        Ok(Response::new(pb::InterruptAnswer { stopped }))
    }

    async fn register_reader(
        &self,
        request: Request<pb::RegisterReaderRequest>,
    ) -> Answer<pb::RegisterReaderAnswer> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let reader = set("reader", request.reader)?;
        let ticket = self
            .workload
            .register_reader(&volume, reader)
            .await?
            .to_string();
        Ok(Response::new(pb::RegisterReaderAnswer { ticket }))
    }

    async fn judge(&self, request: Request<pb::VolumeName>) -> Answer<pb::JudgeAnswer> {
        let volume = text("volume", &request.into_inner().volume)?;
        let (disk, judgement) = self.workload.judge(&volume).await?;
        Ok(Response::new(judgement_message(&judgement, &disk.name)))
    }

    async fn look(&self, request: Request<pb::LookRequest>) -> Answer<pb::LookAnswer> {
        let request = request.into_inner();
        let volume = optional("volume", &request.volume)?;
        let since = request.notes_since;
        let since = since.map(|since| moment("notes_since", Some(since)));
        let look = self.workload.look(volume, since.transpose()?).await?;
        Ok(Response::new(look))
    }
}

#[cfg(test)]
#[path = "agent_service_tests.rs"]
mod tests;

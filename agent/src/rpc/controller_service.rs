//! The controller's gRPC service: translates, calls the arbiter, translates back.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::agent_client::{AgentClient, Directory, within};
use super::convert::{optional, protocol, set, span, text};
use super::pb::controller_server::Controller;
use super::{pb, refusal};
use crate::attach::journal::Wanted;
use crate::attach::ports::Note;
use crate::attach::record::{AccessMode, NewVolume, Registration};
use crate::attach::{Arbiter, ArbiterError};
use crate::csi::status::Refusal;
use crate::ids::{Bytes, NodeId, SnapshotId};

mod streams;

/// How long a publish may take until it is answered with "not yet".
const PUBLISH: Duration = Duration::from_secs(10);
/// A backup's ticket ends so long after its last progress, and a restore's that
/// its home has not begun so long after it was taken.
pub const BACKUP_LEASE: Duration = Duration::from_secs(60);
/// A live holder may keep NodeUnstage from ending for so long, unless the volume says otherwise.
const BUSY_DEADLINE: Duration = Duration::from_secs(120);
/// A home is asked for its streams with this deadline.
const ASK: Duration = Duration::from_secs(5);
/// A home may take so long to stop a stream, beyond the grace it was given.
const STOP: Duration = Duration::from_secs(10);

type Progress = Pin<Box<dyn Stream<Item = Result<pb::BackupProgress, Status>> + Send>>;
type Answer<T> = Result<Response<T>, Status>;

/// The service. Clones are handles of the same one.
#[derive(Clone)]
pub struct ControllerService {
    arbiter: Arc<Arbiter>,
    agents: Arc<Directory>,
}

impl ControllerService {
    /// Answers from `arbiter`; registrations fill `agents`.
    pub fn new(arbiter: Arc<Arbiter>, agents: Arc<Directory>) -> Self {
        Self { arbiter, agents }
    }

    fn agent(&self, node: &NodeId) -> Result<Arc<AgentClient>, Status> {
        self.agents.agent(node).ok_or_else(|| {
            Status::unavailable(format!(
                "the agent of node {node} has not registered since the controller started"
            ))
        })
    }
}

fn refuse(error: ArbiterError) -> Status {
    refusal::attachment_status(&error).unwrap_or_else(|| Refusal::from(error).into())
}

#[tonic::async_trait]
impl Controller for ControllerService {
    type CreateBackupStream = Progress;
    type ResumeBackupStream = Progress;
    type RestoreStream = Progress;

    async fn register(&self, request: Request<pb::RegisterRequest>) -> Answer<pb::Nothing> {
        let registration = Registration::try_from(request.into_inner())?;
        let (node, agent) = (registration.node.clone(), registration.agent);
        self.arbiter.register(registration).await.map_err(refuse)?;
        self.agents.learn(&node, agent);
        Ok(Response::new(pb::Nothing {}))
    }

    async fn get_attachment(
        &self,
        request: Request<pb::AttachmentRequest>,
    ) -> Answer<pb::AttachmentAnswer> {
        let request = request.into_inner();
        let (volume, node) = (
            text("volume", &request.volume)?,
            text("node", &request.node)?,
        );
        let attachment = self
            .arbiter
            .attachment(&volume, &node)
            .await
            .map_err(refuse)?;
        Ok(Response::new((&attachment).into()))
    }

    async fn add_note(&self, request: Request<pb::Note>) -> Answer<pb::Nothing> {
        self.arbiter
            .note(Note::try_from(request.into_inner())?)
            .await;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn list_notes(
        &self,
        request: Request<pb::ListNotesRequest>,
    ) -> Answer<pb::ListNotesAnswer> {
        let wanted = Wanted::try_from(request.into_inner())?;
        let notes = self.arbiter.notes(&wanted).await.map_err(refuse)?;
        Ok(Response::new(pb::ListNotesAnswer {
            notes: notes.iter().map(Into::into).collect(),
        }))
    }

    async fn create_volume(&self, request: Request<pb::NewVolume>) -> Answer<pb::Volume> {
        let request = request.into_inner();
        let busy_deadline = match request.busy_deadline {
            Some(deadline) => span("busy_deadline", Some(deadline))?,
            None => BUSY_DEADLINE,
        };
        let new = NewVolume {
            name: request.name,
            at_least: Bytes(request.size),
            at_most: None,
            content: request.content.try_into()?,
            protocol: protocol("protocol", &request.protocol)?,
            home: optional("home", &request.home)?,
            busy_deadline,
            parameters: BTreeMap::new(),
        };
        let view = self.arbiter.create_volume(new).await.map_err(refuse)?;
        Ok(Response::new((&view).into()))
    }

    async fn delete_volume(&self, request: Request<pb::VolumeName>) -> Answer<pb::Nothing> {
        let volume = text("volume", &request.into_inner().volume)?;
        self.arbiter.delete_volume(&volume).await.map_err(refuse)?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn list_volumes(&self, _: Request<pb::Nothing>) -> Answer<pb::ListVolumesAnswer> {
        let volumes = self.arbiter.volumes().await.map_err(refuse)?;
        let volumes = volumes.iter().map(Into::into).collect();
        Ok(Response::new(pb::ListVolumesAnswer { volumes }))
    }

    async fn attach(&self, request: Request<pb::AttachRequest>) -> Answer<pb::AttachAnswer> {
        let request = request.into_inner();
        let (volume, node) = (
            text("volume", &request.volume)?,
            text("node", &request.node)?,
        );
        let mode = if request.read_only {
            AccessMode::SingleReader
        } else {
            AccessMode::SingleWriter
        };
        let epoch = self.arbiter.publish(&volume, &node, mode, PUBLISH).await;
        let epoch = epoch.map_err(refuse)?.0;
        Ok(Response::new(pb::AttachAnswer { epoch }))
    }

    async fn detach(&self, request: Request<pb::DetachRequest>) -> Answer<pb::Nothing> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let node: Option<NodeId> = optional("node", &request.node)?;
        self.arbiter
            .unpublish(&volume, node.as_ref())
            .await
            .map_err(refuse)?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn expand_volume(&self, request: Request<pb::ExpandRequest>) -> Answer<pb::ExpandAnswer> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let size = self
            .arbiter
            .expand(&volume, Bytes(request.size), None)
            .await;
        Ok(Response::new(pb::ExpandAnswer {
            size: size.map_err(refuse)?.0,
        }))
    }

    async fn accept_old_copy(
        &self,
        request: Request<pb::VolumeName>,
    ) -> Answer<pb::AcceptOldCopyAnswer> {
        let request = request.into_inner();
        let view = self.arbiter.volume(&text("volume", &request.volume)?).await;
        let home = view.map_err(refuse)?.spec.home;
        let asked = within(STOP, request);
        self.agent(&home)?.home().accept_old_copy(asked).await
    }

    async fn accept_unsettled(
        &self,
        request: Request<pb::AcceptUnsettledRequest>,
    ) -> Answer<pb::FenceAnswer> {
        let request = request.into_inner();
        let view = self.arbiter.volume(&text("volume", &request.volume)?).await;
        let home = view.map_err(refuse)?.spec.home;
        let asked = within(STOP, request);
        self.agent(&home)?.home().accept_unsettled(asked).await
    }

    async fn create_snapshot(
        &self,
        request: Request<pb::NewSnapshot>,
    ) -> Answer<pb::SnapshotAnswer> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let record = self.arbiter.create_snapshot(&volume, &request.name).await;
        Ok(Response::new((&record.map_err(refuse)?).into()))
    }

    async fn delete_snapshot(&self, request: Request<pb::SnapshotName>) -> Answer<pb::Nothing> {
        let snapshot: SnapshotId = text("snapshot", &request.into_inner().snapshot)?;
        self.arbiter
            .delete_snapshot(&snapshot)
            .await
            .map_err(refuse)?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn list_snapshots(&self, _: Request<pb::Nothing>) -> Answer<pb::ListSnapshotsAnswer> {
        let snapshots = self.arbiter.snapshots().await.map_err(refuse)?;
        let snapshots = snapshots.iter().map(Into::into).collect();
        Ok(Response::new(pb::ListSnapshotsAnswer { snapshots }))
    }

    async fn take_ticket(&self, request: Request<pb::TicketRequest>) -> Answer<pb::Nothing> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let ticket = set("ticket", request.ticket)?.try_into()?;
        self.arbiter
            .take_ticket(&volume, ticket)
            .await
            .map_err(refuse)?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn renew_ticket(&self, request: Request<pb::RenewTicketRequest>) -> Answer<pb::Nothing> {
        let request = request.into_inner();
        let (volume, ticket) = (
            text("volume", &request.volume)?,
            text("ticket", &request.ticket)?,
        );
        let lease = span("lease", request.lease)?;
        self.arbiter
            .renew_ticket(&volume, &ticket, lease)
            .await
            .map_err(refuse)?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn end_ticket(&self, request: Request<pb::EndTicketRequest>) -> Answer<pb::Nothing> {
        let request = request.into_inner();
        let (volume, ticket) = (
            text("volume", &request.volume)?,
            text("ticket", &request.ticket)?,
        );
        self.arbiter
            .end_ticket(&volume, &ticket, &request.why)
            .await
            .map_err(refuse)?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn fail_restore(&self, request: Request<pb::EndTicketRequest>) -> Answer<pb::Nothing> {
        let request = request.into_inner();
        let (volume, ticket) = (
            text("volume", &request.volume)?,
            text("ticket", &request.ticket)?,
        );
        let failed = self.arbiter.fail_restore(&volume, &ticket, &request.why);
        failed.await.map_err(refuse)?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn list_nodes(&self, _: Request<pb::Nothing>) -> Answer<pb::ListNodesAnswer> {
        let nodes = self.arbiter.nodes().await.map_err(refuse)?;
        Ok(Response::new(pb::ListNodesAnswer {
            nodes: nodes.iter().map(Into::into).collect(),
        }))
    }

    async fn lose_node(&self, request: Request<pb::NodeName>) -> Answer<pb::Nothing> {
        let node = text("node", &request.into_inner().node)?;
        self.arbiter.node_lost(&node).await.map_err(refuse)?;
        Ok(Response::new(pb::Nothing {}))
    }

    async fn create_backup(&self, request: Request<pb::CreateBackupRequest>) -> Answer<Progress> {
        let request = request.into_inner();
        let volume = text("volume", &request.volume)?;
        let repository = set("repository", request.repository)?;
        self.start_backup(&volume, repository)
            .await
            .map(Response::new)
    }

    async fn resume_backup(&self, request: Request<pb::ResumeBackupRequest>) -> Answer<Progress> {
        let request = request.into_inner();
        let home = self
            .home_of_stream(&text("ticket", &request.ticket)?)
            .await?;
        let stream = home.home().resume_backup(request).await?;
        Ok(Response::new(Box::pin(stream.into_inner())))
    }

    async fn interrupt_backup(
        &self,
        request: Request<pb::InterruptBackupRequest>,
    ) -> Answer<pb::InterruptBackupAnswer> {
        let request = request.into_inner();
        let grace = span("grace", request.grace)?;
        let home = self
            .home_of_stream(&text("ticket", &request.ticket)?)
            .await?;
        home.home()
            .interrupt_backup(within(grace + STOP, request))
            .await
    }

    async fn list_streams(&self, _: Request<pb::Nothing>) -> Answer<pb::ListStreamsAnswer> {
        let mut streams = Vec::new();
        for (node, agent) in self.agents.agents() {
            match agent.home().list_streams(within(ASK, pb::Nothing {})).await {
                Ok(answer) => streams.extend(answer.into_inner().streams),
                Err(status) => tracing::debug!(%node, %status, "a node did not list its streams"),
            }
        }
        Ok(Response::new(pb::ListStreamsAnswer { streams }))
    }

    async fn restore(&self, request: Request<pb::RestoreRequest>) -> Answer<Progress> {
        self.start_restore(request.into_inner())
            .await
            .map(Response::new)
    }
}

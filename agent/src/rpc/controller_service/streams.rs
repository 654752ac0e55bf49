//! Backups and restores begun and found: the ticket first, then the stream at the home.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::timeout;
use tonic::Status;

use super::{ASK, BACKUP_LEASE, BUSY_DEADLINE, ControllerService, Progress, refuse};
use crate::attach::ports::Content;
use crate::attach::record::{NewVolume, Ticket, TicketKind};
use crate::ids::{Bytes, NodeId, TicketId, VolumeId};
use crate::rpc::agent_client::{AgentClient, within};
use crate::rpc::convert::{optional, protocol, set};
use crate::rpc::pb;

/// A repository may take so long to be opened and listed.
const INSPECT: Duration = Duration::from_secs(60);

impl ControllerService {
    /// The home whose agent has a stream of this ticket.
    pub(super) async fn home_of_stream(
        &self,
        ticket: &TicketId,
    ) -> Result<Arc<AgentClient>, Status> {
        let mut silent = Vec::new();
        for (node, agent) in self.agents.agents() {
            match agent.home().list_streams(within(ASK, pb::Nothing {})).await {
                Ok(answer) => {
                    let mut streams = answer.into_inner().streams.into_iter();
                    if streams.any(|stream| stream.ticket == ticket.as_str()) {
                        return Ok(agent);
                    }
                }
                Err(status) if status.code() == tonic::Code::Unimplemented => {}
                Err(_) => silent.push(node.to_string()),
            }
        }
        if silent.is_empty() {
            return Err(Status::not_found(format!(
                "no home has a backup stream {ticket}"
            )));
        }
        let silent = silent.join(", ");
        Err(Status::unavailable(format!(
            "no backup stream {ticket} found, and {silent} did not answer"
        )))
    }

    /// Runs in a task of its own: its snapshot would have no owner if it stopped
    /// halfway because its caller has gone.
    pub(super) async fn start_backup(
        &self,
        volume: &VolumeId,
        repository: pb::Repository,
    ) -> Result<Progress, Status> {
        let (this, volume) = (self.clone(), volume.clone());
        let starting = tokio::spawn(async move { this.claim_and_start(&volume, repository).await });
        starting.await.unwrap_or_else(|error| {
            let why = format!("the start of a backup was cut off: {error}");
            Err(Status::internal(why))
        })
    }

    async fn claim_and_start(
        &self,
        volume: &VolumeId,
        repository: pb::Repository,
    ) -> Result<Progress, Status> {
        let view = self.arbiter.volume(volume).await.map_err(refuse)?;
        let home = self.agent(&view.spec.home)?;
        let ticket = TicketId::random();
        let claim = Ticket {
            id: ticket.clone(),
            kind: TicketKind::Backup,
            node: view.spec.home.clone(),
            owner: "drover backup".into(),
            interruptible: true,
            home_side: true,
            lease_ends: Some(SystemTime::now() + BACKUP_LEASE),
        };
        self.arbiter
            .take_ticket(volume, claim)
            .await
            .map_err(refuse)?;
        let started = self
            .snapshot_and_stream(&home, volume, &ticket, repository)
            .await;
        if let Err(status) = &started {
            self.arbiter.abandon_backup_snapshot(&ticket).await;
            let ended = self
                .arbiter
                .end_ticket(volume, &ticket, status.message())
                .await;
            if let Err(error) = ended {
                tracing::warn!(%ticket, %error, "a ticket that nobody has ends with its lease");
            }
        }
        started
    }

    async fn snapshot_and_stream(
        &self,
        home: &AgentClient,
        volume: &VolumeId,
        ticket: &TicketId,
        repository: pb::Repository,
    ) -> Result<Progress, Status> {
        let taken = self.arbiter.create_backup_snapshot(volume, ticket).await;
        let snapshot = taken.map_err(refuse)?.info;
        let request = pb::StartBackupRequest {
            ticket: ticket.to_string(),
            volume: volume.to_string(),
            snapshot: snapshot.id.to_string(),
            size: snapshot.size.0,
            repository: Some(repository),
        };
        // The ticket's lease has ended by then, and this task must end, too.
        match timeout(BACKUP_LEASE, home.home().start_backup(request)).await {
            Ok(answer) => Ok(Box::pin(answer?.into_inner())),
            Err(_) => Err(Status::unavailable(format!(
                "the home did not start the backup within {BACKUP_LEASE:?}"
            ))),
        }
    }

    /// The home that can read the backup: the one asked for, or the first with a pool that finds it.
    pub(super) async fn find_backup(
        &self,
        home: &str,
        repository: &pb::Repository,
        snapshot: &str,
    ) -> Result<(NodeId, pb::BackupView), Status> {
        let asked: Option<NodeId> = optional("home", home)?;
        let nodes = self.arbiter.nodes().await.map_err(refuse)?;
        let homes = nodes.into_iter().filter(|n| n.has_pool).map(|n| n.node);
        let homes: Vec<NodeId> = asked.map_or_else(|| homes.collect(), |home| vec![home]);
        let mut failure = Status::failed_precondition("no node with a pool has registered");
        for home in homes {
            let request = pb::InspectBackupRequest {
                repository: Some(repository.clone()),
                repository_snapshot: snapshot.into(),
            };
            let inspect = async {
                self.agent(&home)?
                    .home()
                    .inspect_backup(within(INSPECT, request))
                    .await
            };
            match inspect.await {
                Ok(view) => return Ok((home, view.into_inner())),
                Err(status) => failure = status,
            }
        }
        Err(failure)
    }

    pub(super) async fn start_restore(
        &self,
        request: pb::RestoreRequest,
    ) -> Result<Progress, Status> {
        let repository = set("repository", request.repository)?;
        let (home, backup) = self
            .find_backup(&request.home, &repository, &request.repository_snapshot)
            .await?;
        let new = NewVolume {
            name: request.name,
            at_least: Bytes(backup.size),
            at_most: None,
            content: Content::Empty,
            protocol: protocol("protocol", "")?,
            home: Some(home),
            busy_deadline: BUSY_DEADLINE,
            parameters: BTreeMap::new(),
        };
        let ticket = TicketId::random();
        let made = self
            .arbiter
            .create_volume_for_restore(new, ticket.clone(), BACKUP_LEASE);
        let view = made.await.map_err(refuse)?;
        let volume = &view.spec.id;
        let request = pb::StartRestoreRequest {
            ticket: ticket.to_string(),
            volume: volume.to_string(),
            repository: Some(repository),
            repository_snapshot: backup.repository_snapshot,
        };
        let started = async {
            self.agent(&view.spec.home)?
                .home()
                .start_restore(request)
                .await
        };
        match started.await {
            Ok(stream) => Ok(Box::pin(stream.into_inner())),
            Err(status) => {
                let failed = self.arbiter.fail_restore(volume, &ticket, status.message());
                failed.await.map_err(refuse)?;
                Err(status)
            }
        }
    }
}

#[cfg(test)]
#[path = "streams_tests.rs"]
mod tests;

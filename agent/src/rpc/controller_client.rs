//! The controller as agents and the command line reach it: the port
//! [`Control`] over gRPC, and what agents tell it of themselves.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tonic::transport::Channel;

use super::agent_client::{channel, within};
use super::convert::span_message;
use super::pb::controller_client::ControllerClient as Generated;
use super::{pb, refusal};
use crate::attach::ports::{Attachment, Control, ControlError, Note};
use crate::attach::record::{Registration, Ticket};
use crate::ids::{HostPort, NodeId, SnapshotId, TicketId, VolumeId};

/// A call has to be answered within this.
const CALL: Duration = Duration::from_secs(5);
/// A call that removes bytes has to be answered within this.
const COPY: Duration = Duration::from_secs(60);

/// The controller.
#[derive(Clone)]
pub struct ControllerClient {
    generated: Generated<Channel>,
}

impl ControllerClient {
    /// The controller that is reached at `address`.
    pub fn new(address: &HostPort) -> Self {
        Self {
            generated: Generated::new(channel(address)),
        }
    }

    /// The whole service, for the command line.
    pub fn service(&self) -> Generated<Channel> {
        self.generated.clone()
    }

    /// Says that a node is there.
    ///
    /// # Errors
    /// When the controller does not answer or refuses.
    pub async fn register(&self, registration: &Registration) -> Result<(), ControlError> {
        let answer = self
            .service()
            .register(within(CALL, registration.into()))
            .await;
        answer
            .map(drop)
            .map_err(|status| refusal::control_error(&status))
    }

    /// Every volume, as the controller's answer has it.
    ///
    /// # Errors
    /// When the controller does not answer or refuses.
    pub async fn volumes(&self) -> Result<Vec<pb::Volume>, ControlError> {
        let mut service = self.service();
        let answer = service.list_volumes(within(CALL, pb::Nothing {})).await;
        let answer = answer.map_err(|status| refusal::control_error(&status))?;
        Ok(answer.into_inner().volumes)
    }

    /// A volume's journal from `since` on, as the controller's answer has it.
    ///
    /// # Errors
    /// When the controller does not answer or refuses.
    pub async fn notes(
        &self,
        volume: &VolumeId,
        since: SystemTime,
    ) -> Result<Vec<pb::Note>, ControlError> {
        let request = pb::ListNotesRequest {
            volume: volume.to_string(),
            since: Some(since.into()),
            ..Default::default()
        };
        let answer = self.service().list_notes(within(CALL, request)).await;
        let answer = answer.map_err(|status| refusal::control_error(&status))?;
        Ok(answer.into_inner().notes)
    }

    /// Takes a ticket.
    ///
    /// # Errors
    /// When the controller does not answer or refuses.
    pub async fn take_ticket(
        &self,
        volume: &VolumeId,
        ticket: &Ticket,
    ) -> Result<(), ControlError> {
        let request = pb::TicketRequest {
            volume: volume.to_string(),
            ticket: Some(ticket.into()),
        };
        let answer = self.service().take_ticket(within(CALL, request)).await;
        answer
            .map(drop)
            .map_err(|status| refusal::control_error(&status))
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// When the controller does not answer or refuses.
    pub async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), ControlError> {
        let request = pb::SnapshotName {
            snapshot: snapshot.to_string(),
        };
        let answer = self.service().delete_snapshot(within(COPY, request)).await;
        answer
            .map(drop)
            .map_err(|status| refusal::control_error(&status))
    }

    /// Renews a ticket's lease, from now.
    ///
    /// # Errors
    /// When the controller does not answer or refuses.
    pub async fn renew_ticket(
        &self,
        volume: &VolumeId,
        ticket: &TicketId,
        lease: Duration,
    ) -> Result<(), ControlError> {
        let request = pb::RenewTicketRequest {
            volume: volume.to_string(),
            ticket: ticket.to_string(),
            lease: Some(span_message(lease)),
        };
        let answer = self.service().renew_ticket(within(CALL, request)).await;
        answer
            .map(drop)
            .map_err(|status| refusal::control_error(&status))
    }

    /// Ends a ticket.
    ///
    /// # Errors
    /// When the controller does not answer.
    pub async fn end_ticket(
        &self,
        volume: &VolumeId,
        ticket: &TicketId,
        why: &str,
    ) -> Result<(), ControlError> {
        let request = within(CALL, end_request(volume, ticket, why));
        let answer = self.service().end_ticket(request).await;
        answer
            .map(drop)
            .map_err(|status| refusal::control_error(&status))
    }

    /// Ends a restore's ticket together with the volume that was made for it;
    /// where the ticket is no claim on the volume any more, nothing is done.
    ///
    /// # Errors
    /// When the controller does not answer.
    pub async fn fail_restore(
        &self,
        volume: &VolumeId,
        ticket: &TicketId,
        why: &str,
    ) -> Result<(), ControlError> {
        let request = within(CALL, end_request(volume, ticket, why));
        let answer = self.service().fail_restore(request).await;
        answer
            .map(drop)
            .map_err(|status| refusal::control_error(&status))
    }
}

fn end_request(volume: &VolumeId, ticket: &TicketId, why: &str) -> pb::EndTicketRequest {
    pb::EndTicketRequest {
        volume: volume.to_string(),
        ticket: ticket.to_string(),
        why: why.into(),
    }
}

#[async_trait]
impl Control for ControllerClient {
    async fn attachment(
        &self,
        volume: &VolumeId,
        node: &NodeId,
    ) -> Result<Attachment, ControlError> {
        let request = pb::AttachmentRequest {
            volume: volume.to_string(),
            node: node.to_string(),
        };
        let answer = self.service().get_attachment(within(CALL, request)).await;
        let answer = answer
            .map_err(|status| refusal::control_error(&status))?
            .into_inner();
        answer.try_into().map_err(|malformed| {
            ControlError::Failed(format!(
                "the controller answered with a malformed message: {malformed}"
            ))
        })
    }

    async fn note(&self, note: Note) {
        let text = note.text.clone();
        if let Err(status) = self.service().add_note(within(CALL, (&note).into())).await {
            tracing::warn!(%status, %text, "a line of the journal was not taken by the controller");
        }
    }
}

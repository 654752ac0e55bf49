//! Claims of streams and operators: taken, renewed, ended.

use std::time::{Duration, SystemTime};

use super::{Arbiter, ArbiterError};
use crate::attach::record::Ticket;
use crate::attach::state::Event;
use crate::ids::{TicketId, VolumeId};

impl Arbiter {
    /// Claims a volume for a stream or an operator; the same ticket again renews
    /// it. Its lease is from now until `lease_ends` by the wall clock, and is
    /// counted on a monotonic one.
    ///
    /// # Errors
    /// `NoVolume`, `InUse`/`NotYet` for a restore of a volume that is not at
    /// rest, `Incompatible` for a workload's ticket, a maintenance
    /// or restore ticket without a lease, or another ticket of the same id.
    pub async fn take_ticket(&self, volume: &VolumeId, ticket: Ticket) -> Result<(), ArbiterError> {
        let (slot, _) = self.inner.existing(volume)?;
        let lease = ticket
            .lease_ends
            .map(|ends| ends.duration_since(SystemTime::now()).unwrap_or_default());
        self.inner
            .apply(&slot, Event::Take { ticket, lease })
            .await?;
        Ok(())
    }

    /// Makes a claim last `lease` from now.
    ///
    /// # Errors
    /// `NoVolume`, `NoTicket` when it has ended: its holder must stop.
    pub async fn renew_ticket(
        &self,
        volume: &VolumeId,
        ticket: &TicketId,
        lease: Duration,
    ) -> Result<(), ArbiterError> {
        let (slot, _) = self.inner.existing(volume)?;
        let ticket = ticket.clone();
        self.inner
            .apply(&slot, Event::Renew { ticket, lease })
            .await?;
        Ok(())
    }

    /// Ends a claim. Unknown volume or ticket: success.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn end_ticket(
        &self,
        volume: &VolumeId,
        ticket: &TicketId,
        why: &str,
    ) -> Result<(), ArbiterError> {
        let event = Event::End {
            ticket: ticket.clone(),
            why: why.to_owned(),
        };
        self.end(volume, event).await
    }

    /// Ends something of a volume that may have gone itself.
    pub(super) async fn end(&self, volume: &VolumeId, event: Event) -> Result<(), ArbiterError> {
        let Some(slot) = self.inner.slot(volume) else {
            return Ok(());
        };
        match self.inner.apply(&slot, event).await {
            Ok(_) | Err(ArbiterError::NoVolume(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

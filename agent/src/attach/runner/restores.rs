//! What a restore is given, and what it loses when it fails: a volume of its
//! own, with a claim from the volume's first moment to the restore's end.

use std::time::Duration;

use super::{Arbiter, ArbiterError};
use crate::attach::record::{NewVolume, VolumeView};
use crate::attach::state::Event;
use crate::ids::{TicketId, VolumeId};

/// The claim that a volume made for a restore begins with.
pub(super) struct RestoreClaim {
    pub(super) ticket: TicketId,
    pub(super) lease: Duration,
}

impl Arbiter {
    /// Makes a volume for a restore. The restore's ticket is in its first
    /// record: where it is not renewed within `lease`, the volume is deleted.
    ///
    /// # Errors
    /// `Incompatible` where any volume has the name, else as
    /// [`create_volume`](Self::create_volume).
    pub async fn create_volume_for_restore(
        &self,
        request: NewVolume,
        ticket: TicketId,
        lease: Duration,
    ) -> Result<VolumeView, ArbiterError> {
        let claim = RestoreClaim { ticket, lease };
        self.inner.create_volume(request, Some(claim)).await
    }

    /// Ends a restore's claim together with the volume that was made for it;
    /// the deletion goes on behind. Unknown volume, or no restore's ticket of
    /// that id on it: success, and nothing is done.
    ///
    /// # Errors
    /// `NotYet` while the volume is still being made, `Unavailable`.
    pub async fn fail_restore(
        &self,
        volume: &VolumeId,
        ticket: &TicketId,
        why: &str,
    ) -> Result<(), ArbiterError> {
        let event = Event::FailRestore {
            ticket: ticket.clone(),
            why: why.to_owned(),
        };
        self.end(volume, event).await
    }
}

//! What a backup is given and loses where it does not begin: a snapshot of its
//! own, under a name that is its ticket's. A stream at its home may read the
//! snapshot only when it is whole, and is its owner from then on.

use uuid::Uuid;

use super::{Arbiter, ArbiterError, snapshots};
use crate::attach::record::SnapshotRecord;
use crate::ids::{TicketId, VolumeId};

impl Arbiter {
    /// Takes the snapshot that a backup reads.
    ///
    /// # Errors
    /// As [`create_snapshot`](Self::create_snapshot). Whoever gets one must
    /// [`abandon_backup_snapshot`](Self::abandon_backup_snapshot).
    pub async fn create_backup_snapshot(
        &self,
        volume: &VolumeId,
        ticket: &TicketId,
    ) -> Result<SnapshotRecord, ArbiterError> {
        snapshots::create(&self.inner, volume, &name(ticket)).await
    }

    /// Gives up the snapshot of a backup that did not begin, whole or not. It is
    /// deleted behind, whatever the home and the store answer now.
    pub async fn abandon_backup_snapshot(&self, ticket: &TicketId) {
        let name = name(ticket);
        if let Err(error) = snapshots::abandon(&self.inner, &name).await {
            tracing::warn!(%ticket, %error, "its snapshot is not given up yet");
            snapshots::abandon_behind(&self.inner, name);
        }
    }
}

fn name(ticket: &TicketId) -> String {
    format!("backup-{ticket}")
}

/// Whether a snapshot of this name is a backup's, and of nobody who chose a name.
pub(super) fn is_a_backups(snapshot: &str) -> bool {
    snapshot
        .strip_prefix("backup-ticket-")
        .is_some_and(|random| Uuid::try_parse(random).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backups_snapshot_is_known_by_its_name() {
        assert!(is_a_backups(&name(&TicketId::random())));
        for other in ["backup-1", "backup-ticket-7", "ticket-", ""] {
            assert!(!is_a_backups(other), "{other}");
        }
    }
}

//! Exports that could not be served when the agent started are tried again: the
//! host of one waits for it without end, and the arbiter asks nothing more.

use std::time::Duration;

use super::{Home, Restored};
use crate::attach::ports::HomeError;
use crate::ids::VolumeId;

/// The first pause before another try; each further one is twice as long.
const FIRST: Duration = Duration::from_secs(1);
/// And the longest.
const LONGEST: Duration = Duration::from_secs(60);

impl Home {
    /// Tries again what [`Home::restore`] could not serve, until each is served or
    /// there is nothing more to serve: the volume was fenced or deleted, or it is
    /// an old copy that an operator must accept.
    pub async fn restore_rest(&self, restored: Restored) {
        let failed = restored.failed.into_iter();
        let mut rest: Vec<VolumeId> = failed
            .filter(|(_, error)| !is_final(error))
            .map(|(volume, _)| volume)
            .collect();
        let mut pause = FIRST;
        loop {
            self.inner.metrics.unserved(rest.len());
            if rest.is_empty() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = LONGEST.min(pause * 2);
            let mut failed = Vec::new();
            for volume in rest {
                match self.restore_one(&volume).await {
                    Ok(_) => tracing::info!(%volume, "the volume is served at last"),
                    Err(error) => {
                        tracing::error!(%volume, %error, "the volume is still not served");
                        if !is_final(&error) {
                            failed.push(volume);
                        }
                    }
                }
            }
            rest = failed;
        }
    }

    /// Opens again what one volume's record holds open, if anything: whether it
    /// does, and how many names of closed exports it remembers.
    pub(super) async fn restore_one(&self, volume: &VolumeId) -> Result<(bool, u32), HomeError> {
        let (inner, id) = (self.inner.clone(), volume.clone());
        let take_up = async move { inner.take_up(&id).await };
        self.epochs(volume, "restore the export of", take_up).await
    }
}

/// Whether another try would say the same until somebody else has acted, who then
/// asks for an export of his own.
fn is_final(error: &HomeError) -> bool {
    matches!(
        error,
        HomeError::NoVolume(_) | HomeError::RecordBehind { .. } | HomeError::StaleEpoch { .. }
    )
}

//! What a home asks of the target that serves its exports.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::block::BlockDevice;
use crate::export::{Closing, Ended, ExportSpec, Exports, Kept, OpenError, Unsettled};
use crate::ids::VolumeId;

/// The target, as the home sees it. [`Exports`] is the one there is.
pub trait Frontend: Send + Sync {
    /// Serves one more export. The same identity again: nothing changes.
    ///
    /// # Errors
    /// Why it cannot be served; it is not, then.
    fn open(
        &self,
        spec: ExportSpec,
        device: Arc<dyn BlockDevice>,
        reservations: Kept,
    ) -> Result<(), OpenError>;
    /// Remembers an identity as closed for good.
    fn remember_closed(&self, name: &str);
    /// Closes the gate at once. None: no such export is live.
    fn close(&self, name: &str) -> Option<Box<dyn ClosedGate>>;
    /// Tells the hosts of a volume's exports that its size has changed.
    fn resized(&self, volume: &VolumeId);
    /// Commands that came for a closed export after its gate had closed.
    fn late_refused(&self, name: &str) -> u64;
    /// Commands inside the closed gates of a volume's exports, of the oldest
    /// epoch that has any; also of exports that have ended without them.
    fn unsettled(&self, volume: &VolumeId) -> Option<Unsettled>;
}

/// An export whose gate is closed and whose hosts do not know it yet.
#[async_trait]
pub trait ClosedGate: Send + Sync {
    /// Commands inside when the gate closed.
    fn inside_at_close(&self) -> u32;
    /// Waits until no command is inside; how long that took since the gate
    /// closed, or how many are inside still.
    async fn settled(&self, deadline: Duration) -> Result<Duration, u32>;
    /// Tells the hosts, ends their connections, drops the identity for good.
    async fn end(self: Box<Self>) -> Ended;
}

impl Frontend for Exports {
    fn open(
        &self,
        spec: ExportSpec,
        device: Arc<dyn BlockDevice>,
        reservations: Kept,
    ) -> Result<(), OpenError> {
        Exports::open(self, spec, device, Some(reservations))
    }

    fn remember_closed(&self, name: &str) {
        Exports::remember_closed(self, name);
    }

    fn close(&self, name: &str) -> Option<Box<dyn ClosedGate>> {
        let closing = Exports::close(self, name)?;
        Some(Box::new(closing))
    }

    fn resized(&self, volume: &VolumeId) {
        Exports::resized(self, volume);
    }

    fn late_refused(&self, name: &str) -> u64 {
        Exports::late_refused(self, name)
    }

    fn unsettled(&self, volume: &VolumeId) -> Option<Unsettled> {
        Exports::unsettled(self, volume)
    }
}

#[async_trait]
impl ClosedGate for Closing {
    fn inside_at_close(&self) -> u32 {
        self.inside_at_close
    }

    async fn settled(&self, deadline: Duration) -> Result<Duration, u32> {
        Closing::settled(self, deadline).await
    }

    async fn end(self: Box<Self>) -> Ended {
        Closing::end(*self).await
    }
}

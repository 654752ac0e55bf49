//! The home side of volumes: the pool and the exports under one record.
//!
//! The home answers the arbiter's calls about the volumes whose bytes its pool
//! holds. Per volume it keeps the fence of record ([`crate::pool::record`]);
//! no answer is given before the record says the same on disk, and what the
//! record allows is decided in [`decide`], apart from the doing.
//!
//! ```text
//!             Export(e > highest)               Fence(e >= highest)
//!   closed --------------------> open ------------------------------> closing
//!     ^   record, then gate opens     gate closes, then the record       |
//!     |                               and those inside, in parallel      |
//!     +------------------------------------------------------------------+
//!          all settled, hosts told, identity dropped: settlement recorded
//! ```
//!
//! A fence closes the gate before it waits for anything. Calls about epochs
//! are one at a time per volume; so are those about bytes (create, expand,
//! snapshot, delete), and neither kind waits for the other. A call that was
//! begun goes on when its caller has gone; it answers within a deadline, and a
//! repeat takes up where it is.
//!
//! It refuses: an export at an epoch that a fence has named, anything for a
//! volume whose record is an old copy (until [`Home::accept_old_copy`], or the
//! volume is deleted), and to delete or restore what is open.

mod again;
pub mod decide;
mod epochs;
mod frontend;
mod late;
mod metrics;
mod opening;
mod site;
mod volumes;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use prometheus_client::registry::Registry;

pub use frontend::{ClosedGate, Frontend};
pub use volumes::RestoreTarget;

use crate::attach::ports::{
    Capacity, Content, Disclosure, ExportRequest, Exported, FenceRequest, HomeError, LateCommands,
    Protocol, Settlement, SnapshotInfo,
};
use crate::ids::{Bytes, Epoch, SnapshotId, VolumeId};
use crate::pool::device::OpenBacking;
use crate::pool::{Pool, PoolError, Volume};
use late::Late;
use metrics::Metrics;
use site::Site;

/// What of a home can be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HomeConfig {
    /// Where hosts reach this home's NVMe/TCP target.
    pub nvme_address: SocketAddr,
    /// Where hosts reach this home's iSCSI target.
    pub iscsi_address: SocketAddr,
    /// How long one Fence waits for the commands inside the gate. Default 2 s.
    pub settle: Duration,
    /// How long a call about epochs waits for the disk and for the call before
    /// it. Default 10 s; more than `settle`.
    pub deadline: Duration,
    /// How long a call about bytes waits. Default 60 s.
    pub data_deadline: Duration,
}

impl HomeConfig {
    /// The defaults, for targets at these addresses.
    pub fn at(nvme_address: SocketAddr, iscsi_address: SocketAddr) -> Self {
        Self {
            nvme_address,
            iscsi_address,
            settle: Duration::from_secs(2),
            deadline: Duration::from_secs(10),
            data_deadline: Duration::from_secs(60),
        }
    }

    /// Where hosts reach exports of this protocol.
    pub(super) fn address(&self, protocol: Protocol) -> SocketAddr {
        match protocol {
            Protocol::NvmeTcp => self.nvme_address,
            Protocol::Iscsi => self.iscsi_address,
        }
    }
}

/// What [`Home::restore`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Restored {
    /// Exports that are open again, under their old identities.
    pub open: u32,
    /// Identities remembered as closed for good.
    pub closed: u32,
    /// Volumes that are not served, and why.
    pub failed: Vec<(VolumeId, HomeError)>,
}

/// The home. Clones are handles of the same one.
#[derive(Clone)]
pub struct Home {
    inner: Arc<Inner>,
}

struct Inner {
    pool: Arc<Pool>,
    frontend: Arc<dyn Frontend>,
    open: OpenBacking,
    config: HomeConfig,
    sites: Mutex<HashMap<VolumeId, Arc<Site>>>,
    metrics: Metrics,
    late: Late,
}

impl Home {
    /// The home over an open pool. It serves nothing of what the pool's
    /// records hold open until [`Home::restore`].
    pub fn new(
        pool: Arc<Pool>,
        frontend: Arc<dyn Frontend>,
        open: OpenBacking,
        config: HomeConfig,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                pool,
                frontend,
                open,
                config,
                sites: Mutex::default(),
                metrics: Metrics::default(),
                late: Late::default(),
            }),
        }
    }

    /// The pool beneath.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.inner.pool
    }

    /// Registers the pool's and the fences' metrics.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.inner.metrics.register(&self.inner.pool, registry);
    }

    /// Commands that came late for the epochs that ended in the last ten minutes.
    pub fn late(&self) -> Vec<LateCommands> {
        let count = |name: &str| self.inner.frontend.late_refused(name);
        self.inner.late.told(Instant::now(), count)
    }

    /// Opens again every export that the records hold open, under the same
    /// identities, and remembers the closed ones. To be called once, before
    /// the target accepts connections. A volume that cannot be served keeps no
    /// other from being served.
    pub async fn restore(&self) -> Restored {
        let mut restored = Restored::default();
        for volume in self.inner.pool.volumes() {
            match self.restore_one(&volume).await {
                Ok((open, closed)) => {
                    restored.open += u32::from(open);
                    restored.closed += closed;
                }
                Err(error) => {
                    tracing::error!(%volume, %error, "the volume is not served");
                    restored.failed.push((volume, error));
                }
            }
        }
        restored
    }

    /// Claims a volume's file for a restore: no export opens, and nothing else
    /// changes or copies the file, until the claim has ended. Before it is
    /// given, the record says on disk that the volume was written.
    ///
    /// # Errors
    /// `Used` where the volume was ever written or exported, `Failed` while
    /// another restore has the claim or has left half a volume,
    /// `RecordBehind`, `NoVolume`.
    pub async fn restore_target(&self, volume: &VolumeId) -> Result<RestoreTarget, HomeError> {
        let inner = Arc::clone(&self.inner);
        let id = volume.clone();
        self.epochs(volume, "claim", async move { inner.claim(&id).await })
            .await
    }

    /// The operator's word that an old copy of a volume's bytes and record is
    /// to be served from now on. The record moves to the epoch it was behind
    /// of, as closed, which is returned: the next export must be above it.
    /// A record that is not behind stays as it is.
    pub async fn accept_old_copy(&self, volume: &VolumeId) -> Result<Epoch, HomeError> {
        let inner = Arc::clone(&self.inner);
        let id = volume.clone();
        self.epochs(volume, "accept the old copy of", async move {
            inner.accept(&id).await
        })
        .await
    }

    /// The operator's word that the fence of an epoch, which waits for commands
    /// inside the closed gate, is to wait no more, if they are no more than
    /// `commands`. They may land at any time later, over what the next holder
    /// has written.
    ///
    /// # Errors
    /// `Unsettled` where more are inside, `Failed` where no fence of this epoch waits.
    pub async fn accept_unsettled(
        &self,
        volume: &VolumeId,
        epoch: Epoch,
        commands: u32,
    ) -> Result<Settlement, HomeError> {
        let inner = Arc::clone(&self.inner);
        let id = volume.clone();
        self.epochs(volume, "accept the commands inside", async move {
            inner.accept_unsettled(&id, epoch, commands).await
        })
        .await
    }

    /// Runs a call about a volume's epochs, after the one before it.
    async fn epochs<T: Send + 'static>(
        &self,
        volume: &VolumeId,
        what: &str,
        call: impl Future<Output = Result<T, HomeError>> + Send + 'static,
    ) -> Result<T, HomeError> {
        let site = self.inner.known(volume)?;
        let lock = Arc::clone(&site.epochs);
        let what = format!("{what} volume {volume}");
        exclusively(lock, what, self.inner.config.deadline, call).await
    }

    /// Runs a call about a volume's bytes, after the one before it.
    async fn data<T: Send + 'static>(
        &self,
        volume: &VolumeId,
        what: &str,
        call: impl Future<Output = Result<T, HomeError>> + Send + 'static,
    ) -> Result<T, HomeError> {
        let site = self.inner.known(volume)?;
        let lock = Arc::clone(&site.data);
        let what = format!("{what} volume {volume}");
        exclusively(lock, what, self.inner.config.data_deadline, call).await
    }
}

/// Runs `call` under `lock` in a task of its own: it goes on to its end, with
/// the lock, when the caller goes away or the deadline passes.
async fn exclusively<T: Send + 'static>(
    lock: Arc<tokio::sync::Mutex<()>>,
    what: String,
    deadline: Duration,
    call: impl Future<Output = Result<T, HomeError>> + Send + 'static,
) -> Result<T, HomeError> {
    let begun = Instant::now();
    let late = |_| {
        HomeError::NotYet(format!(
            "{what}: not done within {deadline:?}, it goes on; ask again"
        ))
    };
    let guard = tokio::time::timeout(deadline, lock.lock_owned())
        .await
        .map_err(late)?;
    let task = tokio::spawn(async move {
        let result = call.await;
        drop(guard);
        result
    });
    let left = deadline.saturating_sub(begun.elapsed());
    match tokio::time::timeout(left, task).await.map_err(late)? {
        Ok(result) => result,
        Err(ended) => Err(HomeError::Failed(format!("{what}: {ended}"))),
    }
}

impl Inner {
    /// A volume's state in memory, if the pool has the volume.
    fn known(&self, volume: &VolumeId) -> Result<Arc<Site>, HomeError> {
        self.pool.volume(volume)?;
        Ok(self.site_of(volume))
    }

    /// A volume's state in memory, also of one that is yet to be made.
    fn site_of(&self, volume: &VolumeId) -> Arc<Site> {
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(sites.entry(volume.clone()).or_insert_with(Site::new))
    }

    /// Forgets the state of a volume that is not there.
    fn forget(&self, volume: &VolumeId) {
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        sites.remove(volume);
    }

    /// A volume's state in memory, if there is any.
    fn site(&self, volume: &VolumeId) -> Option<Arc<Site>> {
        let sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        sites.get(volume).cloned()
    }

    /// A volume and its state.
    fn both(&self, volume: &VolumeId) -> Result<(Arc<Volume>, Arc<Site>), HomeError> {
        Ok((self.pool.volume(volume)?, self.known(volume)?))
    }

    /// Does what blocks on the disk.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl FnOnce(&Self) -> Result<T, PoolError> + Send + 'static,
    ) -> Result<T, HomeError> {
        let inner = Arc::clone(self);
        match tokio::task::spawn_blocking(move || call(&inner)).await {
            Ok(result) => result.map_err(HomeError::from),
            Err(ended) => Err(HomeError::Failed(format!("a call on the pool: {ended}"))),
        }
    }
}

impl From<PoolError> for HomeError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::NoVolume(id) => Self::NoVolume(id),
            PoolError::NoSnapshot(id) => Self::NoSnapshot(id),
            PoolError::NoSpace {
                pool,
                needed,
                available,
            } => Self::NoSpace {
                pool,
                needed,
                available,
            },
            PoolError::NotYet(why) => Self::NotYet(why),
            PoolError::NoReflink { .. } => Self::Unsupported(error.to_string()),
            PoolError::Call { .. }
            | PoolError::Unsuitable { .. }
            | PoolError::ForeignNode { .. }
            | PoolError::NotAPool { .. }
            | PoolError::Version { .. }
            | PoolError::Held { .. }
            | PoolError::Damaged { .. }
            | PoolError::TooLong { .. }
            | PoolError::Conflict(_)
            | PoolError::BadSize { .. } => Self::Failed(error.to_string()),
        }
    }
}

#[async_trait]
impl crate::attach::ports::Home for Home {
    async fn create(
        &self,
        volume: &VolumeId,
        size: Bytes,
        content: &Content,
    ) -> Result<(), HomeError> {
        let (home, id, of) = (self.clone(), volume.clone(), content.clone());
        let lock = Arc::clone(&self.inner.site_of(volume).data);
        let create = async move { home.make(id, size, of).await };
        let what = format!("create volume {volume}");
        exclusively(lock, what, self.inner.config.data_deadline, create).await
    }

    async fn delete(&self, volume: &VolumeId, unused: bool) -> Result<(), HomeError> {
        let (inner, id) = (Arc::clone(&self.inner), volume.clone());
        let delete = async move { inner.delete(&id, unused).await };
        match self.data(volume, "delete", delete).await {
            Err(HomeError::NoVolume(_)) => Ok(()),
            other => other,
        }
    }

    async fn expand(&self, volume: &VolumeId, size: Bytes) -> Result<Bytes, HomeError> {
        let (inner, id) = (Arc::clone(&self.inner), volume.clone());
        self.data(
            volume,
            "expand",
            async move { inner.expand(id, size).await },
        )
        .await
    }

    async fn snapshot(
        &self,
        volume: &VolumeId,
        snapshot: &SnapshotId,
    ) -> Result<SnapshotInfo, HomeError> {
        // One that was taken is there even when its volume is not any more.
        if let Ok(taken) = self.inner.pool.snapshot_info(snapshot)
            && taken.volume == *volume
        {
            return Ok(taken);
        }
        let (inner, id, of) = (Arc::clone(&self.inner), snapshot.clone(), volume.clone());
        let take = async move { inner.snapshot(of, id).await };
        self.data(volume, "snapshot", take).await
    }

    async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), HomeError> {
        let (inner, id) = (Arc::clone(&self.inner), snapshot.clone());
        let what = format!("delete snapshot {snapshot}");
        let delete = async move {
            inner
                .blocking(move |inner| inner.pool.delete_snapshot(&id))
                .await
        };
        let deadline = self.inner.config.data_deadline;
        exclusively(Arc::default(), what, deadline, delete).await
    }

    async fn capacity(&self) -> Result<Capacity, HomeError> {
        let inner = Arc::clone(&self.inner);
        let ask = async move { inner.blocking(|inner| inner.pool.capacity()).await };
        let deadline = self.inner.config.deadline;
        exclusively(Arc::default(), "ask the pool's room".into(), deadline, ask).await
    }

    async fn export(&self, request: &ExportRequest) -> Result<Exported, HomeError> {
        let (inner, request) = (Arc::clone(&self.inner), request.clone());
        let volume = request.volume.clone();
        self.epochs(
            &volume,
            "export",
            async move { inner.export(&request).await },
        )
        .await
    }

    async fn disclose(&self, volume: &VolumeId, epoch: Epoch) -> Result<Disclosure, HomeError> {
        self.inner.disclose(volume, epoch)
    }

    async fn fence(&self, request: &FenceRequest) -> Result<Settlement, HomeError> {
        let fenced = self.fence_at_once(request).await;
        self.inner.metrics.count(&fenced);
        fenced
    }
}

impl Home {
    async fn fence_at_once(&self, request: &FenceRequest) -> Result<Settlement, HomeError> {
        // Before anything that could wait: the gate.
        if let Some(site) = self.inner.site(&request.volume) {
            site.close(request.epoch, self.inner.frontend.as_ref());
        }
        let site = self.inner.known(&request.volume)?;
        site.close(request.epoch, self.inner.frontend.as_ref());
        let (inner, request) = (Arc::clone(&self.inner), request.clone());
        let volume = request.volume.clone();
        self.epochs(&volume, "fence", async move { inner.fence(&request).await })
            .await
    }
}

#[cfg(test)]
#[path = "home_tests.rs"]
mod tests;

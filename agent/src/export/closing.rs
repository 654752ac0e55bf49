//! The end of an export, from its closed gate to closed connections.

use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use super::served::Side;
use super::{Live, Past, Table, write};

const LOOK: Duration = Duration::from_millis(20);

/// An export whose gate is closed and whose hosts do not know it yet.
pub struct Closing {
    /// Commands inside when the gate closed.
    pub inside_at_close: u32,
    pub(super) live: Arc<Live>,
    pub(super) table: Arc<RwLock<Table>>,
    /// For initiators over iSCSI to log out.
    pub(super) logout: Duration,
}

/// What ending the hosts' sessions came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Connections that were ended.
    pub sessions: u32,
    /// Commands refused since the gate closed.
    pub late_refused: u64,
    /// The export's last write.
    pub last_write: Option<SystemTime>,
}

impl Closing {
    /// Waits until no command is inside; how long that took since the gate closed.
    ///
    /// # Errors
    /// How many are inside still at the deadline.
    pub async fn settled(&self, deadline: Duration) -> Result<Duration, u32> {
        self.live.side.gate().settled(deadline).await
    }

    /// Tells the hosts (final status for all I/O, then the end of their
    /// connections) and drops the identity for good.
    ///
    /// Returns at once with its figures: the hosts are given a while to take it
    /// in by a task of its own. Commands that are inside still are answered as
    /// refused; the gate counts them until they have settled.
    #[expect(
        clippy::unused_async,
        reason = "spawns a task, so it must run in a runtime"
    )]
    pub async fn end(self) -> Ended {
        let side = self.live.side.clone();
        let ended = Ended {
            sessions: side.connections(),
            late_refused: side.gate().late(),
            last_write: side.last_write(),
        };
        let name = &self.live.spec.name;
        {
            let mut table = write(&self.table);
            let past = Past {
                volume: self.live.spec.volume.clone(),
                epoch: self.live.spec.epoch,
                gate: Arc::clone(side.gate()),
            };
            table.live.remove(name);
            table.closed.insert(name.clone(), Some(past));
        }
        side.take_away();
        if let Side::NvmeTcp(subsystem) = &side {
            let leaving = Arc::clone(subsystem);
            // It may wait for whoever keeps the volume's reservations.
            tokio::task::spawn_blocking(move || leaving.reservations().leave(&leaving));
        }
        tracing::info!(
            name, volume = %self.live.spec.volume, epoch = %self.live.spec.epoch,
            sessions = ended.sessions, "export ended"
        );
        tokio::spawn(say_farewell(side, self.logout, name.clone()));
        ended
    }
}

async fn say_farewell(side: Side, logout: Duration, name: String) {
    let farewell = side.farewell(logout);
    let known = || side.connections() == 0 || side.knows_the_end();
    if !within(farewell.to_know, known).await {
        tracing::warn!(
            name,
            "the host did not look at what it was told: its connections are closed all the same"
        );
    }
    within(farewell.to_leave, || side.connections() == 0).await;
    side.disconnect();
}

/// Whether something comes about in time.
async fn within(time: Duration, condition: impl Fn() -> bool) -> bool {
    let looking = async {
        while !condition() {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(time, looking).await.is_ok()
}

//! The end of an export, from its closed gate to closed connections.

use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use super::{Live, Table, write};
use crate::nvme_tcp::subsystem::Subsystem;

/// From a host's knowing that its namespace is gone to the end of its
/// connections: its kernel takes the disk away meanwhile, and a Linux 6.1
/// that loses the connection first would wait for the disk's return instead.
const FAREWELL: Duration = Duration::from_millis(500);
/// A host that does not ask is not waited for any longer.
const FAREWELL_AT_MOST: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);

/// An export whose gate is closed and whose hosts do not know it yet.
pub struct Closing {
    /// Commands inside when the gate closed.
    pub inside_at_close: u32,
    live: Arc<Live>,
    table: Arc<RwLock<Table>>,
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
    pub(super) fn new(inside_at_close: u32, live: Arc<Live>, table: Arc<RwLock<Table>>) -> Self {
        Self {
            inside_at_close,
            live,
            table,
        }
    }

    /// Waits until no command is inside; how long that took since the gate closed.
    ///
    /// # Errors
    /// How many are inside still at the deadline.
    pub async fn settled(&self, deadline: Duration) -> Result<Duration, u32> {
        self.live.subsystem.gate().settled(deadline).await
    }

    /// Tells the hosts (final status for all I/O, namespace gone, connections
    /// closed) and drops the identity for good.
    ///
    /// Returns at once with its figures: the hosts are given a short while to
    /// take it in by a task of its own. Commands that are inside still are
    /// answered as refused; the gate counts them until they have settled.
    #[expect(
        clippy::unused_async,
        reason = "spawns a task, so it must run in a runtime"
    )]
    pub async fn end(self) -> Ended {
        let subsystem = Arc::clone(&self.live.subsystem);
        let ended = Ended {
            sessions: subsystem.connections(),
            late_refused: subsystem.gate().late(),
            last_write: subsystem.last_write(),
        };
        {
            let mut table = write(&self.table);
            let gate = Arc::clone(subsystem.gate());
            table.live.remove(subsystem.nqn());
            table.closed.insert(subsystem.nqn().to_owned(), Some(gate));
        }
        subsystem.take_away();
        let leaving = Arc::clone(&subsystem);
        // It may wait for whoever keeps the volume's reservations.
        tokio::task::spawn_blocking(move || leaving.reservations().leave(&leaving));
        tracing::info!(
            subsystem = subsystem.nqn(), volume = %self.live.spec.volume,
            epoch = %self.live.spec.epoch, sessions = ended.sessions, "export ended"
        );
        tokio::spawn(say_farewell(subsystem));
        ended
    }
}

async fn say_farewell(subsystem: Arc<Subsystem>) {
    let known = async {
        while subsystem.connections() > 0
            && subsystem
                .current()
                .is_some_and(|controller| !controller.knows_the_end())
        {
            tokio::time::sleep(LOOK).await;
        }
    };
    if tokio::time::timeout(FAREWELL_AT_MOST, known).await.is_err() {
        tracing::warn!(
            subsystem = subsystem.nqn(),
            "the host did not look at what it was told: its connections are closed all the same"
        );
    }
    if subsystem.connections() > 0 {
        tokio::time::sleep(FAREWELL).await;
    }
    subsystem.disconnect();
}

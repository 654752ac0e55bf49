//! Live exports: the listeners, the identities, the sessions of each, and their end.
//!
//! ```text
//!              open                 close             end
//!   unknown ─────────► live ───────────────► closing ─────► closed
//!      │  the one host connects    connecting is refused for good ─►
//!      └──────────────────── remember_closed ─────────────────▲
//! ```
//!
//! An identity goes this way once and never back: [`Exports::open`] of a closed
//! one is refused. A closing export's hosts still have their connections, so
//! that they can be told; its gate lets nothing in any more. Only
//! [`Closing::end`] makes it closed.
//!
//! There is one table for both protocols, and each of these words means the
//! same in both. What differs stands apart: `nvme_tcp` and `iscsi` say what an
//! export is made of there, who finds it, and how its host takes leave.

mod closing;
mod iscsi;
mod kept;
mod listener;
mod nvme_tcp;
mod served;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use prometheus_client::registry::Registry;
use uuid::Uuid;

use crate::attach::ports::{Chap, HostIdentity, Protocol};
use crate::block::BlockDevice;
use crate::block::gate::Gate;
use crate::ids::{Epoch, VolumeId};
use crate::iscsi::connection::Shared;
use crate::nvme_tcp::auth::Secrets;
use crate::nvme_tcp::connection::{HANDSHAKE, Target};
use crate::nvme_tcp::discovery::Discovery;
use crate::reactor::Reactors;

pub use closing::{Closing, Ended};
pub use kept::{Keeper, Kept};
pub use listener::listen;
use served::Side;

/// An export's identity and rights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSpec {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch it is of.
    pub epoch: Epoch,
    /// The protocol it is exported over.
    pub protocol: Protocol,
    /// What both sides prove; none: over NVMe/TCP, the host's name is enough.
    pub proof: Option<Proof>,
    /// Subsystem NQN or target IQN, made for this export alone.
    pub name: String,
    /// Identity of the namespace or LUN, made for this export alone.
    pub unit: Uuid,
    /// The one host that may connect.
    pub host: HostIdentity,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// What the two sides of an export prove to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// Over iSCSI.
    Chap(Chap),
    /// Over NVMe/TCP.
    DhHmacChap(Secrets),
}

impl Proof {
    /// These secrets, as a protocol uses them.
    ///
    /// # Errors
    /// They are too short or too long for it.
    pub fn of(protocol: Protocol, chap: &Chap) -> Result<Self, OpenError> {
        match protocol {
            Protocol::NvmeTcp => nvme_tcp::secrets(chap)
                .map(Self::DhHmacChap)
                .ok_or_else(|| OpenError::NoSecrets(chap.target.name.clone())),
            Protocol::Iscsi => Ok(Self::Chap(chap.clone())),
        }
    }
}

/// Why an export is not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It ended once, and an identity is never used again.
    #[error("{0} was closed and is never served again")]
    Closed(String),
    /// What was kept of its reservations cannot be read: who holds what is unknown.
    #[error("{name}: its reservations: {why}")]
    Reservations {
        /// The export.
        name: String,
        /// What is wrong with them.
        why: String,
    },
    /// It has no secrets that its protocol could use, and without any it would
    /// be open to who knows a name.
    #[error("{0} has no secrets that can be used")]
    NoSecrets(String),
}

/// How long connections are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Waits {
    /// From accept to a Connect that is admitted, or a finished login.
    handshake: Duration,
    /// For initiators of an ended iSCSI export to log out.
    logout: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            handshake: HANDSHAKE,
            logout: iscsi::LOGOUT,
        }
    }
}

/// The exports that the targets serve now, and the identities they know as closed.
pub struct Exports {
    table: Arc<RwLock<Table>>,
    nvme_tcp: Arc<Target>,
    discovery: Arc<Discovery>,
    iscsi: Arc<Shared>,
    reactors: Arc<Reactors>,
    waits: Waits,
}

#[derive(Default)]
struct Table {
    live: HashMap<String, Arc<Live>>,
    /// With what is left of those that this process has served.
    closed: HashMap<String, Option<Past>>,
}

/// What is left of an export that has ended.
struct Past {
    volume: VolumeId,
    epoch: Epoch,
    /// It counts late commands, and those that an operator let go until they settle.
    gate: Arc<Gate>,
}

/// Commands that are inside the closed gate of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unsettled {
    /// The export's epoch.
    pub epoch: Epoch,
    /// How many.
    pub inside: u32,
}

struct Live {
    spec: ExportSpec,
    side: Side,
    inside_at_close: OnceLock<u32>,
}

impl Exports {
    /// None yet; `reactors` will serve their connections.
    pub fn new(reactors: Arc<Reactors>) -> Arc<Self> {
        Self::with(reactors, Waits::default())
    }

    fn with(reactors: Arc<Reactors>, waits: Waits) -> Arc<Self> {
        let table = Arc::new(RwLock::new(Table::default()));
        let discovery = Arc::new(Discovery::default());
        Arc::new(Self {
            nvme_tcp: nvme_tcp::target(&table, &discovery, waits.handshake),
            iscsi: iscsi::target(&table, waits.handshake),
            table,
            discovery,
            reactors,
            waits,
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        read(&self.table)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        write(&self.table)
    }

    /// Registers both targets' connections, sessions, commands, bytes,
    /// malformed PDUs and late commands, under names that begin with `drover_`.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.nvme_tcp.metrics.register(registry);
        self.iscsi.metrics.register(registry);
    }

    /// Serves one more export. The same identity again: nothing changes. Its
    /// reservations go on where `kept` has them; without it none outlives the
    /// process, and a host that wants that is refused.
    ///
    /// NVMe/TCP exports of one volume that are live at once share the
    /// reservations of the first, which last as long as one of them does.
    ///
    /// # Errors
    /// The identity was closed, or its reservations cannot be read.
    pub fn open(
        &self,
        spec: ExportSpec,
        device: Arc<dyn BlockDevice>,
        kept: Option<Kept>,
    ) -> Result<(), OpenError> {
        let mut table = self.write();
        if table.closed.contains_key(&spec.name) {
            return Err(OpenError::Closed(spec.name));
        }
        if table.live.contains_key(&spec.name) {
            return Ok(());
        }
        let side = match spec.protocol {
            Protocol::NvmeTcp => Side::NvmeTcp(nvme_tcp::subsystem(&table, &spec, device, kept)?),
            Protocol::Iscsi => Side::Iscsi(iscsi::unit(&spec, device, kept)?),
        };
        if spec.protocol == Protocol::NvmeTcp {
            self.discovery.show(&spec.name, &spec.host.nqn);
        }
        let live = Live {
            side,
            inside_at_close: OnceLock::new(),
            spec,
        };
        table.live.insert(live.spec.name.clone(), Arc::new(live));
        Ok(())
    }

    /// Remembers an identity as closed: whoever connects to it is refused for
    /// good, where an unknown one is refused for now. A live one is closed at
    /// once, and only [`Self::close`] and [`Closing::end`] tell its hosts.
    pub fn remember_closed(&self, name: &str) {
        let mut table = self.write();
        if let Some(live) = table.live.get(name) {
            live.close();
            self.discovery.hide(name);
        } else {
            table.closed.entry(name.to_owned()).or_default();
        }
    }

    /// Closes the gate at once: when this returns, no command of the export
    /// enters, and connecting is refused for good. None: no such export is live.
    ///
    /// Until [`Closing::end`] it can be called again, with the same answer.
    pub fn close(&self, name: &str) -> Option<Closing> {
        let live = self.read().live.get(name).map(Arc::clone)?;
        let inside_at_close = live.close();
        self.discovery.hide(name);
        Some(Closing {
            inside_at_close,
            live,
            table: Arc::clone(&self.table),
            logout: self.waits.logout,
        })
    }

    /// Commands of an export that were refused since its gate closed; also
    /// after its end. 0 for one that this process never served.
    pub fn late_refused(&self, name: &str) -> u64 {
        let table = self.read();
        let live = table.live.get(name).map(|live| live.side.gate());
        let gate = live.or_else(|| Some(&table.closed.get(name)?.as_ref()?.gate));
        gate.map_or(0, |gate| gate.late())
    }

    /// Commands inside the closed gates of a volume's exports, also of those
    /// that have ended without them: the oldest epoch that has any.
    pub fn unsettled(&self, volume: &VolumeId) -> Option<Unsettled> {
        let table = self.read();
        let live = table.of(volume);
        let live = live.map(|live| (live.spec.epoch, live.side.gate()));
        let past = table.closed.values().flatten();
        let past = past.filter(|past| past.volume == *volume);
        let all = live.chain(past.map(|past| (past.epoch, &past.gate)));
        all.filter(|(_, gate)| gate.is_closed())
            .map(|(epoch, gate)| Unsettled {
                epoch,
                inside: gate.inside(),
            })
            .filter(|one| one.inside > 0)
            .min_by_key(|one| one.epoch)
    }

    /// Tells the hosts of a volume's exports that its size has changed.
    pub fn resized(&self, volume: &VolumeId) {
        for live in self.of(volume) {
            live.side.resized();
        }
    }

    /// When the volume's live export saw its last write.
    pub fn last_write(&self, volume: &VolumeId) -> Option<SystemTime> {
        let live = self.of(volume);
        live.iter().filter_map(|live| live.side.last_write()).max()
    }

    fn of(&self, volume: &VolumeId) -> Vec<Arc<Live>> {
        self.read().of(volume).map(Arc::clone).collect()
    }

    /// Accepts connections of a protocol until `stop` becomes true, then ends
    /// those it has. Call it when every export is restored. NVMe/TCP hosts that
    /// discover are sent to this listener's port.
    pub async fn serve(
        self: Arc<Self>,
        protocol: Protocol,
        listener: tokio::net::TcpListener,
        stop: tokio::sync::watch::Receiver<bool>,
    ) {
        match protocol {
            Protocol::NvmeTcp => {
                if let Ok(address) = listener.local_addr() {
                    self.discovery.listens_on(address.port());
                }
                listener::serve(&self.nvme_tcp, &self.reactors, &listener, stop).await;
            }
            Protocol::Iscsi => {
                listener::serve(&self.iscsi, &self.reactors, &listener, stop).await;
            }
        }
        let live: Vec<_> = self.read().live.values().map(Arc::clone).collect();
        for live in live.iter().filter(|live| live.spec.protocol == protocol) {
            live.side.disconnect();
        }
    }

    /// Accepts connections on a second NVMe/TCP listener, the port for
    /// discovery (8009), until `stop` becomes true. The same is served on both.
    pub async fn serve_discovery(
        self: Arc<Self>,
        listener: tokio::net::TcpListener,
        stop: tokio::sync::watch::Receiver<bool>,
    ) {
        listener::serve(&self.nvme_tcp, &self.reactors, &listener, stop).await;
    }
}

impl Table {
    /// The live exports of a volume.
    fn of<'a>(&'a self, volume: &'a VolumeId) -> impl Iterator<Item = &'a Arc<Live>> {
        let live = self.live.values();
        live.filter(move |live| live.spec.volume == *volume)
    }
}

impl Live {
    /// Closes the gate; how many were inside when it closed first.
    fn close(&self) -> u32 {
        let inside = self.side.gate().close();
        *self.inside_at_close.get_or_init(|| inside)
    }
}

fn read(table: &RwLock<Table>) -> RwLockReadGuard<'_, Table> {
    // No code panics while it holds the lock.
    table
        .read()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn write(table: &RwLock<Table>) -> RwLockWriteGuard<'_, Table> {
    // No code panics while it holds the lock.
    table
        .write()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod device_for_tests;
#[cfg(test)]
mod flood_tests;
#[cfg(test)]
mod host_for_tests;
#[cfg(test)]
mod initiator_for_tests;
#[cfg(test)]
mod iscsi_tests;
#[cfg(test)]
mod tests;

//! Live exports: the listener, the identities, the sessions of each, and their end.
//!
//! ```text
//!              open                 close             end
//!   unknown ─────────► live ───────────────► closing ─────► closed
//!      │  Connect: the one host     Connect refused for good ──────►
//!      └──────────────────── remember_closed ─────────────────▲
//! ```
//!
//! An identity goes this way once and never back: [`Exports::open`] of a closed
//! one is refused. A closing export's hosts still have their connections, so
//! that they can be told; its gate lets nothing in any more. Only
//! [`Closing::end`] makes it closed.

mod closing;
mod listener;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use prometheus_client::registry::Registry;
use uuid::Uuid;

use crate::attach::ports::{Chap, HostIdentity, Protocol};
use crate::block::BlockDevice;
use crate::block::gate::Gate;
use crate::ids::{Epoch, VolumeId};
use crate::nvme_tcp::auth::Secrets;
use crate::nvme_tcp::connection::{HANDSHAKE, Target};
use crate::nvme_tcp::controller::Event;
use crate::nvme_tcp::discovery::{self, Discovery};
use crate::nvme_tcp::metrics::Metrics;
use crate::nvme_tcp::reserve::Reservations;
use crate::nvme_tcp::subsystem::{Directory, Found, Host, Parts, Subsystem};
use crate::reactor::Reactors;

pub use closing::{Closing, Ended};

/// An export's identity and rights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSpec {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch it is of.
    pub epoch: Epoch,
    /// The protocol it is exported over.
    pub protocol: Protocol,
    /// What both sides of an iSCSI export prove.
    pub chap: Option<Chap>,
    /// Subsystem NQN or target IQN, made for this export alone.
    pub subsystem: String,
    /// Identity of the namespace or LUN, made for this export alone.
    pub namespace: Uuid,
    /// The one host that may connect.
    pub host: HostIdentity,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What its host must prove (DH-HMAC-CHAP); none: its name is enough.
    pub secret: Option<Secrets>,
}

/// The exports that a target serves now, and the identities it knows as closed.
pub struct Exports {
    table: Arc<RwLock<Table>>,
    target: Arc<Target>,
    discovery: Arc<Discovery>,
    reactors: Arc<Reactors>,
}

#[derive(Default)]
struct Table {
    live: HashMap<String, Arc<Live>>,
    /// With the gate of those that this process has served: it counts late commands.
    closed: HashMap<String, Option<Arc<Gate>>>,
}

struct Live {
    spec: ExportSpec,
    subsystem: Arc<Subsystem>,
    inside_at_close: OnceLock<u32>,
}

impl Exports {
    /// None yet; `reactors` will serve their connections.
    pub fn new(reactors: Arc<Reactors>) -> Arc<Self> {
        Self::with_handshake(reactors, HANDSHAKE)
    }

    fn with_handshake(reactors: Arc<Reactors>, handshake: Duration) -> Arc<Self> {
        let table = Arc::new(RwLock::new(Table::default()));
        let discovery = Arc::new(Discovery::default());
        let target = Target {
            directory: Arc::new(Names(Arc::clone(&table), Arc::clone(&discovery))),
            metrics: Metrics::default(),
            handshake,
        };
        Arc::new(Self {
            table,
            target: Arc::new(target),
            discovery,
            reactors,
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        read(&self.table)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        write(&self.table)
    }

    /// Registers connections, associations, commands, bytes, malformed PDUs
    /// and late commands, under names that begin with `drover_`.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.target.metrics.register(registry);
    }

    /// Whether exports of this protocol are served.
    pub fn serves(protocol: Protocol) -> bool {
        match protocol {
            Protocol::NvmeTcp => true,
            Protocol::Iscsi => false,
        }
    }

    /// Serves one more export. The same identity again: nothing changes, and
    /// an identity that was closed is not opened again (the log says so).
    ///
    /// Exports of one volume that are live at once share their reservations,
    /// which last as long as one of them does.
    pub fn open(&self, spec: ExportSpec, device: Arc<dyn BlockDevice>) {
        let others = self.of(&spec.volume);
        let reservations = others.first().map_or_else(Reservations::volatile, |live| {
            Arc::clone(live.subsystem.reservations())
        });
        self.open_with(spec, device, reservations);
    }

    /// As [`Self::open`], with reservations that somebody keeps: the same for
    /// all exports of a volume.
    pub fn open_with(
        &self,
        spec: ExportSpec,
        device: Arc<dyn BlockDevice>,
        reservations: Arc<Reservations>,
    ) {
        if !Self::serves(spec.protocol) {
            tracing::error!(
                name = %spec.subsystem, protocol = spec.protocol.name(),
                "an export of a protocol that is not served"
            );
            return;
        }
        let mut table = self.write();
        if table.closed.contains_key(&spec.subsystem) {
            tracing::error!(
                subsystem = %spec.subsystem, volume = %spec.volume, epoch = %spec.epoch,
                "this identity was closed and is never served again"
            );
            return;
        }
        if !table.live.contains_key(&spec.subsystem) {
            self.discovery.show(&spec.subsystem, &spec.host.nqn);
        }
        table.live.entry(spec.subsystem.clone()).or_insert_with(|| {
            let host = Host {
                nqn: spec.host.nqn.clone(),
                id: spec.host.id,
            };
            let subsystem = Subsystem::new(Parts {
                nqn: spec.subsystem.clone(),
                namespace: spec.namespace,
                host,
                read_only: spec.read_only,
                device,
                reservations,
                secrets: spec.secret.clone(),
                discovery: None,
            });
            Arc::new(Live {
                spec,
                subsystem,
                inside_at_close: OnceLock::new(),
            })
        });
    }

    /// Remembers an identity as closed: Connect is refused for good (DNR).
    /// Unknown ones are refused without DNR. A live one is closed at once, and
    /// only [`Self::close`] and [`Closing::end`] tell its hosts.
    pub fn remember_closed(&self, subsystem: &str) {
        let mut table = self.write();
        if let Some(live) = table.live.get(subsystem) {
            live.close();
            self.discovery.hide(subsystem);
        } else {
            table.closed.entry(subsystem.to_owned()).or_default();
        }
    }

    /// Closes the gate at once: when this returns, no command of the export
    /// enters, and Connect is refused for good. None: no such export is live.
    ///
    /// Until [`Closing::end`] it can be called again, with the same answer.
    pub fn close(&self, subsystem: &str) -> Option<Closing> {
        let live = self.read().live.get(subsystem).map(Arc::clone)?;
        let inside_at_close = live.close();
        self.discovery.hide(subsystem);
        Some(Closing::new(inside_at_close, live, Arc::clone(&self.table)))
    }

    /// Commands of an export that were refused since its gate closed; also
    /// after its end. 0 for one that this process never served.
    pub fn late_refused(&self, subsystem: &str) -> u64 {
        let table = self.read();
        let live = table.live.get(subsystem).map(|live| live.subsystem.gate());
        let gate = live.or_else(|| table.closed.get(subsystem)?.as_ref());
        gate.map_or(0, |gate| gate.late())
    }

    /// Tells the hosts of a volume's exports that its size has changed.
    pub fn resized(&self, volume: &VolumeId) {
        for live in self.of(volume) {
            if let Some(controller) = live.subsystem.current() {
                controller.announce(Event::Namespace);
            }
        }
    }

    /// When the volume's live export saw its last write.
    pub fn last_write(&self, volume: &VolumeId) -> Option<SystemTime> {
        self.of(volume)
            .iter()
            .filter_map(|live| live.subsystem.last_write())
            .max()
    }

    fn of(&self, volume: &VolumeId) -> Vec<Arc<Live>> {
        let table = self.read();
        table
            .live
            .values()
            .filter(|live| live.spec.volume == *volume)
            .map(Arc::clone)
            .collect()
    }

    /// Accepts connections until `stop` becomes true, then ends those it has.
    /// Call it when every export is restored. Hosts that discover are sent to
    /// this listener's port.
    pub async fn serve(
        self: Arc<Self>,
        listener: tokio::net::TcpListener,
        stop: tokio::sync::watch::Receiver<bool>,
    ) {
        if let Ok(address) = listener.local_addr() {
            self.discovery.listens_on(address.port());
        }
        listener::serve(&self, &listener, stop).await;
        let live: Vec<_> = self.read().live.values().map(Arc::clone).collect();
        for live in live {
            live.subsystem.disconnect();
        }
    }
}

/// What connections may know of the exports: their names.
struct Names(Arc<RwLock<Table>>, Arc<Discovery>);

impl Exports {
    /// Accepts connections on a second listener, the port for discovery
    /// (8009), until `stop` becomes true. The same is served on both.
    pub async fn serve_discovery(
        self: Arc<Self>,
        listener: tokio::net::TcpListener,
        stop: tokio::sync::watch::Receiver<bool>,
    ) {
        listener::serve(&self, &listener, stop).await;
    }
}

impl Directory for Names {
    fn find(&self, subsystem: &str) -> Found {
        let table = read(&self.0);
        match table.live.get(subsystem) {
            Some(live) => Found::Live(Arc::clone(&live.subsystem)),
            None if subsystem == discovery::NQN => Found::Discovery(Arc::clone(&self.1)),
            None if table.closed.contains_key(subsystem) => Found::Closed,
            None => Found::Unknown,
        }
    }
}

impl Live {
    /// Closes the gate; how many were inside when it closed first.
    fn close(&self) -> u32 {
        let inside = self.subsystem.gate().close();
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
mod host_for_tests;
#[cfg(test)]
mod tests;

//! Exports over NVMe/TCP: a subsystem each, found by its NQN.

use std::net::SocketAddr;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant, SystemTime};

use super::kept::{Keeper, Kept};
use super::listener::Front;
use super::served::{Farewell, Served, Side};
use super::{ExportSpec, OpenError, Proof, Table, read};
use crate::attach::ports::{Chap, Credentials};
use crate::block::BlockDevice;
use crate::block::gate::Gate;
use crate::nvme_tcp::auth::Secrets;
use crate::nvme_tcp::connection::{NvmeTcp, Target};
use crate::nvme_tcp::controller::Event;
use crate::nvme_tcp::dhchap::{Group, Hash, Secret};
use crate::nvme_tcp::discovery::{self, Discovery};
use crate::nvme_tcp::metrics::Metrics;
use crate::nvme_tcp::reserve::{self, Reservations};
use crate::nvme_tcp::subsystem::{Directory, Found, Host, Parts, Subsystem};
use crate::reactor::{Place, Protocol};

/// A host that does not ask what became of its namespace is not waited for any longer.
const TO_KNOW: Duration = Duration::from_secs(5);
/// From a host's knowing that its namespace is gone to the end of its
/// connections: its kernel takes the disk away meanwhile, and a Linux 6.1
/// that loses the connection first would wait for the disk's return instead.
const TO_LEAVE: Duration = Duration::from_millis(500);

/// What all connections to the table's subsystems have in common.
pub(super) fn target(
    table: &Arc<RwLock<Table>>,
    discovery: &Arc<Discovery>,
    handshake: Duration,
) -> Arc<Target> {
    Arc::new(Target {
        directory: Arc::new(Names(Arc::clone(table), Arc::clone(discovery))),
        metrics: Metrics::default(),
        handshake,
    })
}

/// The subsystem of an export.
pub(super) fn subsystem(
    table: &Table,
    spec: &ExportSpec,
    device: Arc<dyn BlockDevice>,
    kept: Option<Kept>,
) -> Result<Arc<Subsystem>, OpenError> {
    let shared = table.of(&spec.volume).find_map(|live| match &live.side {
        Side::NvmeTcp(other) => Some(Arc::clone(other.reservations())),
        Side::Iscsi(_) => None,
    });
    let reservations = match (shared, kept) {
        (Some(shared), _) => shared,
        (None, Some(kept)) => {
            let keeper = Box::new(ByBytes(kept.keeper));
            let found = Reservations::kept(keeper, kept.state.as_deref());
            found.map_err(|error| OpenError::Reservations {
                name: spec.name.clone(),
                why: error.to_string(),
            })?
        }
        (None, None) => Reservations::volatile(),
    };
    Ok(Subsystem::new(Parts {
        nqn: spec.name.clone(),
        namespace: spec.unit,
        host: Host {
            nqn: spec.host.nqn.clone(),
            id: spec.host.id,
        },
        read_only: spec.read_only,
        device,
        reservations,
        secrets: match &spec.proof {
            Some(Proof::DhHmacChap(secrets)) => Some(secrets.clone()),
            Some(Proof::Chap(_)) | None => None,
        },
        discovery: None,
    }))
}

/// Secrets made for one export, as DH-HMAC-CHAP uses them: their bytes are the
/// keys. They are random and long, so a Diffie-Hellman exchange, which is to
/// save weak ones from being guessed, is not asked for.
///
/// None: a secret has no key's length.
pub(super) fn secrets(chap: &Chap) -> Option<Secrets> {
    let key = |of: &Credentials| Secret::of_key(of.secret.as_bytes());
    Some(Secrets {
        host: key(&chap.initiator)?,
        controller: Some(key(&chap.target)?),
        hash: Hash::Sha256,
        group: Group::Null,
    })
}

/// A keeper of bytes, as reservations want it.
struct ByBytes(Box<dyn Keeper>);

impl reserve::Keeper for ByBytes {
    fn keep(&self, record: &[u8]) -> Result<(), String> {
        self.0.keep(Some(record))
    }
}

/// What connections may know of the exports: their names.
struct Names(Arc<RwLock<Table>>, Arc<Discovery>);

impl Directory for Names {
    fn find(&self, subsystem: &str) -> Found {
        let table = read(&self.0);
        match table.live.get(subsystem).map(|live| &live.side) {
            Some(Side::NvmeTcp(subsystem)) => Found::Live(Arc::clone(subsystem)),
            Some(Side::Iscsi(_)) => Found::Unknown,
            None if subsystem == discovery::NQN => Found::Discovery(Arc::clone(&self.1)),
            None if table.closed.contains_key(subsystem) => Found::Closed,
            None => Found::Unknown,
        }
    }
}

impl Front for Target {
    const NAME: &'static str = "NVMe/TCP";

    fn connection(
        self: &Arc<Self>,
        peer: SocketAddr,
        local: SocketAddr,
        place: Place,
        now: Instant,
    ) -> Box<dyn Protocol> {
        let target = Arc::clone(self);
        Box::new(NvmeTcp::new(target, peer, local.ip(), Some(place), now))
    }

    fn evicted(&self) {
        self.metrics.evicted();
    }
}

impl Served for Subsystem {
    fn gate(&self) -> &Arc<Gate> {
        self.gate()
    }
    fn connections(&self) -> u32 {
        self.connections()
    }
    fn last_write(&self) -> Option<SystemTime> {
        self.last_write()
    }
    fn resized(&self) {
        if let Some(controller) = self.current() {
            controller.announce(Event::Namespace);
        }
    }
    fn take_away(&self) {
        self.take_away();
    }
    fn knows_the_end(&self) -> bool {
        self.current()
            .is_none_or(|controller| controller.knows_the_end())
    }
    fn farewell(&self, _: Duration) -> Farewell {
        Farewell {
            to_know: TO_KNOW,
            to_leave: TO_LEAVE,
        }
    }
    fn disconnect(&self) {
        self.disconnect();
    }
}

//! Exports over iSCSI: a target each, found by its IQN, with the volume as LUN 0.

use std::net::SocketAddr;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant, SystemTime};

use super::kept::Kept;
use super::listener::Front;
use super::served::{Farewell, Served, Side};
use super::{ExportSpec, OpenError, Proof, Table, read};
use crate::attach::ports;
use crate::block::BlockDevice;
use crate::block::gate::Gate;
use crate::iscsi::chap::Credentials;
use crate::iscsi::connection::{Iscsi, Shared};
use crate::iscsi::metrics::Metrics;
use crate::iscsi::scsi::inquiry::Identity;
use crate::iscsi::scsi::reservation::{Keeper, State};
use crate::iscsi::target::{Access, Directory, Found, Spec, Target};
use crate::iscsi::unit::Unit;
use crate::reactor::{Place, Protocol};

/// How long initiators keep the session of an ended export.
///
/// Only an answer makes their I/O fail: one that loses its session logs in again
/// for ever, whatever the refusal is, and its I/O waits. So the session stays
/// until the node's agent, which is told of the end, has logged out, or for so
/// long, where no agent is left to do it.
pub(super) const LOGOUT: Duration = Duration::from_secs(60);

/// What all connections to the table's targets have in common.
pub(super) fn target(table: &Arc<RwLock<Table>>, handshake: Duration) -> Arc<Shared> {
    let names = Arc::new(Names(Arc::clone(table)));
    Shared::with_handshake(names, Metrics::default(), handshake)
}

/// The target of an export.
pub(super) fn unit(
    spec: &ExportSpec,
    device: Arc<dyn BlockDevice>,
    kept: Option<Kept>,
) -> Result<Arc<Target>, OpenError> {
    let Some(Proof::Chap(chap)) = &spec.proof else {
        return Err(OpenError::NoSecrets(spec.name.clone()));
    };
    let unreadable = |why| OpenError::Reservations {
        name: spec.name.clone(),
        why,
    };
    let keeper = kept.map(AsState::new).transpose().map_err(unreadable)?;
    let keeper = keeper.map(|keeper| Box::new(keeper) as Box<dyn Keeper>);
    let identity = Identity {
        uuid: spec.unit,
        target: spec.name.clone(),
    };
    let unit = Unit::new(device, identity, spec.read_only, keeper).map_err(unreadable)?;
    let credentials = |of: &ports::Credentials| Credentials {
        name: of.name.clone(),
        secret: of.secret.clone(),
    };
    let spec = Spec {
        name: spec.name.clone(),
        access: vec![Access {
            initiator: spec.host.iqn.clone(),
            incoming: Some(credentials(&chap.initiator)),
            outgoing: Some(credentials(&chap.target)),
        }],
        // An epoch has one holder, and a holder one session.
        max_sessions: 1,
    };
    Ok(Target::new(spec, unit))
}

/// A keeper of bytes, as a unit wants it.
struct AsState {
    kept: Kept,
    state: Option<State>,
}

impl AsState {
    fn new(kept: Kept) -> Result<Self, String> {
        let state = kept.state.as_deref().map(serde_json::from_slice);
        let state = state.transpose().map_err(|error| error.to_string())?;
        Ok(Self { kept, state })
    }
}

impl Keeper for AsState {
    fn load(&self) -> Result<Option<State>, String> {
        Ok(self.state.clone())
    }

    fn keep(&self, state: Option<&State>) -> Result<(), String> {
        let bytes = state.map(serde_json::to_vec).transpose();
        let bytes = bytes.map_err(|error| error.to_string())?;
        self.kept.keeper.keep(bytes.as_deref())
    }
}

/// What connections may know of the exports: their names, and each initiator
/// those of its own.
struct Names(Arc<RwLock<Table>>);

impl Directory for Names {
    fn find(&self, target: &str) -> Found {
        let table = read(&self.0);
        match table.live.get(target).map(|live| &live.side) {
            Some(Side::Iscsi(target)) => Found::Live(Arc::clone(target)),
            Some(Side::NvmeTcp(_)) => Found::Unknown,
            None if table.closed.contains_key(target) => Found::Closed,
            None => Found::Unknown,
        }
    }

    fn visible(&self, initiator: &str) -> Vec<String> {
        let table = read(&self.0);
        let targets = table.live.values().filter_map(|live| match &live.side {
            Side::Iscsi(target) => Some(target),
            Side::NvmeTcp(_) => None,
        });
        let mut names: Vec<_> = targets
            .filter(|target| target.access(initiator).is_some() && !target.gate().is_closed())
            .map(|target| target.name().to_owned())
            .collect();
        names.sort();
        names
    }
}

impl Front for Shared {
    const NAME: &'static str = "iSCSI";

    fn connection(
        self: &Arc<Self>,
        peer: SocketAddr,
        local: SocketAddr,
        place: Place,
        now: Instant,
    ) -> Box<dyn Protocol> {
        let shared = Arc::clone(self);
        Box::new(Iscsi::new(shared, peer, local, Some(place), now))
    }

    fn evicted(&self) {
        self.metrics.evicted();
    }
}

impl Served for Target {
    fn gate(&self) -> &Arc<Gate> {
        self.gate()
    }
    fn connections(&self) -> u32 {
        self.connections()
    }
    fn last_write(&self) -> Option<SystemTime> {
        self.unit().last_write()
    }
    fn resized(&self) {
        self.unit().announce_resize();
    }
    fn take_away(&self) {
        self.take_away();
    }
    fn knows_the_end(&self) -> bool {
        self.knows_the_end()
    }
    fn farewell(&self, logout: Duration) -> Farewell {
        Farewell {
            to_know: logout,
            to_leave: logout,
        }
    }
    fn disconnect(&self) {
        self.disconnect();
    }
}

//! Making and growing volumes, and the room there is.

use std::sync::Arc;
use std::time::SystemTime;

use futures::future::join_all;
use tokio::time::Instant;

use super::perform::{HOME, within};
use super::restores::RestoreClaim;
use super::slot::Slot;
use super::{ArbiterError, Inner, PROVISION, still, view};
use crate::attach::ports::{Capacity, Content, Home, HomeError};
use crate::attach::record::{NewVolume, NodeRecord, VolumeSpec, VolumeView};
use crate::attach::state::{Event, Phase, Stage, VolumeState};
use crate::ids::{Bytes, NodeId, VolumeId};

const MIB: u64 = 1 << 20;
/// Sizes are signed 64-bit numbers in CSI and in files.
const LARGEST: u64 = (i64::MAX as u64) & !(MIB - 1);

/// What was asked, in whole MiB.
fn rounded(at_least: Bytes, at_most: Option<Bytes>) -> Result<Bytes, ArbiterError> {
    if at_least.0 == 0 {
        return Err(ArbiterError::OutOfRange(
            "a volume of 0 bytes was asked for; ask for at least 1 MiB".to_owned(),
        ));
    }
    let size = at_least
        .0
        .checked_next_multiple_of(MIB)
        .filter(|size| *size <= LARGEST)
        .ok_or_else(|| {
            ArbiterError::OutOfRange(format!("{at_least} are more than a volume can have"))
        })?;
    match at_most {
        Some(limit) if size > limit.0 => Err(ArbiterError::OutOfRange(format!(
            "{at_least} are {} in whole MiB, more than the limit of {limit}",
            Bytes(size)
        ))),
        _ => Ok(Bytes(size)),
    }
}

impl Inner {
    /// Makes a volume and waits until its home has made it.
    pub(super) async fn create_volume(
        self: &Arc<Self>,
        request: NewVolume,
        restore: Option<RestoreClaim>,
    ) -> Result<VolumeView, ArbiterError> {
        let slot = self.decide_volume(request, restore).await?;
        slot.nudge.notify_one();
        let asked = Instant::now();
        let state = slot
            .wait(PROVISION, |seen| match &seen.state.phase {
                Phase::Creating => still(seen, asked),
                Phase::Deleting { unmade } | Phase::Gone { unmade } => Some(Err(match unmade {
                    Some(error) => ArbiterError::from(error.clone()),
                    None => ArbiterError::NotYet("it is being deleted".to_owned()),
                })),
                _ => Some(Ok(Arc::clone(&seen.state))),
            })
            .await?;
        Ok(view(&state))
    }

    /// Finds the volume of the request's name, or decides on a new one and
    /// sees to it that it is recorded and then made. For a restore only a new
    /// one will do.
    async fn decide_volume(
        self: &Arc<Self>,
        request: NewVolume,
        restore: Option<RestoreClaim>,
    ) -> Result<Arc<Slot>, ArbiterError> {
        let asked = rounded(request.at_least, request.at_most)?;
        let one = self.naming.lock().await;
        if let Some(slot) = self.of_name(&request.name) {
            if restore.is_some() {
                return Err(taken_name(&slot.state().spec));
            }
            compatible(&slot.state().spec, &request, asked)?;
            return Ok(slot);
        }
        let (size, home) = match &request.content {
            Content::Empty => (asked, self.choose_home(request.home.as_ref()).await?),
            Content::Volume(source) => {
                let spec = &self.existing(source)?.1.spec;
                (asked.max(spec.size), spec.home.clone())
            }
            Content::Snapshot(source) => {
                let record = super::snapshots::whole_one(self, source).await?;
                (asked.max(record.info.size), record.home)
            }
        };
        if let Some(limit) = request.at_most
            && size > limit
        {
            return Err(ArbiterError::OutOfRange(format!(
                "the source has {size}, more than the limit of {limit}"
            )));
        }
        let spec = VolumeSpec {
            id: VolumeId::random(),
            name: request.name,
            size,
            content: request.content,
            protocol: request.protocol,
            home,
            busy_deadline: request.busy_deadline,
            parameters: request.parameters,
        };
        let state = match restore {
            None => VolumeState::new(spec),
            Some(RestoreClaim { ticket, lease }) => {
                VolumeState::for_restore(spec, ticket, lease, SystemTime::now())
            }
        };
        // From here on the name is taken, whatever the store says of the record.
        let slot = self.adopt_new(state, None);
        drop(one);
        self.mend(&slot);
        Ok(slot)
    }

    fn of_name(&self, name: &str) -> Option<Arc<Slot>> {
        self.slots().into_iter().find(|slot| {
            let state = slot.state();
            let condemned = matches!(state.stage(), Stage::Ending | Stage::Deleting | Stage::Gone);
            state.spec.name == name && !condemned
        })
    }

    /// The node asked for, or the one whose pool has most room.
    async fn choose_home(&self, asked: Option<&NodeId>) -> Result<NodeId, ArbiterError> {
        if let Some(node) = asked {
            let record = self.node_record(node)?;
            if !record.has_pool {
                return Err(ArbiterError::Unsupported(format!(
                    "node {node} has no pool; choose another home"
                )));
            }
            return Ok(node.clone());
        }
        let rooms = self.rooms().await;
        if rooms.is_empty() {
            return Err(ArbiterError::Unavailable(
                "no node with a pool has registered".to_owned(),
            ));
        }
        let mut best: Option<(Bytes, NodeId)> = None;
        let mut silent = Vec::new();
        for (node, room) in rooms {
            match room {
                Ok(room) if best.as_ref().is_none_or(|(most, _)| room.available > *most) => {
                    best = Some((room.available, node));
                }
                Ok(_) => {}
                Err(error) => silent.push(error.to_string()),
            }
        }
        best.map(|(_, node)| node)
            .ok_or_else(|| ArbiterError::Unavailable(silent.join("; ")))
    }

    /// The room in every pool whose node is not lost.
    async fn rooms(&self) -> Vec<(NodeId, Result<Capacity, HomeError>)> {
        let homes: Vec<NodeRecord> = {
            let nodes = self.nodes.read();
            let nodes = nodes.unwrap_or_else(std::sync::PoisonError::into_inner);
            nodes
                .values()
                .filter(|record| record.has_pool && record.lost.is_none())
                .cloned()
                .collect()
        };
        join_all(homes.into_iter().map(|record| async move {
            let room = match self.home(&record.node) {
                Ok(home) => within(&record.node, "capacity", HOME, home.capacity()).await,
                Err(error) => Err(error),
            };
            (record.node, room)
        }))
        .await
    }

    pub(super) fn home(&self, node: &NodeId) -> Result<Arc<dyn Home>, HomeError> {
        self.ports.home(node).ok_or_else(|| HomeError::Unreachable {
            node: node.clone(),
            detail: "it has not registered since this controller started".to_owned(),
        })
    }

    pub(super) async fn capacity(&self, home: Option<&NodeId>) -> Result<Capacity, ArbiterError> {
        let none = Capacity {
            available: Bytes(0),
            total: Bytes(0),
        };
        if let Some(node) = home {
            if !self.node_record(node)?.has_pool {
                return Ok(none);
            }
            let home = self.home(node)?;
            return Ok(within(node, "capacity", HOME, home.capacity()).await?);
        }
        let mut silent = None;
        let mut most: Option<Capacity> = None;
        for (_, room) in self.rooms().await {
            match room {
                Ok(room) if most.is_none_or(|most| room.available > most.available) => {
                    most = Some(room);
                }
                Ok(_) => {}
                Err(error) => silent = Some(error),
            }
        }
        match (most, silent) {
            (Some(most), _) => Ok(most),
            (None, Some(error)) => Err(error.into()),
            (None, None) => Ok(none),
        }
    }

    pub(super) async fn expand(
        self: &Arc<Self>,
        volume: &VolumeId,
        at_least: Bytes,
        at_most: Option<Bytes>,
    ) -> Result<Bytes, ArbiterError> {
        let (slot, state) = self.existing(volume)?;
        let size = rounded(at_least, at_most)?;
        let spec = &state.spec;
        if size <= spec.size {
            return match at_most {
                Some(limit) if spec.size > limit => Err(ArbiterError::OutOfRange(format!(
                    "volume {volume} has {}, more than the limit of {limit}, and cannot shrink",
                    spec.size
                ))),
                _ => Ok(spec.size),
            };
        }
        // At home first: a record that is behind is mended by asking again, one
        // that is ahead would promise blocks that are not there.
        let home = self.home(&spec.home)?;
        let grown = within(&spec.home, "expand", HOME, home.expand(volume, size)).await?;
        self.apply(&slot, Event::Resized(grown)).await?;
        Ok(grown)
    }

    /// Refuses where a clone of the volume is still being made.
    pub(super) fn not_being_cloned(&self, volume: &VolumeId) -> Result<(), ArbiterError> {
        self.no_making_of(&Content::Volume(volume.clone()))
    }

    pub(super) fn no_making_of(&self, content: &Content) -> Result<(), ArbiterError> {
        let making = self.slots().into_iter().find(|slot| {
            let state = slot.state();
            state.stage() == Stage::Creating && state.spec.content == *content
        });
        match making {
            None => Ok(()),
            Some(slot) => Err(ArbiterError::InUse(format!(
                "volume {} is being made from it; try again when that has ended",
                slot.id()
            ))),
        }
    }
}

/// The refusal of a restore under a name that a volume has.
fn taken_name(spec: &VolumeSpec) -> ArbiterError {
    ArbiterError::Incompatible(format!(
        "volume {} already has the name {:?}, and a restore makes a new volume: \
         give it another name, or delete that volume first (drover volume delete {})",
        spec.id, spec.name, spec.id
    ))
}

fn compatible(spec: &VolumeSpec, request: &NewVolume, asked: Bytes) -> Result<(), ArbiterError> {
    let differs = if spec.size < asked || request.at_most.is_some_and(|limit| spec.size > limit) {
        format!("has {}", spec.size)
    } else if spec.content != request.content {
        format!("began as {:?}", spec.content)
    } else if spec.protocol != request.protocol {
        format!("is exported over {}", spec.protocol.name())
    } else if request.content == Content::Empty
        && request.home.as_ref().is_some_and(|home| *home != spec.home)
    {
        format!("is on {}", spec.home)
    } else {
        return Ok(());
    };
    Err(ArbiterError::Incompatible(format!(
        "volume {} already has the name {:?}, and {differs}",
        spec.id, spec.name
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_mib_within_limits() {
        let mib = |n: u64| Bytes(n * MIB);
        assert_eq!(rounded(Bytes(1), None), Ok(mib(1)));
        assert_eq!(rounded(mib(3), Some(mib(3))), Ok(mib(3)));
        assert_eq!(rounded(Bytes(3 * MIB + 1), None), Ok(mib(4)));
        for (at_least, at_most) in [
            (0, None),
            (1, Some(2)),
            (2 * MIB, Some(MIB)),
            (u64::MAX, None),
            (i64::MAX as u64, None),
        ] {
            let result = rounded(Bytes(at_least), at_most.map(Bytes));
            assert!(
                matches!(result, Err(ArbiterError::OutOfRange(_))),
                "{at_least} {at_most:?}: {result:?}"
            );
        }
    }
}

//! What the Controller service's calls ask for.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::attach::ports::Content;
use crate::attach::record::{AccessMode, NewVolume};
use crate::ids::{Bytes, NodeId, SnapshotId, VolumeId};

use super::{
    CLUSTER_PREFIX, DEFAULT_SIZE, MIB, Page, Range, RequestError, Use, capability, class, existing,
    name, page, perhaps, range, shown, volume_id,
};
use crate::csi::proto::{self, volume_content_source::Type as Source};

/// The key under which a node's name stands in its topology.
pub const TOPOLOGY_KEY: &str = "drover.io/node";

/// How long a live holder may keep NodeUnstage from ending, where the
/// StorageClass does not say.
pub const BUSY_DEADLINE: Duration = Duration::from_secs(120);

/// CreateVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// What is asked of the arbiter. Its home is the one that the StorageClass names.
    pub volume: NewVolume,
    /// Whether the caller said how large the volume must be.
    pub sized: bool,
    /// Where the volume would best live, best first. A wish only: every node
    /// can attach every volume.
    pub near: Vec<NodeId>,
}

/// Checks CreateVolume.
pub fn create(sent: &proto::CreateVolumeRequest) -> Result<Create, RequestError> {
    let name = name(&sent.name)?;
    capabilities(&sent.volume_capabilities)?;
    immutable(&sent.mutable_parameters)?;
    let class = class(&sent.parameters, BUSY_DEADLINE)?;
    let content = content(sent.volume_content_source.as_ref())?;
    let range = range(sent.capacity_range.as_ref())?;
    Ok(Create {
        sized: range.is_some_and(|range| range.required.is_some()),
        near: near(sent.accessibility_requirements.as_ref()),
        volume: NewVolume {
            name,
            at_least: least(range)?,
            at_most: range.and_then(|range| range.limit),
            content,
            protocol: class.protocol,
            home: class.home,
            busy_deadline: class.busy_deadline,
            parameters: class.own,
        },
    })
}

/// The least size that a range asks for: the default, unless it says otherwise.
fn least(range: Option<Range>) -> Result<Bytes, RequestError> {
    match range {
        None => Ok(DEFAULT_SIZE),
        Some(Range {
            required: Some(required),
            ..
        }) => Ok(required),
        Some(Range {
            required: None,
            limit,
        }) => {
            let limit = limit.unwrap_or(DEFAULT_SIZE);
            let whole = limit.0 - limit.0 % MIB;
            if whole == 0 {
                let text = format!("limit_bytes ({limit}) is less than the smallest volume, 1 MiB");
                return Err(RequestError::Size(text));
            }
            Ok(DEFAULT_SIZE.min(Bytes(whole)))
        }
    }
}

fn content(sent: Option<&proto::VolumeContentSource>) -> Result<Content, RequestError> {
    let Some(sent) = sent else {
        return Ok(Content::Empty);
    };
    match &sent.r#type {
        None => Err(RequestError::Missing("volume_content_source.type")),
        Some(Source::Snapshot(from)) => Ok(Content::Snapshot(existing(
            "volume_content_source.snapshot.snapshot_id",
            &from.snapshot_id,
        )?)),
        Some(Source::Volume(from)) => Ok(Content::Volume(existing(
            "volume_content_source.volume.volume_id",
            &from.volume_id,
        )?)),
    }
}

fn near(sent: Option<&proto::TopologyRequirement>) -> Vec<NodeId> {
    let Some(sent) = sent else { return Vec::new() };
    sent.preferred
        .iter()
        .chain(&sent.requisite)
        .filter_map(node_of)
        .collect()
}

fn node_of(place: &proto::Topology) -> Option<NodeId> {
    place.segments.get(TOPOLOGY_KEY)?.parse().ok()
}

fn capabilities(sent: &[proto::VolumeCapability]) -> Result<Vec<Use>, RequestError> {
    if sent.is_empty() {
        return Err(RequestError::Missing("volume_capabilities"));
    }
    sent.iter().map(|one| capability(Some(one))).collect()
}

/// Nothing about a volume can be changed by ControllerModifyVolume yet.
fn immutable(sent: &std::collections::HashMap<String, String>) -> Result<(), RequestError> {
    match sent.keys().min() {
        None => Ok(()),
        Some(key) => Err(RequestError::Parameter {
            key: shown(key),
            why: "drover has no mutable parameters".to_owned(),
        }),
    }
}

/// DeleteVolume; none: there can be no such volume.
pub fn delete(sent: &proto::DeleteVolumeRequest) -> Result<Option<VolumeId>, RequestError> {
    perhaps("volume_id", &sent.volume_id)
}

/// ControllerPublishVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// The volume.
    pub volume: VolumeId,
    /// The node that shall use it.
    pub node: NodeId,
    /// Whether it may write.
    pub mode: AccessMode,
}

/// Checks ControllerPublishVolume.
pub fn publish(sent: &proto::ControllerPublishVolumeRequest) -> Result<Publish, RequestError> {
    // Every field is looked at before an impossible id is called unknown.
    super::given("volume_id", &sent.volume_id)?;
    super::given("node_id", &sent.node_id)?;
    let wanted = capability(sent.volume_capability.as_ref())?;
    let mode = if sent.readonly {
        AccessMode::SingleReader
    } else {
        wanted.mode
    };
    Ok(Publish {
        volume: volume_id(&sent.volume_id)?,
        node: existing("node_id", &sent.node_id)?,
        mode,
    })
}

/// ControllerUnpublishVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpublish {
    /// The volume.
    pub volume: VolumeId,
    /// The node; none: every node.
    pub node: Option<NodeId>,
}

/// Checks ControllerUnpublishVolume; none: no such volume or node can be, so
/// there is nothing to end.
pub fn unpublish(
    sent: &proto::ControllerUnpublishVolumeRequest,
) -> Result<Option<Unpublish>, RequestError> {
    let Some(volume) = perhaps("volume_id", &sent.volume_id)? else {
        return Ok(None);
    };
    if sent.node_id.is_empty() {
        return Ok(Some(Unpublish { volume, node: None }));
    }
    let node: Option<NodeId> = perhaps("node_id", &sent.node_id)?;
    Ok(node.map(|node| Unpublish {
        volume,
        node: Some(node),
    }))
}

/// ValidateVolumeCapabilities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validate {
    /// The volume.
    pub volume: VolumeId,
    /// Why some of it cannot be confirmed, if some cannot.
    pub refusal: Option<RequestError>,
    /// The parameters of drover's own that the volume is said to have.
    pub parameters: BTreeMap<String, String>,
}

/// Checks ValidateVolumeCapabilities. A way to use the volume that drover does
/// not offer is an answer here, not an error; a malformed one is an error.
pub fn validate(sent: &proto::ValidateVolumeCapabilitiesRequest) -> Result<Validate, RequestError> {
    super::given("volume_id", &sent.volume_id)?;
    let refusal = match capabilities(&sent.volume_capabilities) {
        Ok(_) => None,
        Err(refusal @ RequestError::Capability(_)) => Some(refusal),
        Err(error) => return Err(error),
    };
    let checked = class(&sent.parameters, BUSY_DEADLINE)
        .and_then(|class| immutable(&sent.mutable_parameters).map(|()| class.own));
    let volume = volume_id(&sent.volume_id)?;
    Ok(match checked {
        Ok(parameters) => Validate {
            volume,
            refusal,
            parameters,
        },
        Err(error) => Validate {
            volume,
            refusal: refusal.or(Some(error)),
            parameters: BTreeMap::new(),
        },
    })
}

/// Checks ListVolumes.
pub fn list_volumes(sent: &proto::ListVolumesRequest) -> Result<Page<VolumeId>, RequestError> {
    page(sent.max_entries, &sent.starting_token)
}

/// Checks ControllerGetVolume.
pub fn get_volume(sent: &proto::ControllerGetVolumeRequest) -> Result<VolumeId, RequestError> {
    volume_id(&sent.volume_id)
}

/// GetCapacity: the room for which volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Room {
    /// For volumes that cannot be made: none.
    None,
    /// In the pool of this node.
    On(NodeId),
    /// In the pool that has most.
    Anywhere,
}

/// Checks GetCapacity.
pub fn get_capacity(sent: &proto::GetCapacityRequest) -> Result<Room, RequestError> {
    if !sent.volume_capabilities.is_empty() {
        match capabilities(&sent.volume_capabilities) {
            Ok(_) => {}
            Err(RequestError::Capability(_)) => return Ok(Room::None),
            Err(error) => return Err(error),
        }
    }
    let class = class(&sent.parameters, BUSY_DEADLINE)?;
    let here = match &sent.accessible_topology {
        None => None,
        Some(place) => match node_of(place) {
            Some(node) => Some(node),
            // A place that is no node of ours has no pool.
            None if !place.segments.is_empty() => return Ok(Room::None),
            None => None,
        },
    };
    Ok(match (class.home, here) {
        (Some(home), Some(here)) if home != here => Room::None,
        (Some(node), _) | (None, Some(node)) => Room::On(node),
        (None, None) => Room::Anywhere,
    })
}

/// ControllerExpandVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expand {
    /// The volume.
    pub volume: VolumeId,
    /// At least this size.
    pub at_least: Bytes,
    /// At most this size, if there is a limit.
    pub at_most: Option<Bytes>,
    /// Whether it is known to be used as a bare device.
    pub block: bool,
}

/// Checks ControllerExpandVolume.
pub fn expand(sent: &proto::ControllerExpandVolumeRequest) -> Result<Expand, RequestError> {
    super::given("volume_id", &sent.volume_id)?;
    let range =
        range(sent.capacity_range.as_ref())?.ok_or(RequestError::Missing("capacity_range"))?;
    let block = match &sent.volume_capability {
        None => false,
        Some(one) => capability(Some(one))?.access == crate::attach::ports::Access::Block,
    };
    Ok(Expand {
        volume: volume_id(&sent.volume_id)?,
        at_least: range.required.unwrap_or(Bytes(0)),
        at_most: range.limit,
        block,
    })
}

/// CreateSnapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateSnapshot {
    /// The volume it is of.
    pub volume: VolumeId,
    /// The name that makes the request idempotent.
    pub name: String,
}

/// Checks CreateSnapshot.
pub fn create_snapshot(
    sent: &proto::CreateSnapshotRequest,
) -> Result<CreateSnapshot, RequestError> {
    let name = name(&sent.name)?;
    super::given("source_volume_id", &sent.source_volume_id)?;
    if let Some(key) = sent
        .parameters
        .keys()
        .filter(|k| !k.starts_with(CLUSTER_PREFIX))
        .min()
    {
        return Err(RequestError::Parameter {
            key: shown(key),
            why: "is not known; a VolumeSnapshotClass of drover's has no parameters".to_owned(),
        });
    }
    Ok(CreateSnapshot {
        volume: existing("source_volume_id", &sent.source_volume_id)?,
        name,
    })
}

/// DeleteSnapshot; none: there can be no such snapshot.
pub fn delete_snapshot(
    sent: &proto::DeleteSnapshotRequest,
) -> Result<Option<SnapshotId>, RequestError> {
    perhaps("snapshot_id", &sent.snapshot_id)
}

/// ListSnapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListSnapshots {
    /// Which page.
    pub page: Page<SnapshotId>,
    /// Only those of this volume.
    pub volume: Option<VolumeId>,
    /// Only this one.
    pub snapshot: Option<SnapshotId>,
}

/// Checks ListSnapshots; none: nothing can match.
pub fn list_snapshots(
    sent: &proto::ListSnapshotsRequest,
) -> Result<Option<ListSnapshots>, RequestError> {
    let page = page(sent.max_entries, &sent.starting_token)?;
    let mut list = ListSnapshots {
        page,
        volume: None,
        snapshot: None,
    };
    if !sent.source_volume_id.is_empty() {
        let Ok(volume) = sent.source_volume_id.parse() else {
            return Ok(None);
        };
        list.volume = Some(volume);
    }
    if !sent.snapshot_id.is_empty() {
        let Ok(snapshot) = sent.snapshot_id.parse() else {
            return Ok(None);
        };
        list.snapshot = Some(snapshot);
    }
    Ok(Some(list))
}

//! What the Node service's calls ask for.

use std::path::PathBuf;

use crate::attach::ports::{PublishRequest, StageRequest};
use crate::attach::record::AccessMode;
use crate::ids::{Bytes, VolumeId};

use super::{RequestError, capability, given, path, perhaps, place, range, volume_id};
use crate::csi::proto;

/// Checks NodeStageVolume. The contexts say nothing: the node asks for its
/// current attachment itself.
pub fn stage(sent: &proto::NodeStageVolumeRequest) -> Result<StageRequest, RequestError> {
    given("volume_id", &sent.volume_id)?;
    let staging = path("staging_target_path", &sent.staging_target_path)?;
    let wanted = capability(sent.volume_capability.as_ref())?;
    Ok(StageRequest {
        volume: volume_id(&sent.volume_id)?,
        staging,
        access: wanted.access,
    })
}

/// Checks NodeUnstageVolume; none: there can be no such volume.
pub fn unstage(
    sent: &proto::NodeUnstageVolumeRequest,
) -> Result<Option<(VolumeId, PathBuf)>, RequestError> {
    let volume: Option<VolumeId> = perhaps("volume_id", &sent.volume_id)?;
    let staging = path("staging_target_path", &sent.staging_target_path)?;
    Ok(volume.map(|volume| (volume, staging)))
}

/// Checks NodePublishVolume.
pub fn publish(sent: &proto::NodePublishVolumeRequest) -> Result<PublishRequest, RequestError> {
    given("volume_id", &sent.volume_id)?;
    let target = path("target_path", &sent.target_path)?;
    let wanted = capability(sent.volume_capability.as_ref())?;
    if sent.staging_target_path.is_empty() {
        return Err(RequestError::NotStaged);
    }
    let staging = path("staging_target_path", &sent.staging_target_path)?;
    Ok(PublishRequest {
        volume: volume_id(&sent.volume_id)?,
        staging,
        target,
        access: wanted.access,
        read_only: sent.readonly || wanted.mode == AccessMode::SingleReader,
    })
}

/// Checks NodeUnpublishVolume; none: there can be no such volume.
pub fn unpublish(
    sent: &proto::NodeUnpublishVolumeRequest,
) -> Result<Option<(VolumeId, PathBuf)>, RequestError> {
    let volume: Option<VolumeId> = perhaps("volume_id", &sent.volume_id)?;
    let target = path("target_path", &sent.target_path)?;
    Ok(volume.map(|volume| (volume, target)))
}

/// Checks NodeGetVolumeStats.
pub fn stats(sent: &proto::NodeGetVolumeStatsRequest) -> Result<(VolumeId, PathBuf), RequestError> {
    given("volume_id", &sent.volume_id)?;
    given("volume_path", &sent.volume_path)?;
    let volume = volume_id(&sent.volume_id)?;
    let path = place(&volume, &sent.volume_path)?;
    Ok((volume, path))
}

/// NodeExpandVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expand {
    /// The volume.
    pub volume: VolumeId,
    /// Where it is published or staged.
    pub path: PathBuf,
    /// At least this size; 0: the volume's whole.
    pub at_least: Bytes,
}

/// Checks NodeExpandVolume.
pub fn expand(sent: &proto::NodeExpandVolumeRequest) -> Result<Expand, RequestError> {
    given("volume_id", &sent.volume_id)?;
    given("volume_path", &sent.volume_path)?;
    let range = range(sent.capacity_range.as_ref())?;
    if let Some(one) = &sent.volume_capability {
        capability(Some(one))?;
    }
    let volume = volume_id(&sent.volume_id)?;
    let path = place(&volume, &sent.volume_path)?;
    let at_least = range.and_then(|range| range.required).unwrap_or(Bytes(0));
    Ok(Expand {
        volume,
        path,
        at_least,
    })
}

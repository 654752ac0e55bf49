//! The Node service over a staging that notes what it is asked.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use async_trait::async_trait;
use tonic::Code;

use super::node_server::Node as _;
use super::*;
use crate::attach::ports::{Access, FsType, PublishRequest, StageRequest};
use crate::csi::proto::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use crate::ids::{Bytes, VolumeId};

/// What was asked of a staging.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::csi) enum Asked {
    Stage(StageRequest),
    Unstage(VolumeId, PathBuf),
    Publish(PublishRequest),
    Unpublish(VolumeId, PathBuf),
    Stats(VolumeId, PathBuf),
    Expand(VolumeId, PathBuf, Bytes),
}

/// The kernel's edge: keeps what it is asked, and refuses `/refused`.
#[derive(Debug, Default)]
pub(in crate::csi) struct Noted(pub(in crate::csi) Mutex<Vec<Asked>>);

impl Noted {
    fn note(&self, asked: Asked, volume: &VolumeId, path: &Path) -> Result<(), NodeError> {
        self.0.lock().unwrap().push(asked);
        if path == Path::new("/refused") {
            let (volume, path) = (volume.clone(), path.to_owned());
            return Err(NodeError::NotStaged { volume, path });
        }
        Ok(())
    }
}

#[async_trait]
impl Staging for Noted {
    async fn stage(&self, r: &StageRequest) -> Result<(), NodeError> {
        self.note(Asked::Stage(r.clone()), &r.volume, &r.staging)
    }
    async fn unstage(&self, volume: &VolumeId, path: &Path) -> Result<(), NodeError> {
        self.note(Asked::Unstage(volume.clone(), path.into()), volume, path)
    }
    async fn publish(&self, r: &PublishRequest) -> Result<(), NodeError> {
        self.note(Asked::Publish(r.clone()), &r.volume, &r.staging)
    }
    async fn unpublish(&self, volume: &VolumeId, path: &Path) -> Result<(), NodeError> {
        self.note(Asked::Unpublish(volume.clone(), path.into()), volume, path)
    }
    async fn stats(&self, volume: &VolumeId, path: &Path) -> Result<Usage, NodeError> {
        self.note(Asked::Stats(volume.clone(), path.into()), volume, path)?;
        Ok(Usage {
            bytes: [100, 30, 70],
            inodes: Some([10, 3, 7]),
        })
    }
    async fn expand(
        &self,
        volume: &VolumeId,
        path: &Path,
        at_least: Bytes,
    ) -> Result<Bytes, NodeError> {
        self.note(
            Asked::Expand(volume.clone(), path.into(), at_least),
            volume,
            path,
        )?;
        Ok(Bytes(at_least.0.max(1 << 20)))
    }
}

fn service() -> (Arc<Noted>, Node) {
    let staging = Arc::new(Noted::default());
    let node = Node::new("node-a".parse().unwrap(), staging.clone(), Calls::default());
    (staging, node)
}

fn volume() -> VolumeId {
    "vol-1".parse().unwrap()
}

fn capability(access: AccessType) -> Option<proto::VolumeCapability> {
    Some(proto::VolumeCapability {
        access_type: Some(access),
        access_mode: Some(AccessMode { mode: 1 }),
    })
}

#[tokio::test]
async fn calls_reach_the_staging_as_they_were_meant() {
    let (staging, node) = service();
    let xfs = MountVolume {
        fs_type: "xfs".into(),
        mount_flags: vec!["noatime".into()],
        ..Default::default()
    };
    let stage = proto::NodeStageVolumeRequest {
        volume_id: "vol-1".into(),
        staging_target_path: "/staging".into(),
        volume_capability: capability(AccessType::Mount(xfs)),
        publish_context: [("epoch".into(), "7".into())].into(),
        ..Default::default()
    };
    node.node_stage_volume(Request::new(stage)).await.unwrap();
    let publish = proto::NodePublishVolumeRequest {
        volume_id: "vol-1".into(),
        staging_target_path: "/staging".into(),
        target_path: "/pod/target".into(),
        volume_capability: capability(AccessType::Block(BlockVolume {})),
        readonly: true,
        ..Default::default()
    };
    node.node_publish_volume(Request::new(publish))
        .await
        .unwrap();
    let unpublish = proto::NodeUnpublishVolumeRequest {
        volume_id: "vol-1".into(),
        target_path: "/pod/target".into(),
    };
    node.node_unpublish_volume(Request::new(unpublish))
        .await
        .unwrap();
    let unstage = proto::NodeUnstageVolumeRequest {
        volume_id: "vol-1".into(),
        staging_target_path: "/staging".into(),
    };
    node.node_unstage_volume(Request::new(unstage))
        .await
        .unwrap();
    let access = Access::Mount {
        fs: FsType::Xfs,
        flags: vec!["noatime".into()],
    };
    assert_eq!(
        *staging.0.lock().unwrap(),
        [
            Asked::Stage(StageRequest {
                volume: volume(),
                staging: "/staging".into(),
                access
            }),
            Asked::Publish(PublishRequest {
                volume: volume(),
                staging: "/staging".into(),
                target: "/pod/target".into(),
                access: Access::Block,
                read_only: true,
            }),
            Asked::Unpublish(volume(), "/pod/target".into()),
            Asked::Unstage(volume(), "/staging".into()),
        ]
    );
}

#[tokio::test]
async fn a_refused_request_does_nothing() {
    let (staging, node) = service();
    let climbing = proto::NodeStageVolumeRequest {
        volume_id: "vol-1".into(),
        staging_target_path: "/var/../etc".into(),
        volume_capability: capability(AccessType::Block(BlockVolume {})),
        ..Default::default()
    };
    let refused = node
        .node_stage_volume(Request::new(climbing))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused.message().contains("staging_target_path"),
        "{refused}"
    );
    let impossible = proto::NodeUnpublishVolumeRequest {
        volume_id: "../vol".into(),
        target_path: "/pod".into(),
    };
    node.node_unpublish_volume(Request::new(impossible))
        .await
        .unwrap();
    assert!(staging.0.lock().unwrap().is_empty());
}

#[tokio::test]
async fn stats_tell_bytes_and_inodes() {
    let (_, node) = service();
    let ask = |path: &str| proto::NodeGetVolumeStatsRequest {
        volume_id: "vol-1".into(),
        volume_path: path.into(),
        ..Default::default()
    };
    let told = node
        .node_get_volume_stats(Request::new(ask("/x")))
        .await
        .unwrap()
        .into_inner();
    let entry = |available, total, used, unit: Unit| proto::VolumeUsage {
        available,
        total,
        used,
        unit: unit.into(),
    };
    assert_eq!(
        told.usage,
        [
            entry(70, 100, 30, Unit::Bytes),
            entry(7, 10, 3, Unit::Inodes)
        ]
    );
    // Nothing is at a relative path, and nothing where nothing is staged.
    for nowhere in ["some/path", "/refused"] {
        let refused = node
            .node_get_volume_stats(Request::new(ask(nowhere)))
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{nowhere}");
    }
}

#[tokio::test]
async fn a_volume_that_is_not_staged_cannot_be_published_or_grown() {
    let (_, node) = service();
    let publish = proto::NodePublishVolumeRequest {
        volume_id: "vol-1".into(),
        staging_target_path: "/refused".into(),
        target_path: "/pod".into(),
        volume_capability: capability(AccessType::Block(BlockVolume {})),
        ..Default::default()
    };
    let refused = node
        .node_publish_volume(Request::new(publish))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let expand = proto::NodeExpandVolumeRequest {
        volume_id: "vol-1".into(),
        volume_path: "/refused".into(),
        ..Default::default()
    };
    let refused = node
        .node_expand_volume(Request::new(expand))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
}

#[tokio::test]
async fn the_node_says_where_it_is() {
    let (_, node) = service();
    let info = node
        .node_get_info(Request::new(Default::default()))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.node_id, "node-a");
    assert_eq!(
        info.accessible_topology.unwrap().segments["drover.io/node"],
        "node-a"
    );
}

#[test]
fn counts_that_do_not_fit_are_the_largest_that_do() {
    assert_eq!(wire(u64::MAX), i64::MAX);
    assert_eq!(wire(7), 7);
}

//! CSI Node: translates kubelet's calls for [`Staging`].

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::calls::{Calls, Kind};
use super::proto::node_service_capability::{Rpc, Type, rpc};
use super::proto::volume_usage::Unit;
use super::proto::{self, node_server};
use super::request::controller::TOPOLOGY_KEY;
use super::request::node as request;
use crate::attach::ports::{NodeError, Staging, Usage};
use crate::ids::NodeId;

/// The Node service.
pub struct Node {
    node: NodeId,
    staging: Arc<dyn Staging>,
    calls: Calls,
}

impl Node {
    /// Serves `node` by what `staging` does.
    pub fn new(node: NodeId, staging: Arc<dyn Staging>, calls: Calls) -> Self {
        Self {
            node,
            staging,
            calls,
        }
    }
}

/// A volume that is nowhere on the node is not at the path either; CSI knows
/// one code for both, where a call looks for a volume at a path.
fn nowhere(error: NodeError) -> NodeError {
    match error {
        NodeError::NotStaged { volume, path } => NodeError::NotThere { volume, path },
        other => other,
    }
}

/// A count as the protocol carries it.
fn wire(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn usage(usage: &Usage) -> Vec<proto::VolumeUsage> {
    let entry = |unit: Unit, [total, used, available]: [u64; 3]| proto::VolumeUsage {
        available: wire(available),
        total: wire(total),
        used: wire(used),
        unit: unit.into(),
    };
    let mut entries = vec![entry(Unit::Bytes, usage.bytes)];
    entries.extend(usage.inodes.map(|inodes| entry(Unit::Inodes, inodes)));
    entries
}

#[tonic::async_trait]
impl node_server::Node for Node {
    async fn node_stage_volume(
        &self,
        sent: Request<proto::NodeStageVolumeRequest>,
    ) -> Result<Response<proto::NodeStageVolumeResponse>, Status> {
        let (sent, staging) = (sent.into_inner(), Arc::clone(&self.staging));
        let object = sent.volume_id.clone();
        let call = async move {
            staging.stage(&request::stage(&sent)?).await?;
            Ok(proto::NodeStageVolumeResponse {})
        };
        self.calls
            .run("NodeStageVolume", Kind::Acts, &object, call)
            .await
    }

    async fn node_unstage_volume(
        &self,
        sent: Request<proto::NodeUnstageVolumeRequest>,
    ) -> Result<Response<proto::NodeUnstageVolumeResponse>, Status> {
        let (sent, staging) = (sent.into_inner(), Arc::clone(&self.staging));
        let object = sent.volume_id.clone();
        let call = async move {
            if let Some((volume, path)) = request::unstage(&sent)? {
                staging.unstage(&volume, &path).await?;
            }
            Ok(proto::NodeUnstageVolumeResponse {})
        };
        self.calls
            .run("NodeUnstageVolume", Kind::Acts, &object, call)
            .await
    }

    async fn node_publish_volume(
        &self,
        sent: Request<proto::NodePublishVolumeRequest>,
    ) -> Result<Response<proto::NodePublishVolumeResponse>, Status> {
        let (sent, staging) = (sent.into_inner(), Arc::clone(&self.staging));
        let object = sent.volume_id.clone();
        let call = async move {
            staging.publish(&request::publish(&sent)?).await?;
            Ok(proto::NodePublishVolumeResponse {})
        };
        self.calls
            .run("NodePublishVolume", Kind::Acts, &object, call)
            .await
    }

    async fn node_unpublish_volume(
        &self,
        sent: Request<proto::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<proto::NodeUnpublishVolumeResponse>, Status> {
        let (sent, staging) = (sent.into_inner(), Arc::clone(&self.staging));
        let object = sent.volume_id.clone();
        let call = async move {
            if let Some((volume, target)) = request::unpublish(&sent)? {
                staging.unpublish(&volume, &target).await?;
            }
            Ok(proto::NodeUnpublishVolumeResponse {})
        };
        self.calls
            .run("NodeUnpublishVolume", Kind::Acts, &object, call)
            .await
    }

    async fn node_get_volume_stats(
        &self,
        sent: Request<proto::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<proto::NodeGetVolumeStatsResponse>, Status> {
        let (sent, staging) = (sent.into_inner(), Arc::clone(&self.staging));
        let object = sent.volume_id.clone();
        let call = async move {
            let (volume, path) = request::stats(&sent)?;
            let found = staging.stats(&volume, &path).await.map_err(nowhere)?;
            Ok(proto::NodeGetVolumeStatsResponse {
                usage: usage(&found),
                volume_condition: None,
            })
        };
        self.calls
            .run("NodeGetVolumeStats", Kind::Looks, &object, call)
            .await
    }

    async fn node_expand_volume(
        &self,
        sent: Request<proto::NodeExpandVolumeRequest>,
    ) -> Result<Response<proto::NodeExpandVolumeResponse>, Status> {
        let (sent, staging) = (sent.into_inner(), Arc::clone(&self.staging));
        let object = sent.volume_id.clone();
        let call = async move {
            let wanted = request::expand(&sent)?;
            let size = staging
                .expand(&wanted.volume, &wanted.path, wanted.at_least)
                .await
                .map_err(nowhere)?;
            Ok(proto::NodeExpandVolumeResponse {
                capacity_bytes: wire(size.0),
            })
        };
        self.calls
            .run("NodeExpandVolume", Kind::Acts, &object, call)
            .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<proto::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<proto::NodeGetCapabilitiesResponse>, Status> {
        let capabilities = [
            rpc::Type::StageUnstageVolume,
            rpc::Type::GetVolumeStats,
            rpc::Type::ExpandVolume,
        ]
        .map(|kind| proto::NodeServiceCapability {
            r#type: Some(Type::Rpc(Rpc {
                r#type: kind.into(),
            })),
        })
        .to_vec();
        let answer = proto::NodeGetCapabilitiesResponse { capabilities };
        self.calls
            .run(
                "NodeGetCapabilities",
                Kind::Looks,
                "",
                async move { Ok(answer) },
            )
            .await
    }

    async fn node_get_info(
        &self,
        _: Request<proto::NodeGetInfoRequest>,
    ) -> Result<Response<proto::NodeGetInfoResponse>, Status> {
        let name = self.node.to_string();
        let answer = proto::NodeGetInfoResponse {
            node_id: name.clone(),
            max_volumes_per_node: 0,
            accessible_topology: Some(proto::Topology {
                segments: [(TOPOLOGY_KEY.to_owned(), name)].into(),
            }),
        };
        self.calls
            .run("NodeGetInfo", Kind::Looks, "", async move { Ok(answer) })
            .await
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
pub(super) mod tests;

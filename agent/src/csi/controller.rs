//! CSI Controller: translates the sidecars' calls for the [`Arbiter`].
//!
//! It decides one thing itself, purely: near which node a new volume best lives
//! ([`choose_home`]). The arbiter serialises calls about one volume, so equal
//! calls at once are equal calls one after another.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};

use super::calls::{Calls, Kind, caller_deadline};
use super::proto::controller_service_capability::{Rpc, Type, rpc};
use super::proto::volume_content_source::{SnapshotSource, Type as Source, VolumeSource};
use super::proto::{self, controller_server};
use super::request::RequestError;
use super::request::controller::{self as request, Room};
use super::status::Refusal;
use crate::attach::ports::Content;
use crate::attach::record::{NewVolume, NodeRecord, SnapshotRecord, VolumeView};
use crate::attach::{Arbiter, ArbiterError};
use crate::ids::{Bytes, NodeId};

/// How long ControllerPublishVolume works on an answer at most.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(10);

/// The Controller service.
pub struct Controller {
    arbiter: Arc<Arbiter>,
    calls: Calls,
}

impl Controller {
    /// Serves what `arbiter` decides.
    pub fn new(arbiter: Arc<Arbiter>, calls: Calls) -> Self {
        Self { arbiter, calls }
    }
}

/// A count of bytes as the protocol carries it.
fn wire(bytes: Bytes) -> i64 {
    i64::try_from(bytes.0).unwrap_or(i64::MAX)
}

fn volume(view: &VolumeView) -> proto::Volume {
    let source = match &view.spec.content {
        Content::Empty => None,
        Content::Snapshot(id) => Some(Source::Snapshot(SnapshotSource {
            snapshot_id: id.to_string(),
        })),
        Content::Volume(id) => Some(Source::Volume(VolumeSource {
            volume_id: id.to_string(),
        })),
    };
    proto::Volume {
        capacity_bytes: wire(view.spec.size),
        volume_id: view.spec.id.to_string(),
        // Nothing: a node asks for what it may use at the time it uses it.
        volume_context: Default::default(),
        content_source: source.map(|source| proto::VolumeContentSource {
            r#type: Some(source),
        }),
        // Empty: every node can attach every volume.
        accessible_topology: Vec::new(),
    }
}

fn published(view: &VolumeView) -> Vec<String> {
    view.published.iter().map(NodeId::to_string).collect()
}

fn snapshot(record: &SnapshotRecord) -> proto::Snapshot {
    proto::Snapshot {
        size_bytes: wire(record.info.size),
        snapshot_id: record.info.id.to_string(),
        source_volume_id: record.info.volume.to_string(),
        creation_time: Some(record.info.taken.into()),
        ready_to_use: record.ready,
        group_snapshot_id: String::new(),
    }
}

/// The first of `near` that is not lost and has a pool. None: the arbiter chooses.
fn choose_home(near: &[NodeId], nodes: &[NodeRecord]) -> Option<NodeId> {
    let fit = |name: &&NodeId| {
        nodes
            .iter()
            .any(|n| n.node == **name && n.has_pool && n.lost.is_none())
    };
    near.iter().find(fit).cloned()
}

/// The time a publish may take: less than its caller waits, so that the answer
/// still reaches it.
fn publish_deadline(caller: Option<Duration>) -> Duration {
    caller.map_or(PUBLISH_DEADLINE, |waits| {
        (waits / 10 * 9).min(PUBLISH_DEADLINE)
    })
}

/// Settles what CreateVolume leaves open: the home where only a wish was said,
/// and the size of a copy where none was said. A volume of that name that is
/// there already settles both, so that a repeat cannot differ from the first.
async fn settle(arbiter: &Arbiter, create: request::Create) -> Result<NewVolume, Refusal> {
    let mut new = create.volume;
    let copy = new.content != Content::Empty;
    let size_open = copy && !create.sized;
    let home_open = !copy && new.home.is_none() && !create.near.is_empty();
    if !size_open && !home_open {
        return Ok(new);
    }
    let same_name = |view: &VolumeView| view.spec.name == new.name;
    if let Some(there) = arbiter.volumes().await?.into_iter().find(same_name) {
        if size_open {
            new.at_least = there.spec.size;
        }
        if home_open {
            new.home = Some(there.spec.home);
        }
        return Ok(new);
    }
    if home_open {
        new.home = choose_home(&create.near, &arbiter.nodes().await?);
    }
    if size_open {
        new.at_least = source_size(arbiter, &new.content).await?;
    }
    if let Some(most) = new.at_most.filter(|most| *most < new.at_least) {
        let least = new.at_least;
        let text = format!("limit_bytes ({most}) is less than the source's size ({least})");
        return Err(RequestError::Size(text).into());
    }
    Ok(new)
}

async fn source_size(arbiter: &Arbiter, content: &Content) -> Result<Bytes, ArbiterError> {
    match content {
        Content::Empty => Ok(Bytes(0)),
        Content::Volume(id) => Ok(arbiter.volume(id).await?.spec.size),
        Content::Snapshot(id) => {
            let all = arbiter.snapshots().await?;
            let found = all.into_iter().find(|record| record.info.id == *id);
            found
                .map(|record| record.info.size)
                .ok_or_else(|| ArbiterError::NoSnapshot(id.clone()))
        }
    }
}

async fn room(arbiter: &Arbiter, room: Room) -> Result<Bytes, ArbiterError> {
    let found = match room {
        Room::None => return Ok(Bytes(0)),
        Room::Anywhere => arbiter.capacity(None).await,
        Room::On(node) => arbiter.capacity(Some(&node)).await,
    };
    match found {
        Ok(capacity) => Ok(capacity.available),
        // A node that is unknown or has no pool has room for nothing.
        Err(ArbiterError::NoNode(_) | ArbiterError::Unsupported(_)) => Ok(Bytes(0)),
        Err(error) => Err(error),
    }
}

#[tonic::async_trait]
impl controller_server::Controller for Controller {
    async fn create_volume(
        &self,
        sent: Request<proto::CreateVolumeRequest>,
    ) -> Result<Response<proto::CreateVolumeResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let object = sent.name.clone();
        let call = async move {
            let new = settle(&arbiter, request::create(&sent)?).await?;
            let view = arbiter.create_volume(new).await?;
            Ok(proto::CreateVolumeResponse {
                volume: Some(volume(&view)),
            })
        };
        self.calls
            .run("CreateVolume", Kind::Acts, &object, call)
            .await
    }

    async fn delete_volume(
        &self,
        sent: Request<proto::DeleteVolumeRequest>,
    ) -> Result<Response<proto::DeleteVolumeResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let object = sent.volume_id.clone();
        let call = async move {
            if let Some(volume) = request::delete(&sent)? {
                arbiter.delete_volume(&volume).await?;
            }
            Ok(proto::DeleteVolumeResponse {})
        };
        self.calls
            .run("DeleteVolume", Kind::Acts, &object, call)
            .await
    }

    async fn controller_publish_volume(
        &self,
        sent: Request<proto::ControllerPublishVolumeRequest>,
    ) -> Result<Response<proto::ControllerPublishVolumeResponse>, Status> {
        let deadline = publish_deadline(caller_deadline(sent.metadata()));
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let object = format!("{} to {}", sent.volume_id, sent.node_id);
        let call = async move {
            let wanted = request::publish(&sent)?;
            arbiter
                .publish(&wanted.volume, &wanted.node, wanted.mode, deadline)
                .await?;
            // Neither epoch nor address: Kubernetes may replay an old context for ever.
            Ok(proto::ControllerPublishVolumeResponse {
                publish_context: Default::default(),
            })
        };
        self.calls
            .run("ControllerPublishVolume", Kind::Acts, &object, call)
            .await
    }

    async fn controller_unpublish_volume(
        &self,
        sent: Request<proto::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<proto::ControllerUnpublishVolumeResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let object = format!("{} from {}", sent.volume_id, sent.node_id);
        let call = async move {
            if let Some(wanted) = request::unpublish(&sent)? {
                arbiter
                    .unpublish(&wanted.volume, wanted.node.as_ref())
                    .await?;
            }
            Ok(proto::ControllerUnpublishVolumeResponse {})
        };
        self.calls
            .run("ControllerUnpublishVolume", Kind::Acts, &object, call)
            .await
    }

    async fn validate_volume_capabilities(
        &self,
        sent: Request<proto::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<proto::ValidateVolumeCapabilitiesResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let object = sent.volume_id.clone();
        let call = async move {
            let asked = request::validate(&sent)?;
            let view = arbiter.volume(&asked.volume).await?;
            Ok(confirm(sent, &asked, &view))
        };
        self.calls
            .run("ValidateVolumeCapabilities", Kind::Looks, &object, call)
            .await
    }

    async fn list_volumes(
        &self,
        sent: Request<proto::ListVolumesRequest>,
    ) -> Result<Response<proto::ListVolumesResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let call = async move {
            let page = request::list_volumes(&sent)?;
            let (views, next_token) = page.take(arbiter.volumes().await?, |view| &view.spec.id);
            let entry = |view: &VolumeView| proto::list_volumes_response::Entry {
                volume: Some(volume(view)),
                status: Some(proto::list_volumes_response::VolumeStatus {
                    published_node_ids: published(view),
                    volume_condition: None,
                }),
            };
            let entries = views.iter().map(entry).collect();
            Ok(proto::ListVolumesResponse {
                entries,
                next_token,
            })
        };
        self.calls.run("ListVolumes", Kind::Looks, "", call).await
    }

    async fn get_capacity(
        &self,
        sent: Request<proto::GetCapacityRequest>,
    ) -> Result<Response<proto::GetCapacityResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let call = async move {
            let room = wire(room(&arbiter, request::get_capacity(&sent)?).await?);
            Ok(proto::GetCapacityResponse {
                available_capacity: room,
                maximum_volume_size: Some(room),
                minimum_volume_size: None,
            })
        };
        self.calls.run("GetCapacity", Kind::Looks, "", call).await
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<proto::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<proto::ControllerGetCapabilitiesResponse>, Status> {
        let capabilities = [
            rpc::Type::CreateDeleteVolume,
            rpc::Type::PublishUnpublishVolume,
            rpc::Type::ListVolumes,
            rpc::Type::ListVolumesPublishedNodes,
            rpc::Type::GetCapacity,
            rpc::Type::CreateDeleteSnapshot,
            rpc::Type::ListSnapshots,
            rpc::Type::CloneVolume,
            rpc::Type::PublishReadonly,
            rpc::Type::ExpandVolume,
            rpc::Type::GetVolume,
        ]
        .map(|kind| proto::ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc {
                r#type: kind.into(),
            })),
        })
        .to_vec();
        let answer = proto::ControllerGetCapabilitiesResponse { capabilities };
        self.calls
            .run("ControllerGetCapabilities", Kind::Looks, "", async move {
                Ok(answer)
            })
            .await
    }

    async fn create_snapshot(
        &self,
        sent: Request<proto::CreateSnapshotRequest>,
    ) -> Result<Response<proto::CreateSnapshotResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let object = format!("{} of {}", sent.name, sent.source_volume_id);
        let call = async move {
            let wanted = request::create_snapshot(&sent)?;
            let record = arbiter
                .create_snapshot(&wanted.volume, &wanted.name)
                .await?;
            Ok(proto::CreateSnapshotResponse {
                snapshot: Some(snapshot(&record)),
            })
        };
        self.calls
            .run("CreateSnapshot", Kind::Acts, &object, call)
            .await
    }

    async fn delete_snapshot(
        &self,
        sent: Request<proto::DeleteSnapshotRequest>,
    ) -> Result<Response<proto::DeleteSnapshotResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let object = sent.snapshot_id.clone();
        let call = async move {
            if let Some(snapshot) = request::delete_snapshot(&sent)? {
                arbiter.delete_snapshot(&snapshot).await?;
            }
            Ok(proto::DeleteSnapshotResponse {})
        };
        self.calls
            .run("DeleteSnapshot", Kind::Acts, &object, call)
            .await
    }

    async fn list_snapshots(
        &self,
        sent: Request<proto::ListSnapshotsRequest>,
    ) -> Result<Response<proto::ListSnapshotsResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let call = async move {
            let Some(wanted) = request::list_snapshots(&sent)? else {
                return Ok(proto::ListSnapshotsResponse::default());
            };
            let mut all = arbiter.snapshots().await?;
            all.retain(|record| {
                wanted
                    .volume
                    .as_ref()
                    .is_none_or(|volume| record.info.volume == *volume)
                    && wanted
                        .snapshot
                        .as_ref()
                        .is_none_or(|id| record.info.id == *id)
            });
            let (records, next_token) = wanted.page.take(all, |record| &record.info.id);
            let entry = |record: &SnapshotRecord| proto::list_snapshots_response::Entry {
                snapshot: Some(snapshot(record)),
            };
            let entries = records.iter().map(entry).collect();
            Ok(proto::ListSnapshotsResponse {
                entries,
                next_token,
            })
        };
        self.calls.run("ListSnapshots", Kind::Looks, "", call).await
    }

    /// Not advertised: an alpha call that no sidecar of this version makes.
    async fn get_snapshot(
        &self,
        _: Request<proto::GetSnapshotRequest>,
    ) -> Result<Response<proto::GetSnapshotResponse>, Status> {
        let refusal = async { Err(Refusal::NotServed("GetSnapshot")) };
        self.calls
            .run("GetSnapshot", Kind::Looks, "", refusal)
            .await
    }

    async fn controller_expand_volume(
        &self,
        sent: Request<proto::ControllerExpandVolumeRequest>,
    ) -> Result<Response<proto::ControllerExpandVolumeResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let object = sent.volume_id.clone();
        let call = async move {
            let wanted = request::expand(&sent)?;
            let size = arbiter
                .expand(&wanted.volume, wanted.at_least, wanted.at_most)
                .await?;
            Ok(proto::ControllerExpandVolumeResponse {
                capacity_bytes: wire(size),
                // A bare device grows by itself; a file system wants telling.
                node_expansion_required: !wanted.block,
            })
        };
        self.calls
            .run("ControllerExpandVolume", Kind::Acts, &object, call)
            .await
    }

    async fn controller_get_volume(
        &self,
        sent: Request<proto::ControllerGetVolumeRequest>,
    ) -> Result<Response<proto::ControllerGetVolumeResponse>, Status> {
        let (sent, arbiter) = (sent.into_inner(), Arc::clone(&self.arbiter));
        let object = sent.volume_id.clone();
        let call = async move {
            let view = arbiter.volume(&request::get_volume(&sent)?).await?;
            Ok(proto::ControllerGetVolumeResponse {
                volume: Some(volume(&view)),
                status: Some(proto::controller_get_volume_response::VolumeStatus {
                    published_node_ids: published(&view),
                    volume_condition: None,
                }),
            })
        };
        self.calls
            .run("ControllerGetVolume", Kind::Looks, &object, call)
            .await
    }

    /// Not advertised: nothing about a volume can be changed so.
    async fn controller_modify_volume(
        &self,
        _: Request<proto::ControllerModifyVolumeRequest>,
    ) -> Result<Response<proto::ControllerModifyVolumeResponse>, Status> {
        let refusal = async { Err(Refusal::NotServed("ControllerModifyVolume")) };
        self.calls
            .run("ControllerModifyVolume", Kind::Acts, "", refusal)
            .await
    }
}

/// Confirms what the volume can do of what was asked. The context is not
/// confirmed: drover gives none, and the cluster adds keys of its own.
fn confirm(
    sent: proto::ValidateVolumeCapabilitiesRequest,
    asked: &request::Validate,
    view: &VolumeView,
) -> proto::ValidateVolumeCapabilitiesResponse {
    let differing = asked
        .parameters
        .iter()
        .find(|(key, value)| view.spec.parameters.get(*key) != Some(*value))
        .map(|(key, _)| format!("the volume was not made with this parameter {key:?}"));
    let message = asked
        .refusal
        .as_ref()
        .map(RequestError::to_string)
        .or(differing);
    let confirmed = match message {
        Some(_) => None,
        None => Some(proto::validate_volume_capabilities_response::Confirmed {
            volume_context: Default::default(),
            volume_capabilities: sent.volume_capabilities,
            parameters: sent.parameters,
            mutable_parameters: Default::default(),
        }),
    };
    proto::ValidateVolumeCapabilitiesResponse {
        confirmed,
        message: message.unwrap_or_default(),
    }
}

#[cfg(test)]
#[path = "controller_tests.rs"]
mod tests;

//! CSI as kubelet and the sidecars call it, each call timed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status};

/// `proto/csi.proto`, generated.
#[expect(clippy::allow_attributes, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

use v1::controller_client::ControllerClient;
use v1::node_client::NodeClient;
use v1::volume_capability::access_mode::Mode;
use v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};

/// kubelet's and the sidecars' own deadline is longer; a rig that waits so long has found a fault.
const CALL: Duration = Duration::from_secs(90);

/// How a volume is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// With this file system.
    Fs(&'static str),
    /// As a bare device.
    Block,
}

impl Use {
    /// CSI's word for it, one writer.
    pub fn capability(self) -> v1::VolumeCapability {
        let access_type = match self {
            Self::Fs(fs) => AccessType::Mount(MountVolume {
                fs_type: fs.into(),
                ..Default::default()
            }),
            Self::Block => AccessType::Block(BlockVolume {}),
        };
        v1::VolumeCapability {
            access_mode: Some(AccessMode {
                mode: Mode::SingleNodeWriter.into(),
            }),
            access_type: Some(access_type),
        }
    }
}

/// A call's answer and how long it took.
pub struct Timed<T> {
    /// The answer.
    pub answer: Result<T, Status>,
    /// From the call to the answer.
    pub took: Duration,
}

impl<T> Timed<T> {
    /// The answer and how long it took; a refusal is an error.
    ///
    /// # Errors
    /// When the call was refused.
    pub fn ok(self, what: &str) -> anyhow::Result<(T, Duration)> {
        let took = self.took;
        self.answer
            .map(|answer| (answer, took))
            .map_err(|status| anyhow!("{what}: {:?}: {}", status.code(), status.message()))
    }

    /// Nothing; a refusal is an error.
    ///
    /// # Errors
    /// When the call was refused.
    pub fn done(self, what: &str) -> anyhow::Result<()> {
        self.ok(what).map(drop)
    }

    /// The refusal, which must have `code`.
    ///
    /// # Errors
    /// When it was not refused, or with another code.
    pub fn refused(self, what: &str, code: Code) -> anyhow::Result<String> {
        match self.answer {
            Err(status) if status.code() == code => Ok(status.message().to_owned()),
            Err(status) => Err(anyhow!(
                "{what}: {:?} instead of {code:?}: {}",
                status.code(),
                status.message()
            )),
            Ok(_) => Err(anyhow!("{what}: OK instead of {code:?}")),
        }
    }
}

async fn timed<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Timed<T> {
    let start = Instant::now();
    let answer = match tokio::time::timeout(CALL, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!(
            "no answer within {CALL:?}"
        ))),
    };
    Timed {
        answer,
        took: start.elapsed(),
    }
}

fn connect(socket: &Path) -> anyhow::Result<Channel> {
    let socket: PathBuf = socket.to_owned();
    // The URI is never resolved: the connector knows the socket.
    let endpoint = Endpoint::try_from("http://csi.invalid").context("make an endpoint")?;
    Ok(
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move {
                tokio::net::UnixStream::connect(socket)
                    .await
                    .map(TokioIo::new)
            }
        })),
    )
}

/// The CSI Controller.
#[derive(Clone)]
pub struct Controller(ControllerClient<Channel>);

impl Controller {
    /// The one behind a socket.
    ///
    /// # Errors
    /// When no endpoint can be made of it.
    pub fn at(socket: &Path) -> anyhow::Result<Self> {
        Ok(Self(ControllerClient::new(connect(socket)?)))
    }

    /// Connects, as the sidecars are connected all the time: the next call's
    /// time is the call's alone.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn connected(self) -> anyhow::Result<Self> {
        let request = v1::ControllerGetCapabilitiesRequest::default();
        let mut client = self.0.clone();
        timed(client.controller_get_capabilities(request))
            .await
            .done("ControllerGetCapabilities")?;
        Ok(self)
    }

    /// CreateVolume; `home` and `protocol` by StorageClass parameters.
    pub async fn create(
        &self,
        name: &str,
        bytes: i64,
        use_as: Use,
        (home, protocol): (&str, &str),
        source: Option<v1::volume_content_source::Type>,
    ) -> Timed<v1::CreateVolumeResponse> {
        let request = v1::CreateVolumeRequest {
            name: name.into(),
            capacity_range: Some(v1::CapacityRange {
                required_bytes: bytes,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![use_as.capability()],
            parameters: HashMap::from([
                ("home".into(), home.into()),
                ("protocol".into(), protocol.into()),
            ]),
            volume_content_source: source.map(|s| v1::VolumeContentSource { r#type: Some(s) }),
            ..Default::default()
        };
        timed(self.0.clone().create_volume(Request::new(request))).await
    }

    /// DeleteVolume.
    pub async fn delete(&self, volume: &str) -> Timed<v1::DeleteVolumeResponse> {
        let request = v1::DeleteVolumeRequest {
            volume_id: volume.into(),
            ..Default::default()
        };
        timed(self.0.clone().delete_volume(Request::new(request))).await
    }

    /// ControllerPublishVolume.
    pub async fn publish(
        &self,
        volume: &str,
        node: &str,
        use_as: Use,
    ) -> Timed<v1::ControllerPublishVolumeResponse> {
        let request = v1::ControllerPublishVolumeRequest {
            volume_id: volume.into(),
            node_id: node.into(),
            volume_capability: Some(use_as.capability()),
            ..Default::default()
        };
        timed(
            self.0
                .clone()
                .controller_publish_volume(Request::new(request)),
        )
        .await
    }

    /// ControllerUnpublishVolume.
    pub async fn unpublish(
        &self,
        volume: &str,
        node: &str,
    ) -> Timed<v1::ControllerUnpublishVolumeResponse> {
        let request = v1::ControllerUnpublishVolumeRequest {
            volume_id: volume.into(),
            node_id: node.into(),
            ..Default::default()
        };
        timed(
            self.0
                .clone()
                .controller_unpublish_volume(Request::new(request)),
        )
        .await
    }

    /// ControllerExpandVolume.
    pub async fn expand(
        &self,
        volume: &str,
        bytes: i64,
        use_as: Use,
    ) -> Timed<v1::ControllerExpandVolumeResponse> {
        let request = v1::ControllerExpandVolumeRequest {
            volume_id: volume.into(),
            capacity_range: Some(v1::CapacityRange {
                required_bytes: bytes,
                limit_bytes: 0,
            }),
            volume_capability: Some(use_as.capability()),
            ..Default::default()
        };
        timed(
            self.0
                .clone()
                .controller_expand_volume(Request::new(request)),
        )
        .await
    }

    /// CreateSnapshot.
    pub async fn snapshot(&self, volume: &str, name: &str) -> Timed<v1::CreateSnapshotResponse> {
        let request = v1::CreateSnapshotRequest {
            source_volume_id: volume.into(),
            name: name.into(),
            ..Default::default()
        };
        timed(self.0.clone().create_snapshot(Request::new(request))).await
    }

    /// DeleteSnapshot.
    pub async fn delete_snapshot(&self, snapshot: &str) -> Timed<v1::DeleteSnapshotResponse> {
        let request = v1::DeleteSnapshotRequest {
            snapshot_id: snapshot.into(),
            ..Default::default()
        };
        timed(self.0.clone().delete_snapshot(Request::new(request))).await
    }
}

/// A CSI Node.
#[derive(Clone)]
pub struct Node(NodeClient<Channel>);

impl Node {
    /// The one behind a socket.
    ///
    /// # Errors
    /// When no endpoint can be made of it.
    pub fn at(socket: &Path) -> anyhow::Result<Self> {
        Ok(Self(NodeClient::new(connect(socket)?)))
    }

    /// Connects, so that the next call's time is the call's alone.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn connected(self) -> anyhow::Result<Self> {
        let request = v1::NodeGetInfoRequest::default();
        let mut client = self.0.clone();
        timed(client.node_get_info(request))
            .await
            .done("NodeGetInfo")?;
        Ok(self)
    }

    /// NodeStageVolume.
    pub async fn stage(
        &self,
        volume: &str,
        staging: &Path,
        use_as: Use,
    ) -> Timed<v1::NodeStageVolumeResponse> {
        let request = v1::NodeStageVolumeRequest {
            volume_id: volume.into(),
            staging_target_path: text(staging),
            volume_capability: Some(use_as.capability()),
            ..Default::default()
        };
        timed(self.0.clone().node_stage_volume(Request::new(request))).await
    }

    /// NodeUnstageVolume.
    pub async fn unstage(
        &self,
        volume: &str,
        staging: &Path,
    ) -> Timed<v1::NodeUnstageVolumeResponse> {
        let request = v1::NodeUnstageVolumeRequest {
            volume_id: volume.into(),
            staging_target_path: text(staging),
        };
        timed(self.0.clone().node_unstage_volume(Request::new(request))).await
    }

    /// NodePublishVolume.
    pub async fn publish(
        &self,
        volume: &str,
        staging: &Path,
        target: &Path,
        use_as: Use,
    ) -> Timed<v1::NodePublishVolumeResponse> {
        let request = v1::NodePublishVolumeRequest {
            volume_id: volume.into(),
            staging_target_path: text(staging),
            target_path: text(target),
            volume_capability: Some(use_as.capability()),
            ..Default::default()
        };
        timed(self.0.clone().node_publish_volume(Request::new(request))).await
    }

    /// NodeUnpublishVolume.
    pub async fn unpublish(
        &self,
        volume: &str,
        target: &Path,
    ) -> Timed<v1::NodeUnpublishVolumeResponse> {
        let request = v1::NodeUnpublishVolumeRequest {
            volume_id: volume.into(),
            target_path: text(target),
        };
        timed(self.0.clone().node_unpublish_volume(Request::new(request))).await
    }

    /// NodeExpandVolume.
    pub async fn expand(
        &self,
        volume: &str,
        path: &Path,
        staging: &Path,
        bytes: i64,
        use_as: Use,
    ) -> Timed<v1::NodeExpandVolumeResponse> {
        let request = v1::NodeExpandVolumeRequest {
            volume_id: volume.into(),
            volume_path: text(path),
            staging_target_path: text(staging),
            capacity_range: Some(v1::CapacityRange {
                required_bytes: bytes,
                limit_bytes: 0,
            }),
            volume_capability: Some(use_as.capability()),
            ..Default::default()
        };
        timed(self.0.clone().node_expand_volume(Request::new(request))).await
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

//! Attaches a volume of a running drover, and detaches it, by the CSI calls that
//! the sidecars and kubelet make: for tests that are shell scripts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Parser, Subcommand};
use drover::csi::proto::controller_client::ControllerClient;
use drover::csi::proto::node_client::NodeClient;
use drover::csi::proto::volume_capability::access_mode::Mode;
use drover::csi::proto::volume_capability::{AccessMode, AccessType, MountVolume};
use drover::csi::proto::{
    CapacityRange, ControllerPublishVolumeRequest, ControllerUnpublishVolumeRequest,
    CreateVolumeRequest, NodePublishVolumeRequest, NodeStageVolumeRequest,
    NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, VolumeCapability,
};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

#[derive(Parser)]
struct Arguments {
    /// drover's CSI socket.
    #[arg(long)]
    socket: PathBuf,
    /// The node.
    #[arg(long)]
    node: String,
    /// A folder for what kubelet would have: `staging` and `target` in it.
    #[arg(long)]
    folder: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Makes a volume, and mounts it at FOLDER/target; prints its id.
    Attach {
        /// Its size in bytes.
        #[arg(long)]
        size: i64,
        /// Its file system.
        #[arg(long, default_value = "ext4")]
        fs: String,
        /// Its protocol, as the StorageClass says it.
        #[arg(long, default_value = "nvme-tcp")]
        protocol: String,
    },
    /// Lets a volume go.
    Detach {
        /// Its id.
        volume: String,
    },
}

async fn connect(socket: &Path) -> anyhow::Result<Channel> {
    let socket = socket.to_owned();
    // The URI is never resolved: the connector knows the socket.
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(socket).await;
            stream.map(TokioIo::new)
        }
    });
    let endpoint = Endpoint::try_from("http://csi.invalid")?;
    Ok(endpoint.connect_with_connector(connector).await?)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let channel = connect(&arguments.socket).await;
    let channel = channel.with_context(|| format!("connect {}", arguments.socket.display()))?;
    let mut controller = ControllerClient::new(channel.clone());
    let mut kubelet = NodeClient::new(channel);
    let text = |name: &str| arguments.folder.join(name).to_string_lossy().into_owned();
    let (staging_target_path, target_path) = (text("staging"), text("target"));
    let node_id = arguments.node;
    match arguments.what {
        What::Attach { size, fs, protocol } => {
            let capability = VolumeCapability {
                access_mode: Some(AccessMode {
                    mode: Mode::SingleNodeWriter.into(),
                }),
                access_type: Some(AccessType::Mount(MountVolume {
                    fs_type: fs,
                    ..Default::default()
                })),
            };
            let made = controller.create_volume(CreateVolumeRequest {
                name: format!("test-{protocol}"),
                capacity_range: Some(CapacityRange {
                    required_bytes: size,
                    limit_bytes: 0,
                }),
                volume_capabilities: vec![capability.clone()],
                parameters: HashMap::from([("protocol".into(), protocol)]),
                ..Default::default()
            });
            let made = made.await.context("CreateVolume")?.into_inner();
            let volume_id = made.volume.context("a volume")?.volume_id;
            let publish = ControllerPublishVolumeRequest {
                volume_id: volume_id.clone(),
                node_id,
                volume_capability: Some(capability.clone()),
                ..Default::default()
            };
            let published = controller.controller_publish_volume(publish);
            let published = published.await.context("ControllerPublishVolume")?;
            let publish_context = published.into_inner().publish_context;
            std::fs::create_dir_all(&staging_target_path)?;
            let stage = NodeStageVolumeRequest {
                volume_id: volume_id.clone(),
                publish_context: publish_context.clone(),
                staging_target_path: staging_target_path.clone(),
                volume_capability: Some(capability.clone()),
                ..Default::default()
            };
            let staged = kubelet.node_stage_volume(stage);
            staged.await.context("NodeStageVolume")?;
            let publish = NodePublishVolumeRequest {
                volume_id: volume_id.clone(),
                publish_context,
                staging_target_path,
                target_path,
                volume_capability: Some(capability),
                ..Default::default()
            };
            let published = kubelet.node_publish_volume(publish);
            published.await.context("NodePublishVolume")?;
            println!("{volume_id}");
        }
        What::Detach { volume } => {
            let unpublish = NodeUnpublishVolumeRequest {
                volume_id: volume.clone(),
                target_path,
            };
            let unpublished = kubelet.node_unpublish_volume(unpublish);
            unpublished.await.context("NodeUnpublishVolume")?;
            let unstage = NodeUnstageVolumeRequest {
                volume_id: volume.clone(),
                staging_target_path,
            };
            let unstaged = kubelet.node_unstage_volume(unstage);
            unstaged.await.context("NodeUnstageVolume")?;
            let unpublish = ControllerUnpublishVolumeRequest {
                volume_id: volume,
                node_id,
                ..Default::default()
            };
            let unpublished = controller.controller_unpublish_volume(unpublish);
            unpublished.await.context("ControllerUnpublishVolume")?;
        }
    }
    Ok(())
}

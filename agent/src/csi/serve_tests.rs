//! The whole service on a real unix socket, with a real client.

use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::node::tests::{Asked, Noted};
use super::proto::controller_client::ControllerClient;
use super::proto::identity_client::IdentityClient;
use super::proto::node_client::NodeClient;
use super::*;

struct Running {
    folder: tempfile::TempDir,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<Result<(), CsiError>>,
    staging: Arc<Noted>,
    registry: Registry,
}

impl Running {
    fn socket(&self) -> PathBuf {
        self.folder.path().join("csi.sock")
    }

    async fn channel(&self) -> Channel {
        dial(&self.socket()).await
    }
}

async fn dial(socket: &Path) -> Channel {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    for _ in 0..500 {
        match endpoint.connect().await {
            Ok(channel) => return channel,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    panic!("nobody answers at {}", socket.display());
}

fn driver() -> DriverName {
    DEFAULT_DRIVER.parse().unwrap()
}

/// A node's service, without a controller.
fn node_services(staging: &Arc<Noted>) -> Services {
    Services::new(driver()).with_node("node-a".parse().unwrap(), staging.clone())
}

fn run() -> Running {
    let folder = tempfile::tempdir().unwrap();
    let staging = Arc::new(Noted::default());
    let services = node_services(&staging);
    let mut registry = Registry::default();
    services.register_metrics(&mut registry);
    let (stop, stopped) = watch::channel(false);
    let socket = format!("unix://{}/csi.sock", folder.path().display());
    let task = tokio::spawn(async move { serve(Path::new(&socket), services, stopped).await });
    Running {
        folder,
        stop,
        task,
        staging,
        registry,
    }
}

#[tokio::test]
async fn a_node_answers_for_the_plugin_and_the_node() {
    let running = run();
    let channel = running.channel().await;
    let mut identity = IdentityClient::new(channel.clone());
    let info = identity
        .get_plugin_info(proto::GetPluginInfoRequest {})
        .await
        .unwrap();
    assert_eq!(info.into_inner().name, "drover.io");
    let probe = identity.probe(proto::ProbeRequest {}).await.unwrap();
    assert_eq!(probe.into_inner().ready, Some(true));
    let able = identity
        .get_plugin_capabilities(proto::GetPluginCapabilitiesRequest {})
        .await;
    assert_eq!(able.unwrap().into_inner().capabilities.len(), 3);

    let mut node = NodeClient::new(channel.clone());
    let unstage = proto::NodeUnstageVolumeRequest {
        volume_id: "vol-1".into(),
        staging_target_path: "/staging".into(),
    };
    node.node_unstage_volume(unstage).await.unwrap();
    let asked = Asked::Unstage("vol-1".parse().unwrap(), "/staging".into());
    assert_eq!(*running.staging.0.lock().unwrap(), [asked]);
    let missing = node
        .node_unstage_volume(proto::NodeUnstageVolumeRequest::default())
        .await;
    assert_eq!(missing.unwrap_err().code(), Code::InvalidArgument);

    // What this process does not have, it does not serve.
    let mut controller = ControllerClient::new(channel);
    let refused = controller
        .list_volumes(proto::ListVolumesRequest::default())
        .await;
    assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);

    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &running.registry).unwrap();
    for code in ["OK", "INVALID_ARGUMENT"] {
        let line =
            format!("drover_csi_requests_total{{method=\"NodeUnstageVolume\",code=\"{code}\"}} 1");
        assert!(text.contains(&line), "{line} is not in:\n{text}");
    }
}

#[tokio::test]
async fn equal_calls_at_once_are_all_answered() {
    let running = run();
    let client = NodeClient::new(running.channel().await);
    let calls = (0..32).map(|_| {
        let mut client = client.clone();
        async move {
            let unpublish = proto::NodeUnpublishVolumeRequest {
                volume_id: "vol-1".into(),
                target_path: "/pod".into(),
            };
            client.node_unpublish_volume(unpublish).await
        }
    });
    for answer in futures::future::join_all(calls).await {
        answer.unwrap();
    }
    assert_eq!(running.staging.0.lock().unwrap().len(), 32);
}

#[tokio::test]
async fn a_second_server_is_refused_and_the_first_goes_on() {
    let running = run();
    let channel = running.channel().await;
    let (_stop, stopped) = watch::channel(false);
    let second = serve(&running.socket(), node_services(&running.staging), stopped).await;
    let refused = second.unwrap_err();
    assert!(matches!(refused, CsiError::InUse(_)), "{refused}");
    IdentityClient::new(channel)
        .probe(proto::ProbeRequest {})
        .await
        .unwrap();
}

#[tokio::test]
async fn a_stop_ends_the_service_and_removes_its_socket() {
    let running = run();
    let channel = running.channel().await;
    IdentityClient::new(channel)
        .probe(proto::ProbeRequest {})
        .await
        .unwrap();
    let socket = running.socket();
    running.stop.send(true).unwrap();
    running.task.await.unwrap().unwrap();
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_stop_whose_sender_is_gone_is_a_stop() {
    let running = run();
    running.channel().await;
    drop(running.stop);
    running.task.await.unwrap().unwrap();
}

#[test]
fn driver_names_are_csis() {
    for good in ["drover.io", "a", "Drover-2.example.com", &"a".repeat(63)] {
        assert_eq!(good.parse::<DriverName>().unwrap().as_str(), good);
    }
    for wrong in [
        "",
        ".",
        "a.",
        "-a",
        "a/b",
        "../a",
        "a b",
        "é",
        &"a".repeat(64),
    ] {
        assert!(wrong.parse::<DriverName>().is_err(), "{wrong:?}");
    }
}

//! Registration with a kubelet that the test plays.

use tonic::transport::{Channel, Endpoint};

use super::proto::registration_client::RegistrationClient;
use super::*;

/// How often the socket is looked after here.
const QUICK: Duration = Duration::from_millis(20);

/// Waits for what must come, ten seconds at most.
async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..1000 {
        if let Some(found) = look().await {
            return found;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}: it did not come");
}

async fn client(socket: &Path) -> RegistrationClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    let channel = until("a registration", async || endpoint.connect().await.ok()).await;
    RegistrationClient::new(channel)
}

fn driver() -> DriverName {
    "drover.io".parse().unwrap()
}

struct Kubelet {
    folder: tempfile::TempDir,
    _stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<Result<(), CsiError>>,
}

impl Kubelet {
    /// A registration at work, with the CSI socket and, if said, the folder there.
    fn start(with_folder: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let registry = folder.path().join("plugins_registry");
        let endpoint = folder.path().join("csi.sock");
        std::fs::write(&endpoint, "").unwrap();
        if with_folder {
            std::fs::create_dir(&registry).unwrap();
        }
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            register_every(QUICK, &registry, &driver(), &endpoint, stopped).await
        });
        Self {
            folder,
            _stop: stop,
            task,
        }
    }

    fn registry(&self) -> PathBuf {
        self.folder.path().join("plugins_registry")
    }

    fn socket(&self) -> PathBuf {
        self.registry().join("drover.io-reg.sock")
    }
}

#[tokio::test]
async fn kubelet_learns_who_is_there_and_where() {
    let kubelet = Kubelet::start(true);
    let mut client = client(&kubelet.socket()).await;
    let info = client
        .get_info(proto::InfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.r#type, "CSIPlugin");
    assert_eq!(info.name, "drover.io");
    assert_eq!(
        Path::new(&info.endpoint),
        kubelet.folder.path().join("csi.sock")
    );
    assert_eq!(info.supported_versions, ["1.0.0"]);
    let told = proto::RegistrationStatus {
        plugin_registered: true,
        error: String::new(),
    };
    client.notify_registration_status(told).await.unwrap();
    // Kubelet reads every file of the folder that does not begin with a dot.
    let shown: Vec<_> = std::fs::read_dir(kubelet.registry())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect();
    assert_eq!(shown, ["drover.io-reg.sock"]);
}

#[tokio::test]
async fn the_socket_comes_back_when_kubelet_wiped_its_folder() {
    let kubelet = Kubelet::start(true);
    client(&kubelet.socket()).await;
    std::fs::remove_dir_all(kubelet.registry()).unwrap();
    std::fs::create_dir(kubelet.registry()).unwrap();
    let mut again = client(&kubelet.socket()).await;
    again.get_info(proto::InfoRequest {}).await.unwrap();
}

#[tokio::test]
async fn a_kubelet_that_comes_later_is_waited_for() {
    let kubelet = Kubelet::start(false);
    sleep(QUICK * 3).await;
    assert!(!kubelet.registry().exists() && !kubelet.task.is_finished());
    std::fs::create_dir(kubelet.registry()).unwrap();
    client(&kubelet.socket()).await;
}

#[tokio::test]
async fn a_failed_registration_is_offered_again() {
    let kubelet = Kubelet::start(true);
    let mut first = client(&kubelet.socket()).await;
    let inode = |path: &Path| socket::identity(path);
    let before = inode(&kubelet.socket());
    // Holds the inode, so that the next socket cannot be given it.
    std::fs::hard_link(kubelet.socket(), kubelet.registry().join(".kept")).unwrap();
    let told = proto::RegistrationStatus {
        plugin_registered: false,
        error: "no".to_owned(),
    };
    first.notify_registration_status(told).await.unwrap();
    until("another socket", async || {
        inode(&kubelet.socket()).filter(|now| Some(*now) != before)
    })
    .await;
    client(&kubelet.socket())
        .await
        .get_info(proto::InfoRequest {})
        .await
        .unwrap();
}

#[tokio::test]
async fn two_of_one_name_cannot_register() {
    let kubelet = Kubelet::start(true);
    client(&kubelet.socket()).await;
    let (_stop, stopped) = watch::channel(false);
    let endpoint = kubelet.folder.path().join("csi.sock");
    let second = register(&kubelet.registry(), &driver(), &endpoint, stopped).await;
    assert!(matches!(second, Err(CsiError::InUse(_))));
    let (_stop, stopped) = watch::channel(false);
    let relative = register(
        &kubelet.registry(),
        &driver(),
        Path::new("csi.sock"),
        stopped,
    )
    .await;
    assert!(matches!(relative, Err(CsiError::Path { .. })));
}

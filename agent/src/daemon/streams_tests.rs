//! Restores from the controller's call to the home's file and back: real
//! services over TCP, real records, a scripted worker.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Instant;

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;
use tonic::transport::Server;
use uuid::Uuid;

use super::*;
use crate::attach::Arbiter;
use crate::attach::ports::{Content, HostIdentity, Protocol};
use crate::attach::record::{AccessMode, NewVolume, Registration};
use crate::backup::{BackupInfo, RepositorySpec, RestoreSpec, Secret, Streams, Which};
use crate::export::Exports;
use crate::home::{Home, HomeConfig};
use crate::ids::{Bytes, VolumeId};
use crate::pool::testing::{MIB, open, plain};
use crate::reactor::{self, Reactors};
use crate::rpc::agent_client::Directory;
use crate::rpc::agent_service::HomeService;
use crate::rpc::controller_service::ControllerService;
use crate::rpc::pb;
use crate::rpc::pb::controller_server::ControllerServer;
use crate::rpc::pb::home_server::HomeServer;
use crate::store::embedded::EmbeddedStore;

const LONG: Duration = Duration::from_secs(20);
const BACKUP: &str = "0123456789abcdef";

/// A worker that lists one backup, and restores when `go` stands beside it: it
/// writes nothing, and is done, or dies where `bad` stands there too.
const WORKER: &str = r#"#!/bin/sh
read -r job
here=$(dirname "$0")
case "$job" in '{"list"'*) cat "$here/backups"; exit;; esac
while [ ! -e "$here/go" ]; do sleep 0.01; done
[ ! -e "$here/bad" ] || exit 1
echo '{"done":"0123456789abcdef"}'
"#;

/// A controller, and node a with a pool.
struct Bench {
    folder: TempDir,
    arbiter: Arc<Arbiter>,
    control: ControllerClient,
    home: Home,
    keeper: Arc<Keeper>,
    servers: Vec<JoinHandle<()>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.servers.iter().for_each(JoinHandle::abort);
    }
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let worker = at("worker");
        fs::write(&worker, WORKER).unwrap();
        fs::set_permissions(&worker, fs::Permissions::from_mode(0o755)).unwrap();
        let backup = BackupInfo {
            restic_id: BACKUP.into(),
            backup: "backup-1".parse().unwrap(),
            volume: "data".parse().unwrap(),
            snapshot: "snap-1".parse().unwrap(),
            time: SystemTime::UNIX_EPOCH,
            size: Bytes(MIB),
            complete: true,
        };
        let backups = json!({ "backups": [backup] });
        fs::write(at("backups"), format!("{backups}\n")).unwrap();

        let store = Arc::new(EmbeddedStore::open(at("state")).unwrap());
        let agents = Arc::new(Directory::default());
        let arbiter = Arbiter::start(store, agents.clone()).await.unwrap();
        let service = ControllerService::new(Arc::clone(&arbiter), agents);
        let (listening, address) = listener().await;
        let server = Server::builder().add_service(ControllerServer::new(service));
        let mut servers = vec![tokio::spawn(async move {
            let served = server.serve_with_incoming(TcpListenerStream::new(listening));
            served.await.unwrap();
        })];
        let control = ControllerClient::new(&address.into());

        let reactors = reactor::Settings {
            threads: 1,
            engine: None,
            poll: Duration::ZERO,
            held: Vec::new(),
        };
        let config = HomeConfig::at(address, address);
        let exports = Exports::new(Reactors::start(reactors).unwrap());
        let home = Home::new(open(&at("pool")).unwrap(), exports, plain(), config);
        let streams = Streams::new(worker);
        let keeper = Keeper::open(at("streams"), Arc::clone(&streams)).await;
        let keeper = keeper.unwrap();
        let node: NodeId = "a".parse().unwrap();
        let service = HomeService::new(
            node.clone(),
            Some(home.clone()),
            streams,
            Arc::clone(&keeper),
        );
        let (listening, agent) = listener().await;
        let server = Server::builder().add_service(HomeServer::new(service));
        servers.push(tokio::spawn(async move {
            let served = server.serve_with_incoming(TcpListenerStream::new(listening));
            served.await.unwrap();
        }));
        let registration = Registration {
            node,
            incarnation: "boot-1".into(),
            host: HostIdentity::of("nqn.a", Uuid::nil()),
            agent,
            has_pool: true,
            attached: Vec::new(),
            late: Vec::new(),
        };
        control.register(&registration).await.unwrap();
        Self {
            folder,
            arbiter,
            control,
            home,
            keeper,
            servers,
        }
    }

    /// Lets an agent tell of its streams from now on.
    fn report(&mut self, keeper: Arc<Keeper>) {
        let reporter = Reporter::new("a".parse().unwrap(), keeper, self.control.clone());
        self.servers.push(tokio::spawn(async move {
            reporter.run(Duration::from_millis(20)).await;
        }));
    }

    async fn restore(
        &self,
        name: &str,
    ) -> Result<tonic::Streaming<pb::BackupProgress>, tonic::Status> {
        let request = pb::RestoreRequest {
            name: name.into(),
            repository: Some(pb::Repository {
                path: "/repository".into(),
                password: "secret".into(),
                limit_upload: 0,
            }),
            repository_snapshot: "latest".into(),
            home: String::new(),
        };
        let answer = self.control.service().restore(request).await?;
        Ok(answer.into_inner())
    }

    fn touch(&self, name: &str) {
        fs::write(self.folder.path().join(name), "").unwrap();
    }

    async fn named(&self, name: &str) -> Option<VolumeId> {
        let volumes = self.arbiter.volumes().await.unwrap();
        let mut volumes = volumes.into_iter().filter(|view| view.spec.name == name);
        volumes.next().map(|view| view.spec.id)
    }

    fn at_home(&self, volume: &VolumeId) -> bool {
        self.home.pool().volume(volume).is_ok()
    }

    /// A pod comes, writes and goes.
    async fn used_by_a_pod(&self, volume: &VolumeId) {
        let mode = AccessMode::SingleWriter;
        let node = "a".parse().unwrap();
        let published = self.arbiter.publish(volume, &node, mode, LONG).await;
        published.unwrap();
        let file = fs::File::options().write(true).open(self.file(volume));
        file.unwrap().write_all_at(b"a pod's", 0).unwrap();
        self.arbiter.unpublish(volume, None).await.unwrap();
    }

    fn file(&self, volume: &VolumeId) -> std::path::PathBuf {
        let volume = self.home.pool().volume(volume).unwrap();
        volume.path().to_owned()
    }
}

/// The phase that it ends in.
async fn end(mut following: tonic::Streaming<pb::BackupProgress>) -> String {
    let mut last = String::new();
    while let Some(progress) = tokio::time::timeout(LONG, following.next()).await.unwrap() {
        last = progress.unwrap().phase;
    }
    last
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < LONG, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn files(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

#[tokio::test]
async fn a_restore_is_made_once_under_a_name() {
    let mut bench = Bench::new().await;
    bench.report(Arc::clone(&bench.keeper));
    bench.touch("go");
    assert_eq!(end(bench.restore("data").await.unwrap()).await, "done");
    let volume = bench.named("data").await.unwrap();
    let view = bench.arbiter.volume(&volume).await.unwrap();
    assert!(view.tickets.is_empty(), "{view:?}");
    bench.used_by_a_pod(&volume).await;

    let refused = bench.restore("data").await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    let text = refused.message();
    assert!(
        text.contains(volume.as_str()) && text.contains("another name"),
        "{text}"
    );
    assert_eq!(bench.named("data").await, Some(volume.clone()));
    assert_eq!(fs::read(bench.file(&volume)).unwrap()[..7], *b"a pod's");
    let resumed = bench.keeper.list()[0].job.id().clone();
    let resumed = bench.keeper.resume(&resumed).await.unwrap_err();
    assert!(resumed.to_string().contains("does not go on"), "{resumed}");
}

#[tokio::test]
async fn a_failed_restore_deletes_its_volume_and_frees_its_name() {
    let mut bench = Bench::new().await;
    bench.report(Arc::clone(&bench.keeper));
    let following = bench.restore("data").await.unwrap();
    let volume = bench.named("data").await.unwrap();
    assert!(bench.at_home(&volume));
    bench.touch("bad");
    bench.touch("go");
    assert_eq!(end(following).await, "failed");
    until("its volume is deleted", async || !bench.at_home(&volume)).await;
    assert_eq!(bench.named("data").await, None);
    let streams = bench.folder.path().join("streams");
    until("it is forgotten", async || files(&streams) == 0).await;

    fs::remove_file(bench.folder.path().join("bad")).unwrap();
    assert_eq!(end(bench.restore("data").await.unwrap()).await, "done");
}

#[tokio::test]
async fn a_restore_that_does_not_start_deletes_what_it_made() {
    let bench = Bench::new().await;
    fs::remove_dir(bench.folder.path().join("streams")).unwrap();
    bench.restore("data").await.unwrap_err();
    until("its volume is deleted", async || {
        bench.home.pool().volumes().is_empty()
    })
    .await;
    assert_eq!(bench.named("data").await, None);
}

#[tokio::test]
async fn a_restore_that_lost_its_ticket_stops() {
    let mut bench = Bench::new().await;
    let following = bench.restore("data").await.unwrap();
    let volume = bench.named("data").await.unwrap();
    let ticket = bench.keeper.list()[0].job.id().clone();
    let failed = bench.arbiter.fail_restore(&volume, &ticket, "expired");
    failed.await.unwrap();
    bench.report(Arc::clone(&bench.keeper));
    assert_eq!(end(following).await, "interrupted");
    until("its volume is deleted", async || !bench.at_home(&volume)).await;
}

/// An agent that finds a restore's file, as one before it left it.
async fn finds(bench: &mut Bench, volume: &VolumeId, whole: bool) -> std::path::PathBuf {
    let folder = bench.folder.path().join(format!("left-of-{volume}"));
    let job = Job::Restore(RestoreSpec {
        id: "left".parse().unwrap(),
        volume: volume.clone(),
        repo: RepositorySpec {
            path: "/repository".into(),
            password: Secret::new("secret"),
            limit_upload: None,
        },
        which: Which::Restic(BACKUP.into()),
        target: "/target".into(),
        size: None,
    });
    let mut kept = json!({ "job": job, "stopped": false });
    if whole {
        kept["whole"] = json!(true);
    }
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("left.json"), kept.to_string()).unwrap();
    let keeper = Keeper::open(folder.clone(), Streams::new("/none".into())).await;
    bench.report(keeper.unwrap());
    folder
}

#[tokio::test]
async fn what_a_dead_agent_left_of_a_restore_deletes_no_good_volume() {
    let mut bench = Bench::new().await;
    let made = async |name: &str| {
        let new = NewVolume {
            name: name.to_owned(),
            at_least: Bytes(MIB),
            at_most: None,
            content: Content::Empty,
            protocol: Protocol::NvmeTcp,
            home: None,
            busy_deadline: LONG,
            parameters: BTreeMap::new(),
        };
        let ticket = "left".parse().unwrap();
        let made = bench.arbiter.create_volume_for_restore(new, ticket, LONG);
        made.await.unwrap().spec.id
    };
    let (used, whole, half) = (made("used").await, made("whole").await, made("half").await);

    // It was whole, and its ticket has ended: somebody uses the volume.
    let ticket = "left".parse().unwrap();
    let ended = bench.arbiter.end_ticket(&used, &ticket, "whole");
    ended.await.unwrap();
    let mode = AccessMode::SingleWriter;
    let node = "a".parse().unwrap();
    let published = bench.arbiter.publish(&used, &node, mode, LONG).await;
    published.unwrap();
    let left = finds(&mut bench, &used, false).await;
    until("its file is forgotten", async || files(&left) == 0).await;
    bench.arbiter.unpublish(&used, None).await.unwrap();
    bench.used_by_a_pod(&used).await;
    assert_eq!(fs::read(bench.file(&used)).unwrap()[..7], *b"a pod's");

    // It was whole, and its ticket stands: nobody was told yet.
    let left = finds(&mut bench, &whole, true).await;
    until("its file is forgotten", async || files(&left) == 0).await;
    let view = bench.arbiter.volume(&whole).await.unwrap();
    assert!(view.tickets.is_empty(), "{view:?}");
    bench.used_by_a_pod(&whole).await;

    // It was cut short.
    let left = finds(&mut bench, &half, false).await;
    until("its volume is deleted", async || !bench.at_home(&half)).await;
    until("its file is forgotten", async || files(&left) == 0).await;
    assert_eq!(bench.named("half").await, None);
    assert!(bench.at_home(&used) && bench.at_home(&whole));
}

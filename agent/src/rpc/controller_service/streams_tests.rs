//! Backups that do not begin: over an arbiter whose homes are late or mute, with
//! an agent that starts no stream.

use std::sync::atomic::Ordering;

use super::*;
use crate::attach::runner::world_for_tests::{Life, World, until, with_volume};
use crate::rpc::agent_client::Directory;

struct Bench {
    _folder: tempfile::TempDir,
    world: Arc<World>,
    life: Life,
    volume: VolumeId,
    service: ControllerService,
}

impl Bench {
    async fn new() -> Self {
        let (_folder, world, life, volume) = with_volume().await;
        let agents = Arc::new(Directory::default());
        // Nobody listens there.
        agents.learn(&"a".parse().unwrap(), "127.0.0.1:1".parse().unwrap());
        let service = ControllerService::new(Arc::clone(&life.arbiter), agents);
        Self {
            _folder,
            world,
            life,
            volume,
            service,
        }
    }

    async fn backup(&self) -> Result<(), Status> {
        let repository = pb::Repository::default();
        let started = self.service.start_backup(&self.volume, repository).await;
        started.map(drop)
    }

    fn snapshots(&self) -> usize {
        self.world.snapshots.lock().unwrap().len()
    }

    async fn nothing_is_left(&self) {
        until("its snapshot is gone", async || self.snapshots() == 0).await;
        let listed = self.life.arbiter.snapshots().await.unwrap();
        assert_eq!(listed, []);
        until("its ticket has ended", async || {
            let view = self.life.arbiter.volume(&self.volume).await.unwrap();
            view.tickets.is_empty()
        })
        .await;
    }
}

#[tokio::test]
async fn a_backup_that_its_home_does_not_start_leaves_nothing() {
    let bench = Bench::new().await;
    bench.backup().await.unwrap_err();
    assert_eq!(bench.life.arbiter.snapshots().await.unwrap(), []);
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_backup_that_nobody_waits_for_leaves_nothing() {
    let bench = Bench::new().await;
    bench.world.late.store(true, Ordering::SeqCst);
    tokio::select! {
        begun = bench.backup() => panic!("its snapshot is late: {begun:?}"),
        () = until("a snapshot is taken", async || bench.snapshots() == 1) => {}
    }
    bench.world.late.store(false, Ordering::SeqCst);
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_backup_whose_snapshot_is_not_answered_leaves_nothing() {
    let bench = Bench::new().await;
    bench.world.mute.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let failed = bench.backup().await.unwrap_err();
        assert_eq!(failed.code(), tonic::Code::Unavailable, "{failed}");
    }
    assert_eq!(bench.snapshots(), 2);
    bench.world.mute.store(false, Ordering::SeqCst);
    bench.nothing_is_left().await;
}

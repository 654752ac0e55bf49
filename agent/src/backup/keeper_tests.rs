use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::backup::{Phase, RepositorySpec, Secret, Which};
use crate::ids::Bytes;

/// A worker that is done when the file `go` stands beside it.
const WORKER: &str = r#"#!/bin/sh
read -r job
while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.01; done
echo '{"done":"0123456789abcdef"}'
"#;
const SOON: Duration = Duration::from_secs(10);

/// What a stream holds: whether it was given back, and whether as whole.
#[derive(Default)]
struct Held {
    free: Arc<AtomicBool>,
    whole: Arc<AtomicBool>,
}

impl Held {
    fn finish(self) {
        self.whole.store(true, Ordering::SeqCst);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.free.store(true, Ordering::SeqCst);
    }
}

fn restore(folder: &Path) -> Job {
    Job::Restore(RestoreSpec {
        id: "restore-1".parse().unwrap(),
        volume: "vol-1".parse().unwrap(),
        repo: RepositorySpec {
            path: folder.join("repository"),
            password: Secret::new("secret"),
            limit_upload: None,
        },
        which: Which::Restic("0123456789abcdef".into()),
        target: folder.join("target"),
        size: Some(Bytes(4096)),
    })
}

#[tokio::test]
async fn what_a_stream_held_is_free_before_its_end_can_be_told() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("worker");
    fs::write(&program, WORKER).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let keeper = Keeper::open(folder.path().join("streams"), Streams::new(program))
        .await
        .unwrap();
    let held = Held::default();
    let (free, whole) = (Arc::clone(&held.free), Arc::clone(&held.whole));
    let job = restore(folder.path());
    let mut followed = keeper
        .start(job.clone(), move || held.finish())
        .await
        .unwrap();
    keeper.told(job.id());
    assert!(!free.load(Ordering::SeqCst) && !keeper.list()[0].at_rest);
    assert_eq!(
        *followed.end.borrow(),
        End::Ahead,
        "it runs: nothing to tell"
    );

    fs::write(folder.path().join("go"), "").unwrap();
    tokio::time::timeout(SOON, keeper.an_end()).await.unwrap();
    assert!(free.load(Ordering::SeqCst) && keeper.list()[0].at_rest);
    assert!(whole.load(Ordering::SeqCst));
    assert_eq!(followed.progress.borrow().phase, Phase::Done);
    assert_eq!(*followed.end.borrow_and_update(), End::AtRest);
    keeper.told(job.id());
    assert_eq!(*followed.end.borrow_and_update(), End::Told);
}

#[tokio::test]
async fn a_restore_that_is_stopped_gives_its_target_back_unfinished() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("worker");
    fs::write(&program, WORKER).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let streams = folder.path().join("streams");
    let keeper = Keeper::open(streams.clone(), Streams::new(program.clone()));
    let keeper = keeper.await.unwrap();
    let held = Held::default();
    let (free, whole) = (Arc::clone(&held.free), Arc::clone(&held.whole));
    let job = restore(folder.path());
    let started = keeper.start(job.clone(), move || held.finish()).await;
    started.unwrap();
    keeper.interrupt(job.id(), Duration::ZERO).await.unwrap();
    tokio::time::timeout(SOON, keeper.an_end()).await.unwrap();
    assert!(free.load(Ordering::SeqCst) && !whole.load(Ordering::SeqCst));
    let resumed = keeper.resume(job.id()).await.unwrap_err();
    assert!(matches!(resumed, KeeperError::Restore(_)), "{resumed}");

    let next = || Keeper::open(streams.clone(), Streams::new(program.clone()));
    let list = next().await.unwrap().list();
    assert!(list[0].progress.is_none() && list[0].at_rest);
    keeper.mark_whole(job.id()).unwrap();
    let list = next().await.unwrap().list();
    let phase = list[0].progress.as_ref().map(|progress| progress.phase);
    assert_eq!(phase, Some(Phase::Done));
    keeper.forget(job.id()).unwrap();
    assert!(next().await.unwrap().list().is_empty());
}

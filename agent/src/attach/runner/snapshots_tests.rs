//! Snapshots that nobody waits for, and homes that do not answer.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;

use super::super::world_for_tests::*;
use super::*;
use crate::ids::TicketId;

/// What the store keeps of snapshots, whole or not.
async fn kept(arbiter: &Arbiter) -> usize {
    all(&arbiter.inner).await.unwrap().len()
}

async fn nothing_is_left(arbiter: &Arbiter, world: &World) {
    until("its record is gone", async || kept(arbiter).await == 0).await;
    assert!(world.snapshots.lock().unwrap().is_empty(), "leaked");
}

/// The next process over the same store.
async fn again(folder: &tempfile::TempDir, world: &Arc<World>, life: Life) -> Life {
    // The store is free when the last task of the old one has ended.
    drop(life);
    let path = folder.path().join("state");
    let begun = tokio::time::Instant::now();
    loop {
        match begin(&path, world, &Arc::default()).await {
            Ok(life) => return life,
            Err(error) => assert!(begun.elapsed() < LONG, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_deletion_that_its_home_did_not_answer_goes_on_behind() {
    let (_folder, world, life, volume) = with_volume().await;
    let arbiter = &life.arbiter;
    let snapshot = arbiter.create_snapshot(&volume, "s").await.unwrap().info.id;
    world.silent.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let silent = arbiter.delete_snapshot(&snapshot).await;
        assert!(
            matches!(silent, Err(ArbiterError::Unavailable(_))),
            "{silent:?}"
        );
        assert_eq!(arbiter.snapshots().await.unwrap(), []);
    }
    world.silent.store(false, Ordering::SeqCst);
    nothing_is_left(arbiter, &world).await;
}

#[tokio::test]
async fn a_deletion_ends_whoever_waits_for_it() {
    let (_folder, world, life, volume) = with_volume().await;
    let arbiter = &life.arbiter;
    let snapshot = arbiter.create_snapshot(&volume, "s").await.unwrap().info.id;
    let begun = arbiter.delete_snapshot(&snapshot).now_or_never();
    assert!(begun.is_none(), "{begun:?}");
    nothing_is_left(arbiter, &world).await;
}

/// What an earlier process left is given up at the next start, and not taken then:
/// days later, for a backup that failed.
#[tokio::test]
async fn what_a_backup_left_is_not_taken_at_the_next_start() {
    let (folder, world, life, volume) = with_volume().await;
    let ticket = TicketId::random();
    world.silent.store(true, Ordering::SeqCst);
    let failed = life.arbiter.create_backup_snapshot(&volume, &ticket).await;
    failed.unwrap_err();
    let failed = life.arbiter.create_snapshot(&volume, "another's").await;
    failed.unwrap_err();
    assert_eq!(kept(&life.arbiter).await, 2);
    world.silent.store(false, Ordering::SeqCst);

    let life = again(&folder, &world, life).await;
    let arbiter = &life.arbiter;
    until("the other one is whole", async || {
        arbiter.snapshots().await.unwrap().len() == 1
    })
    .await;
    until("a record is gone", async || kept(arbiter).await == 1).await;
    assert_eq!(world.taken.load(Ordering::SeqCst), 1);
    assert_eq!(world.snapshots.lock().unwrap().len(), 1);
    let listed = arbiter.snapshots().await.unwrap();
    assert_eq!(listed[0].name, "another's");
}

/// Its stream may be at work, or stopped and resumable.
#[tokio::test]
async fn a_backups_whole_snapshot_outlives_the_controller() {
    let (folder, world, life, volume) = with_volume().await;
    let ticket = TicketId::random();
    let taken = life.arbiter.create_backup_snapshot(&volume, &ticket).await;
    let taken = taken.unwrap();
    let life = again(&folder, &world, life).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(life.arbiter.snapshots().await.unwrap(), [taken]);
    assert_eq!(world.snapshots.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_snapshot_that_is_given_up_ends_whatever_the_store_says_first() {
    let (_folder, world, life, volume) = with_volume().await;
    let arbiter = &life.arbiter;
    for trouble in [&life.unsure, &life.lossy] {
        let ticket = TicketId::random();
        trouble.store(true, Ordering::SeqCst);
        let unsure = arbiter.create_backup_snapshot(&volume, &ticket).await;
        assert!(
            matches!(unsure, Err(ArbiterError::Unavailable(_))),
            "{unsure:?}"
        );
        arbiter.abandon_backup_snapshot(&ticket).await;
        trouble.store(false, Ordering::SeqCst);
        until("nothing is in doubt", async || {
            arbiter.inner.snapshot_names.lock().await.is_empty()
        })
        .await;
        nothing_is_left(arbiter, &world).await;
    }
    assert_eq!(world.taken.load(Ordering::SeqCst), 0);
}

//! Snapshots that nobody waits for, and homes that do not answer.

use std::sync::atomic::Ordering;

use futures::FutureExt;

use super::super::world_for_tests::*;
use super::*;

/// What the store keeps of snapshots, whole or not.
async fn kept(arbiter: &Arbiter) -> usize {
    all(&arbiter.inner).await.unwrap().len()
}

async fn nothing_is_left(arbiter: &Arbiter, world: &World) {
    until("its record is gone", async || kept(arbiter).await == 0).await;
    assert!(world.snapshots.lock().unwrap().is_empty(), "leaked");
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

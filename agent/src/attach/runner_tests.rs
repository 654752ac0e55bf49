//! The runner over a real store and a world of homes and nodes that misbehave.

use std::time::SystemTime;

use futures::FutureExt;

use super::world_for_tests::*;
use super::*;
use crate::attach::ports::{Content, Protocol};
use crate::attach::record::{Ticket, TicketKind};
use crate::ids::TicketId;

async fn publish(arbiter: &Arbiter, volume: &VolumeId, node: &str) -> Result<Epoch, ArbiterError> {
    arbiter
        .publish(volume, &id(node), AccessMode::SingleWriter, LONG)
        .await
}

/// A whole story: made, published, moved, snapshotted, grown, deleted.
async fn story(arbiter: &Arbiter, world: &World) -> Result<(), ArbiterError> {
    let volume = arbiter.create_volume(request("pvc", 2)).await?.spec.id;
    let there: Vec<VolumeId> = world.volumes.lock().unwrap().keys().cloned().collect();
    assert!(there.contains(&volume), "answered before it was made");
    // After a death the story begins again, whoever has it.
    arbiter.unpublish(&volume, None).await?;
    publish(arbiter, &volume, "a").await?;
    let snapshot = arbiter.create_snapshot(&volume, "snap").await?;
    assert!(snapshot.ready);
    assert_eq!(
        world.snapshots.lock().unwrap().len(),
        1,
        "leaked or doubled"
    );
    arbiter.expand(&volume, Bytes(3 * MIB), None).await?;
    arbiter.unpublish(&volume, Some(&id("a"))).await?;
    let epoch = publish(arbiter, &volume, "b").await?;
    assert_eq!(world.open(), [(epoch, id("b"))]);
    let attachment = arbiter.attachment(&volume, &id("b")).await?;
    assert_eq!(
        (attachment.exported.epoch, attachment.size),
        (epoch, Bytes(3 * MIB))
    );
    arbiter.unpublish(&volume, None).await?;
    arbiter.delete_snapshot(&snapshot.info.id).await?;
    arbiter.delete_volume(&volume).await?;
    Ok(())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn a_death_at_any_call_loses_leaks_and_doubles_nothing() {
    let mut deaths = 0;
    for at in 0.. {
        let folder = folder();
        let path = folder.path().join("state");
        let world = Arc::new(World::default());
        let death = Arc::new(Death {
            at: Some(at),
            ..Death::default()
        });
        let first = runtime();
        let died = first.block_on(async {
            let life = async {
                let life = begin(&path, &world, &death).await?;
                story(&life.arbiter, &world).await
            };
            tokio::select! {
                biased;
                () = death.dead.notified() => true,
                result = life => { result.unwrap(); false }
            }
        });
        first.shutdown_timeout(LONG);
        if !died {
            break;
        }
        deaths += 1;
        let second = runtime();
        second.block_on(async {
            let life = begin(&path, &world, &Arc::default()).await.unwrap();
            let told = story(&life.arbiter, &world).await;
            assert!(told.is_ok(), "after a death at {at}: {told:?}");
            assert!(
                world.volumes.lock().unwrap().is_empty(),
                "a death at {at} leaked"
            );
            assert!(
                world.snapshots.lock().unwrap().is_empty(),
                "a death at {at} leaked"
            );
            assert!(life.arbiter.volumes().await.unwrap().is_empty());
        });
        second.shutdown_timeout(LONG);
    }
    assert!(
        deaths > 40,
        "only {deaths} deaths: the story has no faults in it"
    );
}

#[tokio::test]
async fn unpublish_does_not_wait_for_a_silent_home_and_the_fence_follows() {
    let (_folder, world, life, volume) = with_volume().await;
    publish(&life.arbiter, &volume, "a").await.unwrap();
    world.silent.store(true, Ordering::SeqCst);
    life.arbiter
        .unpublish(&volume, Some(&id("a")))
        .await
        .unwrap();
    assert!(
        life.arbiter
            .volume(&volume)
            .await
            .unwrap()
            .published
            .is_empty()
    );
    assert_eq!(world.open().len(), 1, "the home was silent");
    let soon = Duration::from_secs(2);
    let mode = AccessMode::SingleWriter;
    match life.arbiter.publish(&volume, &id("b"), mode, soon).await {
        Err(ArbiterError::Unavailable(text)) => assert!(text.contains("switched off"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(world.open()[0].1, id("a"), "granted without a receipt");
    world.silent.store(false, Ordering::SeqCst);
    let epoch = publish(&life.arbiter, &volume, "b").await.unwrap();
    assert_eq!(world.open(), [(epoch, id("b"))]);
}

#[tokio::test]
async fn unpublish_says_unavailable_when_the_store_hangs() {
    let (_folder, world, life, volume) = with_volume().await;
    publish(&life.arbiter, &volume, "a").await.unwrap();
    life.hung.store(true, Ordering::SeqCst);
    let result = life.arbiter.unpublish(&volume, Some(&id("a"))).await;
    assert!(
        matches!(result, Err(ArbiterError::Unavailable(_))),
        "{result:?}"
    );
    assert_eq!(world.open().len(), 1, "acted before it was durable");
    life.arbiter
        .unpublish(&id("no-such-volume"), None)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_change_the_store_was_unsure_of_is_taken_up() {
    let (_folder, world, life, volume) = with_volume().await;
    life.unsure.store(true, Ordering::SeqCst);
    let result = publish(&life.arbiter, &volume, "a").await;
    assert!(
        matches!(result, Err(ArbiterError::Unavailable(_))),
        "{result:?}"
    );
    assert!(
        world.open().is_empty(),
        "acted on what was not known to be durable"
    );
    let made = life.arbiter.create_volume(request("other", 1));
    let unsure = timeout(Duration::from_millis(50), made).await;
    assert!(unsure.is_err() || unsure.unwrap().is_err());
    life.unsure.store(false, Ordering::SeqCst);
    let epoch = publish(&life.arbiter, &volume, "a").await.unwrap();
    assert_eq!(world.open(), [(epoch, id("a"))]);
    life.arbiter
        .create_volume(request("other", 1))
        .await
        .unwrap();
    assert_eq!(world.volumes.lock().unwrap().len(), 2, "leaked or doubled");
}

#[tokio::test]
async fn publish_is_idempotent_and_refuses_what_another_holds() {
    let (_folder, _world, life, volume) = with_volume().await;
    let arbiter = &life.arbiter;
    let (one, two) = tokio::join!(
        publish(arbiter, &volume, "a"),
        publish(arbiter, &volume, "a")
    );
    assert_eq!(one, two);
    assert_eq!(one, publish(arbiter, &volume, "a").await);
    let held = publish(arbiter, &volume, "b").await.unwrap_err();
    assert!(
        matches!(&held, ArbiterError::HeldBy { node, .. } if *node == id("a")),
        "{held:?}"
    );
    let in_use = arbiter.delete_volume(&volume).await;
    assert!(matches!(in_use, Err(ArbiterError::InUse(_))), "{in_use:?}");
    let nowhere = publish(arbiter, &volume, "nowhere").await;
    assert_eq!(nowhere, Err(ArbiterError::NoNode(id("nowhere"))));
    let nothing = publish(arbiter, &id("nothing"), "a").await;
    assert_eq!(nothing, Err(ArbiterError::NoVolume(id("nothing"))));
    let other = arbiter.attachment(&volume, &id("b")).await;
    assert!(matches!(other, Err(ArbiterError::NotPublished { .. })));
}

#[tokio::test]
async fn only_the_holder_of_an_iscsi_volume_is_told_its_secrets() {
    let (_folder, _world, life, volume) = with_volume().await;
    publish(&life.arbiter, &volume, "a").await.unwrap();
    let plain = life.arbiter.attachment(&volume, &id("a")).await.unwrap();
    assert_eq!(plain.exported.target.chap, None);

    let mut asked = request("secret", 2);
    asked.protocol = Protocol::Iscsi;
    let volume = life.arbiter.create_volume(asked).await.unwrap().spec.id;
    publish(&life.arbiter, &volume, "a").await.unwrap();
    let target = life.arbiter.attachment(&volume, &id("a")).await;
    let target = target.unwrap().exported.target;
    assert_eq!(target.protocol, Protocol::Iscsi);
    assert!(target.chap.is_some(), "{target:?}");
    let other = life.arbiter.attachment(&volume, &id("b")).await;
    assert!(matches!(other, Err(ArbiterError::NotPublished { .. })));
}

/// What was granted as never written may have been written since, in the same epoch.
#[tokio::test]
async fn a_node_is_told_whether_the_volume_was_written_by_now() {
    let (_folder, world, life, volume) = with_volume().await;
    publish(&life.arbiter, &volume, "a").await.unwrap();
    let written = async || {
        let attachment = life.arbiter.attachment(&volume, &id("a")).await;
        attachment.unwrap().exported.ever_written
    };
    assert!(!written().await, "it may be formatted");
    world.written.store(true, Ordering::SeqCst);
    assert!(written().await);
    world.written.store(false, Ordering::SeqCst);
    world.silent.store(true, Ordering::SeqCst);
    assert!(written().await, "a home that does not say");
}

#[tokio::test]
async fn a_lost_node_gives_way_and_comes_back_clean() {
    let (_folder, world, life, volume) = with_volume().await;
    let arbiter = &life.arbiter;
    let old = publish(arbiter, &volume, "a").await.unwrap();
    arbiter.node_lost(&id("a")).await.unwrap();
    arbiter.node_lost(&id("a")).await.unwrap();
    let new = publish(arbiter, &volume, "b").await.unwrap();
    assert_eq!(world.open(), [(new, id("b"))]);
    let refused = publish(arbiter, &volume, "a").await;
    assert_eq!(refused, Err(ArbiterError::NodeLost(id("a"))));
    // Still the same boot, still attached: still lost, and told to let go.
    world.released.lock().unwrap().clear();
    let held = registration("a", "boot-1", vec![(volume.clone(), old)]);
    arbiter.register(held).await.unwrap();
    while world.released.lock().unwrap().is_empty() {
        world.answered.notified().await;
    }
    assert_eq!(
        world.released.lock().unwrap()[0],
        (volume.clone(), id("a"), old)
    );
    assert_eq!(
        publish(arbiter, &volume, "a").await,
        Err(ArbiterError::NodeLost(id("a")))
    );
    arbiter
        .register(registration("a", "boot-2", vec![]))
        .await
        .unwrap();
    let held = publish(arbiter, &volume, "a").await;
    assert!(matches!(held, Err(ArbiterError::HeldBy { .. })), "{held:?}");
    // The holder's own attachment is never taken from it.
    world.released.lock().unwrap().clear();
    arbiter
        .register(registration("b", "boot-1", vec![(volume.clone(), new)]))
        .await
        .unwrap();
    arbiter.unpublish(&volume, None).await.unwrap();
    publish(arbiter, &volume, "a").await.unwrap();
    arbiter.node_lost(&id("b")).await.unwrap();
    arbiter
        .register(registration("b", "boot-1", vec![]))
        .await
        .unwrap();
    assert!(
        arbiter
            .nodes()
            .await
            .unwrap()
            .iter()
            .all(|node| node.lost.is_none())
    );
}

/// Whoever says so may leave at any moment: halfway, a registration would take the word back.
#[tokio::test]
async fn a_node_is_lost_whoever_waits_for_it() {
    let (_folder, world, life, volume) = with_volume().await;
    let arbiter = &life.arbiter;
    publish(arbiter, &volume, "a").await.unwrap();
    let node = id("a");
    let said = arbiter.node_lost(&node).now_or_never();
    assert!(said.is_none(), "{said:?}");
    until("its export is fenced", async || world.open().is_empty()).await;
    let again = registration("a", "boot-1", vec![(volume.clone(), Epoch(1))]);
    arbiter.register(again).await.unwrap();
    let refused = publish(arbiter, &volume, "a").await;
    assert_eq!(refused, Err(ArbiterError::NodeLost(node)));
}

#[tokio::test]
async fn a_store_put_back_from_an_old_copy_learns_the_homes_epoch() {
    let folder = folder();
    let (path, copy) = (folder.path().join("state"), folder.path().join("copy"));
    let world = Arc::new(World::default());
    let life = |path: std::path::PathBuf, world: Arc<World>| {
        std::thread::spawn(move || {
            let runtime = runtime();
            let result = runtime.block_on(async {
                let life = begin(&path, &world, &Arc::default()).await.unwrap();
                let volume = life
                    .arbiter
                    .create_volume(request("pvc", 1))
                    .await
                    .unwrap()
                    .spec
                    .id;
                life.arbiter.unpublish(&volume, None).await.unwrap();
                let epoch = publish(&life.arbiter, &volume, "a").await.unwrap();
                (volume, epoch)
            });
            runtime.shutdown_timeout(LONG);
            result
        })
        .join()
        .unwrap()
    };
    life(path.clone(), Arc::clone(&world));
    std::fs::copy(&path, &copy).unwrap();
    for _ in 0..3 {
        life(path.clone(), Arc::clone(&world));
    }
    let (volume, before) = life(path, Arc::clone(&world));
    let (_, after) = life(copy.clone(), Arc::clone(&world));
    assert!(after > before, "{after} after {before}");
    assert_eq!(world.open(), [(after, id("a"))]);

    // And a home put back from an old copy serves nothing.
    world
        .volumes
        .lock()
        .unwrap()
        .insert(volume.clone(), (1, None));
    let begun = begin(&copy, &world, &Arc::default()).await.unwrap();
    begun.arbiter.unpublish(&volume, None).await.unwrap();
    let refused = publish(&begun.arbiter, &volume, "b").await;
    assert!(
        matches!(&refused, Err(ArbiterError::Failed(text)) if text.contains("old copy")),
        "{refused:?}"
    );
    assert!(world.open().is_empty());
}

#[tokio::test]
async fn tickets_are_interrupted_reaped_and_counted() {
    let (_folder, world, life, volume) = with_volume().await;
    let arbiter = &life.arbiter;
    let ticket = |name: &str, lease_ms| Ticket {
        id: id(name),
        kind: TicketKind::Backup,
        node: id("a"),
        owner: "pid 4711".to_owned(),
        interruptible: true,
        home_side: false,
        lease_ends: Some(SystemTime::now() + Duration::from_millis(lease_ms)),
    };
    arbiter
        .take_ticket(&volume, ticket("short", 20))
        .await
        .unwrap();
    arbiter
        .take_ticket(&volume, ticket("long", 600_000))
        .await
        .unwrap();
    let mut changes = 0;
    while arbiter.volume(&volume).await.unwrap().tickets.len() > 1 {
        changes += 1;
        assert!(changes < 1000, "the lease never ran out");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let gone = arbiter.renew_ticket(&volume, &id("short"), LONG).await;
    assert!(
        matches!(gone, Err(ArbiterError::NoTicket { .. })),
        "{gone:?}"
    );
    arbiter
        .renew_ticket(&volume, &id("long"), LONG)
        .await
        .unwrap();
    publish(arbiter, &volume, "b").await.unwrap();
    while world.interrupted.lock().unwrap().is_empty() {
        world.answered.notified().await;
    }
    assert_eq!(*world.interrupted.lock().unwrap(), [id("long")]);
    arbiter
        .end_ticket(&volume, &id("long"), "done")
        .await
        .unwrap();
    arbiter.unpublish(&volume, None).await.unwrap();
    publish(arbiter, &volume, "a").await.unwrap();

    let wanted = Wanted {
        volume: Some(volume.clone()),
        ..Wanted::default()
    };
    let notes = arbiter.notes(&wanted).await.unwrap();
    let kinds: Vec<&str> = notes.iter().map(|note| note.kind.as_str()).collect();
    for kind in [
        "created",
        "lease-expired",
        "interrupted",
        "published",
        "unpublished",
        "fenced",
    ] {
        assert!(kinds.contains(&kind), "{kind} is not in {kinds:?}");
    }
    let mut registry = Registry::default();
    arbiter.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "drover_publishes_total{result=\"ok\"} 2",
        "drover_unpublishes_total{result=\"ok\"} 1",
        "drover_tickets{kind=\"workload\"} 1",
        "drover_volumes{phase=\"attached\"} 1",
        "drover_ticket_leases_expired_total 1",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    // One fence, or two where the first had ended before the publish asked.
    for name in [
        "drover_fences_total{result=\"drained\"} ",
        "drover_fence_receipt_seconds_count ",
    ] {
        let counted = text.lines().find_map(|line| line.strip_prefix(name));
        assert!(matches!(counted, Some("1" | "2")), "{name}{counted:?}");
    }
}

/// Its volume is gone from the home, and its name is free.
async fn gone_with_its_name(arbiter: &Arbiter, world: &World, volume: &VolumeId, name: &str) {
    let again = arbiter.create_volume(request(name, 1)).await.unwrap();
    assert_ne!(again.spec.id, *volume);
    let mut looks = 0;
    while world.volumes.lock().unwrap().contains_key(volume) {
        looks += 1;
        assert!(looks < 1000, "never deleted at its home");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_failed_restore_deletes_its_volume_and_a_late_word_of_it_no_other() {
    let (_folder, world, life, used) = with_volume().await;
    let arbiter = &life.arbiter;
    let ticket: TicketId = id("restore-1");
    let taken = arbiter.create_volume_for_restore(request("pvc", 1), ticket.clone(), LONG);
    let taken = taken.await.unwrap_err();
    assert!(matches!(&taken, ArbiterError::Incompatible(_)), "{taken:?}");
    assert!(taken.to_string().contains("another name"), "{taken}");
    arbiter.fail_restore(&used, &ticket, "late").await.unwrap();
    arbiter.volume(&used).await.unwrap();

    let made = arbiter.create_volume_for_restore(request("again", 1), ticket.clone(), LONG);
    let made = made.await.unwrap().spec.id;
    let held = publish(arbiter, &made, "a").await;
    assert!(matches!(held, Err(ArbiterError::InUse(_))), "{held:?}");
    for _ in 0..2 {
        let failed = arbiter.fail_restore(&made, &ticket, "no space").await;
        failed.unwrap();
    }
    gone_with_its_name(arbiter, &world, &made, "again").await;
}

#[tokio::test]
async fn a_restore_that_nobody_begins_ends_by_its_lease() {
    let (_folder, world, life, _) = with_volume().await;
    let arbiter = &life.arbiter;
    let lease = Duration::from_millis(50);
    let made = arbiter.create_volume_for_restore(request("again", 1), id("restore-1"), lease);
    let made = made.await.unwrap().spec.id;
    let mut looks = 0;
    while arbiter.volume(&made).await.is_ok() {
        looks += 1;
        assert!(looks < 1000, "the lease never ran out");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    gone_with_its_name(arbiter, &world, &made, "again").await;
}

#[tokio::test]
async fn volumes_and_snapshots_are_idempotent_by_name() {
    let (_folder, world, life, volume) = with_volume().await;
    let arbiter = &life.arbiter;
    assert_eq!(
        arbiter
            .create_volume(request("pvc", 1))
            .await
            .unwrap()
            .spec
            .id,
        volume
    );
    let larger = arbiter.create_volume(request("pvc", 9)).await;
    assert!(
        matches!(larger, Err(ArbiterError::Incompatible(_))),
        "{larger:?}"
    );
    let (one, two) = tokio::join!(
        arbiter.create_snapshot(&volume, "s"),
        arbiter.create_snapshot(&volume, "s")
    );
    assert_eq!(one, two);
    let source = one.unwrap().info.id;
    let mut clone = request("clone", 1);
    clone.content = Content::Snapshot(source.clone());
    let clone = arbiter.create_volume(clone).await.unwrap().spec;
    assert_eq!(clone.home, id("a"));
    let other = arbiter.create_snapshot(&clone.id, "s").await;
    assert!(
        matches!(other, Err(ArbiterError::Incompatible(_))),
        "{other:?}"
    );
    let mut orphan = request("orphan", 1);
    orphan.content = Content::Snapshot(id("no-such"));
    let orphan = arbiter.create_volume(orphan).await;
    assert_eq!(orphan, Err(ArbiterError::NoSnapshot(id("no-such"))));
    arbiter.delete_volume(&volume).await.unwrap();
    arbiter.delete_volume(&volume).await.unwrap();
    assert_eq!(
        arbiter.snapshots().await.unwrap().len(),
        1,
        "a snapshot outlives its volume"
    );
    arbiter.delete_snapshot(&source).await.unwrap();
    arbiter.delete_snapshot(&source).await.unwrap();
    assert!(world.snapshots.lock().unwrap().is_empty());

    world.full.store(true, Ordering::SeqCst);
    let full = arbiter.create_volume(request("big", 1)).await;
    assert!(matches!(full, Err(ArbiterError::NoSpace(_))), "{full:?}");
    world.full.store(false, Ordering::SeqCst);
    arbiter.create_volume(request("big", 1)).await.unwrap();
    assert_eq!(arbiter.volumes().await.unwrap().len(), 2);
    let shrunk = arbiter.expand(&clone.id, Bytes(1), None).await;
    assert_eq!(shrunk, Ok(Bytes(MIB)));
}

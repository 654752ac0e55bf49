//! When gates close, and what comes of a disk that is shut. Needs root and loop
//! devices; whether a closed gate holds is `fence`'s own to test.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::bench::{Bench, mount};
use super::*;
use crate::attach::ports::{Access, FsType, GateLayer, Node, NodeAnswer, Staging, Verdict};

fn disk(bench: &Bench) -> Disk {
    let attached = bench.fabric.attached().unwrap();
    attached[0].device.clone().unwrap().disk
}

#[tokio::test]
async fn root_a_fence_shuts_the_disk_before_the_volumes_turn_comes() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    let open = fs::File::create(bench.path("staging/open")).unwrap();
    let disk = disk(&bench);
    *bench.eye.0.lock().unwrap() = Verdict::Live;
    let turn = bench.node.turn(&bench.volume).await.unwrap();
    let (node, volume) = (bench.node.clone(), bench.volume.clone());
    let release = tokio::spawn(async move { node.release(&volume, Epoch(1)).await });
    while !bench.shut.is_closed(&disk).unwrap() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(bench.live().len(), 1, "disconnected out of turn");
    drop(turn);
    let answer = release.await.unwrap();
    let NodeAnswer::Shut {
        gate,
        judgement,
        held,
    } = answer
    else {
        panic!("{answer:?}");
    };
    assert_eq!(judgement.unwrap().verdict, Verdict::Live);
    assert_eq!(
        gate.layers,
        [
            GateLayer::Files,
            GateLayer::Opens,
            GateLayer::Shutdown,
            GateLayer::Removal
        ]
    );
    assert!(gate.shut_in <= gate.took);
    assert!(held.unwrap().contains("staging"), "it is mounted still");
    assert!(bench.live().is_empty());
    assert_eq!(*bench.shut.0.lock().unwrap(), [(disk, Epoch(1))]);
    // The file system was shut down.
    let late = open.write_all_at(b"late", 0).unwrap_err();
    assert_eq!(late.raw_os_error(), Some(libc::EIO));
    let again = bench.node.release(&bench.volume, Epoch(1)).await;
    assert_eq!(again, NodeAnswer::Clean);
}

#[tokio::test]
async fn root_whoever_is_cut_off_is_shut_out_first() {
    for (verdict, ended) in [
        (Verdict::BackupStale, false),
        (Verdict::Live, false),
        (Verdict::Live, true),
    ] {
        let bench = Bench::new(64);
        bench.stage(mount(FsType::Ext4)).await.unwrap();
        let disk = disk(&bench);
        let open = fs::File::create(bench.path("staging/open")).unwrap();
        open.write_all_at(b"not synced", 0).unwrap();
        *bench.eye.0.lock().unwrap() = verdict;
        bench.change(|a| a.busy_deadline = Duration::ZERO);
        if ended {
            bench.answer(Err(ControlError::NotPublished {
                volume: bench.volume.clone(),
                node: "node-a".parse().unwrap(),
            }));
        }
        bench.unstage().await.unwrap();
        assert!(bench.shut.is_closed(&disk).unwrap(), "{verdict:?} {ended}");
        let late = open.write_all_at(b"late", 0).unwrap_err();
        assert_eq!(late.raw_os_error(), Some(libc::EIO));
        // Written back before. Where the epoch has ended that is tried too: here
        // no home refuses it.
        let data = fs::read(bench.path("backing")).unwrap();
        let synced = data.windows(10).any(|w| w == b"not synced");
        assert!(synced, "{verdict:?} {ended}");
    }
}

#[tokio::test]
async fn root_a_disk_that_nobody_holds_is_let_go_of_without_its_gate() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    bench.unstage().await.unwrap();
    assert_eq!(*bench.shut.0.lock().unwrap(), []);
}

#[tokio::test]
async fn root_a_shut_disk_is_not_used_again_and_its_export_is_connected_anew() {
    for access in [mount(FsType::Ext4), Access::Block] {
        let bench = Bench::new(64);
        bench.stage(access.clone()).await.unwrap();
        let first = disk(&bench);
        bench.shut.close(&first, &bench.volume, Epoch(1)).unwrap();
        let error = bench
            .publish(access.clone(), "pod", false)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("gate"), "{error}");
        bench.change(|a| a.exported.ever_written = access != Access::Block);
        bench.stage(access.clone()).await.unwrap();
        let second = disk(&bench);
        assert_ne!(first.diskseq, second.diskseq);
        bench.publish(access, "pod", false).await.unwrap();
        let path = bench.path("pod");
        bench.node.unpublish(&bench.volume, &path).await.unwrap();
        bench.unstage().await.unwrap();
    }
}

#[tokio::test]
async fn root_an_epoch_that_was_staged_anew_outlives_its_shut_disk() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    let first = disk(&bench);
    bench.shut.close(&first, &bench.volume, Epoch(1)).unwrap();
    let turn = bench.node.turn(&bench.volume).await.unwrap();
    let node = bench.node.clone();
    let finish = tokio::spawn(async move { node.finish_shut().await });
    // It has seen the shut disk and waits for the turn; a NodeStage goes first.
    tokio::time::sleep(Duration::from_millis(100)).await;
    bench.fabric.reconnect();
    let second = disk(&bench);
    assert_ne!(first.diskseq, second.diskseq);
    drop(turn);
    finish.await.unwrap();
    assert_eq!(bench.live().len(), 1, "the new disk was disconnected");
    assert!(
        !bench.shut.is_closed(&second).unwrap(),
        "the new disk was shut"
    );
}

#[tokio::test]
async fn root_what_an_earlier_agent_had_shut_is_ended() {
    let bench = Bench::new(64);
    bench.stage(Access::Block).await.unwrap();
    bench.node.finish_shut().await;
    assert_eq!(bench.live().len(), 1, "it is not shut");
    let disk = disk(&bench);
    bench.shut.close(&disk, &bench.volume, Epoch(1)).unwrap();
    bench.node.finish_shut().await;
    assert!(bench.live().is_empty());
}

#[tokio::test]
async fn root_a_disconnect_that_is_given_up_forgets_what_has_gone_and_so_does_time() {
    let bench = Bench::new(16);
    bench.stage(Access::Block).await.unwrap();
    bench.fabric.stuck.store(true, Relaxed);
    let before = bench.shut.1.load(Relaxed);
    let answer = bench.node.release(&bench.volume, Epoch(1)).await;
    assert!(
        matches!(answer, NodeAnswer::Shut { held: Some(_), .. }),
        "{answer:?}"
    );
    assert_eq!(bench.shut.1.load(Relaxed), before + 1);
    bench.fabric.stuck.store(false, Relaxed);
    bench.node.finish_shut().await;
    // The task of an agent's whole life.
    let before = bench.shut.1.load(Relaxed);
    let kept = tokio::time::timeout(Duration::from_secs(3), bench.node.keep_gates()).await;
    assert!(kept.is_err() && bench.shut.1.load(Relaxed) >= before + 2);
}

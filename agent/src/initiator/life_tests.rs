//! The whole node side, over [`super::bench`]. Needs root and loop devices.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use uuid::Uuid;

use super::bench::{Bench, mount, sh};
use super::child::tests::children;
use super::*;
use crate::attach::ports::{Access, FsType, Node, NodeAnswer, Staging, Verdict};
use crate::ids::Bytes;

/// Growing a mounted ext4 takes CAP_SYS_RESOURCE (fs/ext4/resize.c), which
/// root in a container may lack.
fn may_grow(fs: FsType) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let capabilities = u64::from_str_radix(line.unwrap().trim(), 16).unwrap();
    let may = fs == FsType::Xfs || capabilities & (1 << 24) != 0;
    if !may {
        eprintln!("no CAP_SYS_RESOURCE here: growing ext4 is left to the VM");
    }
    may
}

async fn a_life(fs: FsType, mib: u64) {
    let (first, second) = if may_grow(fs) { (128, 192) } else { (0, 0) };
    let bench = Bench::new(mib);
    bench.stage(mount(fs)).await.unwrap();
    bench.stage(mount(fs)).await.unwrap();
    assert_eq!(bench.live().len(), 1, "staged twice, connected once");
    bench.publish(mount(fs), "pod/a", false).await.unwrap();
    bench.publish(mount(fs), "pod/a", false).await.unwrap();
    bench.publish(mount(fs), "pod/b", true).await.unwrap();
    fs::write(bench.path("pod/a/data"), "kept").unwrap();
    let refused = fs::write(bench.path("pod/b/data"), "x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    let other = bench.publish(mount(fs), "pod/a", true).await.unwrap_err();
    assert!(matches!(other, NodeError::Incompatible(_)), "{other}");
    let wrong = match fs {
        FsType::Ext4 => FsType::Xfs,
        FsType::Xfs => FsType::Ext4,
    };
    for access in [mount(wrong), Access::Block] {
        let error = bench.stage(access).await.unwrap_err();
        assert!(matches!(error, NodeError::Incompatible(_)), "{error}");
    }

    let before = bench
        .node
        .stats(&bench.volume, &bench.path("pod/a"))
        .await
        .unwrap();
    assert!(before.bytes[0] <= mib << 20 && before.inodes.unwrap()[0] > 0);
    bench.backing().set_len((mib + first) << 20).unwrap();
    let at_least = Bytes((mib + first) << 20);
    let path = bench.path("pod/a");
    let size = bench
        .node
        .expand(&bench.volume, &path, at_least)
        .await
        .unwrap();
    assert_eq!(size, at_least);
    let after = bench.node.stats(&bench.volume, &path).await.unwrap();
    assert!(
        after.bytes[0] >= before.bytes[0] + ((first * 3 / 4) << 20),
        "{after:?}"
    );

    for name in ["pod/a", "pod/a", "pod/b"] {
        bench
            .node
            .unpublish(&bench.volume, &bench.path(name))
            .await
            .unwrap();
        assert!(!bench.path(name).exists());
    }
    bench.unstage().await.unwrap();
    bench.unstage().await.unwrap();
    assert!(bench.live().is_empty() && !bench.is_mounted("staging"));

    // The next epoch finds the data, and what the volume was written with is
    // not made anew; while it was away it grew.
    bench.backing().set_len((mib + second) << 20).unwrap();
    bench.grant(2, true);
    bench.stage(mount(fs)).await.unwrap();
    assert_eq!(
        fs::read_to_string(bench.path("staging/data")).unwrap(),
        "kept"
    );
    let grown = bench
        .node
        .stats(&bench.volume, &bench.path("staging"))
        .await
        .unwrap();
    assert!(
        grown.bytes[0] >= after.bytes[0] + (((second - first) * 3 / 4) << 20),
        "{grown:?}"
    );
    bench.unstage().await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let kinds: Vec<String> = bench
        .control
        .notes
        .lock()
        .unwrap()
        .iter()
        .map(|n| n.kind.clone())
        .collect();
    for kind in ["staged", "unstaged", "node-published", "node-unpublished"] {
        assert_eq!(
            kinds.iter().filter(|k| *k == kind).count(),
            2,
            "{kind}: {kinds:?}"
        );
    }
}

#[tokio::test]
async fn root_an_ext4_volume_lives_moves_and_grows() {
    a_life(FsType::Ext4, 64).await;
}

#[tokio::test]
async fn root_an_xfs_volume_lives_moves_and_grows() {
    a_life(FsType::Xfs, 320).await;
}

#[tokio::test]
async fn root_a_raw_block_volume_is_bound_and_has_one_mode() {
    let bench = Bench::new(16);
    let early = bench
        .publish(Access::Block, "pod/dev", false)
        .await
        .unwrap_err();
    assert!(matches!(early, NodeError::NotStaged { .. }), "{early}");
    bench.stage(Access::Block).await.unwrap();
    bench
        .publish(Access::Block, "pod/dev", false)
        .await
        .unwrap();
    bench
        .publish(Access::Block, "pod/dev", false)
        .await
        .unwrap();
    let usage = bench
        .node
        .stats(&bench.volume, &bench.path("pod/dev"))
        .await
        .unwrap();
    assert_eq!((usage.bytes, usage.inodes), ([16 << 20, 0, 0], None));
    let device = fs::OpenOptions::new()
        .write(true)
        .open(bench.path("pod/dev"))
        .unwrap();
    device.write_all_at(&[7; 4096], 8192).unwrap();
    device.sync_all().unwrap();
    drop(device);
    let mode = bench
        .publish(Access::Block, "pod/two", true)
        .await
        .unwrap_err();
    assert!(matches!(mode, NodeError::Incompatible(_)), "{mode}");
    let error = bench.stage(mount(FsType::Ext4)).await.unwrap_err();
    assert!(matches!(error, NodeError::Incompatible(_)), "{error}");

    bench.backing().set_len(32 << 20).unwrap();
    let path = bench.path("pod/dev");
    let size = bench
        .node
        .expand(&bench.volume, &path, Bytes(32 << 20))
        .await;
    assert_eq!(size.unwrap(), Bytes(32 << 20));

    bench.node.unpublish(&bench.volume, &path).await.unwrap();
    bench.publish(Access::Block, "pod/dev", true).await.unwrap();
    // The kernel lets it be opened, and refuses the write.
    let device = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let refused = device.write_all_at(&[8; 4096], 8192).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    drop(device);
    bench.node.unpublish(&bench.volume, &path).await.unwrap();
    bench.unstage().await.unwrap();
    let mut found = [0; 4096];
    bench.backing().read_exact_at(&mut found, 8192).unwrap();
    assert_eq!(found, [7; 4096]);
}

#[tokio::test]
async fn root_a_device_that_answers_eio_is_never_formatted() {
    let bench = Bench::new(64);
    bench.stage(Access::Block).await.unwrap();
    // What the loop device has no file for, it answers with EIO.
    bench.backing().set_len(0).unwrap();
    let error = bench.stage(mount(FsType::Ext4)).await.unwrap_err();
    assert!(matches!(error, NodeError::Unusable(_)), "{error}");
    assert!(error.to_string().contains("(os error 5)"), "{error}");
    bench.backing().set_len(64 << 20).unwrap();
    let blank = sh(&format!(
        "tr -d '\\0' < {} | wc -c",
        bench.path("backing").display()
    ));
    assert_eq!(blank, "0", "something was written");
}

#[tokio::test]
async fn root_a_written_volume_without_a_file_system_is_refused_and_left_alone() {
    let bench = Bench::new(64);
    bench.grant(1, true);
    let error = bench.stage(mount(FsType::Ext4)).await.unwrap_err();
    assert!(matches!(error, NodeError::Unusable(_)), "{error}");
    assert!(bench.live().is_empty(), "left connected");

    sh(&format!(
        "mkfs.ext4 -q -F {}",
        bench.path("backing").display()
    ));
    bench.grant(2, false);
    let error = bench.stage(mount(FsType::Xfs)).await.unwrap_err();
    assert!(error.to_string().contains("holds ext4"), "{error}");
    bench.stage(mount(FsType::Ext4)).await.unwrap();
}

#[tokio::test]
async fn root_an_interrupted_format_is_done_again() {
    let bench = Bench::new(64);
    bench.stage(Access::Block).await.unwrap();
    let disk = bench.fabric.attached().unwrap()[0]
        .device
        .clone()
        .unwrap()
        .disk;
    let mark = Op::Mark {
        device: (&disk).into(),
        volume: bench.volume.clone(),
    };
    children()
        .run(&mark, Duration::from_secs(10))
        .await
        .unwrap();
    // The home says "written": the mark was.
    bench.change(|a| a.exported.ever_written = true);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    bench.unstage().await.unwrap();
    let left = sh(&format!(
        "grep -c 'drover is formatting' {} || true",
        bench.path("backing").display()
    ));
    assert_eq!(left, "0", "the mark is there still");
}

#[tokio::test]
async fn root_the_mark_outlives_what_mkfs_writes() {
    for program in ["mkfs.ext4 -q -F -m0 -E nodiscard", "mkfs.xfs -q -f -K"] {
        let bench = Bench::new(320);
        bench.stage(Access::Block).await.unwrap();
        let disk = bench.fabric.attached().unwrap()[0]
            .device
            .clone()
            .unwrap()
            .disk;
        let mark = Op::Mark {
            device: (&disk).into(),
            volume: bench.volume.clone(),
        };
        children()
            .run(&mark, Duration::from_secs(10))
            .await
            .unwrap();
        sh(&format!("{program} {}", disk.path().display()));
        let look = Op::Examine {
            device: (&disk).into(),
            volume: bench.volume.clone(),
        };
        let (answer, _) = children()
            .run(&look, Duration::from_secs(10))
            .await
            .unwrap();
        let child_ops::Answer::Examined(found) = answer else {
            panic!("{answer:?}");
        };
        assert!(found.marked, "{program} wrote over the mark");
        let superblock = found.superblock.unwrap();
        assert_eq!(
            (superblock.size, superblock.unfinished),
            (Bytes(320 << 20), false)
        );
    }
}

#[tokio::test]
async fn root_a_disk_that_took_the_name_is_not_touched() {
    let bench = Bench::new(64);
    bench.stage(Access::Block).await.unwrap();
    let mut disk = bench.fabric.attached().unwrap()[0]
        .device
        .clone()
        .unwrap()
        .disk;
    disk.diskseq.0 += 1;
    let op = Op::Tool {
        device: (&disk).into(),
        program: "mkfs.ext4".to_owned(),
        args: vec!["-F".to_owned()],
        after: Vec::new(),
    };
    let error = children()
        .run(&op, Duration::from_secs(10))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("another disk"), "{error}");
}

#[tokio::test]
async fn root_a_live_holder_keeps_its_device_until_the_deadline() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    let open = fs::File::create(bench.path("staging/open")).unwrap();
    *bench.eye.0.lock().unwrap() = Verdict::Live;
    let error = bench.unstage().await.unwrap_err();
    assert!(matches!(error, NodeError::Busy(_)), "{error}");
    assert_eq!((bench.live().len(), bench.is_mounted("staging")), (1, true));
    bench.change(|a| a.busy_deadline = Duration::ZERO);
    open.write_all_at(b"the last write", 0).unwrap();
    bench.unstage().await.unwrap();
    assert!(bench.live().is_empty() && !bench.is_mounted("staging"));
    drop(open);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let notes = bench.control.notes.lock().unwrap();
    assert!(
        notes.iter().any(|n| n.text.contains("cut off")),
        "{notes:?}"
    );
}

#[tokio::test]
async fn root_who_only_looks_for_a_moment_is_no_holder() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    let looking = fs::File::open(bench.path("staging")).unwrap();
    *bench.eye.0.lock().unwrap() = Verdict::Live;
    let (unstaged, ()) = tokio::join!(bench.unstage(), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(looking);
        *bench.eye.0.lock().unwrap() = Verdict::Quiet;
    });
    unstaged.unwrap();
}

#[tokio::test]
async fn root_a_stranger_who_reads_for_a_moment_is_no_holder() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    *bench.eye.0.lock().unwrap() = Verdict::Unknown;
    let error = bench.unstage().await.unwrap_err();
    assert!(error.to_string().contains("udev-worker"), "{error}");
    let (unstaged, ()) = tokio::join!(bench.unstage(), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        *bench.eye.0.lock().unwrap() = Verdict::Quiet;
    });
    unstaged.unwrap();
}

#[tokio::test]
async fn root_a_file_system_mounted_elsewhere_counts_as_a_holder() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    bench
        .publish(mount(FsType::Ext4), "pod/a", false)
        .await
        .unwrap();
    // The witness sees nobody, the kernel still has the super block.
    let error = bench.unstage().await.unwrap_err();
    assert!(error.to_string().contains("claimed"), "{error}");
    assert_eq!(bench.live().len(), 1);
    bench
        .node
        .unpublish(&bench.volume, &bench.path("pod/a"))
        .await
        .unwrap();
    bench.unstage().await.unwrap();
    assert!(bench.live().is_empty());
}

#[tokio::test]
async fn root_readers_are_cut_off_and_an_ended_epoch_waits_for_nobody() {
    for verdict in [
        Verdict::BackupRunning,
        Verdict::BackupStale,
        Verdict::Live,
        Verdict::Unknown,
    ] {
        let bench = Bench::new(64);
        bench.stage(mount(FsType::Ext4)).await.unwrap();
        drop(fs::File::create(bench.path("staging/open")).unwrap());
        let _open = fs::File::open(bench.path("staging/open")).unwrap();
        *bench.eye.0.lock().unwrap() = verdict;
        if matches!(verdict, Verdict::Live | Verdict::Unknown) {
            bench.answer(Err(ControlError::NotPublished {
                volume: bench.volume.clone(),
                node: "node-a".parse().unwrap(),
            }));
        }
        bench.unstage().await.unwrap();
        assert!(
            bench.live().is_empty() && !bench.is_mounted("staging"),
            "{verdict:?}"
        );
    }
}

#[tokio::test]
async fn root_what_an_ended_epoch_left_is_cleaned_before_the_next() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    fs::write(bench.path("staging/data"), "kept").unwrap();
    sh(&format!("sync -f {}", bench.path("staging").display()));
    let answer = bench.node.release(&bench.volume, Epoch(0)).await;
    assert_eq!((answer, bench.live().len()), (NodeAnswer::Clean, 1));
    bench.grant(2, true);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    assert_eq!(bench.live(), [format!("{NQN_PREFIX}vol-1:2:r2")]);
    assert_eq!(
        bench.node.attached().unwrap(),
        [(bench.volume.clone(), Epoch(2))]
    );
    assert_eq!(
        fs::read_to_string(bench.path("staging/data")).unwrap(),
        "kept"
    );
    let answer = bench.node.release(&bench.volume, Epoch(2)).await;
    assert!(
        matches!(answer, NodeAnswer::Shut { held: Some(_), .. }),
        "{answer:?}"
    );
    assert!(bench.live().is_empty());
    // The dead mount is NodeUnstage's.
    bench.unstage().await.unwrap();
    assert!(!bench.is_mounted("staging"));
    assert_eq!(
        bench.node.release(&bench.volume, Epoch(2)).await,
        NodeAnswer::Clean
    );
}

#[tokio::test]
async fn root_what_is_not_the_volumes_is_left_alone() {
    let bench = Bench::new(64);
    fs::create_dir(bench.path("staging")).unwrap();
    sh(&format!(
        "mount -t tmpfs none {}",
        bench.path("staging").display()
    ));
    for result in [
        bench.stage(mount(FsType::Ext4)).await,
        bench.unstage().await,
        bench
            .node
            .unpublish(&bench.volume, &bench.path("staging"))
            .await,
    ] {
        assert!(result.is_err());
    }
    assert!(bench.is_mounted("staging"));
    for name in ["staging", "nowhere", "no/such/folder"] {
        let error = bench
            .node
            .stats(&bench.volume, &bench.path(name))
            .await
            .unwrap_err();
        assert!(matches!(error, NodeError::NotThere { .. }), "{error}");
    }
    bench.answer(Err(ControlError::NotPublished {
        volume: bench.volume.clone(),
        node: "node-a".parse().unwrap(),
    }));
    let error = bench.stage(Access::Block).await.unwrap_err();
    assert!(matches!(error, NodeError::Control(_)), "{error}");
    bench.grant(1, false);
    bench.change(|a| a.exported.target.name = format!("{NQN_PREFIX}vol-2:1:r1"));
    let error = bench.stage(Access::Block).await.unwrap_err();
    assert!(error.to_string().contains("vol-2"), "{error}");
}

#[tokio::test]
async fn root_another_namespace_identity_is_refused() {
    let bench = Bench::new(64);
    bench.stage(Access::Block).await.unwrap();
    bench.change(|a| a.exported.target.unit = Uuid::from_u128(99));
    let error = bench.stage(mount(FsType::Ext4)).await.unwrap_err();
    assert!(matches!(error, NodeError::Unusable(_)), "{error}");
    let shown = bench.path("staging");
    assert!(Path::new(&shown).exists() && !bench.is_mounted("staging"));
}

//! Who still holds a volume that is unstaged, and what becomes of what they
//! wrote. Needs root and loop devices.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use super::bench::{Bench, mount, sh};
use super::*;
use crate::attach::ports::{Access, FsType, Node, Staging, Verdict};

fn disk(bench: &Bench) -> Disk {
    let attached = bench.fabric.attached().unwrap();
    attached[0].device.clone().unwrap().disk
}

fn is_in_the_backing_file(bench: &Bench, what: &[u8]) -> bool {
    let data = fs::read(bench.path("backing")).unwrap();
    data.windows(what.len()).any(|window| window == what)
}

/// A file below the pod's target that stays open while the target is taken away.
async fn kept_open(bench: &Bench, fs: FsType) -> fs::File {
    bench.stage(mount(fs)).await.unwrap();
    bench.publish(mount(fs), "pod", false).await.unwrap();
    let open = fs::File::create(bench.path("pod/open")).unwrap();
    let pod = bench.path("pod");
    bench.node.unpublish(&bench.volume, &pod).await.unwrap();
    open
}

#[tokio::test]
async fn root_what_was_written_through_a_detached_mount_is_written_back_before_the_cut() {
    for (fs, mib) in [(FsType::Ext4, 64), (FsType::Xfs, 320)] {
        let bench = Bench::new(mib);
        let open = kept_open(&bench, fs).await;
        open.write_all_at(b"acknowledged", 0).unwrap();
        bench.change(|a| a.busy_deadline = Duration::ZERO);
        bench.unstage().await.unwrap();
        assert!(is_in_the_backing_file(&bench, b"acknowledged"), "{fs:?}");
    }
}

#[tokio::test]
async fn root_what_a_claimed_raw_device_has_is_written_back_before_the_cut() {
    let bench = Bench::new(16);
    bench.stage(Access::Block).await.unwrap();
    let mut claim = fs::OpenOptions::new();
    claim.write(true).custom_flags(libc::O_EXCL);
    let open = claim.open(disk(&bench).path()).unwrap();
    open.write_all_at(b"acknowledged", 4096).unwrap();
    bench.change(|a| a.busy_deadline = Duration::ZERO);
    bench.unstage().await.unwrap();
    // The last close of a loop device would write it back as well.
    assert!(is_in_the_backing_file(&bench, b"acknowledged"));
    drop(open);
}

#[tokio::test]
async fn root_a_volume_whose_file_system_lives_on_is_staged_again() {
    for (fs, mib) in [(FsType::Ext4, 64), (FsType::Xfs, 320)] {
        let bench = Bench::new(mib);
        let open = kept_open(&bench, fs).await;
        let refused = bench.unstage().await.unwrap_err();
        assert!(matches!(refused, NodeError::Busy(_)), "{refused}");
        assert!(!bench.is_mounted("staging"));
        bench.change(|a| a.exported.ever_written = true);
        bench.stage(mount(fs)).await.unwrap();
        open.write_all_at(b"one super block", 0).unwrap();
        let seen = fs::read(bench.path("staging/open")).unwrap();
        assert_eq!(seen, b"one super block", "{fs:?}");
        drop(open);
        bench.unstage().await.unwrap();
    }
}

#[tokio::test]
async fn root_a_volume_that_is_staged_again_has_the_whole_time_again() {
    for remounted in [false, true] {
        let bench = Bench::new(64);
        let open = match remounted {
            // The staging mount stays.
            false => {
                bench.stage(mount(FsType::Ext4)).await.unwrap();
                fs::File::create(bench.path("staging/open")).unwrap()
            }
            // It goes, and an open file below the pod's target keeps the disk.
            true => kept_open(&bench, FsType::Ext4).await,
        };
        *bench.eye.0.lock().unwrap() = Verdict::Live;
        bench.change(|a| a.busy_deadline = Duration::from_millis(1500));
        let refused = bench.unstage().await.unwrap_err();
        assert!(matches!(refused, NodeError::Busy(_)), "{refused}");
        assert_eq!(bench.is_mounted("staging"), !remounted);
        bench.stage(mount(FsType::Ext4)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let refused = bench.unstage().await.unwrap_err();
        assert!(matches!(refused, NodeError::Busy(_)), "{refused}");
        assert_eq!(bench.live().len(), 1, "cut off by an old clock");
        drop(open);
    }
}

#[tokio::test]
async fn root_a_registered_reader_hides_no_writer_that_only_the_kernel_knows() {
    for (fs, mib) in [(FsType::Ext4, 64), (FsType::Xfs, 320)] {
        let bench = Bench::new(mib);
        bench.stage(mount(fs)).await.unwrap();
        let file = fs::File::create(bench.path("staging/file")).unwrap();
        let _reader = fs::File::open(bench.path("staging/file")).unwrap();
        let ring = io_uring::IoUring::new(4).unwrap();
        ring.submitter()
            .register_files(&[file.as_raw_fd()])
            .unwrap();
        drop(file);
        *bench.eye.0.lock().unwrap() = Verdict::BackupRunning;
        let refused = bench.unstage().await.unwrap_err();
        assert!(
            refused.to_string().contains("open for writing"),
            "{refused}"
        );
        assert_eq!(bench.live().len(), 1);
        // Nobody's writes have ended.
        fs::write(bench.path("staging/more"), "taken").unwrap();
        ring.submitter().unregister_files().unwrap();
        bench.unstage().await.unwrap();
        assert!(bench.live().is_empty() && !bench.is_mounted("staging"));
        assert!(is_in_the_backing_file(&bench, b"taken"), "{fs:?}");
    }
}

#[tokio::test]
async fn root_a_volume_that_the_controller_does_not_know_is_not_cut_off_at_once() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    let _open = fs::File::create(bench.path("staging/open")).unwrap();
    *bench.eye.0.lock().unwrap() = Verdict::Live;
    bench.answer(Err(ControlError::NoVolume(bench.volume.clone())));
    let refused = bench.unstage().await.unwrap_err();
    assert!(matches!(refused, NodeError::Busy(_)), "{refused}");
    assert_eq!(bench.live().len(), 1);
}

#[tokio::test]
async fn root_a_mount_that_drover_did_not_make_is_nobodys_own() {
    let bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    bench
        .publish(mount(FsType::Ext4), "pod", false)
        .await
        .unwrap();
    let strange = bench.path("mnt");
    fs::create_dir(&strange).unwrap();
    let device = disk(&bench).path();
    sh(&format!("mount {} {}", device.display(), strange.display()));
    let places = ["staging", "pod"].map(|name| resolve(&bench.path(name)).unwrap().unwrap());
    let (_, own) = bench.node.disk(&bench.volume).unwrap().unwrap();
    assert_eq!(own, places);
    assert_eq!(bench.node.disks().unwrap()[0].mounts, places);
    bench.node.release(&bench.volume, Epoch(1)).await;
    assert_eq!(*bench.eye.1.lock().unwrap(), places);
    let pod = bench.path("pod");
    bench.node.unpublish(&bench.volume, &pod).await.unwrap();
    bench.unstage().await.unwrap();
}

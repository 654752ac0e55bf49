//! Pools on real file systems. Those whose names end in `needs_root` mount
//! loop devices.

use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::process::{Command, Stdio};

use super::record::{ExportState, Record};
use super::testing::{MIB, Mounted, config, node, open, plain};
use super::*;
use crate::attach::ports::Content;
use crate::block::{BLOCK, BlockDevice};
use crate::ids::Lba;

fn volume(id: &str) -> VolumeId {
    id.parse().unwrap()
}

fn snapshot(id: &str) -> SnapshotId {
    id.parse().unwrap()
}

fn block_of(path: &Path, block: u64) -> Vec<u8> {
    let mut found = vec![0; BLOCK as usize];
    let file = std::fs::File::open(path).unwrap();
    file.read_exact_at(&mut found, block * BLOCK).unwrap();
    found
}

fn write_block(path: &Path, block: u64, byte: u8) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[byte; BLOCK as usize], block * BLOCK)
        .unwrap();
}

#[test]
fn a_pool_is_found_again_with_all_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    let id = volume("vol-1");
    pool.create(&id, Bytes(8 * MIB), &Content::Empty).unwrap();
    let of = pool.volume(&id).unwrap();
    assert!(!of.record().get().ever_written);
    of.record()
        .update(|record| record.highest = crate::ids::Epoch(7))
        .unwrap();
    let (uuid, incarnation) = (pool.uuid(), pool.incarnation());
    drop((of, pool));

    let pool = open(folder.path()).unwrap();
    assert_eq!(pool.uuid(), uuid);
    assert_eq!(pool.incarnation(), incarnation + 1);
    assert_eq!(pool.volumes(), std::slice::from_ref(&id));
    let found = pool.volume(&id).unwrap();
    assert_eq!(found.size(), Bytes(8 * MIB));
    assert_eq!(found.record().get().highest, crate::ids::Epoch(7));
    assert_eq!(pool.census().unwrap().provisioned, Bytes(8 * MIB));
}

#[test]
fn a_repeated_create_changes_nothing_and_another_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    let id = volume("vol-1");
    pool.create(&id, Bytes(MIB), &Content::Empty).unwrap();
    write_block(&pool.volume_path(&id).unwrap(), 0, 5);
    assert_eq!(pool.expand(&id, Bytes(2 * MIB)).unwrap(), Bytes(2 * MIB));
    pool.create(&id, Bytes(MIB), &Content::Empty).unwrap();
    assert_eq!(block_of(&pool.volume_path(&id).unwrap(), 0)[0], 5);
    assert_eq!(pool.volume(&id).unwrap().size(), Bytes(2 * MIB));
    let error = pool.create(&id, Bytes(3 * MIB), &Content::Empty);
    assert!(matches!(error, Err(PoolError::Conflict(_))));
    // Never smaller.
    assert_eq!(pool.expand(&id, Bytes(MIB)).unwrap(), Bytes(2 * MIB));
}

#[test]
fn impossible_sizes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    for size in [0, 1, 4095, MIB + 1, u64::MAX, 1 << 63] {
        let error = pool
            .create(&volume("vol-1"), Bytes(size), &Content::Empty)
            .unwrap_err();
        assert!(
            matches!(error, PoolError::BadSize { .. }),
            "{size}: {error}"
        );
    }
    assert!(pool.volumes().is_empty());
}

#[test]
fn more_than_the_limits_allow_is_not_promised() {
    let folder = tempfile::tempdir().unwrap();
    let limits = PoolConfig {
        overcommit_percent: 100,
        ..config()
    };
    let pool = Pool::open(folder.path(), &node("a"), limits).unwrap();
    let room = pool.capacity().unwrap();
    let most = Bytes(room.available.0 / BLOCK * BLOCK);
    assert!(most < room.total);
    let too_much = pool.create(&volume("vol-1"), Bytes(most.0 + BLOCK), &Content::Empty);
    assert!(matches!(too_much, Err(PoolError::NoSpace { .. })));
    pool.create(&volume("vol-1"), most, &Content::Empty)
        .unwrap();
    let error = pool
        .expand(&volume("vol-1"), Bytes(most.0 + BLOCK))
        .unwrap_err();
    assert!(error.is_full(), "{error}");
    assert_eq!(pool.volume(&volume("vol-1")).unwrap().size(), most);
    pool.delete(&volume("vol-1")).unwrap();
    assert_eq!(pool.census().unwrap().provisioned, Bytes(0));
}

#[test]
fn available_room_follows_its_rule() {
    let room = |total, free| files::Room {
        total: Bytes(total),
        free: Bytes(free),
    };
    let limits = PoolConfig {
        low_water: Bytes(10),
        overcommit_percent: 150,
        ..config()
    };
    assert_eq!(available(&limits, room(1000, 500), 0), 1485);
    assert_eq!(available(&limits, room(1000, 500), 1400), 85);
    assert_eq!(available(&limits, room(1000, 500), 5000), 0);
    assert_eq!(available(&limits, room(1000, 10), 0), 0);
    // A small file system: the mark is a tenth of it.
    assert_eq!(available(&limits, room(50, 6), 0), 67);
    assert_eq!(available(&limits, room(50, 5), 0), 0);
}

#[test]
fn another_nodes_pool_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    drop(Pool::open(folder.path(), &node("a.example"), config()).unwrap());
    let error = Pool::open(folder.path(), &node("b"), config()).unwrap_err();
    assert!(matches!(error, PoolError::ForeignNode { .. }));
    assert!(error.to_string().contains("a.example"), "{error}");
}

#[test]
fn a_folder_of_other_things_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("letter.txt"), "dear").unwrap();
    let error = open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("letter.txt"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_pool_that_lost_its_superblock_is_not_taken_for_a_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    pool.create(&volume("vol-1"), Bytes(MIB), &Content::Empty)
        .unwrap();
    drop(pool);
    let superblock = folder.path().join("superblock");
    let kept = std::fs::read(&superblock).unwrap();
    std::fs::write(&superblock, vec![0; kept.len()]).unwrap();
    assert!(matches!(
        open(folder.path()),
        Err(PoolError::Damaged { .. })
    ));
    std::fs::remove_file(&superblock).unwrap();
    let error = open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("volumes/vol-1"), "{error}");
    std::fs::write(&superblock, kept).unwrap();
    assert_eq!(open(folder.path()).unwrap().volumes(), [volume("vol-1")]);
}

#[test]
fn a_crash_in_the_first_open_is_mended_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    for left in ["lock", "superblock.new"] {
        std::fs::write(folder.path().join(left), "torn").unwrap();
    }
    std::fs::create_dir(folder.path().join("volumes")).unwrap();
    assert!(open(folder.path()).unwrap().volumes().is_empty());
}

#[test]
fn what_a_crash_left_half_made_or_half_removed_goes() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    pool.create(&volume("vol-1"), Bytes(MIB), &Content::Empty)
        .unwrap();
    drop(pool);
    let volumes = folder.path().join("volumes");
    for left in [".new-vol-2", ".gone-vol-3"] {
        std::fs::create_dir(volumes.join(left)).unwrap();
        std::fs::write(volumes.join(left).join("data"), "x").unwrap();
    }
    // An attempt that was renamed and never answered for.
    let pool = open(folder.path()).unwrap();
    assert_eq!(pool.volumes(), [volume("vol-1")]);
    assert_eq!(std::fs::read_dir(&volumes).unwrap().count(), 1);
    std::fs::create_dir(volumes.join("vol-4")).unwrap();
    std::fs::write(volumes.join("vol-4").join("data"), "x").unwrap();
    pool.create(&volume("vol-4"), Bytes(MIB), &Content::Empty)
        .unwrap();
    let path = pool.volume_path(&volume("vol-4")).unwrap();
    assert_eq!(std::fs::metadata(path).unwrap().len(), MIB);
}

#[test]
fn what_cannot_be_read_in_its_place_leaves_no_folder_behind() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    let volumes = folder.path().join(VOLUMES);
    let [new, place, gone] =
        [".new-vol-1", "vol-1", ".gone-vol-1"].map(|name| Path::new(VOLUMES).join(name));
    std::fs::create_dir(folder.path().join(&new)).unwrap();
    std::fs::write(folder.path().join(&new).join("data"), "x").unwrap();
    let seen = volumes.join("vol-1/data");
    let failed = pool.root.appear(&new, &place, &gone, || {
        assert!(seen.exists(), "in its place");
        Err::<(), _>(PoolError::Conflict("once".into()))
    });
    assert!(matches!(failed, Err(PoolError::Conflict(_))), "{failed:?}");
    assert_eq!(std::fs::read_dir(&volumes).unwrap().count(), 0);
    let id = volume("vol-1");
    pool.create(&id, Bytes(MIB), &Content::Empty).unwrap();
    drop(pool);
    assert_eq!(open(folder.path()).unwrap().volumes(), [id]);
}

#[test]
fn a_damaged_record_is_named_and_keeps_nobody_else_from_being_served() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    for id in ["vol-1", "vol-2", "vol-3"] {
        pool.create(&volume(id), Bytes(MIB), &Content::Empty)
            .unwrap();
    }
    drop(pool);
    let record = folder.path().join("volumes/vol-1/record");
    std::fs::write(
        &record,
        vec![7; std::fs::metadata(&record).unwrap().len() as usize],
    )
    .unwrap();
    // A record in another's folder is no record of this volume.
    std::fs::copy(
        folder.path().join("volumes/vol-2/record"),
        folder.path().join("volumes/vol-3/record"),
    )
    .unwrap();
    let pool = open(folder.path()).unwrap();
    assert_eq!(pool.volumes().len(), 3);
    for id in ["vol-1", "vol-3"] {
        let error = pool.volume(&volume(id)).unwrap_err();
        assert!(matches!(error, PoolError::Damaged { .. }));
        assert!(
            error.to_string().contains(&format!("{id}/record")),
            "{error}"
        );
        assert!(pool.delete(&volume(id)).is_err());
        assert!(
            pool.create(&volume(id), Bytes(MIB), &Content::Empty)
                .is_err()
        );
    }
    pool.volume(&volume("vol-2")).unwrap();
    assert_eq!(pool.census().unwrap().damaged, 2);
}

#[test]
fn a_symbolic_link_is_never_followed() {
    let folder = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, vec![1; MIB as usize]).unwrap();
    let pool = open(folder.path()).unwrap();
    let id = volume("vol-1");
    pool.create(&id, Bytes(MIB), &Content::Empty).unwrap();
    let data = pool.volume_path(&id).unwrap();
    std::fs::remove_file(&data).unwrap();
    symlink(&secret, &data).unwrap();
    assert!(pool.device(&id, &plain()).is_err());
    assert!(pool.expand(&id, Bytes(2 * MIB)).is_err());
    assert_eq!(std::fs::metadata(&secret).unwrap().len(), MIB);
    drop(pool);
    assert!(open(folder.path()).unwrap().volume(&id).is_err());

    std::fs::remove_dir_all(folder.path().join("volumes")).unwrap();
    symlink(outside.path(), folder.path().join("volumes")).unwrap();
    assert!(open(folder.path()).is_err());
    assert!(secret.exists());
}

#[test]
fn a_second_owner_is_told_who_the_first_is() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new("flock")
        .args(["--no-fork", "-x"])
        .arg(folder.path().join("lock"))
        .args(["sh", "-c", "printf '%-20s\\n' $$ >&0; exec sleep 60"])
        .stdin(
            std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(folder.path().join("lock"))
                .unwrap(),
        )
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let holder = format!("pid {} (", child.id());
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let error = loop {
        // Until the child has the lock and noted its pid, anything may come.
        match open(folder.path()) {
            Err(error) if error.to_string().contains(&holder) => break Some(error),
            _ if std::time::Instant::now() > deadline => break None,
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    child.kill().unwrap();
    child.wait().unwrap();
    let error = error.expect("the holder's pid was never told");
    assert!(matches!(error, PoolError::Held { .. }), "{error}");
    // Its end frees the pool.
    open(folder.path()).unwrap();
}

#[test]
fn the_lock_stays_with_whoever_could_still_write() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    let id = volume("vol-1");
    pool.create(&id, Bytes(MIB), &Content::Empty).unwrap();
    let device = pool.device(&id, &plain()).unwrap();
    let ring = pool.lock().file();
    drop(pool);
    let error = open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("this very process"), "{error}");
    drop(device);
    assert!(matches!(open(folder.path()), Err(PoolError::Held { .. })));
    drop(ring);
    open(folder.path()).unwrap();
}

#[test]
fn a_lock_that_comes_free_in_time_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    let dir = folder.path().to_owned();
    let patient = PoolConfig {
        lock_wait: Duration::from_secs(20),
        ..config()
    };
    let second = std::thread::spawn(move || Pool::open(&dir, &node("a"), patient).map(drop));
    drop(pool);
    second.join().unwrap().unwrap();
}

#[test]
fn btrfs_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let error = Pool::open_on(
        Root::open(folder.path()).unwrap(),
        nix::sys::statfs::BTRFS_SUPER_MAGIC,
        &node("a"),
        config(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("page cache"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn the_first_write_is_on_record_before_it_is_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    let id = volume("vol-1");
    pool.create(&id, Bytes(MIB), &Content::Empty).unwrap();
    let record = folder.path().join("volumes/vol-1/record");
    let noted = move || {
        let found = std::fs::read(&record).unwrap();
        let text = String::from_utf8_lossy(&found).into_owned();
        text.contains("\"ever_written\":true")
    };
    let seen = Arc::new(Mutex::new(Vec::new()));
    let probe: device::OpenBacking = {
        let (seen, noted) = (Arc::clone(&seen), noted.clone());
        Arc::new(move |file, path, size| {
            let inner = plain()(file, path, size)?;
            Ok(Arc::new(Probe {
                inner,
                noted: Box::new(noted.clone()),
                seen: Arc::clone(&seen),
            }) as Arc<dyn device::Backing>)
        })
    };
    let device = pool.device(&id, &probe).unwrap();
    let mut buffer = vec![1; BLOCK as usize];
    device.read(Lba(0), &mut buffer).unwrap();
    device.flush().unwrap();
    device.deallocate(Lba(0), 1).unwrap();
    assert!(!noted(), "nothing has been written yet");
    device.write(Lba(0), &buffer, false).unwrap();
    device.write_zeroes(Lba(1), 1, false).unwrap();
    assert_eq!(*seen.lock().unwrap(), [true, true]);
    assert!(pool.volume(&id).unwrap().record().get().ever_written);
}

/// Looks, when a write comes through, whether the record says so already.
struct Probe {
    inner: Arc<dyn device::Backing>,
    noted: Box<dyn Fn() -> bool + Send + Sync>,
    seen: Arc<Mutex<Vec<bool>>>,
}

impl device::Backing for Probe {
    fn grow(&self, size: Bytes) {
        self.inner.grow(size);
    }
}

impl BlockDevice for Probe {
    fn size(&self) -> Bytes {
        self.inner.size()
    }
    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), crate::block::DeviceError> {
        self.inner.read(lba, buffer)
    }
    fn write(&self, lba: Lba, data: &[u8], f: bool) -> Result<(), crate::block::DeviceError> {
        self.seen.lock().unwrap().push((self.noted)());
        self.inner.write(lba, data, f)
    }
    fn flush(&self) -> Result<(), crate::block::DeviceError> {
        self.inner.flush()
    }
    fn write_zeroes(
        &self,
        lba: Lba,
        blocks: u64,
        unmap: bool,
    ) -> Result<(), crate::block::DeviceError> {
        self.seen.lock().unwrap().push((self.noted)());
        self.inner.write_zeroes(lba, blocks, unmap)
    }
    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), crate::block::DeviceError> {
        self.inner.deallocate(lba, blocks)
    }
}

#[test]
fn snapshots_and_clones_on_xfs_needs_root() {
    let fs = Mounted::xfs();
    let pool = open(&fs.pool()).unwrap();
    assert!(pool.reflink());
    let (id, snap) = (volume("vol-1"), snapshot("snap-1"));
    pool.create(&id, Bytes(8 * MIB), &Content::Empty).unwrap();
    let path = pool.volume_path(&id).unwrap();
    write_block(&path, 3, 1);
    let taken = pool.snapshot(&id, &snap).unwrap();
    assert_eq!((taken.size, &taken.volume), (Bytes(8 * MIB), &id));
    write_block(&path, 3, 2);
    // The same request again is the same snapshot, of the same instant.
    assert_eq!(pool.snapshot(&id, &snap).unwrap(), taken);
    assert_eq!(block_of(&pool.snapshot_path(&snap).unwrap(), 3)[0], 1);
    assert!(matches!(
        pool.snapshot(&volume("vol-9"), &snap),
        Err(PoolError::Conflict(_))
    ));
    assert!(matches!(
        pool.snapshot(&volume("vol-9"), &snapshot("snap-9")),
        Err(PoolError::NoVolume(_))
    ));

    let of_snapshot = volume("vol-2");
    let content = Content::Snapshot(snap.clone());
    let smaller = pool.create(&of_snapshot, Bytes(4 * MIB), &content);
    assert!(matches!(smaller, Err(PoolError::BadSize { .. })));
    pool.create(&of_snapshot, Bytes(16 * MIB), &content)
        .unwrap();
    let cloned = pool.volume(&of_snapshot).unwrap();
    assert!(cloned.record().get().ever_written, "a clone is never blank");
    assert_eq!(block_of(cloned.path(), 3)[0], 1);
    assert_eq!(block_of(cloned.path(), 4000)[0], 0);
    write_block(cloned.path(), 3, 9);
    assert_eq!(block_of(&pool.snapshot_path(&snap).unwrap(), 3)[0], 1);

    let of_volume = volume("vol-3");
    pool.create(&of_volume, Bytes(8 * MIB), &Content::Volume(id.clone()))
        .unwrap();
    assert_eq!(block_of(&pool.volume_path(&of_volume).unwrap(), 3)[0], 2);

    // A snapshot outlives its volume, and a restart.
    pool.delete(&id).unwrap();
    pool.delete(&id).unwrap();
    drop((cloned, pool));
    let pool = open(&fs.pool()).unwrap();
    assert_eq!(pool.snapshots(), [taken]);
    assert_eq!(block_of(&pool.snapshot_path(&snap).unwrap(), 3)[0], 1);
    pool.delete_snapshot(&snap).unwrap();
    pool.delete_snapshot(&snap).unwrap();
    assert!(matches!(
        pool.snapshot_path(&snap),
        Err(PoolError::NoSnapshot(_))
    ));
    let lost = pool.create(&volume("vol-4"), Bytes(8 * MIB), &content);
    assert!(matches!(lost, Err(PoolError::NoSnapshot(_))));
    assert_eq!(pool.volumes().len(), 2);
}

#[test]
fn a_truncated_snapshot_is_not_served_and_can_be_deleted_needs_root() {
    let fs = Mounted::xfs();
    let pool = open(&fs.pool()).unwrap();
    let (id, snap) = (volume("vol-1"), snapshot("snap-1"));
    pool.create(&id, Bytes(MIB), &Content::Empty).unwrap();
    pool.snapshot(&id, &snap).unwrap();
    let data = pool.snapshot_path(&snap).unwrap();
    drop(pool);
    std::fs::OpenOptions::new()
        .write(true)
        .open(data)
        .unwrap()
        .set_len(BLOCK)
        .unwrap();
    let pool = open(&fs.pool()).unwrap();
    assert!(matches!(
        pool.snapshot_path(&snap),
        Err(PoolError::Damaged { .. })
    ));
    assert!(
        pool.snapshot(&id, &snap).is_err(),
        "never taken anew under the same id"
    );
    pool.delete_snapshot(&snap).unwrap();
    pool.snapshot(&id, &snap).unwrap();
}

#[test]
fn a_full_pool_still_opens_and_still_changes_its_records_needs_root() {
    let fs = Mounted::xfs();
    let pool = open(&fs.pool()).unwrap();
    let id = volume("vol-1");
    pool.create(&id, Bytes(64 * MIB), &Content::Empty).unwrap();
    drop(pool);
    let _filling = fs.fill();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(fs.pool().join("volumes/vol-1/data"))
        .unwrap();
    let error = (0..16384).find_map(|block| {
        let written = file.write_all_at(&[1; BLOCK as usize], block * BLOCK);
        written.and_then(|()| file.sync_data()).err()
    });
    assert_eq!(error.unwrap().raw_os_error(), Some(nix::libc::ENOSPC));

    let pool = open(&fs.pool()).unwrap();
    assert!(pool.reflink(), "what was found before counts");
    let of = pool.volume(&id).unwrap();
    for epoch in 1..50 {
        of.record()
            .update(|record| {
                record.highest = crate::ids::Epoch(epoch);
                record.ever_written = true;
            })
            .unwrap();
    }
    assert_eq!(pool.capacity().unwrap().available, Bytes(0));
    for refused in [
        pool.create(&volume("vol-2"), Bytes(MIB), &Content::Empty),
        pool.snapshot(&id, &snapshot("snap-1")).map(drop),
        pool.expand(&id, Bytes(128 * MIB)).map(drop),
    ] {
        let error = refused.unwrap_err();
        assert!(error.is_full(), "{error}");
    }
    assert_eq!(pool.volumes(), std::slice::from_ref(&id));
    drop((of, pool));
    let pool = open(&fs.pool()).unwrap();
    let found = pool.volume(&id).unwrap().record().get();
    assert_eq!(found.highest, crate::ids::Epoch(49));
    pool.delete(&id).unwrap();
}

#[test]
fn without_reflink_a_pool_serves_volumes_and_refuses_snapshots_needs_root() {
    let fs = Mounted::ext4();
    let demanding = PoolConfig {
        require_reflink: true,
        ..config()
    };
    let error = Pool::open(&fs.pool(), &node("a"), demanding).unwrap_err();
    assert!(matches!(error, PoolError::NoReflink { .. }), "{error}");
    let pool = open(&fs.pool()).unwrap();
    assert!(!pool.reflink());
    let id = volume("vol-1");
    pool.create(&id, Bytes(MIB), &Content::Empty).unwrap();
    for refused in [
        pool.snapshot(&id, &snapshot("snap-1")).map(drop),
        pool.create(&volume("vol-2"), Bytes(MIB), &Content::Volume(id.clone())),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, PoolError::NoReflink { .. }), "{error}");
        assert!(error.to_string().contains("mkfs.xfs"), "{error}");
    }
    assert_eq!(pool.volumes(), [id]);
}

#[test]
fn a_sparse_volume_takes_no_room_before_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    let id = volume("vol-1");
    pool.create(&id, Bytes(256 * MIB), &Content::Empty).unwrap();
    let blocks = std::fs::metadata(pool.volume_path(&id).unwrap())
        .unwrap()
        .blocks();
    assert_eq!(blocks, 0);
}

#[test]
fn the_largest_record_fits_its_slot() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).unwrap();
    let id = volume(&"v".repeat(63));
    pool.create(&id, Bytes(MIB), &Content::Empty).unwrap();
    let of = pool.volume(&id).unwrap();
    let largest = |record: &mut Record| {
        for n in 0..100 {
            record.remember_closed(&format!("{n:0>223}"));
        }
        record.export = ExportState::Closing {
            export: record::OpenExport {
                epoch: crate::ids::Epoch(u64::MAX),
                node: node(&"n".repeat(253)),
                host: crate::attach::ports::HostIdentity {
                    // As long as JSON can make it.
                    nqn: "\u{1}".repeat(223),
                    id: Uuid::max(),
                    iqn: "i".repeat(223),
                    proves: true,
                },
                protocol: crate::attach::ports::Protocol::Iscsi,
                name: "s".repeat(223),
                unit: Uuid::max(),
                chap: Some(crate::attach::ports::Chap::fresh(
                    &"i".repeat(223),
                    &"s".repeat(223),
                )),
                read_only: false,
                failed_flush: Some("\u{1}".repeat(record::REASON_KEPT)),
            },
            inside: u32::MAX,
        };
    };
    let record = of.record().update(largest).unwrap();
    assert_eq!(record.closed.len(), record::CLOSED_KEPT);
    assert!(record.closed.last().unwrap().ends_with("99"));
    drop((of, pool));
    let pool = open(folder.path()).unwrap();
    assert_eq!(pool.volume(&id).unwrap().record().get(), record);
}

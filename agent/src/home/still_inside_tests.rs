//! What a volume refuses while commands are inside the closed gate of one of its
//! exports, and what it does not.

use super::*;
use crate::block::Extent;
use crate::block::file::FileDevice;

fn refusal(inside: u32) -> HomeError {
    HomeError::StillInside {
        volume: vol("vol-1"),
        epoch: Epoch(1),
        inside,
    }
}

async fn clone_of(bench: &Bench, content: Content) -> Result<(), HomeError> {
    bench
        .home
        .create(&vol("vol-2"), Bytes(2 * MIB), &content)
        .await
}

async fn snapshot(bench: &Bench, id: &str) -> Result<(), HomeError> {
    let id = id.parse().unwrap();
    bench.home.snapshot(&vol("vol-1"), &id).await.map(drop)
}

async fn expand(bench: &Bench, mib: u64) -> Result<Bytes, HomeError> {
    bench.home.expand(&vol("vol-1"), Bytes(mib * MIB)).await
}

/// Snapshots, clones and growth are refused, and nothing is begun.
async fn refuses(bench: &Bench, inside: u32) {
    let refusal = refusal(inside);
    assert_eq!(snapshot(bench, "snap-2").await.unwrap_err(), refusal);
    let clone = clone_of(bench, Content::Volume(vol("vol-1"))).await;
    assert_eq!(clone.unwrap_err(), refusal);
    let pool = bench.home.pool();
    assert!(pool.volume(&vol("vol-2")).is_err());
    assert!(pool.snapshot_info(&"snap-2".parse().unwrap()).is_err());
    assert_eq!(expand(bench, 2).await.unwrap_err(), refusal);
    assert_eq!(expand(bench, 1).await.unwrap(), Bytes(MIB), "no growth");
}

#[tokio::test]
async fn a_copy_or_growth_is_refused_until_the_last_command_has_left_needs_root() {
    let xfs = Mounted::xfs();
    let target = Arc::new(Target::default());
    let open: OpenBacking = Arc::new(|file, path, size| {
        let device = FileDevice::new(file, path, size)?;
        Ok(Arc::new(device) as _)
    });
    let pool = open_pool(&xfs.pool()).unwrap();
    let bench = Bench {
        folder: tempfile::tempdir().unwrap(),
        home: home_of(pool, &target, open, Duration::from_millis(20)),
        target,
    };
    let content = Content::Empty;
    let made = bench.home.create(&vol("vol-1"), Bytes(MIB), &content).await;
    made.unwrap();
    bench.export("a", 1).await.unwrap();
    let inside = bench.target.inside("vol-1", 3);
    // The commands of an open export are its host's affair.
    snapshot(&bench, "snap-1").await.unwrap();

    bench.fence(1, 1).await.unwrap_err();
    refuses(&bench, 3).await;
    inside.send_replace(2);
    bench.target.abandons.store(true, Ordering::SeqCst);
    let volume = vol("vol-1");
    let word = bench.home.accept_unsettled(&volume, Epoch(1), 2);
    assert_eq!(word.await.unwrap().settled_by, SettledBy::Operator);
    refuses(&bench, 2).await;
    bench.export("b", 2).await.unwrap();
    refuses(&bench, 2).await;
    // What was taken before is another file.
    snapshot(&bench, "snap-1").await.unwrap();
    let of_snapshot = Content::Snapshot("snap-1".parse().unwrap());
    clone_of(&bench, of_snapshot).await.unwrap();
    bench.home.delete(&vol("vol-2"), false).await.unwrap();

    // What would wait for them in the file system is done by plain writes.
    let device = bench.target.device("vol-1");
    device.write(Lba(0), &[7; 4 * 4096], false).unwrap();
    device.deallocate(Lba(1), 1).unwrap();
    assert_eq!(zeroes(&device), [0; 0], "nothing is given back");
    device.write_zeroes(Lba(1), 1, false).unwrap();
    device.write_zeroes(Lba(2), 1, true).unwrap();
    device.write_zeroes(Lba(255), 1, false).unwrap();
    assert_eq!(zeroes(&device), [1, 2]);
    let whole = Extent {
        blocks: 4,
        mapped: true,
    };
    assert_eq!(device.mapping(Lba(0), 4).unwrap(), whole);
    device.deallocate(Lba(255), 2).unwrap_err();
    device.write_zeroes(Lba(255), 2, false).unwrap_err();

    inside.send_replace(0);
    bench.fence(2, 2).await.unwrap();
    bench.export("a", 3).await.unwrap();
    let device = bench.target.device("vol-1");
    device.deallocate(Lba(0), 1).unwrap();
    assert_eq!(zeroes(&device), [0, 1, 2]);
    assert!(!device.mapping(Lba(0), 1).unwrap().mapped);
    snapshot(&bench, "snap-2").await.unwrap();
    let of_volume = Content::Volume(vol("vol-1"));
    clone_of(&bench, of_volume).await.unwrap();
    assert_eq!(expand(&bench, 2).await.unwrap(), Bytes(2 * MIB));
}

/// Which of the first four blocks are zeroes.
fn zeroes(device: &Arc<dyn BlockDevice>) -> Vec<usize> {
    let mut data = vec![0; 4 * 4096];
    device.read(Lba(0), &mut data).unwrap();
    let blocks = data.chunks(4096).enumerate();
    let zeroes = blocks.filter(|(_, block)| block.iter().all(|byte| *byte == 0));
    zeroes.map(|(block, _)| block).collect()
}

/// Every fence under writes has some inside for a moment.
#[tokio::test]
async fn a_growth_waits_for_commands_that_leave() {
    let folder = tempfile::tempdir().unwrap();
    let target = Arc::new(Target::default());
    let pool = open_pool(folder.path()).unwrap();
    let home = home_of(pool, &target, plain(), Duration::from_secs(60));
    let bench = Bench {
        folder,
        target,
        home,
    };
    let content = Content::Empty;
    let made = bench.home.create(&vol("vol-1"), Bytes(MIB), &content).await;
    made.unwrap();
    bench.export("a", 1).await.unwrap();
    let inside = bench.target.inside("vol-1", 3);
    let later = |ms| tokio::time::sleep(Duration::from_millis(ms));
    let grows = async {
        later(20).await;
        expand(&bench, 2).await
    };
    let leave = async {
        later(200).await;
        inside.send_replace(0);
    };
    let (fenced, grown, ()) = tokio::join!(bench.fence(1, 1), grows, leave);
    fenced.unwrap();
    assert_eq!(grown.unwrap(), Bytes(2 * MIB));
}

/// It stops nobody: there is no holder, and the file lives until they end.
#[tokio::test]
async fn a_volume_is_deleted_though_commands_were_let_go() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let _inside = bench.target.inside("vol-1", 1);
    bench.target.abandons.store(true, Ordering::SeqCst);
    bench.fence(1, 1).await.unwrap_err();
    let early = bench.home.delete(&vol("vol-1"), false).await;
    assert_eq!(early.unwrap_err(), stale(1), "its export has not ended");
    let volume = vol("vol-1");
    let word = bench.home.accept_unsettled(&volume, Epoch(1), 1);
    word.await.unwrap();
    bench.home.delete(&vol("vol-1"), false).await.unwrap();
}

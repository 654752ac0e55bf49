//! What a volume refuses while commands are inside the closed gate of one of its
//! exports, and what it does not.

use super::*;

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
    let bench = Bench {
        folder: tempfile::tempdir().unwrap(),
        home: home_over(open_pool(&xfs.pool()).unwrap(), &target),
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

    inside.send_replace(0);
    snapshot(&bench, "snap-2").await.unwrap();
    let of_volume = Content::Volume(vol("vol-1"));
    clone_of(&bench, of_volume).await.unwrap();
    assert_eq!(expand(&bench, 2).await.unwrap(), Bytes(2 * MIB));
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

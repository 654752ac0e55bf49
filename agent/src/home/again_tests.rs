//! An export that could not be opened again at the start.

use super::*;
use crate::block::DeviceError;

#[tokio::test]
async fn what_could_not_be_served_at_first_is_served_later() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let Bench {
        folder,
        home,
        target,
    } = bench;
    drop((home, target));
    let (target, fails) = (Arc::new(Target::default()), Arc::new(AtomicBool::new(true)));
    let theirs = Arc::clone(&fails);
    let open: OpenBacking = Arc::new(move |file, path, size| {
        if theirs.swap(false, Ordering::SeqCst) {
            let (call, errno) = ("open".to_owned(), nix::errno::Errno::EMFILE);
            return Err(DeviceError::Io { call, errno });
        }
        plain()(file, path, size)
    });
    let config = HomeConfig::at(
        "127.0.0.1:4420".parse().unwrap(),
        "127.0.0.1:3260".parse().unwrap(),
    );
    let pool = open_pool(folder.path()).unwrap();
    let home = Home::new(pool, Arc::clone(&target) as _, open, config);
    let restored = home.restore().await;
    assert_eq!((restored.open, restored.failed.len()), (0, 1));
    assert!(target.live().is_empty());
    let rest = home.restore_rest(restored);
    tokio::time::timeout(Duration::from_secs(20), rest)
        .await
        .unwrap();
    assert_eq!(target.live().len(), 1);
}

#[tokio::test]
async fn what_nobody_waits_for_is_not_tried_again() {
    let bench = Bench::with_volume().await;
    let gone = vol("vol-9");
    let restored = Restored {
        failed: vec![(gone.clone(), HomeError::NoVolume(gone))],
        ..Restored::default()
    };
    let rest = bench.home.restore_rest(restored);
    tokio::time::timeout(Duration::from_millis(500), rest)
        .await
        .unwrap();
}

//! A flush that failed ends an epoch's service, over restarts, snapshots and growth.

use super::*;
use crate::block::DeviceError;
use crate::pool::device::Backing;

/// A device whose next flush fails when a test says so. It does not latch by itself.
struct Flaky {
    inner: Arc<dyn Backing>,
    fails: Arc<AtomicBool>,
}

impl Backing for Flaky {
    fn grow(&self, size: Bytes) {
        self.inner.grow(size);
    }
}

impl BlockDevice for Flaky {
    fn size(&self) -> Bytes {
        self.inner.size()
    }
    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.inner.read(lba, buffer)
    }
    fn write(&self, lba: Lba, data: &[u8], fua: bool) -> Result<(), DeviceError> {
        self.inner.write(lba, data, fua)
    }
    fn flush(&self) -> Result<(), DeviceError> {
        if self.fails.swap(false, Ordering::SeqCst) {
            return Err(DeviceError::FlushFailed("fdatasync: EIO".into()));
        }
        self.inner.flush()
    }
    fn write_zeroes(&self, lba: Lba, blocks: u64, unmap: bool) -> Result<(), DeviceError> {
        self.inner.write_zeroes(lba, blocks, unmap)
    }
    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.inner.deallocate(lba, blocks)
    }
}

/// A home over the pool in `folder`, as a new process, and its device's fault.
async fn start(folder: &std::path::Path) -> (Home, Arc<Target>, Arc<AtomicBool>) {
    let (target, fails) = (
        Arc::new(Target::default()),
        Arc::new(AtomicBool::new(false)),
    );
    let theirs = Arc::clone(&fails);
    let open: OpenBacking = Arc::new(move |file, path, size| {
        let inner = plain()(file, path, size)?;
        let fails = Arc::clone(&theirs);
        Ok(Arc::new(Flaky { inner, fails }) as Arc<dyn Backing>)
    });
    let config = HomeConfig::at(
        "127.0.0.1:4420".parse().unwrap(),
        "127.0.0.1:3260".parse().unwrap(),
    );
    let pool = open_pool(folder).unwrap();
    let home = Home::new(pool, Arc::clone(&target) as _, open, config);
    home.restore().await;
    (home, target, fails)
}

/// Writes a block and flushes: whether a failed flush forbids it.
fn is_latched(target: &Target) -> bool {
    let device = target.device("vol-1");
    let mut block = [1; BLOCK as usize];
    let written = device.write(Lba(0), &block, false);
    let all = [
        written,
        device.flush(),
        device.read(Lba(0), &mut block),
        device.deallocate(Lba(1), 1),
    ];
    let latched = |one: &Result<_, _>| matches!(one, Err(DeviceError::FlushFailed(_)));
    let failed = all.iter().filter(|one| latched(one)).count();
    assert!(failed == 0 || failed == all.len(), "{all:?}");
    failed > 0
}

async fn create(home: &Home, volume: &str, content: Content) -> Result<(), HomeError> {
    home.create(&vol(volume), Bytes(MIB), &content).await
}

async fn snapshot(home: &Home) -> Result<(), HomeError> {
    let id = "snap-1".parse().unwrap();
    home.snapshot(&vol("vol-1"), &id).await.map(drop)
}

async fn fence(home: &Home, epoch: u64) -> Result<Settlement, HomeError> {
    let request = FenceRequest {
        volume: vol("vol-1"),
        epoch: Epoch(epoch),
        recorded: Recorded::begin_of(Epoch(epoch)),
    };
    home.fence(&request).await
}

#[tokio::test]
async fn after_a_failed_flush_the_epoch_is_not_served_by_a_successor_either() {
    let folder = tempfile::tempdir().unwrap();
    let (home, target, fails) = start(folder.path()).await;
    create(&home, "vol-1", Content::Empty).await.unwrap();
    home.export(&request("a", 1)).await.unwrap();
    assert!(!is_latched(&target));
    fails.store(true, Ordering::SeqCst);
    assert!(target.device("vol-1").flush().is_err());
    assert!(is_latched(&target));

    drop((home, target));
    let (home, target, _) = start(folder.path()).await;
    assert!(is_latched(&target), "after a restart");
    home.export(&request("a", 1)).await.unwrap();
    assert!(is_latched(&target), "after a repeated export");

    fence(&home, 1).await.unwrap();
    home.export(&request("b", 2)).await.unwrap();
    assert!(!is_latched(&target), "a new epoch");
    drop((home, target));
    let (_home, target, _) = start(folder.path()).await;
    assert!(!is_latched(&target));
}

/// Its flush fails under the next holder, whose epoch has nothing to do with it.
#[tokio::test]
async fn a_command_that_was_let_go_begins_nothing_and_taints_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let (home, target, _) = start(folder.path()).await;
    create(&home, "vol-1", Content::Empty).await.unwrap();
    home.export(&request("a", 1)).await.unwrap();
    let stuck = target.device("vol-1");
    let inside = target.inside("vol-1", 1);
    target.abandons.store(true, Ordering::SeqCst);
    fence(&home, 1).await.unwrap_err();
    let word = home.accept_unsettled(&vol("vol-1"), Epoch(1), 1).await;
    assert_eq!(word.unwrap().settled_by, SettledBy::Operator);
    home.export(&request("b", 2)).await.unwrap();

    let block = [7; BLOCK as usize];
    assert!(stuck.write(Lba(0), &block, false).is_err());
    assert!(stuck.direct(Lba(0), block.len(), true).is_none());
    assert!(!is_latched(&target));
    let failed = stuck.durable_write_failed(nix::errno::Errno::EIO);
    assert!(matches!(failed, DeviceError::FlushFailed(_)), "{failed}");
    inside.send_replace(0);
    drop((home, target, stuck));
    let (_home, target, _) = start(folder.path()).await;
    assert!(!is_latched(&target), "after a restart");
}

#[tokio::test]
async fn a_flush_that_fails_when_a_volume_grows_latches_what_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let (home, target, fails) = start(folder.path()).await;
    create(&home, "vol-1", Content::Empty).await.unwrap();
    home.export(&request("a", 1)).await.unwrap();
    fails.store(true, Ordering::SeqCst);
    let grown = home.expand(&vol("vol-1"), Bytes(2 * MIB)).await;
    assert!(grown.is_err(), "{grown:?}");
    assert!(is_latched(&target));
    let record = home.pool().volume(&vol("vol-1")).unwrap().record().get();
    assert_eq!(record.failed_flush(), Some("fdatasync: EIO"));
    // Nobody is served any more: the file's own descriptor does.
    fence(&home, 1).await.unwrap();
    let grown = home.expand(&vol("vol-1"), Bytes(2 * MIB)).await;
    assert_eq!(grown.unwrap(), Bytes(2 * MIB));
}

#[tokio::test]
async fn a_flush_that_fails_for_a_snapshot_or_a_clone_latches_what_is_served_needs_root() {
    let xfs = Mounted::xfs();
    let (home, target, fails) = start(&xfs.pool()).await;
    create(&home, "vol-1", Content::Empty).await.unwrap();
    for (epoch, of_a_snapshot) in [(1, true), (2, false)] {
        home.export(&request("a", epoch)).await.unwrap();
        assert!(!is_latched(&target));
        fails.store(true, Ordering::SeqCst);
        let failed = match of_a_snapshot {
            true => snapshot(&home).await,
            false => create(&home, "vol-2", Content::Volume(vol("vol-1"))).await,
        };
        assert!(failed.is_err());
        assert!(is_latched(&target));
        fence(&home, epoch).await.unwrap();
    }
    snapshot(&home).await.unwrap();
}

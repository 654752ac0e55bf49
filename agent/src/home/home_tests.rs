//! The home over real pools, with a scripted target.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use tokio::sync::watch;
use uuid::Uuid;

use super::*;
use crate::attach::ports::{Home as _, HostIdentity, LateCommands, Protocol, Recorded, SettledBy};
use crate::block::{BLOCK, BlockDevice};
use crate::export::{Ended, ExportSpec, Keeper, Kept, OpenError, Proof, Unsettled};
use crate::ids::{Lba, NodeId};
use crate::pool::record::ExportState;
use crate::pool::testing::{MIB, Mounted, open as open_pool, plain};

#[path = "again_tests.rs"]
mod again;
#[path = "flush_tests.rs"]
mod flush;
#[path = "still_inside_tests.rs"]
mod still_inside;

type Live = (ExportSpec, Arc<dyn BlockDevice>, watch::Sender<u32>, Kept);

/// A target without hosts: a test says how many commands are inside a gate.
#[derive(Default)]
struct Target {
    live: Mutex<BTreeMap<String, Live>>,
    closed: Mutex<BTreeSet<String>>,
    resized: Mutex<Vec<VolumeId>>,
    late: Mutex<u64>,
    /// Whether an export may end with commands inside.
    abandons: Arc<AtomicBool>,
    /// Gates that were closed.
    gates: Mutex<Vec<(VolumeId, Epoch, watch::Sender<u32>)>>,
}

impl Target {
    /// Puts `count` commands inside the gate of the volume's export.
    fn inside(&self, volume: &str, count: u32) -> watch::Sender<u32> {
        let live = self.live.lock().unwrap();
        let (_, _, inside, _) = live
            .values()
            .find(|(spec, ..)| spec.volume.as_str() == volume)
            .expect("a live export");
        inside.send_replace(count);
        inside.clone()
    }

    fn device(&self, volume: &str) -> Arc<dyn BlockDevice> {
        let live = self.live.lock().unwrap();
        let found = live
            .values()
            .find(|(spec, ..)| spec.volume.as_str() == volume);
        Arc::clone(&found.expect("a live export").1)
    }

    /// What was kept of the reservations of the volume's export, after
    /// `keeping` was done with who keeps them.
    fn kept(&self, volume: &str, keeping: impl FnOnce(&dyn Keeper)) -> Option<Vec<u8>> {
        let live = self.live.lock().unwrap();
        let mut live = live.values();
        let found = live.find(|(spec, ..)| spec.volume.as_str() == volume);
        let kept = &found.expect("a live export").3;
        keeping(kept.keeper.as_ref());
        kept.state.clone()
    }

    fn live(&self) -> Vec<String> {
        self.live.lock().unwrap().keys().cloned().collect()
    }

    fn is_closed(&self, subsystem: &str) -> bool {
        self.closed.lock().unwrap().contains(subsystem)
    }
}

impl Frontend for Target {
    fn open(
        &self,
        spec: ExportSpec,
        device: Arc<dyn BlockDevice>,
        reservations: Kept,
    ) -> Result<(), OpenError> {
        let mut live = self.live.lock().unwrap();
        assert!(live.values().all(|(other, ..)| other.volume != spec.volume));
        assert!(!self.is_closed(&spec.name));
        live.insert(
            spec.name.clone(),
            (spec, device, watch::Sender::new(0), reservations),
        );
        Ok(())
    }
    fn remember_closed(&self, subsystem: &str) {
        self.closed.lock().unwrap().insert(subsystem.to_owned());
    }
    fn close(&self, subsystem: &str) -> Option<Box<dyn ClosedGate>> {
        let (spec, _, inside, _) = self.live.lock().unwrap().remove(subsystem)?;
        let at_close = *inside.borrow();
        let gate = (spec.volume, spec.epoch, inside.clone());
        self.gates.lock().unwrap().push(gate);
        Some(Box::new(Gate {
            at_close,
            inside,
            abandons: Arc::clone(&self.abandons),
        }))
    }
    fn resized(&self, volume: &VolumeId) {
        self.resized.lock().unwrap().push(volume.clone());
    }
    fn late_refused(&self, _subsystem: &str) -> u64 {
        *self.late.lock().unwrap()
    }
    fn unsettled(&self, volume: &VolumeId) -> Option<Unsettled> {
        let gates = self.gates.lock().unwrap();
        gates.iter().find_map(|(of, epoch, inside)| {
            let (epoch, inside) = (*epoch, *inside.borrow());
            (of == volume && inside > 0).then_some(Unsettled { epoch, inside })
        })
    }
}

struct Gate {
    at_close: u32,
    inside: watch::Sender<u32>,
    abandons: Arc<AtomicBool>,
}

#[async_trait]
impl ClosedGate for Gate {
    fn inside_at_close(&self) -> u32 {
        self.at_close
    }
    async fn settled(&self, deadline: Duration) -> Result<Duration, u32> {
        let mut inside = self.inside.subscribe();
        let none = tokio::time::timeout(deadline, inside.wait_for(|inside| *inside == 0)).await;
        match none {
            Ok(_) => Ok(Duration::from_millis(5)),
            Err(_) => Err(*self.inside.borrow()),
        }
    }
    async fn end(self: Box<Self>) -> Ended {
        let abandons = self.abandons.load(Ordering::SeqCst);
        assert!(
            abandons || *self.inside.borrow() == 0,
            "ended with commands inside"
        );
        Ended {
            sessions: 3,
            late_refused: 1,
            last_write: Some(SystemTime::UNIX_EPOCH),
        }
    }
}

struct Bench {
    folder: tempfile::TempDir,
    target: Arc<Target>,
    home: Home,
}

fn home_over(pool: Arc<Pool>, target: &Arc<Target>) -> Home {
    home_of(pool, target, plain(), Duration::from_millis(20))
}

fn home_of(pool: Arc<Pool>, target: &Arc<Target>, open: OpenBacking, settle: Duration) -> Home {
    let mut config = HomeConfig::at(
        "127.0.0.1:4420".parse().unwrap(),
        "127.0.0.1:3260".parse().unwrap(),
    );
    config.settle = settle;
    Home::new(pool, Arc::clone(target) as _, open, config)
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let target = Arc::new(Target::default());
        let home = home_over(open_pool(folder.path()).unwrap(), &target);
        Self {
            folder,
            target,
            home,
        }
    }

    /// With volume `vol-1` of 1 MiB.
    async fn with_volume() -> Self {
        let bench = Self::new();
        let made = bench
            .home
            .create(&vol("vol-1"), Bytes(MIB), &Content::Empty)
            .await;
        made.unwrap();
        bench
    }

    /// A kill -9 and a new process over the same pool.
    fn restart(self) -> Self {
        let Self {
            folder,
            home,
            target,
        } = self;
        drop((home, target));
        let target = Arc::new(Target::default());
        let home = home_over(open_pool(folder.path()).unwrap(), &target);
        Self {
            folder,
            target,
            home,
        }
    }

    /// A copy of the volume's files.
    fn copied(&self) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        copy_files(&self.folder.path().join("volumes/vol-1"), copy.path());
        copy
    }

    /// The agent is stopped, the copy put back, and the agent started.
    async fn put_back(self, copy: &tempfile::TempDir) -> Self {
        let Self {
            folder,
            home,
            target,
        } = self;
        drop((home, target));
        copy_files(copy.path(), &folder.path().join("volumes/vol-1"));
        let target = Arc::new(Target::default());
        let home = home_over(open_pool(folder.path()).unwrap(), &target);
        home.restore().await;
        Self {
            folder,
            target,
            home,
        }
    }

    async fn export(&self, node: &str, epoch: u64) -> Result<Exported, HomeError> {
        self.home.export(&request(node, epoch)).await
    }

    async fn fence(&self, epoch: u64, recorded: u64) -> Result<Settlement, HomeError> {
        let recorded = Recorded::begin_of(Epoch(recorded));
        self.fence_knowing(epoch, recorded).await
    }

    async fn fence_knowing(&self, epoch: u64, recorded: Recorded) -> Result<Settlement, HomeError> {
        let request = FenceRequest {
            volume: vol("vol-1"),
            epoch: Epoch(epoch),
            recorded,
        };
        self.home.fence(&request).await
    }

    fn record(&self) -> crate::pool::record::Record {
        let volume = self.home.pool().volume(&vol("vol-1")).unwrap();
        volume.record().get()
    }
}

fn copy_files(from: &std::path::Path, to: &std::path::Path) {
    for file in ["data", "record", "meta"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

fn vol(id: &str) -> VolumeId {
    id.parse().unwrap()
}

fn request(node: &str, epoch: u64) -> ExportRequest {
    ExportRequest {
        volume: vol("vol-1"),
        epoch: Epoch(epoch),
        node: node.parse::<NodeId>().unwrap(),
        host: HostIdentity::of(
            format!("nqn.2014-08.org.nvmexpress:uuid:{node}"),
            Uuid::nil(),
        ),
        protocol: Protocol::NvmeTcp,
        read_only: false,
    }
}

fn stale(home: u64) -> HomeError {
    HomeError::StaleEpoch { home: Epoch(home) }
}

#[tokio::test]
async fn a_volume_moves_by_fence_and_export() {
    let bench = Bench::with_volume().await;
    let first = bench.export("a", 1).await.unwrap();
    assert!(!first.ever_written);
    assert_eq!(bench.export("a", 1).await.unwrap(), first, "a repeat");
    assert_eq!(bench.target.live(), [&*first.target.name]);
    let device = bench.target.device("vol-1");
    device.write(Lba(0), &[1; BLOCK as usize], true).unwrap();

    let settled = bench.fence(1, 1).await.unwrap();
    assert_eq!(settled.node, Some("a".parse().unwrap()));
    assert_eq!(settled.settled_by, SettledBy::Drained);
    assert_eq!((settled.sessions_ended, settled.inside_at_close), (3, 0));
    assert!(bench.target.is_closed(&first.target.name));
    assert!(bench.target.live().is_empty());
    assert_eq!(
        bench.export("a", 1).await.unwrap_err(),
        stale(1),
        "a late export"
    );

    let second = bench.export("b", 2).await.unwrap();
    assert!(second.ever_written);
    assert_ne!(second.target.name, first.target.name);
    assert_ne!(second.target.unit, first.target.unit);
    assert_eq!(
        bench.fence(1, 1).await.unwrap_err(),
        stale(2),
        "a late fence"
    );
    assert_eq!(bench.target.live(), [second.target.name]);
}

#[tokio::test]
async fn a_repeated_fence_has_the_same_answer_but_for_late_commands() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let settled = bench.fence(1, 1).await.unwrap();
    *bench.target.late.lock().unwrap() = 17;
    let mut again = bench.fence(1, 1).await.unwrap();
    assert_eq!(again.late_refused, 17);
    let late = LateCommands {
        volume: vol("vol-1"),
        epoch: Epoch(1),
        commands: 17,
    };
    assert_eq!(bench.home.late(), [late]);
    again.late_refused = settled.late_refused;
    assert_eq!(again, settled);
    // And after a restart, from the record.
    let bench = bench.restart();
    bench.home.restore().await;
    assert_eq!(bench.fence(1, 1).await.unwrap(), settled);
    assert_eq!(bench.home.late(), []);
}

#[tokio::test]
async fn no_settlement_while_a_command_is_inside() {
    let bench = Bench::with_volume().await;
    let exported = bench.export("a", 1).await.unwrap();
    let inside = bench.target.inside("vol-1", 2);
    let unsettled = HomeError::Unsettled { inside: 2 };
    assert_eq!(bench.fence(1, 1).await.unwrap_err(), unsettled);
    assert!(bench.target.live().is_empty(), "the gate is closed at once");
    assert!(matches!(
        bench.record().export,
        ExportState::Closing { inside: 2, .. }
    ));
    assert!(bench.record().settlement.is_none());
    assert_eq!(bench.export("a", 1).await.unwrap_err(), stale(1));
    assert!(bench.home.delete(&vol("vol-1"), false).await.is_err());
    inside.send_replace(1);
    let unsettled = HomeError::Unsettled { inside: 1 };
    assert_eq!(bench.fence(1, 1).await.unwrap_err(), unsettled);
    inside.send_replace(0);
    let settled = bench.fence(1, 1).await.unwrap();
    assert_eq!(
        settled.inside_at_close, 2,
        "the number at the closing stays"
    );
    assert!(bench.target.is_closed(&exported.target.name));
    bench.export("b", 2).await.unwrap();
}

#[tokio::test]
async fn commands_that_never_end_are_let_go_by_an_operators_word_alone() {
    let bench = Bench::with_volume().await;
    let volume = vol("vol-1");
    bench.export("a", 1).await.unwrap();
    let inside = bench.target.inside("vol-1", 3);
    let no_fence = bench.home.accept_unsettled(&volume, Epoch(1), 3).await;
    assert!(matches!(no_fence, Err(HomeError::Failed(_))));
    assert_eq!(bench.target.live().len(), 1, "it was no fence");
    let unsettled = HomeError::Unsettled { inside: 3 };
    assert_eq!(bench.fence(1, 1).await.unwrap_err(), unsettled);
    let fewer = bench.home.accept_unsettled(&volume, Epoch(1), 2).await;
    assert_eq!(fewer.unwrap_err(), unsettled);
    for other in [0, 2] {
        let other = bench.home.accept_unsettled(&volume, Epoch(other), 3).await;
        assert!(matches!(other, Err(HomeError::Failed(_))));
    }

    inside.send_replace(2);
    bench.target.abandons.store(true, Ordering::SeqCst);
    let settled = bench.home.accept_unsettled(&volume, Epoch(1), 3).await;
    let settled = settled.unwrap();
    assert_eq!(settled.settled_by, SettledBy::Operator);
    assert_eq!((settled.inside_at_close, settled.unsettled), (3, 2));
    assert!(settled.settle_time.is_zero());
    let again = bench.home.accept_unsettled(&volume, Epoch(1), 3).await;
    assert_eq!(again.unwrap(), settled);
    let mut fenced = bench.fence(1, 1).await.unwrap();
    fenced.late_refused = settled.late_refused;
    assert_eq!(fenced, settled);
    let bench = bench.restart();
    bench.home.restore().await;
    assert_eq!(bench.fence(1, 1).await.unwrap(), settled);
    bench.export("b", 2).await.unwrap();
}

#[tokio::test]
async fn a_fence_of_an_epoch_never_opened_keeps_it_closed() {
    let bench = Bench::with_volume().await;
    let settled = bench.fence(4, 0).await.unwrap();
    assert_eq!(settled.settled_by, SettledBy::NothingOpen);
    assert_eq!((settled.epoch, settled.node.clone()), (Epoch(4), None));
    assert_eq!(bench.export("a", 4).await.unwrap_err(), stale(4));
    assert_eq!(bench.fence(4, 0).await.unwrap(), settled);
    let bench = bench.restart();
    assert_eq!(bench.export("a", 4).await.unwrap_err(), stale(4));
    bench.export("a", 5).await.unwrap();
    // A higher fence ends what is open below it, and moves the record there.
    let settled = bench.fence(8, 0).await.unwrap();
    assert_eq!(
        (settled.epoch, settled.node),
        (Epoch(8), Some("a".parse().unwrap()))
    );
    assert_eq!(bench.export("a", 8).await.unwrap_err(), stale(8));
    bench.export("a", 9).await.unwrap();
}

#[tokio::test]
async fn a_record_behind_what_it_had_recorded_serves_nothing_until_accepted() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let behind = HomeError::RecordBehind {
        home: Epoch(1),
        recorded: Epoch(5),
    };
    assert_eq!(bench.fence(5, 5).await.unwrap_err(), behind);
    assert!(bench.target.live().is_empty());
    let bench = bench.restart();
    let restored = bench.home.restore().await;
    assert_eq!(restored.failed, [(vol("vol-1"), behind.clone())]);
    assert!(bench.target.live().is_empty());
    assert_eq!(bench.export("a", 6).await.unwrap_err(), behind);
    assert_eq!(bench.fence(5, 5).await.unwrap_err(), behind);
    assert_eq!(
        bench
            .home
            .restore_target(&vol("vol-1"))
            .await
            .map(drop)
            .unwrap_err(),
        behind
    );
    let snapshot = bench
        .home
        .snapshot(&vol("vol-1"), &"snap-1".parse().unwrap())
        .await;
    assert_eq!(snapshot.unwrap_err(), behind);

    assert_eq!(
        bench.home.accept_old_copy(&vol("vol-1")).await.unwrap(),
        Epoch(5)
    );
    assert_eq!(
        bench.home.accept_old_copy(&vol("vol-1")).await.unwrap(),
        Epoch(5)
    );
    assert_eq!(bench.export("a", 5).await.unwrap_err(), stale(5));
    assert_eq!(bench.fence(5, 5).await.unwrap().epoch, Epoch(5));
    bench.export("a", 6).await.unwrap();
}

/// With epochs 1 to 5 recorded, 5 of them closed, and a copy made at 3.
async fn with_an_old_copy() -> (Bench, tempfile::TempDir) {
    let bench = Bench::with_volume().await;
    for epoch in 1..=3 {
        bench.export("a", epoch).await.unwrap();
        bench.fence(epoch, epoch).await.unwrap();
    }
    let copy = bench.copied();
    for epoch in 4..=5 {
        bench.export("a", epoch).await.unwrap();
        bench.fence(epoch, epoch).await.unwrap();
    }
    (bench, copy)
}

/// Serves nobody until it is accepted, and then from the next epoch on.
async fn stays_behind_until_accepted(bench: &Bench, next: u64) {
    let behind = HomeError::RecordBehind {
        home: Epoch(3),
        recorded: Epoch(5),
    };
    assert_eq!(bench.record().behind, Some(Epoch(5)));
    assert_eq!(bench.export("b", 4).await.unwrap_err(), behind);
    assert!(bench.target.live().is_empty());
    let accepted = bench.home.accept_old_copy(&vol("vol-1")).await;
    assert_eq!(accepted.unwrap(), Epoch(5));
    assert_eq!(bench.fence(4, 4).await.unwrap_err(), stale(5));
    bench.fence(next - 1, 5).await.unwrap();
    let opened = bench.export("b", next).await.unwrap();
    assert_eq!(bench.target.live(), [opened.target.name]);
}

#[tokio::test]
async fn an_old_copy_is_found_when_an_epoch_was_decided_and_not_needed() {
    // Published at 6, unpublished before the receipt, put back, published at 7.
    let (bench, copy) = with_an_old_copy().await;
    let bench = bench.put_back(&copy).await;
    let refused = bench.fence(6, 5).await.unwrap_err();
    assert!(
        matches!(refused, HomeError::RecordBehind { .. }),
        "{refused}"
    );
    stays_behind_until_accepted(&bench, 7).await;
}

#[tokio::test]
async fn an_old_copy_is_found_by_the_export_that_has_its_receipt() {
    let (bench, copy) = with_an_old_copy().await;
    bench.export("b", 6).await.unwrap();
    let bench = bench.put_back(&copy).await;
    let refused = bench.export("b", 6).await.unwrap_err();
    assert!(
        matches!(refused, HomeError::RecordBehind { .. }),
        "{refused}"
    );
    stays_behind_until_accepted(&bench, 6).await;
}

#[tokio::test]
async fn an_old_copy_is_found_by_a_controller_that_starts_in_an_export() {
    let (bench, copy) = with_an_old_copy().await;
    bench.export("b", 6).await.unwrap();
    let bench = bench.put_back(&copy).await;
    // Its record says 6, exporting, and 5 as recorded: it fences 6 for 7.
    let refused = bench.fence(6, 5).await.unwrap_err();
    assert!(
        matches!(refused, HomeError::RecordBehind { .. }),
        "{refused}"
    );
    stays_behind_until_accepted(&bench, 7).await;
}

#[tokio::test]
async fn an_export_that_finds_an_old_copy_ends_what_that_had_open() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let copy = bench.copied();
    bench.fence(1, 1).await.unwrap();
    bench.fence(2, 1).await.unwrap();
    let bench = bench.put_back(&copy).await;
    assert_eq!(bench.target.live().len(), 1, "as its record says");
    bench.export("b", 3).await.unwrap_err();
    assert!(bench.target.live().is_empty());
    assert_eq!(bench.record().export, ExportState::Closed);
    assert_eq!(bench.record().behind, Some(Epoch(2)));
}

/// Of a copy made while epoch 1 was open, and put back when it had ended.
#[tokio::test]
async fn an_old_copy_with_the_last_epoch_open_is_found() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let copy = bench.copied();
    bench.fence(1, 1).await.unwrap();
    let ended = Recorded::end_of(Epoch(1));
    let behind = HomeError::RecordBehind {
        home: Epoch(1),
        recorded: Epoch(1),
    };

    let exported = bench.put_back(&copy).await;
    assert_eq!(exported.export("b", 2).await.unwrap_err(), behind);
    assert!(exported.target.live().is_empty());
    let fenced = exported.put_back(&copy).await;
    // Published at 2, unpublished before its export, published at 3.
    let refused = fenced.fence_knowing(2, ended).await.unwrap_err();
    assert_eq!(refused, behind);
    assert!(fenced.target.live().is_empty());
    let accepted = fenced.home.accept_old_copy(&vol("vol-1")).await;
    assert_eq!(accepted.unwrap(), Epoch(1));
    fenced.fence_knowing(2, ended).await.unwrap();
    fenced.export("b", 3).await.unwrap();
}

#[tokio::test]
async fn a_volume_behind_can_be_deleted() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let inside = bench.target.inside("vol-1", 1);
    bench.fence(5, 5).await.unwrap_err();
    assert!(
        bench.home.accept_old_copy(&vol("vol-1")).await.is_err(),
        "a command is inside"
    );
    assert!(bench.home.delete(&vol("vol-1"), false).await.is_err());
    inside.send_replace(0);
    bench.fence(5, 5).await.unwrap_err();
    bench.home.delete(&vol("vol-1"), false).await.unwrap();
}

#[tokio::test]
async fn after_a_crash_exports_are_as_the_record_says() {
    let bench = Bench::with_volume().await;
    let first = bench.export("a", 1).await.unwrap();
    bench.fence(1, 1).await.unwrap();
    let second = bench.export("b", 2).await.unwrap();

    let bench = bench.restart();
    let restored = bench.home.restore().await;
    assert_eq!((restored.open, restored.closed), (1, 1));
    assert_eq!(bench.target.live(), [&*second.target.name]);
    assert!(bench.target.is_closed(&first.target.name));
    assert_eq!(
        bench.export("b", 2).await.unwrap(),
        second,
        "the same identity"
    );

    // Killed while closing: never opened again, and settled by the lock.
    bench.target.inside("vol-1", 4);
    bench.fence(2, 2).await.unwrap_err();
    let bench = bench.restart();
    let restored = bench.home.restore().await;
    assert_eq!((restored.open, restored.closed), (0, 2));
    assert!(bench.target.live().is_empty());
    let settled = bench.fence(2, 2).await.unwrap();
    assert_eq!(settled.settled_by, SettledBy::ExitBarrier);
    assert_eq!(
        (settled.inside_at_close, settled.node),
        (4, Some("b".parse().unwrap()))
    );
    bench.export("b", 3).await.unwrap();
}

#[tokio::test]
async fn a_fence_before_the_restore_settles_by_the_dead_owners_end() {
    let bench = Bench::with_volume().await;
    let exported = bench.export("a", 1).await.unwrap();
    let bench = bench.restart();
    let settled = bench.fence(1, 1).await.unwrap();
    assert_eq!(settled.settled_by, SettledBy::ExitBarrier);
    assert!(bench.target.is_closed(&exported.target.name));
    assert_eq!(bench.home.restore().await.open, 0);
}

#[tokio::test]
async fn an_epochs_fence_and_export_at_once_never_leave_it_open() {
    for _ in 0..30 {
        let bench = Arc::new(Bench::with_volume().await);
        let opening = {
            let bench = Arc::clone(&bench);
            tokio::spawn(async move { bench.export("a", 1).await })
        };
        tokio::task::yield_now().await;
        let settled = bench.fence(1, 0).await.unwrap();
        assert_eq!(settled.epoch, Epoch(1));
        let opened = opening.await.unwrap();
        assert!(opened.is_ok() || opened == Err(stale(1)), "{opened:?}");
        assert!(bench.target.live().is_empty());
        assert_eq!(bench.record().export, ExportState::Closed);
        assert_eq!(bench.export("a", 1).await.unwrap_err(), stale(1));
    }
}

#[tokio::test]
async fn a_call_goes_on_when_its_caller_has_gone() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let inside = bench.target.inside("vol-1", 1);
    let gone = tokio::time::timeout(Duration::ZERO, bench.fence(1, 1)).await;
    assert!(gone.is_err());
    assert!(bench.target.live().is_empty(), "closed before any wait");
    inside.send_replace(0);
    assert_eq!(bench.fence(1, 1).await.unwrap().inside_at_close, 1);
}

#[tokio::test]
async fn a_fence_waits_for_no_snapshot_and_closes_before_it_waits() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let site = bench.home.inner.known(&vol("vol-1")).unwrap();
    let snapshot_under_way = site.data.clone().lock_owned().await;
    bench.fence(1, 1).await.unwrap();
    drop(snapshot_under_way);

    bench.export("a", 2).await.unwrap();
    let stuck = site.epochs.clone().lock_owned().await;
    let gone = tokio::time::timeout(Duration::from_millis(1), bench.fence(2, 2)).await;
    assert!(gone.is_err());
    assert!(bench.target.live().is_empty(), "the gate closes first");
    drop(stuck);
}

#[tokio::test]
async fn a_restore_has_the_file_to_itself() {
    let bench = Bench::with_volume().await;
    let claim = bench.home.restore_target(&vol("vol-1")).await.unwrap();
    assert!(bench.record().ever_written);
    assert_eq!(claim.size(), Bytes(MIB));
    assert_eq!(std::fs::metadata(claim.path()).unwrap().len(), MIB);
    let busy = [
        bench.export("a", 1).await.map(drop),
        bench.home.restore_target(&vol("vol-1")).await.map(drop),
        bench.home.delete(&vol("vol-1"), false).await,
        bench
            .home
            .expand(&vol("vol-1"), Bytes(2 * MIB))
            .await
            .map(drop),
        bench
            .home
            .create(&vol("vol-2"), Bytes(MIB), &Content::Volume(vol("vol-1")))
            .await,
        bench
            .home
            .snapshot(&vol("vol-1"), &"s".parse().unwrap())
            .await
            .map(drop),
    ];
    for refused in busy {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("being restored"), "{error}");
    }
    bench.fence(0, 0).await.unwrap();
    claim.finish();
    assert!(!bench.record().restoring);
    assert!(bench.export("a", 1).await.unwrap().ever_written);
}

#[tokio::test]
async fn nothing_is_restored_over_a_used_volume() {
    let used = |refused: Result<RestoreTarget, HomeError>| {
        assert_eq!(refused.map(drop), Err(HomeError::Used(vol("vol-1"))));
    };
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    used(bench.home.restore_target(&vol("vol-1")).await);
    let device = bench.target.device("vol-1");
    device.write(Lba(0), &[1; BLOCK as usize], true).unwrap();
    drop(device);
    bench.fence(1, 1).await.unwrap();
    used(bench.home.restore_target(&vol("vol-1")).await);

    // Nor over another restore.
    let bench = Bench::with_volume().await;
    let claim = bench.home.restore_target(&vol("vol-1")).await.unwrap();
    claim.finish();
    used(bench.home.restore_target(&vol("vol-1")).await);
}

/// The model found it: the worker of a restore outlives its agent, and holds no lock.
#[tokio::test]
async fn a_restore_that_its_agents_end_cut_short_is_never_exported() {
    let bench = Bench::with_volume().await;
    let claim = bench.home.restore_target(&vol("vol-1")).await.unwrap();
    // As an agent drops it that is told to stop, or killed, meanwhile.
    drop(claim);
    assert!(bench.record().restoring);
    let bench = bench.restart();
    bench.home.restore().await;
    let refused = [
        bench.export("a", 1).await.map(drop),
        bench.home.restore_target(&vol("vol-1")).await.map(drop),
        bench
            .home
            .create(&vol("vol-2"), Bytes(MIB), &Content::Volume(vol("vol-1")))
            .await,
    ];
    for refused in refused {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("half restored"), "{error}");
    }
    bench.home.delete(&vol("vol-1"), false).await.unwrap();
}

#[tokio::test]
async fn a_live_volume_grows_and_its_hosts_are_told() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let device = bench.target.device("vol-1");
    for _ in 0..2 {
        let size = bench.home.expand(&vol("vol-1"), Bytes(4 * MIB)).await;
        assert_eq!(size.unwrap(), Bytes(4 * MIB));
    }
    assert_eq!(device.size(), Bytes(4 * MIB));
    assert_eq!(*bench.target.resized.lock().unwrap(), [vol("vol-1")]);
    let last = Lba(4 * MIB / BLOCK - 1);
    device.write(last, &[1; BLOCK as usize], true).unwrap();
}

#[tokio::test]
async fn what_is_open_is_not_deleted_and_what_is_gone_is_no_error() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let open = bench.home.delete(&vol("vol-1"), false).await;
    assert_eq!(open.unwrap_err(), stale(1));
    bench.fence(1, 1).await.unwrap();
    bench.home.delete(&vol("vol-1"), false).await.unwrap();
    bench.home.delete(&vol("vol-1"), false).await.unwrap();
    let none = HomeError::NoVolume(vol("vol-1"));
    assert_eq!(bench.export("a", 2).await.unwrap_err(), none);
    assert_eq!(bench.fence(1, 1).await.unwrap_err(), none);
    assert_eq!(
        bench
            .home
            .restore_target(&vol("vol-1"))
            .await
            .map(drop)
            .unwrap_err(),
        none
    );
    assert_eq!(
        bench
            .home
            .expand(&vol("vol-1"), Bytes(MIB))
            .await
            .unwrap_err(),
        none
    );
}

/// A store put back from an old copy, in which the clone was being made, asks again.
#[tokio::test]
async fn a_clone_is_known_again_when_its_source_is_gone_needs_root() {
    let fs = Mounted::xfs();
    let target = Arc::new(Target::default());
    let home = home_over(open_pool(&fs.pool()).unwrap(), &target);
    let (source, clone) = (vol("source"), vol("vol-1"));
    let content = Content::Volume(source.clone());
    let create = || home.create(&clone, Bytes(MIB), &content);
    home.create(&source, Bytes(MIB), &Content::Empty)
        .await
        .unwrap();
    create().await.unwrap();
    home.export(&request("a", 1)).await.unwrap();
    let device = target.device("vol-1");
    device.write(Lba(0), &[7; BLOCK as usize], true).unwrap();
    assert_eq!(home.delete(&clone, true).await, Err(stale(1)), "open");
    let fence = FenceRequest {
        volume: clone.clone(),
        epoch: Epoch(1),
        recorded: Recorded::begin_of(Epoch(1)),
    };
    home.fence(&fence).await.unwrap();
    home.delete(&source, false).await.unwrap();

    create().await.unwrap();
    assert_eq!(home.delete(&clone, true).await, Err(stale(1)), "used");
    let path = home.pool().volume_path(&clone).unwrap();
    assert_eq!(std::fs::read(path).unwrap()[0], 7);
    let other = home.create(&vol("vol-2"), Bytes(MIB), &content).await;
    assert_eq!(other, Err(HomeError::NoVolume(source)));
    assert!(home.inner.site(&vol("vol-2")).is_none());
}

#[tokio::test]
async fn what_was_never_used_is_deleted_and_what_was_written_is_kept() {
    let bench = Bench::with_volume().await;
    let id = vol("vol-1");
    drop(bench.home.restore_target(&id).await.unwrap());
    assert_eq!(bench.home.delete(&id, true).await, Err(stale(0)));
    bench.home.delete(&id, false).await.unwrap();
    let made = bench.home.create(&id, Bytes(MIB), &Content::Empty).await;
    made.unwrap();
    bench.home.delete(&id, true).await.unwrap();
    assert!(bench.home.pool().volumes().is_empty());
    bench.home.delete(&id, true).await.unwrap();
}

#[tokio::test]
async fn a_making_that_takes_long_is_joined() {
    let mut bench = Bench::new();
    let inner = Arc::get_mut(&mut bench.home.inner).unwrap();
    inner.config.data_deadline = Duration::from_millis(20);
    let id = vol("vol-1");
    let create = || bench.home.create(&id, Bytes(MIB), &Content::Empty);
    let site = bench.home.inner.site_of(&id);
    let building = site.data.clone().lock_owned().await;
    for _ in 0..2 {
        let late = create().await.unwrap_err();
        assert!(matches!(late, HomeError::NotYet(_)), "{late:?}");
    }
    drop(building);
    // A disk may take longer than this deadline for it.
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(late) = create().await {
        assert!(matches!(late, HomeError::NotYet(_)), "{late:?}");
        assert!(Instant::now() < end);
    }
    create().await.unwrap();
}

#[tokio::test]
async fn nonsense_is_refused() {
    let bench = Bench::with_volume().await;
    assert!(bench.export("a", 0).await.is_err());
    let mut long = request("a", 1);
    long.host.nqn = "n".repeat(224);
    assert!(bench.home.export(&long).await.is_err());
    assert_eq!(bench.record().highest, Epoch(0));
}

#[tokio::test]
async fn a_device_that_does_not_open_opens_no_export() {
    let bench = Bench::with_volume().await;
    let works = Arc::new(AtomicBool::new(false));
    let open: OpenBacking = {
        let works = Arc::clone(&works);
        Arc::new(move |file, path, size| {
            if !works.load(Ordering::Relaxed) {
                return Err(crate::block::DeviceError::FlushFailed("no".into()));
            }
            plain()(file, path, size)
        })
    };
    let config = HomeConfig::at(
        "127.0.0.1:4420".parse().unwrap(),
        "127.0.0.1:3260".parse().unwrap(),
    );
    let pool = Arc::clone(bench.home.pool());
    let home = Home::new(pool, Arc::clone(&bench.target) as _, open, config);
    assert!(home.export(&request("a", 1)).await.is_err());
    assert!(bench.target.live().is_empty());
    assert_eq!(bench.record().highest, Epoch(0), "nothing was granted");
    works.store(true, Ordering::Relaxed);
    let exported = home.export(&request("a", 1)).await.unwrap();
    assert_eq!(bench.target.live(), [exported.target.name]);
}

#[tokio::test]
async fn metrics_tell_the_pool_and_the_fences() {
    let bench = Bench::with_volume().await;
    let mut registry = Registry::default();
    bench.home.register_metrics(&mut registry);
    bench.export("a", 1).await.unwrap();
    bench.fence(1, 1).await.unwrap();
    bench.fence(0, 0).await.unwrap_err();
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "drover_home_fences_total{result=\"settled\"} 1",
        "drover_home_fences_total{result=\"stale\"} 1",
        "drover_home_fence_settle_seconds_count 1",
        "drover_pool_provisioned_bytes 1048576",
        "drover_pool_volumes 1",
        "drover_pool_snapshots 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn a_full_pool_keeps_no_gate_open_needs_root() {
    let fs = Mounted::xfs();
    let target = Arc::new(Target::default());
    let home = home_over(open_pool(&fs.pool()).unwrap(), &target);
    let id = vol("vol-1");
    home.create(&id, Bytes(8 * MIB), &Content::Empty)
        .await
        .unwrap();
    home.export(&request("a", 1)).await.unwrap();
    let device = target.device("vol-1");
    device.write(Lba(0), &[1; BLOCK as usize], true).unwrap();
    home.snapshot(&id, &"snap-1".parse().unwrap())
        .await
        .unwrap();
    device.write(Lba(0), &[2; BLOCK as usize], true).unwrap();
    let _filling = fs.fill();
    let fence = FenceRequest {
        volume: id.clone(),
        epoch: Epoch(1),
        recorded: Recorded::begin_of(Epoch(1)),
    };
    let settled = home.fence(&fence).await.unwrap();
    assert_eq!(settled.settled_by, SettledBy::Drained);
    home.export(&request("b", 2)).await.unwrap();
    let error = home
        .create(&vol("vol-2"), Bytes(MIB), &Content::Empty)
        .await;
    assert!(matches!(error, Err(HomeError::NoSpace { .. })), "{error:?}");
    let clone = home
        .pool()
        .snapshot_path(&"snap-1".parse().unwrap())
        .unwrap();
    assert_eq!(std::fs::read(clone).unwrap()[0], 1);
}

#[tokio::test]
async fn a_record_that_cannot_be_written_gives_no_settlement_needs_root() {
    let fs = Mounted::xfs();
    let target = Arc::new(Target::default());
    let home = home_over(open_pool(&fs.pool()).unwrap(), &target);
    let id = vol("vol-1");
    home.create(&id, Bytes(MIB), &Content::Empty).await.unwrap();
    let exported = home.export(&request("a", 1)).await.unwrap();
    fs.fail();
    let fence = FenceRequest {
        volume: id.clone(),
        epoch: Epoch(1),
        recorded: Recorded::begin_of(Epoch(1)),
    };
    for _ in 0..2 {
        let error = home.fence(&fence).await.unwrap_err();
        assert!(matches!(error, HomeError::Failed(_)), "{error:?}");
        assert!(error.to_string().contains("vol-1/record"), "{error}");
        assert!(target.live().is_empty(), "the gate stays closed");
        assert!(!target.is_closed(&exported.target.name), "not ended");
    }
    assert_eq!(home.export(&request("a", 1)).await.unwrap_err(), stale(1));
    drop((home, target));
    fs.mend();
    // The disk never heard of the fence: the same export is open again.
    let target = Arc::new(Target::default());
    let home = home_over(open_pool(&fs.pool()).unwrap(), &target);
    assert_eq!(home.restore().await.open, 1);
    assert_eq!(target.live(), [exported.target.name]);
    home.fence(&fence).await.unwrap();
}

#[tokio::test]
async fn without_reflink_snapshots_are_unsupported_needs_root() {
    let fs = Mounted::ext4();
    let home = home_over(open_pool(&fs.pool()).unwrap(), &Arc::default());
    home.create(&vol("vol-1"), Bytes(MIB), &Content::Empty)
        .await
        .unwrap();
    let refused = home
        .snapshot(&vol("vol-1"), &"snap-1".parse().unwrap())
        .await;
    assert!(
        matches!(refused, Err(HomeError::Unsupported(_))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn an_iscsi_export_has_its_own_secrets_and_keeps_them_over_a_restart() {
    let bench = Bench::with_volume().await;
    let ask = |epoch| ExportRequest {
        protocol: Protocol::Iscsi,
        ..request("a", epoch)
    };
    let first = bench.home.export(&ask(1)).await.unwrap();
    assert_eq!(first.target.address.port(), 3260);
    assert!(first.target.name.starts_with("iqn."), "{first:?}");
    let secrets = |home: &Home, epoch| {
        let home = home.clone();
        async move {
            let told = home.disclose(&vol("vol-1"), Epoch(epoch)).await;
            told.map(|told| told.chap.expect("secrets"))
        }
    };
    let chap = secrets(&bench.home, 1).await.unwrap();
    assert_eq!(
        secrets(&bench.home, 2).await,
        Err(stale(1)),
        "opens nothing"
    );
    assert_eq!(chap.initiator.name, ask(1).host.iqn);
    assert_ne!(chap.initiator.secret, chap.target.secret);

    let bench = bench.restart();
    assert_eq!(bench.home.restore().await.open, 1);
    let again = bench.home.export(&ask(1)).await.unwrap();
    assert_eq!(again, first, "a repeat");
    assert_eq!(secrets(&bench.home, 1).await.unwrap(), chap);
    assert_eq!(bench.export("a", 1).await, Err(stale(1)), "one holder");
    bench.fence(1, 1).await.unwrap();
    assert_eq!(secrets(&bench.home, 1).await, Err(stale(1)), "ended");
    bench.home.export(&ask(2)).await.unwrap();
    let fresh = secrets(&bench.home, 2).await.unwrap();
    assert_ne!(fresh.initiator.secret, chap.initiator.secret);
    assert_ne!(fresh.target.secret, chap.target.secret);

    let mut nameless = ask(2);
    nameless.host.iqn = "host".to_owned();
    let refused = bench.home.export(&nameless).await.unwrap_err().to_string();
    assert!(refused.contains("\"host\""), "{refused}");
}

#[tokio::test]
async fn reservations_go_on_over_a_restart_and_end_with_their_epoch() {
    let bench = Bench::with_volume().await;
    bench.export("a", 1).await.unwrap();
    let keep = |keeper: &dyn Keeper| keeper.keep(Some(b"held")).unwrap();
    assert_eq!(bench.target.kept("vol-1", keep), None);
    let bench = bench.restart();
    assert_eq!(bench.home.restore().await.open, 1);
    let kept = bench.target.kept("vol-1", |_| {});
    assert_eq!(kept.as_deref(), Some(&b"held"[..]));

    // A damaged file: the volume is not lost, and a fence needs none of it.
    let file = bench.folder.path().join("volumes/vol-1/reservations");
    let length = usize::try_from(std::fs::metadata(&file).unwrap().len()).unwrap();
    std::fs::write(&file, vec![0; length]).unwrap();
    let bench = bench.restart();
    let restored = bench.home.restore().await;
    let [(_, error)] = &restored.failed[..] else {
        panic!("{restored:?}");
    };
    let error = error.to_string();
    assert!(error.contains("volumes/vol-1/reservations"), "{error}");
    let again = bench.export("a", 1).await.unwrap_err().to_string();
    assert!(again.contains("volumes/vol-1/reservations"), "{again}");
    let settled = bench.fence(1, 1).await.unwrap();
    assert_eq!(settled.settled_by, SettledBy::ExitBarrier);
    bench.export("b", 2).await.unwrap();
    let keep = |keeper: &dyn Keeper| keeper.keep(Some(b"new")).unwrap();
    assert_eq!(bench.target.kept("vol-1", keep), None, "a new epoch");
    let bench = bench.restart();
    assert_eq!(bench.home.restore().await.open, 1);
    let kept = bench.target.kept("vol-1", |_| {});
    assert_eq!(kept.as_deref(), Some(&b"new"[..]));
}

#[tokio::test]
async fn an_nvme_export_has_secrets_where_the_hosts_kernel_can_prove_itself() {
    let bench = Bench::with_volume().await;
    let plain = bench.export("a", 1).await.unwrap();
    assert!(!plain.target.proves);
    let disclosed = async |bench: &Bench, epoch| {
        let told = bench.home.disclose(&vol("vol-1"), Epoch(epoch)).await;
        told.unwrap()
    };
    let told = disclosed(&bench, 1).await;
    assert_eq!((told.chap, told.ever_written), (None, false));
    let wrote = {
        let device = bench.target.device("vol-1");
        device.write(Lba(0), &[1; BLOCK as usize], false)
    };
    wrote.unwrap();
    assert!(disclosed(&bench, 1).await.ever_written, "by now");
    bench.fence(1, 1).await.unwrap();

    let mut ask = request("a", 2);
    ask.host.proves = true;
    let exported = bench.home.export(&ask).await.unwrap();
    assert!(exported.target.proves && exported.target.chap.is_none());
    let chap = disclosed(&bench, 2).await.chap.unwrap();
    assert_eq!(
        (&chap.initiator.name, &chap.target.name),
        (&ask.host.nqn, &exported.target.name)
    );
    let proof = Proof::of(Protocol::NvmeTcp, &chap).unwrap();
    let served = |bench: &Bench| {
        let live = bench.target.live.lock().unwrap();
        live.values().next().unwrap().0.proof.clone()
    };
    assert_eq!(served(&bench), Some(proof.clone()));
    let bench = bench.restart();
    assert_eq!(bench.home.restore().await.open, 1);
    assert_eq!(served(&bench), Some(proof));
    assert_eq!(bench.home.export(&ask).await.unwrap(), exported);
}

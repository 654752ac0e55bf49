//! What the arbiter is tested over: a real store, with homes and nodes that keep
//! records of their own, fall silent, answer twice, and with the process ended at
//! any call of any port.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::time::SystemTime;

use async_trait::async_trait;
use uuid::Uuid;

use super::*;
use crate::attach::ports::{
    Chap, Content, Disclosure, ExportRequest, Exported, FenceRequest, Home, HomeError,
    HostIdentity, Node, NodeAnswer, Protocol, SettledBy, Settlement, SnapshotInfo, Target,
};
use crate::ids::TicketId;
use crate::store::{EmbeddedStore, Key, StoreError, Stored, Version};

pub(super) const LONG: Duration = Duration::from_secs(20);
/// How often is looked whether something has happened.
const LOOK: Duration = Duration::from_millis(10);
pub(super) const MIB: u64 = 1 << 20;

/// Where the process ends: at the n-th point, nothing goes on.
#[derive(Default)]
pub(super) struct Death {
    pub(super) at: Option<usize>,
    pub(super) passed: AtomicUsize,
    pub(super) dead: Notify,
}

impl Death {
    async fn point(&self) {
        let point = self.passed.fetch_add(1, Ordering::SeqCst);
        if self.at.is_some_and(|at| point >= at) {
            self.dead.notify_one();
            std::future::pending::<()>().await;
        }
    }
}

#[derive(Default)]
pub(crate) struct World {
    /// By volume: the highest epoch, and who has it open.
    pub(super) volumes: Mutex<BTreeMap<VolumeId, (u64, Option<NodeId>)>>,
    pub(crate) snapshots: Mutex<BTreeSet<SnapshotId>>,
    /// How often a snapshot was taken.
    pub(super) taken: AtomicUsize,
    pub(crate) silent: AtomicBool,
    /// Homes act, and their answers wait until this ends.
    pub(crate) late: AtomicBool,
    /// Homes act, and their answers are lost.
    pub(crate) mute: AtomicBool,
    /// Whether a host wrote to any volume.
    pub(super) written: AtomicBool,
    pub(super) full: AtomicBool,
    pub(super) released: Mutex<Vec<(VolumeId, NodeId, Epoch)>>,
    pub(super) interrupted: Mutex<Vec<TicketId>>,
    pub(super) answered: Notify,
}

impl World {
    pub(super) fn open(&self) -> Vec<(Epoch, NodeId)> {
        let volumes = self.volumes.lock().unwrap();
        let open = volumes
            .values()
            .filter_map(|(epoch, node)| node.clone().map(|node| (Epoch(*epoch), node)));
        open.collect()
    }
}

/// A home or node of the world, as one process reaches it.
#[derive(Clone)]
struct Door {
    world: Arc<World>,
    death: Arc<Death>,
    node: NodeId,
}

impl Door {
    async fn call<T>(
        &self,
        act: impl FnOnce(&World) -> Result<T, HomeError>,
    ) -> Result<T, HomeError> {
        self.death.point().await;
        if self.world.silent.load(Ordering::SeqCst) {
            return Err(self.unreachable("switched off"));
        }
        let result = act(&self.world);
        self.death.point().await;
        while self.world.late.load(Ordering::SeqCst) {
            tokio::time::sleep(LOOK).await;
        }
        if self.world.mute.load(Ordering::SeqCst) {
            return Err(self.unreachable("its answer was lost"));
        }
        result
    }

    fn unreachable(&self, detail: &str) -> HomeError {
        HomeError::Unreachable {
            node: self.node.clone(),
            detail: detail.to_owned(),
        }
    }
}

#[async_trait]
impl Home for Door {
    async fn create(&self, volume: &VolumeId, size: Bytes, _: &Content) -> Result<(), HomeError> {
        self.call(|world| {
            if world.full.load(Ordering::SeqCst) {
                return Err(HomeError::NoSpace {
                    pool: "/pool".into(),
                    needed: size,
                    available: Bytes(0),
                });
            }
            world
                .volumes
                .lock()
                .unwrap()
                .entry(volume.clone())
                .or_default();
            Ok(())
        })
        .await
    }
    async fn delete(&self, volume: &VolumeId, _unused: bool) -> Result<(), HomeError> {
        self.call(|world| {
            let gone = world.volumes.lock().unwrap().remove(volume);
            assert!(!matches!(gone, Some((_, Some(_)))), "deleted while open");
            Ok(())
        })
        .await
    }
    async fn expand(&self, _: &VolumeId, size: Bytes) -> Result<Bytes, HomeError> {
        self.call(|_| Ok(size)).await
    }
    async fn snapshot(
        &self,
        volume: &VolumeId,
        id: &SnapshotId,
    ) -> Result<SnapshotInfo, HomeError> {
        self.call(|world| {
            if !world.volumes.lock().unwrap().contains_key(volume) {
                return Err(HomeError::NoVolume(volume.clone()));
            }
            if world.snapshots.lock().unwrap().insert(id.clone()) {
                world.taken.fetch_add(1, Ordering::SeqCst);
            }
            Ok(SnapshotInfo {
                id: id.clone(),
                volume: volume.clone(),
                size: Bytes(MIB),
                taken: SystemTime::UNIX_EPOCH,
            })
        })
        .await
    }
    async fn delete_snapshot(&self, id: &SnapshotId) -> Result<(), HomeError> {
        self.call(|world| {
            world.snapshots.lock().unwrap().remove(id);
            Ok(())
        })
        .await
    }
    async fn capacity(&self) -> Result<Capacity, HomeError> {
        let room = Capacity {
            available: Bytes(1 << 40),
            total: Bytes(1 << 40),
        };
        self.call(|_| Ok(room)).await
    }
    async fn export(&self, request: &ExportRequest) -> Result<Exported, HomeError> {
        self.call(|world| {
            let mut volumes = world.volumes.lock().unwrap();
            let Some((highest, open)) = volumes.get_mut(&request.volume) else {
                return Err(HomeError::NoVolume(request.volume.clone()));
            };
            let repeat = request.epoch.0 == *highest && open.as_ref() == Some(&request.node);
            if !repeat {
                if request.epoch.0 <= *highest {
                    return Err(HomeError::StaleEpoch {
                        home: Epoch(*highest),
                    });
                }
                assert_eq!(*open, None, "granted while another epoch is open");
                (*highest, *open) = (request.epoch.0, Some(request.node.clone()));
            }
            Ok(Exported {
                epoch: request.epoch,
                target: Target {
                    protocol: request.protocol,
                    name: format!("nqn.{}", request.epoch),
                    unit: Uuid::nil(),
                    address: SocketAddr::from(([127, 0, 0, 1], 4420)),
                    proves: request.protocol == Protocol::Iscsi,
                    chap: None,
                },
                ever_written: false,
            })
        })
        .await
    }
    async fn disclose(&self, _: &VolumeId, epoch: Epoch) -> Result<Disclosure, HomeError> {
        self.call(|world| {
            Ok(Disclosure {
                chap: Some(Chap::fresh("iqn.i", &format!("iqn.{epoch}"))),
                ever_written: world.written.load(Ordering::SeqCst),
            })
        })
        .await
    }
    async fn fence(&self, request: &FenceRequest) -> Result<Settlement, HomeError> {
        self.call(|world| {
            let mut volumes = world.volumes.lock().unwrap();
            let Some((highest, open)) = volumes.get_mut(&request.volume) else {
                return Err(HomeError::NoVolume(request.volume.clone()));
            };
            if *highest > request.epoch.0 {
                return Err(HomeError::StaleEpoch {
                    home: Epoch(*highest),
                });
            }
            if *highest < request.recorded.epoch.0 {
                return Err(HomeError::RecordBehind {
                    home: Epoch(*highest),
                    recorded: request.recorded.epoch,
                });
            }
            *highest = request.epoch.0;
            let node = open.take();
            Ok(Settlement {
                volume: request.volume.clone(),
                epoch: request.epoch,
                settled_by: match node {
                    Some(_) => SettledBy::Drained,
                    None => SettledBy::NothingOpen,
                },
                unsettled: 0,
                node,
                sessions_ended: 2,
                inside_at_close: 1,
                settle_time: Duration::from_millis(1),
                late_refused: 0,
                last_write: None,
            })
        })
        .await
    }
}

#[async_trait]
impl Node for Door {
    async fn release(&self, volume: &VolumeId, epoch: Epoch) -> NodeAnswer {
        self.death.point().await;
        let told = (volume.clone(), self.node.clone(), epoch);
        self.world.released.lock().unwrap().push(told);
        self.world.answered.notify_one();
        NodeAnswer::Clean
    }
    async fn interrupt(&self, _: &VolumeId, ticket: &TicketId, _: Duration) -> bool {
        self.death.point().await;
        self.world.interrupted.lock().unwrap().push(ticket.clone());
        self.world.answered.notify_one();
        true
    }
}

struct Doors {
    world: Arc<World>,
    death: Arc<Death>,
}

impl Doors {
    fn door(&self, node: &NodeId) -> Arc<Door> {
        Arc::new(Door {
            world: Arc::clone(&self.world),
            death: Arc::clone(&self.death),
            node: node.clone(),
        })
    }
}

impl Ports for Doors {
    fn home(&self, node: &NodeId) -> Option<Arc<dyn Home>> {
        Some(self.door(node))
    }
    fn node(&self, node: &NodeId) -> Option<Arc<dyn Node>> {
        Some(self.door(node))
    }
}

/// The real store, with a point before and after every change.
struct Mortal {
    store: EmbeddedStore,
    death: Arc<Death>,
    /// Changes take effect, and their callers are told that it is not known.
    unsure: Arc<AtomicBool>,
    /// Changes take no effect, and their callers are told that it is not known.
    lossy: Arc<AtomicBool>,
    /// Changes hang.
    hung: Arc<AtomicBool>,
}

impl Mortal {
    async fn after<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        self.death.point().await;
        if self.unsure.load(Ordering::SeqCst) {
            return Err(StoreError::Unavailable("no answer".to_owned()));
        }
        result
    }
    async fn before(&self) -> Result<(), StoreError> {
        self.death.point().await;
        if self.lossy.load(Ordering::SeqCst) {
            return Err(StoreError::Unavailable("no answer".to_owned()));
        }
        if self.hung.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

#[async_trait]
impl StateStore for Mortal {
    async fn get(&self, key: &Key) -> Result<Option<Stored>, StoreError> {
        self.store.get(key).await
    }
    async fn put(
        &self,
        key: &Key,
        expected: Option<Version>,
        bytes: Vec<u8>,
    ) -> Result<Version, StoreError> {
        self.before().await?;
        let result = self.store.put(key, expected, bytes).await;
        self.after(result).await
    }
    async fn delete(&self, key: &Key, expected: Version) -> Result<(), StoreError> {
        self.before().await?;
        let result = self.store.delete(key, expected).await;
        self.after(result).await
    }
    async fn list(&self, kind: Kind) -> Result<Vec<(Key, Stored)>, StoreError> {
        self.store.list(kind).await
    }
}

/// One life of a controller over a world.
pub(crate) struct Life {
    pub(crate) arbiter: Arc<Arbiter>,
    pub(super) unsure: Arc<AtomicBool>,
    pub(super) lossy: Arc<AtomicBool>,
    pub(super) hung: Arc<AtomicBool>,
}

pub(super) async fn begin(
    path: &Path,
    world: &Arc<World>,
    death: &Arc<Death>,
) -> Result<Life, ArbiterError> {
    let (unsure, lossy, hung) = (Arc::default(), Arc::default(), Arc::default());
    let store = Arc::new(Mortal {
        store: EmbeddedStore::open(path)?,
        death: Arc::clone(death),
        unsure: Arc::clone(&unsure),
        lossy: Arc::clone(&lossy),
        hung: Arc::clone(&hung),
    });
    let ports = Arc::new(Doors {
        world: Arc::clone(world),
        death: Arc::clone(death),
    });
    let arbiter = Arbiter::start(store, ports).await?;
    for name in ["a", "b"] {
        arbiter
            .register(registration(name, "boot-1", vec![]))
            .await?;
    }
    Ok(Life {
        arbiter,
        unsure,
        lossy,
        hung,
    })
}

pub(super) fn id<T: std::str::FromStr<Err = crate::ids::InvalidId>>(text: &str) -> T {
    text.parse().unwrap()
}

pub(super) fn registration(
    name: &str,
    boot: &str,
    attached: Vec<(VolumeId, Epoch)>,
) -> Registration {
    Registration {
        node: id(name),
        incarnation: boot.to_owned(),
        host: HostIdentity::of(format!("nqn.{name}"), Uuid::nil()),
        agent: SocketAddr::from(([127, 0, 0, 1], 1)),
        has_pool: name == "a",
        attached,
        late: Vec::new(),
    }
}

pub(super) fn request(name: &str, mib: u64) -> NewVolume {
    NewVolume {
        name: name.to_owned(),
        at_least: Bytes(mib * MIB),
        at_most: None,
        content: Content::Empty,
        protocol: Protocol::NvmeTcp,
        home: None,
        busy_deadline: Duration::from_secs(120),
        parameters: BTreeMap::new(),
    }
}

/// A folder for a state; in memory where it can be: what hangs or dies here is the
/// process, not the disk.
pub(super) fn folder() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() {
        tempfile::tempdir_in(shm).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

/// A life with a volume.
pub(crate) async fn with_volume() -> (tempfile::TempDir, Arc<World>, Life, VolumeId) {
    let folder = folder();
    let world = Arc::new(World::default());
    let life = begin(&folder.path().join("state"), &world, &Arc::default())
        .await
        .unwrap();
    let volume = life
        .arbiter
        .create_volume(request("pvc", 1))
        .await
        .unwrap()
        .spec
        .id;
    (folder, world, life, volume)
}

/// Waits for what happens behind an answer.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < LONG, "never: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

//! Evidence: who can do and does I/O on a disk, as the kernel sees it, and what that means.
//!
//! [`loader`] puts the eBPF programs into the kernel, with the offsets that
//! [`offsets`] finds in the kernel's [`btf`]; [`ledger`] keeps their counts;
//! [`holders`] finds everybody who has a disk open and makes sure that they
//! are as many as the kernel itself counts; [`verdict`] judges; [`readers`]
//! knows who is registered as a backup, [`tools`] who is one by name, [`streams`]
//! how they are doing; [`metrics`] shows the counts.
//!
//! It fails closed: what cannot be known is `Unknown`. Where nothing can be
//! loaded the agent runs all the same, with [`Evidence::blind`]. It never opens
//! a disk and never touches a file system on one. A look ends by its deadline,
//! whatever hangs in the kernel meanwhile, and keeps nobody else waiting, see
//! [`walk`].
//!
//! Limits on the safe side: the agent must run in the first process namespace
//! (`hostPID`), else every verdict is `Unknown`; of the device itself, a file
//! registered with an io_uring, a descriptor on its way over a socket and users
//! inside the kernel that sysfs does not show (an nvmet or LIO backend) are
//! unexplained.
//!
//! Limits that are not on the safe side:
//! - Files on the disk's file system have no such count. Where it is mounted by
//!   drover, whose mount is left out, nothing here sees who has a file on it
//!   open for writing by no descriptor and no mapping of a process: a file
//!   registered with an io_uring, a descriptor on its way over a socket, an
//!   nfsd, the upper layer of an overlay, a loop device over a file on a detached
//!   mount. So `Quiet` and the verdicts of backups prove nothing about files;
//!   what does is that the file system can be made read-only.
//! - Passthrough by a character device (`/dev/ng0n1`, `/dev/sg0`) opens no block
//!   device and sends no bio, so nothing here sees it. Only the home's gate stops it.

pub mod btf;
pub mod cgroups;
mod disks;
#[cfg(any(test, fuzzing))]
pub(crate) mod doors;
mod holders;
mod ledger;
pub mod loader;
mod metrics;
mod mounts;
mod offsets;
mod places;
mod process;
pub mod readers;
mod sends;
pub mod streams;
pub mod tools;
pub mod verdict;
mod walk;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use drover_ebpf::{IoCount, Latency};
use prometheus_client::registry::Registry;

use self::cgroups::{Choice, Hierarchy};
use self::disks::Names;
pub use self::disks::{InFlight, Queue, Timed};
use self::ledger::{Books, Ledger};
use self::loader::{Kernel, Program};
use self::readers::{Paths, Readers};
pub use self::readers::{Reader, RegisterError, Who};
use self::sends::Sends;
pub use self::streams::ReaderStatus;
use self::tools::Tool;
use self::verdict::Sight;
use crate::attach::ports::{Disk, Judgement, Witness};
use crate::ids::{Diskseq, TicketId, VolumeId};

/// Why there is no evidence.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// A file of the kernel's could not be read.
    #[error("read {}: {error}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The kernel's types are not what drover knows.
    #[error(transparent)]
    Btf(#[from] btf::BtfError),
    /// The eBPF object could not be loaded.
    #[error("load the eBPF programs: {0}")]
    Load(String),
    /// A map could not be read or changed.
    #[error("eBPF map {map}: {why}")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        why: String,
    },
    /// A list of open files could not be had.
    #[error("eBPF iterator {program}: {why}")]
    Iterate {
        /// Which.
        program: &'static str,
        /// Why.
        why: String,
    },
    /// There is no evidence at all on this node.
    #[error("no evidence: {0}")]
    Blind(String),
}

/// What can be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvidenceConfig {
    /// A registered reader that has not read for so long is stale.
    pub window: Duration,
    /// A judgement that takes longer is `Unknown`.
    pub deadline: Duration,
    /// Which cgroup hierarchy's ids are counted.
    pub cgroups: Choice,
    /// How many places there are for counts, each of a (process, disk) pair: the
    /// next power of two. When more than two of three are taken, a pair may find
    /// none, which is counted as lost. A place takes 40 bytes, and 64 per CPU.
    pub processes: u32,
    /// Whose processes read as if they were registered.
    pub tools: Vec<Tool>,
}

impl Default for EvidenceConfig {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(30),
            deadline: Duration::from_secs(10),
            cgroups: Choice::Found,
            processes: 8192,
            tools: Tool::usual(),
        }
    }
}

/// What evidence this node gives, for logs, `drover doctor` and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Why every verdict is `Unknown`, where that is so.
    pub blind: Option<String>,
    /// The kind of cgroup hierarchy found: `v2`, `v1 memory`, `none`.
    pub cgroup: String,
    /// The programs, and what came of each.
    pub programs: Vec<Program>,
    /// Whether the agent sees every process of the node.
    pub sees_all_processes: bool,
}

/// What one process did on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessIo {
    /// Its id.
    pub pid: u32,
    /// Its cgroup's path, or `id N` where that has none.
    pub cgroup: String,
    /// The counts.
    pub count: IoCount,
}

/// What was done on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskIo {
    /// By all, ended processes too.
    pub total: IoCount,
    /// By each living process, the busiest (by bytes) first.
    pub processes: Vec<ProcessIo>,
    /// How long requests took, by direction ([`drover_ebpf::READ`] and so on),
    /// where any ended.
    pub latency: Vec<(u32, Latency)>,
    /// What the kernel keeps of its queue; none: the disk has just gone.
    pub queue: Option<Queue>,
}

/// Whose volume a disk is; what is not known is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// The volume.
    pub volume: VolumeId,
    /// The claim it was made for.
    pub pvc: String,
    /// That claim's namespace.
    pub namespace: String,
    /// The node it is attached to: this one.
    pub node: String,
}

/// CLOCK_MONOTONIC in ns: the clock of the programs' times.
type Clock = Box<dyn Fn() -> u64 + Send + Sync>;

fn monotonic() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    // It fails for unknown clocks only.
    let now = Duration::from(now.expect("every kernel has CLOCK_MONOTONIC"));
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// The evidence of this node.
pub struct Evidence {
    inner: Arc<Inner>,
}

struct Inner {
    config: EvidenceConfig,
    hierarchy: Hierarchy,
    kernel: Result<Kernel, String>,
    ledger: Mutex<Ledger>,
    readers: Readers,
    sends: Mutex<Sends>,
    labels: Mutex<HashMap<Diskseq, Label>>,
    clock: Clock,
}

impl Evidence {
    /// Loads the programs. An error means that not one could be loaded: go on
    /// with [`Evidence::blind`].
    pub fn start(config: EvidenceConfig) -> Result<Arc<Self>, EvidenceError> {
        Self::start_with(config, Box::new(monotonic))
    }

    fn start_with(config: EvidenceConfig, clock: Clock) -> Result<Arc<Self>, EvidenceError> {
        let path = "/proc/self/mountinfo";
        let text = std::fs::read_to_string(path).map_err(|error| EvidenceError::Read {
            path: path.into(),
            error,
        })?;
        let hierarchy = Hierarchy::choose(&text, config.cgroups);
        let kernel = Kernel::load(&hierarchy, config.processes)?;
        let this = Self::new(config, hierarchy, Ok(kernel), clock);
        let report = this.describe();
        tracing::info!(cgroup = report.cgroup, "evidence: eBPF programs loaded");
        for program in &report.programs {
            if let Some(why) = &program.failure {
                tracing::warn!(program = program.name, hook = program.hook, %why, "evidence: this kernel refused a program");
            }
        }
        if let Some(why) = &report.blind {
            tracing::warn!(%why, "evidence: every verdict will be Unknown");
        }
        Ok(this)
    }

    /// No evidence: every verdict is `Unknown`, for this reason.
    pub fn blind(reason: impl Into<String>) -> Arc<Self> {
        let hierarchy = Hierarchy::choose("", Choice::Found);
        Self::new(
            EvidenceConfig::default(),
            hierarchy,
            Err(reason.into()),
            Box::new(monotonic),
        )
    }

    fn new(
        config: EvidenceConfig,
        hierarchy: Hierarchy,
        kernel: Result<Kernel, String>,
        clock: Clock,
    ) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::new(Inner {
                readers: Readers::new(config.tools.clone()),
                config,
                hierarchy,
                kernel,
                ledger: Mutex::default(),
                sends: Mutex::default(),
                labels: Mutex::default(),
                clock,
            }),
        })
    }

    /// A registered reader that has not moved for so long is stale, in milliseconds.
    pub fn window_ms(&self) -> u64 {
        u64::try_from(self.inner.config.window.as_millis()).unwrap_or(u64::MAX)
    }

    /// Registers a reader; the same ticket again replaces it.
    pub fn register(&self, reader: Reader) -> Result<(), RegisterError> {
        self.inner.readers.register(reader, &self.inner.hierarchy)
    }

    /// Takes a registration back. Unknown ticket: nothing.
    pub fn unregister(&self, ticket: &TicketId) {
        self.inner.readers.unregister(ticket);
    }

    /// How the backup streams are doing: of registered readers by ticket, then
    /// of tools known by name that have read a disk named in [`Evidence::label`].
    /// Without evidence there are none of the latter, and no reader is seen to
    /// progress.
    pub fn readers(&self) -> Vec<ReaderStatus> {
        self.inner.streams()
    }

    /// What was done on a disk, for display.
    pub fn io(&self, disk: &Disk) -> Result<DiskIo, EvidenceError> {
        let (books, names) = self.inner.books()?;
        let paths = self.inner.hierarchy.paths();
        let mut processes: Vec<_> = books
            .processes(disk.diskseq)
            .map(|(key, count)| ProcessIo {
                pid: key.tgid,
                cgroup: cgroup_name(&paths, key.cgroup),
                count: *count,
            })
            .collect();
        processes.sort_by_key(|p| std::cmp::Reverse(p.count.read_bytes + p.count.written_bytes));
        let mut latency = self.inner.latencies(&names)?;
        latency.retain(|(of, _), _| *of == disk.diskseq);
        Ok(DiskIo {
            total: books.disks().remove(&disk.diskseq).unwrap_or_default(),
            processes,
            latency: latency.into_iter().map(|((_, d), l)| (d, l)).collect(),
            queue: Queue::of(&disk.name),
        })
    }

    /// What evidence this node gives.
    pub fn describe(&self) -> Report {
        let sees_all_processes = ledger::in_first_pid_namespace();
        let (blind, programs) = match &self.inner.kernel {
            Ok(kernel) => (
                holders::blindness(kernel.programs(), sees_all_processes),
                kernel.programs().to_vec(),
            ),
            Err(why) => (Some(why.clone()), Vec::new()),
        };
        Report {
            blind,
            cgroup: self.inner.hierarchy.describe(),
            programs,
            sees_all_processes,
        }
    }

    /// Shows the counts as metrics, read from the kernel at each scrape.
    pub fn register_metrics(self: &Arc<Self>, registry: &mut Registry) {
        registry.register_collector(Box::new(metrics::Metrics(Arc::clone(self))));
    }

    /// Says whose volumes disks are, for metrics and the streams of tools; of
    /// those not named here nothing is known.
    pub fn label(&self, labels: HashMap<Diskseq, Label>) {
        *self.inner.labels() = labels;
    }
}

fn cgroup_name(paths: &Paths, id: u64) -> String {
    paths
        .get(&id)
        .cloned()
        .unwrap_or_else(|| format!("id {id}"))
}

impl Inner {
    fn labels(&self) -> MutexGuard<'_, HashMap<Diskseq, Label>> {
        // They are replaced as a whole.
        self.labels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // A panic in between can only leave a count twice in the kernel's map
        // and in the ledger, which makes nobody quiet.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disks here that are known to be volumes'.
    fn volumes(&self, names: &Names) -> Vec<(VolumeId, Disk)> {
        let labels = self.labels();
        let disk = |diskseq: &Diskseq| {
            let name = names.name(*diskseq)?.to_owned();
            let diskseq = *diskseq;
            Some(Disk { name, diskseq })
        };
        let found = labels.iter();
        let found = found.filter_map(|(seq, label)| Some((label.volume.clone(), disk(seq)?)));
        found.collect()
    }

    fn books(&self) -> Result<(Books, Names), EvidenceError> {
        let kernel = self
            .kernel
            .as_ref()
            .map_err(|why| EvidenceError::Blind(why.clone()))?;
        let names = Names::read().map_err(|error| EvidenceError::Read {
            path: "/sys/block".into(),
            error,
        })?;
        kernel.forget_latencies(|key| names.gone(key.diskseq))?;
        let books = self.ledger().look(kernel, &names, (self.clock)())?;
        Ok((books, names))
    }

    /// Histograms by (disk, direction); of a multipath device those of its paths.
    fn latencies(&self, names: &Names) -> Result<BTreeMap<(Diskseq, u32), Latency>, EvidenceError> {
        let kernel = self
            .kernel
            .as_ref()
            .map_err(|why| EvidenceError::Blind(why.clone()))?;
        let mut sums = BTreeMap::new();
        let latencies = kernel.latencies()?.into_iter();
        for (key, latency) in latencies.filter(|(key, _)| !names.gone(key.diskseq)) {
            let disk = Diskseq(names.fold(key.diskseq));
            let sum = sums.entry((disk, key.direction)).or_insert(Latency::NONE);
            *sum = loader::add_latency(*sum, &latency);
        }
        Ok(sums)
    }

    fn sight(
        &self,
        disk: &Disk,
        own_mounts: &[PathBuf],
        deadline: Instant,
    ) -> Result<Sight, EvidenceError> {
        let kernel = match &self.kernel {
            Ok(kernel) => kernel,
            Err(why) => return Ok(Sight::Blind(why.clone())),
        };
        let (books, _) = self.books()?;
        let now_ns = (self.clock)();
        let window = u64::try_from(self.config.window.as_nanos()).unwrap_or(u64::MAX);
        let known = holders::Known {
            books: &books,
            paths: &self.hierarchy.paths(),
            readers: &self.readers,
            now_ns,
            since_ns: now_ns.saturating_sub(window),
            deadline,
        };
        holders::look(kernel, disk, own_mounts, &known)
    }
}

#[async_trait]
impl Witness for Evidence {
    async fn judge(&self, disk: &Disk, own_mounts: &[PathBuf]) -> Judgement {
        let (inner, own) = (Arc::clone(&self.inner), own_mounts.to_vec());
        let EvidenceConfig {
            window, deadline, ..
        } = self.inner.config;
        let (target, end) = (disk.clone(), Instant::now() + deadline);
        let look = tokio::task::spawn_blocking(move || inner.sight(&target, &own, end));
        let sight = match tokio::time::timeout_at(end.into(), look).await {
            Ok(Ok(Ok(sight))) => sight,
            Ok(Ok(Err(error))) => Sight::Blind(error.to_string()),
            Ok(Err(error)) => Sight::Blind(format!("the look at {} failed: {error}", disk.name)),
            Err(_) => {
                let kernel = self.inner.kernel.as_ref().ok();
                let walk = kernel.and_then(Kernel::waits_for);
                Sight::Blind(match walk {
                    Some(walk) => format!("the look at {}: {walk}", disk.name),
                    None => format!("the look at {} did not end within {deadline:?}", disk.name),
                })
            }
        };
        verdict::judge(sight, window)
    }
}

#[cfg(test)]
mod root_hang_tests;
#[cfg(test)]
mod root_loop_tests;
#[cfg(test)]
mod root_soak_tests;
#[cfg(test)]
mod root_table_tests;
#[cfg(test)]
mod root_tool_tests;

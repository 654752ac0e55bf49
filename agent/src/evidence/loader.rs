//! Loads the eBPF programs, and reads what they left in their maps.
//!
//! Owns every descriptor of a program, link and map: when it is dropped, the
//! kernel takes the programs out. Each program is loaded by itself, and what
//! came of it is said in [`Program`]; which of them a judgement needs is for
//! [`super::holders`] to know.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use aya::maps::{Array, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::programs::{BtfTracePoint, FExit, Iter, ProgramError};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader};
use drover_ebpf::{
    Held, IoCount, IoKey, LATENCIES, LOST_IO, LOST_LATENCY, Latency, LatencyKey, Lost, Offsets,
    Sent,
};

use super::EvidenceError;
use super::btf::Types;
use super::cgroups::Hierarchy;
use super::offsets;
use super::places::Places;
use super::walk::{self, Turns, WalkError};
use crate::ids::Diskseq;

/// Values of the shared types as they lie in a map.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Raw<T>(pub(super) T);

macro_rules! plain {
    ($($type:ty),*) => {$(
        // SAFETY: #[repr(C)] of integers, valid for any bit pattern, its padding named.
        unsafe impl aya::Pod for Raw<$type> {}
    )*};
}
plain!(IoCount, Latency, Lost, Sent);

/// Program names as the object has them, and what each is for.
pub const BIO_QUEUE: &str = "bio_queue";
/// Times requests.
pub const RQ_COMPLETE: &str = "rq_complete";
/// Lists descriptors, and tells the kernel's own count of openers.
pub const DESCRIPTORS: &str = "descriptors";
/// Lists mappings.
pub const MAPPINGS: &str = "mappings";

/// Counts what watched processes send.
pub const SOCK_SENT: &str = "sock_sent";
/// The same, on kernels without that one's tracepoint (before 6.3).
pub const TCP_SENT: &str = "tcp_sent";
/// Those that count sends, the first that runs of them.
pub const SENDERS: [&str; 2] = [SOCK_SENT, TCP_SENT];

/// What came of loading one program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its name in the object.
    pub name: &'static str,
    /// Where it hooks in.
    pub hook: &'static str,
    /// Why it does not run, if it does not.
    pub failure: Option<String>,
}

/// Events that were not counted, by any cause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Losses {
    /// I/O that found no room among the counts.
    pub io: Lost,
    /// Requests that found no room among the latencies.
    pub latency: Lost,
    /// Runs of programs that count or time I/O which the kernel left out because
    /// the program ran on that CPU already.
    pub missed: u64,
}

/// The programs in the kernel.
pub struct Kernel {
    // Before `ebpf` where both are locked.
    io: Mutex<Places<IoKey>>,
    latency: Mutex<Places<LatencyKey>>,
    ebpf: Mutex<Ebpf>,
    turns: Turns,
    programs: Vec<Program>,
}

#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("the object has no such program")]
    NoProgram,
    #[error("{0}")]
    Program(String),
}

impl From<ProgramError> for AttachError {
    fn from(error: ProgramError) -> Self {
        // The verifier's log ends with the reason, and can be long.
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        let tail = text.char_indices().rev().nth(1500).map_or(0, |(at, _)| at);
        Self::Program(text[tail..].to_owned())
    }
}

/// The path of the kernel's own type description.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

impl Kernel {
    /// Loads and attaches what can be. `processes` bounds how many (process,
    /// disk) pairs are counted at a time.
    pub fn load(hierarchy: &Hierarchy, processes: u32) -> Result<Self, EvidenceError> {
        let bytes = fs::read(KERNEL_BTF).map_err(|error| EvidenceError::Read {
            path: KERNEL_BTF.into(),
            error,
        })?;
        let offsets = offsets::find(&Types::parse(&bytes)?, hierarchy)?;
        let btf = Btf::from_sys_fs().map_err(|e| EvidenceError::Load(e.to_string()))?;
        let mut ebpf = load(&offsets, &btf, processes).map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            EvidenceError::Load(format!("{error}: {}", cause.unwrap_or_default()))
        })?;
        let mut programs = Vec::new();
        for (name, hook) in [
            (BIO_QUEUE, "tp_btf block_bio_queue"),
            (RQ_COMPLETE, "tp_btf block_rq_complete"),
            (DESCRIPTORS, "iter task_file"),
            (MAPPINGS, "iter task_vma"),
            (SOCK_SENT, "tp_btf sock_send_length"),
            (TCP_SENT, "fexit tcp_sendmsg_locked"),
        ] {
            // One of the two that count sends, or they would be counted twice.
            let runs = |p: &Program| p.name == SOCK_SENT && p.failure.is_none();
            if name == TCP_SENT && programs.iter().any(runs) {
                continue;
            }
            let failure = attach(&mut ebpf, name, hook, &btf).err();
            programs.push(Program {
                name,
                hook,
                failure: failure.map(|e| e.to_string()),
            });
        }
        // This kernel is older than the first one's hook: nothing is amiss.
        if programs
            .iter()
            .any(|p| p.name == TCP_SENT && p.failure.is_none())
        {
            programs.retain(|p| p.name != SOCK_SENT);
        }
        if programs.iter().all(|p| p.failure.is_some()) {
            let why = programs[0].failure.clone().unwrap_or_default();
            return Err(EvidenceError::Load(why));
        }
        let places = places(processes);
        Ok(Self {
            io: Mutex::new(Places::of(&ebpf, "IO_KEYS", "IO", places)?),
            latency: Mutex::new(Places::of(&ebpf, "LATENCY_KEYS", "LATENCY", LATENCIES)?),
            ebpf: Mutex::new(ebpf),
            turns: Turns::default(),
            programs,
        })
    }

    /// What came of each program.
    pub fn programs(&self) -> &[Program] {
        &self.programs
    }

    /// Whether a program runs.
    pub fn runs(&self, name: &str) -> bool {
        let mut programs = self.programs.iter();
        programs.any(|p| p.name == name && p.failure.is_none())
    }

    /// As if this kernel had refused a program.
    #[cfg(test)]
    pub fn refuse(&mut self, name: &str) {
        let mut programs = self.programs.iter_mut();
        let program = programs.find(|p| p.name == name).expect("it was loaded");
        program.failure = Some("the verifier does not like it".to_owned());
    }

    fn ebpf(&self) -> MutexGuard<'_, Ebpf> {
        lock(&self.ebpf)
    }

    /// Every count, summed over CPUs.
    pub fn counts(&self) -> Result<Vec<(IoKey, IoCount)>, EvidenceError> {
        let rows = lock(&self.io).rows(&self.ebpf(), IoCount::default(), |sum, v| add(sum, *v))?;
        Ok(rows.into_iter().collect())
    }

    /// Who has counts.
    pub fn counted(&self) -> HashSet<IoKey> {
        lock(&self.io).keys()
    }

    /// Gives back the room of what is not counted any more: processes that have
    /// ended, and disks that are gone.
    pub fn forget(&self, gone: impl Fn(&IoKey) -> bool) -> Result<(), EvidenceError> {
        lock(&self.io).forget(&mut self.ebpf(), gone, IoCount::default())
    }

    /// Every latency histogram, summed over CPUs.
    pub fn latencies(&self) -> Result<Vec<(LatencyKey, Latency)>, EvidenceError> {
        let rows = lock(&self.latency).rows(&self.ebpf(), Latency::NONE, add_latency)?;
        Ok(rows.into_iter().collect())
    }

    /// Gives back the room of the histograms of disks that are gone.
    pub fn forget_latencies(
        &self,
        gone: impl Fn(&LatencyKey) -> bool,
    ) -> Result<(), EvidenceError> {
        lock(&self.latency).forget(&mut self.ebpf(), gone, Latency::NONE)
    }

    /// What every watched process has sent, by its id.
    pub fn sent(&self) -> Result<HashMap<u32, Sent>, EvidenceError> {
        let ebpf = self.ebpf();
        let wrong = |e| failed("SENT", &e);
        let map =
            PerCpuHashMap::<_, u32, Raw<Sent>>::try_from(map(&ebpf, "SENT")?).map_err(wrong)?;
        let sum = |values: PerCpuValues<Raw<Sent>>| {
            values
                .iter()
                .fold(Sent::default(), |sum, v| add_sent(sum, v.0))
        };
        let rows = map
            .iter()
            .map(|row| row.map(|(tgid, values)| (tgid, sum(values))));
        rows.collect::<Result<_, _>>().map_err(wrong)
    }

    /// Counts what this process sends from now on.
    pub fn watch(&self, tgid: u32) -> Result<(), EvidenceError> {
        let none = per_cpu(Sent::default())?;
        self.change_sent(|map| map.insert(tgid, none, 0))
    }

    /// Counts no more what this process sends; one that is not watched: nothing.
    pub fn unwatch(&self, tgid: u32) -> Result<(), EvidenceError> {
        self.change_sent(|map| match map.remove(&tgid) {
            Err(MapError::SyscallError(e)) if e.io_error.kind() == ErrorKind::NotFound => Ok(()),
            done => done,
        })
    }

    fn change_sent(
        &self,
        change: impl FnOnce(&mut PerCpuHashMap<&mut MapData, u32, Raw<Sent>>) -> Result<(), MapError>,
    ) -> Result<(), EvidenceError> {
        let mut ebpf = self.ebpf();
        let map = ebpf.map_mut("SENT").ok_or_else(|| no_map("SENT"))?;
        PerCpuHashMap::try_from(map)
            .and_then(|mut map| change(&mut map))
            .map_err(|e| failed("SENT", &e))
    }

    /// What was not counted since the programs were loaded.
    pub fn losses(&self) -> Result<Losses, EvidenceError> {
        let ebpf = self.ebpf();
        let map = PerCpuArray::<_, Raw<Lost>>::try_from(map(&ebpf, "LOST")?)
            .map_err(|e| failed("LOST", &e))?;
        let sum = |index: u32| -> Result<Lost, EvidenceError> {
            let values = map.get(&index, 0).map_err(|e| failed("LOST", &e))?;
            Ok(values.iter().fold(Lost::default(), |sum, v| Lost {
                events: sum.events + v.0.events,
                last_ns: sum.last_ns.max(v.0.last_ns),
            }))
        };
        let mut missed = 0;
        for (name, program) in ebpf.programs() {
            // A send that was not counted makes no verdict doubtful.
            if SENDERS.contains(&name) {
                continue;
            }
            if let Ok(fd) = program.fd() {
                missed += misses(Path::new(&format!(
                    "/proc/self/fdinfo/{}",
                    fd.as_fd().as_raw_fd()
                )))?;
            }
        }
        Ok(Losses {
            io: sum(LOST_IO)?,
            latency: sum(LOST_LATENCY)?,
            missed,
        })
    }

    /// Every file that leads to the disk and that the program `iterator`
    /// ([`DESCRIPTORS`] or [`MAPPINGS`]) finds. Nothing that others wait for
    /// is held while the kernel walks.
    pub fn held(
        &self,
        disk: Diskseq,
        iterator: &'static str,
        deadline: Instant,
    ) -> Result<Vec<Held>, EvidenceError> {
        let wrong = |why: String| EvidenceError::Iterate {
            program: iterator,
            why,
        };
        let hangs = |e: WalkError| wrong(e.to_string());
        let _turn = self.turns.take(iterator, deadline).map_err(hangs)?;
        let mut walk = self.walk(disk, iterator)?;
        let bytes = walk::read(&mut walk, deadline).map_err(hangs)?;
        let rows = bytes.chunks_exact(size_of::<Held>());
        if !rows.remainder().is_empty() {
            return Err(wrong("a record is cut short".to_owned()));
        }
        // SAFETY: each chunk is as long as a Held, which is #[repr(C)] and
        // valid for any bit pattern; the read needs no alignment.
        Ok(rows
            .map(|row| unsafe { row.as_ptr().cast::<Held>().read_unaligned() })
            .collect())
    }

    /// What a look waits for, where a walk is under way.
    pub fn waits_for(&self) -> Option<WalkError> {
        self.turns.waits_for()
    }

    /// A walk for the files of the disk, which begins when it is read. The
    /// caller has the turn.
    fn walk(&self, disk: Diskseq, iterator: &'static str) -> Result<File, EvidenceError> {
        let mut ebpf = self.ebpf();
        let map = ebpf.map_mut("TARGET").ok_or_else(|| no_map("TARGET"))?;
        Array::<_, u64>::try_from(map)
            .and_then(|mut map| map.set(0, disk.0, 0))
            .map_err(|e| failed("TARGET", &e))?;
        let wrong = |why: String| EvidenceError::Iterate {
            program: iterator,
            why,
        };
        let program = ebpf
            .program_mut(iterator)
            .ok_or_else(|| wrong("the object has no such program".to_owned()))?;
        let program: &mut Iter = program
            .try_into()
            .map_err(|e: ProgramError| wrong(e.to_string()))?;
        let link = program.attach().map_err(|e| wrong(e.to_string()))?;
        let link = program.take_link(link).map_err(|e| wrong(e.to_string()))?;
        link.into_file().map_err(|e| wrong(e.to_string()))
    }
}

/// A panic elsewhere leaves nothing half done: every change is one call.
fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A program finds a place by the lowest bits of a number.
fn places(processes: u32) -> u32 {
    processes.next_power_of_two()
}

fn load(offsets: &Offsets, btf: &Btf, processes: u32) -> Result<Ebpf, EbpfError> {
    let bytes: Vec<u8> = offsets.bytes().collect();
    let places = places(processes);
    EbpfLoader::new()
        .btf(Some(btf))
        .override_global("OFFSETS", bytes.as_slice(), true)
        .override_global("IO_MASK", &(places - 1), true)
        .map_max_entries("IO_KEYS", places)
        .map_max_entries("IO", places)
        .load(aya::include_bytes_aligned!(concat!(
            env!("OUT_DIR"),
            "/drover-ebpf.o"
        )))
}

fn attach(ebpf: &mut Ebpf, name: &str, hook: &str, btf: &Btf) -> Result<(), AttachError> {
    let program = ebpf.program_mut(name).ok_or(AttachError::NoProgram)?;
    let target = hook.rsplit(' ').next().unwrap_or(hook);
    match name {
        BIO_QUEUE | RQ_COMPLETE | SOCK_SENT => {
            let program: &mut BtfTracePoint = program.try_into()?;
            program.load(target, btf)?;
            program.attach()?;
        }
        TCP_SENT => {
            let program: &mut FExit = program.try_into()?;
            program.load(target, btf)?;
            program.attach()?;
        }
        _ => {
            let program: &mut Iter = program.try_into()?;
            program.load(target, btf)?;
        }
    }
    Ok(())
}

/// A map of the object.
pub(super) fn map<'a>(
    ebpf: &'a Ebpf,
    name: &'static str,
) -> Result<&'a aya::maps::Map, EvidenceError> {
    ebpf.map(name).ok_or_else(|| no_map(name))
}

/// The same value for each CPU.
pub(super) fn per_cpu<T: Copy>(value: T) -> Result<PerCpuValues<Raw<T>>, EvidenceError>
where
    Raw<T>: aya::Pod,
{
    let of_cpus = |what: &str, error| EvidenceError::Read {
        path: what.into(),
        error,
    };
    let cpus = aya::util::nr_cpus().map_err(|(what, error)| of_cpus(what, error))?;
    PerCpuValues::try_from(vec![Raw(value); cpus]).map_err(|error| of_cpus("the CPUs", error))
}

/// Why there is no such map.
pub(super) fn no_map(name: &'static str) -> EvidenceError {
    EvidenceError::Map {
        map: name,
        why: "the object has no such map".to_owned(),
    }
}

/// What went wrong with a map.
pub(super) fn failed(map: &'static str, error: &MapError) -> EvidenceError {
    let cause = std::error::Error::source(error).map(|e| format!(": {e}"));
    EvidenceError::Map {
        map,
        why: format!("{error}{}", cause.unwrap_or_default()),
    }
}

/// The kernel's count of runs of a program that it left out.
fn misses(info: &Path) -> Result<u64, EvidenceError> {
    let text = fs::read_to_string(info).map_err(|error| EvidenceError::Read {
        path: info.to_owned(),
        error,
    })?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("recursion_misses:"));
    Ok(line.and_then(|n| n.trim().parse().ok()).unwrap_or(0))
}

/// The sum of two counts; times are the later ones.
pub fn add(a: IoCount, b: IoCount) -> IoCount {
    IoCount {
        reads: a.reads + b.reads,
        read_bytes: a.read_bytes + b.read_bytes,
        writes: a.writes + b.writes,
        written_bytes: a.written_bytes + b.written_bytes,
        flushes: a.flushes + b.flushes,
        discards: a.discards + b.discards,
        last_read_ns: a.last_read_ns.max(b.last_read_ns),
        last_write_ns: a.last_write_ns.max(b.last_write_ns),
    }
}

/// The sum of two histograms.
pub fn add_latency(mut a: Latency, b: &Latency) -> Latency {
    for (to, from) in a.buckets.iter_mut().zip(b.buckets) {
        *to += from;
    }
    a.sum_ns += b.sum_ns;
    a.untimed += b.untimed;
    a.errors += b.errors;
    for (to, from) in a.device_buckets.iter_mut().zip(b.device_buckets) {
        *to += from;
    }
    a.device_sum_ns += b.device_sum_ns;
    a.queue_sum_ns += b.queue_sum_ns;
    a
}

/// The sum of two counts; the time is the later one.
pub fn add_sent(a: Sent, b: Sent) -> Sent {
    Sent {
        bytes: a.bytes + b.bytes,
        last_ns: a.last_ns.max(b.last_ns),
    }
}

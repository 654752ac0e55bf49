//! Who holds a disk: every descriptor, mapping, mount and stacked device, and
//! whether they add up to the kernel's own count of openers.
//!
//! Descriptors that share one open file count once. A mount counts once per
//! file system, in whatever namespaces it is seen. Nothing here opens the disk
//! or touches a file system on it: a disk whose home is lost would never answer.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use drover_ebpf::{DEVICE, FMODE_WRITE, FOLDER, Held};

use super::EvidenceError;
use super::disks::{Device, Devices};
use super::ledger::{Books, in_first_pid_namespace};
use super::loader::{BIO_QUEUE, DESCRIPTORS, Kernel, MAPPINGS, Program};
use super::mounts::{self, Found};
use super::readers::{Paths, Readers};
use super::streams::since_ms;
use super::verdict::{Facts, Sight};
use crate::attach::ports::{Disk, Holder};

/// How often a count that does not add up is taken again, and after what
/// pause: openers come and go, and a closed file is let go a little later.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(30);

/// What a look at holders needs to know besides the kernel.
pub struct Known<'a> {
    /// The counts.
    pub books: &'a Books,
    /// Paths of cgroups by id.
    pub paths: &'a Paths,
    /// The registered readers.
    pub readers: &'a Readers,
    /// CLOCK_MONOTONIC at which `books` was read.
    pub now_ns: u64,
    /// From when on a loss matters.
    pub since_ns: u64,
    /// When the look is to have ended.
    pub deadline: Instant,
}

/// Looks at who holds `disk`; mounts below a path of `own_mounts` are drover's own.
pub fn look(
    kernel: &Kernel,
    disk: &Disk,
    own_mounts: &[PathBuf],
    known: &Known<'_>,
) -> Result<Sight, EvidenceError> {
    if let Some(why) = blindness(kernel.programs(), in_first_pid_namespace()) {
        return Ok(Sight::Blind(why));
    }
    let mut attempt = 0;
    loop {
        attempt += 1;
        let Some(scene) = Scene::of(kernel, disk, own_mounts, known.deadline)? else {
            return Ok(Sight::Gone);
        };
        let facts = scene.facts(disk, known);
        let settled = facts.unexplained == 0 || facts.holders.iter().any(|h| h.writable);
        if settled || attempt == ATTEMPTS {
            return Ok(Sight::Seen(facts));
        }
        thread::sleep(PAUSE);
    }
}

/// Why no verdict can be had: a program that each needs does not run, or the
/// agent does not see every process. Openers of the device would still be
/// missed in the kernel's count; a file on it that nobody is found to have open,
/// or that only a mapping keeps, would not.
pub fn blindness(programs: &[Program], sees_all_processes: bool) -> Option<String> {
    let refused = programs.iter().find_map(|program| {
        let needed = matches!(program.name, BIO_QUEUE | DESCRIPTORS | MAPPINGS);
        let why = program.failure.as_ref().filter(|_| needed)?;
        Some(format!(
            "{} does not run on this kernel: {why}",
            program.hook
        ))
    });
    refused.or_else(|| {
        let why =
            "the agent does not see the processes of other containers: run it with hostPID: true";
        (!sees_all_processes).then(|| why.to_owned())
    })
}

/// All that was found of one disk.
struct Scene {
    held: Vec<Held>,
    /// Mounts that are not drover's own.
    mounts: Vec<Found>,
    stacked: Vec<super::disks::Stacked>,
    unexplained: i64,
}

impl Scene {
    fn of(
        kernel: &Kernel,
        disk: &Disk,
        own: &[PathBuf],
        deadline: Instant,
    ) -> Result<Option<Self>, EvidenceError> {
        let pass = |program| kernel.held(disk.diskseq, program, deadline).map(Pass::of);
        let sysfs = |error| EvidenceError::Read {
            path: Path::new("/sys/block").join(&disk.name),
            error,
        };
        let Some(devices) = Devices::of(disk).map_err(sysfs)? else {
            return Ok(None);
        };
        // An open folder in sysfs is what makes the program tell the count.
        let mut folders = Vec::new();
        for device in devices.all() {
            folders.push(File::open(&device.folder).map_err(sysfs)?);
        }
        let mapped = pass(MAPPINGS)?;
        let first = pass(DESCRIPTORS)?;
        let all = mounts::everywhere().map_err(|error| EvidenceError::Read {
            path: "/proc/self/ns/mnt".into(),
            error,
        })?;
        let mounted: Vec<(u32, Found)> = all
            .into_iter()
            .filter_map(|found| Some((devices.mounted_by(&found.mount)?, found)))
            .collect();
        let points: Vec<&Path> = mounted
            .iter()
            .map(|(_, f)| f.mount.point.as_path())
            .collect();
        let stacked = devices.stacked(&points).map_err(sysfs)?;
        let second = pass(DESCRIPTORS)?;
        let third = pass(DESCRIPTORS)?;
        // What all three passes found was open during the whole of the second,
        // so its count has each of these in it. Of fewer passes, two readers
        // that took turns could be taken for one and a writer that hid. A file
        // that is closed and another one's address are told apart by the count
        // at each sight.
        let again = match mapped.files.is_empty() {
            true => None,
            false => Some(pass(MAPPINGS)?),
        };
        let steady = first.saw_as(&second)
            && second.saw_as(&third)
            && again.iter().all(|again| mapped.saw_as(again))
            && [&first, &second, &third, &mapped]
                .into_iter()
                .chain(&again)
                .all(|pass| second.counts.hold_in(&pass.held));
        drop(folders);
        let unexplained = if steady {
            let files = second.files.union(&mapped.files).copied().collect();
            second.counts.unexplained(&devices, &files, &mounted)?
        } else {
            -1
        };
        let mut held = third.held;
        held.extend(second.held);
        held.extend(first.held);
        held.extend(mapped.held);
        held.retain(|h| h.kind != FOLDER);
        let own_peers = peers_of_own(&mounted, own);
        let mounts = mounted
            .into_iter()
            .map(|(_, found)| found)
            .filter(|found| !is_own(found, own, &own_peers))
            .collect();
        Ok(Some(Self {
            held,
            mounts,
            stacked,
            unexplained,
        }))
    }

    fn facts(&self, disk: &Disk, known: &Known<'_>) -> Facts {
        let mut processes = BTreeMap::<(u32, u64), Holder>::new();
        for held in &self.held {
            let holder = processes
                .entry((held.tgid, held.start_ns))
                .or_insert_with(|| process(held, disk, known));
            holder.writable |= held.mode & FMODE_WRITE != 0;
        }
        let mut holders: Vec<_> = processes.into_values().collect();
        let mut seen = HashSet::new();
        for found in &self.mounts {
            let place = if found.own_namespace {
                format!("mount at {}", found.mount.point.display())
            } else {
                format!(
                    "mount at {} in the namespace of process {}",
                    found.mount.point.display(),
                    found.pid
                )
            };
            if seen.insert(place.clone()) {
                holders.push(unnumbered(place, found.mount.writable()));
            }
        }
        for stacked in &self.stacked {
            holders.push(unnumbered(stacked.name.clone(), stacked.writable));
        }
        Facts {
            holders,
            unexplained: self.unexplained,
            lost: known.books.lost_since(known.since_ns),
        }
    }
}

fn process(held: &Held, disk: &Disk, known: &Known<'_>) -> Holder {
    let count = known.books.process(disk.diskseq, held.tgid, held.start_ns);
    let name = held.comm.split(|&b| b == 0).next().unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    let cgroup = super::cgroup_name(known.paths, held.cgroup);
    let readers = known.readers;
    Holder {
        pid: held.tgid,
        pod: super::cgroups::pod(&cgroup),
        cgroup,
        writable: false,
        registered: readers.knows(&name)
            || readers.covers(disk, held.tgid, held.start_ns, held.cgroup, known.paths),
        name,
        last_read_ms: since_ms(count.last_read_ns, known.now_ns),
        last_write_ms: since_ms(count.last_write_ns, known.now_ns),
        read_bytes: count.read_bytes,
        written_bytes: count.written_bytes,
    }
}

fn unnumbered(name: String, writable: bool) -> Holder {
    Holder {
        pid: 0,
        name,
        cgroup: String::new(),
        pod: None,
        writable,
        registered: false,
        last_read_ms: None,
        last_write_ms: None,
        read_bytes: 0,
        written_bytes: 0,
    }
}

/// The peer groups of drover's own mounts as the agent's namespace has them: not
/// those that they only receive from, whose other slaves no unmount here reaches.
fn peers_of_own(mounted: &[(u32, Found)], own: &[PathBuf]) -> HashSet<u32> {
    mounted
        .iter()
        .map(|(_, found)| found)
        .filter(|f| f.own_namespace && own.iter().any(|path| f.mount.point.starts_with(path)))
        .filter_map(|f| f.mount.shared)
        .collect()
}

/// Whether a mount goes when drover unmounts its own: it is drover's, or the
/// same one as another namespace sees it through propagation. A private copy
/// stays, and holds.
fn is_own(found: &Found, own: &[PathBuf], own_peers: &HashSet<u32>) -> bool {
    let at_own_place = own.iter().any(|path| found.mount.point.starts_with(path));
    let groups = [found.mount.shared, found.mount.master];
    let peer = groups.iter().flatten().any(|g| own_peers.contains(g));
    at_own_place && (found.own_namespace || peer)
}

/// One walk of the kernel's over all descriptors, or over all mappings, for
/// those that lead to a disk.
struct Pass {
    held: Vec<Held>,
    /// Open files of the disk's devices: (device number, file).
    files: HashSet<(u32, u64)>,
    /// The counts that it came by. None in one over mappings.
    counts: Counts,
}

impl Pass {
    fn of(held: Vec<Held>) -> Self {
        let devices = held.iter().filter(|h| h.kind == DEVICE);
        Self {
            files: devices.map(|h| (h.dev, h.file)).collect(),
            counts: Counts::of(&held),
            held,
        }
    }

    fn saw_as(&self, other: &Self) -> bool {
        self.files == other.files && self.counts == other.counts
    }
}

/// The kernel's counts of openers, by device.
#[derive(Debug, PartialEq, Eq)]
struct Counts(HashMap<u32, u32>);

impl Counts {
    fn of(held: &[Held]) -> Self {
        let folders = held.iter().filter(|h| h.kind == FOLDER);
        Self(folders.map(|h| (h.dev, h.openers)).collect())
    }

    /// Whether every sight of a device's file found as many openers. A struct
    /// file's address is used again at once: a reader that opens and closes is
    /// always found open at the same one, and the count may have him closed.
    fn hold_in(&self, held: &[Held]) -> bool {
        let mut devices = held.iter().filter(|h| h.kind == DEVICE);
        devices.all(|h| self.0.get(&h.dev) == Some(&h.openers))
    }

    fn get(&self, device: &Device) -> Result<i64, EvidenceError> {
        let count = self.0.get(&device.dev).copied();
        count.map(i64::from).ok_or_else(|| EvidenceError::Iterate {
            program: DESCRIPTORS,
            why: format!("it did not tell the openers of {}", device.name),
        })
    }

    /// Openers of the disk that no file and no mount explains.
    fn unexplained(
        &self,
        devices: &Devices,
        files: &HashSet<(u32, u64)>,
        mounted: &[(u32, Found)],
    ) -> Result<i64, EvidenceError> {
        let systems: HashSet<(u32, u32)> = mounted
            .iter()
            .map(|(dev, found)| (*dev, found.mount.dev))
            .collect();
        let explained = |device: &Device| {
            let files = files.iter().filter(|(dev, _)| *dev == device.dev).count();
            let systems = systems.iter().filter(|(dev, _)| *dev == device.dev).count();
            i64::try_from(files + systems).unwrap_or(i64::MAX)
        };
        let mut through_parts = Vec::new();
        for part in &devices.parts {
            let openers = self.get(part)?;
            let missing = openers - explained(part);
            if missing != 0 {
                return Ok(missing);
            }
            through_parts.push(openers);
        }
        Ok(whole(
            self.get(&devices.whole)? - explained(&devices.whole),
            &through_parts,
            counts_each(),
        ))
    }
}

/// What is left of the whole disk's count when the openers of its partitions
/// are taken off. Older kernels open the whole disk once per partition that is
/// open, newer ones once per opener of a partition (blkdev_get_part in
/// block/bdev.c). The lower number fits either only when nothing else is open.
fn whole(left: i64, through_parts: &[i64], counts_each: bool) -> i64 {
    let partitions = through_parts.iter().filter(|&&openers| openers > 0).count();
    let once = left - i64::try_from(partitions).unwrap_or(i64::MAX);
    let each = left - through_parts.iter().sum::<i64>();
    if once == 0 || !counts_each {
        once
    } else {
        each
    }
}

/// Whether this kernel is known to count every opener of a partition on the
/// whole disk: 6.6 does. An older one that does so too leaves openers unexplained.
fn counts_each() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    is_at_least_6_6(&release)
}

fn is_at_least_6_6(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|digits| digits.parse::<u32>().ok());
    numbers.next().zip(numbers.next()) >= Some((6, 6))
}

#[cfg(test)]
#[path = "holders_tests.rs"]
mod tests;

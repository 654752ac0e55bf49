//! What was done on each disk, by whom: the kernel's counts, with those of
//! ended processes kept per cgroup so that the kernel's map has room.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use drover_ebpf::{IoCount, IoKey};

use super::EvidenceError;
use super::disks::Names;
use super::loader::{Kernel, Losses, add};
use super::process;
use crate::ids::Diskseq;

/// What is kept between two looks at the kernel's map.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Counts of processes that have ended, by (disk, cgroup).
    ended: HashMap<(u64, u64), IoCount>,
    missed: u64,
    missed_ns: u64,
}

/// The state of all counts at one moment.
#[derive(Debug, Clone, Default)]
pub struct Books {
    rows: Vec<(IoKey, IoCount)>,
    ended: HashMap<(u64, u64), IoCount>,
    /// What was not counted.
    pub losses: Losses,
    missed_ns: u64,
}

impl Ledger {
    /// Reads the kernel's counts; takes out those of processes and disks that
    /// are gone. `now_ns` is CLOCK_MONOTONIC.
    pub fn look(
        &mut self,
        kernel: &Kernel,
        names: &Names,
        now_ns: u64,
    ) -> Result<Books, EvidenceError> {
        let losses = kernel.losses()?;
        if losses.missed != self.missed {
            self.missed = losses.missed;
            self.missed_ns = now_ns;
        }
        // In another process namespace than the first, processes that are not
        // seen in /proc may well live.
        let sees_all = in_first_pid_namespace();
        // Asked before the counts are read, so that what a process did last is in them.
        let ended = |key: &IoKey| sees_all && !process::lives(key.tgid, key.start_ns);
        let mut over = kernel.counted();
        over.retain(|key| names.gone(key.diskseq) || ended(key));
        let mut rows = Vec::new();
        for (key, count) in kernel.counts()? {
            let diskseq = names.fold(key.diskseq);
            if !over.contains(&key) {
                rows.push((IoKey { diskseq, ..key }, count));
            } else if !names.gone(key.diskseq) {
                let sum = self.ended.entry((diskseq, key.cgroup)).or_default();
                *sum = add(*sum, count);
            }
        }
        kernel.forget(|key| over.contains(key))?;
        self.ended.retain(|(disk, _), _| !names.gone(*disk));
        Ok(Books {
            rows,
            ended: self.ended.clone(),
            losses,
            missed_ns: self.missed_ns,
        })
    }
}

impl Books {
    /// The counts of living processes on a disk.
    pub fn processes(&self, disk: Diskseq) -> impl Iterator<Item = &(IoKey, IoCount)> {
        self.rows
            .iter()
            .filter(move |(key, _)| key.diskseq == disk.0)
    }

    /// What one process did on a disk, in whatever cgroups it was.
    pub fn process(&self, disk: Diskseq, tgid: u32, start_ns: u64) -> IoCount {
        self.processes(disk)
            .filter(|(key, _)| key.tgid == tgid && process::same_start(key.start_ns, start_ns))
            .fold(IoCount::default(), |sum, (_, count)| add(sum, *count))
    }

    /// What the groups for which `is_in` holds did on a disk, ended processes too.
    pub fn groups(&self, disk: Diskseq, is_in: impl Fn(u64) -> bool) -> IoCount {
        let living = self.processes(disk).map(|(key, count)| (key.cgroup, count));
        let ended = self.ended.iter();
        let ended = ended.filter(|((seq, _), _)| *seq == disk.0);
        living
            .chain(ended.map(|((_, group), count)| (*group, count)))
            .filter(|(group, _)| is_in(*group))
            .fold(IoCount::default(), |sum, (_, count)| add(sum, *count))
    }

    /// What one process did on every disk but this.
    pub fn process_elsewhere(&self, disk: Diskseq, tgid: u32, start_ns: u64) -> IoCount {
        self.rows
            .iter()
            .filter(|(key, _)| key.diskseq != disk.0)
            .filter(|(key, _)| key.tgid == tgid && process::same_start(key.start_ns, start_ns))
            .fold(IoCount::default(), |sum, (_, count)| add(sum, *count))
    }

    /// What the groups for which `is_in` holds did on every disk but this.
    pub fn groups_elsewhere(&self, disk: Diskseq, is_in: impl Fn(u64) -> bool) -> IoCount {
        let rows = self.rows.iter();
        let living = rows.map(|(key, count)| (key.diskseq, key.cgroup, count));
        let ended = self.ended.iter();
        living
            .chain(ended.map(|((disk, group), count)| (*disk, *group, count)))
            .filter(|(other, group, _)| *other != disk.0 && is_in(*group))
            .fold(IoCount::default(), |sum, (_, _, count)| add(sum, *count))
    }

    /// All that was done on each disk.
    pub fn disks(&self) -> HashMap<Diskseq, IoCount> {
        let mut sums = HashMap::<_, IoCount>::new();
        let living = self.rows.iter().map(|(key, count)| (key.diskseq, count));
        let ended = self.ended.iter().map(|((disk, _), count)| (*disk, count));
        for (disk, count) in living.chain(ended) {
            let sum = sums.entry(Diskseq(disk)).or_default();
            *sum = add(*sum, *count);
        }
        sums
    }

    /// Whether I/O may have gone uncounted since `since_ns`, and how. What was
    /// lost earlier changes no answer to "what was done since".
    pub fn lost_since(&self, since_ns: u64) -> Option<String> {
        let full = self.losses.io;
        if full.events > 0 && full.last_ns >= since_ns {
            return Some(format!(
                "{} I/O events found no room among the counts",
                full.events
            ));
        }
        (self.losses.missed > 0 && self.missed_ns >= since_ns)
            .then(|| format!("the kernel left out {} program runs", self.losses.missed))
    }
}

/// Whether /proc shows every process (PROC_PID_INIT_INO in include/linux/proc_ns.h).
pub fn in_first_pid_namespace() -> bool {
    fs::metadata("/proc/self/ns/pid").is_ok_and(|meta| meta.ino() == 0xEFFF_FFFC)
}

#[cfg(test)]
mod tests {
    use drover_ebpf::Lost;

    use super::*;

    fn row(diskseq: u64, cgroup: u64, tgid: u32, reads: u64) -> (IoKey, IoCount) {
        let key = IoKey {
            diskseq,
            cgroup,
            tgid,
            start_ns: 5_000_000_001,
            pad: 0,
        };
        let count = IoCount {
            reads,
            last_read_ns: reads * 10,
            ..IoCount::default()
        };
        (key, count)
    }

    fn books() -> Books {
        Books {
            rows: vec![row(1, 7, 100, 2), row(1, 8, 100, 3), row(2, 7, 100, 9)],
            ended: HashMap::from([((1, 7), row(1, 7, 0, 4).1)]),
            ..Books::default()
        }
    }

    #[test]
    fn a_process_is_counted_over_all_its_groups_and_on_one_disk_only() {
        let sum = books().process(Diskseq(1), 100, 5_000_000_001);
        assert_eq!((sum.reads, sum.last_read_ns), (5, 30));
        assert_eq!(books().process(Diskseq(1), 100, 6_000_000_000).reads, 0);
    }

    #[test]
    fn a_group_keeps_what_its_ended_processes_did() {
        assert_eq!(books().groups(Diskseq(1), |group| group == 7).reads, 6);
        assert_eq!(books().disks()[&Diskseq(1)].reads, 9);
    }

    #[test]
    fn what_is_done_elsewhere_is_kept_apart() {
        let elsewhere = books().process_elsewhere(Diskseq(1), 100, 5_000_000_001);
        assert_eq!(elsewhere.reads, 9);
        let groups = books().groups_elsewhere(Diskseq(2), |group| group == 7);
        assert_eq!(groups.reads, 2 + 4);
    }

    #[test]
    fn a_loss_counts_as_long_as_it_is_in_the_window() {
        let mut books = books();
        assert_eq!(books.lost_since(0), None);
        books.losses.io = Lost {
            events: 1,
            last_ns: 50,
        };
        assert!(books.lost_since(50).is_some());
        assert_eq!(books.lost_since(51), None);
        books.losses.missed = 2;
        books.missed_ns = 60;
        assert!(books.lost_since(51).unwrap().contains("2 program runs"));
    }
}

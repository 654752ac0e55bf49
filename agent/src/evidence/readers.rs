//! Registered readers: backup tools that read a disk themselves.
//!
//! A registration says who may read. It never makes less of a holder that
//! could write. A process is known by its id and start time, so that its id
//! used again is nobody; a cgroup by its id, its descendants by their paths.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::cgroups::Hierarchy;
use super::ledger::Books;
use super::process;
use crate::attach::ports::Disk;
use crate::ids::{Bytes, TicketId, VolumeId};

/// Whom a registration is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    /// One process, by id.
    Process(u32),
    /// A cgroup with all below it, by its path: as `/proc/PID/cgroup` writes
    /// it, or below the hierarchy's mount point.
    Cgroup(PathBuf),
}

/// A reader to be registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reader {
    /// Who reads.
    pub who: Who,
    /// The volume.
    pub volume: VolumeId,
    /// The ticket that stands for it.
    pub ticket: TicketId,
    /// The volume's disk on this node.
    pub disk: Disk,
}

/// Why a reader could not be registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// There is no such process.
    #[error("process {pid}: {error}")]
    Process {
        /// Its id.
        pid: u32,
        /// What the kernel said.
        error: io::Error,
    },
    /// The process has ended; only its parent has not taken note.
    #[error("process {0} has ended")]
    Ended(u32),
    /// There is no such cgroup.
    #[error("cgroup {}: {error}", path.display())]
    Cgroup {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
}

/// How a registered reader is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReaderStatus {
    /// Its ticket.
    pub ticket: TicketId,
    /// The volume it reads.
    pub volume: VolumeId,
    /// The disk it reads.
    pub disk: Disk,
    /// `pid 4711` or `cgroup /backup`.
    pub who: String,
    /// Whether the process, or any process of the cgroup, lives.
    pub alive: bool,
    /// Milliseconds since it last read from the disk; none: it never did.
    pub last_progress_ms: Option<u64>,
    /// What it has read from the disk.
    pub bytes: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Known {
    Process { pid: u32, began: u64 },
    Cgroup { id: u64, path: String },
}

#[derive(Debug, Clone)]
struct Entry {
    reader: Reader,
    known: Known,
}

/// The registered readers, by ticket.
#[derive(Debug, Default)]
pub struct Readers {
    entries: Mutex<HashMap<TicketId, Entry>>,
}

/// The paths of cgroups by id.
pub type Paths = HashMap<u64, String>;

impl Readers {
    fn entries(&self) -> MutexGuard<'_, HashMap<TicketId, Entry>> {
        // Every change is one call on the map: a panic leaves nothing half done.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a reader; the same ticket again replaces it.
    pub fn register(&self, reader: Reader, hierarchy: &Hierarchy) -> Result<(), RegisterError> {
        let known = match &reader.who {
            Who::Process(pid) => {
                let pid = *pid;
                let (state, began) =
                    process::stat(pid).map_err(|error| RegisterError::Process { pid, error })?;
                if matches!(state, 'Z' | 'X') {
                    return Err(RegisterError::Ended(pid));
                }
                Known::Process { pid, began }
            }
            Who::Cgroup(path) => {
                let wrong = |error| RegisterError::Cgroup {
                    path: path.clone(),
                    error,
                };
                let id = hierarchy.id_of(path).map_err(wrong)?;
                let path = hierarchy.paths().remove(&id).ok_or_else(|| {
                    wrong(io::Error::other("it went while it was being registered"))
                })?;
                if path == "/" {
                    return Err(wrong(io::Error::other(
                        "the root holds every process of the node: name the backup's own cgroup",
                    )));
                }
                Known::Cgroup { id, path }
            }
        };
        let entry = Entry { reader, known };
        self.entries().insert(entry.reader.ticket.clone(), entry);
        Ok(())
    }

    /// Takes a registration back. Unknown ticket: nothing.
    pub fn unregister(&self, ticket: &TicketId) {
        self.entries().remove(ticket);
    }

    /// Whether a process is registered as a reader of the disk.
    pub fn covers(&self, disk: &Disk, pid: u32, start_ns: u64, cgroup: u64, paths: &Paths) -> bool {
        self.entries()
            .values()
            .filter(|entry| entry.reader.disk.diskseq == disk.diskseq)
            .any(|entry| match &entry.known {
                Known::Process { pid: known, began } => {
                    *known == pid && process::began_at(start_ns, *began)
                }
                Known::Cgroup { id, path } => is_in(cgroup, *id, path, paths),
            })
    }

    /// How all are doing at `now_ns` (CLOCK_MONOTONIC), by ticket.
    pub fn status(
        &self,
        books: &Books,
        hierarchy: &Hierarchy,
        paths: &Paths,
        now_ns: u64,
    ) -> Vec<ReaderStatus> {
        let mut all: Vec<_> = self
            .entries()
            .values()
            .map(|entry| entry.status(books, hierarchy, paths, now_ns))
            .collect();
        all.sort_by(|a, b| a.ticket.cmp(&b.ticket));
        all
    }
}

/// Whether `group` is the group `id` at `path` or below it.
fn is_in(group: u64, id: u64, path: &str, paths: &Paths) -> bool {
    if group == id {
        return true;
    }
    // The id at the path must be the registered one still: paths are used again.
    let below = paths.get(&group).and_then(|p| p.strip_prefix(path));
    below.is_some_and(|rest| rest.starts_with('/'))
        && paths.get(&id).map(String::as_str) == Some(path)
}

impl Entry {
    fn status(
        &self,
        books: &Books,
        hierarchy: &Hierarchy,
        paths: &Paths,
        now_ns: u64,
    ) -> ReaderStatus {
        let disk = self.reader.disk.diskseq;
        let (who, alive, count) = match &self.known {
            Known::Process { pid, began } => {
                let alive = process::stat(*pid)
                    .is_ok_and(|(state, now)| now == *began && !matches!(state, 'Z' | 'X'));
                let count = books.process(disk, *pid, began * 10_000_000);
                (format!("pid {pid}"), alive, count)
            }
            Known::Cgroup { id, path } => {
                let count = books.groups(disk, |group| is_in(group, *id, path, paths));
                let here = paths.get(id) == Some(path);
                (
                    format!("cgroup {path}"),
                    here && hierarchy.populated(path),
                    count,
                )
            }
        };
        ReaderStatus {
            ticket: self.reader.ticket.clone(),
            volume: self.reader.volume.clone(),
            disk: self.reader.disk.clone(),
            who,
            alive,
            last_progress_ms: since_ms(count.last_read_ns, now_ns),
            bytes: Bytes(count.read_bytes),
        }
    }
}

/// Milliseconds from `then_ns` to `now_ns`; none for a time that never was.
pub fn since_ms(then_ns: u64, now_ns: u64) -> Option<u64> {
    (then_ns > 0).then(|| now_ns.saturating_sub(then_ns) / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_covers_what_is_below_it_and_nothing_beside_it() {
        let paths = HashMap::from([
            (1, "/backup".to_owned()),
            (2, "/backup/job".to_owned()),
            (3, "/backup-not".to_owned()),
        ]);
        let inside = |group| is_in(group, 1, "/backup", &paths);
        assert!(inside(1) && inside(2));
        assert!(!inside(3) && !inside(4));
    }

    #[test]
    fn a_path_used_again_by_another_group_covers_nothing() {
        let paths = HashMap::from([(9, "/backup".to_owned()), (2, "/backup/job".to_owned())]);
        assert!(!is_in(2, 1, "/backup", &paths));
    }

    #[test]
    fn an_ended_process_cannot_be_registered() {
        let reader = |pid| Reader {
            who: Who::Process(pid),
            volume: "vol-1".parse().unwrap(),
            ticket: "ticket-1".parse().unwrap(),
            disk: Disk {
                name: "x".to_owned(),
                diskseq: crate::ids::Diskseq(1),
            },
        };
        let hierarchy = Hierarchy::choose("", super::super::cgroups::Choice::Found);
        let readers = Readers::default();
        let error = readers.register(reader(u32::MAX), &hierarchy).unwrap_err();
        assert!(matches!(error, RegisterError::Process { .. }), "{error}");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        while process::stat(pid).unwrap().0 != 'Z' {
            std::thread::yield_now();
        }
        let error = readers.register(reader(pid), &hierarchy).unwrap_err();
        assert!(matches!(error, RegisterError::Ended(_)), "{error}");
        child.wait().unwrap();
    }
}

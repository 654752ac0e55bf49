//! Registered readers: backup tools that read a disk themselves.
//!
//! A registration says who may read. It never makes less of a holder that
//! could write. A process is known by its id and start time (in hundredths of a
//! second), so that its id used again is nobody; a cgroup by its id, its
//! descendants by their paths.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use drover_ebpf::Sent;

use super::cgroups::Hierarchy;
use super::ledger::Books;
use super::process;
use super::sends::ByTicket;
use super::tools::Tool;
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

/// Bytes that went one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flow {
    /// How many.
    pub bytes: Bytes,
    /// Milliseconds since the last of them; none: there was none yet.
    pub last_ms: Option<u64>,
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
    /// What it read from the disk.
    pub read: Flow,
    /// What it sent over TCP; none where this kernel does not let it be counted.
    pub sent: Option<Flow>,
    /// What it wrote to other disks.
    pub wrote: Flow,
}

/// What a registered reader does, as far as its bytes tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Motion {
    /// It reads, and sends or writes elsewhere.
    Flows,
    /// It reads, and nothing leaves it: its sink is slow, or nothing has changed.
    Reads,
    /// It sends or writes, and reads nothing: its source is slow, or it is at its end.
    Sends,
    /// It does nothing.
    Rests,
}

impl Motion {
    /// As `drover top` and `drover trace` write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flows => "flows",
            Self::Reads => "reads-only",
            Self::Sends => "sends-only",
            Self::Rests => "rests",
        }
    }
}

impl ReaderStatus {
    /// Milliseconds since it last moved a byte, either way; none: it never did.
    pub fn last_progress_ms(&self) -> Option<u64> {
        let flows = [Some(self.read), self.sent, Some(self.wrote)];
        flows.into_iter().flatten().filter_map(|f| f.last_ms).min()
    }

    /// What it did within `window_ms`.
    pub fn motion(&self, window_ms: u64) -> Motion {
        let moved = |flow: Flow| flow.last_ms.is_some_and(|ms| ms <= window_ms);
        let out = moved(self.wrote) || self.sent.is_some_and(moved);
        match (moved(self.read), out) {
            (true, true) => Motion::Flows,
            (true, false) => Motion::Reads,
            (false, true) => Motion::Sends,
            (false, false) => Motion::Rests,
        }
    }
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
    tools: Vec<Tool>,
    entries: Mutex<HashMap<TicketId, Entry>>,
}

/// The paths of cgroups by id.
pub type Paths = HashMap<u64, String>;

impl Readers {
    /// No registered readers, but these tools are known by name.
    pub fn new(tools: Vec<Tool>) -> Self {
        Self {
            tools,
            entries: Mutex::default(),
        }
    }

    /// Whether processes of this name read as if they were registered.
    pub fn knows(&self, comm: &str) -> bool {
        self.tools.iter().any(|tool| tool.is(comm))
    }

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

    /// The processes that each ticket stands for now.
    pub fn processes(&self, hierarchy: &Hierarchy) -> ByTicket {
        let of = |entry: &Entry| match &entry.known {
            Known::Process { pid, began } if lives(*pid, *began) => HashSet::from([*pid]),
            Known::Process { .. } => HashSet::new(),
            Known::Cgroup { path, .. } => hierarchy.processes(path).into_iter().collect(),
        };
        let entries = self.entries();
        let all = entries
            .iter()
            .map(|(ticket, entry)| (ticket.clone(), of(entry)));
        all.collect()
    }

    /// How all are doing, by ticket.
    pub fn status(&self, seen: &Seen<'_>) -> Vec<ReaderStatus> {
        let entries = self.entries();
        let mut all: Vec<_> = entries.values().map(|entry| entry.status(seen)).collect();
        all.sort_by(|a, b| a.ticket.cmp(&b.ticket));
        all
    }
}

/// What is known when the readers are looked at.
pub struct Seen<'a> {
    /// The counts.
    pub books: &'a Books,
    /// Paths of cgroups by id.
    pub paths: &'a Paths,
    /// The processes of each ticket.
    pub processes: &'a ByTicket,
    /// What each ticket's processes sent; none where that is not counted.
    pub sent: Option<&'a HashMap<TicketId, Sent>>,
    /// CLOCK_MONOTONIC.
    pub now_ns: u64,
}

fn lives(pid: u32, began: u64) -> bool {
    process::stat(pid).is_ok_and(|(state, now)| now == began && !matches!(state, 'Z' | 'X'))
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
    fn status(&self, seen: &Seen<'_>) -> ReaderStatus {
        let Reader {
            ticket,
            volume,
            disk,
            ..
        } = &self.reader;
        let (books, on) = (seen.books, disk.diskseq);
        let (who, here, elsewhere) = match &self.known {
            Known::Process { pid, began } => {
                let start = began * 10_000_000;
                let here = books.process(on, *pid, start);
                let elsewhere = books.process_elsewhere(on, *pid, start);
                (format!("pid {pid}"), here, elsewhere)
            }
            Known::Cgroup { id, path } => {
                let inside = |group| is_in(group, *id, path, seen.paths);
                let elsewhere = books.groups_elsewhere(on, inside);
                (
                    format!("cgroup {path}"),
                    books.groups(on, inside),
                    elsewhere,
                )
            }
        };
        // A path used again by another group is not the registered one.
        let same = match &self.known {
            Known::Process { .. } => true,
            Known::Cgroup { id, path } => seen.paths.get(id) == Some(path),
        };
        let flow = |bytes, last_ns| Flow {
            bytes: Bytes(bytes),
            last_ms: since_ms(last_ns, seen.now_ns),
        };
        let sent = seen
            .sent
            .map(|sent| sent.get(ticket).copied().unwrap_or_default());
        ReaderStatus {
            ticket: ticket.clone(),
            volume: volume.clone(),
            disk: disk.clone(),
            who,
            alive: same
                && seen
                    .processes
                    .get(ticket)
                    .is_some_and(|all| !all.is_empty()),
            read: flow(here.read_bytes, here.last_read_ns),
            sent: sent.map(|sent| flow(sent.bytes, sent.last_ns)),
            wrote: flow(elsewhere.written_bytes, elsewhere.last_write_ns),
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
    fn a_stream_that_only_reads_is_told_from_one_that_only_sends() {
        let flow = |last_ms| Flow {
            bytes: Bytes(1),
            last_ms,
        };
        let status = |read, sent: Option<Option<u64>>, wrote| ReaderStatus {
            ticket: "t".parse().unwrap(),
            volume: "v".parse().unwrap(),
            disk: Disk {
                name: "x".to_owned(),
                diskseq: crate::ids::Diskseq(1),
            },
            who: "pid 1".to_owned(),
            alive: true,
            read: flow(read),
            sent: sent.map(flow),
            wrote: flow(wrote),
        };
        let (now, old) = (Some(10), Some(101));
        for (read, sent, wrote, motion, last) in [
            (now, Some(now), None, Motion::Flows, now),
            (now, None, now, Motion::Flows, now),
            (now, Some(old), None, Motion::Reads, now),
            (now, None, None, Motion::Reads, now),
            (old, Some(now), None, Motion::Sends, now),
            (old, Some(old), now, Motion::Sends, now),
            (old, Some(None), None, Motion::Rests, old),
            (None, None, None, Motion::Rests, None),
        ] {
            let status = status(read, sent, wrote);
            assert_eq!(status.motion(100), motion, "{status:?}");
            assert_eq!(status.last_progress_ms(), last, "{status:?}");
        }
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

//! Registered readers: backup tools that read a disk themselves, and those that
//! are known by name.
//!
//! A registration says who may read. It never makes less of a holder that
//! could write. A process is known by its id and start time (in hundredths of a
//! second), so that its id used again is nobody; a cgroup by its id, its
//! descendants by their paths.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::cgroups::Hierarchy;
use super::process::{self, Process};
use super::streams::{Known, Owner, Stream};
use super::tools::Tool;
use crate::attach::ports::Disk;
use crate::ids::{Diskseq, TicketId, VolumeId};

/// Streams of tools known by name on one disk, at most: anybody may bear such a
/// name, and the kernel's map of who is watched has an end.
const TOOLS: usize = 16;

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

/// The registered readers, by ticket.
#[derive(Debug, Default)]
pub struct Readers {
    tools: Vec<Tool>,
    entries: Mutex<BTreeMap<TicketId, Stream>>,
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

    fn entries(&self) -> MutexGuard<'_, BTreeMap<TicketId, Stream>> {
        // Every change is one call on the map: a panic leaves nothing half done.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a reader; the same ticket again replaces it.
    pub fn register(&self, reader: Reader, hierarchy: &Hierarchy) -> Result<(), RegisterError> {
        let known = match &reader.who {
            Who::Process(pid) => {
                let pid = *pid;
                let now =
                    process::stat(pid).map_err(|error| RegisterError::Process { pid, error })?;
                if now.has_ended() {
                    return Err(RegisterError::Ended(pid));
                }
                let began = now.began;
                Known::Process(Process { pid, began })
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
        let stream = Stream {
            owner: Owner::Ticket(reader.ticket.clone()),
            volume: reader.volume,
            disk: reader.disk,
            known,
        };
        self.entries().insert(reader.ticket, stream);
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
            .filter(|entry| entry.disk.diskseq == disk.diskseq)
            .any(|entry| match &entry.known {
                Known::Process(known) => {
                    known.pid == pid && process::began_at(start_ns, known.began)
                }
                Known::Cgroup { id, path } => is_in(cgroup, *id, path, paths),
            })
    }

    /// The streams of registered readers, by ticket.
    pub fn registered(&self) -> Vec<Stream> {
        self.entries().values().cloned().collect()
    }

    /// The streams of tools known by name on a volume's disk, the oldest first.
    /// `readers` are the processes that have read it, by id and start time in
    /// ns; those that are `taken` have streams already. `named` is
    /// [`process::named`].
    pub fn by_name(
        &self,
        volume: &VolumeId,
        disk: &Disk,
        readers: impl Iterator<Item = (u32, u64)>,
        taken: &HashSet<(Diskseq, u32)>,
        named: impl Fn(u32, u64) -> Option<(Process, String)>,
    ) -> Vec<Stream> {
        let strange = readers.filter(|(pid, _)| !taken.contains(&(disk.diskseq, *pid)));
        let living = strange.filter_map(|(pid, start_ns)| named(pid, start_ns));
        // A process that has changed its cgroup is counted in each.
        let tools: BTreeMap<_, _> = living
            .filter(|(_, name)| self.knows(name))
            .map(|(process, name)| ((process.began, process.pid), (process, name)))
            .collect();
        let stream = |(process, name)| Stream {
            owner: Owner::Tool { name, process },
            volume: volume.clone(),
            disk: disk.clone(),
            known: Known::Process(process),
        };
        tools.into_values().take(TOOLS).map(stream).collect()
    }
}

/// Whether `group` is the group `id` at `path` or below it.
pub fn is_in(group: u64, id: u64, path: &str, paths: &Paths) -> bool {
    if group == id {
        return true;
    }
    // The id at the path must be the registered one still: paths are used again.
    let below = paths.get(&group).and_then(|p| p.strip_prefix(path));
    below.is_some_and(|rest| rest.starts_with('/'))
        && paths.get(&id).map(String::as_str) == Some(path)
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
        while !process::stat(pid).unwrap().has_ended() {
            std::thread::yield_now();
        }
        let error = readers.register(reader(pid), &hierarchy).unwrap_err();
        assert!(matches!(error, RegisterError::Ended(_)), "{error}");
        child.wait().unwrap();
    }

    fn by_name(taken: &[(Diskseq, u32)], seen: &[(u32, u64)]) -> Vec<(String, u32)> {
        let disk = Disk {
            name: "x".to_owned(),
            diskseq: Diskseq(1),
        };
        let named = |pid, start_ns| {
            let name = match pid {
                1..100 => "restic",
                100..200 => "cat",
                _ => return None,
            };
            let began = start_ns / 10_000_000;
            Some((Process { pid, began }, name.to_owned()))
        };
        let volume = "vol-1".parse().unwrap();
        let taken = taken.iter().copied().collect();
        let readers = Readers::new(Tool::usual());
        let found = readers.by_name(&volume, &disk, seen.iter().copied(), &taken, named);
        let whose = |stream: Stream| match stream.owner {
            Owner::Tool { name, process } => {
                assert_eq!(stream.known, Known::Process(process));
                (name, process.pid)
            }
            Owner::Ticket(ticket) => panic!("{ticket} is nobody's"),
        };
        found.into_iter().map(whose).collect()
    }

    #[test]
    fn a_reader_by_name_is_one_stream_unless_it_has_one() {
        let tool = |pid| ("restic".to_owned(), pid);
        // Of other names, and ended ones; and one that is counted in two cgroups.
        let seen = [(100, 1), (7, 20_000_000), (200, 1), (7, 20_000_000), (8, 1)];
        assert_eq!(by_name(&[], &seen), [tool(8), tool(7)]);
        assert_eq!(by_name(&[(Diskseq(1), 8)], &seen), [tool(7)]);
        assert_eq!(by_name(&[(Diskseq(2), 8)], &seen), [tool(8), tool(7)]);
    }

    #[test]
    fn a_crowd_under_a_tools_name_displaces_none_that_was_there() {
        let crowd: Vec<_> = (1..=40).map(|pid| (pid, u64::from(pid) << 32)).collect();
        let found = by_name(&[], &crowd);
        assert_eq!(found.len(), TOOLS);
        assert_eq!(found, by_name(&[], &crowd[..TOOLS]));
    }
}

//! Backup streams of other people's tools: what each reads from a volume's disk,
//! what leaves it, and when it last did either.
//!
//! A registered reader has one, and so has each process of a tool known by its
//! name from its first read of a volume's disk on until it ends. Such a process
//! claims nothing and its stream is for display alone; once it is registered, it
//! has the registration's stream.
//!
//! What is sent and what is written elsewhere is counted by process, not by what
//! it was read from: two streams of one process show the same.

use std::collections::{HashMap, HashSet};
use std::sync::PoisonError;

use drover_ebpf::Sent;

use super::Inner;
use super::cgroups::Hierarchy;
use super::ledger::Books;
use super::loader::{self, Kernel};
use super::process::{self, Process};
use super::readers::{Paths, is_in};
use super::sends::{ByOwner, Sends};
use crate::attach::ports::Disk;
use crate::ids::{Bytes, TicketId, VolumeId};

/// Whose a stream is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// A registered reader's, with the ticket that stands for it.
    Ticket(TicketId),
    /// Nobody registered it: it bears a backup tool's name.
    Tool {
        /// Its name.
        name: String,
        /// Which process.
        process: Process,
    },
}

impl Owner {
    /// Its claim on the volume, if it has one.
    pub fn ticket(&self) -> Option<&TicketId> {
        match self {
            Self::Ticket(ticket) => Some(ticket),
            Self::Tool { .. } => None,
        }
    }
}

/// Who is meant, by what cannot be another's later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// One process.
    Process(Process),
    /// A cgroup with all below it.
    Cgroup {
        /// Its id.
        id: u64,
        /// Its path from the hierarchy's root.
        path: String,
    },
}

/// A stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// Whose it is.
    pub owner: Owner,
    /// The volume it reads.
    pub volume: VolumeId,
    /// The disk it reads.
    pub disk: Disk,
    /// Who reads.
    pub known: Known,
}

/// Bytes that went one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flow {
    /// How many.
    pub bytes: Bytes,
    /// Milliseconds since the last of them; none: there was none yet.
    pub last_ms: Option<u64>,
}

/// How a stream is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReaderStatus {
    /// Whose it is.
    pub owner: Owner,
    /// The volume it reads.
    pub volume: VolumeId,
    /// The disk it reads.
    pub disk: Disk,
    /// `pid 4711`, `cgroup /backup`, or of a tool known by name `pid 4711 (restic)`.
    pub who: String,
    /// Whether the process, or any process of the cgroup, lives.
    pub alive: bool,
    /// What it read from the disk.
    pub read: Flow,
    /// What it sent over TCP since the first look at it; none where this kernel
    /// does not let it be counted.
    pub sent: Option<Flow>,
    /// What it wrote to other disks.
    pub wrote: Flow,
}

/// What a stream does, as far as its bytes tell.
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

/// What is known when streams are looked at.
struct Seen<'a> {
    books: &'a Books,
    paths: &'a Paths,
    /// The processes of each stream's owner.
    processes: &'a ByOwner,
    /// What they sent; none where that is not counted.
    sent: Option<&'a HashMap<Owner, Sent>>,
    /// CLOCK_MONOTONIC.
    now_ns: u64,
}

impl Stream {
    /// The processes that it stands for now.
    fn processes(&self, hierarchy: &Hierarchy) -> HashSet<u32> {
        match &self.known {
            Known::Process(process) if process.runs() => HashSet::from([process.pid]),
            Known::Process(_) => HashSet::new(),
            Known::Cgroup { path, .. } => hierarchy.processes(path).into_iter().collect(),
        }
    }

    fn who(&self) -> String {
        match (&self.known, &self.owner) {
            (Known::Cgroup { path, .. }, _) => format!("cgroup {path}"),
            (Known::Process(process), Owner::Ticket(_)) => format!("pid {}", process.pid),
            (Known::Process(process), Owner::Tool { name, .. }) => {
                format!("pid {} ({name})", process.pid)
            }
        }
    }

    fn status(&self, seen: &Seen<'_>) -> ReaderStatus {
        let (books, on) = (seen.books, self.disk.diskseq);
        let (here, elsewhere) = match &self.known {
            Known::Process(Process { pid, began }) => {
                let start = began * 10_000_000;
                let elsewhere = books.process_elsewhere(on, *pid, start);
                (books.process(on, *pid, start), elsewhere)
            }
            Known::Cgroup { id, path } => {
                let inside = |group| is_in(group, *id, path, seen.paths);
                let elsewhere = books.groups_elsewhere(on, inside);
                (books.groups(on, inside), elsewhere)
            }
        };
        // A path used again by another group is not the registered one.
        let same = match &self.known {
            Known::Process(_) => true,
            Known::Cgroup { id, path } => seen.paths.get(id) == Some(path),
        };
        let flow = |bytes, last_ns| Flow {
            bytes: Bytes(bytes),
            last_ms: since_ms(last_ns, seen.now_ns),
        };
        let processes = seen.processes.get(&self.owner);
        let sent = seen.sent.and_then(|sent| sent.get(&self.owner));
        ReaderStatus {
            owner: self.owner.clone(),
            volume: self.volume.clone(),
            disk: self.disk.clone(),
            who: self.who(),
            alive: same && processes.is_some_and(|all| !all.is_empty()),
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

impl Inner {
    /// How every stream is doing: of registered readers by ticket, then of tools
    /// known by name. Without counts there are none of tools, and registered
    /// readers are not seen to progress.
    pub(super) fn streams(&self) -> Vec<ReaderStatus> {
        // Two looks at once take turns: each follows what it has just found. A
        // panic in between can only leave a process watched that need not be.
        let mut sends = self.sends.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = self.books();
        if let Err(error) = &counted {
            tracing::warn!(%error, "evidence: no counts for backup streams");
        }
        let blind = counted.is_err();
        let (books, names) = counted.unwrap_or_default();
        let mut streams = self.readers.registered();
        let mut processes = self.processes(&streams);
        let pids = streams.iter().flat_map(|stream| {
            let pids = processes.get(&stream.owner).into_iter().flatten();
            pids.map(|pid| (stream.disk.diskseq, *pid))
        });
        let taken = pids.collect();
        for (volume, disk) in self.volumes(&names) {
            let rows = books.processes(disk.diskseq);
            let readers = rows.filter(|(_, count)| count.reads > 0);
            let readers = readers.map(|(key, _)| (key.tgid, key.start_ns));
            let tools = self
                .readers
                .by_name(&volume, &disk, readers, &taken, process::named);
            processes.extend(self.processes(&tools));
            streams.extend(tools);
        }
        // Without counts no tool is seen: who was watched stays so.
        let sent = if blind {
            None
        } else {
            self.follow(&mut sends, &processes)
        };
        let seen = Seen {
            books: &books,
            paths: &self.hierarchy.paths(),
            processes: &processes,
            sent: sent.as_ref(),
            now_ns: (self.clock)(),
        };
        streams.sort_by(|a, b| (&a.owner, &a.volume).cmp(&(&b.owner, &b.volume)));
        streams.iter().map(|stream| stream.status(&seen)).collect()
    }

    fn processes(&self, streams: &[Stream]) -> ByOwner {
        let of = |stream: &Stream| (stream.owner.clone(), stream.processes(&self.hierarchy));
        streams.iter().map(of).collect()
    }

    /// What these processes sent over TCP; none where that is not counted.
    fn follow(&self, sends: &mut Sends, processes: &ByOwner) -> Option<HashMap<Owner, Sent>> {
        let kernel = self.kernel.as_ref().ok();
        let counts = |kernel: &&Kernel| loader::SENDERS.iter().any(|name| kernel.runs(name));
        let sent = sends.follow(kernel.filter(counts)?, processes.clone());
        sent.inspect_err(|error| tracing::warn!(%error, "evidence: no counts of what was sent"))
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Diskseq;

    #[test]
    fn a_stream_that_only_reads_is_told_from_one_that_only_sends() {
        let flow = |last_ms| Flow {
            bytes: Bytes(1),
            last_ms,
        };
        let status = |read, sent: Option<Option<u64>>, wrote| ReaderStatus {
            owner: Owner::Ticket("t".parse().unwrap()),
            volume: "v".parse().unwrap(),
            disk: Disk {
                name: "x".to_owned(),
                diskseq: Diskseq(1),
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
}

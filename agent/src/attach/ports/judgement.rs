//! What the evidence says of a device: who holds it, and what that means.

use serde::{Deserialize, Serialize};

/// What the evidence about a device means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Somebody could write, whatever it did lately.
    Live,
    /// Only registered readers hold it, and one of them made progress of late.
    BackupRunning,
    /// Only registered readers hold it, and none made progress of late.
    BackupStale,
    /// Nobody holds it.
    Quiet,
    /// There is a holder that could not be explained, or evidence was lost. To be treated as `Live`.
    Unknown,
}

impl Verdict {
    /// All of them, the worst for who takes the volume over first.
    pub const ALL: [Self; 5] = [
        Self::Live,
        Self::Unknown,
        Self::BackupRunning,
        Self::BackupStale,
        Self::Quiet,
    ];

    /// As receipts and the wire call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Unknown => "unknown",
            Self::BackupRunning => "backup-running",
            Self::BackupStale => "backup-stale",
            Self::Quiet => "quiet",
        }
    }

    /// The verdict of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|verdict| verdict.name() == name)
    }
}

/// A pod and the container in it, as Kubernetes names them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// The pod's UID.
    pub uid: String,
    /// The container's id, in its runtime's words; none: the pod's own cgroup.
    pub container: Option<String>,
}

/// One holder of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Process id; 0 for a mount or a stacked device.
    pub pid: u32,
    /// Command name, mount point, or stacked device.
    pub name: String,
    /// Its cgroup's path, where it has one.
    pub cgroup: String,
    /// The pod whose cgroup that is, where the path tells.
    #[serde(default)]
    pub pod: Option<Pod>,
    /// Whether it could write.
    pub writable: bool,
    /// Whether it is registered as a backup reader.
    pub registered: bool,
    /// Milliseconds since it last read, as the kernel saw it.
    pub last_read_ms: Option<u64>,
    /// Milliseconds since it last wrote, as the kernel saw it.
    pub last_write_ms: Option<u64>,
    /// Bytes it has read from the device.
    pub read_bytes: u64,
    /// Bytes it has written to the device.
    pub written_bytes: u64,
}

impl Holder {
    /// Process, cgroup, what it may do, last write.
    fn describe(&self) -> String {
        let mut text = match self.pid {
            0 => self.name.clone(),
            pid => format!("{} (pid {pid})", self.name),
        };
        if !self.cgroup.is_empty() {
            text += &format!(" of cgroup {}", self.cgroup);
        }
        text += match (self.writable, self.registered) {
            (true, _) => ", which can write",
            (false, true) => ", a registered reader",
            (false, false) => ", a reader that is not registered",
        };
        match self.last_write_ms {
            Some(ms) => text + &format!(", last write {ms} ms ago"),
            None => text + ", no write seen",
        }
    }
}

/// A verdict and what led to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// The verdict.
    pub verdict: Verdict,
    /// Why, in a sentence.
    pub reason: String,
    /// Who holds the device.
    pub holders: Vec<Holder>,
}

/// How many holders a sentence names.
const NAMED: usize = 5;

impl Judgement {
    /// The holders in words; of many, the first few and how many more there are.
    pub fn holders_in_words(&self) -> Vec<String> {
        let holders = self.holders.iter().take(NAMED);
        let mut all: Vec<String> = holders.map(Holder::describe).collect();
        if self.holders.len() > NAMED {
            all.push(format!("{} more", self.holders.len() - NAMED));
        }
        all
    }

    /// The verdict, its reason and who leads to it, in words.
    pub fn describe(&self) -> String {
        let verdict = self.verdict.name();
        match self.holders_in_words().join("; ") {
            none if none.is_empty() => format!("{verdict} ({})", self.reason),
            holders => format!("{verdict} ({}): {holders}", self.reason),
        }
    }
}

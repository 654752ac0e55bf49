//! Processes, known by their id and when they began.

use std::fs;
use std::io;

/// A process by its id and when it began, in clock ticks since boot: its id
/// used again is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// When it began.
    pub began: u64,
}

impl Process {
    /// Whether it runs: not only as a zombie.
    pub fn runs(self) -> bool {
        stat(self.pid).is_ok_and(|now| now.began == self.began && !now.has_ended())
    }
}

/// What the kernel says of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Its name; what is not UTF-8 in it is replaced.
    pub name: String,
    /// Its state's letter.
    pub state: char,
    /// When it began, in clock ticks since boot.
    pub began: u64,
}

impl Stat {
    /// Whether it has ended and only its parent has not taken note.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// Asks the kernel about a process.
pub fn stat(pid: u32) -> io::Result<Stat> {
    let path = format!("/proc/{pid}/stat");
    let bytes = fs::read(&path)?;
    parse(&String::from_utf8_lossy(&bytes))
        .ok_or_else(|| io::Error::other(format!("{path} is not as proc(5) says")))
}

/// The process that began at `start_ns` under this id, with its name now; none:
/// it has ended, whoever has its id.
pub fn named(pid: u32, start_ns: u64) -> Option<(Process, String)> {
    let now = stat(pid).ok()?;
    let process = Process {
        pid,
        began: now.began,
    };
    (began_at(start_ns, now.began) && !now.has_ended()).then_some((process, now.name))
}

/// The name may hold anything, a `)` too: fields are counted from the last one.
fn parse(text: &str) -> Option<Stat> {
    let (_, rest) = text.split_once('(')?;
    let (name, rest) = rest.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some(Stat {
        name: name.to_owned(),
        state,
        // Field 22 of proc(5); the state is field 3.
        began: fields.nth(18)?.parse().ok()?,
    })
}

/// A start time in ns, as /proc tells it: in hundredths of a second (USER_HZ,
/// the same on every architecture drover runs on).
fn ticks(start_ns: u64) -> u64 {
    start_ns / 10_000_000
}

/// Whether two start times in ns are of one process.
pub fn same_start(a_ns: u64, b_ns: u64) -> bool {
    ticks(a_ns) == ticks(b_ns)
}

/// Whether a process that began at `start_ns` has the start time `began` of /proc.
pub fn began_at(start_ns: u64, began: u64) -> bool {
    ticks(start_ns) == began
}

/// Whether the process still exists. A zombie does: its threads may go on.
/// What cannot be read for another reason than that counts as living.
pub fn lives(pid: u32, start_ns: u64) -> bool {
    match stat(pid) {
        Ok(now) => began_at(start_ns, now.began),
        Err(e) => e.kind() != io::ErrorKind::NotFound && e.raw_os_error() != Some(libc::ESRCH),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_hides_nothing() {
        let rest = (4..=21)
            .map(|n| n.to_string())
            .collect::<Vec<_>>()
            .join(" ");
        let text = format!("12 (a) b) S {rest} 777 23 24");
        let stat = Stat {
            name: "a) b".to_owned(),
            state: 'S',
            began: 777,
        };
        assert_eq!(parse(&text), Some(stat));
        assert_eq!(parse("12 (a) S 1 2"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_pid_used_again_is_another_process() {
        let pid = std::process::id();
        let Stat { name, began, .. } = stat(pid).unwrap();
        let (then, later) = (began * 10_000_000 + 1, (began + 1) * 10_000_000);
        assert!(lives(pid, then) && Process { pid, began }.runs());
        assert_eq!(named(pid, then), Some((Process { pid, began }, name)));
        assert!(!lives(pid, later) && named(pid, later).is_none());
        let began = began + 1;
        assert!(!lives(u32::MAX, 0) && !Process { pid, began }.runs());
    }
}

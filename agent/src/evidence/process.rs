//! Processes, known by their id and when they began.

use std::fs;
use std::io;

/// The state letter and start time (in clock ticks since boot) of a process.
pub fn stat(pid: u32) -> io::Result<(char, u64)> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path)?;
    parse(&text).ok_or_else(|| io::Error::other(format!("{path} is not as proc(5) says")))
}

/// The command name may hold anything, a `)` too: fields are counted from the last one.
fn parse(text: &str) -> Option<(char, u64)> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 22 of proc(5); the state is field 3.
    Some((state, fields.nth(18)?.parse().ok()?))
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
        Ok((_, began)) => began_at(start_ns, began),
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
        assert_eq!(parse(&text), Some(('S', 777)));
        assert_eq!(parse("12 (a) S 1 2"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_pid_used_again_is_another_process() {
        let pid = std::process::id();
        let (_, began) = stat(pid).unwrap();
        assert!(lives(pid, began * 10_000_000 + 1));
        assert!(!lives(pid, (began + 1) * 10_000_000));
        assert!(!lives(u32::MAX, 0));
    }
}

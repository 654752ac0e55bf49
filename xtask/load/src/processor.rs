//! Processor time and memory: this process's and a server's.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::{SysconfVar, sysconf};

/// Processor time that this process has used, in user space and the kernel.
pub fn own() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("getrusage")?;
    let times = [usage.user_time(), usage.system_time()];
    let microseconds: i64 = times
        .iter()
        .map(|time| time.tv_sec() * 1_000_000 + time.tv_usec())
        .sum();
    Ok(Duration::from_micros(u64::try_from(microseconds)?))
}

/// Processor time that process `id` has used, in ticks of 10 ms as the kernel
/// tells it (proc_pid_stat(5), utime and stime).
pub fn of(id: u32) -> Result<Duration> {
    let path = format!("/proc/{id}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let ticks = ticks(&text).with_context(|| format!("{path} is not as expected"))?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock ticks")?;
    let per_second = u64::try_from(per_second)?;
    Ok(Duration::from_micros(ticks * 1_000_000 / per_second))
}

/// Fields 14 and 15; the name before them may hold spaces and brackets.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Memory that process `id` has resident, in KiB, without files and shared
/// memory that it maps (proc_pid_status(5), RssAnon).
pub fn resident_kib(id: u32) -> Result<u64> {
    let path = format!("/proc/{id}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    anonymous(&text).with_context(|| format!("{path} tells no RssAnon"))
}

fn anonymous(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_move_the_fields() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 31 11 0 0 20 0 1 0 5";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_has_used_time_and_memory() {
        let id = std::process::id();
        let begin = own().unwrap();
        let mut sum = 0u64;
        while own().unwrap() < begin + Duration::from_millis(40) {
            sum = sum.wrapping_mul(31).wrapping_add(1);
        }
        assert!(of(id).unwrap() >= Duration::from_millis(20), "{sum}");
        assert!(resident_kib(id).unwrap() > 100);
        assert_eq!(anonymous("RssAnon:\t    1234 kB\n"), Some(1234));
    }
}

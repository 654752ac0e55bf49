//! Keeps the process in memory when the machine has none left.
//!
//! A volume that is attached on its own home is a loopback: memory is freed by
//! writing to the volume, and that is this process's work. So nothing of it may
//! be swapped out or dropped, and it must be the last that the kernel ends. The
//! data path's threads are marked for the same reason (`crate::reactor`).

use std::io;

/// As kubelet sets it for what a node needs (-1000 would be "never").
const OOM_SCORE: i32 = -997;

/// Asks the kernel for both; what it refuses is logged, since drover works
/// without it as long as there is memory.
pub fn keep() {
    // Pages that are used stay; those of stacks that never were used take nothing.
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: the call takes flags only.
    if unsafe { libc::mlockall(flags) } != 0 {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "mlockall: under memory pressure, a volume attached on its own home may stall");
    }
    let score = std::fs::read_to_string("/proc/self/oom_score_adj");
    let lower = |score: &String| score.trim().parse().is_ok_and(|now: i32| now <= OOM_SCORE);
    if !score.as_ref().is_ok_and(lower)
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE.to_string())
    {
        tracing::warn!(%error, "write /proc/self/oom_score_adj: the kernel may end drover when memory is short");
    }
}

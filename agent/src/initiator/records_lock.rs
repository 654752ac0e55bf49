//! The lock on open-iscsi's records, and what to do when its holder is dead.
//!
//! Every iscsiadm takes it for milliseconds, again and again: a second name of
//! a file, made with link(2) and removed with unlink(2) (open-iscsi,
//! usr/idbm.c). So an iscsiadm that is killed in between leaves it taken.
//! Versions up to 2.1.8 take it all the same after 30 s, each call anew; later
//! ones fail then, every call, until somebody removes the file by hand. A
//! volume over iSCSI could be neither attached nor detached on that node.
//!
//! A lock is known to be dead by its age: an iscsiadm that lives and began
//! after the lock was taken does not hold it. Nor does iscsid, which takes it
//! only to read one record.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

use super::sysfs::{is_number, names};

/// A lock younger than this is left alone, whoever lives.
const YOUNG: Duration = Duration::from_secs(2);
/// A lock older than this is dead: it is how long open-iscsi itself waits for it.
const OLD: Duration = Duration::from_secs(30);
/// How far the clocks of files and of processes may be apart.
const SLACK: Duration = Duration::from_secs(1);
/// The clock ticks of a second in /proc/PID/stat (include/asm-generic/param.h, USER_HZ).
const TICKS: u64 = 100;
/// Programs that take the lock, besides iscsid.
const HOLDERS: [&str; 2] = ["iscsiadm", "iscsistart"];

/// Removes the lock below `root` if its holder is dead; how old it was then.
pub(super) fn free_if_dead(root: &Path) -> io::Result<Option<Duration>> {
    let lock = root.join("run/lock/iscsi/lock.write");
    let Some(taken) = taken(&lock)? else {
        return Ok(None);
    };
    // A clock that was set back makes a lock young.
    let age = SystemTime::now().duration_since(taken).unwrap_or_default();
    let lived = ages(&root.join("proc"))?;
    if !is_dead(age, &lived) || self::taken(&lock)? != Some(taken) {
        return Ok(None);
    }
    fs::remove_file(&lock)?;
    Ok(Some(age))
}

/// Whether nobody holds a lock of this age any more; those who might hold it have
/// lived so long.
fn is_dead(age: Duration, lived: &[Duration]) -> bool {
    age >= OLD || (age >= YOUNG && lived.iter().all(|lived| *lived + SLACK < age))
}

/// When the lock was taken; none: it is free. A new name changes a file's
/// status, and nothing else does while it is there.
fn taken(lock: &Path) -> io::Result<Option<SystemTime>> {
    let status = match fs::symlink_metadata(lock) {
        Ok(status) => status,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let part = |number: i64| u64::try_from(number).unwrap_or(0);
    let since =
        Duration::from_secs(part(status.ctime())) + Duration::from_nanos(part(status.ctime_nsec()));
    Ok(Some(SystemTime::UNIX_EPOCH + since))
}

/// How long each program that takes the lock has lived. One that cannot be
/// read has ended; where none can be listed, nobody is known to have.
fn ages(proc: &Path) -> io::Result<Vec<Duration>> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every kernel has CLOCK_BOOTTIME");
    let pids = names(proc).map_err(io::Error::other)?;
    let lived = pids
        .iter()
        .filter(|pid| is_number(pid))
        .filter_map(|pid| fs::read_to_string(proc.join(pid).join("stat")).ok())
        .filter_map(|stat| begun(&stat))
        .map(|begun| Duration::from(now).saturating_sub(begun));
    Ok(lived.collect())
}

/// How long after the boot a program began that takes the lock (proc(5), stat:
/// field 2 is its name in parentheses, field 22 the time); none: it takes none.
fn begun(stat: &str) -> Option<Duration> {
    let (head, fields) = stat.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    if !HOLDERS.contains(&name) {
        return None;
    }
    let ticks: u64 = fields.split_whitespace().nth(19)?.parse().ok()?;
    Some(Duration::from_millis(ticks.saturating_mul(1000 / TICKS)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_lock_is_dead_when_nobody_alive_is_old_enough_to_hold_it() {
        let dead = |age: u32, lived: &[u32]| {
            let lived: Vec<_> = lived.iter().map(|l| *l * SECOND).collect();
            is_dead(age * SECOND, &lived)
        };
        assert!(!dead(1, &[]), "its holder may be about to free it");
        assert!(dead(2, &[]));
        assert!(dead(9, &[0, 5]), "these wait for it");
        assert!(!dead(9, &[0, 9]), "this one may hold it");
        assert!(!dead(9, &[8]), "this one too, as clocks go");
        assert!(dead(30, &[100]), "open-iscsi waits no longer either");
    }

    #[test]
    fn a_program_that_takes_the_lock_is_known_by_its_name() {
        let stat = |name: &str| {
            let zeroes = "0 ".repeat(18);
            format!("77 ({name}) S {zeroes}1234 9 9")
        };
        assert_eq!(
            begun(&stat("iscsiadm")),
            Some(Duration::from_millis(12_340))
        );
        assert_eq!(begun(&stat("iscsid")), None);
        assert_eq!(begun(&stat("a) (iscsiadm")), None);
        assert_eq!(begun("77 (iscsiadm) S 1"), None);
        assert_eq!(begun(""), None);
    }

    #[test]
    fn this_process_has_lived_as_long_as_the_kernel_says() {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let (head, fields) = stat.rsplit_once(')').unwrap();
        let (pid, _) = head.split_once('(').unwrap();
        let begun = begun(&format!("{pid}(iscsiadm){fields}")).unwrap();
        let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap());
        assert!(begun <= now && now - begun < 3600 * SECOND, "{begun:?}");
    }

    #[test]
    fn only_a_dead_lock_is_removed() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(free_if_dead(root.path()).unwrap(), None, "it is free");
        let folder = root.path().join("run/lock/iscsi");
        fs::create_dir_all(&folder).unwrap();
        let (file, lock) = (folder.join("lock"), folder.join("lock.write"));
        fs::write(&file, "").unwrap();
        fs::hard_link(&file, &lock).unwrap();
        let process = root.path().join("proc/77");
        fs::create_dir_all(&process).unwrap();
        let oldest = format!("77 (iscsiadm) S {}0", "0 ".repeat(18));
        fs::write(process.join("stat"), oldest).unwrap();
        std::thread::sleep(YOUNG);
        assert_eq!(free_if_dead(root.path()).unwrap(), None, "it may be held");
        fs::remove_dir_all(&process).unwrap();
        assert!(free_if_dead(root.path()).unwrap().unwrap() >= YOUNG);
        assert!(!lock.exists() && file.exists());
    }
}

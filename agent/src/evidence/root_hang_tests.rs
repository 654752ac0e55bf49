//! A walk over mappings that hangs behind another process's dead disk: a frozen
//! file system stands for the disk. Needs what [`super::root_loop_tests`] needs.

use std::fs::File;
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::root_loop_tests::bench::{self, Bench, Child, LoopDisk, Mapping, Mounted};
use super::*;
use crate::attach::ports::Verdict;

/// A frozen file system, which is thawed whatever happens.
struct Frozen<'a> {
    mount: &'a Mounted,
    /// Thaws it where this process is killed.
    _last: Child,
}

impl<'a> Frozen<'a> {
    fn new(mount: &'a Mounted) -> Self {
        let point = mount.point.to_str().unwrap();
        let later = format!("sleep 60; exec fsfreeze --unfreeze {point}");
        let last = Child::spawn(Command::new("sh").arg("-c").arg(later));
        bench::run("fsfreeze", &["--freeze", point]);
        Self { mount, _last: last }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let mut thaw = Command::new("fsfreeze");
        let _ = thaw.arg("--unfreeze").arg(&self.mount.point).status();
    }
}

#[test]
fn a_walk_that_hangs_keeps_nobody_waiting() {
    let deadline = Duration::from_secs(5);
    let bench = Bench::with(EvidenceConfig {
        deadline,
        ..EvidenceConfig::default()
    });
    let (dead, disk) = (LoopDisk::new(16), LoopDisk::new(16));
    let mount = Mounted::ext4(&dead);
    let file = mount.point.join("file");
    std::fs::write(&file, [0; 4096]).unwrap();
    File::open(&file).unwrap().sync_all().unwrap();
    let reader = Child::holding(&disk, false);
    bench.register(Reader {
        who: Who::Process(reader.pid()),
        volume: "vol-1".parse().unwrap(),
        ticket: TicketId::random(),
        disk: disk.disk.clone(),
    });
    let mut stuck = Command::new(std::env::current_exe().unwrap());
    stuck
        .args(["--exact", "evidence::root_hang_tests::stuck", "--ignored"])
        .stdout(std::process::Stdio::null())
        .env("HANG_FILE", &file);
    let frozen = Frozen::new(&mount);
    let mut stuck = Child::spawn(&mut stuck);
    until_stuck(stuck.pid(), 2);

    let hangs = || {
        let judged = bench.judge(&disk, &[]);
        assert_eq!(judged.verdict, Verdict::Unknown);
        let why = "a walk over mappings has not ended";
        assert!(judged.reason.contains(why), "{}", judged.reason);
        judged.reason
    };
    hangs();
    // Now the walk is late. Who waited for it all the same would come to its own
    // deadline, each time, and say what it looked at.
    let at_once = (0..3).any(|_| !hangs().starts_with("the look at"));
    assert!(at_once, "a walk that is late already was waited for");
    let readers = bench.evidence.readers();
    assert!(readers.len() == 1 && readers[0].alive, "{readers:?}");
    bench.evidence.io(&disk.disk).unwrap();
    assert!(bench.evidence.scrape().unwrap().is_some());
    assert_eq!(in_d_state(stuck.pid()), 2);

    drop(frozen);
    assert!(stuck.wait().success());
    bench.settles(&disk, &[], Verdict::BackupStale);
    mount.unmount();
}

/// Waits until so many of a process's threads have been in D state for a while:
/// each is in it for a moment when a page of its program is read from a disk.
fn until_stuck(pid: u32, threads: usize) {
    let mut looks = 0;
    bench::until(|| {
        looks = if in_d_state(pid) == threads {
            looks + 1
        } else {
            0
        };
        (looks == 40).then_some(())
    });
}

fn in_d_state(pid: u32) -> usize {
    let tasks = mounts::numbers(format!("/proc/{pid}/task").as_ref());
    let waits = |tid: &u32| process::stat(*tid).is_ok_and(|now| now.state == 'D');
    tasks.filter(waits).count()
}

/// One thread stores to a mapped page of a frozen file system, the other takes
/// the mapping away meanwhile.
#[test]
#[ignore = "a process of a_walk_that_hangs_keeps_nobody_waiting"]
fn stuck() {
    let Ok(file) = std::env::var("HANG_FILE") else {
        return;
    };
    let mapping = Mapping::of(file.as_ref());
    let at = mapping.address();
    thread::scope(|scope| {
        let storing = scope.spawn(move || {
            // SAFETY: the other thread has the mapping until this one is in the
            // fault; the store that follows it is into this anonymous page.
            unsafe { (at as *mut u8).write_volatile(1) };
        });
        until_stuck(std::process::id(), 1);
        mapping.replace();
        storing.join().unwrap();
    });
}

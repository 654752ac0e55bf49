//! The table of verdicts, with real processes: those of its cells that
//! [`super::root_loop_tests`] lacks. Needs what that one needs.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::loader::MAPPINGS;
use super::process;
use super::root_loop_tests::bench::{self, Bench, Child, LoopDisk, direct, until};
use super::*;
use crate::attach::ports::Verdict;

fn reader_of(disk: &LoopDisk, child: &Child) -> Reader {
    Reader {
        who: Who::Process(child.pid()),
        volume: "vol-1".parse().unwrap(),
        ticket: TicketId::random(),
        disk: disk.disk.clone(),
    }
}

/// Nobody's descriptor, until it is taken out at the other end.
#[test]
fn a_descriptor_in_flight_over_a_socket_is_unknown() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let (here, there) = UnixDatagram::pair().unwrap();
    let file = direct(&disk.path(), true);
    let files = [file.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&files)];
    let (bytes, none) = ([IoSlice::new(b"x")], MsgFlags::empty());
    sendmsg::<()>(here.as_raw_fd(), &bytes, &rights, none, None).unwrap();
    drop(file);
    let judged = bench.settles(&disk, &[], Verdict::Unknown);
    assert!(
        judged.reason.contains("on its way over a socket"),
        "{judged:?}"
    );
    bench.ahead(3600);
    assert_eq!(bench.judge(&disk, &[]).verdict, Verdict::Unknown);
    let mut byte = [0];
    let (mut into, mut space) = ([IoSliceMut::new(&mut byte)], nix::cmsg_space!([RawFd; 1]));
    let got = recvmsg::<()>(there.as_raw_fd(), &mut into, Some(&mut space), none).unwrap();
    let mut taken = None;
    for message in got.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(files) = message {
            // SAFETY: the kernel has just made this descriptor for us alone.
            taken = Some(unsafe { OwnedFd::from_raw_fd(files[0]) });
        }
    }
    assert_eq!(bench.judge(&disk, &[]).verdict, Verdict::Live);
    drop(taken);
    bench.settles(&disk, &[], Verdict::Quiet);
}

/// Writes and syncs as a database does, and pauses between: it may write again.
#[test]
fn a_rhythm_of_syncs_is_live_between_its_beats() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let file = direct(&disk.path(), true);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                bench::write_block(&file, 1);
                file.sync_all().unwrap();
                std::thread::sleep(Duration::from_millis(150));
            }
        });
        for _ in 0..30 {
            let judged = bench.judge(&disk, &[]);
            assert_eq!(judged.verdict, Verdict::Live, "{judged:?}");
            std::thread::sleep(Duration::from_millis(17));
        }
        over.store(true, Ordering::SeqCst);
    });
    drop(file);
    bench.settles(&disk, &[], Verdict::Quiet);
}

#[test]
fn a_writer_that_is_stopped_is_live_and_one_that_is_killed_is_gone() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let mut writer = Child::holding(&disk, true);
    writer.signal(Signal::SIGSTOP);
    bench.ahead(3600);
    assert_eq!(bench.judge(&disk, &[]).verdict, Verdict::Live);
    // It closes nothing by itself.
    writer.kill();
    bench.settles(&disk, &[], Verdict::Quiet);
}

#[test]
fn a_read_only_mount_is_no_writer_and_still_somebody() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    bench::run("mkfs.ext4", &["-q", "-F", disk.path().to_str().unwrap()]);
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let (path, point) = (disk.path(), folder.path());
    let none = None::<&str>;
    mount(Some(&path), point, Some("ext4"), MsFlags::MS_RDONLY, none).unwrap();
    let judged = bench.settles(&disk, &[], Verdict::Unknown);
    assert!(judged.reason.contains("unmount"), "{judged:?}");
    assert!(judged.holders.iter().all(|holder| !holder.writable));
    let own = [point.to_owned()];
    bench.settles(&disk, &own, Verdict::Quiet);
    umount(point).unwrap();
}

/// A process id that was a reader's comes to be a stranger's.
#[test]
fn a_process_id_used_again_is_not_the_reader_that_had_it() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let mut reader = Child::holding(&disk, false);
    let pid = reader.pid();
    let began = process::stat(pid).unwrap().began;
    bench.register(reader_of(&disk, &reader));
    bench.settles(&disk, &[], Verdict::BackupStale);
    reader.kill();
    // The kernel gives the number after this one next (proc(5)), unless another
    // process is quicker. Within the hundredth of a second in which the reader
    // began, the two could not be told apart: only a test uses an id so soon.
    let again = until(|| {
        let file = File::open(disk.path()).unwrap();
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
        let mut command = std::process::Command::new("sleep");
        let child = Child::spawn(command.arg("1000").stdin(std::process::Stdio::from(file)));
        let another = child.pid() == pid && process::stat(pid).unwrap().began != began;
        another.then_some(child)
    });
    let judged = bench.settles(&disk, &[], Verdict::Unknown);
    let named = format!("process {pid}");
    assert!(judged.reason.contains(&named), "{judged:?}");
    assert!(judged.holders.iter().all(|holder| !holder.registered));
    drop(again);
    bench.settles(&disk, &[], Verdict::Quiet);
}

/// A mapping of a file on drover's own mount whose descriptor is closed: without
/// that program nothing tells of it.
#[test]
fn without_mappings_no_verdict_is_had() {
    let _turn = Bench::new();
    let disk = LoopDisk::new(16);
    let config = EvidenceConfig::default();
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let hierarchy = Hierarchy::choose(&text, config.cgroups);
    let mut kernel = Kernel::load(&hierarchy, config.processes).unwrap();
    kernel.refuse(MAPPINGS);
    let evidence = Evidence::new(config, hierarchy, Ok(kernel), Box::new(monotonic));
    let judged = bench::wait_for(evidence.judge(&disk.disk, &[]));
    assert_eq!(judged.verdict, Verdict::Unknown);
    let why = "iter task_vma does not run on this kernel";
    assert!(judged.reason.contains(why), "{}", judged.reason);
    assert_eq!(evidence.describe().blind, Some(judged.reason));
}

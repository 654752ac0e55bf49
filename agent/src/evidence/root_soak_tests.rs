//! A soak: writers that do whatever hides a writer, judged at random instants.
//!
//! One right to write goes round between processes, without a gap: whoever has
//! it holds the disk by a descriptor, a mapping, an io_uring, a stacked device or
//! a mount, and gives up one only when he has the next, or hands his descriptor
//! on over a socket. Beside them registered readers open and close the disk. So
//! at each instant somebody can write, and a verdict that lets the disk go, as
//! `Quiet` and those of backups do, is false. One is one too many.
//!
//! Every other crew keeps still: the right stays in an io_uring, and one reader
//! never leaves its CPU and never sleeps, so that it gets the same struct file
//! again and again, open at one sight and closed at the next.
//!
//! `DROVER_SOAK_SECONDS` makes it longer, `DROVER_SOAK_SEED` repeats one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use nix::unistd::Pid;

use super::root_loop_tests::bench::{self, Bench, Child, LoopDisk, direct};
use super::*;
use crate::attach::ports::Verdict;

/// How long without being asked: a second for each crew.
const SECONDS: u64 = 4;
const CREW: Duration = Duration::from_secs(1);
/// Who hands the right to write round.
const WRITERS: usize = 3;
/// Registered readers.
const READERS: usize = 2;
/// The file system's; what is behind it is written past it.
const SYSTEM_MIB: u64 = 16;

#[test]
fn who_can_write_is_never_taken_for_nobody() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>());
    let seconds = number("DROVER_SOAK_SECONDS").map_or(SECONDS, Result::unwrap);
    let seed = number("DROVER_SOAK_SEED").map_or(u64::from(std::process::id()), Result::unwrap);
    let bench = Bench::new();
    let disk = LoopDisk::new(2 * SYSTEM_MIB);
    let path = disk.path();
    let size = format!("{SYSTEM_MIB}M");
    bench::run("mkfs.ext4", &["-q", "-F", path.to_str().unwrap(), &size]);
    let mut random = Random(seed);
    let (mut verdicts, mut false_ones) = (BTreeMap::<_, u64>::new(), Vec::new());
    let begin = Instant::now();
    for still in [false, true].into_iter().cycle() {
        if begin.elapsed() >= Duration::from_secs(seconds) {
            break;
        }
        let mut crew = Crew::new(&disk, &mut random, still);
        let readers = crew.readers.iter().map(|reader| Reader {
            who: Who::Process(reader.pid()),
            volume: "vol-1".parse().unwrap(),
            ticket: TicketId::random(),
            disk: disk.disk.clone(),
        });
        let readers: Vec<_> = readers.collect();
        readers.iter().for_each(|r| bench.register(r.clone()));
        let end = Instant::now() + CREW;
        while Instant::now() < end {
            let judged = bench.judge(&disk, &[]);
            crew.assert_alive();
            *verdicts.entry(judged.verdict.name()).or_default() += 1;
            if !matches!(judged.verdict, Verdict::Live | Verdict::Unknown) {
                false_ones.push(judged);
            }
            random.pause(20_000);
        }
        drop(crew);
        readers
            .iter()
            .for_each(|r| bench.evidence.unregister(&r.ticket));
        bench.settles(&disk, &[], Verdict::Quiet);
    }
    println!("seed {seed}: {verdicts:?}");
    let count = false_ones.len();
    assert_eq!(count, 0, "seed {seed}, {verdicts:?}: {:?}", false_ones[0]);
    assert!(verdicts.contains_key("live"), "{verdicts:?}");
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Up to so many microseconds; as often a very short time.
    fn pause(&mut self, most: u64) {
        let most = if self.below(2) == 0 { most } else { most / 50 };
        thread::sleep(Duration::from_micros(self.below(most)));
    }
}

/// Processes that have the right to write among them, and readers.
struct Crew {
    writers: Vec<Child>,
    readers: Vec<Child>,
    disk: PathBuf,
    /// Their sockets are in it.
    _folder: tempfile::TempDir,
}

impl Crew {
    fn new(disk: &LoopDisk, random: &mut Random, still: bool) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut actor = |role: &str| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args(["--exact", "evidence::root_soak_tests::actor", "--ignored"])
                .args(["--nocapture", "--quiet"])
                .stdout(std::process::Stdio::null())
                .env("SOAK_ROLE", role)
                .env("SOAK_DISK", disk.path())
                .env("SOAK_FOLDER", folder.path())
                .env("SOAK_STILL", still.to_string())
                .env("SOAK_SEED", random.next().to_string());
            Child::spawn(&mut command)
        };
        let writers = (0..WRITERS).map(|n| actor(&n.to_string())).collect();
        let readers = if still { 1 } else { READERS };
        let readers = (0..readers).map(|_| actor("reader")).collect();
        let crew = Self {
            writers,
            readers,
            disk: disk.path(),
            _folder: folder,
        };
        let sockets = (0..WRITERS).map(|n| socket(crew._folder.path(), n));
        for path in sockets {
            bench::until(|| path.exists().then_some(()));
        }
        let right = direct(&disk.path(), true);
        let main = UnixDatagram::unbound().unwrap();
        send(&main, &socket(crew._folder.path(), 0), TAKE, Some(&right));
        crew
    }

    fn assert_alive(&mut self) {
        for child in self.writers.iter_mut().chain(&mut self.readers) {
            assert!(child.is_alive(), "one of the crew has failed");
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.writers.iter_mut().for_each(Child::kill);
        // What one of them has stacked on the disk outlives it.
        let disk = self.disk.to_str().unwrap();
        let stacked = bench::run("losetup", &["-j", disk, "--noheadings", "-O", "NAME"]);
        for upper in stacked.lines() {
            let _ = Command::new("losetup").args(["-d", upper.trim()]).status();
        }
    }
}

fn socket(folder: &Path, n: usize) -> PathBuf {
    folder.join(n.to_string())
}

/// Here is a descriptor, and with it the right.
const TAKE: u8 = b'T';
/// Open the disk yourself, and tell me.
const OPEN: u8 = b'O';
/// I have.
const OPENED: u8 = b'A';

fn send(from: &UnixDatagram, to: &Path, kind: u8, file: Option<&File>) {
    let files: Vec<RawFd> = file.iter().map(|file| file.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&files)];
    let rights = if files.is_empty() { &[][..] } else { &rights };
    let to = UnixAddr::new(to).unwrap();
    let bytes = [kind];
    let bytes = [IoSlice::new(&bytes)];
    let flags = MsgFlags::empty();
    if sendmsg(from.as_raw_fd(), &bytes, rights, flags, Some(&to)).is_err() {
        // The other has been killed, and this one is about to be.
        std::process::exit(1);
    }
}

fn receive(at: &UnixDatagram) -> (u8, Option<File>) {
    let mut kind = [0];
    let mut bytes = [IoSliceMut::new(&mut kind)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<UnixAddr>(at.as_raw_fd(), &mut bytes, Some(&mut space), flags).unwrap();
    let mut file = None;
    for message in got.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(files) = message {
            // SAFETY: the kernel has just made this descriptor for us alone.
            file = Some(unsafe { File::from(OwnedFd::from_raw_fd(files[0])) });
        }
    }
    (kind[0], file)
}

/// One of the crew, in a process of its own; it ends when it is killed.
#[test]
#[ignore = "a process of who_can_write_is_never_taken_for_nobody"]
fn actor() {
    let Ok(role) = std::env::var("SOAK_ROLE") else {
        return;
    };
    let value = |name: &str| std::env::var(name).unwrap();
    let random = Random(value("SOAK_SEED").parse().unwrap());
    let disk = PathBuf::from(value("SOAK_DISK"));
    let still = value("SOAK_STILL") == "true";
    match role.parse() {
        Ok(number) => {
            let writer = Writer::new(number, Path::new(&value("SOAK_FOLDER")), disk, random);
            if still { writer.keep() } else { writer.run() }
        }
        Err(_) if still => open_and_close(&disk, random),
        Err(_) => read(&disk, random),
    }
}

fn open_and_close(disk: &Path, mut random: Random) {
    let mut spin = || {
        let end = Instant::now() + Duration::from_micros(random.below(50));
        while Instant::now() < end {}
    };
    let mut one = CpuSet::new();
    one.set(0).unwrap();
    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
    loop {
        let file = direct(disk, false);
        spin();
        drop(file);
        spin();
    }
}

fn read(disk: &Path, mut random: Random) {
    loop {
        let file = direct(disk, false);
        bench::read_block(&file, 0);
        random.pause(5_000);
        drop(file);
        random.pause(2_000);
    }
}

/// One that may have the right to write.
struct Writer {
    disk: PathBuf,
    random: Random,
    socket: UnixDatagram,
    next: PathBuf,
    previous: PathBuf,
    /// Where it mounts, in a namespace of its own.
    point: PathBuf,
}

impl Writer {
    fn new(number: usize, folder: &Path, disk: PathBuf, random: Random) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let point = folder.join(format!("mount-{number}"));
        std::fs::create_dir(&point).unwrap();
        Self {
            disk,
            random,
            next: socket(folder, (number + 1) % WRITERS),
            previous: socket(folder, (number + WRITERS - 1) % WRITERS),
            point,
            // Last: it says that this one is ready.
            socket: UnixDatagram::bind(socket(folder, number)).unwrap(),
        }
    }

    /// Keeps the right in a ring, once it has it.
    fn keep(self) {
        let (TAKE, Some(right)) = receive(&self.socket) else {
            panic!("the right comes by its descriptor");
        };
        let _ring = bench::ring_holding(&right);
        drop(right);
        loop {
            thread::park();
        }
    }

    fn run(mut self) {
        loop {
            let mut right = match receive(&self.socket) {
                (TAKE, Some(file)) => file,
                (OPEN, None) => {
                    let own = direct(&self.disk, true);
                    send(&self.socket, &self.previous, OPENED, None);
                    own
                }
                other => panic!("{other:?}"),
            };
            for _ in 0..self.random.below(4) {
                right = self.hold(right);
            }
            if self.random.below(2) == 0 {
                send(&self.socket, &self.next, TAKE, Some(&right));
            } else {
                send(&self.socket, &self.next, OPEN, None);
                assert_eq!(receive(&self.socket).0, OPENED);
            }
        }
    }

    /// Holds the disk for a while in one way or another.
    fn hold(&mut self, right: File) -> File {
        let most = 20_000;
        match self.random.below(7) {
            0 => {
                self.random.pause(most);
                right
            }
            1 => {
                let behind = SYSTEM_MIB * 256;
                bench::write_block(&right, behind + self.random.below(behind));
                right
            }
            2 => {
                let copy = right.try_clone().unwrap();
                drop(right);
                self.random.pause(most);
                copy
            }
            3 => {
                let mapping = bench::Mapping::of(&self.disk);
                drop(right);
                self.random.pause(most);
                let right = direct(&self.disk, true);
                drop(mapping);
                right
            }
            4 => {
                let ring = bench::ring_holding(&right);
                drop(right);
                self.random.pause(most);
                let right = direct(&self.disk, true);
                drop(ring);
                right
            }
            5 => {
                let upper = LoopDisk::over(&self.disk);
                drop(right);
                self.random.pause(most);
                let right = direct(&self.disk, true);
                drop(upper);
                right
            }
            _ => {
                let none = None::<&str>;
                // Busy where another's is going just now.
                if mount(
                    Some(&self.disk),
                    &self.point,
                    Some("ext4"),
                    MsFlags::empty(),
                    none,
                )
                .is_err()
                {
                    return right;
                }
                drop(right);
                self.random.pause(most);
                let right = direct(&self.disk, true);
                umount(&self.point).unwrap();
                right
            }
        }
    }
}

//! Loop devices, processes and mounts for the tests, each of which goes when it is dropped.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::super::{Evidence, EvidenceConfig, ProcessIo, Reader, monotonic};
use crate::attach::ports::{Disk, Judgement, Verdict, Witness};
use crate::ids::Diskseq;

/// One test at a time has programs in the kernel and forks children.
static TURN: Mutex<()> = Mutex::new(());

/// As usual, but a look that a machine with much else to do keeps long is no
/// verdict of its own.
pub fn patient() -> EvidenceConfig {
    EvidenceConfig {
        deadline: Duration::from_secs(60),
        ..EvidenceConfig::default()
    }
}

/// Evidence with a clock that can be put ahead.
pub struct Bench {
    pub evidence: Arc<Evidence>,
    ahead: Arc<AtomicU64>,
    _turn: MutexGuard<'static, ()>,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(patient())
    }

    pub fn with(config: EvidenceConfig) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let ahead = Arc::new(AtomicU64::new(0));
        let more = Arc::clone(&ahead);
        let clock = move || monotonic() + more.load(Ordering::SeqCst);
        Self {
            evidence: Evidence::start_with(config, Box::new(clock)).unwrap(),
            ahead,
            _turn: turn,
        }
    }

    /// Puts the clock ahead of the kernel's.
    pub fn ahead(&self, seconds: u64) {
        self.ahead.store(seconds * 1_000_000_000, Ordering::SeqCst);
    }

    pub fn register(&self, reader: Reader) {
        self.evidence.register(reader).unwrap();
    }

    pub fn judge(&self, disk: &LoopDisk, own: &[PathBuf]) -> Judgement {
        self.judge_disk(&disk.disk, own)
    }

    /// Judges until the verdict is this one: udev opens a disk that has
    /// changed, for a moment.
    pub fn settles(&self, disk: &LoopDisk, own: &[PathBuf], verdict: Verdict) -> Judgement {
        let begin = Instant::now();
        loop {
            let judged = self.judge(disk, own);
            if judged.verdict == verdict {
                return judged;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "{judged:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a process has read so much of the disk.
    pub fn has_read(&self, disk: &LoopDisk, pid: u32, reads: u64) -> ProcessIo {
        until(|| {
            let io = self.evidence.io(&disk.disk).unwrap();
            let mut all = io.processes.into_iter();
            all.find(|p| p.pid == pid && p.count.reads >= reads)
        })
    }

    pub fn judge_disk(&self, disk: &Disk, own: &[PathBuf]) -> Judgement {
        wait_for(self.evidence.judge(disk, own))
    }
}

pub fn wait_for<T>(future: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().build().unwrap();
    let output = runtime.block_on(future);
    // As in main: a thread that hangs is not waited for.
    runtime.shutdown_background();
    output
}

/// Asks again until there is an answer.
pub fn until<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "it never came true"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub struct LoopDisk {
    pub disk: Disk,
    _file: Option<tempfile::NamedTempFile>,
}

impl LoopDisk {
    pub fn new(mib: u64) -> Self {
        let file = image(mib);
        Self::set_up(&[], file.path().to_owned(), Some(file))
    }

    pub fn over(path: &Path) -> Self {
        Self::set_up(&[], path.to_owned(), None)
    }

    /// With one partition.
    pub fn partitioned() -> Self {
        let file = image(16);
        let path = file.path().to_owned();
        let disk = Self::set_up(&["--partscan"], path, Some(file));
        // From sector 2048, 16384 sectors; no table, which not every kernel reads.
        run(
            "addpart",
            &[disk.path().to_str().unwrap(), "1", "2048", "16384"],
        );
        disk
    }

    fn set_up(options: &[&str], path: PathBuf, file: Option<tempfile::NamedTempFile>) -> Self {
        let mut args = vec!["--find", "--show"];
        args.extend(options);
        args.push(path.to_str().unwrap());
        let device = run("losetup", &args);
        let name = device.strip_prefix("/dev/").unwrap().to_owned();
        let seq = fs::read_to_string(format!("/sys/block/{name}/diskseq")).unwrap();
        let diskseq = Diskseq(seq.trim().parse().unwrap());
        settle();
        Self {
            disk: Disk { name, diskseq },
            _file: file,
        }
    }

    pub fn path(&self) -> PathBuf {
        self.disk.path()
    }

    /// A device node of the partition, made where the system makes none.
    pub fn partition(&self) -> Node {
        let name = format!("{}p1", self.disk.name);
        let path = PathBuf::from(format!("/dev/{name}"));
        if path.exists() {
            return Node { path, made: false };
        }
        let dev = fs::read_to_string(format!("/sys/block/{}/{name}/dev", self.disk.name)).unwrap();
        let (major, minor) = dev.trim().split_once(':').unwrap();
        run("mknod", &[path.to_str().unwrap(), "b", major, minor]);
        Node { path, made: true }
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(self.path()).status();
    }
}

/// Lets udev, where there is one, read what it wants of a new disk.
fn settle() {
    if Path::new("/run/udev/control").exists() {
        run("udevadm", &["settle", "--timeout=60"]);
    }
}

fn image(mib: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(mib << 20).unwrap();
    file
}

pub struct Node {
    pub path: PathBuf,
    made: bool,
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.made {
            let _ = fs::remove_file(&self.path);
        }
    }
}

pub fn direct(path: &Path, write: bool) -> File {
    let mut options = File::options();
    options.read(true).write(write).custom_flags(libc::O_DIRECT);
    options.open(path).unwrap()
}

#[repr(align(4096))]
struct Block([u8; 4096]);

pub fn read_block(file: &File, n: u64) {
    file.read_exact_at(&mut Block([0; 4096]).0, n * 4096)
        .unwrap();
}

pub fn write_block(file: &File, n: u64) {
    file.write_all_at(&Block([7; 4096]).0, n * 4096).unwrap();
}

/// A process in a group of its own, which ends as a whole.
pub struct Child(std::process::Child);

impl Child {
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.process_group(0).spawn().unwrap())
    }

    fn script(script: &str, disk: &LoopDisk) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(disk.path());
        command
    }

    /// Runs a script whose `$0` is the disk.
    pub fn sh(script: &str, disk: &LoopDisk) -> Self {
        Self::spawn(&mut Self::script(script, disk))
    }

    /// The same; its input is what [`Child::feed`] gives it.
    pub fn fed(script: &str, disk: &LoopDisk) -> Self {
        Self::spawn(Self::script(script, disk).stdin(Stdio::piped()))
    }

    /// The same; its output waits until [`Child::drain`] takes it.
    pub fn read(script: &str, disk: &LoopDisk) -> Self {
        Self::spawn(Self::script(script, disk).stdout(Stdio::piped()))
    }

    /// Holds the disk open and does nothing.
    pub fn holding(disk: &LoopDisk, write: bool) -> Self {
        Self::holding_path(&disk.path(), write)
    }

    pub fn holding_path(path: &Path, write: bool) -> Self {
        let file = File::options().read(true).write(write).open(path).unwrap();
        Self::spawn(Command::new("sleep").arg("1000").stdin(Stdio::from(file)))
    }

    /// Holds a new file open for writing.
    pub fn writing_to(path: &Path) -> Self {
        let file = File::create(path).unwrap();
        Self::spawn(Command::new("sleep").arg("1000").stdout(Stdio::from(file)))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        let pipe = self.0.stdin.as_mut().unwrap();
        pipe.write_all(bytes).unwrap();
        pipe.flush().unwrap();
    }

    pub fn drain(&mut self, bytes: usize) {
        let pipe = self.0.stdout.as_mut().unwrap();
        pipe.read_exact(&mut vec![0; bytes]).unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
    }

    pub fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.0.wait().unwrap()
    }

    pub fn kill(&mut self) {
        let _ = killpg(Pid::from_raw(self.pid().cast_signed()), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A cgroup and one below it.
pub struct Group {
    pub path: PathBuf,
    pub below: PathBuf,
}

impl Group {
    pub fn new(mount: &Path) -> Self {
        let path = mount.join(format!("drover-test-{}", std::process::id()));
        let below = path.join("job");
        fs::create_dir_all(&below).unwrap();
        Self { path, below }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Busy for a moment after its last process has ended.
        for folder in [&self.below, &self.path] {
            for _ in 0..100 {
                if fs::remove_dir(folder).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// A mounted file system.
pub struct Mounted {
    pub point: PathBuf,
    _folder: tempfile::TempDir,
}

impl Mounted {
    pub fn ext4(disk: &LoopDisk) -> Self {
        run("mkfs.ext4", &["-q", "-F", disk.path().to_str().unwrap()]);
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let point = folder.path().to_owned();
        nix::mount::mount(
            Some(&disk.path()),
            &point,
            Some("ext4"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        Self {
            point,
            _folder: folder,
        }
    }
}

impl Mounted {
    /// Its folder stays: removing it would take the mount out of every namespace.
    pub fn unmount(&self) {
        nix::mount::umount2(&self.point, MntFlags::empty()).unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.point, MntFlags::MNT_DETACH);
    }
}

/// An io_uring in which `file` is registered; nothing else of it stays open.
pub fn ring_holding(file: &File) -> OwnedFd {
    let mut params = [0_u8; 120];
    // SAFETY: `params` is as large as struct io_uring_params and lives through the call.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) };
    assert!(
        ring >= 0,
        "io_uring_setup: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: the call has just returned this descriptor, and nobody else has it.
    let ring = unsafe { OwnedFd::from_raw_fd(i32::try_from(ring).unwrap()) };
    let files = [file.as_raw_fd()];
    const IORING_REGISTER_FILES: libc::c_uint = 2;
    // SAFETY: `files` is one descriptor, as the last argument says.
    let done = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            IORING_REGISTER_FILES,
            files.as_ptr(),
            1,
        )
    };
    assert_eq!(
        done,
        0,
        "io_uring_register: {}",
        std::io::Error::last_os_error()
    );
    ring
}

/// A shared, writable mapping whose descriptor is closed.
pub struct Mapping(*mut libc::c_void);

impl Mapping {
    pub fn of(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        // SAFETY: a new mapping at an address the kernel chooses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        Self(at)
    }
}

impl Mapping {
    pub fn address(&self) -> usize {
        self.0.addr()
    }

    /// Puts memory of no file in its place.
    pub fn replace(&self) {
        // SAFETY: the range is this mapping's own.
        let at = unsafe {
            libc::mmap(
                self.0,
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        assert_eq!(at, self.0);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length, and nobody points into it.
        unsafe { libc::munmap(self.0, 4096) };
    }
}

//! What the child does: one kernel call, or a few that belong together, on an
//! attached device or a file system on it.
//!
//! Runs in a process of its own (`drover child NAME`), gets one [`Op`] as JSON
//! on standard input and answers one [`Reply`] as the last line of standard
//! output. It owns nothing and remembers nothing; it may hang, and then it is
//! the parent's deadline that ends it. See [`super::child`].

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};
use serde::{Deserialize, Serialize};

use super::superblock::{self, FormatMark, Superblock};
use crate::attach::ports::Disk;
use crate::ids::{Bytes, Diskseq, VolumeId};

/// A disk by its node, and the sequence number it must have there.
///
/// Names and numbers of disks are used again. A child opens the node, asks the
/// open descriptor for its sequence number (BLKGETDISKSEQ), and keeps it open
/// while a tool uses the name: an open disk's name is not given to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Node {
    /// The device node.
    pub path: PathBuf,
    /// The disk's sequence number.
    pub diskseq: Diskseq,
}

impl From<&Disk> for Node {
    fn from(disk: &Disk) -> Self {
        Self {
            path: disk.path(),
            diskseq: disk.diskseq,
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// One thing to do in a child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub(super) enum Op {
    /// Write an option string to the fabrics device.
    Connect { fabrics: PathBuf, options: String },
    /// Delete a controller, if it is still one of this subsystem.
    Delete {
        controller: PathBuf,
        subsystem: String,
    },
    /// Let a controller look at its namespaces again.
    Rescan {
        controller: PathBuf,
        subsystem: String,
    },
    /// Read a device's edges and ask blkid what is on it.
    Examine { device: Node, volume: VolumeId },
    /// Write the format mark.
    Mark { device: Node, volume: VolumeId },
    /// Take the format mark away, where it is still there.
    Unmark { device: Node, volume: VolumeId },
    /// Run a tool that is given the device by name; its last arguments are the
    /// device and `after`.
    Tool {
        device: Node,
        program: String,
        args: Vec<String>,
        after: Vec<PathBuf>,
    },
    /// Unmount, or only detach.
    Unmount { path: PathBuf, detach: bool },
    /// Bind-mount.
    Bind {
        source: PathBuf,
        target: PathBuf,
        read_only: bool,
    },
    /// Write back the file system at a path.
    SyncFileSystem { path: PathBuf },
    /// Claim a device and write back its own page cache. EBUSY: a file system
    /// or a tool has claimed it.
    SyncDevice { device: Node },
    /// Room of the file system at a path.
    Room { path: PathBuf },
    /// Make a device refuse writes, or take them again.
    SetReadOnly { device: Node, read_only: bool },
}

impl Op {
    /// The call and its object, for errors and for `ps`.
    pub(super) fn what(&self) -> String {
        match self {
            Self::Connect { fabrics, .. } => format!("write connect to {}", fabrics.display()),
            Self::Delete { controller, .. } => format!("delete {}", controller.display()),
            Self::Rescan { controller, .. } => format!("rescan {}", controller.display()),
            Self::Examine { device, .. } => format!("examine {device}"),
            Self::Mark { device, .. } => format!("mark {device}"),
            Self::Unmark { device, .. } => format!("unmark {device}"),
            Self::Tool {
                device, program, ..
            } => format!("{program} on {device}"),
            Self::Unmount {
                path,
                detach: false,
            } => format!("umount {}", path.display()),
            Self::Unmount { path, detach: true } => format!("detach {}", path.display()),
            Self::Bind { source, target, .. } => {
                format!("bind {} to {}", source.display(), target.display())
            }
            Self::SyncFileSystem { path } => format!("syncfs {}", path.display()),
            Self::SyncDevice { device } => format!("fsync {device}"),
            Self::Room { path } => format!("statvfs {}", path.display()),
            Self::SetReadOnly { device, .. } => format!("set read-only {device}"),
        }
    }
}

/// What an op found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// Nothing but that it is done.
    Done,
    /// What the fabrics device said: `instance=0,cntlid=1`.
    Connected(String),
    /// What is on a device.
    Examined(Examination),
    /// Room in a file system.
    Room(Room),
    /// How a tool ended.
    Ended(Ended),
}

/// How a tool ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ended {
    /// Its exit status; none: a signal ended it.
    pub code: Option<i32>,
    /// What it printed, both outputs.
    pub output: String,
}

/// What is on a device, unjudged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Examination {
    /// The device's size.
    pub size: Bytes,
    /// What its first blocks say, where they are a superblock that drover knows.
    pub superblock: Option<Superblock>,
    /// Whether the format mark of this volume is there.
    pub marked: bool,
    /// blkid's exit status; none: a signal ended it.
    pub blkid_code: Option<i32>,
    /// What blkid printed.
    pub blkid_out: String,
    /// What blkid complained of.
    pub blkid_err: String,
}

/// Room in a file system: all, used and available.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Room {
    /// In bytes.
    pub bytes: [u64; 3],
    /// In inodes.
    pub inodes: [u64; 3],
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    /// The call and its object.
    pub call: String,
    /// The kernel's error number; 0 where it was not the kernel.
    pub errno: i32,
    /// The reason in words.
    pub reason: String,
}

/// The child's one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reply {
    /// Microseconds between the first call and the end of the last.
    pub took_us: u64,
    /// What came of it.
    pub result: Result<Answer, Failure>,
}

fn failure(call: &str, object: &Path, error: &io::Error) -> Failure {
    Failure {
        call: format!("{call} {}", object.display()),
        errno: error.raw_os_error().unwrap_or(0),
        reason: error.to_string(),
    }
}

fn refused(call: &str, object: &Path, errno: Errno) -> Failure {
    failure(call, object, &io::Error::from_raw_os_error(errno as i32))
}

/// The child's main function: `drover child NAME`, the op on standard input.
///
/// `args` (the op's name) is only there for `ps`. Exits with 0 when it could
/// answer at all, with 2 when what it was given is not an op.
pub fn child_main(_args: impl Iterator<Item = String>) -> ExitCode {
    let mut text = String::new();
    let op: Op = match io::stdin()
        .read_to_string(&mut text)
        .map_err(|e| e.to_string())
        .and_then(|_| serde_json::from_str(&text).map_err(|e| e.to_string()))
    {
        Ok(op) => op,
        Err(error) => {
            eprintln!("drover child: standard input is not an op of this drover: {error}");
            return ExitCode::from(2);
        }
    };
    let started = Instant::now();
    let result = perform(&op);
    let took_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    let reply = Reply { took_us, result };
    let line = match serde_json::to_string(&reply) {
        Ok(line) => line,
        Err(error) => {
            eprintln!("drover child: {error}");
            return ExitCode::from(2);
        }
    };
    // A parent that has given up no longer reads; there is nobody left to tell.
    match writeln!(io::stdout(), "\n{line}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(2),
    }
}

fn perform(op: &Op) -> Result<Answer, Failure> {
    match op {
        Op::Connect { fabrics, options } => connect(fabrics, options).map(Answer::Connected),
        Op::Delete {
            controller,
            subsystem,
        } => poke(controller, "delete_controller", subsystem).map(|()| Answer::Done),
        Op::Rescan {
            controller,
            subsystem,
        } => poke(controller, "rescan_controller", subsystem).map(|()| Answer::Done),
        Op::Examine { device, volume } => examine(device, volume).map(Answer::Examined),
        Op::Mark { device, volume } => mark(device, volume).map(|()| Answer::Done),
        Op::Unmark { device, volume } => unmark(device, volume).map(|()| Answer::Done),
        Op::Tool {
            device,
            program,
            args,
            after,
        } => tool(device, program, args, after).map(Answer::Ended),
        Op::Unmount { path, detach } => unmount(path, *detach).map(|()| Answer::Done),
        Op::Bind {
            source,
            target,
            read_only,
        } => bind(source, target, *read_only).map(|()| Answer::Done),
        Op::SyncFileSystem { path } => sync_file_system(path).map(|()| Answer::Done),
        Op::SyncDevice { device } => sync_device(device).map(|()| Answer::Done),
        Op::Room { path } => room(path).map(Answer::Room),
        Op::SetReadOnly { device, read_only } => {
            set_read_only(device, *read_only).map(|()| Answer::Done)
        }
    }
}

/// The kernel makes the controller within the write, and says on the same
/// descriptor which one it is (drivers/nvme/host/fabrics.c).
fn connect(fabrics: &Path, options: &str) -> Result<String, Failure> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(fabrics)
        .map_err(|e| failure("open", fabrics, &e))?;
    file.write_all(options.as_bytes())
        .map_err(|e| failure("write connect to", fabrics, &e))?;
    let mut said = String::new();
    file.read_to_string(&mut said)
        .map_err(|e| failure("read", fabrics, &e))?;
    Ok(said)
}

/// Controller names are used again: the subsystem is read once more right
/// before the write, so that a slow caller never deletes somebody else's.
fn poke(controller: &Path, attribute: &str, subsystem: &str) -> Result<(), Failure> {
    let gone = |e: &io::Error| {
        matches!(
            e.raw_os_error().map(Errno::from_raw),
            Some(Errno::ENOENT | Errno::ENODEV)
        )
    };
    let name = controller.join("subsysnqn");
    match fs::read_to_string(&name) {
        Ok(found) if found.trim() == subsystem => {}
        Ok(_) => return Ok(()),
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(failure("read", &name, &e)),
    }
    let path = controller.join(attribute);
    let wrote = OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(b"1"));
    match wrote {
        Err(e) if !gone(&e) => Err(failure("write", &path, &e)),
        _ => Ok(()),
    }
}

/// Bytes read at each end of a device before and after blkid: more than any
/// signature's place that blkid looks at near the ends of a small device.
const EDGE: u64 = 256 * 1024;
const ALIGN: usize = 4096;

/// A buffer that O_DIRECT takes.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0_u8; len + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, start, len }
    }
    fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

nix::ioctl_read!(
    /// BLKGETDISKSEQ of linux/fs.h.
    blkgetdiskseq,
    0x12,
    128,
    u64
);

/// Opens the disk itself and nothing that has taken its name since.
fn open_node(device: &Node, write: bool, flags: i32) -> Result<File, Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags)
        .open(&device.path)
        .map_err(|e| failure("open", &device.path, &e))?;
    let mut found = 0_u64;
    // SAFETY: the descriptor is open, and the kernel writes one u64.
    unsafe { blkgetdiskseq(file.as_raw_fd(), &raw mut found) }
        .map_err(|errno| refused("ioctl BLKGETDISKSEQ", &device.path, errno))?;
    if found == device.diskseq.0 {
        Ok(file)
    } else {
        let mut other = refused("open", &device.path, Errno::ENODEV);
        other.reason = format!(
            "it is another disk now (sequence number {found}, not {})",
            device.diskseq
        );
        Err(other)
    }
}

fn open_direct(device: &Node, write: bool) -> Result<File, Failure> {
    // O_EXCL on a block device: refused while a mount, a mkfs that a deadline
    // left behind, or anything else has claimed it.
    let flags = libc::O_DIRECT | if write { libc::O_EXCL } else { 0 };
    open_node(device, write, flags)
}

fn read_at(file: &File, device: &Path, at: u64, len: u64) -> Result<Aligned, Failure> {
    let len = usize::try_from(len).map_err(|_| refused("read", device, Errno::EOVERFLOW))?;
    let mut buffer = Aligned::new(len);
    file.read_exact_at(buffer.get_mut(), at)
        .map_err(|e| failure(&format!("read {len} bytes at {at} of"), device, &e))?;
    Ok(buffer)
}

fn size_of(file: &mut File, device: &Path) -> Result<u64, Failure> {
    let size = file
        .seek(SeekFrom::End(0))
        .map_err(|e| failure("seek to the end of", device, &e))?;
    if size < EDGE {
        return Err(Failure {
            call: format!("size of {}", device.display()),
            errno: 0,
            reason: format!("{size} bytes are too few to hold anything"),
        });
    }
    Ok(size)
}

/// blkid takes a device that answers EIO for a blank one (it exits 2 both
/// times), so the edges must be readable before it and after it.
fn examine(node: &Node, volume: &VolumeId) -> Result<Examination, Failure> {
    let mut file = open_direct(node, false)?;
    let device = &node.path;
    let size = size_of(&mut file, device)?;
    let tail = (size - EDGE) / ALIGN as u64 * ALIGN as u64;
    let edges = |file: &File| -> Result<Aligned, Failure> {
        let head = read_at(file, device, 0, EDGE)?;
        read_at(
            file,
            device,
            tail,
            (size - tail) / ALIGN as u64 * ALIGN as u64,
        )?;
        Ok(head)
    };
    let head = edges(&file)?;
    let place = FormatMark::place(Bytes(size));
    let marked = read_at(&file, device, place, FormatMark::LEN)?.get() == FormatMark::of(volume);
    let blkid = Command::new("blkid")
        .args(["-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export"])
        .arg(device)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failure("run blkid -p", device, &e))?;
    edges(&file)?;
    Ok(Examination {
        size: Bytes(size),
        superblock: superblock::parse(head.get()),
        marked,
        blkid_code: blkid.status.code(),
        blkid_out: String::from_utf8_lossy(&blkid.stdout).into_owned(),
        blkid_err: String::from_utf8_lossy(&blkid.stderr).into_owned(),
    })
}

fn tool(node: &Node, program: &str, args: &[String], after: &[PathBuf]) -> Result<Ended, Failure> {
    let held = open_node(node, false, 0)?;
    let output = Command::new(program)
        .args(args)
        .arg(&node.path)
        .args(after)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failure(&format!("run {program} on"), &node.path, &e))?;
    drop(held);
    let (out, err) = (&output.stdout, &output.stderr);
    Ok(Ended {
        code: output.status.code(),
        output: format!(
            "{} {}",
            String::from_utf8_lossy(out),
            String::from_utf8_lossy(err)
        ),
    })
}

fn mark(node: &Node, volume: &VolumeId) -> Result<(), Failure> {
    let mut file = open_direct(node, true)?;
    let device = &node.path;
    let place = FormatMark::place(Bytes(size_of(&mut file, device)?));
    write_mark(&file, device, place, &FormatMark::of(volume))
}

fn unmark(node: &Node, volume: &VolumeId) -> Result<(), Failure> {
    let mut file = open_direct(node, true)?;
    let device = &node.path;
    let place = FormatMark::place(Bytes(size_of(&mut file, device)?));
    if read_at(&file, device, place, FormatMark::LEN)?.get() == FormatMark::of(volume) {
        let zeroes = vec![0_u8; FormatMark::of(volume).len()];
        write_mark(&file, device, place, &zeroes)?;
    }
    // Also what mkfs left in the device's write cache.
    file.sync_all().map_err(|e| failure("fsync", device, &e))
}

fn write_mark(file: &File, device: &Path, place: u64, bytes: &[u8]) -> Result<(), Failure> {
    let mut buffer = Aligned::new(bytes.len());
    buffer.get_mut().copy_from_slice(bytes);
    file.write_all_at(buffer.get(), place)
        .and_then(|()| file.sync_all())
        .map_err(|e| {
            failure(
                &format!("write {} bytes at {place} of", bytes.len()),
                device,
                &e,
            )
        })
}

fn unmount(path: &Path, detach: bool) -> Result<(), Failure> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    if detach {
        flags |= MntFlags::MNT_DETACH;
    }
    match umount2(path, flags) {
        // Not a mount point: somebody was faster, and it is as it should be.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(refused(
            if detach { "detach" } else { "umount" },
            path,
            errno,
        )),
    }
}

fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), Failure> {
    let none: Option<&str> = None;
    let kept = kept_flags(source)?;
    mount(Some(source), target, none, MsFlags::MS_BIND, none)
        .map_err(|errno| refused(&format!("bind {} to", source.display()), target, errno))?;
    if read_only {
        // A bind takes no other flag at once (mount(2)), and a remount that
        // does not repeat nosuid, nodev and their like would clear them.
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | kept;
        if let Err(errno) = mount(none, target, none, flags, none) {
            let undone = umount2(target, MntFlags::MNT_DETACH);
            let mut failure = refused("remount read-only", target, errno);
            if let Err(errno) = undone {
                failure.reason += &format!("; then detaching it: {}", errno.desc());
            }
            return Err(failure);
        }
    }
    Ok(())
}

fn kept_flags(path: &Path) -> Result<MsFlags, Failure> {
    let flags = statvfs(path)
        .map_err(|errno| refused("statvfs", path, errno))?
        .flags();
    let pairs = [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    Ok(pairs
        .into_iter()
        .filter(|(have, _)| flags.contains(*have))
        .fold(MsFlags::empty(), |all, (_, flag)| all | flag))
}

fn sync_file_system(path: &Path) -> Result<(), Failure> {
    let folder = File::open(path).map_err(|e| failure("open", path, &e))?;
    nix::unistd::syncfs(&folder).map_err(|errno| refused("syncfs", path, errno))
}

fn sync_device(device: &Node) -> Result<(), Failure> {
    open_node(device, false, libc::O_EXCL)?
        .sync_all()
        .map_err(|e| failure("fsync", &device.path, &e))
}

fn room(path: &Path) -> Result<Room, Failure> {
    let found = statvfs(path).map_err(|errno| refused("statvfs", path, errno))?;
    let unit = found.fragment_size();
    let (all, free, usable) = (
        found.blocks(),
        found.blocks_free(),
        found.blocks_available(),
    );
    let (inodes, inodes_free) = (found.files(), found.files_free());
    Ok(Room {
        bytes: [
            all.saturating_mul(unit),
            all.saturating_sub(free).saturating_mul(unit),
            usable.saturating_mul(unit),
        ],
        inodes: [
            inodes,
            inodes.saturating_sub(inodes_free),
            found.files_available(),
        ],
    })
}

nix::ioctl_write_ptr_bad!(
    /// BLKROSET of linux/fs.h, `_IO(0x12, 93)` with a pointer to an int.
    blkroset,
    nix::request_code_none!(0x12, 93),
    libc::c_int
);

fn set_read_only(device: &Node, read_only: bool) -> Result<(), Failure> {
    let file = open_node(device, false, 0)?;
    let value = libc::c_int::from(read_only);
    // SAFETY: the descriptor is open for the length of the call, and the
    // kernel only reads one int through the pointer.
    unsafe { blkroset(file.as_raw_fd(), &raw const value) }
        .map(|_| ())
        .map_err(|errno| refused("ioctl BLKROSET", &device.path, errno))
}

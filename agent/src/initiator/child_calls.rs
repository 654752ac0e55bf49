//! The calls that a child makes, each with its failure named.
//!
//! Only a child runs these: any of them may hang. See [`super::child_ops`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::child_ops::{Ended, Examination, Failure, Node, Room};
use super::superblock::{self, FormatMark};
use crate::fence::shutdown::{self, Shut};
use crate::ids::{Bytes, VolumeId};

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

/// The kernel makes the controller within the write, and says on the same
/// descriptor which one it is (drivers/nvme/host/fabrics.c).
pub(super) fn connect(fabrics: &Path, options: &str) -> Result<String, Failure> {
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
pub(super) fn poke(controller: &Path, attribute: &str, subsystem: &str) -> Result<(), Failure> {
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
pub(super) fn examine(node: &Node, volume: &VolumeId) -> Result<Examination, Failure> {
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

pub(super) fn tool(
    node: &Node,
    program: &str,
    args: &[String],
    after: &[PathBuf],
) -> Result<Ended, Failure> {
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

pub(super) fn mark(node: &Node, volume: &VolumeId) -> Result<(), Failure> {
    let mut file = open_direct(node, true)?;
    let device = &node.path;
    let place = FormatMark::place(Bytes(size_of(&mut file, device)?));
    write_mark(&file, device, place, &FormatMark::of(volume))
}

pub(super) fn unmark(node: &Node, volume: &VolumeId) -> Result<(), Failure> {
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

pub(super) fn unmount(path: &Path, detach: bool) -> Result<(), Failure> {
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

pub(super) fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), Failure> {
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

pub(super) fn write_back(device: &Node, shown: Option<&Path>) -> Result<(), Failure> {
    shutdown::write_back(&device.path, device.diskseq, shown)
        .map_err(|e| failure("write back", &device.path, &e))
}

pub(super) fn sync_device(device: &Node) -> Result<(), Failure> {
    open_node(device, false, libc::O_EXCL)?
        .sync_all()
        .map_err(|e| failure("fsync", &device.path, &e))
}

pub(super) fn end_writes(device: &Node) -> Result<(), Failure> {
    shutdown::end_writes(&device.path, device.diskseq).map_err(|e| match e.kind() {
        io::ErrorKind::ResourceBusy => refused("remount read-only", &device.path, Errno::EBUSY),
        _ => failure("remount read-only", &device.path, &e),
    })
}

/// Whether a file system was mounted from the device.
pub(super) fn shut_down(
    device: &Node,
    shown: Option<&Path>,
    exemptions: Option<&Path>,
) -> Result<bool, Failure> {
    let failed = |e| failure("shut down the file system on", &device.path, &e);
    match shutdown::shut_down(&device.path, device.diskseq, shown, exemptions).map_err(failed)? {
        Shut::Down => Ok(true),
        Shut::NoneMounted => Ok(false),
    }
}

pub(super) fn room(path: &Path) -> Result<Room, Failure> {
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

pub(super) fn set_read_only(device: &Node, read_only: bool) -> Result<(), Failure> {
    let file = open_node(device, false, 0)?;
    let value = libc::c_int::from(read_only);
    // SAFETY: the descriptor is open for the length of the call, and the
    // kernel only reads one int through the pointer.
    unsafe { blkroset(file.as_raw_fd(), &raw const value) }
        .map(|_| ())
        .map_err(|errno| refused("ioctl BLKROSET", &device.path, errno))
}

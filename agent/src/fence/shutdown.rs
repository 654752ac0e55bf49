//! Reaches the file system on a disk, in whatever namespace it is mounted or
//! only kept by an open file: to write it back, to end writes to it, or to shut
//! it down.
//!
//! After a shutdown the file system does no I/O at all: what is dirty stays
//! unwritten, its journal too, and every call on it fails with EIO. Any of the
//! calls here may hang, so only a child makes them.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::detached;
use super::exempt::Pass;
use crate::ids::Diskseq;

nix::ioctl_read!(
    /// XFS_IOC_GOINGDOWN, and with the same number and meaning EXT4_IOC_SHUTDOWN
    /// (fs/xfs/libxfs/xfs_fs.h, fs/ext4/ext4.h). Declared as a read, it writes.
    goingdown,
    b'X',
    125,
    u32
);

nix::ioctl_readwrite!(
    /// FITHAW of linux/fs.h.
    fithaw,
    b'X',
    120,
    libc::c_int
);

/// XFS_FSOP_GOING_FLAGS_NOLOGFLUSH, EXT4_GOING_FLAGS_NOLOGFLUSH: nothing more
/// is written, not even the log.
const NO_LOG_FLUSH: u32 = 2;

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shut {
    /// The file system does no I/O any more.
    Down,
    /// No file system is mounted from the disk.
    NoneMounted,
}

/// Shuts down the file system on `disk`, a device node that `shown` may be a
/// mount of. `exemptions` is where this process lets itself through the disk's
/// gate.
///
/// # Errors
/// The call that failed.
pub fn shut_down(
    disk: &Path,
    diskseq: Diskseq,
    shown: Option<&Path>,
    exemptions: Option<&Path>,
) -> io::Result<Shut> {
    // Without a pass it is tried all the same: not every layer may be up.
    let pass = exemptions.map(Pass::take).transpose();
    match (reach_and_shut(disk, diskseq, shown), pass) {
        (Err(error), Err(why)) => Err(io::Error::new(
            error.kind(),
            format!("{error}; and no pass through the gate: {why}"),
        )),
        (result, _) => result,
    }
}

/// The same for whom the gate lets through.
fn reach_and_shut(disk: &Path, diskseq: Diskseq, shown: Option<&Path>) -> io::Result<Shut> {
    // A mount that is seen here needs no lock of the super block's, which a
    // sync that hangs may hold.
    if let Some(point) = shown {
        let held = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(point);
        match File::open(point) {
            Ok(root) => return down(&root),
            Err(_) if held.is_ok_and(|held| went_down(&held)) => return Ok(Shut::Down),
            Err(_) => {}
        }
    }
    let shut = once_more(disk, diskseq, |mount| match detached::open(mount) {
        Ok(root) => down(&root),
        Err(_) if went_down(mount) => Ok(Shut::Down),
        Err(error) => Err(error),
    })?;
    Ok(shut.unwrap_or(Shut::NoneMounted))
}

/// Writes back the file system on `disk`, a device node that `shown` may be a
/// mount of, and what the disk itself has in the page cache, whoever has
/// claimed it.
///
/// # Errors
/// The call that failed.
pub fn write_back(disk: &Path, diskseq: Diskseq, shown: Option<&Path>) -> io::Result<()> {
    let device = open_disk(disk, diskseq)?;
    let number = device.metadata()?.rdev();
    // Something else may have been mounted over it.
    let root = shown.and_then(|point| File::open(point).ok());
    let root = root.filter(|root| root.metadata().is_ok_and(|found| found.dev() == number));
    let synced = match root {
        Some(root) => sync(&root).map(Some),
        None => once_more(disk, diskseq, |mount| sync(&detached::open(mount)?)),
    };
    device.sync_all()?;
    match synced {
        // A raw device, claimed by a tool.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(()),
        synced => synced.map(drop),
    }
}

/// Makes the file system on `disk` read-only, unless somebody has a file of it
/// open for writing, through any mount and in whatever way: ResourceBusy.
///
/// # Errors
/// That, or the call that failed.
pub fn end_writes(disk: &Path, diskseq: Diskseq) -> io::Result<()> {
    once_more(disk, diskseq, detached::read_only).map(drop)
}

fn sync(root: &File) -> io::Result<()> {
    Ok(nix::unistd::syncfs(root)?)
}

/// Does something with one more mount of the file system on a disk. None:
/// nothing has claimed the disk. ResourceBusy: what has is no file system of
/// drover's.
fn once_more<T>(
    disk: &Path,
    diskseq: Diskseq,
    act: impl Fn(&File) -> io::Result<T>,
) -> io::Result<Option<T>> {
    if !is_claimed(disk, diskseq)? {
        return Ok(None);
    }
    // A claimed disk gives a mount only to who claims it the same way: another
    // type of file system is refused with EBUSY, before anything is read.
    let mut why: Option<io::Error> = None;
    for fs in [c"xfs", c"ext4"] {
        for read_only in [false, true] {
            let done = detached::mount(fs, Some(disk), read_only).and_then(|mount| act(&mount));
            match done {
                Ok(done) => return Ok(Some(done)),
                Err(e) if why.is_some() && e.kind() == io::ErrorKind::ResourceBusy => {}
                Err(error) => why = Some(told(fs, error)),
            }
        }
    }
    Err(why.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
}

/// Whether this, an O_PATH descriptor, is of an XFS that is shut down already. It
/// shuts itself down when its log cannot be written, as behind a closed gate;
/// then its root opens no more, and nobody can shut it down anew. Attributes of
/// a root, which is in memory, need no disk: XFS answers EIO for them only then
/// (xfs_vn_getattr in fs/xfs/xfs_iops.c). ext4's root still opens.
fn went_down(root: &File) -> bool {
    let is_xfs = nix::sys::statfs::fstatfs(root)
        .is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::XFS_SUPER_MAGIC);
    let eio = |error: &io::Error| error.raw_os_error() == Some(libc::EIO);
    is_xfs && root.metadata().is_err_and(|error| eio(&error))
}

fn told(fs: &CStr, error: io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("mount it as {} once more: {error}", fs.to_string_lossy()),
    )
}

nix::ioctl_read!(
    /// BLKGETDISKSEQ of linux/fs.h.
    blkgetdiskseq,
    0x12,
    128,
    u64
);

/// Opens a disk. It is an error when another disk has its name now.
fn open_disk(disk: &Path, diskseq: Diskseq) -> io::Result<File> {
    let plain = File::open(disk)?;
    let mut found = 0_u64;
    // SAFETY: the descriptor is open, and the kernel writes one u64.
    unsafe { blkgetdiskseq(plain.as_raw_fd(), &raw mut found) }?;
    if found == diskseq.0 {
        Ok(plain)
    } else {
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }
}

/// Whether a super block, or something else in the kernel, has claimed the disk.
fn is_claimed(disk: &Path, diskseq: Diskseq) -> io::Result<bool> {
    let _plain = open_disk(disk, diskseq)?;
    let claim = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(disk);
    match claim {
        Ok(_) => Ok(false),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(true),
        Err(e) => Err(e),
    }
}

fn down(root: &File) -> io::Result<Shut> {
    let mut flags = NO_LOG_FLUSH;
    // SAFETY: the descriptor is open, and the kernel reads one u32.
    unsafe { goingdown(root.as_raw_fd(), &raw mut flags) }?;
    // Who waits for a freeze to end (a backup's, say) is let go, to an error.
    let mut unused = 0;
    // SAFETY: the descriptor is open; the kernel does not use the pointer. That
    // nothing was frozen is its error, and no matter.
    let _ = unsafe { fithaw(root.as_raw_fd(), &raw mut unused) };
    Ok(Shut::Down)
}

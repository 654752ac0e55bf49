//! Shuts down the file system on a disk, in whatever namespace it is mounted.
//!
//! After that the file system does no I/O at all: what is dirty stays
//! unwritten, its journal too, and every call on it fails with EIO. Any of the
//! calls here may hang, so only a child makes them.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
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
    let _pass = exemptions.map(Pass::take).transpose()?;
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
    if !is_claimed(disk, diskseq)? {
        return Ok(Shut::NoneMounted);
    }
    // A claimed disk gives a mount only to who claims it the same way: another
    // type of file system is refused with EBUSY, before anything is read.
    let mut why = io::Error::from(io::ErrorKind::NotFound);
    for fs in [c"xfs", c"ext4"] {
        for read_only in [false, true] {
            let mount = match detached::mount(fs, Some(disk), read_only) {
                Ok(mount) => mount,
                Err(error) => {
                    why = told(fs, error);
                    continue;
                }
            };
            match detached::open(&mount) {
                Ok(root) => return down(&root),
                Err(_) if went_down(&mount) => return Ok(Shut::Down),
                Err(error) => why = told(fs, error),
            }
        }
    }
    Err(why)
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

/// Whether a super block, or something else in the kernel, has claimed the
/// disk. It is an error when another disk has its name now.
fn is_claimed(disk: &Path, diskseq: Diskseq) -> io::Result<bool> {
    let open = |flags| OpenOptions::new().read(true).custom_flags(flags).open(disk);
    let plain = open(0)?;
    let mut found = 0_u64;
    // SAFETY: the descriptor is open, and the kernel writes one u64.
    unsafe { blkgetdiskseq(plain.as_raw_fd(), &raw mut found) }?;
    if found != diskseq.0 {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    match open(libc::O_EXCL) {
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

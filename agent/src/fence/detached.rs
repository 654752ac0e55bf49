//! A mount that no folder shows: fsopen(2), fsconfig(2), fsmount(2).
//!
//! It is in nobody's tree and goes with its descriptor, so it needs no place
//! and no namespace of its own, and leaves nothing behind.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// include/uapi/linux/mount.h
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSCONFIG_CMD_RECONFIGURE: libc::c_uint = 7;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSPICK_CLOEXEC: libc::c_uint = 1;
const FSPICK_EMPTY_PATH: libc::c_uint = 8;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let number = i32::try_from(result).map_err(io::Error::other)?;
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for this call, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn configure(
    context: &OwnedFd,
    command: libc::c_uint,
    key: Option<&CStr>,
    value: Option<&CStr>,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: the descriptor is open, and both pointers are null or strings
    // that live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            pointer(key),
            pointer(value),
            0,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Mounts a file system and opens its root folder.
pub fn root(fs: &CStr, source: Option<&Path>, read_only: bool) -> io::Result<File> {
    open(&mount(fs, source, read_only)?)
}

/// Mounts a file system; the descriptor is of its root folder, as O_PATH makes
/// them. Of a device that is mounted already it is the same super block,
/// whatever namespace the other mount is in.
pub fn mount(fs: &CStr, source: Option<&Path>, read_only: bool) -> io::Result<File> {
    use std::os::unix::ffi::OsStrExt as _;

    // SAFETY: the name is a string that lives through the call.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, fs.as_ptr(), FSOPEN_CLOEXEC) };
    let context = descriptor(context)?;
    if let Some(source) = source {
        let source = CString::new(source.as_os_str().as_bytes())?;
        let key = Some(c"source");
        configure(&context, FSCONFIG_SET_STRING, key, Some(&source))?;
    }
    if read_only {
        configure(&context, FSCONFIG_SET_FLAG, Some(c"ro"), None)?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: the call takes numbers only.
    let mount = unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            0_u32,
        )
    };
    Ok(File::from(descriptor(mount)?))
}

/// Makes the super block of a mount read-only, for every mount of it. EBUSY: a
/// file of it is open for writing somewhere.
pub fn read_only(mount: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the path is a string.
    let context = unsafe {
        libc::syscall(
            libc::SYS_fspick,
            mount.as_raw_fd(),
            c"".as_ptr(),
            FSPICK_CLOEXEC | FSPICK_EMPTY_PATH,
        )
    };
    let context = descriptor(context)?;
    configure(&context, FSCONFIG_SET_FLAG, Some(c"ro"), None)?;
    configure(&context, FSCONFIG_CMD_RECONFIGURE, None, None)
}

/// Opens the root folder of a mount.
pub fn open(mount: &File) -> io::Result<File> {
    // SAFETY: the descriptor is open, and the name is a string.
    let root = unsafe {
        libc::openat(
            mount.as_raw_fd(),
            c".".as_ptr(),
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
    };
    Ok(File::from(descriptor(root.into())?))
}

/// A file below an open folder, by the kernel's link to the folder.
pub fn below(folder: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

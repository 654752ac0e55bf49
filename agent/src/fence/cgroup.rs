//! The root of the unified cgroup hierarchy: a device program there is asked
//! for every process, whatever cgroup it is in.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::detached;

/// The inode number of the root of the whole hierarchy; what a cgroup
/// namespace shows as its root has another.
const ROOT: u64 = 1;

/// Opens it: through this process's mounts, the first process's, or a mount of
/// its own where the machine has only the older hierarchies mounted.
pub fn root() -> io::Result<File> {
    let mounted = ["/proc/self", "/proc/1"].into_iter().flat_map(|process| {
        let text = fs::read_to_string(format!("{process}/mountinfo")).unwrap_or_default();
        let points: Vec<PathBuf> = text
            .lines()
            .filter_map(|line| {
                // proc(5): the type comes behind the hyphen, the point is the fifth.
                let (mount, kind) = line.split_once(" - ")?;
                let point = mount.split(' ').nth(4)?;
                kind.starts_with("cgroup2 ")
                    .then(|| PathBuf::from(format!("{process}/root{point}")))
            })
            .collect();
        points
    });
    let opened = mounted.map(File::open).chain(std::iter::once_with(|| {
        detached::root(c"cgroup2", None, false)
    }));
    let mut why = io::Error::from(io::ErrorKind::NotFound);
    for folder in opened {
        match folder.and_then(|folder| Ok((folder.metadata()?.ino(), folder))) {
            Ok((ROOT, folder)) => return Ok(folder),
            Ok(_) => why = io::Error::other("only a part of the hierarchy is visible"),
            Err(error) => why = error,
        }
    }
    Err(why)
}

/// `enum bpf_cmd` and `enum bpf_attach_type` of include/uapi/linux/bpf.h.
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_CGROUP_DEVICE: u32 = 6;

/// The `link_create` of `union bpf_attr`, up to where this link needs it.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    unused: [u64; 6],
}

/// Attaches a device program to a cgroup by a link. aya makes the same link and
/// keeps its descriptor to itself; this one is to be pinned.
pub fn link(program: BorrowedFd<'_>, cgroup: &File) -> io::Result<OwnedFd> {
    let number = |fd: i32| u32::try_from(fd).map_err(io::Error::other);
    let attributes = LinkCreate {
        program: number(program.as_raw_fd())?,
        target: number(cgroup.as_raw_fd())?,
        attach_type: BPF_CGROUP_DEVICE,
        ..LinkCreate::default()
    };
    // SAFETY: the kernel reads as many bytes as it is told there are, all of
    // them initialised, and both descriptors are open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_CREATE,
            &raw const attributes,
            size_of::<LinkCreate>(),
        )
    };
    match i32::try_from(result) {
        // SAFETY: the kernel has just made it for this call.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

const BPF_OBJ_PIN: libc::c_long = 6;

/// The `obj_pin` of `union bpf_attr`.
#[repr(C)]
struct Pin {
    path: u64,
    object: u32,
    flags: u32,
}

/// Pins it.
pub fn pin(link: &OwnedFd, path: &std::path::Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt as _;

    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let attributes = Pin {
        path: path.as_ptr() as u64,
        object: u32::try_from(link.as_raw_fd()).map_err(io::Error::other)?,
        flags: 0,
    };
    // SAFETY: the attributes are initialised whole, and the path they point to
    // lives through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_OBJ_PIN,
            &raw const attributes,
            size_of::<Pin>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

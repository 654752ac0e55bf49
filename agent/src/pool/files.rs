//! The pool's calls on its file system. Each failure names the call and the file.
//!
//! Every open goes through the pool's own folder with `openat2` and neither
//! follows a symbolic link nor leaves the folder, whatever stands in it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, FsType, fstatfs};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::PoolError;
use crate::ids::Bytes;

/// A pool's folder, held open.
#[derive(Debug)]
pub struct Root {
    dir: PathBuf,
    fd: File,
}

impl Root {
    /// Opens the folder; the one path in which symbolic links may stand.
    pub fn open(dir: &Path) -> Result<Self, PoolError> {
        let dir = fs::canonicalize(dir).map_err(PoolError::call("open the pool's folder", dir))?;
        let fd = File::open(&dir).map_err(PoolError::call("open", &dir))?;
        Ok(Self { dir, fd })
    }

    /// The folder's path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path of something in the folder.
    pub fn path(&self, relative: &Path) -> PathBuf {
        self.dir.join(relative)
    }

    /// Opens a file or folder in the pool.
    pub fn file(&self, relative: &Path, flags: OFlag) -> Result<File, PoolError> {
        let mode = if flags.contains(OFlag::O_CREAT) {
            Mode::S_IRUSR | Mode::S_IWUSR
        } else {
            Mode::empty()
        };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let fd: OwnedFd = openat2(&self.fd, relative, how)
            .map_err(io::Error::from)
            .map_err(PoolError::call("open", &self.path(relative)))?;
        Ok(File::from(fd))
    }

    /// Makes a folder; it may be there already, as a real one.
    pub fn folder(&self, relative: &Path) -> Result<(), PoolError> {
        let path = self.path(relative);
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(PoolError::call("mkdir", &path)(error)),
        }
        self.file(relative, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        Ok(())
    }

    /// Makes durable which names a folder holds; the empty path is the pool's own.
    pub fn sync_folder(&self, relative: &Path) -> Result<(), PoolError> {
        let relative = if relative.as_os_str().is_empty() {
            Path::new(".")
        } else {
            relative
        };
        let folder = self.file(relative, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        folder
            .sync_all()
            .map_err(PoolError::call("fsync", &self.path(relative)))
    }

    /// Renames within the pool, and makes that durable in the target's folder.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<(), PoolError> {
        fs::rename(self.path(from), self.path(to))
            .map_err(PoolError::call("rename", &self.path(from)))?;
        self.sync_folder(to.parent().unwrap_or(Path::new("")))
    }

    /// Removes a folder and what is in it; none is fine.
    pub fn remove_folder(&self, relative: &Path) -> Result<(), PoolError> {
        let path = self.path(relative);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(PoolError::call("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Takes a folder out of its place durably, to be removed; none is fine.
    pub fn retire(&self, from: &Path, gone: &Path) -> Result<(), PoolError> {
        self.remove_folder(gone)?;
        match fs::rename(self.path(from), self.path(gone)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(PoolError::call("rename", &self.path(from))(error));
            }
            _ => {}
        }
        self.sync_folder(gone.parent().unwrap_or(Path::new("")))
    }

    /// Has a whole folder appear in its place, durably, and `read` there. What
    /// stands there already and is in no inventory is an attempt that never
    /// answered: it goes by way of `gone`. So does this one after an error.
    pub fn appear<T>(
        &self,
        folder: &Path,
        place: &Path,
        gone: &Path,
        read: impl FnOnce() -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        self.retire(place, gone)?;
        let appeared = self.rename(folder, place).and_then(|()| read());
        if appeared.is_err() {
            let removed = self
                .retire(place, gone)
                .and_then(|()| self.remove_folder(gone))
                .and_then(|()| self.remove_folder(folder));
            if let Err(error) = removed {
                tracing::warn!(%error, "what could not be made stays until it is asked for again");
            }
        }
        appeared
    }

    /// Writes a new file with a value as JSON, durably.
    pub fn write_json<T: Serialize>(&self, relative: &Path, value: &T) -> Result<(), PoolError> {
        let path = self.path(relative);
        let file = self.file(relative, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
        serde_json::to_writer_pretty(&file, value)
            .map_err(io::Error::from)
            .map_err(PoolError::call("write", &path))?;
        file.sync_all().map_err(PoolError::call("fsync", &path))
    }

    /// Reads a value that [`Root::write_json`] wrote.
    pub fn read_json<T: DeserializeOwned>(&self, relative: &Path) -> Result<T, PoolError> {
        let path = self.path(relative);
        let file = self.file(relative, OFlag::O_RDONLY)?;
        let text = io::read_to_string(file).map_err(PoolError::call("read", &path))?;
        serde_json::from_str(&text).map_err(|error| PoolError::Damaged {
            path,
            detail: error.to_string(),
        })
    }

    /// The kind of file system the pool is on.
    pub fn file_system(&self) -> Result<FsType, PoolError> {
        fstatfs(&self.fd)
            .map(|found| found.filesystem_type())
            .map_err(io::Error::from)
            .map_err(PoolError::call("statfs", &self.dir))
    }

    /// The file system's size and what of it is free.
    pub fn room(&self) -> Result<Room, PoolError> {
        let found = nix::sys::statvfs::fstatvfs(&self.fd)
            .map_err(io::Error::from)
            .map_err(PoolError::call("statvfs", &self.dir))?;
        let unit = found.fragment_size();
        Ok(Room {
            total: Bytes(found.blocks().saturating_mul(unit)),
            free: Bytes(found.blocks_available().saturating_mul(unit)),
        })
    }
}

/// The room of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// All of it.
    pub total: Bytes,
    /// What is free.
    pub free: Bytes,
}

/// Refuses file systems that would break a promise of the pool's.
pub fn admit(dir: &Path, kind: FsType) -> Result<(), PoolError> {
    if kind == BTRFS_SUPER_MAGIC {
        return Err(PoolError::Unsuitable {
            dir: dir.to_owned(),
            reason: "btrfs writes O_DIRECT through the page cache on checksummed files, so a write \
                     could land after its fence; use XFS (mkfs.xfs -m reflink=1)",
        });
    }
    Ok(())
}

/// Makes `to` share every block of `from`, at one instant.
pub fn clone_file(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: FICLONE takes a descriptor by value and touches no memory of
    // ours; both descriptors are open for the whole call.
    let result = unsafe { nix::libc::ioctl(to.as_raw_fd(), nix::libc::FICLONE, from.as_raw_fd()) };
    nix::errno::Errno::result(result).map(drop)?;
    Ok(())
}

/// Whether an error of [`clone_file`] says that the file system cannot do it at all.
pub fn cannot_clone(error: &io::Error) -> bool {
    use nix::libc::{EINVAL, ENOSYS, ENOTTY, EOPNOTSUPP};
    matches!(
        error.raw_os_error(),
        Some(EOPNOTSUPP | ENOTTY | EINVAL | ENOSYS)
    )
}

//! Every way into a disk, or into the file system on it, but those of the writers.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail, ensure};
use drover::attach::ports::{Access, Disk};

use crate::writer::BLOCK;

/// A call that must fail.
pub fn refused<T>(what: &str, result: io::Result<T>) -> Result<()> {
    match result {
        Ok(_) => bail!("{what} was let through"),
        Err(error) => {
            println!("  {what}: {error}");
            // What fails since it was called wrongly proves nothing. EROFS: an
            // ext4 whose journal cannot be written makes itself read-only.
            let sound = [
                libc::EIO,
                libc::EPERM,
                libc::ENODEV,
                libc::ENXIO,
                libc::EROFS,
            ];
            ensure!(
                error.raw_os_error().is_some_and(|e| sound.contains(&e)),
                "{what}: {error}"
            );
            Ok(())
        }
    }
}

fn called(result: i64) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// What was opened while the gate was open.
pub struct Before {
    /// The disk, or a file on it.
    pub file: File,
    passthrough: Option<File>,
    folder: Option<PathBuf>,
}

impl Before {
    pub fn open(disk: &Disk, target: &Path, access: &Access) -> Result<Self> {
        let folder = matches!(access, Access::Mount { .. }).then(|| target.to_owned());
        let path = folder
            .as_ref()
            .map_or(target.to_owned(), |f| f.join("held"));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(folder.is_some())
            .truncate(false)
            .open(&path)?;
        if folder.is_some() {
            file.write_all_at(&[7; BLOCK], 0)?;
            file.sync_all()?;
        }
        let generic = disk.name.replacen("nvme", "ng", 1);
        let passthrough = OpenOptions::new()
            .read(true)
            .open(Path::new("/dev").join(generic))
            .ok();
        Ok(Self {
            file,
            passthrough,
            folder,
        })
    }

    /// Every way in but those of the writers.
    pub fn knock(&self, disk: &Disk) -> Result<()> {
        let fd = self.file.as_raw_fd();
        let node = disk.path();
        refused("open read-only", File::open(&node))?;
        refused("open to write", OpenOptions::new().write(true).open(&node))?;
        refused("write", self.file.write_at(&[9; 512], 8192))?;
        refused("read", self.file.read_at(&mut [0; 512], 0))?;
        // SAFETY: the descriptor is open; the call takes numbers only.
        let punched = unsafe { libc::fallocate(fd, 3, 0, 4096) };
        refused("fallocate", called(punched.into()))?;
        // SAFETY: a new mapping, wherever the kernel likes; it is not to come about.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        refused("mmap", called(if map == libc::MAP_FAILED { -1 } else { 0 }))?;
        let mut at = 0;
        let (pipe_out, mut pipe_in) = io::pipe()?;
        let (out, into) = (pipe_out.as_raw_fd(), pipe_in.as_raw_fd());
        let null = std::ptr::null_mut();
        // SAFETY: the descriptors are open, and the offset is an i64.
        let spliced = unsafe { libc::splice(fd, &raw mut at, into, null, 4096, 0) };
        refused("splice from it", called(spliced as i64))?;
        pipe_in.write_all(&[9; 4096])?;
        // SAFETY: as above.
        let spliced = unsafe { libc::splice(out, null, fd, &raw mut at, 4096, 0) };
        refused("splice to it", called(spliced as i64))?;
        match &self.folder {
            None => {
                const BLKZEROOUT: libc::c_ulong = 0x127f;
                let range = [0_u64, 4096];
                // SAFETY: the kernel reads two u64.
                let zeroed = unsafe { libc::ioctl(fd, BLKZEROOUT, &raw const range) };
                refused("ioctl BLKZEROOUT", called(zeroed.into()))?;
            }
            Some(folder) => {
                refused("open a file", File::open(folder.join("held")))?;
                refused("create", File::create(folder.join("new")))?;
                refused("mkdir", fs::create_dir(folder.join("folder")))?;
                refused("unlink", fs::remove_file(folder.join("held")))?;
                refused("rename", fs::rename(folder.join("held"), folder.join("x")))?;
                refused("truncate", self.file.set_len(0))?;
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
                refused("chmod", self.file.set_permissions(mode))?;
                refused("list", fs::read_dir(folder).map(|_| ()))?;
            }
        }
        self.pass_through()?;
        if self.folder.is_some() {
            mounts(&node)?;
        }
        Ok(())
    }

    fn pass_through(&self) -> Result<()> {
        let Some(generic) = &self.passthrough else {
            println!("  passthrough: this kernel has no ng device");
            return Ok(());
        };
        const NVME_IOCTL_ID: libc::c_ulong = 0x4e40;
        // SAFETY: the descriptor is open; the call takes no more.
        let asked = unsafe { libc::ioctl(generic.as_raw_fd(), NVME_IOCTL_ID) };
        refused("passthrough", called(asked.into()))
    }
}

/// One more mount of a file system that is mounted.
fn mounts(node: &Path) -> Result<()> {
    let point = Path::new("/run/initiator/knock");
    fs::create_dir_all(point)?;
    for fs in ["ext4", "xfs"] {
        let mount = Command::new("mount")
            .args(["-t", fs])
            .arg(node)
            .arg(point)
            .output()?;
        let said = String::from_utf8_lossy(&mount.stderr);
        ensure!(!mount.status.success(), "mounted as {fs}");
        println!("  mount as {fs}: {}", said.trim());
    }
    Ok(())
}

//! Pools for tests: on a plain folder, and on real XFS and ext4 over a loop
//! device (those need root).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use super::device::{Backing, OpenBacking};
use super::{Pool, PoolConfig, PoolError};
use crate::block::{BLOCK, BlockDevice, DeviceError};
use crate::ids::{Bytes, Lba, NodeId};

pub const MIB: u64 = 1 << 20;

pub fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

/// Limits under which small file systems hold small volumes.
pub fn config() -> PoolConfig {
    PoolConfig {
        lock_wait: Duration::ZERO,
        low_water: Bytes(MIB),
        overcommit_percent: 200,
        require_reflink: false,
    }
}

/// Opens the pool in `dir` as node `a`.
/// Opens a pool. A lock that was just given up may live on for a moment in a
/// child that another test forked meanwhile, until it executes its program.
pub fn open(dir: &Path) -> Result<Arc<Pool>, PoolError> {
    for _ in 0..50 {
        match Pool::open(dir, &node("a"), config()) {
            Err(PoolError::Held { .. }) => std::thread::sleep(Duration::from_millis(10)),
            other => return other,
        }
    }
    Pool::open(dir, &node("a"), config())
}

/// A file system on which every write waits until this is dropped.
pub struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        run(Command::new("fsfreeze").arg("-u").arg(&self.0));
    }
}

/// A file system of its own on a loop device, gone when dropped. Needs root.
pub struct Mounted {
    folder: tempfile::TempDir,
}

impl Mounted {
    pub fn xfs() -> Self {
        Self::xfs_in(&std::env::temp_dir())
    }

    /// With its image in a folder of the caller's, which must be on a disk.
    pub fn xfs_in(folder: &Path) -> Self {
        Self::new(folder, &["mkfs.xfs", "-q", "-m", "reflink=1"], 300)
    }

    pub fn ext4() -> Self {
        let folder = std::env::temp_dir();
        Self::new(&folder, &["mkfs.ext4", "-q", "-F"], 512)
    }

    fn new(folder: &Path, mkfs: &[&str], mib: u64) -> Self {
        let folder = tempfile::tempdir_in(folder).unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(mib * MIB).unwrap();
        std::fs::create_dir(folder.path().join("mnt")).unwrap();
        let made = Self { folder };
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image));
        made.mount();
        made
    }

    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("mnt")
    }

    /// The pool's folder in it.
    pub fn pool(&self) -> PathBuf {
        self.dir().join("pool")
    }

    /// Shuts the XFS down without its log: every call fails from now on.
    pub fn fail(&self) {
        let shutdown = ["-x", "-c", "shutdown"];
        run(Command::new("xfs_io").args(shutdown).arg(self.dir()));
    }

    /// Mounts it anew, as after a power loss. Nothing may be open on it.
    pub fn mend(&self) {
        run(Command::new("umount").arg(self.dir()));
        self.mount();
    }

    fn mount(&self) {
        let image = self.folder.path().join("image");
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(image)
            .arg(self.dir()));
    }

    /// Reads and writes that its block device has in hand.
    pub fn in_flight(&self) -> u32 {
        let mut findmnt = Command::new("findmnt");
        findmnt.args(["-n", "-o", "SOURCE"]).arg(self.dir());
        let said = String::from_utf8(findmnt.output().unwrap().stdout).unwrap();
        let name = said.trim().strip_prefix("/dev/").unwrap();
        let counts = std::fs::read_to_string(format!("/sys/block/{name}/inflight")).unwrap();
        counts
            .split_whitespace()
            .map(|count| count.parse::<u32>().unwrap())
            .sum()
    }

    /// Makes every write to it wait until what is returned is dropped.
    pub fn freeze(&self) -> Frozen {
        run(Command::new("fsfreeze").arg("-f").arg(self.dir()));
        Frozen(self.dir())
    }

    /// Takes every free block.
    pub fn fill(&self) -> File {
        let file = File::create(self.dir().join("filling")).unwrap();
        let (mut length, mut piece) = (0, 256 * MIB as i64);
        while piece >= 4096 {
            match nix::fcntl::posix_fallocate(&file, length, piece) {
                Ok(()) => length += piece,
                Err(Errno::ENOSPC) => piece /= 2,
                Err(error) => panic!("fallocate {piece} at {length}: {error}"),
            }
        }
        file
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The loop device goes with its mount. Busy (a test failed with a file
        // open): detach lazily, so that it goes with that file.
        for how in [&[][..], &["-l"][..]] {
            let done = Command::new("umount").args(how).arg(self.dir()).output();
            if done.is_ok_and(|done| done.status.success()) {
                return;
            }
        }
    }
}

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(
        done.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

/// A device over an open file, by plain calls.
pub struct PlainFile {
    file: File,
    size: AtomicU64,
}

/// Opens [`PlainFile`]s.
pub fn plain() -> OpenBacking {
    Arc::new(|file, _path, size| {
        let size = AtomicU64::new(size.0);
        Ok(Arc::new(PlainFile { file, size }) as Arc<dyn Backing>)
    })
}

impl Backing for PlainFile {
    fn grow(&self, size: Bytes) {
        self.size.fetch_max(size.0, Ordering::AcqRel);
    }
}

fn io(call: &str) -> impl FnOnce(std::io::Error) -> DeviceError {
    move |error| DeviceError::Io {
        call: call.to_owned(),
        errno: Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)),
    }
}

impl BlockDevice for PlainFile {
    fn size(&self) -> Bytes {
        Bytes(self.size.load(Ordering::Acquire))
    }
    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.file
            .read_exact_at(buffer, lba.0 * BLOCK)
            .map_err(io("read"))
    }
    fn write(&self, lba: Lba, data: &[u8], _fua: bool) -> Result<(), DeviceError> {
        self.file
            .write_all_at(data, lba.0 * BLOCK)
            .map_err(io("write"))
    }
    fn flush(&self) -> Result<(), DeviceError> {
        self.file.sync_data().map_err(io("fdatasync"))
    }
    fn write_zeroes(&self, lba: Lba, blocks: u64, _unmap: bool) -> Result<(), DeviceError> {
        let zeroes = vec![0; (blocks * BLOCK) as usize];
        self.write(lba, &zeroes, false)
    }
    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.write_zeroes(lba, blocks, true)
    }
}

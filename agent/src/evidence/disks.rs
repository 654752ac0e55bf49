//! The disks of this node as sysfs shows them: partitions, and what the
//! kernel itself has stacked on them.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::mounts::{self, mkdev, parse_dev};
use crate::attach::ports::Disk;
use crate::ids::Diskseq;

/// A whole disk or a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The kernel's name.
    pub name: String,
    /// Its number as the kernel keeps it.
    pub dev: u32,
    /// Its folder in sysfs.
    pub folder: PathBuf,
}

/// A disk and its partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Devices {
    /// The whole disk.
    pub whole: Device,
    /// Its partitions.
    pub parts: Vec<Device>,
}

/// Something in the kernel that uses a disk without a process or a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stacked {
    /// What it is, for a person.
    pub name: String,
    /// Whether it could write.
    pub writable: bool,
}

const SYS_BLOCK: &str = "/sys/block";

impl Devices {
    /// Looks a disk up. None: there is no disk of this name and sequence number.
    pub fn of(disk: &Disk) -> io::Result<Option<Self>> {
        // An unreadable /sys must not look like a disk that is gone.
        fs::read_dir(SYS_BLOCK)?;
        let folder = Path::new(SYS_BLOCK).join(&disk.name);
        match fs::read_to_string(folder.join("diskseq")) {
            Ok(text) if text.trim().parse() == Ok(disk.diskseq.0) => {}
            Ok(_) => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        }
        let whole = device(folder.clone())?;
        let mut parts = Vec::new();
        for entry in fs::read_dir(&folder)? {
            let folder = entry?.path();
            if folder.join("partition").exists() {
                parts.push(device(folder)?);
            }
        }
        Ok(Some(Self { whole, parts }))
    }

    /// The whole disk, then the partitions.
    pub fn all(&self) -> impl Iterator<Item = &Device> {
        std::iter::once(&self.whole).chain(&self.parts)
    }

    /// Whether the device node or name `path` is one of these. Only paths in
    /// /dev are looked at: others may lie on a file system that hangs.
    fn is_at(&self, path: &str) -> bool {
        if !path.starts_with("/dev/") {
            return false;
        }
        let dev = fs::metadata(path)
            .ok()
            .filter(|meta| meta.file_type().is_block_device())
            .map(|meta| dev_of(meta.rdev()));
        self.all().any(|device| {
            Some(device.dev) == dev || path.strip_prefix("/dev/") == Some(&device.name)
        })
    }

    /// Whether `mount` is of a file system on one of these.
    pub fn mounted_by(&self, mount: &mounts::Mount) -> Option<u32> {
        if let Some(device) = self.all().find(|device| device.dev == mount.dev) {
            return Some(device.dev);
        }
        // btrfs and the like have a device number of their own.
        let unnamed = mount.dev >> 20 == 0;
        (unnamed && self.is_at(&mount.source)).then(|| {
            let named = |d: &&Device| mount.source.strip_prefix("/dev/") == Some(&d.name);
            self.all().find(named).map_or(self.whole.dev, |d| d.dev)
        })
    }

    /// Loop devices, device mapper, md, and swap on these devices or on a file
    /// below one of `points`, where their file systems are mounted.
    pub fn stacked(&self, points: &[&Path]) -> io::Result<Vec<Stacked>> {
        let on = |path: &str| {
            self.is_at(path)
                || points
                    .iter()
                    .any(|point| Path::new(path).starts_with(point))
        };
        let mut found = Vec::new();
        for device in self.all() {
            for entry in fs::read_dir(device.folder.join("holders"))? {
                found.push(Stacked {
                    name: entry?.file_name().to_string_lossy().into_owned(),
                    writable: true,
                });
            }
        }
        for entry in fs::read_dir(SYS_BLOCK)? {
            let folder = entry?.path();
            // Only a bound loop device has this file; it may go meanwhile.
            let Ok(file) = fs::read_to_string(folder.join("loop/backing_file")) else {
                continue;
            };
            let file = file.trim_end_matches('\n');
            if on(file) {
                let name = folder.file_name().unwrap_or_default().to_string_lossy();
                let read_only =
                    fs::read_to_string(folder.join("ro")).is_ok_and(|t| t.trim() == "1");
                found.push(Stacked {
                    name: format!("{name} over {file}"),
                    writable: !read_only,
                });
            }
        }
        let swaps = match fs::read_to_string("/proc/swaps") {
            Ok(text) => text,
            // A kernel without swap.
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e),
        };
        for line in swaps.lines().skip(1) {
            let path = mounts::unescape(line.split_whitespace().next().unwrap_or_default());
            if on(&path) {
                found.push(Stacked {
                    name: format!("swap on {path}"),
                    writable: true,
                });
            }
        }
        Ok(found)
    }
}

fn device(folder: PathBuf) -> io::Result<Device> {
    let text = fs::read_to_string(folder.join("dev"))?;
    let dev = parse_dev(&text)
        .ok_or_else(|| io::Error::other(format!("{text:?} is no device number")))?;
    let name = folder.file_name().unwrap_or_default();
    Ok(Device {
        name: name.to_string_lossy().into_owned(),
        dev,
        folder,
    })
}

/// The kernel's own number from stat(2)'s.
fn dev_of(rdev: u64) -> u32 {
    let part = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    mkdev(
        part(nix::sys::stat::major(rdev)),
        part(nix::sys::stat::minor(rdev)),
    )
}

/// Where a disk's times are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timed {
    /// At its own requests.
    Requests,
    /// At the requests of its paths: it is a multipath device.
    Paths,
    /// Nowhere: it passes bios on and has no requests, as device mapper does.
    /// The disks below it are timed.
    NoRequests,
}

impl Timed {
    /// As metrics write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Paths => "paths",
            Self::NoRequests => "none-bio-based",
        }
    }
}

/// I/O that a disk has not answered yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InFlight {
    /// Reads.
    pub reads: u64,
    /// Writes, flushes and discards.
    pub writes: u64,
}

/// What the kernel keeps of a disk's queue.
///
/// Nothing in the disk's folder `queue` is read: those files wait for a lock
/// that is held while the queue is frozen (queue_attr_show in block/blk-sysfs.c),
/// on a dead disk for ever. `inflight` waits for none (part_inflight_show in
/// block/genhd.c). Where the queue's `iostats` are off it tells 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// By the kernel's own count.
    pub in_flight: InFlight,
    /// Where times are taken.
    pub timed: Timed,
}

impl Queue {
    /// Of the disk of this name; none: it has just gone.
    pub fn of(name: &str) -> Option<Self> {
        Self::at(&Path::new(SYS_BLOCK).join(name))
    }

    fn at(folder: &Path) -> Option<Self> {
        let text = fs::read_to_string(folder.join("inflight")).ok()?;
        let mut counts = text.split_whitespace().map_while(|n| n.parse().ok());
        let (reads, writes) = (counts.next()?, counts.next()?);
        let timed = match (folder.join("mq").exists(), is_head(folder)) {
            (true, _) => Timed::Requests,
            (false, true) => Timed::Paths,
            (false, false) => Timed::NoRequests,
        };
        Some(Self {
            in_flight: InFlight { reads, writes },
            timed,
        })
    }
}

/// Whether this is a native NVMe multipath device: it belongs to a subsystem,
/// not to a controller.
fn is_head(folder: &Path) -> bool {
    let link = fs::read_link(folder).unwrap_or_default();
    link.iter().any(|part| part == "nvme-subsystem")
}

/// Every disk of the node.
#[derive(Debug, Clone, Default)]
pub struct Names {
    by_seq: HashMap<u64, String>,
    /// From a hidden path of a multipath device to the device.
    heads: HashMap<u64, u64>,
    newest: u64,
}

impl Names {
    /// Reads them all.
    pub fn read() -> io::Result<Self> {
        let mut by_seq = HashMap::new();
        for entry in fs::read_dir(SYS_BLOCK)? {
            let folder = entry?.path();
            // A disk may go while it is being looked at.
            let Ok(text) = fs::read_to_string(folder.join("diskseq")) else {
                continue;
            };
            if let (Ok(seq), Some(name)) = (text.trim().parse(), folder.file_name()) {
                by_seq.insert(seq, name.to_string_lossy().into_owned());
            }
        }
        Ok(Self::new(by_seq))
    }

    fn new(by_seq: HashMap<u64, String>) -> Self {
        let seqs: HashMap<&str, u64> = by_seq.iter().map(|(s, n)| (n.as_str(), *s)).collect();
        let heads = by_seq.iter().filter_map(|(seq, name)| {
            let head = head_of(name)?;
            Some((*seq, *seqs.get(head.as_str())?))
        });
        Self {
            heads: heads.collect(),
            newest: by_seq.keys().copied().max().unwrap_or(0),
            by_seq,
        }
    }

    /// The disk that stands for this one: a multipath device for its paths.
    pub fn fold(&self, seq: u64) -> u64 {
        self.heads.get(&seq).copied().unwrap_or(seq)
    }

    /// The name of a disk.
    pub fn name(&self, seq: Diskseq) -> Option<&str> {
        self.by_seq.get(&seq.0).map(String::as_str)
    }

    /// Whether the disk has gone. A number above all others may be of a disk
    /// that is just being added.
    pub fn gone(&self, seq: u64) -> bool {
        seq < self.newest && !self.by_seq.contains_key(&seq)
    }
}

/// `nvme0n1` for `nvme0c3n1`: hidden disks of native NVMe multipath
/// (drivers/nvme/host/core.c, nvme_alloc_ns).
fn head_of(name: &str) -> Option<String> {
    let rest = name.strip_prefix("nvme")?;
    let (subsystem, rest) = rest.split_once('c')?;
    let (controller, namespace) = rest.split_once('n')?;
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    [subsystem, controller, namespace]
        .into_iter()
        .all(number)
        .then(|| format!("nvme{subsystem}n{namespace}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hidden_path_stands_for_its_head() {
        assert_eq!(head_of("nvme0c3n12").as_deref(), Some("nvme0n12"));
        for name in ["nvme0n1", "nvmec1n1", "nvme0c1", "loop0", "nvme0c1n1p1"] {
            assert_eq!(head_of(name), None, "{name}");
        }
        let names = Names::new(HashMap::from([
            (7, "nvme0n1".to_owned()),
            (8, "nvme0c0n1".to_owned()),
        ]));
        assert_eq!((names.fold(8), names.fold(7), names.fold(3)), (7, 7, 3));
    }

    #[test]
    fn only_a_number_below_the_newest_can_have_gone() {
        let names = Names::new(HashMap::from([(7, "sda".to_owned())]));
        assert!(names.gone(6) && !names.gone(7) && !names.gone(8));
        assert_eq!(names.name(Diskseq(7)), Some("sda"));
    }

    #[test]
    fn where_a_disk_is_timed_follows_from_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("x");
        let put = |name: &str, text: &str| {
            let path = disk.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(Queue::at(&disk), None);
        put("inflight", "       2        3\n");
        let in_flight = InFlight {
            reads: 2,
            writes: 3,
        };
        let timed = |timed| Some(Queue { in_flight, timed });
        assert_eq!(Queue::at(&disk), timed(Timed::NoRequests));
        let head = folder.path().join("nvme0n1");
        let real = folder
            .path()
            .join("virtual/nvme-subsystem/nvme-subsys0/nvme0n1");
        fs::create_dir_all(real.parent().unwrap()).unwrap();
        fs::rename(&disk, &real).unwrap();
        std::os::unix::fs::symlink(&real, &head).unwrap();
        assert_eq!(Queue::at(&head), timed(Timed::Paths));
        fs::rename(&real, &disk).unwrap();
        fs::create_dir(disk.join("mq")).unwrap();
        assert_eq!(Queue::at(&disk), timed(Timed::Requests));
        put("inflight", "no numbers\n");
        assert_eq!(Queue::at(&disk), None);
    }

    #[test]
    fn a_disk_of_another_number_is_not_there() {
        let disk = Disk {
            name: "no-such-disk".to_owned(),
            diskseq: Diskseq(1),
        };
        assert_eq!(Devices::of(&disk).unwrap(), None);
    }
}

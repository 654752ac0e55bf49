//! Under which numbers a disk can be reached, as sysfs shows it.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use drover_ebpf::gate::Node;

use super::GateError;
use crate::attach::ports::Disk;

/// All that leads to one disk.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Device numbers: of the disk, its partitions, and the character devices
    /// that pass commands through to it.
    pub nodes: Vec<Node>,
    /// Sequence numbers of the hidden disks below a multipath head. What the
    /// head holds back is sent to them again.
    pub paths: Vec<u64>,
}

fn failed(path: &Path, error: io::Error) -> GateError {
    GateError::Read {
        path: path.to_owned(),
        error,
    }
}

/// None where what was looked for has gone. Whatever else fails (no memory, no
/// descriptor) says nothing of what is there, and is an error.
fn unless_gone<T>(path: &Path, result: io::Result<T>) -> Result<Option<T>, GateError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(e)
            if matches!(
                e.raw_os_error(),
                // ENOTDIR: below an attribute, where a folder was looked for.
                Some(libc::ENOENT | libc::ENOTDIR | libc::ENODEV | libc::ENXIO)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(failed(path, error)),
    }
}

/// The names in a folder.
fn list(folder: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// The same; one that is not there, or goes meanwhile, has none.
fn names(folder: &Path) -> Result<Vec<String>, GateError> {
    Ok(unless_gone(folder, list(folder))?.unwrap_or_default())
}

/// What a file says; none where it has gone.
fn value<T>(path: &Path, parse: impl Fn(&str) -> Option<T>) -> Result<Option<T>, GateError> {
    let Some(text) = unless_gone(path, fs::read_to_string(path))? else {
        return Ok(None);
    };
    match parse(&text) {
        Some(value) => Ok(Some(value)),
        None => Err(failed(path, io::ErrorKind::InvalidData.into())),
    }
}

fn number(path: &Path) -> Result<Option<u64>, GateError> {
    value(path, |text| text.trim().parse().ok())
}

/// `MAJOR:MINOR`, as the kernel keeps it: 12 and 20 bits.
fn device(folder: &Path) -> Result<Option<u32>, GateError> {
    value(&folder.join("dev"), parse)
}

fn parse(text: &str) -> Option<u32> {
    let (major, minor) = text.trim().split_once(':')?;
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    (major < 1 << 12 && minor < 1 << 20).then_some(major << 20 | minor)
}

/// Of `nvme0n1`: `ng0n1`, and what its hidden disks' names begin and end with
/// (drivers/nvme/host/core.c, nvme_alloc_ns and nvme_add_ns_cdev).
fn nvme(disk: &str) -> Option<(String, String, String)> {
    let rest = disk.strip_prefix("nvme")?;
    let (subsystem, namespace) = rest.split_once('n')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (digits(subsystem) && digits(namespace)).then(|| {
        (
            format!("ng{rest}"),
            format!("nvme{subsystem}c"),
            format!("n{namespace}"),
        )
    })
}

impl Numbers {
    /// Looks them up; nothing where the disk has gone.
    pub fn of(sys: &Path, disk: &Disk) -> Result<Self, GateError> {
        let blocks = sys.join("block");
        let folder = blocks.join(&disk.name);
        let is_it = || {
            let found = number(&folder.join("diskseq"))?;
            Ok::<_, GateError>(found == Some(disk.diskseq.0))
        };
        if !is_it()? {
            return Ok(Self::default());
        }
        let mut found = Self::default();
        let mut lead = |kind, folder: PathBuf| {
            let dev = device(&folder)?;
            found.nodes.extend(dev.map(|dev| Node { kind, dev }));
            Ok::<_, GateError>(())
        };
        lead(Node::BLOCK, folder.clone())?;
        for name in names(&folder)? {
            let part = folder.join(name);
            let mark = part.join("partition");
            if unless_gone(&mark, mark.try_exists())? == Some(true) {
                lead(Node::BLOCK, part)?;
            }
        }
        for class in ["scsi_generic", "bsg"] {
            let class = folder.join("device").join(class);
            for name in names(&class)? {
                lead(Node::CHARACTER, class.join(name))?;
            }
        }
        if let Some((generic, begin, end)) = nvme(&disk.name) {
            lead(
                Node::CHARACTER,
                sys.join("class/nvme-generic").join(generic),
            )?;
            for name in list(&blocks).map_err(|e| failed(&blocks, e))? {
                let between = name
                    .strip_prefix(&begin)
                    .and_then(|rest| rest.strip_suffix(&end));
                if between.is_some_and(|c| !c.is_empty() && c.bytes().all(|b| b.is_ascii_digit())) {
                    let path = blocks.join(&name).join("diskseq");
                    found.paths.extend(number(&path)?);
                }
            }
        }
        // Read under a name; the name must still be this disk's.
        Ok(if is_it()? { found } else { Self::default() })
    }
}

/// The sequence number of every disk that is there.
pub fn disks(sys: &Path) -> Result<HashSet<u64>, GateError> {
    let blocks = sys.join("block");
    let mut found = HashSet::new();
    for name in list(&blocks).map_err(|e| failed(&blocks, e))? {
        found.extend(number(&blocks.join(name).join("diskseq"))?);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Diskseq;

    #[test]
    fn names_of_nvme_disks_are_taken_apart() {
        let parts = nvme("nvme0n12").unwrap();
        assert_eq!(parts, ("ng0n12".into(), "nvme0c".into(), "n12".into()));
        for other in ["nvme0c0n1", "nvme0", "nvme0n", "sda", "nvmen1"] {
            assert_eq!(nvme(other), None, "{other}");
        }
    }

    #[test]
    fn numbers_are_as_the_kernel_keeps_them() {
        assert_eq!(parse("259:3\n"), Some(259 << 20 | 3));
        for wrong in ["", "259", "4096:0", "0:1048576", "a:b", "-1:0"] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn all_that_leads_to_a_disk_is_found_and_nothing_of_another() {
        let sys = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("block/nvme0n1/diskseq", "7\n");
        put("block/nvme0n1/dev", "259:1\n");
        put("block/nvme0n1/nvme0n1p1/dev", "259:2\n");
        put("block/nvme0n1/nvme0n1p1/partition", "1\n");
        put("block/nvme0n1/queue/dev", "1:1\n");
        put("block/nvme0c3n1/diskseq", "8\n");
        put("block/nvme0c3n11/diskseq", "9\n");
        put("block/nvme1c3n1/diskseq", "10\n");
        put("class/nvme-generic/ng0n1/dev", "240:5\n");
        let disk = |diskseq| Disk {
            name: "nvme0n1".to_owned(),
            diskseq: Diskseq(diskseq),
        };
        let found = Numbers::of(sys.path(), &disk(7)).unwrap();
        let node = |kind, major: u32, minor: u32| Node {
            kind,
            dev: major << 20 | minor,
        };
        assert_eq!(
            found.nodes,
            [
                node(Node::BLOCK, 259, 1),
                node(Node::BLOCK, 259, 2),
                node(Node::CHARACTER, 240, 5)
            ]
        );
        assert_eq!(found.paths, [8]);
        assert_eq!(
            Numbers::of(sys.path(), &disk(6)).unwrap(),
            Numbers::default()
        );
        assert_eq!(disks(sys.path()).unwrap(), HashSet::from([7, 8, 9, 10]));
    }

    #[test]
    fn a_disk_that_cannot_be_read_has_not_gone() {
        let sys = tempfile::tempdir().unwrap();
        let blocks = sys.path().join("block");
        fs::create_dir_all(blocks.join("sda")).unwrap();
        fs::write(blocks.join("sda/diskseq"), "7\n").unwrap();
        // One that goes while it is looked at.
        fs::create_dir(blocks.join("sdb")).unwrap();
        assert_eq!(disks(sys.path()).unwrap(), HashSet::from([7]));
        // EISDIR stands for all that is no answer.
        fs::create_dir(blocks.join("sdb/diskseq")).unwrap();
        let error = disks(sys.path()).unwrap_err();
        assert!(error.to_string().contains("sdb/diskseq"), "{error}");
        let disk = Disk {
            name: "sdb".to_owned(),
            diskseq: Diskseq(8),
        };
        Numbers::of(sys.path(), &disk).unwrap_err();
        fs::remove_dir(blocks.join("sdb/diskseq")).unwrap();
        fs::write(blocks.join("sdb/diskseq"), "").unwrap();
        disks(sys.path()).unwrap_err();
        disks(&sys.path().join("nowhere")).unwrap_err();
    }
}

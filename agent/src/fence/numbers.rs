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

/// The names in a folder; one that is not there, or goes meanwhile, has none.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// `MAJOR:MINOR`, as the kernel keeps it: 12 and 20 bits.
fn device(folder: &Path) -> Option<u32> {
    let text = fs::read_to_string(folder.join("dev")).ok()?;
    parse(&text)
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
        let is_it = || number(&folder.join("diskseq")) == Some(disk.diskseq.0);
        if !is_it() {
            return Ok(Self::default());
        }
        let mut found = Self::default();
        let mut lead = |kind, folder: PathBuf| {
            if let Some(dev) = device(&folder) {
                found.nodes.push(Node { kind, dev });
            }
        };
        lead(Node::BLOCK, folder.clone());
        for name in names(&folder) {
            let part = folder.join(name);
            if part.join("partition").exists() {
                lead(Node::BLOCK, part);
            }
        }
        for class in ["scsi_generic", "bsg"] {
            let class = folder.join("device").join(class);
            for name in names(&class) {
                lead(Node::CHARACTER, class.join(name));
            }
        }
        if let Some((generic, begin, end)) = nvme(&disk.name) {
            lead(
                Node::CHARACTER,
                sys.join("class/nvme-generic").join(generic),
            );
            let list = fs::read_dir(&blocks).map_err(|e| failed(&blocks, e))?;
            for entry in list.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let between = name
                    .strip_prefix(&begin)
                    .and_then(|rest| rest.strip_suffix(&end));
                if between.is_some_and(|c| !c.is_empty() && c.bytes().all(|b| b.is_ascii_digit())) {
                    found.paths.extend(number(&entry.path().join("diskseq")));
                }
            }
        }
        // Read under a name; the name must still be this disk's.
        Ok(if is_it() { found } else { Self::default() })
    }
}

/// The sequence number of every disk that is there.
pub fn disks(sys: &Path) -> Result<HashSet<u64>, GateError> {
    let blocks = sys.join("block");
    let list = fs::read_dir(&blocks).map_err(|e| failed(&blocks, e))?;
    Ok(list
        .flatten()
        .filter_map(|entry| number(&entry.path().join("diskseq")))
        .collect())
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
}

//! What sysfs says of objects that may go while they are read.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use uuid::Uuid;

use super::fabric::{DevNumber, Device};
use crate::attach::ports::{Disk, NodeError};
use crate::ids::{Bytes, Diskseq};

/// Where the kernel's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// sysfs.
    pub sys: PathBuf,
    /// devtmpfs.
    pub dev: PathBuf,
    /// procfs.
    pub proc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            dev: "/dev".into(),
            proc: "/proc".into(),
        }
    }
}

/// A disk, whose identity its protocol tells; none: it is on its way in or out.
pub(super) fn device(
    roots: &Roots,
    disk: &str,
    unit: Option<Uuid>,
) -> Result<Option<Device>, NodeError> {
    let folder = roots.sys.join("block").join(disk);
    let get = |attribute: &str| read(&folder.join(attribute));
    let number = |text: Option<String>| text.and_then(|text| text.parse::<u64>().ok());
    let (Some(dev), Some(diskseq), Some(sectors)) = (
        get("dev")?.and_then(|text| text.parse::<DevNumber>().ok()),
        number(get("diskseq")?),
        number(get("size")?),
    ) else {
        return Ok(None);
    };
    if !roots.dev.join(disk).exists() {
        return Ok(None);
    }
    Ok(Some(Device {
        disk: Disk {
            name: disk.to_owned(),
            diskseq: Diskseq(diskseq),
        },
        number: dev,
        // sysfs counts 512-byte sectors whatever the block size.
        size: Bytes(sectors.saturating_mul(512)),
        unit,
        read_only: get("ro")?.as_deref() == Some("1"),
    }))
}

/// Whether a text is a number as the kernel counts objects.
pub(super) fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn vanished(error: &io::Error) -> bool {
    // What a reader meets while the kernel takes an object away.
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO | Errno::ENOTDIR)
    )
}

/// An attribute's text; none: there is no such object (any more).
pub(super) fn read(path: &Path) -> Result<Option<String>, NodeError> {
    let bytes = read_bytes(path)?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()))
}

/// An attribute's bytes; none: there is no such object (any more).
pub(super) fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>, NodeError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if vanished(&e) => Ok(None),
        Err(e) => Err(NodeError::Failed(format!("read {}: {e}", path.display()))),
    }
}

/// The names in a folder; a folder that is not there has none.
pub(super) fn names(folder: &Path) -> Result<Vec<String>, NodeError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if vanished(&e) => return Ok(Vec::new()),
        Err(e) => {
            return Err(NodeError::Failed(format!("list {}: {e}", folder.display())));
        }
    };
    entries
        .map(|entry| match entry {
            Ok(entry) => Ok(entry.file_name().to_string_lossy().into_owned()),
            Err(e) => Err(NodeError::Failed(format!("list {}: {e}", folder.display()))),
        })
        .collect()
}

//! `/proc/self/mountinfo`, and what its lines mean for a path.
//!
//! Reading it waits for no device. A line tells the device number of the super
//! block, which names the disk for sure; the source's name may be used again.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::fabric::{DevNumber, Device};
use crate::attach::ports::{FsType, NodeError};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// The super block's device number.
    pub number: DevNumber,
    /// The path within the file system that is seen at the mount point.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// Whether this mount refuses writes.
    pub read_only: bool,
    /// Its file system's name.
    pub fs: String,
}

impl Mount {
    /// Whether it is the device node of `device`, bound to a file.
    pub(super) fn is_node_of(&self, device: &Device) -> bool {
        self.fs == "devtmpfs" && self.root == Path::new("/").join(&device.disk.name)
    }

    /// Whether it is the device node of a disk that has gone.
    pub(super) fn is_dead_node(&self) -> bool {
        // What the kernel appends to the path of a removed file.
        self.fs == "devtmpfs" && self.root.to_string_lossy().ends_with("//deleted")
    }

    /// Whether it shows `device`: a file system on it or its node.
    pub(super) fn shows(&self, device: &Device) -> bool {
        self.number == device.number || self.is_node_of(device)
    }

    /// Whether its file system is of this type.
    pub(super) fn is(&self, fs: FsType) -> bool {
        self.fs == name_of(fs)
    }
}

/// The kernel's name of a file system.
pub(super) fn name_of(fs: FsType) -> &'static str {
    match fs {
        FsType::Ext4 => "ext4",
        FsType::Xfs => "xfs",
    }
}

/// Every mount that this process sees, in the kernel's order.
pub(super) fn mounts() -> Result<Vec<Mount>, NodeError> {
    const PATH: &str = "/proc/self/mountinfo";
    let text = std::fs::read(PATH).map_err(|e| NodeError::Failed(format!("read {PATH}: {e}")))?;
    parse(&text).map_err(|line| {
        NodeError::Failed(format!(
            "{PATH} has a line that proc(5) does not describe: {line:?}"
        ))
    })
}

/// The mount on top at `point`, exactly there.
pub(super) fn at<'a>(mounts: &'a [Mount], point: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.point == point)
}

/// Parses mountinfo; a line that cannot be one is the error.
pub(super) fn parse(text: &[u8]) -> Result<Vec<Mount>, String> {
    text.split(|&b| b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| one(line).ok_or_else(|| String::from_utf8_lossy(line).into_owned()))
        .collect()
}

/// `ID PARENT MAJ:MIN ROOT POINT OPTIONS [TAG…] - FS SOURCE SUPER_OPTIONS`, proc(5).
fn one(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let _id: u64 = text(fields.next()?)?.parse().ok()?;
    let _parent: u64 = text(fields.next()?)?.parse().ok()?;
    let number = text(fields.next()?)?.parse().ok()?;
    let root = path(fields.next()?);
    let point = path(fields.next()?);
    let options = fields.next()?;
    // Any number of tags, then a field that is a single hyphen.
    fields.find(|field| *field == b"-")?;
    let fs = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    Some(Mount {
        number,
        root,
        point,
        read_only: options.split(|&b| b == b',').any(|o| o == b"ro"),
        fs,
    })
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

fn path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(field)).into()
}

/// The kernel writes space, tab, newline, backslash and # as `\` and three
/// octal digits (fs/seq_file.c, `mangle_path`).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = |b: &u8| (b'0'..=b'7').contains(b);
        if first == b'\\' && tail.len() >= 3 && tail[0] <= b'3' && tail[..3].iter().all(octal) {
            out.push((tail[0] - b'0') << 6 | (tail[1] - b'0') << 3 | (tail[2] - b'0'));
            rest = &tail[3..];
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
#[path = "mountinfo_tests.rs"]
mod tests;

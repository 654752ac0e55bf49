//! What is mounted, in every mount namespace that a task lives in.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// One line of a mountinfo file (proc(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The superblock's device as the kernel numbers it.
    pub dev: u32,
    /// Where it is mounted, in its own namespace.
    pub point: PathBuf,
    /// The peer group it is in: what is done to one of it is done to all.
    pub shared: Option<u32>,
    /// The peer group it receives from, and sends nothing to.
    pub master: Option<u32>,
    /// The file system's type.
    pub fs: String,
    /// The device or name it was mounted from.
    pub source: String,
    /// The superblock's options.
    pub super_options: String,
}

impl Mount {
    /// Whether the file system itself may be written to, whatever this mount allows.
    pub fn writable(&self) -> bool {
        self.super_options.split(',').any(|option| option == "rw")
    }
}

/// A mount and the namespace it was seen in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The mount.
    pub mount: Mount,
    /// Whether that is the agent's own namespace.
    pub own_namespace: bool,
    /// A process that lives in the namespace.
    pub pid: u32,
}

/// The kernel's number of a device (`MKDEV` in include/linux/kdev_t.h).
pub fn mkdev(major: u32, minor: u32) -> u32 {
    major << 20 | minor & 0xf_ffff
}

/// Reads `MAJOR:MINOR`.
pub fn parse_dev(text: &str) -> Option<u32> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(mkdev(major.parse().ok()?, minor.parse().ok()?))
}

/// Reads a mountinfo file; lines it cannot read are left out, which can only
/// leave an opener unexplained.
pub fn parse(text: &str) -> impl Iterator<Item = Mount> + '_ {
    text.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let dev = parse_dev(left.next()?)?;
        let point = unescape(left.nth(1)?);
        let fields: Vec<_> = left.skip(1).collect();
        let group = |kind| {
            let mut groups = fields.iter().filter_map(|field| field.strip_prefix(kind));
            groups.next()?.parse().ok()
        };
        let mut right = right.splitn(3, ' ');
        Some(Mount {
            dev,
            point: point.into(),
            shared: group("shared:"),
            master: group("master:"),
            fs: right.next()?.to_owned(),
            source: unescape(right.next()?),
            super_options: right.next()?.to_owned(),
        })
    })
}

/// Undoes the octal escapes of space, tab, newline and backslash.
pub fn unescape(text: &str) -> String {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[3..];
            }
            None => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// The numeric names in a folder of /proc.
pub fn numbers(folder: &Path) -> impl Iterator<Item = u32> + use<> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Every mount of every namespace in which a thread lives. A thread may have
/// a namespace of its own (unshare(2)).
pub fn everywhere() -> std::io::Result<Vec<Found>> {
    let own = fs::read_link("/proc/self/ns/mnt")?;
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for pid in numbers(Path::new("/proc")) {
        for tid in numbers(&PathBuf::from(format!("/proc/{pid}/task"))) {
            let task = PathBuf::from(format!("/proc/{pid}/task/{tid}"));
            // A thread may end while it is being looked at, and kernel threads
            // that end have no namespace.
            let Ok(namespace) = fs::read_link(task.join("ns/mnt")) else {
                continue;
            };
            if seen.contains(&namespace) {
                continue;
            }
            let Ok(text) = fs::read_to_string(task.join("mountinfo")) else {
                continue;
            };
            let own_namespace = namespace == own;
            seen.insert(namespace);
            found.extend(parse(&text).map(|mount| Found {
                mount,
                own_namespace,
                pid,
            }));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_with_its_escapes_and_peers() {
        let line = r"36 35 98:1 /mnt1 /mnt/a\040b\134c rw,noatime shared:7 master:2 - ext3 /dev/root ro,errors=continue";
        let mount = parse(line).next().unwrap();
        assert_eq!(mount.dev, 98 << 20 | 1);
        assert_eq!(mount.point, PathBuf::from(r"/mnt/a b\c"));
        assert_eq!((mount.shared, mount.master), (Some(7), Some(2)));
        assert_eq!(
            (mount.fs.as_str(), mount.source.as_str()),
            ("ext3", "/dev/root")
        );
        assert!(!mount.writable());
    }

    #[test]
    fn a_mount_without_peers_and_a_broken_line_are_told_apart() {
        let text = "1 0 8:0 / / rw - xfs /dev/sda rw,attr2\nnonsense\n2 1 8 / /x rw - xfs a rw\n";
        let all: Vec<_> = parse(text).collect();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].shared, all[0].master), (None, None));
        assert!(all[0].writable());
    }

    #[test]
    fn an_escape_cut_short_stays_as_it_is() {
        assert_eq!(unescape(r"a\04"), r"a\04");
        assert_eq!(unescape(r"a\"), r"a\");
        assert_eq!(unescape(r"\011x"), "\tx");
    }

    #[test]
    fn the_own_namespace_is_among_all() {
        let all = everywhere().unwrap();
        assert!(
            all.iter()
                .any(|f| f.own_namespace && f.mount.point == Path::new("/proc"))
        );
    }
}

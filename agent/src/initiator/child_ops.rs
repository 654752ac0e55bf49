//! What the child does: one kernel call, or a few that belong together, on an
//! attached device or a file system on it.
//!
//! Each runs in a process of its own ([`super::nursery_main`]), which gets one
//! [`Op`] and answers one [`Reply`]. It owns nothing and remembers nothing; it
//! may hang, and then it is the parent's deadline that ends it. See
//! [`super::child`].

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::child_calls as calls;
use super::superblock::Superblock;
use crate::attach::ports::Disk;
use crate::ids::{Bytes, Diskseq, VolumeId};

/// A disk by its node, and the sequence number it must have there.
///
/// Names and numbers of disks are used again. A child opens the node, asks the
/// open descriptor for its sequence number (BLKGETDISKSEQ), and keeps it open
/// while a tool uses the name: an open disk's name is not given to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Node {
    /// The device node.
    pub path: PathBuf,
    /// The disk's sequence number.
    pub diskseq: Diskseq,
}

impl From<&Disk> for Node {
    fn from(disk: &Disk) -> Self {
        Self {
            path: disk.path(),
            diskseq: disk.diskseq,
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// One thing to do in a child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub(super) enum Op {
    /// Write an option string to the fabrics device.
    Connect { fabrics: PathBuf, options: String },
    /// Delete a controller, if it is still one of this subsystem.
    Delete {
        controller: PathBuf,
        subsystem: String,
    },
    /// Let a controller look at its namespaces again.
    Rescan {
        controller: PathBuf,
        subsystem: String,
    },
    /// Read a device's edges and ask blkid what is on it.
    Examine { device: Node, volume: VolumeId },
    /// Write the format mark.
    Mark { device: Node, volume: VolumeId },
    /// Take the format mark away, where it is still there.
    Unmark { device: Node, volume: VolumeId },
    /// Run a tool that is given the device by name; its last arguments are the
    /// device and `after`.
    Tool {
        device: Node,
        program: String,
        args: Vec<String>,
        after: Vec<PathBuf>,
    },
    /// Unmount, or only detach.
    Unmount { path: PathBuf, detach: bool },
    /// Bind-mount.
    Bind {
        source: PathBuf,
        target: PathBuf,
        read_only: bool,
    },
    /// Write back a device and the file system on it, whoever has claimed it.
    /// `shown` is a mount of it that is seen here.
    WriteBack {
        device: Node,
        shown: Option<PathBuf>,
    },
    /// Claim a device and write back its own page cache. EBUSY: a file system
    /// or a tool has claimed it.
    SyncDevice { device: Node },
    /// Make the file system on a device read-only. EBUSY: a file of it is open
    /// for writing.
    EndWrites { device: Node },
    /// Room of the file system at a path.
    Room { path: PathBuf },
    /// Shut down the file system on a device, wherever it is mounted. `shown`
    /// is a mount of it that is seen here, `exemptions` the way through its gate.
    ShutDown {
        device: Node,
        shown: Option<PathBuf>,
        exemptions: Option<PathBuf>,
    },
    /// Make a device refuse writes, or take them again.
    SetReadOnly { device: Node, read_only: bool },
}

impl Op {
    /// The call and its object, for errors and for `ps`.
    pub(super) fn what(&self) -> String {
        match self {
            Self::Connect { fabrics, .. } => format!("write connect to {}", fabrics.display()),
            Self::Delete { controller, .. } => format!("delete {}", controller.display()),
            Self::Rescan { controller, .. } => format!("rescan {}", controller.display()),
            Self::Examine { device, .. } => format!("examine {device}"),
            Self::Mark { device, .. } => format!("mark {device}"),
            Self::Unmark { device, .. } => format!("unmark {device}"),
            Self::Tool {
                device, program, ..
            } => format!("{program} on {device}"),
            Self::Unmount {
                path,
                detach: false,
            } => format!("umount {}", path.display()),
            Self::Unmount { path, detach: true } => format!("detach {}", path.display()),
            Self::Bind { source, target, .. } => {
                format!("bind {} to {}", source.display(), target.display())
            }
            Self::WriteBack { device, .. } => format!("write back {device}"),
            Self::EndWrites { device } => format!("remount {device} read-only"),
            Self::SyncDevice { device } => format!("fsync {device}"),
            Self::Room { path } => format!("statvfs {}", path.display()),
            Self::ShutDown { device, .. } => format!("shut down the file system on {device}"),
            Self::SetReadOnly { device, .. } => format!("set read-only {device}"),
        }
    }
}

/// What an op found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// Nothing but that it is done.
    Done,
    /// What the fabrics device said: `instance=0,cntlid=1`.
    Connected(String),
    /// What is on a device.
    Examined(Examination),
    /// Room in a file system.
    Room(Room),
    /// How a tool ended.
    Ended(Ended),
    /// The file system is shut down, if one was mounted.
    ShutDown { mounted: bool },
}

/// How a tool ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ended {
    /// Its exit status; none: a signal ended it.
    pub code: Option<i32>,
    /// What it printed, both outputs.
    pub output: String,
}

/// What is on a device, unjudged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Examination {
    /// The device's size.
    pub size: Bytes,
    /// What its first blocks say, where they are a superblock that drover knows.
    pub superblock: Option<Superblock>,
    /// Whether the format mark of this volume is there.
    pub marked: bool,
    /// blkid's exit status; none: a signal ended it.
    pub blkid_code: Option<i32>,
    /// What blkid printed.
    pub blkid_out: String,
    /// What blkid complained of.
    pub blkid_err: String,
}

/// Room in a file system: all, used and available.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Room {
    /// In bytes.
    pub bytes: [u64; 3],
    /// In inodes.
    pub inodes: [u64; 3],
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    /// The call and its object.
    pub call: String,
    /// The kernel's error number; 0 where it was not the kernel.
    pub errno: i32,
    /// The reason in words.
    pub reason: String,
}

/// The child's one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reply {
    /// Microseconds between the first call and the end of the last.
    pub took_us: u64,
    /// What came of it.
    pub result: Result<Answer, Failure>,
}

/// Does an op, in the child.
pub(super) fn perform(op: &Op) -> Result<Answer, Failure> {
    match op {
        Op::Connect { fabrics, options } => calls::connect(fabrics, options).map(Answer::Connected),
        Op::Delete {
            controller,
            subsystem,
        } => calls::poke(controller, "delete_controller", subsystem).map(|()| Answer::Done),
        Op::Rescan {
            controller,
            subsystem,
        } => calls::poke(controller, "rescan_controller", subsystem).map(|()| Answer::Done),
        Op::Examine { device, volume } => calls::examine(device, volume).map(Answer::Examined),
        Op::Mark { device, volume } => calls::mark(device, volume).map(|()| Answer::Done),
        Op::Unmark { device, volume } => calls::unmark(device, volume).map(|()| Answer::Done),
        Op::Tool {
            device,
            program,
            args,
            after,
        } => calls::tool(device, program, args, after).map(Answer::Ended),
        Op::Unmount { path, detach } => calls::unmount(path, *detach).map(|()| Answer::Done),
        Op::Bind {
            source,
            target,
            read_only,
        } => calls::bind(source, target, *read_only).map(|()| Answer::Done),
        Op::WriteBack { device, shown } => {
            calls::write_back(device, shown.as_deref()).map(|()| Answer::Done)
        }
        Op::SyncDevice { device } => calls::sync_device(device).map(|()| Answer::Done),
        Op::EndWrites { device } => calls::end_writes(device).map(|()| Answer::Done),
        Op::Room { path } => calls::room(path).map(Answer::Room),
        Op::ShutDown {
            device,
            shown,
            exemptions,
        } => calls::shut_down(device, shown.as_deref(), exemptions.as_deref())
            .map(|mounted| Answer::ShutDown { mounted }),
        Op::SetReadOnly { device, read_only } => {
            calls::set_read_only(device, *read_only).map(|()| Answer::Done)
        }
    }
}

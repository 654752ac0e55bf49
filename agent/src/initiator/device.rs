//! What is on a device, and what may be done about it.
//!
//! The rule that loses no data: drover formats a device only when the home says
//! that the volume was never written and the device reads as blank, ends and
//! all. A device that answers with errors looks blank to blkid; here it is
//! refused. One exception: a device with drover's own format mark and no
//! finished file system, see [`FormatMark`](super::superblock::FormatMark).

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use super::child::{Children, one_line};
use super::child_ops::{Answer, Ended, Examination, Node, Op};
use super::mountinfo::name_of;
use super::steps::Steps;
use crate::attach::ports::{Disk, FsType, NodeError};
use crate::ids::{Diskseq, VolumeId};
use crate::joined::Joined;

/// How long a check may take in all.
const FSCK: Duration = Duration::from_secs(24 * 3600);

/// How long each thing may take that is done to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceDeadlines {
    /// From connect until the disk is there, and for a new size to show.
    pub appear: Duration,
    /// To read its ends and probe it.
    pub examine: Duration,
    /// mkfs, and the tools that grow a file system; and how long one call waits for fsck.
    pub tool: Duration,
    /// mount, with the recovery of its log.
    pub mount: Duration,
    /// umount, with the write-back before it.
    pub unmount: Duration,
    /// A sync before a holder is cut off.
    pub sync: Duration,
    /// statfs, bind mounts and the like.
    pub call: Duration,
}

impl Default for DeviceDeadlines {
    fn default() -> Self {
        Self {
            appear: Duration::from_secs(20),
            examine: Duration::from_secs(20),
            tool: Duration::from_secs(300),
            mount: Duration::from_secs(60),
            unmount: Duration::from_secs(30),
            sync: Duration::from_secs(10),
            call: Duration::from_secs(5),
        }
    }
}

/// What a device holds.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Blank,
    FileSystem(FsType),
    /// Anything else that has a signature, in words.
    Other(String),
}

/// What to do with a device before it is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    /// Make a file system.
    Format,
    /// There is one; take the format mark away first where one is left.
    Mount { marked: bool },
}

/// Reads blkid's answer. An answer that is none of those blkid(8) describes is
/// an error, never "blank".
fn content(found: &Examination) -> Result<Content, String> {
    let value = |key: &str| {
        found
            .blkid_out
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    };
    match (found.blkid_code, value("TYPE"), value("PTTYPE")) {
        (Some(0), Some("ext4"), None) => Ok(Content::FileSystem(FsType::Ext4)),
        (Some(0), Some("xfs"), None) => Ok(Content::FileSystem(FsType::Xfs)),
        (Some(0), Some(other), None) => Ok(Content::Other(other.to_owned())),
        (Some(0), Some(fs), Some(table)) => Ok(Content::Other(format!(
            "{fs} beside a partition table ({table})"
        ))),
        (Some(0), None, Some(table)) => Ok(Content::Other(format!("a partition table ({table})"))),
        (Some(2), None, None) if found.blkid_err.trim().is_empty() => match found.superblock {
            None => Ok(Content::Blank),
            Some(_) => Ok(Content::Other("a damaged file system".to_owned())),
        },
        (Some(8), ..) => Ok(Content::Other("several signatures at once".to_owned())),
        (code, ..) => Err(format!(
            "blkid ended with {code:?}: {} {}",
            found.blkid_out.trim(),
            found.blkid_err.trim()
        )),
    }
}

/// The decision, with nothing but facts in it.
fn plan(
    found: &Examination,
    ever_written: bool,
    read_only: bool,
    wanted: FsType,
) -> Result<Plan, String> {
    let content = content(found)?;
    let wanted_name = name_of(wanted);
    // A finished file system is never formatted, mark or not.
    let unfinished = found.marked
        && match &content {
            Content::Blank => true,
            Content::FileSystem(_) | Content::Other(_) => {
                found.superblock.is_some_and(|s| s.unfinished)
            }
        };
    match content {
        Content::FileSystem(fs) if fs == wanted && !unfinished => Ok(Plan::Mount {
            marked: found.marked,
        }),
        _ if unfinished && !read_only => Ok(Plan::Format),
        Content::Blank if ever_written => Err(format!(
            "it was written before, or its home does not say, and it holds no file system that can be recognised; drover formats only volumes that were never written (was it used as a raw block volume, or are its first blocks damaged?); {wanted_name} was asked for"
        )),
        Content::Blank if read_only => Err(format!(
            "it is empty, so there is no {wanted_name} on it, and it is attached read-only"
        )),
        Content::Blank => Ok(Plan::Format),
        Content::FileSystem(fs) => Err(format!(
            "it holds {}, and {wanted_name} was asked for",
            name_of(fs)
        )),
        Content::Other(what) => Err(format!("it holds {what}, and {wanted_name} was asked for")),
    }
}

/// Options that change what is mounted or where, instead of how.
const REFUSED_OPTIONS: [&str; 16] = [
    "bind",
    "rbind",
    "move",
    "remount",
    "loop",
    "offset",
    "sizelimit",
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "unbindable",
    "runbindable",
    "helper",
];

/// mount(8)'s options for a file system.
fn options(fs: FsType, flags: &[String], read_only: bool) -> Result<String, String> {
    let mut all = vec![if read_only { "ro" } else { "rw" }];
    for flag in flags.iter().flat_map(|flag| flag.split(',')) {
        let name = flag.split('=').next().unwrap_or_default();
        if REFUSED_OPTIONS.contains(&name) {
            return Err(format!(
                "mount option {flag:?} is not for a volume: it changes what is mounted, not how"
            ));
        }
        if flag.contains(|c: char| c.is_whitespace() || c.is_control() || c == '"') {
            return Err(format!("mount option {flag:?} has a space in it"));
        }
        match flag {
            "rw" if read_only => {
                return Err("mount option \"rw\" on a read-only attachment".to_owned());
            }
            "" | "defaults" | "rw" => {}
            _ => all.push(flag),
        }
    }
    // Clones carry their source's UUID, and so does a super block that lives
    // on in another mount namespace.
    if fs == FsType::Xfs && !all.contains(&"nouuid") {
        all.push("nouuid");
    }
    Ok(all.join(","))
}

/// How fsck ended, and how long it took; none: the file system is in use here.
type Checked = Result<Option<(Ended, Duration)>, String>;

/// Works on devices, through children.
#[derive(Debug)]
pub(super) struct Devices {
    pub(super) children: Children,
    pub(super) deadlines: DeviceDeadlines,
    /// Checks under way, by disk.
    checks: Joined<(String, Diskseq), Checked>,
}

/// A device that is to be mounted.
#[derive(Debug)]
pub(super) struct MountJob<'a> {
    pub volume: &'a VolumeId,
    pub disk: &'a Disk,
    pub ever_written: bool,
    pub read_only: bool,
    pub fs: FsType,
    pub flags: &'a [String],
    pub point: &'a Path,
}

impl Devices {
    pub(super) fn new(children: Children, deadlines: DeviceDeadlines) -> Self {
        Self {
            children,
            deadlines,
            checks: Joined::default(),
        }
    }

    /// Formats a never-written device, checks and mounts any, and grows a file
    /// system that is smaller than its device.
    pub(super) async fn mount(
        &self,
        job: &MountJob<'_>,
        steps: &mut Steps,
    ) -> Result<(), NodeError> {
        let unusable = |why: String| {
            NodeError::Unusable(format!(
                "volume {} ({}): {why}",
                job.volume,
                job.disk.path().display()
            ))
        };
        let options = options(job.fs, job.flags, job.read_only).map_err(NodeError::Incompatible)?;
        let found = self.examine(job, steps).await?;
        match plan(&found, job.ever_written, job.read_only, job.fs).map_err(unusable)? {
            Plan::Format => self.format(job, steps).await?,
            Plan::Mount { marked } => {
                if marked && !job.read_only {
                    self.unmark(job, steps).await?;
                }
                if job.fs == FsType::Ext4 && !job.read_only {
                    self.check(job, steps).await?;
                }
            }
        }
        let args = ["-n", "-t", name_of(job.fs), "-o", &options];
        let end = self
            .tool(
                job.disk,
                "mount",
                &args,
                vec![job.point.to_owned()],
                self.deadlines.mount,
                ("mount", steps),
            )
            .await?;
        expect_success("mount", job.disk, &end)?;
        // Only a file system that was there before can be too small: a clone
        // in a larger volume, or an expansion while it was not staged.
        let small = found
            .superblock
            .is_some_and(|s| !s.unfinished && s.size < found.size);
        if small
            && !job.read_only
            && let Err(error) = self.grow(job.disk, job.fs, job.point, steps).await
        {
            // It is as usable as it was; NodeExpand tries again.
            tracing::warn!(volume = %job.volume, %error, "the file system stays smaller than its device");
        }
        Ok(())
    }

    async fn examine(
        &self,
        job: &MountJob<'_>,
        steps: &mut Steps,
    ) -> Result<Examination, NodeError> {
        let op = Op::Examine {
            device: job.disk.into(),
            volume: job.volume.clone(),
        };
        match self.children.run(&op, self.deadlines.examine).await {
            Ok((Answer::Examined(found), took)) => {
                steps.kernel("examine", took);
                Ok(found)
            }
            Ok((other, _)) => Err(NodeError::Failed(format!(
                "examine was answered with {other:?}"
            ))),
            Err(error) if error.errno().is_some() => Err(NodeError::Unusable(format!(
                "volume {}: {error}; a device that cannot be read is never formatted or mounted",
                job.volume
            ))),
            Err(error) => Err(error.into()),
        }
    }

    async fn format(&self, job: &MountJob<'_>, steps: &mut Steps) -> Result<(), NodeError> {
        let mark = Op::Mark {
            device: job.disk.into(),
            volume: job.volume.clone(),
        };
        let (_, took) = self.children.run(&mark, self.deadlines.call).await?;
        steps.kernel("mark", took);
        // No discard: what was never written holds nothing to give back, and
        // it would take the mark away. Otherwise as kubelet's mount helper.
        let (program, args): (_, &[&str]) = match job.fs {
            FsType::Ext4 => ("mkfs.ext4", &["-q", "-F", "-m0", "-E", "nodiscard"]),
            FsType::Xfs => ("mkfs.xfs", &["-q", "-f", "-K"]),
        };
        let end = self
            .tool(
                job.disk,
                program,
                args,
                Vec::new(),
                self.deadlines.tool,
                ("mkfs", steps),
            )
            .await?;
        expect_success(program, job.disk, &end)?;
        self.unmark(job, steps).await
    }

    async fn unmark(&self, job: &MountJob<'_>, steps: &mut Steps) -> Result<(), NodeError> {
        let unmark = Op::Unmark {
            device: job.disk.into(),
            volume: job.volume.clone(),
        };
        let (_, took) = self.children.run(&unmark, self.deadlines.sync).await?;
        steps.kernel("unmark", took);
        Ok(())
    }

    /// fsck -a of ext4: replays its journal and mends what is safe to mend. Not
    /// where its super block is in use here: then the mount gives that one.
    ///
    /// Past the deadline it goes on, and the next call waits for the same one:
    /// cut off, it would begin anew each time and never come to an end.
    async fn check(&self, job: &MountJob<'_>, steps: &mut Steps) -> Result<(), NodeError> {
        let key = (job.disk.name.clone(), job.disk.diskseq);
        let work = || fsck(self.children.clone(), job.disk.clone(), self.deadlines.sync);
        let deadline = self.deadlines.tool;
        let checked = tokio::time::timeout(deadline, self.checks.join(key, work)).await;
        let Ok(checked) = checked else {
            let disk = job.disk.path();
            let what = format!("fsck of {} goes on: it", disk.display());
            return Err(NodeError::Deadline { what, deadline });
        };
        let lost = || NodeError::Failed("fsck was lost: its task panicked".to_owned());
        let Some((end, took)) = checked.ok_or_else(lost)?.map_err(NodeError::Failed)? else {
            tracing::info!(volume = %job.volume, "no fsck: the file system is in use on this node");
            return Ok(());
        };
        steps.kernel("fsck", took);
        // e2fsck(8): 1 errors corrected, 2 and a reboot is due (only for a
        // mounted root), 4 errors left, 8 and more: it could not work.
        match end.code {
            Some(0) => Ok(()),
            Some(code @ 1..=3) => {
                tracing::warn!(volume = %job.volume, code, output = one_line(&end.output), "fsck corrected the file system");
                Ok(())
            }
            Some(code) if code & 4 != 0 => Err(NodeError::Unusable(format!(
                "volume {}: fsck found errors that it does not correct by itself; run e2fsck by hand: {}",
                job.volume,
                one_line(&end.output)
            ))),
            _ => expect_success("fsck.ext4 -a", job.disk, &end),
        }
    }

    /// Grows a mounted file system to its device's size.
    pub(super) async fn grow(
        &self,
        disk: &Disk,
        fs: FsType,
        point: &Path,
        steps: &mut Steps,
    ) -> Result<(), NodeError> {
        match fs {
            FsType::Ext4 => {
                let end = self
                    .tool(
                        disk,
                        "resize2fs",
                        &[],
                        Vec::new(),
                        self.deadlines.tool,
                        ("grow", steps),
                    )
                    .await?;
                expect_success("resize2fs", disk, &end)
            }
            FsType::Xfs => {
                let end = self
                    .children
                    .tool(
                        "xfs_growfs",
                        &["-d".as_ref(), point.as_os_str()],
                        self.deadlines.tool,
                    )
                    .await?;
                steps.kernel("grow", end.took);
                let ended = Ended {
                    code: Some(end.code),
                    output: end.output,
                };
                expect_success("xfs_growfs", disk, &ended)
            }
        }
    }

    async fn tool(
        &self,
        disk: &Disk,
        program: &str,
        args: &[&str],
        after: Vec<PathBuf>,
        deadline: Duration,
        (what, steps): (&'static str, &mut Steps),
    ) -> Result<Ended, NodeError> {
        let op = tool_op(disk, program, args, after);
        match self.children.run(&op, deadline).await? {
            (Answer::Ended(end), took) => {
                steps.kernel(what, took);
                Ok(end)
            }
            (other, _) => Err(NodeError::Failed(format!(
                "{program} was answered with {other:?}"
            ))),
        }
    }
}

async fn fsck(children: Children, disk: Disk, sync: Duration) -> Checked {
    let claim = Op::SyncDevice {
        device: Node::from(&disk),
    };
    match children.run(&claim, sync).await {
        Ok(_) => {}
        Err(error) if error.errno() == Some(Errno::EBUSY) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    }
    let op = tool_op(&disk, "fsck.ext4", &["-a"], Vec::new());
    match children.run(&op, FSCK).await {
        Ok((Answer::Ended(end), took)) => Ok(Some((end, took))),
        Ok((other, _)) => Err(format!("fsck.ext4 was answered with {other:?}")),
        Err(error) => Err(error.to_string()),
    }
}

fn tool_op(disk: &Disk, program: &str, args: &[&str], after: Vec<PathBuf>) -> Op {
    Op::Tool {
        device: Node::from(disk),
        program: program.to_owned(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        after,
    }
}

fn expect_success(program: &str, disk: &Disk, end: &Ended) -> Result<(), NodeError> {
    match end.code {
        Some(0) => Ok(()),
        code => Err(NodeError::Failed(format!(
            "{program} of {} ended with {}: {}",
            disk.path().display(),
            code.map_or("a signal".to_owned(), |code| format!("exit status {code}")),
            one_line(&end.output)
        ))),
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;

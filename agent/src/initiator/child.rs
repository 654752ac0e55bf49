//! Children: whatever may hang on an attached device runs apart, with a deadline.
//!
//! A thread that the kernel holds in D state cannot be ended, and while it
//! lives its process keeps its port and its locks even after kill -9. If that
//! process were the agent that serves the very device, its successor could get
//! neither, and only that successor could serve the I/O that the thread waits
//! for. So the agent itself never makes a call that may wait for an
//! attached device. Tools (mkfs, fsck, mount, the growers) are spawned; calls
//! (umount, statvfs, sync, reads of the device, the nvme files in sysfs), and
//! the tools that are given a device by name, run in children that a small
//! process of this binary forks, see [`super::nursery`] and [`super::child_ops`].
//!
//! A child has none of the agent's descriptors. At its deadline it is killed
//! with its own process group; it gets a moment to end, and if the kernel holds
//! it, a task collects it whenever that ends, and the caller goes on. mkfs,
//! fsck, mount and the format mark open the device O_EXCL, so what such a
//! leftover still does to a device cannot meet a second of its kind.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use super::child_ops::{Answer, Op, Reply};
use super::nursery::{Forked, Nursery, Running};
use crate::attach::ports::NodeError;

/// How long a killed child gets to end before the caller goes on without it.
const DYING: Duration = Duration::from_millis(300);
/// The most that is kept of a child's output.
const OUTPUT: usize = 256 * 1024;

/// Why a child did not do its work.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChildError {
    #[error("run {program}: {source}")]
    Spawn {
        program: String,
        source: std::io::Error,
    },
    #[error("{what} did not end within {deadline:?}")]
    Deadline { what: String, deadline: Duration },
    /// A call failed in the child.
    #[error("{call}: {reason}")]
    Call {
        call: String,
        errno: Errno,
        reason: String,
    },
    /// The child ended without an answer.
    #[error("{what}: the child ended with {status} and no answer: {output}")]
    Silent {
        what: String,
        status: ExitStatus,
        output: String,
    },
}

impl ChildError {
    /// The kernel's reason, where a call failed.
    pub(super) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Call { errno, .. } => Some(*errno),
            Self::Spawn { .. } | Self::Deadline { .. } | Self::Silent { .. } => None,
        }
    }
}

impl From<ChildError> for NodeError {
    fn from(error: ChildError) -> Self {
        match error {
            ChildError::Deadline { what, deadline } => Self::Deadline { what, deadline },
            other => Self::Failed(other.to_string()),
        }
    }
}

/// How a tool ended.
#[derive(Debug)]
pub(super) struct ToolEnd {
    /// Its exit status; 128 and the signal's number where a signal ended it.
    pub code: i32,
    /// Both its outputs.
    pub output: String,
    /// How long it ran.
    pub took: Duration,
}

/// Starts children.
#[derive(Debug, Clone)]
pub struct Children {
    nursery: Arc<Nursery>,
    /// Children that were not done by their deadline.
    pub(super) overdue: Counter,
    /// Killed children that the kernel holds still.
    pub(super) held: Gauge,
}

impl Children {
    /// Children of this binary: `/proc/self/exe child`, so that an upgrade on
    /// disk does not change what a running agent starts. In a runtime only: it
    /// starts the nursery.
    pub fn of_this_binary() -> Self {
        let children = Self::of("/proc/self/exe".into(), vec!["child".into()]);
        if let Err(error) = children.nursery.prepare() {
            // The first child tries again, and its error has a caller.
            tracing::warn!(%error, "cannot start the nursery of children");
        }
        children
    }

    /// Children of another program that calls [`super::child_main`] with what
    /// comes after these arguments.
    pub fn of(program: PathBuf, args: Vec<OsString>) -> Self {
        Self {
            nursery: Nursery::of(program, args),
            overdue: Counter::default(),
            held: Gauge::default(),
        }
    }

    /// Who forks them, for the tests.
    #[cfg(test)]
    pub(super) fn nursery(&self) -> &Arc<Nursery> {
        &self.nursery
    }

    /// Does `op` in a child; its answer and how long the calls took there.
    pub(super) async fn run(
        &self,
        op: &Op,
        deadline: Duration,
    ) -> Result<(Answer, Duration), ChildError> {
        let what = op.what();
        let input = serde_json::to_vec(op).expect("an op has only text and numbers in it");
        let reply = self.reply_to(what, input, deadline).await?;
        match reply.result {
            Ok(answer) => Ok((answer, Duration::from_micros(reply.took_us))),
            Err(failure) => Err(ChildError::Call {
                call: failure.call,
                errno: Errno::from_raw(failure.errno),
                reason: failure.reason,
            }),
        }
    }

    /// Runs a tool to its end, whatever its exit status.
    pub(super) async fn tool(
        &self,
        program: &str,
        args: &[&OsStr],
        deadline: Duration,
    ) -> Result<ToolEnd, ChildError> {
        let mut what = program.to_owned();
        for arg in args {
            what.push(' ');
            what.push_str(&arg.to_string_lossy());
        }
        let mut command = Command::new(program);
        command.args(args).env("LC_ALL", "C");
        let (status, out, err, took) = self.end_of(command, what, deadline).await?;
        Ok(ToolEnd {
            code: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            output: one_line(&format!("{out} {err}")),
            took,
        })
    }

    /// What a forked child replies to its input. It has closed all that its op
    /// opened before it replies, so nobody waits for its end.
    async fn reply_to(
        &self,
        what: String,
        input: Vec<u8>,
        deadline: Duration,
    ) -> Result<Reply, ChildError> {
        let started = Instant::now();
        let Ok(forked) = tokio::time::timeout(deadline, self.nursery.fork()).await else {
            self.overdue.inc();
            self.nursery.abandon();
            return Err(ChildError::Deadline { what, deadline });
        };
        let spawn = |source| ChildError::Spawn {
            program: format!("a child to {what}"),
            source,
        };
        let Forked {
            mut running,
            socket,
        } = forked.map_err(spawn)?;
        let talk = async {
            let (from, mut to) = socket.into_split();
            let write = async move {
                // A child that does not read says why on its way out. The end
                // of what it is to read comes with the end of this half.
                let _ = to.write_all(&input).await;
            };
            let ((), said) = tokio::join!(write, reply_of(from));
            match said {
                Ok(reply) => Ok(reply),
                Err(output) => Err((running.wait().await, output)),
            }
        };
        let left = deadline.saturating_sub(started.elapsed());
        match tokio::time::timeout(left, talk).await {
            Ok(Ok(reply)) => {
                tokio::spawn(async move {
                    // One that does not end by itself is killed as it is dropped.
                    let _ = tokio::time::timeout(DYING, running.wait()).await;
                });
                Ok(reply)
            }
            Ok(Err((Ok(status), output))) => Err(ChildError::Silent {
                what,
                status,
                output: one_line(&output),
            }),
            Ok(Err((Err(source), _))) => Err(spawn(source)),
            Err(_) => {
                self.overdue.inc();
                self.end(Process::Forked(running), &what).await;
                Err(ChildError::Deadline { what, deadline })
            }
        }
    }

    /// What a tool prints, and how it ends.
    async fn end_of(
        &self,
        mut command: Command,
        what: String,
        deadline: Duration,
    ) -> Result<(ExitStatus, String, String, Duration), ChildError> {
        let started = Instant::now();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .current_dir("/")
            .process_group(0)
            .kill_on_drop(true);
        // SAFETY: between fork and exec the closure makes one system call and
        // touches no memory of the parent's.
        unsafe { command.pre_exec(keep_no_descriptors) };
        let mut child = command.spawn().map_err(|source| ChildError::Spawn {
            program: command
                .as_std()
                .get_program()
                .to_string_lossy()
                .into_owned(),
            source,
        })?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let talk = async {
            let (out, err) = tokio::join!(text_of(stdout), text_of(stderr));
            (child.wait().await, out, err)
        };
        match tokio::time::timeout(deadline, talk).await {
            Ok((Ok(status), out, err)) => Ok((status, out, err, started.elapsed())),
            Ok((Err(source), _, _)) => Err(ChildError::Spawn {
                program: what,
                source,
            }),
            Err(_) => {
                self.overdue.inc();
                self.end(Process::Tool(child), &what).await;
                Err(ChildError::Deadline { what, deadline })
            }
        }
    }

    /// Kills a child and what it started; goes on after a moment even if the
    /// kernel holds it.
    async fn end(&self, mut child: Process, what: &str) {
        if let Err(errno) = child.kill() {
            tracing::warn!(pid = child.id(), what, %errno, "cannot kill a child that is past its deadline");
        }
        if tokio::time::timeout(DYING, child.wait()).await.is_ok() {
            return;
        }
        tracing::warn!(
            what,
            pid = child.id(),
            "the kernel holds a killed child; going on without it"
        );
        let held = self.held.clone();
        let what = what.to_owned();
        held.inc();
        tokio::spawn(async move {
            let status = child.wait().await;
            held.dec();
            tracing::info!(
                what,
                ?status,
                "a killed child that the kernel held has ended"
            );
        });
    }
}

/// A child that is past its deadline.
enum Process {
    /// Spawned from here.
    Tool(Child),
    /// Forked by the nursery.
    Forked(Running),
}

impl Process {
    /// Its number, while it is not collected and so is still its own.
    fn id(&self) -> Option<i32> {
        match self {
            Self::Tool(child) => child.id().and_then(|pid| i32::try_from(pid).ok()),
            Self::Forked(running) => running.id().map(Pid::as_raw),
        }
    }

    /// Kills it and what it started: it leads a process group.
    fn kill(&self) -> Result<(), Errno> {
        self.id()
            .map_or(Ok(()), |pid| killpg(Pid::from_raw(pid), Signal::SIGKILL))
    }

    async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        match self {
            Self::Tool(child) => child.wait().await,
            Self::Forked(running) => running.wait().await,
        }
    }
}

/// Marks every descriptor above standard error close-on-exec. Rust opens all
/// of its own so; a library in C may not.
pub(super) fn keep_no_descriptors() -> std::io::Result<()> {
    // SAFETY: the call takes numbers only. Descriptors stay valid until exec.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3_u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Reads up to the reply, which is the last line; or to the end, and then what
/// was said instead.
async fn reply_of(mut from: impl AsyncRead + Unpin) -> Result<Reply, String> {
    let mut kept = Vec::new();
    let mut buffer = vec![0_u8; 8192];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let room = OUTPUT.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..n.min(room)]);
        let last = kept
            .strip_suffix(b"\n")
            .and_then(|lines| lines.rsplit(|byte| *byte == b'\n').next());
        if let Some(Ok(reply)) = last.map(serde_json::from_slice) {
            return Ok(reply);
        }
    }
    Err(String::from_utf8_lossy(&kept).into_owned())
}

/// Reads to the end, keeps the first [`OUTPUT`] bytes.
async fn text_of(from: Option<impl AsyncRead + Unpin>) -> String {
    let mut kept = Vec::new();
    if let Some(mut from) = from {
        let mut buffer = vec![0_u8; 8192];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            let room = OUTPUT.saturating_sub(kept.len());
            kept.extend_from_slice(&buffer[..n.min(room)]);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// A tool's output as it goes into a sentence.
pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[path = "child_tests.rs"]
pub(super) mod tests;

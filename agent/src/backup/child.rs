//! Starting a worker process and hearing what it says.
//!
//! The child holds none of the agent's descriptors and is in a process group
//! of its own. The agent never waits for it without a bound: a child in D
//! state is left behind, and reaped by its task whenever the kernel lets go.

use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::error::BackupError;
use super::spec::{Event, Job};

/// How much of a worker's standard error is kept for its error.
const STDERR_KEPT: usize = 4096;

/// What a worker shall do; it only ever grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wish {
    /// Work.
    Run,
    /// Stop at the next slice.
    Stop,
    /// Die.
    Kill,
}

/// A running worker.
pub(super) struct Worker {
    child: Child,
    pid: u32,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    stderr: JoinHandle<String>,
    wish: watch::Receiver<Wish>,
}

/// How a worker ended that said nothing final.
pub(super) enum Silent {
    /// It was killed as wished.
    Killed,
    /// It died or said nonsense.
    Died(BackupError),
}

impl Worker {
    /// Starts `program backup-worker` and hands it its job.
    pub(super) async fn start(
        program: &Path,
        job: &Job,
        wish: watch::Receiver<Wish>,
    ) -> Result<Self, BackupError> {
        let failed = |reason: String| BackupError::Spawn {
            program: program.to_owned(),
            reason,
        };
        let mut command = Command::new(program);
        command
            .arg("backup-worker")
            .current_dir("/")
            .env_remove("RESTIC_PASSWORD")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        // SAFETY: close_range is a bare system call, which is all that may be
        // done between fork and exec; it marks descriptors and closes none.
        unsafe {
            command.pre_exec(|| {
                let cloexec = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
                match libc::close_range(3, libc::c_uint::MAX, cloexec) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(failed("its pipes are missing".into()));
        };
        let mut line = serde_json::to_vec(job).map_err(|error| failed(error.to_string()))?;
        line.push(b'\n');
        // A job is smaller than a pipe, so this does not wait for the child.
        // If the child is dead already, its end says more than this error.
        let _ = stdin.write_all(&line).await;
        Ok(Self {
            pid: child.id().unwrap_or(0),
            child,
            stdin: Some(stdin),
            lines: BufReader::new(stdout).lines(),
            stderr: tokio::spawn(keep_tail(stderr)),
            wish,
        })
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// What it says next; none: it will say nothing more. Performs wishes meanwhile.
    pub(super) async fn next(&mut self) -> Option<Event> {
        loop {
            tokio::select! {
                line = self.lines.next_line() => match line {
                    Ok(Some(line)) => match serde_json::from_str(&line) {
                        Ok(event) => return Some(event),
                        // Not the protocol: a library printed something. Its end will tell.
                        Err(_) => continue,
                    },
                    Ok(None) | Err(_) => return None,
                },
                wish = wished(&mut self.wish) => self.perform(wish),
            }
        }
    }

    /// Waits until it is gone. Performs wishes meanwhile.
    pub(super) async fn reaped(mut self) -> Silent {
        let status = loop {
            tokio::select! {
                status = self.child.wait() => break status,
                wish = wished(&mut self.wish) => self.perform(wish),
            }
        };
        if *self.wish.borrow() == Wish::Kill {
            return Silent::Killed;
        }
        let status = match status {
            Ok(status) => status.to_string(),
            Err(error) => format!("wait: {error}"),
        };
        let stderr = self.stderr.await.unwrap_or_default();
        Silent::Died(BackupError::Worker {
            pid: self.pid,
            reason: match stderr.trim() {
                "" => format!("it ended ({status}) without a result"),
                said => format!("it ended ({status}) without a result: {said}"),
            },
        })
    }

    fn perform(&mut self, wish: Wish) {
        self.stdin.take();
        if wish == Wish::Kill {
            // Fails only for a child that has been reaped, which is what is wanted.
            let _ = self.child.start_kill();
        }
    }
}

/// The next change of the wish. Pends for ever when nobody can wish any more.
async fn wished(wish: &mut watch::Receiver<Wish>) -> Wish {
    match wish.changed().await {
        Ok(()) => *wish.borrow_and_update(),
        Err(_) => std::future::pending().await,
    }
}

/// Reads all of a worker's standard error and keeps the end of it.
async fn keep_tail(mut stderr: tokio::process::ChildStderr) -> String {
    let mut tail = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(got @ 1..) = stderr.read(&mut buffer).await {
        tail.extend_from_slice(&buffer[..got]);
        let surplus = tail.len().saturating_sub(STDERR_KEPT);
        tail.drain(..surplus);
    }
    String::from_utf8_lossy(&tail).into_owned()
}

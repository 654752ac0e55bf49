//! The agent's side of the nursery: starting children without an exec.
//!
//! A child that is exec'd anew costs the loading and relocating of a large
//! binary each time, more than most calls that children make. So the agent
//! starts one small process, the nursery ([`super::nursery_main`]), and has it
//! fork the children:
//!
//! ```text
//!   agent                            nursery
//!     |-- a socket's other end -------->|
//!     |                                 |-- fork, as the agent's child --> child
//!     |<-------------------------------------- its pid ---------------------|
//!     |--------------------------------------- the op --------------------->|
//!     |<-------------------------------------- output, reply, end ----------|
//! ```
//!
//! The pid comes first and the op after it: no op is done by a process that
//! the agent could not kill. A nursery that ended before it forked closes the
//! socket, and the agent starts another and asks again; its end is nothing to
//! the children that run, since they are the agent's own.
//!
//! A [`Forked`] is killed with its process group when it is dropped, and
//! collected whenever it ends.

use std::ffi::OsString;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::child::keep_no_descriptors;
use super::nursery_main::{Hello, NURSERY};

/// How many nurseries are asked for one child.
const NURSERIES: usize = 3;

/// The nursery of one agent, started anew when it has gone.
#[derive(Debug)]
pub(super) struct Nursery {
    program: PathBuf,
    args: Vec<OsString>,
    current: Mutex<Option<Arc<Process>>>,
}

#[derive(Debug)]
struct Process {
    socket: OwnedFd,
    /// Killed when it is dropped.
    child: Child,
}

impl Nursery {
    /// A nursery of a program that calls [`super::child_main`] with the
    /// argument that comes after these.
    pub(super) fn of(program: PathBuf, args: Vec<OsString>) -> Arc<Self> {
        Arc::new(Self {
            program,
            args,
            current: Mutex::default(),
        })
    }

    /// Has the process started, if there is none.
    pub(super) fn prepare(&self) -> io::Result<()> {
        self.process().map(drop)
    }

    /// A child that waits for its op. It may never come back, where the nursery
    /// is stopped: see [`Nursery::abandon`].
    pub(super) async fn fork(self: &Arc<Self>) -> io::Result<Forked> {
        let nursery = Arc::clone(self);
        // By itself, so that a child of a caller who has left is collected too.
        let forked = tokio::spawn(async move {
            for _ in 0..NURSERIES {
                let process = nursery.process()?;
                match process.fork().await? {
                    Some(forked) => return Ok(forked),
                    None => nursery.forget(&process),
                }
            }
            Err(io::Error::other(format!(
                "{NURSERIES} nurseries ended before they forked it"
            )))
        });
        forked.await.map_err(io::Error::other)?
    }

    /// Ends a nursery that does not do its work; the next child gets another.
    pub(super) fn abandon(&self) {
        let process = self.locked().take();
        // Nobody waits for it before it is dropped: the number is its own.
        if let Some(pid) = process.as_ref().and_then(|process| process.child.id())
            && let Ok(pid) = i32::try_from(pid)
        {
            tracing::warn!(pid, "the nursery of children does not answer; it is ended");
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// The nursery's process, for the tests.
    #[cfg(test)]
    pub(super) fn pid(&self) -> Option<u32> {
        self.locked()
            .as_ref()
            .and_then(|process| process.child.id())
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Option<Arc<Process>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn process(&self) -> io::Result<Arc<Process>> {
        let mut current = self.locked();
        if let Some(process) = current.as_ref() {
            return Ok(Arc::clone(process));
        }
        let process = Arc::new(self.start()?);
        *current = Some(Arc::clone(&process));
        Ok(process)
    }

    fn start(&self) -> io::Result<Process> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .arg(NURSERY)
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .kill_on_drop(true);
        // SAFETY: between fork and exec the closure makes one system call and
        // touches no memory of the parent's.
        unsafe { command.pre_exec(keep_no_descriptors) };
        let child = command.spawn()?;
        tracing::debug!(pid = child.id(), "started a nursery for children");
        Ok(Process {
            socket: ours,
            child,
        })
    }

    fn forget(&self, gone: &Arc<Process>) {
        let mut current = self.locked();
        if current.as_ref().is_some_and(|now| Arc::ptr_eq(now, gone)) {
            tracing::warn!(pid = gone.child.id(), "the nursery of children has gone");
            *current = None;
        }
    }
}

impl Process {
    /// A child; none: the nursery has gone, and so there is none.
    async fn fork(&self) -> io::Result<Option<Forked>> {
        let (ours, theirs) = StdUnixStream::pair()?;
        let descriptors = [theirs.as_raw_fd()];
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        );
        drop(theirs);
        match sent {
            Ok(_) => {}
            Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        ours.set_nonblocking(true)?;
        let mut socket = UnixStream::from_std(ours)?;
        let mut hello = [0; Hello::LEN];
        match socket.read_exact(&mut hello).await {
            Ok(_) => {}
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                ) =>
            {
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
        match Hello::of(hello) {
            Hello::Child(pid) => match Running::of(pid) {
                Ok(running) => Ok(Some(Forked { running, socket })),
                Err(error) => {
                    // Without an op it ends at once.
                    drop(socket);
                    tokio::task::spawn_blocking(move || nix::sys::wait::waitpid(pid, None));
                    Err(error)
                }
            },
            Hello::NoFork(errno) => Err(errno.into()),
        }
    }
}

/// A child that has said its hello.
#[derive(Debug)]
pub(super) struct Forked {
    /// Its process.
    pub running: Running,
    /// What it reads and writes.
    pub socket: UnixStream,
}

/// A child process that is this process's own to wait for.
#[derive(Debug)]
pub(super) struct Running {
    pid: Pid,
    /// A pidfd; readable once the process has ended. None: it is collected.
    handle: Option<AsyncFd<OwnedFd>>,
}

impl Running {
    fn of(pid: Pid) -> io::Result<Self> {
        // SAFETY: numbers only. The child is not collected before this process
        // waits for it, so the number is its own.
        let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0_u32) };
        let opened = i32::try_from(Errno::result(opened)?).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made it, close-on-exec, and nobody else
        // knows it.
        let handle = unsafe { OwnedFd::from_raw_fd(opened) };
        // SAFETY: an OwnedFd is one and the same open descriptor for as long as
        // it lives.
        let handle = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }?;
        Ok(Self {
            pid,
            handle: Some(handle),
        })
    }

    /// Its process, while it is not collected.
    pub(super) fn id(&self) -> Option<Pid> {
        self.handle.as_ref().map(|_| self.pid)
    }

    /// Waits for its end and collects it.
    pub(super) async fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            let Some(handle) = &self.handle else {
                return Err(Errno::ECHILD.into());
            };
            let mut ready = handle.readable().await?;
            match try_wait(self.pid)? {
                Some(status) => {
                    drop(ready);
                    self.handle = None;
                    return Ok(status);
                }
                None => ready.clear_ready(),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(handle) = self.handle.take() else {
            return;
        };
        if let Err(errno) = killpg(self.pid, Signal::SIGKILL) {
            tracing::warn!(pid = %self.pid, %errno, "cannot kill a child that nobody waits for");
        }
        if let Ok(Some(_)) = try_wait(self.pid) {
            return;
        }
        let pid = self.pid;
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            let mut rest = Running {
                pid,
                handle: Some(handle),
            };
            if let Err(error) = rest.wait().await {
                tracing::warn!(%pid, %error, "cannot wait for a killed child");
                rest.handle = None;
            }
        });
    }
}

fn try_wait(pid: Pid) -> Result<Option<ExitStatus>, Errno> {
    let mut status = 0;
    // SAFETY: the kernel writes one int.
    let ended = unsafe { libc::waitpid(pid.as_raw(), &raw mut status, libc::WNOHANG) };
    Ok(match Errno::result(ended)? {
        0 => None,
        _ => Some(ExitStatus::from_raw(status)),
    })
}

#[cfg(test)]
#[path = "nursery_tests.rs"]
mod tests;

//! The nursery process, and the children that it forks.
//!
//! `drover child nursery` is exec'd once, while its agent starts, and waits on
//! the socket that is its standard input. It has one thread, so that a fork of
//! it is safe and cheap: nothing is exec'd, linked or relocated again, and there
//! is little to copy. Each message on the socket brings one descriptor, and for
//! each it forks one child, whose standard input, output and error that is.
//!
//! The child is not the nursery's but its parent's (CLONE_PARENT): the agent
//! alone waits for it and kills it, and what happens to the nursery meanwhile
//! is nothing to either. It says its [`Hello`], gets one [`Op`] as JSON, up to
//! the end of what is sent, and answers one [`Reply`] as the last line. An agent
//! that gave up closes its end without an op, and then nothing is done.
//!
//! The nursery looks at nothing that it passes on, and ends with its agent.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;

use super::child_ops::{Op, Reply, perform};

/// The argument that makes a nursery.
pub(super) const NURSERY: &str = "nursery";

/// The first bytes on a child's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hello {
    /// The child runs and waits for its op.
    Child(Pid),
    /// The nursery could not fork.
    NoFork(Errno),
}

impl Hello {
    /// Two numbers: a process, or 0 and an error.
    pub(super) const LEN: usize = 8;

    fn bytes(self) -> [u8; Self::LEN] {
        let (pid, errno) = match self {
            Self::Child(pid) => (pid.as_raw(), 0),
            Self::NoFork(errno) => (0, errno as i32),
        };
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&pid.to_ne_bytes());
        bytes[4..].copy_from_slice(&errno.to_ne_bytes());
        bytes
    }

    pub(super) fn of(bytes: [u8; Self::LEN]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        match i32::from_ne_bytes([a, b, c, d]) {
            pid @ 1.. => Self::Child(Pid::from_raw(pid)),
            _ => Self::NoFork(Errno::from_raw(i32::from_ne_bytes([e, f, g, h]))),
        }
    }
}

/// The nursery's main function: `drover child nursery`, a socket on standard
/// input. Exits with 0 when its agent has gone, with 2 when it was not started
/// by an agent.
pub fn child_main(mut args: impl Iterator<Item = String>) -> ExitCode {
    if args.next().as_deref() != Some(NURSERY) {
        eprintln!("drover child: only a drover agent starts this");
        return ExitCode::from(2);
    }
    name_process("drover-nursery");
    loop {
        match next_request() {
            Ok(Some(socket)) => raise(socket),
            Ok(None) => return ExitCode::SUCCESS,
            Err(Errno::EINTR) => {}
            Err(errno) => {
                eprintln!("drover child: standard input: {errno}");
                return ExitCode::from(2);
            }
        }
    }
}

/// The next child's socket; none: the agent has gone.
fn next_request() -> Result<Option<OwnedFd>, Errno> {
    let mut room = nix::cmsg_space!([RawFd; 1]);
    loop {
        let mut byte = [0_u8; 1];
        let mut into = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(0, &mut into, Some(&mut room), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control
                && let [descriptor] = descriptors.as_slice()
            {
                // SAFETY: the kernel has just made it for this process, and
                // there is room for one only.
                return Ok(Some(unsafe { OwnedFd::from_raw_fd(*descriptor) }));
            }
        }
        if message.bytes == 0 {
            return Ok(None);
        }
    }
}

/// Forks a child for one op.
fn raise(socket: OwnedFd) {
    // The kernel takes the exit signal from the nursery itself (kernel/fork.c).
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: a fork by its raw name, since fork(2) cannot give the child to
    // its grandparent. The stack and all else is copied; this process has one
    // thread, so no lock is held by somebody who is not there in the child.
    let forked = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match forked {
        0 => {
            let done = be_child(socket);
            // SAFETY: ends the process. What is registered to run at exit is
            // the nursery's.
            unsafe { libc::_exit(i32::from(!done)) }
        }
        -1 => {
            let hello = Hello::NoFork(Errno::last());
            // The agent may have gone on without it.
            let _ = File::from(socket).write_all(&hello.bytes());
        }
        _ => {}
    }
}

/// The child's life; whether it could answer.
fn be_child(socket: OwnedFd) -> bool {
    match take_over(socket) {
        Ok(socket) => answer(socket).is_ok(),
        Err(_) => false,
    }
}

/// Leaves the nursery: a process group of its own, and no descriptor but its
/// socket.
fn take_over(socket: OwnedFd) -> Result<File, Errno> {
    nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    for standard in 0..3 {
        // SAFETY: both are descriptors of this process; the nursery's own
        // socket is at 0, and nobody in this process uses it any more.
        Errno::result(unsafe { libc::dup2(socket.as_raw_fd(), standard) })?;
    }
    drop(socket);
    // SAFETY: numbers only. Nothing in this process owns a descriptor above
    // standard error: the nursery holds none, and this child's was let go.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) })?;
    // SAFETY: standard input is open and, in this process, only this file's.
    Ok(unsafe { File::from_raw_fd(0) })
}

fn answer(mut socket: File) -> io::Result<()> {
    socket.write_all(&Hello::Child(Pid::this()).bytes())?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    if text.is_empty() {
        return Ok(());
    }
    let op: Op = match serde_json::from_str(&text) {
        Ok(op) => op,
        Err(error) => return writeln!(socket, "not an op of this drover: {error}"),
    };
    name_process(&op.what());
    let started = Instant::now();
    let result = perform(&op);
    let took_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    let line = serde_json::to_string(&Reply { took_us, result })?;
    // A parent that has given up no longer reads; there is nobody left to tell.
    writeln!(socket, "\n{line}")
}

/// What `ps` shows of this process; the kernel keeps 15 bytes.
fn name_process(name: &str) {
    if let Ok(name) = std::ffi::CString::new(name) {
        // A name is a help and nothing else.
        let _ = nix::sys::prctl::set_name(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_is_what_was_said() {
        for hello in [
            Hello::Child(Pid::from_raw(1)),
            Hello::Child(Pid::from_raw(4_194_304)),
            Hello::NoFork(Errno::EAGAIN),
        ] {
            assert_eq!(Hello::of(hello.bytes()), hello);
        }
    }
}

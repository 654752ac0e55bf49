//! The server of the wire without a protocol: a thread a connection, on a file
//! that is opened for direct I/O.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::{sync, uring};

/// How the file is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// By the connection's own thread, one request after the other: the fastest
    /// where the file is memory, since nothing ever waits.
    Sync,
    /// By io_uring, all requests at once: the fastest where there is a disk.
    Uring,
    /// Whichever of the two suits the file system.
    Auto,
}

/// A file that is served.
pub struct Served {
    file: Arc<File>,
    bytes: u64,
    engine: Engine,
}

impl Served {
    /// Opens a file for direct I/O.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn open(path: &Path, engine: Engine) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_DIRECT.bits())
            .open(path)
            .with_context(|| format!("open {} for direct I/O", path.display()))?;
        let bytes = file.metadata()?.len();
        let memory = fstatfs(&file).context("fstatfs")?.filesystem_type() == TMPFS_MAGIC;
        let engine = match engine {
            Engine::Auto if memory => Engine::Sync,
            Engine::Auto => Engine::Uring,
            chosen => chosen,
        };
        Ok(Self {
            file: Arc::new(file),
            bytes,
            engine,
        })
    }

    /// Serves one connection until the client closes it.
    ///
    /// # Errors
    /// The socket's, the file's, or a request that makes no sense.
    pub fn serve(&self, socket: &TcpStream) -> Result<()> {
        match self.engine {
            Engine::Uring => uring::serve(&self.file, self.bytes, socket),
            Engine::Sync | Engine::Auto => sync::serve(&self.file, self.bytes, socket),
        }
    }
}

/// A buffer as direct I/O wants it: aligned to 4096 bytes.
pub struct Aligned {
    bytes: Vec<u8>,
    begin: usize,
    len: usize,
}

impl Aligned {
    /// One of `len` bytes, zeroed.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let begin = bytes.as_ptr().align_offset(4096);
        Self { bytes, begin, len }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.begin..self.begin + self.len]
    }

    /// Its bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.begin..self.begin + self.len]
    }
}

/// Sends all slices, however long that takes.
pub fn send(mut socket: &TcpStream, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !slices.is_empty() {
        // Linux takes 1024 at once, and the standard library cuts what is more.
        let sent = socket.write_vectored(slices)?;
        IoSlice::advance_slices(&mut slices, sent);
    }
    Ok(())
}

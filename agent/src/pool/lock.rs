//! The lock that makes one process the owner of a pool.
//!
//! It is a `flock` on an open file. The kernel gives it up when the last
//! reference to that open file is gone, and every thread of the process holds
//! one until the thread itself has ended: a thread that is still inside a
//! write when its process is killed keeps the pool locked until that write
//! has landed. So who gets the lock knows that nothing of its predecessor is
//! on the way to the disk. I/O that outlives its threads (an io_uring) must
//! hold the file too: register [`PoolLock::file`] with the ring.
//!
//! The file is never unlocked by a call, only closed, and it is close-on-exec:
//! a child that runs a tool does not hold the pool.

use std::fs::{File, TryLockError};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use super::error::PoolError;
use super::files::Root;

const NAME: &str = "lock";
const RETRY: Duration = Duration::from_millis(50);

/// A pool's lock, held until the last clone of [`PoolLock::file`] is dropped.
#[derive(Debug, Clone)]
pub struct PoolLock {
    file: Arc<File>,
}

impl PoolLock {
    /// Takes the lock, waiting at most `wait` for another owner's end.
    pub fn take(root: &Root, wait: Duration) -> Result<Self, PoolError> {
        let path = root.path(Path::new(NAME));
        let file = root.file(Path::new(NAME), OFlag::O_RDWR | OFlag::O_CREAT)?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    return Err(PoolError::call("flock", &path)(error));
                }
            }
            let waited = begun.elapsed();
            if waited >= wait {
                return Err(PoolError::Held {
                    dir: root.dir().to_owned(),
                    holder: holder(&file),
                    waited,
                });
            }
            std::thread::sleep(RETRY.min(wait - waited));
        }
        // Whose it is, for people. A full file system may keep this from being
        // written the first time, and that must not keep the pool closed.
        let text = format!("{:<20}\n", std::process::id());
        if let Err(error) = file.write_all_at(text.as_bytes(), 0) {
            tracing::warn!(path = %path.display(), %error, "the owner's pid was not noted in the lock file");
        }
        Ok(Self {
            file: Arc::new(file),
        })
    }

    /// The open file that is the lock: whatever may still write when its
    /// caller has gone must hold a clone.
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }
}

/// Who holds the lock, as far as its file tells.
fn holder(mut file: &File) -> String {
    let mut text = String::new();
    let read = file.read_to_string(&mut text);
    let pid = read.ok().and_then(|_| text.trim().parse::<u32>().ok());
    let Some(pid) = pid else {
        return "a process that has not noted its pid".to_owned();
    };
    if pid == std::process::id() {
        return format!("this very process (pid {pid})");
    }
    let comm: PathBuf = Path::new("/proc").join(pid.to_string()).join("comm");
    match std::fs::read_to_string(comm) {
        Ok(name) => format!("pid {pid} ({})", name.trim()),
        Err(_) => format!("what is left of pid {pid}, whose last writes are still on the way"),
    }
}

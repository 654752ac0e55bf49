//! The unix sockets that services listen on: taken only from the dead, given
//! back at the end.
//!
//! A lock on a file beside the socket (`.NAME.lock`) tells a living drover from
//! a dead one, so two that start at once cannot take the socket from each
//! other. A server that is not drover is known by its answering. Anything else
//! at the path than a socket is left alone and named.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::net::{UnixListener, UnixStream};
use tracing::warn;

use super::CsiError;

/// Linux' bound on a socket's path (sun_path, with the closing zero byte).
const PATH_BYTES: usize = 107;
/// How long a server behind an old socket has to answer.
const ANSWER: Duration = Duration::from_secs(1);

/// A socket file that is ours. It goes when this is dropped, unless another
/// has taken its place.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    /// Device and inode of the socket file.
    file: (u64, u64),
    _lock: Flock<File>,
}

impl Claim {
    /// Whether the socket file still stands at its path.
    pub fn stands(&self) -> bool {
        identity(&self.path).is_some_and(|file| file == self.file)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.stands()
            && let Err(error) = fs::remove_file(&self.path)
        {
            warn!(path = %self.path.display(), %error, "the socket file stays behind");
        }
    }
}

/// A file's device and inode; none: it is not there.
pub fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path)
        .ok()
        .map(|found| (found.dev(), found.ino()))
}

/// A socket's path without the `unix://` that gRPC writes before it.
pub fn bare(path: &Path) -> &Path {
    // Stripped as text: "unix:///a" and "unix:/a" are both in use.
    let text = path.to_str().and_then(|text| {
        text.strip_prefix("unix://")
            .or_else(|| text.strip_prefix("unix:"))
    });
    text.map_or(path, Path::new)
}

/// Listens at `path`, for root alone. Makes the folder if it is not there.
pub async fn listen(path: &Path) -> Result<(UnixListener, Claim), CsiError> {
    let failed = |call: &'static str, path: &Path, source: std::io::Error| CsiError::Socket {
        call,
        path: path.to_owned(),
        source,
    };
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(CsiError::Path {
            path: path.to_owned(),
            why: "names no file",
        });
    };
    if !path.is_absolute() {
        return Err(CsiError::Path {
            path: path.to_owned(),
            why: "is not an absolute path",
        });
    }
    if path.as_os_str().len() > PATH_BYTES {
        return Err(CsiError::Path {
            path: path.to_owned(),
            why: "is longer than the 107 bytes that a unix socket's path may have",
        });
    }
    fs::create_dir_all(folder).map_err(|e| failed("mkdir", folder, e))?;
    let lock = folder.join(format!(".{}.lock", name.to_string_lossy()));
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock)
        .map_err(|e| failed("open", &lock, e))?;
    let held =
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => CsiError::InUse(path.to_owned()),
            errno => failed("flock", &lock, errno.into()),
        })?;
    clear(path).await?;
    let listener = UnixListener::bind(path).map_err(|e| failed("bind", path, e))?;
    let file = identity(path).ok_or_else(|| failed("stat", path, ErrorKind::NotFound.into()))?;
    let claim = Claim {
        path: path.to_owned(),
        file,
        _lock: held,
    };
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(|e| failed("chmod", path, e))?;
    Ok((listener, claim))
}

/// Removes a socket file that nobody answers behind.
async fn clear(path: &Path) -> Result<(), CsiError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(CsiError::Socket {
                call: "stat",
                path: path.to_owned(),
                source,
            });
        }
        Ok(found) if !found.file_type().is_socket() => {
            return Err(CsiError::Path {
                path: path.to_owned(),
                why: "is there already and is no socket: remove it, or name another path",
            });
        }
        Ok(_) => {}
    }
    match tokio::time::timeout(ANSWER, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|source| CsiError::Socket {
                call: "unlink",
                path: path.to_owned(),
                source,
            }),
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => Ok(()),
        Ok(Err(source)) => Err(CsiError::Socket {
            call: "connect",
            path: path.to_owned(),
            source,
        }),
        // It answers, or its queue is full: somebody lives there.
        Ok(Ok(_)) | Err(_) => Err(CsiError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;

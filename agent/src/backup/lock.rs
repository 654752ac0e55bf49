//! The restic format's locks: what keeps a stock `restic prune` or `forget`
//! from deleting packs that a running backup is about to refer to.
//!
//! rustic_core writes none. A lock is an encrypted JSON file in `locks/`; it
//! counts for half an hour and so is written anew every few minutes, the new
//! one before the old one goes, as restic does. Ours is shared: other backups
//! may run beside it. An exclusive one of somebody else is respected.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use aes256ctr_poly1305aes::aead::Aead;
use aes256ctr_poly1305aes::{Aes256CtrPoly1305Aes, Key};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use rustic_core::jiff::{Timestamp, ToSpan};
use rustic_core::repofile::MasterKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::BackupError;

/// How often a lock is written anew (restic's own interval).
const REFRESH: Duration = Duration::from_secs(5 * 60);

/// A lock older than this is stale to restic, and to us.
const STALE_MINUTES: i64 = 30;

/// Who our locks say they are of.
const USER: &str = "drover";

/// A lock's content; restic's field names.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    time: Timestamp,
    exclusive: bool,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    pid: i32,
}

/// What encrypts and decrypts the repository's files.
#[derive(Clone)]
struct Cipher(Arc<Aes256CtrPoly1305Aes>);

impl Cipher {
    fn new(key: &MasterKey) -> Option<Self> {
        let bytes = [&key.encrypt[..], &key.mac.k[..], &key.mac.r[..]].concat();
        let key = Key::from_exact_iter(bytes)?;
        Some(Self(Arc::new(Aes256CtrPoly1305Aes::new(&key))))
    }

    /// A file's bytes: nonce, ciphertext, tag.
    fn seal(&self, plain: &[u8]) -> io::Result<Vec<u8>> {
        let mut nonce = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut nonce)?;
        let sealed = self.0.encrypt(&nonce.into(), plain);
        let sealed = sealed.map_err(|_| io::Error::other("a lock cannot be encrypted"))?;
        Ok([&nonce[..], &sealed].concat())
    }

    fn open(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, rest) = sealed.split_first_chunk::<16>()?;
        self.0.decrypt(&(*nonce).into(), rest).ok()
    }
}

/// A shared lock on a repository, kept fresh by a thread until dropped.
pub(super) struct Lock {
    file: Arc<Mutex<PathBuf>>,
    end: Option<mpsc::Sender<()>>,
    refresher: Option<JoinHandle<()>>,
}

impl Lock {
    /// Locks the repository, unless somebody holds it exclusively.
    pub(super) fn take(repo: &Path, key: &MasterKey) -> Result<Self, BackupError> {
        let failed = |doing: &str, reason: String| BackupError::Repository {
            repo: repo.to_owned(),
            doing: doing.into(),
            reason,
        };
        let folder = repo.join("locks");
        let cipher = Cipher::new(key)
            .ok_or_else(|| failed("lock", "its master key has a strange length".into()))?;
        let io_failed = |error: io::Error| failed("lock", error.to_string());
        fs::create_dir_all(&folder).map_err(io_failed)?;
        let respect = |by: Option<String>| match by {
            Some(by) => Err(BackupError::Locked {
                repo: repo.to_owned(),
                by,
            }),
            None => Ok(()),
        };
        respect(exclusive(&folder, &cipher).map_err(io_failed)?)?;
        let file = write(&folder, &cipher).map_err(io_failed)?;
        // Both sides write first and look again: one of two always sees the other.
        if let Err(error) = exclusive(&folder, &cipher)
            .map_err(io_failed)
            .and_then(respect)
        {
            fs::remove_file(&file).map_err(io_failed)?;
            return Err(error);
        }
        let file = Arc::new(Mutex::new(file));
        let (end, ended) = mpsc::channel();
        let held = file.clone();
        let refresher = std::thread::spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(REFRESH) {
                let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
                // Who removed it counts us as gone; `held` must go on to say so.
                if !held.exists() {
                    break;
                }
                // A refresh that fails is tried again; the lock counts six times as long.
                if let Ok(fresh) = write(&folder, &cipher) {
                    let old = std::mem::replace(&mut *held, fresh);
                    let _ = fs::remove_file(old);
                }
            }
        });
        Ok(Self {
            file,
            end: Some(end),
            refresher: Some(refresher),
        })
    }

    /// Whether the lock's file is still there. If somebody removed it, a prune
    /// may have run beside us.
    pub(super) fn held(&self) -> bool {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.exists()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.end.take();
        if let Some(refresher) = self.refresher.take() {
            let _ = refresher.join();
        }
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = fs::remove_file(&*file);
    }
}

/// Writes a lock of this process: whole and durable before it has its name.
fn write(folder: &Path, cipher: &Cipher) -> io::Result<PathBuf> {
    let content = Content {
        time: Timestamp::now(),
        exclusive: false,
        hostname: nix::unistd::gethostname()?.to_string_lossy().into_owned(),
        username: USER.into(),
        pid: std::process::id().cast_signed(),
    };
    let sealed = cipher.seal(&serde_json::to_vec(&content)?)?;
    let name: String = Sha256::digest(&sealed)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let (path, temporary) = (folder.join(&name), folder.join(format!("{name}-tmp-")));
    let mut file = File::create(&temporary)?;
    file.write_all(&sealed)?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    File::open(folder)?.sync_all()?;
    Ok(path)
}

/// Who holds the repository exclusively, if anybody does.
///
/// Locks that dead workers of this host left behind are cleared away.
fn exclusive(folder: &Path, cipher: &Cipher) -> io::Result<Option<String>> {
    let fresh_since = Timestamp::now() - STALE_MINUTES.minutes();
    let host = nix::unistd::gethostname()?.to_string_lossy().into_owned();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.len() != 64 {
            continue;
        }
        let sealed = match fs::read(&path) {
            Ok(sealed) => sealed,
            // It was let go meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let plain = cipher.open(&sealed).and_then(unpack);
        let Some(lock) = plain.and_then(|plain| serde_json::from_slice::<Content>(&plain).ok())
        else {
            return Ok(Some(format!("a lock that cannot be read ({name})")));
        };
        let dead = lock.username == USER
            && lock.hostname == host
            && kill(Pid::from_raw(lock.pid), None) == Err(Errno::ESRCH);
        if dead {
            let _ = fs::remove_file(&path);
            continue;
        }
        if lock.exclusive && lock.time > fresh_since {
            return Ok(Some(format!(
                "{}@{} (process {}, since {})",
                lock.username, lock.hostname, lock.pid, lock.time
            )));
        }
    }
    Ok(None)
}

/// A file's content: plain JSON, or in a version 2 repository 2 and zstd.
fn unpack(plain: Vec<u8>) -> Option<Vec<u8>> {
    match plain.split_first() {
        Some((2, packed)) => zstd::decode_all(packed).ok(),
        _ => Some(plain),
    }
}

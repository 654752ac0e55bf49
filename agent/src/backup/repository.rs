//! Opening and making a restic repository, with errors that say what is wrong.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use rustic_backend::LocalBackend;
use rustic_core::repofile::{Chunker, MasterKey, SnapshotFile};
use rustic_core::{
    ConfigOptions, Credentials, FileType, Id, IndexedFullStatus, KeyOptions, OpenStatus,
    ReadBackend, Repository, RepositoryBackends, RepositoryOptions, RusticError, RusticResult,
};

use super::error::BackupError;
use super::lock::Lock;
use super::sink::{Meter, Sink};
use super::source::Stop;
use super::spec::RepositorySpec;

/// How often a listing that failed is repeated, and after how long.
const LISTINGS: u32 = 10;
const BETWEEN_LISTINGS: Duration = Duration::from_millis(50);

/// What a repository is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To write a backup: one that is not there is made, and it is locked.
    Backup,
    /// To remove slices: it is locked.
    Forget,
    /// To read a backup: it is locked, unless it cannot be written to.
    Restore,
    /// To read the list: a lock has no use.
    List,
}

/// An open repository, locked against those who would delete from it.
pub(super) struct Opened {
    spec: RepositorySpec,
    sink: Arc<Sink>,
    /// What was written.
    pub(super) meter: Arc<Meter>,
    /// Held until dropped.
    lock: Option<Lock>,
}

/// Opens the repository, or makes it.
pub(super) fn open(
    spec: &RepositorySpec,
    purpose: Purpose,
    stop: &Stop,
) -> Result<(Opened, Repository<OpenStatus>), BackupError> {
    let path = &spec.path;
    let text = match path.to_str() {
        Some(text) if path.is_absolute() => text,
        _ => {
            return Err(BackupError::Invalid {
                why: format!(
                    "repository {}: an absolute path in UTF-8 is needed",
                    path.display()
                ),
            });
        }
    };
    let doing = |doing: &str| Doing {
        spec,
        doing: doing.into(),
    };
    let turn = match purpose {
        Purpose::Backup => turn_to_make(path).map_err(|error| BackupError::Repository {
            repo: path.clone(),
            doing: "make the folder".into(),
            reason: error.to_string(),
        })?,
        Purpose::Forget | Purpose::Restore | Purpose::List => None,
    };
    let exists = look(spec, purpose)?;
    let meter = Arc::new(Meter::default());
    let local =
        LocalBackend::new(text, Vec::new()).map_err(|error| doing("open").failed(&error))?;
    let sink = Sink::new(local, path, spec.limit_upload, meter.clone(), stop.clone());
    let sink = Arc::new(sink);
    let backends = RepositoryBackends::new(sink.clone(), None);
    let options = RepositoryOptions::default().no_cache(true);
    let closed =
        Repository::new(&options, &backends).map_err(|error| doing("open").failed(&error))?;
    let credentials = Credentials::password(spec.password.reveal());
    let repo = if exists {
        closed
            .open(&credentials)
            .map_err(|error| match error.is_incorrect_password() {
                true => BackupError::WrongPassword { repo: path.clone() },
                false => doing("open").failed(&error),
            })?
    } else {
        // Blocks change in place, so cutting by content finds nothing that
        // cutting at fixed places does not, and costs more.
        let config = ConfigOptions::default().set_chunker(Chunker::FixedSize);
        closed
            .init(&credentials, &KeyOptions::default(), &config)
            .map_err(|error| doing("create").failed(&error))?
    };
    drop(turn);
    let key: MasterKey = repo.key();
    let lock = match purpose {
        Purpose::List => None,
        Purpose::Restore if !writable(path) => None,
        Purpose::Restore | Purpose::Backup | Purpose::Forget => Some(Lock::take(path, &key)?),
    };
    let opened = Opened {
        spec: spec.clone(),
        sink,
        meter,
        lock,
    };
    Ok((opened, repo))
}

impl Opened {
    /// Names what is being done, for an error.
    pub(super) fn doing(&self, doing: impl Into<String>) -> Doing<'_> {
        Doing {
            spec: &self.spec,
            doing: doing.into(),
        }
    }

    /// The error of a backup that is not whole.
    pub(super) fn not_whole(&self, what: &str, why: impl Into<String>) -> BackupError {
        BackupError::NotWhole {
            repo: self.spec.path.clone(),
            what: what.into(),
            why: why.into(),
        }
    }

    /// The error of a backup that is not there.
    pub(super) fn no_backup(&self, wanted: impl Into<String>) -> BackupError {
        BackupError::NoBackup {
            repo: self.spec.path.clone(),
            wanted: wanted.into(),
        }
    }

    /// Whether the lock that was taken is still there.
    pub(super) fn locked(&self) -> bool {
        self.lock.as_ref().is_some_and(Lock::held)
    }

    /// Removes half-written packs that their writers will never finish.
    pub(super) fn sweep(&self) {
        self.sink.sweep();
    }

    /// Every pack in the repository, and its length.
    pub(super) fn packs(&self) -> RusticResult<Vec<(Id, u32)>> {
        self.sink.list_with_size(FileType::Pack)
    }

    /// Every snapshot. Other streams remove their slices meanwhile, and one that
    /// went between being listed and being read fails the listing: it is
    /// repeated a few times.
    pub(super) fn snapshots<S: rustic_core::Open>(
        &self,
        repo: &Repository<S>,
    ) -> Result<Vec<SnapshotFile>, BackupError> {
        for _ in 0..LISTINGS {
            if let Ok(snapshots) = repo.get_all_snapshots() {
                return Ok(snapshots);
            }
            std::thread::sleep(BETWEEN_LISTINGS);
        }
        repo.get_all_snapshots()
            .map_err(|error| self.doing("list snapshots").failed(&error))
    }

    /// Reads the whole index.
    pub(super) fn index(
        &self,
        repo: Repository<OpenStatus>,
    ) -> Result<Repository<IndexedFullStatus>, BackupError> {
        repo.to_indexed()
            .map_err(|error| self.doing("read the index").failed(&error))
    }
}

/// A call on the repository, for its error.
pub(super) struct Doing<'a> {
    spec: &'a RepositorySpec,
    doing: String,
}

impl Doing<'_> {
    /// The error of this call.
    pub(super) fn failed(&self, error: &RusticError) -> BackupError {
        BackupError::Repository {
            repo: self.spec.path.clone(),
            doing: self.doing.clone(),
            reason: error.display_log().trim_start_matches("Error: ").to_owned(),
        }
    }
}

/// Waits for the turn to make a repository that is not there yet: two streams
/// that made it at once would each write with a master key of its own. None:
/// it is there, or its file system has no locks, or it is no folder.
fn turn_to_make(path: &Path) -> io::Result<Option<Flock<File>>> {
    if path.join("config").exists() {
        return Ok(None);
    }
    if !path.exists() {
        std::fs::create_dir_all(path)?;
    }
    let Ok(folder) = File::open(path) else {
        return Ok(None);
    };
    Ok(Flock::lock(folder, FlockArg::LockExclusive).ok())
}

/// Whether there is a repository. A folder that holds anything else is refused;
/// one that was left half made, with nothing stored in it yet, is cleared of its keys.
fn look(spec: &RepositorySpec, purpose: Purpose) -> Result<bool, BackupError> {
    let path = &spec.path;
    let failed = |doing: &str, error: io::Error| BackupError::Repository {
        repo: path.clone(),
        doing: doing.into(),
        reason: error.to_string(),
    };
    let not = |why: String| BackupError::NotARepository {
        repo: path.clone(),
        why,
    };
    let absent = || BackupError::NoRepository { repo: path.clone() };
    match std::fs::metadata(path) {
        Ok(meta) if !meta.is_dir() => return Err(not("it is not a folder".into())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match purpose {
                Purpose::Backup => Ok(false),
                Purpose::Forget | Purpose::Restore | Purpose::List => Err(absent()),
            };
        }
        Err(error) => return Err(failed("stat", error)),
    }
    if path
        .join("config")
        .try_exists()
        .map_err(|e| failed("stat config", e))?
    {
        return Ok(true);
    }
    let entries = std::fs::read_dir(path).map_err(|error| failed("list", error))?;
    for entry in entries {
        let name = entry.map_err(|error| failed("list", error))?.file_name();
        let name = name.to_string_lossy().into_owned();
        let known = [
            "data",
            "index",
            "keys",
            "locks",
            "snapshots",
            "config-tmp-",
            "lost+found",
        ];
        if !known.contains(&name.as_str()) {
            return Err(not(format!(
                "it has no config file, and holds {name}; give an empty or a new folder"
            )));
        }
    }
    if purpose != Purpose::Backup {
        return Err(not("it has no config file".into()));
    }
    for stored in ["data", "index", "snapshots"] {
        if let Some(file) = first_file(&path.join(stored)).map_err(|e| failed("list", e))? {
            return Err(not(format!(
                "its config file is missing, but {file} is there"
            )));
        }
    }
    clear_keys(&path.join("keys")).map_err(|error| failed("clear half-made keys", error))?;
    Ok(false)
}

/// Whether the repository's file system and rights let a lock be written.
fn writable(path: &Path) -> bool {
    nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).is_ok()
}

/// A regular file somewhere below a folder, one level of folders deep.
fn first_file(folder: &Path) -> io::Result<Option<String>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(file) = first_file(&entry.path())? {
                return Ok(Some(file));
            }
        } else {
            return Ok(Some(entry.path().display().to_string()));
        }
    }
    Ok(None)
}

/// A key without a config opens nothing, and a second one beside it with the
/// same password would open something else.
fn clear_keys(keys: &Path) -> io::Result<()> {
    match std::fs::read_dir(keys) {
        Ok(entries) => entries
            .into_iter()
            .try_for_each(|entry| std::fs::remove_file(entry?.path())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

//! The state of the control plane in one redb file: the default on one machine.
//!
//! It owns the file. A change is one transaction that is synced before the
//! call returns. Versions come from a counter kept in the same file and changed
//! in the same transaction, so no version is ever used again, not even by a
//! record that was deleted and made anew.
//!
//! It refuses a file that another process has open, a file that is no store of
//! drover's, and an empty or truncated file: a control plane that began afresh
//! by itself would believe that nobody holds anything. A new store is built
//! under another name and linked into place whole, so that an empty file at
//! the path is never the trace of a beginning.
//!
//! Disks hang. Every call has a deadline and answers `Unavailable` when it
//! passes; the call itself goes on and may still take effect, so whoever sees
//! `Unavailable` must read again before deciding. Calls that hang hold a permit,
//! so that they cannot use up the runtime's threads.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError,
};
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{Key, Kind, StateStore, StoreError, Stored, Version};

/// How long a call may take before its caller is told `Unavailable`.
const DEADLINE: Duration = Duration::from_secs(5);
/// Reads that may be under way at once.
const READERS: usize = 16;
/// What the file says it is.
const FORMAT: &str = "drover state 1";

/// Version and bytes by id.
type Records = TableDefinition<'static, &'static str, (u64, &'static [u8])>;

const ABOUT: TableDefinition<'static, &str, &str> = TableDefinition::new("about");
const COUNTERS: TableDefinition<'static, &str, u64> = TableDefinition::new("counters");
const KINDS: [Kind; 5] = [
    Kind::Volume,
    Kind::Snapshot,
    Kind::Node,
    Kind::Receipt,
    Kind::Note,
];

fn table(kind: Kind) -> Records {
    TableDefinition::new(match kind {
        Kind::Volume => "volume",
        Kind::Snapshot => "snapshot",
        Kind::Node => "node",
        Kind::Receipt => "receipt",
        Kind::Note => "note",
    })
}

/// A [`StateStore`] in one file.
pub struct EmbeddedStore {
    inner: Arc<Inner>,
    writers: Arc<Semaphore>,
    readers: Arc<Semaphore>,
    deadline: Duration,
}

struct Inner {
    path: PathBuf,
    database: Database,
}

impl EmbeddedStore {
    /// Opens the store at `path`, or makes it when nothing is there.
    ///
    /// Blocks on the disk; call it before serving.
    ///
    /// # Errors
    /// `Unavailable`, with the path and the reason: in use by another process,
    /// empty, truncated, not a store, or a failed call.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let database = match fs::metadata(path) {
            Ok(found) if found.is_file() => open_existing(path, found.len())?,
            Ok(_) => return Err(failed("open", path, "it is not a regular file")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => make_new(path)?,
            Err(error) => return Err(failed("stat", path, error)),
        };
        Ok(Self::over(path, database, DEADLINE))
    }

    fn over(path: &Path, database: Database, deadline: Duration) -> Self {
        Self {
            inner: Arc::new(Inner {
                path: path.to_owned(),
                database,
            }),
            writers: Arc::new(Semaphore::new(1)),
            readers: Arc::new(Semaphore::new(READERS)),
            deadline,
        }
    }

    /// Runs `work` on a blocking thread; the caller waits no longer than the deadline.
    async fn run<T: Send + 'static>(
        &self,
        what: String,
        permits: &Arc<Semaphore>,
        work: impl FnOnce(&Inner) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permits = Arc::clone(permits);
        let inner = Arc::clone(&self.inner);
        let said = what.clone();
        let call = async move {
            let permit = permits.acquire_owned().await.map_err(|error| {
                StoreError::Unavailable(format!("{said}: the store is closed: {error}"))
            })?;
            let done = tokio::task::spawn_blocking(move || {
                // The permit goes with the work: a hung call keeps it.
                let _permit = permit;
                work(&inner).map_err(|fault| fault.said_of(&said, &inner.path))
            });
            match done.await {
                Ok(result) => result,
                Err(error) => Err(StoreError::Unavailable(format!("the call failed: {error}"))),
            }
        };
        match tokio::time::timeout(self.deadline, call).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Unavailable(format!(
                "{what} in {}: no end within {:?}; is its disk hung?",
                self.inner.path.display(),
                self.deadline
            ))),
        }
    }
}

/// What went wrong inside a call.
enum Fault {
    Conflict(Key),
    Redb(redb::Error),
}

impl<E: Into<redb::Error>> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Redb(error.into())
    }
}

impl Fault {
    fn said_of(self, what: &str, path: &Path) -> StoreError {
        match self {
            Self::Conflict(key) => StoreError::Conflict(key),
            Self::Redb(error) => {
                StoreError::Unavailable(format!("{what} in {}: {error}", path.display()))
            }
        }
    }
}

fn failed(call: &str, path: &Path, why: impl std::fmt::Display) -> StoreError {
    StoreError::Unavailable(format!("{call} {}: {why}", path.display()))
}

fn refused(path: &Path, error: &DatabaseError) -> StoreError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => failed(
            "open",
            path,
            "another process uses this store; stop it, or give this one a path of its own",
        ),
        other => failed(
            "open",
            path,
            format!(
                "not a whole drover store ({other}); put back a good copy, or choose another path"
            ),
        ),
    }
}

fn open_existing(path: &Path, length: u64) -> Result<Database, StoreError> {
    if length == 0 {
        return Err(failed(
            "open",
            path,
            "the file is empty, so the state it held is gone; put back a good copy, or remove it to begin afresh",
        ));
    }
    // redb trusts some of what it reads; a damaged file must end in an error
    // that names it, not in a panic.
    let opened = std::panic::catch_unwind(|| Builder::new().open(path));
    let database = match opened {
        Ok(Ok(database)) => database,
        Ok(Err(error)) => return Err(refused(path, &error)),
        Err(_) => {
            return Err(failed(
                "open",
                path,
                "the file is damaged; put back a good copy, or choose another path",
            ));
        }
    };
    let format = || -> Result<Option<String>, redb::Error> {
        let read = database.begin_read()?;
        match read.open_table(ABOUT) {
            Ok(about) => Ok(about.get("format")?.map(|text| text.value().to_owned())),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    };
    match format() {
        Ok(Some(text)) if text == FORMAT => Ok(database),
        Ok(Some(text)) => Err(failed(
            "open",
            path,
            format!("it is {text:?}, and this version reads {FORMAT:?}"),
        )),
        Ok(None) => Err(failed("open", path, "a redb file, but not drover's")),
        Err(error) => Err(failed("read", path, error)),
    }
}

fn make_new(path: &Path) -> Result<Database, StoreError> {
    let name = path
        .file_name()
        .ok_or_else(|| failed("create", path, "no file name"))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let fresh = folder.join(format!(
        ".{}.{}.new",
        name.to_string_lossy(),
        Uuid::new_v4()
    ));
    let made = build(&fresh).and_then(|database| {
        // Linking fails where another process was first; renaming would not.
        fs::hard_link(&fresh, path).map_err(|error| failed("create", path, error))?;
        Ok(database)
    });
    let removed = fs::remove_file(&fresh);
    let database = made?;
    removed.map_err(|error| failed("unlink", &fresh, error))?;
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| failed("sync", folder, error))?;
    Ok(database)
}

fn build(path: &Path) -> Result<Database, StoreError> {
    let database = Builder::new()
        .create(path)
        .map_err(|error| failed("create", path, error))?;
    begin(&database).map_err(|error| failed("write", path, error))?;
    Ok(database)
}

/// Writes what a store holds from the first moment: every table, and what it is.
fn begin(database: &Database) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    write.open_table(ABOUT)?.insert("format", FORMAT)?;
    write.open_table(COUNTERS)?.insert("version", 0)?;
    for kind in KINDS {
        write.open_table(table(kind))?;
    }
    write.commit()?;
    Ok(())
}

fn named(key: &Key) -> Result<(), StoreError> {
    if key.id.is_empty() {
        return Err(StoreError::Unavailable(format!(
            "record {key}: its id is empty"
        )));
    }
    Ok(())
}

#[async_trait]
impl StateStore for EmbeddedStore {
    async fn get(&self, key: &Key) -> Result<Option<Stored>, StoreError> {
        named(key)?;
        let key = key.clone();
        self.run(format!("read of {key}"), &self.readers, move |inner| {
            let read = inner.database.begin_read()?;
            let records = read.open_table(table(key.kind))?;
            Ok(records
                .get(key.id.as_str())?
                .map(|found| stored(found.value())))
        })
        .await
    }

    async fn put(
        &self,
        key: &Key,
        expected: Option<Version>,
        bytes: Vec<u8>,
    ) -> Result<Version, StoreError> {
        named(key)?;
        let key = key.clone();
        self.run(format!("write of {key}"), &self.writers, move |inner| {
            let write = inner.database.begin_write()?;
            let version = {
                let mut records = write.open_table(table(key.kind))?;
                let found = records
                    .get(key.id.as_str())?
                    .map(|found| Version(found.value().0));
                if found != expected {
                    return Err(Fault::Conflict(key));
                }
                let mut counters = write.open_table(COUNTERS)?;
                let last = counters.get("version")?.map_or(0, |last| last.value());
                let version = last + 1;
                counters.insert("version", version)?;
                records.insert(key.id.as_str(), (version, bytes.as_slice()))?;
                version
            };
            write.commit()?;
            Ok(Version(version))
        })
        .await
    }

    async fn delete(&self, key: &Key, expected: Version) -> Result<(), StoreError> {
        named(key)?;
        let key = key.clone();
        self.run(format!("removal of {key}"), &self.writers, move |inner| {
            let write = inner.database.begin_write()?;
            {
                let mut records = write.open_table(table(key.kind))?;
                let found = records
                    .get(key.id.as_str())?
                    .map(|found| Version(found.value().0));
                if found != Some(expected) {
                    return Err(Fault::Conflict(key));
                }
                records.remove(key.id.as_str())?;
            }
            write.commit()?;
            Ok(())
        })
        .await
    }

    async fn list(&self, kind: Kind) -> Result<Vec<(Key, Stored)>, StoreError> {
        self.run(format!("list of {kind:?}"), &self.readers, move |inner| {
            let read = inner.database.begin_read()?;
            let records = read.open_table(table(kind))?;
            let mut all = Vec::new();
            for entry in records.iter()? {
                let (id, found) = entry?;
                let id = id.value().to_owned();
                all.push((Key { kind, id }, stored(found.value())));
            }
            Ok(all)
        })
        .await
    }
}

fn stored((version, bytes): (u64, &[u8])) -> Stored {
    Stored {
        version: Version(version),
        bytes: bytes.to_owned(),
    }
}

#[cfg(test)]
#[path = "embedded_tests.rs"]
mod tests;

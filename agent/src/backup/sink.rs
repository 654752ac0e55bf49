//! The repository's folder as rustic_core writes it: every file counted,
//! paced, and durable before it counts.
//!
//! rustic_backend's own local backend syncs a file before it renames it but
//! not the folder it stands in, and answers an unreadable folder with an empty
//! list, which would look like a repository that holds nothing. Both are made
//! good here.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustic_backend::LocalBackend;
use rustic_core::{
    BytesList, ErrorKind, FileType, Id, ReadBackend, RusticError, RusticResult, WriteBackend,
};

use super::source::Stop;

/// How long a paced upload sleeps before it looks whether it was stopped.
const NAP: Duration = Duration::from_millis(50);

/// A half-written file this old has no writer any more.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// What was written, for progress and for proofs.
#[derive(Debug, Default)]
pub(super) struct Meter {
    /// Bytes written, of all files.
    pub(super) uploaded: AtomicU64,
    /// Of those, when the last cursor was committed.
    pub(super) committed: AtomicU64,
    snapshots: Mutex<Vec<Id>>,
}

impl Meter {
    /// Everything written so far is held by a cursor now.
    pub(super) fn commit(&self) {
        let uploaded = self.uploaded.load(Ordering::SeqCst);
        self.committed.store(uploaded, Ordering::SeqCst);
    }

    /// The id of the snapshot file that was written last.
    pub(super) fn last_snapshot(&self) -> Option<Id> {
        let snapshots = self.snapshots.lock();
        let snapshots = snapshots.unwrap_or_else(PoisonError::into_inner);
        snapshots.last().copied()
    }
}

/// Lets bytes pass at a rate. Once stopped it holds nothing up: what is left of
/// a slice goes out at once, so that it need not be uploaded again.
#[derive(Debug)]
struct Pace {
    bytes_per_second: u64,
    free_at: Mutex<Instant>,
}

impl Pace {
    fn pass(&self, bytes: u64, stop: &Stop) {
        let took = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = (*free_at).max(Instant::now()) + took;
            *free_at
        };
        while !stop.asked() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

/// A local repository, written through.
#[derive(Debug)]
pub(super) struct Sink {
    inner: LocalBackend,
    root: PathBuf,
    pace: Option<Pace>,
    meter: Arc<Meter>,
    stop: Stop,
}

impl Sink {
    /// Writes to `root` at most `limit` bytes a second.
    pub(super) fn new(
        inner: LocalBackend,
        root: &Path,
        limit: Option<u64>,
        meter: Arc<Meter>,
        stop: Stop,
    ) -> Self {
        Self {
            inner,
            root: root.to_owned(),
            pace: limit.map(|bytes_per_second| Pace {
                bytes_per_second: bytes_per_second.max(1),
                free_at: Mutex::new(Instant::now()),
            }),
            meter,
            stop,
        }
    }

    /// The folder that a file of this kind stands in.
    fn folder(&self, tpe: FileType, id: &Id) -> PathBuf {
        match tpe {
            FileType::Config => self.root.clone(),
            FileType::Pack => self.root.join("data").join(&id.to_hex()[..2]),
            other => self.root.join(other.dirname()),
        }
    }

    /// Removes files that a writer began and left for longer than any writer
    /// takes. What cannot be removed is left: it is only room.
    pub(super) fn sweep(&self) {
        let folders = std::fs::read_dir(self.root.join("data"));
        let files = folders
            .into_iter()
            .flatten()
            .filter_map(|folder| std::fs::read_dir(folder.ok()?.path()).ok())
            .flatten()
            .flatten();
        for file in files.filter(|f| f.file_name().to_string_lossy().ends_with("-tmp-")) {
            let age = file
                .metadata()
                .and_then(|meta| meta.modified())
                .map(|modified| modified.elapsed().unwrap_or_default());
            if age.is_ok_and(|age| age > ABANDONED) {
                let _ = std::fs::remove_file(file.path());
            }
        }
    }

    /// Fails where the local backend would answer with an empty or short list.
    fn must_list(&self, tpe: FileType) -> RusticResult<()> {
        let folder = match tpe {
            FileType::Config => return Ok(()),
            other => self.root.join(other.dirname()),
        };
        let listed = std::fs::read_dir(&folder).and_then(|entries| {
            for entry in entries {
                let entry = entry?;
                if tpe == FileType::Pack && entry.file_type()?.is_dir() {
                    std::fs::read_dir(entry.path())?;
                }
            }
            Ok(())
        });
        listed.map_err(|error| failed("list", &folder, error))
    }
}

fn failed(call: &str, path: &Path, error: io::Error) -> Box<RusticError> {
    let what = format!("{call} {}", path.display());
    RusticError::with_source(ErrorKind::Backend, what, error)
}

impl ReadBackend for Sink {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn list_with_size(&self, tpe: FileType) -> RusticResult<Vec<(Id, u32)>> {
        self.must_list(tpe)?;
        self.inner.list_with_size(tpe)
    }

    fn list(&self, tpe: FileType) -> RusticResult<Vec<Id>> {
        self.must_list(tpe)?;
        self.inner.list(tpe)
    }

    fn read_full(&self, tpe: FileType, id: &Id) -> RusticResult<Bytes> {
        self.inner.read_full(tpe, id)
    }

    fn read_partial(
        &self,
        tpe: FileType,
        id: &Id,
        cacheable: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<Bytes> {
        self.inner.read_partial(tpe, id, cacheable, offset, length)
    }

    fn warmup_path(&self, tpe: FileType, id: &Id) -> String {
        self.inner.warmup_path(tpe, id)
    }
}

impl WriteBackend for Sink {
    fn create(&self) -> RusticResult<()> {
        self.inner.create()
    }

    fn write_bytes(
        &self,
        tpe: FileType,
        id: &Id,
        cacheable: bool,
        content: BytesList,
    ) -> RusticResult<()> {
        let size = content.size() as u64;
        if let Some(pace) = &self.pace {
            pace.pass(size, &self.stop);
        }
        self.inner.write_bytes(tpe, id, cacheable, content)?;
        let folder = self.folder(tpe, id);
        File::open(&folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|error| failed("sync folder", &folder, error))?;
        self.meter.uploaded.fetch_add(size, Ordering::SeqCst);
        if tpe == FileType::Snapshot {
            let snapshots = self.meter.snapshots.lock();
            snapshots.unwrap_or_else(PoisonError::into_inner).push(*id);
        }
        Ok(())
    }

    fn remove(&self, tpe: FileType, id: &Id, cacheable: bool) -> RusticResult<()> {
        self.inner.remove(tpe, id, cacheable)
    }
}

//! The snapshot's file, and a slice of it as rustic_core wants to read it.
//!
//! The archiver drops an entry whose reader failed and goes on; so every
//! reader also leaves its error here, and who archives must look.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::{Whence, lseek};
use rustic_core::jiff::Timestamp;
use rustic_core::repofile::{Metadata, Node, NodeType};
use rustic_core::{ReadSource, ReadSourceEntry, RusticResult};

use super::error::BackupError;
use super::layout::{Identity, Layout, MANIFEST, Manifest, SegmentNumber};
use super::spec::StreamSpec;
use crate::ids::{Bytes, SnapshotId};

/// Set once when the worker shall stop; read at every segment.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks for the end.
    pub(super) fn ask(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether the end was asked for.
    pub(super) fn asked(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A snapshot's file, held open.
#[derive(Debug)]
pub(super) struct Source {
    snapshot: SnapshotId,
    path: PathBuf,
    file: Arc<File>,
    identity: Identity,
    /// Bytes read so far.
    read: Arc<AtomicU64>,
}

impl Source {
    /// Opens the file of a stream's snapshot and checks its size.
    pub(super) fn open(spec: &StreamSpec, read: Arc<AtomicU64>) -> Result<Self, BackupError> {
        let failed = |call: &str, error: io::Error| BackupError::Source {
            call: call.into(),
            file: spec.file.clone(),
            reason: error.to_string(),
        };
        let file = File::open(&spec.file).map_err(|error| {
            let gone = error.kind() == io::ErrorKind::NotFound
                && spec.file.parent().is_some_and(Path::is_dir);
            if gone {
                gone_error(&spec.snapshot, &spec.file, "there is no such file")
            } else {
                failed("open", error)
            }
        })?;
        let meta = file.metadata().map_err(|error| failed("fstat", error))?;
        if !meta.is_file() || meta.len() != spec.size.0 {
            return Err(BackupError::WrongSize {
                file: spec.file.clone(),
                expected: spec.size,
                found: Bytes(meta.len()),
            });
        }
        let identity = identify(&file, &meta);
        Ok(Self {
            snapshot: spec.snapshot.clone(),
            path: spec.file.clone(),
            file: Arc::new(file),
            identity,
            read,
        })
    }

    /// What makes the file this one.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Makes sure that the file at the path is still the one that is open, unchanged.
    pub(super) fn check(&self) -> Result<(), BackupError> {
        let gone = |why: &str| gone_error(&self.snapshot, &self.path, why);
        let failed = |call: &str, error: io::Error| BackupError::Source {
            call: call.into(),
            file: self.path.clone(),
            reason: error.to_string(),
        };
        let open = self
            .file
            .metadata()
            .map_err(|error| failed("fstat", error))?;
        if open.nlink() == 0 {
            return Err(gone("its file was deleted while it was read"));
        }
        if identify(&self.file, &open) != self.identity {
            return Err(gone("its file was written to while it was read"));
        }
        match std::fs::metadata(&self.path) {
            Ok(named) if (named.ino(), named.dev()) == (open.ino(), open.dev()) => Ok(()),
            Ok(_) => Err(gone("another file has its name now")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(gone("its file has another name now"))
            }
            Err(error) => Err(failed("stat", error)),
        }
    }

    /// Entries for the archiver: the manifest and a range of segments.
    pub(super) fn slice(&self, manifest: &Manifest, segments: Range<u32>, stop: &Stop) -> Slice {
        Slice {
            path: self.path.clone(),
            file: self.file.clone(),
            folder: manifest.folder(),
            manifest: manifest.to_json(),
            layout: manifest.layout().expect("the manifest was made from it"),
            modified: Timestamp::new(
                self.identity.modified,
                i32::try_from(self.identity.modified_ns).unwrap_or(0),
            )
            .unwrap_or(Timestamp::UNIX_EPOCH),
            segments,
            stop: stop.clone(),
            given: Arc::default(),
            read: self.read.clone(),
        }
    }
}

fn gone_error(snapshot: &SnapshotId, file: &Path, why: &str) -> BackupError {
    BackupError::SnapshotGone {
        snapshot: snapshot.clone(),
        file: file.to_owned(),
        why: why.into(),
    }
}

nix::ioctl_read!(
    /// `FS_IOC_GETVERSION`, linux/fs.h. The kernel writes an `int` whatever the number says.
    inode_generation, b'v', 1, libc::c_long
);

fn identify(file: &File, meta: &std::fs::Metadata) -> Identity {
    let mut answer: libc::c_long = 0;
    // SAFETY: the descriptor is open and the pointer is to a long, which is at
    // least what the kernel writes there.
    let told = unsafe { inode_generation(file.as_raw_fd(), &raw mut answer) };
    // tmpfs and others do not tell; the other fields must do there.
    let generation = told.map_or(0, |_| (answer & 0xffff_ffff) as u32);
    Identity {
        inode: meta.ino(),
        generation,
        modified: meta.mtime(),
        modified_ns: meta.mtime_nsec(),
    }
}

/// What a slice gave to the archiver, to be compared with what that took.
#[derive(Debug, Default)]
pub(super) struct Given {
    /// Segments.
    pub(super) segments: AtomicU64,
    /// Bytes of the volume.
    pub(super) volume: AtomicU64,
    /// Bytes in all files, the manifest's too.
    pub(super) bytes: AtomicU64,
    /// The first error of a reader.
    error: Mutex<Option<BackupError>>,
}

impl Given {
    /// The first error of a reader, if one failed.
    pub(super) fn error(&self) -> Option<BackupError> {
        let error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        error.clone()
    }
}

/// A part of a volume: the manifest and a range of segments. Ends early when stopped.
pub(super) struct Slice {
    path: PathBuf,
    file: Arc<File>,
    folder: PathBuf,
    manifest: Vec<u8>,
    layout: Layout,
    modified: Timestamp,
    segments: Range<u32>,
    stop: Stop,
    given: Arc<Given>,
    read: Arc<AtomicU64>,
}

impl Slice {
    /// What it gave; complete when the archiver is done.
    pub(super) fn given(&self) -> Arc<Given> {
        self.given.clone()
    }
}

impl ReadSource for Slice {
    type Open = Content;
    type Iter = Entries;

    fn size(&self) -> RusticResult<Option<u64>> {
        Ok(None)
    }

    fn entries(&self) -> Entries {
        Entries {
            folders: [PathBuf::from("/drover"), self.folder.clone()]
                .to_vec()
                .into_iter(),
            folder: self.folder.clone(),
            manifest: Some(self.manifest.clone()),
            layout: self.layout,
            modified: self.modified,
            segments: self.segments.clone(),
            stop: self.stop.clone(),
            reader: Reader {
                path: self.path.clone(),
                file: self.file.clone(),
                given: self.given.clone(),
                read: self.read.clone(),
            },
        }
    }
}

/// The entries of a [`Slice`], in the order of a tree: folders, segments, manifest.
pub(super) struct Entries {
    folders: std::vec::IntoIter<PathBuf>,
    folder: PathBuf,
    manifest: Option<Vec<u8>>,
    layout: Layout,
    modified: Timestamp,
    segments: Range<u32>,
    stop: Stop,
    reader: Reader,
}

impl Entries {
    fn entry(
        &self,
        path: PathBuf,
        node_type: NodeType,
        size: u64,
        open: Option<Content>,
    ) -> ReadSourceEntry<Content> {
        let mode = match node_type {
            NodeType::Dir => 0o700,
            _ => 0o600,
        };
        let meta = Metadata {
            mode: Some(mode),
            mtime: Some(self.modified),
            atime: Some(self.modified),
            ctime: Some(self.modified),
            uid: Some(0),
            gid: Some(0),
            size,
            ..Metadata::default()
        };
        let name = path.file_name().expect("every path here has a name");
        let node = Node::new_node(name, node_type, meta);
        ReadSourceEntry { path, node, open }
    }

    fn next_segment(&mut self) -> Option<SegmentNumber> {
        (!self.stop.asked())
            .then(|| self.segments.next().map(SegmentNumber))
            .flatten()
    }
}

impl Iterator for Entries {
    type Item = RusticResult<ReadSourceEntry<Content>>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(folder) = self.folders.next() {
            return Some(Ok(self.entry(folder, NodeType::Dir, 0, None)));
        }
        if let Some(number) = self.next_segment() {
            let length = self.layout.length(number);
            let given = &self.reader.given;
            given.segments.fetch_add(1, Ordering::Relaxed);
            given.volume.fetch_add(length, Ordering::Relaxed);
            given.bytes.fetch_add(length, Ordering::Relaxed);
            let content = Content::Segment(SegmentReader {
                reader: self.reader.clone(),
                position: self.layout.offset(number),
                left: length,
                hole: None,
            });
            let path = self.folder.join(number.name());
            return Some(Ok(self.entry(path, NodeType::File, length, Some(content))));
        }
        let manifest = self.manifest.take()?;
        let length = manifest.len() as u64;
        self.reader.given.bytes.fetch_add(length, Ordering::Relaxed);
        let content = Some(Content::Manifest(Cursor::new(manifest)));
        let path = self.folder.join(MANIFEST);
        Some(Ok(self.entry(path, NodeType::File, length, content)))
    }
}

#[derive(Debug, Clone)]
struct Reader {
    path: PathBuf,
    file: Arc<File>,
    given: Arc<Given>,
    read: Arc<AtomicU64>,
}

impl Reader {
    fn fail(&self, error: io::Error, offset: u64) -> io::Error {
        let mut first = self
            .given
            .error
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| BackupError::Source {
            call: format!("read at {offset} of"),
            file: self.path.clone(),
            reason: error.to_string(),
        });
        error
    }
}

/// What the archiver reads.
#[derive(Debug)]
pub(super) enum Content {
    /// A segment of the volume.
    Segment(SegmentReader),
    /// The manifest.
    Manifest(Cursor<Vec<u8>>),
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Segment(segment) => segment.read(buffer),
            Self::Manifest(manifest) => manifest.read(buffer),
        }
    }
}

/// One segment. Gives exactly its length, or an error.
#[derive(Debug)]
pub(super) struct SegmentReader {
    reader: Reader,
    position: u64,
    left: u64,
    /// Whether all of it is a hole; not known before the first read.
    hole: Option<bool>,
}

impl SegmentReader {
    /// Whether the file holds no data at all from here to the segment's end.
    fn is_hole(&self) -> bool {
        let Ok(from) = i64::try_from(self.position) else {
            return false;
        };
        match lseek(&*self.reader.file, from, Whence::SeekData) {
            Ok(data) => u64::try_from(data).is_ok_and(|data| data >= self.position + self.left),
            Err(error) => error == nix::errno::Errno::ENXIO,
        }
    }
}

impl Read for SegmentReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if wanted == 0 {
            return Ok(0);
        }
        let hole = match self.hole {
            Some(hole) => hole,
            None => *self.hole.insert(self.is_hole()),
        };
        let got = if hole {
            buffer[..wanted].fill(0);
            wanted
        } else {
            let got = self
                .reader
                .file
                .read_at(&mut buffer[..wanted], self.position)
                .and_then(|got| match got {
                    0 => Err(io::Error::other("the file ends before its size")),
                    got => Ok(got),
                })
                .map_err(|error| match error.kind() {
                    io::ErrorKind::Interrupted => error,
                    _ => self.reader.fail(error, self.position),
                })?;
            self.reader.read.fetch_add(got as u64, Ordering::Relaxed);
            // The workload needs the page cache more than this one pass does.
            // That is advice; where it is not taken, nothing is lost.
            let (at, length) = (self.position.cast_signed(), got.cast_signed() as i64);
            let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            let _ = posix_fadvise(&*self.reader.file, at, length, advice);
            got
        };
        self.position += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}

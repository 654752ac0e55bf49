//! A restore: one whole backup into a file or a block device, and the listing
//! of what there is to restore.
//!
//! Every blob is checked against its id before it is written, zeroes stay
//! holes, and the end is durable before it is told. A restore that did not end
//! leaves a target that must not be used; it starts again from the beginning.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;

use nix::fcntl::{FallocateFlags, fallocate};
use rustic_core::repofile::{BlobType, Node, SnapshotFile};
use rustic_core::{BlobId, DataId, IndexedFullStatus, Repository};
use sha2::{Digest, Sha256};

use super::archive::Ended;
use super::cursor::{Tags, folder_of, hex, segments_of};
use super::error::BackupError;
use super::layout::{MANIFEST, Manifest, SegmentNumber};
use super::repository::{Opened, Purpose, open};
use super::source::Stop;
use super::spec::{BackupInfo, RepositorySpec, RestoreSpec, Which};
use super::tally::Tally;
use crate::ids::Bytes;

/// Zeroes are written so many at a time where they cannot be punched.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// Lists drover's backups, oldest first.
pub(super) fn list(spec: &RepositorySpec, stop: &Stop) -> Result<Vec<BackupInfo>, BackupError> {
    let (opened, repo) = open(spec, Purpose::List, stop)?;
    let snaps = opened.snapshots(&repo)?;
    let mut backups: Vec<_> = snaps
        .iter()
        .filter_map(|snap| Some(Tags::of(snap)?.info))
        .collect();
    backups.sort_by_key(|backup| backup.time);
    Ok(backups)
}

/// Restores a backup.
pub(super) fn run(spec: &RestoreSpec, tally: &Tally, stop: &Stop) -> Result<Ended, BackupError> {
    let (opened, repo) = open(&spec.repo, Purpose::Restore, stop)?;
    let (snap, info) = choose(&opened, &repo, &spec.which)?;
    let repo = opened.index(repo)?;
    let (manifest, folder) = read_manifest(&opened, &repo, &snap, &info)?;
    if let Some(size) = spec.size
        && size != manifest.size
    {
        return Err(BackupError::WrongBackup {
            backup: info.restic_id,
            found: manifest.size.to_string(),
            asked: size.to_string(),
        });
    }
    tally.total.store(manifest.size.0, Ordering::SeqCst);
    let target = Target::open(&spec.target, manifest.size)?;
    let mut done = 0;
    for node in folder {
        let Some(number) = SegmentNumber::parse(&node.name) else {
            continue;
        };
        let mut offset = manifest.layout()?.offset(number);
        for blob in node.content.iter().flatten() {
            if stop.asked() {
                return Ok(Ended::Stopped);
            }
            let bytes = read_blob(&opened, &repo, blob)?;
            target.write(offset, &bytes)?;
            offset += bytes.len() as u64;
            done += bytes.len() as u64;
            tally.done(done);
        }
    }
    if done != manifest.size.0 {
        return Err(opened.not_whole(
            &format!("backup {}", info.restic_id),
            format!("{done} of {} were restored", manifest.size),
        ));
    }
    target.finish()?;
    Ok(Ended::Whole(info.restic_id))
}

/// The backup that was asked for.
fn choose<S: rustic_core::Open>(
    opened: &Opened,
    repo: &Repository<S>,
    which: &Which,
) -> Result<(SnapshotFile, BackupInfo), BackupError> {
    let snaps = opened.snapshots(repo)?;
    let whole = snaps.into_iter().filter_map(|snap| {
        let info = Tags::of(&snap)?.info;
        info.complete.then_some((snap, info))
    });
    match which {
        Which::LatestOf(volume) => whole
            .filter(|(_, info)| info.volume == *volume)
            .max_by_key(|(_, info)| info.time)
            .ok_or_else(|| opened.no_backup(format!("of volume {volume}"))),
        Which::Restic(id) => {
            if id.len() < 8 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(BackupError::Invalid {
                    why: format!("{id:?} is no restic snapshot id: 8 to 64 hex digits"),
                });
            }
            let id = id.to_ascii_lowercase();
            let mut found = whole.filter(|(_, info)| info.restic_id.starts_with(&id));
            match (found.next(), found.next()) {
                (Some(one), None) => Ok(one),
                (Some(_), Some(_)) => Err(BackupError::Invalid {
                    why: format!("more than one backup begins with {id}: give more digits"),
                }),
                (None, _) => Err(opened.no_backup(id)),
            }
        }
    }
}

type Indexed = Repository<IndexedFullStatus>;

/// A backup's manifest and files, when all that it should hold is there.
fn read_manifest(
    opened: &Opened,
    repo: &Indexed,
    snap: &SnapshotFile,
    info: &BackupInfo,
) -> Result<(Manifest, Vec<Node>), BackupError> {
    let what = format!("backup {}", info.restic_id);
    let not_whole = |why: String| opened.not_whole(&what, why);
    let path = Path::new("/drover")
        .join(info.volume.as_str())
        .join(MANIFEST);
    let node = repo
        .node_from_path(snap.tree, &path)
        .map_err(|error| not_whole(error.display_log()))?;
    let mut json = Vec::new();
    for blob in node.content.iter().flatten() {
        json.extend_from_slice(&read_blob(opened, repo, blob)?);
    }
    let manifest =
        Manifest::from_json(&json).map_err(|why| not_whole(format!("{MANIFEST}: {why}")))?;
    if (&manifest.volume, manifest.size) != (&info.volume, info.size) {
        return Err(not_whole(format!(
            "its tags say {} of {}, its manifest {} of {}",
            info.volume, info.size, manifest.volume, manifest.size
        )));
    }
    let segments = segments_of(repo, snap.tree, &manifest).map_err(not_whole)?;
    let wanted = manifest.layout()?.count() as usize;
    if segments.len() != wanted {
        let why = format!("{} of {wanted} segments are there", segments.len());
        return Err(not_whole(why));
    }
    let folder = folder_of(repo, snap.tree, &manifest).map_err(not_whole)?;
    Ok((manifest, folder.nodes))
}

/// A blob's bytes, which are what its id says.
fn read_blob(opened: &Opened, repo: &Indexed, blob: &DataId) -> Result<bytes::Bytes, BackupError> {
    let bytes = repo
        .get_blob_cached(&BlobId::from(**blob), BlobType::Data)
        .map_err(|error| {
            let doing = format!("read blob {}", hex(blob));
            opened.doing(doing).failed(&error)
        })?;
    let digest: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if digest == hex(blob) {
        Ok(bytes)
    } else {
        let what = format!("blob {}", hex(blob));
        Err(opened.not_whole(&what, format!("its bytes have the digest {digest}")))
    }
}

/// What is restored into.
struct Target<'a> {
    path: &'a Path,
    file: File,
    /// Whether all of it reads as zeroes already.
    zeroed: bool,
    created: bool,
}

impl<'a> Target<'a> {
    /// Opens or makes the target, and makes it read as zeroes where that is cheap.
    fn open(path: &'a Path, needs: Bytes) -> Result<Self, BackupError> {
        let failed = |call: &str, error: io::Error| target_error(path, call, &error);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let created = match std::fs::metadata(path) {
            Ok(meta) if meta.file_type().is_block_device() => {
                // The kernel refuses this for a device that is mounted or otherwise claimed.
                options.custom_flags(libc::O_EXCL);
                false
            }
            Ok(meta) if meta.is_file() => false,
            Ok(_) => {
                return Err(BackupError::Target {
                    call: "restore into".into(),
                    target: path.to_owned(),
                    reason: "it is neither a file nor a block device".into(),
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                options.create_new(true).mode(0o600);
                true
            }
            Err(error) => return Err(failed("stat", error)),
        };
        let mut file = options.open(path).map_err(|error| failed("open", error))?;
        if created {
            file.set_len(needs.0)
                .map_err(|error| failed("size", error))?;
        }
        // A block device's length is where its end is.
        let has = file
            .seek(SeekFrom::End(0))
            .map_err(|error| failed("seek", error))?;
        if has < needs.0 {
            return Err(BackupError::TargetTooSmall {
                target: path.to_owned(),
                has: Bytes(has),
                needs,
            });
        }
        let zeroed = created || {
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&file, punch, 0, has.cast_signed()).is_ok()
        };
        let target = Self {
            path,
            file,
            zeroed,
            created,
        };
        if !zeroed {
            target.zero(needs.0, has)?;
        }
        Ok(target)
    }

    fn zero(&self, mut from: u64, to: u64) -> Result<(), BackupError> {
        while from < to {
            let length = usize::try_from(to - from).map_or(ZEROES.len(), |n| n.min(ZEROES.len()));
            self.put(from, &ZEROES[..length])?;
            from += length as u64;
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BackupError> {
        let nothing = self.zeroed && bytes.iter().all(|byte| *byte == 0);
        if nothing {
            Ok(())
        } else {
            self.put(offset, bytes)
        }
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), BackupError> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(|error| target_error(self.path, &format!("write at {offset} of"), &error))
    }

    /// Makes it durable.
    fn finish(self) -> Result<(), BackupError> {
        let failed = |call: &str, error: io::Error| target_error(self.path, call, &error);
        self.file
            .sync_all()
            .map_err(|error| failed("sync", error))?;
        if self.created
            && let Some(folder) = self.path.parent()
        {
            File::open(folder)
                .and_then(|folder| folder.sync_all())
                .map_err(|error| failed("sync the folder of", error))?;
        }
        Ok(())
    }
}

fn target_error(path: &Path, call: &str, error: &io::Error) -> BackupError {
    BackupError::Target {
        call: call.into(),
        target: path.to_owned(),
        reason: error.to_string(),
    }
}

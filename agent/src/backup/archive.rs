//! A backup: slice by slice into the repository, then one whole snapshot.
//!
//! ```text
//! open, lock, find the cursor -> [ slice: read, upload, commit ]* -> join -> verify -> save -> remove the slices
//! ```
//!
//! Each slice ends in a restic snapshot of its own, which is the cursor. The
//! archiver cannot be cancelled, so a stop ends the slice's source early and
//! what was read so far is committed. The whole is saved only after all of it
//! was found in the index and every pack of it in the repository.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustic_core::repofile::{SnapshotFile, SnapshotSummary};
use rustic_core::{
    BackupOptions, IndexedFullStatus, ParentOptions, Repository, StringList, TreeId,
    last_modified_node,
};

use super::cursor::{Cursor, folder_of, head, segments_of};
use super::error::BackupError;
use super::layout::{Layout, Manifest, SegmentNumber};
use super::repository::{Opened, Purpose, open};
use super::source::{Source, Stop};
use super::spec::{SliceLimits, StreamSpec};
use super::tally::Tally;

/// How a worker's job ended, when it did not fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// Whole; the restic snapshot's id.
    Whole(String),
    /// Stopped when asked.
    Stopped,
}

/// Backs a snapshot up, from its cursor on.
pub(super) fn run(spec: &StreamSpec, tally: &Tally, stop: &Stop) -> Result<Ended, BackupError> {
    tally.total.store(spec.size.0, Ordering::SeqCst);
    let source = match Source::open(spec, tally.read.clone()) {
        Err(gone @ BackupError::SnapshotGone { .. }) => return Err(void(spec, gone, stop)),
        other => other?,
    };
    let manifest = Manifest::new(
        spec.volume.clone(),
        spec.snapshot.clone(),
        spec.home.clone(),
        spec.size,
        source.identity().clone(),
    )?;
    let (opened, repo) = open(&spec.repo, Purpose::Backup, stop)?;
    tally.watch(&opened.meter);
    let repo = opened.index(repo)?;
    let cursor = Cursor::load(&opened, &repo, &spec.id, &manifest)?;
    let mut backup = Backup {
        spec,
        manifest,
        source,
        opened,
        cursor,
        tally,
        stop,
    };
    match backup.work(repo) {
        Err(gone @ BackupError::SnapshotGone { .. }) => {
            drop(backup);
            Err(void(spec, gone, stop))
        }
        other => other,
    }
}

/// The snapshot is gone for good, so nothing can ever join its slices: removes
/// them, as far as that can be done. Gives the error back.
fn void(spec: &StreamSpec, gone: BackupError, stop: &Stop) -> BackupError {
    if let Ok((_held, repo)) = open(&spec.repo, Purpose::Forget, stop)
        && let Ok(snaps) = repo.get_all_snapshots()
    {
        let slices: Vec<_> = snaps
            .iter()
            .filter(|snap| {
                super::cursor::Tags::of(snap)
                    .is_some_and(|tags| tags.info.backup == spec.id && !tags.info.complete)
            })
            .map(|snap| snap.id)
            .collect();
        let _ = repo.delete_snapshots(&slices);
    }
    gone
}

struct Backup<'a> {
    spec: &'a StreamSpec,
    manifest: Manifest,
    source: Source,
    opened: Opened,
    cursor: Cursor,
    tally: &'a Tally,
    stop: &'a Stop,
}

type Indexed = Repository<IndexedFullStatus>;

impl Backup<'_> {
    fn work(&mut self, mut repo: Indexed) -> Result<Ended, BackupError> {
        if let Some(whole) = self.cursor.whole.take() {
            self.verify(&repo, whole.tree)?;
            self.tally.resumed(self.spec.size.0);
            self.remove_slices(&repo)?;
            return Ok(Ended::Whole(whole.id.to_hex().as_str().to_owned()));
        }
        self.tally.resumed(self.cursor.bytes());
        let layout = self.manifest.layout()?;
        let mut size = SliceSize::new(self.spec, &layout);
        let (mut slices, mut next_index) = (0_u32, 1_u32);
        while let Some(gap) = self.cursor.next_gap(size.segments()) {
            if self.stop.asked() {
                return Ok(Ended::Stopped);
            }
            let began = Instant::now();
            self.slice(&repo, gap)?;
            size.took(began.elapsed());
            slices += 1;
            // The archiver knows only the blobs of the index it was given.
            // Reading it anew each time would cost the square of the slices.
            if slices == next_index {
                repo = self.opened.index(repo.drop_index())?;
                next_index *= 2;
            }
        }
        if self.stop.asked() {
            return Ok(Ended::Stopped);
        }
        self.join(repo)
    }

    /// Uploads and commits a slice.
    fn slice(&mut self, repo: &Indexed, gap: Range<u32>) -> Result<(), BackupError> {
        self.source.check()?;
        let slice = self.source.slice(&self.manifest, gap.clone(), self.stop);
        let given = slice.given();
        self.tally.begin_slice(given.clone());
        let options = BackupOptions::default()
            .no_scan(true)
            .parent_opts(ParentOptions::default().force(true));
        // A path of its own: `restic forget` by host and path never groups slices.
        let path = PathBuf::from("/drover-partial")
            .join(self.spec.id.as_str())
            .join(format!("{:06}", gap.start));
        let snap = head(&self.spec.id, &self.manifest, Some(&gap))?;
        let doing = format!("upload segments {}-{}", gap.start, gap.end - 1);
        let archived = repo.archive(&options, &slice, snap, &[path]);
        // A reader's own error says more than what the archiver makes of it.
        if let Some(error) = given.error() {
            self.source.check()?;
            if let Ok(snap) = archived {
                self.discard(repo, &snap)?;
            }
            return Err(error);
        }
        let snap = archived.map_err(|error| self.opened.doing(&doing).failed(&error))?;
        let segments = given.segments.load(Ordering::SeqCst);
        let bytes = given.bytes.load(Ordering::SeqCst);
        let taken = snap.summary.as_ref().map_or((0, 0), |summary| {
            (summary.total_files_processed, summary.total_bytes_processed)
        });
        if taken != (segments + 1, bytes) {
            self.discard(repo, &snap)?;
            return Err(self.opened.not_whole(
                &doing,
                format!(
                    "{} files of {bytes} bytes were given, {} of {} bytes were taken",
                    segments + 1,
                    taken.0,
                    taken.1
                ),
            ));
        }
        if let Err(gone) = self.source.check() {
            self.discard(repo, &snap)?;
            return Err(gone);
        }
        let end = gap.start + u32::try_from(segments).expect("within the gap");
        let numbers: Vec<_> = (gap.start..end).map(SegmentNumber).collect();
        self.cursor.add(&numbers, snap.tree);
        self.cursor.slices.push(snap.id);
        self.opened.meter.commit();
        self.tally.end_slice(self.cursor.bytes());
        Ok(())
    }

    /// Takes back the snapshot of a slice that is not what it should be.
    fn discard(&self, repo: &Indexed, snap: &SnapshotFile) -> Result<(), BackupError> {
        repo.delete_snapshots(&[snap.id])
            .map_err(|error| self.opened.doing("remove a failed slice").failed(&error))
    }

    /// Makes one snapshot of all slices, verifies and saves it.
    fn join(&mut self, repo: Indexed) -> Result<Ended, BackupError> {
        let repo = self.opened.index(repo.drop_index())?;
        let mut summary = SnapshotSummary::default();
        let tree = repo
            .merge_trees(&self.cursor.trees, &last_modified_node, &mut summary)
            .map_err(|error| self.opened.doing("join the slices").failed(&error))?;
        let repo = self.opened.index(repo.drop_index())?;
        self.verify(&repo, tree)?;
        // Our lock keeps others from deleting; without it what was just
        // verified may be on its way out.
        if !self.opened.locked() {
            return Err(self.opened.not_whole(
                "lock",
                "somebody removed it while the backup ran; start the same backup again",
            ));
        }
        let mut whole = head(&self.spec.id, &self.manifest, None)?;
        let mut paths = StringList::default();
        paths.add(self.manifest.folder().display().to_string());
        whole.paths = paths;
        whole.tree = tree;
        summary.total_files_processed = u64::from(self.manifest.layout()?.count()) + 1;
        summary.total_bytes_processed = self.spec.size.0;
        summary.command = "drover backup".into();
        whole.summary = Some(summary);
        repo.save_snapshots(vec![whole])
            .map_err(|error| self.opened.doing("save the snapshot").failed(&error))?;
        let id = self
            .opened
            .meter
            .last_snapshot()
            .ok_or_else(|| self.opened.not_whole("snapshot", "it was not written"))?;
        self.opened.meter.commit();
        self.remove_slices(&repo)?;
        Ok(Ended::Whole(id.to_hex().as_str().to_owned()))
    }

    /// Makes sure that a tree is the whole volume: every segment, every blob in
    /// the index, every pack in the repository and as long as the index has it.
    fn verify(&self, repo: &Indexed, tree: TreeId) -> Result<(), BackupError> {
        let what = format!("backup {}", self.spec.id);
        let not_whole = |why: String| self.opened.not_whole(&what, why);
        let mut segments = segments_of(repo, tree, &self.manifest).map_err(not_whole)?;
        segments.sort_unstable();
        let wanted = self.manifest.layout()?.count();
        if !segments.iter().copied().eq((0..wanted).map(SegmentNumber)) {
            return Err(not_whole(format!(
                "{} of {wanted} segments are there",
                segments.len()
            )));
        }
        let mut ends: BTreeMap<_, u32> = BTreeMap::new();
        let folder = folder_of(repo, tree, &self.manifest).map_err(not_whole)?;
        let blobs: BTreeSet<_> = folder
            .nodes
            .iter()
            .flat_map(|node| node.content.iter().flatten())
            .collect();
        for blob in blobs {
            let entry = repo
                .get_index_entry(blob)
                .map_err(|error| self.opened.doing("look up a blob").failed(&error))?;
            let end = entry.location.offset.saturating_add(entry.location.length);
            let pack = ends.entry(*entry.pack).or_default();
            *pack = end.max(*pack);
        }
        let packs = self
            .opened
            .packs()
            .map_err(|error| self.opened.doing("list packs").failed(&error))?;
        let packs: BTreeMap<_, u32> = packs.into_iter().collect();
        for (pack, end) in ends {
            if packs.get(&pack).is_none_or(|length| *length < end) {
                return Err(not_whole(format!(
                    "pack {} is missing or short",
                    pack.to_hex().as_str()
                )));
            }
        }
        Ok(())
    }

    /// The whole is saved: its slices go, and what dead writers left half written.
    fn remove_slices(&self, repo: &Indexed) -> Result<(), BackupError> {
        self.opened.sweep();
        repo.delete_snapshots(&self.cursor.slices)
            .map_err(|error| self.opened.doing("remove the slices").failed(&error))
    }
}

/// How many segments the next slice takes: as many as its time allows at the
/// speed of the last.
#[derive(Debug)]
struct SliceSize {
    limits: SliceLimits,
    now: u32,
}

impl SliceSize {
    fn new(spec: &StreamSpec, layout: &Layout) -> Self {
        let most = spec.slice.segments.max(1);
        let first = match spec.repo.limit_upload {
            // As much as the limit lets through in a slice's time.
            Some(limit) => {
                let bytes = limit as f64 * spec.slice.time.as_secs_f64();
                (bytes / layout.segment().0 as f64) as u32
            }
            None => super::FIRST_SLICE_SEGMENTS,
        };
        Self {
            limits: spec.slice,
            now: first.clamp(1, most),
        }
    }

    fn segments(&self) -> u32 {
        self.now
    }

    /// Grows to at most twice, shrinks as far as needed.
    fn took(&mut self, time: Duration) {
        let ratio = self.limits.time.as_secs_f64() / time.as_secs_f64().max(1e-3);
        let next = f64::from(self.now) * ratio.min(2.0);
        self.now = (next as u32).clamp(1, self.limits.segments.max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(limit: u32) -> SliceSize {
        SliceSize {
            limits: SliceLimits {
                segments: limit,
                time: Duration::from_secs(2),
            },
            now: 16,
        }
    }

    #[test]
    fn a_slow_repository_gets_small_slices_and_a_fast_one_large_ones() {
        let mut slow = size(256);
        slow.took(Duration::from_secs(16));
        assert_eq!(slow.segments(), 2);
        slow.took(Duration::from_secs(600));
        assert_eq!(slow.segments(), 1, "never none");
        let mut fast = size(40);
        fast.took(Duration::from_millis(1));
        assert_eq!(fast.segments(), 32, "at most twice");
        fast.took(Duration::ZERO);
        assert_eq!(fast.segments(), 40, "never more than the limit");
    }
}

//! The cursor: which segments of a backup are in the repository already.
//!
//! It is kept nowhere but in the repository, as the snapshots of the slices
//! that were committed, so that any node can resume and no crash can leave it
//! ahead of the data. Each is bound to its snapshot file by the manifest's
//! fingerprint; slices of another instant are never joined. A slice counts
//! only if every blob of it is in the index.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::SystemTime;

use rustic_core::repofile::{Node, NodeType, SnapshotFile, SnapshotId as ResticId, Tree};
use rustic_core::{IndexedFull, PackedId, Repository, SnapshotOptions, StringList, TreeId};

use super::error::BackupError;
use super::layout::{Layout, MANIFEST, Manifest, SegmentNumber};
use super::repository::Opened;
use super::spec::BackupInfo;
use crate::ids::{Bytes, TicketId};

/// Tag of a whole backup.
const WHOLE: &str = "drover";
/// Tag of a slice.
const PARTIAL: &str = "drover-partial";

/// What the tags of one of drover's restic snapshots say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tags {
    /// The parts that a listing shows.
    pub(super) info: BackupInfo,
    /// The manifest's fingerprint.
    pub(super) bound: String,
}

impl Tags {
    /// Reads the tags; none: it is not one of drover's.
    pub(super) fn of(snap: &SnapshotFile) -> Option<Self> {
        let values: BTreeMap<&str, &str> = snap
            .tags
            .iter()
            .filter_map(|tag| tag.split_once('='))
            .collect();
        let complete = snap.tags.contains(WHOLE);
        if !complete && !snap.tags.contains(PARTIAL) {
            return None;
        }
        Some(Self {
            info: BackupInfo {
                restic_id: snap.id.to_hex().as_str().to_owned(),
                backup: values.get("backup")?.parse().ok()?,
                volume: values.get("volume")?.parse().ok()?,
                snapshot: values.get("snapshot")?.parse().ok()?,
                time: SystemTime::from(snap.time.timestamp()),
                size: Bytes(values.get("size")?.parse().ok()?),
                complete,
            },
            bound: (*values.get("bound")?).to_owned(),
        })
    }
}

/// A new restic snapshot's head: of a slice, or (none) of the whole.
pub(super) fn head(
    id: &TicketId,
    manifest: &Manifest,
    slice: Option<&Range<u32>>,
) -> Result<SnapshotFile, BackupError> {
    let mut tags = StringList::default();
    match slice {
        Some(slice) => {
            tags.add(PARTIAL.into());
            tags.add(format!("segments={}-{}", slice.start, slice.end - 1));
        }
        None => tags.add(WHOLE.into()),
    }
    tags.add(format!("volume={}", manifest.volume));
    tags.add(format!("snapshot={}", manifest.snapshot));
    tags.add(format!("backup={id}"));
    tags.add(format!("size={}", manifest.size.0));
    tags.add(format!("bound={}", manifest.fingerprint()));
    SnapshotOptions::default()
        .host(format!("drover/{}", manifest.home))
        .label(manifest.volume.as_str().to_owned())
        .command("drover backup".to_owned())
        .tags(vec![tags])
        .to_snapshot()
        .map_err(|error| BackupError::Invalid {
            why: format!("describe backup {id}: {}", error.display_log()),
        })
}

/// What the repository holds of one backup.
#[derive(Debug)]
pub(super) struct Cursor {
    layout: Layout,
    /// Which segments are held.
    held: Vec<bool>,
    /// The trees that hold them.
    pub(super) trees: Vec<TreeId>,
    /// Every slice of this backup, void ones too: to be removed at its end.
    pub(super) slices: Vec<ResticId>,
    /// The whole backup, if it is there already.
    pub(super) whole: Option<SnapshotFile>,
}

impl Cursor {
    /// Looks for the slices of a backup.
    pub(super) fn load<S: IndexedFull>(
        opened: &Opened,
        repo: &Repository<S>,
        id: &TicketId,
        manifest: &Manifest,
    ) -> Result<Self, BackupError> {
        let snaps = opened.snapshots(repo)?;
        let layout = manifest.layout()?;
        let mut cursor = Self {
            layout,
            held: vec![false; layout.count() as usize],
            trees: Vec::new(),
            slices: Vec::new(),
            whole: None,
        };
        let bound = manifest.fingerprint();
        for snap in snaps {
            let Some(tags) = Tags::of(&snap).filter(|tags| tags.info.backup == *id) else {
                continue;
            };
            if tags.info.complete {
                if tags.bound == bound {
                    cursor.whole = Some(snap);
                }
                continue;
            }
            cursor.slices.push(snap.id);
            if tags.bound == bound
                && let Ok(segments) = segments_of(repo, snap.tree, manifest)
            {
                cursor.add(&segments, snap.tree);
            }
        }
        Ok(cursor)
    }

    /// Segments that a committed slice holds.
    pub(super) fn add(&mut self, segments: &[SegmentNumber], tree: TreeId) {
        for number in segments {
            self.held[number.0 as usize] = true;
        }
        self.trees.push(tree);
    }

    /// Bytes of the volume that are held.
    pub(super) fn bytes(&self) -> u64 {
        (0..self.layout.count())
            .map(SegmentNumber)
            .filter(|number| self.held[number.0 as usize])
            .map(|number| self.layout.length(number))
            .sum()
    }

    /// The first segments that are not held, at most `most` of them.
    pub(super) fn next_gap(&self, most: u32) -> Option<Range<u32>> {
        let start = self.held.iter().position(|held| !held)?;
        let gap = self.held[start..].iter().take_while(|held| !**held).count();
        let start = u32::try_from(start).expect("a layout's count is a u32");
        let gap = u32::try_from(gap).expect("a layout's count is a u32");
        Some(start..start + gap.min(most.max(1)))
    }
}

/// The volume's folder in a tree.
pub(super) fn folder_of<S: IndexedFull>(
    repo: &Repository<S>,
    root: TreeId,
    manifest: &Manifest,
) -> Result<Tree, String> {
    repo.node_from_path(root, &manifest.folder())
        .map_err(|error| error.display_log())
        .and_then(|node| node.subtree.ok_or_else(|| "it is no folder".to_owned()))
        .and_then(|tree| repo.get_tree(&tree).map_err(|error| error.display_log()))
}

/// The segments in a tree. An error if anything in the volume's folder is not
/// what it should be, or any blob of it is not in the index.
pub(super) fn segments_of<S: IndexedFull>(
    repo: &Repository<S>,
    root: TreeId,
    manifest: &Manifest,
) -> Result<Vec<SegmentNumber>, String> {
    let layout = manifest.layout().map_err(|error| error.to_string())?;
    let mut segments = Vec::new();
    let mut described = false;
    for node in folder_of(repo, root, manifest)?.nodes {
        let expected = match SegmentNumber::parse(&node.name) {
            Some(number) => {
                segments.push(number);
                layout.length(number)
            }
            None if node.name == MANIFEST => {
                described = true;
                manifest.to_json().len() as u64
            }
            None => return Err(format!("{} does not belong there", node.name)),
        };
        check_file(repo, &node, expected)?;
    }
    described
        .then_some(segments)
        .ok_or_else(|| format!("{MANIFEST} is missing"))
}

/// Makes sure that a file's blobs are in the index and add up to its size.
fn check_file<S: IndexedFull>(
    repo: &Repository<S>,
    node: &Node,
    expected: u64,
) -> Result<(), String> {
    let mut length = 0;
    for blob in node.content.iter().flatten() {
        let entry = repo
            .get_index_entry(blob)
            .map_err(|_| format!("{}: blob {} is not in the index", node.name, hex(blob)))?;
        length += u64::from(entry.location.data_length());
    }
    let sound = node.node_type == NodeType::File
        && node.meta.size == expected
        && length == expected
        && expected > 0;
    if sound {
        Ok(())
    } else {
        Err(format!(
            "{}: {expected} bytes are expected, {length} are there",
            node.name
        ))
    }
}

/// A blob's id, as restic prints it.
pub(super) fn hex<T: PackedId>(blob: &T) -> String {
    let id: rustic_core::BlobId = (*blob).into();
    id.to_hex().as_str().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::layout::Identity;
    use super::*;

    fn manifest(segments: u64) -> Manifest {
        let source = Identity {
            inode: 1,
            generation: 1,
            modified: 1,
            modified_ns: 1,
        };
        Manifest::new(
            "vol-1".parse().unwrap(),
            "snap-1".parse().unwrap(),
            "a".parse().unwrap(),
            Bytes(segments << 22),
            source,
        )
        .unwrap()
    }

    #[test]
    fn gaps_are_found_in_order_and_never_longer_than_asked() {
        let manifest = manifest(6);
        let mut cursor = Cursor {
            layout: manifest.layout().unwrap(),
            held: vec![false; 6],
            trees: Vec::new(),
            slices: Vec::new(),
            whole: None,
        };
        assert_eq!(cursor.next_gap(4), Some(0..4));
        assert_eq!(cursor.next_gap(0), Some(0..1));
        cursor.add(&[0, 2].map(SegmentNumber), TreeId::default());
        assert_eq!(cursor.next_gap(4), Some(1..2));
        cursor.add(&[SegmentNumber(1)], TreeId::default());
        assert_eq!(cursor.next_gap(4), Some(3..6));
        assert_eq!(cursor.bytes(), 3 << 22);
        cursor.add(&[3, 4, 5].map(SegmentNumber), TreeId::default());
        assert_eq!(cursor.next_gap(4), None);
    }

    #[test]
    fn tags_are_read_back() {
        let manifest = manifest(6);
        let id: TicketId = "ticket-1".parse().unwrap();
        for slice in [Some(0..4), None] {
            let snap = head(&id, &manifest, slice.as_ref()).unwrap();
            let tags = Tags::of(&snap).unwrap();
            assert_eq!(tags.info.complete, slice.is_none());
            assert_eq!(tags.info.volume, manifest.volume);
            assert_eq!(tags.info.snapshot, manifest.snapshot);
            assert_eq!(tags.info.backup, id);
            assert_eq!(tags.info.size, manifest.size);
            assert_eq!(tags.bound, manifest.fingerprint());
        }
        assert_eq!(Tags::of(&SnapshotFile::default()), None);
    }
}

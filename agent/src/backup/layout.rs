//! How a volume lies in a repository: one folder of segment files of one size
//! and a manifest.
//!
//! Segments are what a cursor counts in and what a stock `restic restore`
//! gives back: `cat data.*` is the volume. Their number is bounded, since they
//! all stand in one tree object; a large volume gets larger segments.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::BackupError;
use crate::ids::{Bytes, NodeId, SnapshotId, VolumeId};

/// Bytes in a segment of a volume that is not too large for it.
const SEGMENT: u64 = 4 << 20;

/// Segments in a volume, at most.
const MAX_SEGMENTS: u64 = 16_384;

/// The format's version, in every manifest.
const FORMAT: u32 = 1;

/// The manifest's name in the volume's folder. Sorts after every segment, as a tree must be.
pub(super) const MANIFEST: &str = "manifest.json";

/// A segment's number in its volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SegmentNumber(pub(super) u32);

impl SegmentNumber {
    /// The segment's file name.
    pub(super) fn name(self) -> String {
        format!("data.{:06}", self.0)
    }

    /// The number in a file name that [`name`](Self::name) made.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let number = Self(name.strip_prefix("data.")?.parse().ok()?);
        (number.name() == name).then_some(number)
    }
}

/// A volume's size, cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    size: u64,
    segment: u64,
}

impl Layout {
    /// The layout of a new backup of a volume of `size`.
    pub(super) fn of(size: Bytes) -> Result<Self, BackupError> {
        let mut segment = SEGMENT;
        while size.0.div_ceil(segment) > MAX_SEGMENTS {
            segment *= 2;
        }
        Self::with_segment(size, Bytes(segment))
    }

    fn with_segment(size: Bytes, segment: Bytes) -> Result<Self, BackupError> {
        let sound = size.0 > 0 && segment.0 > 0 && size.0.div_ceil(segment.0) <= MAX_SEGMENTS;
        if sound {
            Ok(Self {
                size: size.0,
                segment: segment.0,
            })
        } else {
            Err(BackupError::Invalid {
                why: format!("a volume of {size} cannot be cut into segments of {segment}"),
            })
        }
    }

    /// How many segments there are.
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.size.div_ceil(self.segment)).expect("at most MAX_SEGMENTS")
    }

    /// Where a segment begins in the volume.
    pub(super) fn offset(&self, number: SegmentNumber) -> u64 {
        u64::from(number.0) * self.segment
    }

    /// Bytes in a segment; the last may be shorter. 0: there is no such segment.
    pub(super) fn length(&self, number: SegmentNumber) -> u64 {
        self.size
            .saturating_sub(self.offset(number))
            .min(self.segment)
    }

    /// Bytes in a whole segment.
    pub(super) fn segment(&self) -> Bytes {
        Bytes(self.segment)
    }
}

/// What makes a snapshot's file this file and no other: a cursor is bound to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Its inode.
    pub(super) inode: u64,
    /// Its inode's generation; 0 where the file system does not tell.
    pub(super) generation: u32,
    /// When it was last written, seconds.
    pub(super) modified: i64,
    /// And the nanoseconds.
    pub(super) modified_ns: i64,
}

/// `manifest.json`: what a volume's folder in the repository is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// The format's version.
    pub(super) format: u32,
    /// The volume.
    pub(super) volume: VolumeId,
    /// The snapshot.
    pub(super) snapshot: SnapshotId,
    /// The home it was read at.
    pub(super) home: NodeId,
    /// The volume's size.
    pub(super) size: Bytes,
    /// Bytes in a segment.
    pub(super) segment: Bytes,
    /// The file that was read.
    pub(super) source: Identity,
}

impl Manifest {
    /// The manifest of a new backup.
    pub(super) fn new(
        volume: VolumeId,
        snapshot: SnapshotId,
        home: NodeId,
        size: Bytes,
        source: Identity,
    ) -> Result<Self, BackupError> {
        Ok(Self {
            format: FORMAT,
            segment: Layout::of(size)?.segment(),
            volume,
            snapshot,
            home,
            size,
            source,
        })
    }

    /// The file's bytes; the same manifest always gives the same.
    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("plain numbers and texts")
    }

    /// Reads a manifest, of a version that this drover knows.
    pub(super) fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if manifest.format == FORMAT {
            Ok(manifest)
        } else {
            Err(format!(
                "its format is {}, this drover reads {FORMAT}",
                manifest.format
            ))
        }
    }

    /// A short text that differs for every other manifest; slices carry it.
    pub(super) fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.to_json());
        digest[..16].iter().map(|b| format!("{b:02x}")).collect()
    }

    /// How the volume is cut.
    pub(super) fn layout(&self) -> Result<Layout, BackupError> {
        Layout::with_segment(self.size, self.segment)
    }

    /// The volume's folder in the repository.
    pub(super) fn folder(&self) -> PathBuf {
        PathBuf::from("/drover").join(self.volume.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_the_volume_exactly() {
        for size in [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 10 * SEGMENT + 4096] {
            let layout = Layout::of(Bytes(size)).unwrap();
            let mut end = 0;
            for number in (0..layout.count()).map(SegmentNumber) {
                assert_eq!(layout.offset(number), end);
                assert!(layout.length(number) > 0);
                end += layout.length(number);
            }
            assert_eq!(end, size);
            assert_eq!(layout.length(SegmentNumber(layout.count())), 0);
        }
    }

    #[test]
    fn a_large_volume_has_no_more_segments_than_a_tree_can_take() {
        let layout = Layout::of(Bytes(1 << 40)).unwrap();
        assert_eq!(u64::from(layout.count()), MAX_SEGMENTS);
        assert_eq!(layout.segment(), Bytes(64 << 20));
        assert!(Layout::of(Bytes(0)).is_err());
    }

    #[test]
    fn names_are_read_back_and_nothing_else_is() {
        for number in [0, 7, 123_456].map(SegmentNumber) {
            assert_eq!(SegmentNumber::parse(&number.name()), Some(number));
        }
        for name in [
            "data.1",
            "data.+00001",
            "data.",
            "manifest.json",
            "data.0000001",
        ] {
            assert_eq!(SegmentNumber::parse(name), None, "{name}");
        }
    }

    #[test]
    fn every_field_of_the_source_changes_the_fingerprint() {
        let source = Identity {
            inode: 1,
            generation: 2,
            modified: 3,
            modified_ns: 4,
        };
        let make = |source: Identity, snapshot: &str| {
            let parse = "vol-1".parse().unwrap();
            let home = "a".parse().unwrap();
            Manifest::new(parse, snapshot.parse().unwrap(), home, Bytes(9), source)
                .unwrap()
                .fingerprint()
        };
        let first = make(source.clone(), "snap-1");
        assert_eq!(first, make(source.clone(), "snap-1"));
        assert_ne!(first, make(source.clone(), "snap-2"));
        for other in [
            Identity {
                inode: 9,
                ..source.clone()
            },
            Identity {
                generation: 9,
                ..source.clone()
            },
            Identity {
                modified: 9,
                ..source.clone()
            },
            Identity {
                modified_ns: 9,
                ..source.clone()
            },
        ] {
            assert_ne!(first, make(other, "snap-1"));
        }
    }

    #[test]
    fn a_manifest_of_another_format_is_refused() {
        let error = Manifest::from_json(
            br#"{"format":2,"volume":"v","snapshot":"s","home":"a","size":1,"segment":1,
                "source":{"inode":1,"generation":1,"modified":1,"modified_ns":1}}"#,
        );
        assert!(error.unwrap_err().contains("format is 2"));
    }
}

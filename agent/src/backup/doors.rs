//! The decoders of this room, for the fuzzer (see `crate::doors`).

use super::keeper::Kept;
use super::layout::{Manifest, SegmentNumber};
use super::spec::{Event, Job};
use crate::doors::Door;

/// Each of them.
pub const ALL: [Door; 4] = [manifest, kept, job, event];

/// A volume's folder in a repository, which anybody with the key may have written.
fn manifest(bytes: &[u8]) -> bool {
    let Ok(manifest) = Manifest::from_json(bytes) else {
        return false;
    };
    let again = Manifest::from_json(&manifest.to_json()).expect("what was written can be read");
    assert_eq!(again, manifest);
    assert_eq!(manifest.fingerprint().len(), 32);
    assert!(manifest.folder().starts_with("/drover"));
    let Ok(layout) = manifest.layout() else {
        return false;
    };
    let last = SegmentNumber(layout.count() - 1);
    let end = layout.offset(last) + layout.length(last);
    assert_eq!(end, manifest.size.0);
    assert_eq!(layout.length(SegmentNumber(layout.count())), 0);
    true
}

/// A stream's file.
fn kept(bytes: &[u8]) -> bool {
    serde_json::from_slice::<Kept>(bytes).is_ok()
}

/// What a worker is told, …
fn job(bytes: &[u8]) -> bool {
    serde_json::from_slice::<Job>(bytes).is_ok()
}

/// … and what it says.
fn event(bytes: &[u8]) -> bool {
    serde_json::from_slice::<Event>(bytes).is_ok()
}

//! The decoders of this room, for the fuzzer (see `crate::doors`).

use super::ports::{HostIdentity, Note};
use super::proof::Receipt;
use super::record::{NodeRecord, SnapshotRecord};
use super::state::VolumeState;
use crate::doors::{Door, json};

/// Each of them.
pub const ALL: [Door; 6] = [volume, node, snapshot, receipt, note, host];

fn volume(bytes: &[u8]) -> bool {
    json::<VolumeState>(bytes)
}

fn node(bytes: &[u8]) -> bool {
    json::<NodeRecord>(bytes)
}

fn snapshot(bytes: &[u8]) -> bool {
    json::<SnapshotRecord>(bytes)
}

fn receipt(bytes: &[u8]) -> bool {
    if let Ok(receipt) = serde_json::from_slice::<Receipt>(bytes) {
        let _ = receipt.to_note();
    }
    json::<Receipt>(bytes)
}

fn note(bytes: &[u8]) -> bool {
    // Its figures may be numbers that JSON does not keep to the last bit.
    serde_json::from_slice::<Note>(bytes).is_ok()
}

fn host(bytes: &[u8]) -> bool {
    json::<HostIdentity>(bytes)
}

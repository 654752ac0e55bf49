//! The decoders of this room, for the fuzzer (see `crate::doors`).

use super::mountinfo;
use super::superblock;
use crate::doors::Door;

/// Each of them.
pub const ALL: [Door; 2] = [mounts, head];

/// What the kernel says of mounts: paths in it are anybody's.
fn mounts(bytes: &[u8]) -> bool {
    let Ok(mounts) = mountinfo::parse(bytes) else {
        return false;
    };
    for mount in &mounts {
        let _ = mount.is_dead_node();
        assert!(mountinfo::at(&mounts, &mount.point).is_some());
    }
    !mounts.is_empty()
}

/// A device's first bytes: the workload's.
fn head(bytes: &[u8]) -> bool {
    superblock::parse(bytes).is_some()
}

//! The decoders of this room, for the fuzzer (see `crate::doors`).

use super::btf::Types;
use super::mounts;
use crate::doors::Door;

/// Each of them.
pub const ALL: [Door; 2] = [table, types];

/// What the kernel says of mounts: paths in it are anybody's.
fn table(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let count = mounts::parse(text).count();
    assert!(count <= text.lines().count());
    count > 0
}

/// The kernel's types.
fn types(bytes: &[u8]) -> bool {
    let Ok(types) = Types::parse(bytes) else {
        return false;
    };
    let _ = types.offset("request", "rq_disk.major");
    types.offset("bio", "bi_bdev").is_ok() && types.enumerator("REQ_OP_READ").is_ok()
}

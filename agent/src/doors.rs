//! Where bytes from outside are decoded, each by itself and without what is
//! done about them: for the fuzzer, and for the inputs it keeps.
//!
//! The first byte chooses the decoder. What comes out is used as far as it can
//! be without a device, a disk or a peer, and what is written again must be
//! read as the same. Each decoder says whether it took the bytes. Built for
//! tests and fuzzing only.

use crate::{attach, backup, config, evidence, initiator, iscsi, nvme_tcp, pool};

/// A decoder of whatever bytes: whether they are what it decodes.
pub(crate) type Door = fn(&[u8]) -> bool;

/// Everything that an NVMe/TCP host sends, and reservations as they are kept.
pub fn nvme(bytes: &[u8]) {
    choose(bytes, &nvme_tcp::doors::ALL);
}

/// Everything that an iSCSI initiator sends, and reservations as they are kept.
pub fn iscsi(bytes: &[u8]) {
    choose(bytes, &iscsi::doors::ALL);
}

/// Files, records and command lines: the pool's, the store's, a repository's,
/// the kernel's and the operator's.
pub fn records(bytes: &[u8]) {
    choose(bytes, &of_records());
}

fn of_records() -> Vec<Door> {
    let rooms: [&[Door]; 6] = [
        &pool::doors::ALL,
        &backup::doors::ALL,
        &attach::doors::ALL,
        &config::doors::ALL,
        &initiator::doors::ALL,
        &evidence::doors::ALL,
    ];
    rooms.concat()
}

/// The number of the decoder, if it took the bytes.
fn choose(bytes: &[u8], doors: &[Door]) -> Option<usize> {
    let (first, rest) = bytes.split_first()?;
    let door = usize::from(*first) % doors.len();
    doors[door](rest).then_some(door)
}

/// What is read as JSON, and as the same again after it was written.
pub(crate) fn json<T>(bytes: &[u8]) -> bool
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Ok(value) = serde_json::from_slice::<T>(bytes) else {
        return false;
    };
    let again = serde_json::to_vec(&value).expect("what was read can be written");
    let again: T = serde_json::from_slice(&again).expect("what was written can be read");
    assert_eq!(again, value);
    true
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    /// What the fuzzer begins with, and what it found once, on every run; and
    /// it does begin with something that each decoder takes.
    #[test]
    fn inputs_that_are_kept_pass_every_door() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        let targets: [(&str, Vec<Door>); 3] = [
            ("nvme_wire", nvme_tcp::doors::ALL.to_vec()),
            ("iscsi_wire", iscsi::doors::ALL.to_vec()),
            ("records", of_records()),
        ];
        for (target, doors) in targets {
            let inputs = fs::read_dir(corpus.join(target)).unwrap();
            let inputs = inputs.map(|input| fs::read(input.unwrap().path()).unwrap());
            let taken: BTreeSet<_> = inputs.filter_map(|input| choose(&input, &doors)).collect();
            let missing = (0..doors.len()).filter(|door| !taken.contains(door));
            let missing: Vec<usize> = missing.collect();
            assert!(missing.is_empty(), "{target}: {missing:?} took none");
        }
    }
}

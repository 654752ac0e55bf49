//! What needs no kernel: own mounts, and the sum of a disk with partitions.

use super::*;
use crate::evidence::mounts::parse;

fn found(line: &str, own_namespace: bool) -> Found {
    Found {
        mount: parse(line).next().unwrap(),
        own_namespace,
        pid: 7,
    }
}

const STAGED: &str = "9 1 7:0 / /staging/vol rw shared:5 - xfs /dev/loop0 rw";

#[test]
fn own_mounts_are_told_from_private_copies() {
    let own = [PathBuf::from("/staging")];
    let here = found(STAGED, true);
    let peers = peers_of_own(&[(1, here.clone())], &own);
    assert_eq!(peers, HashSet::from([5]));
    assert!(is_own(&here, &own, &peers));
    let slave = found(&STAGED.replace("shared:5", "master:5"), false);
    assert!(is_own(&slave, &own, &peers));
    let private = found(&STAGED.replace("shared:5 ", ""), false);
    assert!(!is_own(&private, &own, &peers));
    let elsewhere = found(&STAGED.replace("/staging/vol", "/mnt"), true);
    assert!(!is_own(&elsewhere, &own, &peers));
    let beside = found(&STAGED.replace("/staging/vol", "/staging-2/vol"), true);
    assert!(!is_own(&beside, &own, &peers));
}

#[test]
fn partitions_account_for_their_share_of_the_whole_disk() {
    // (what is left of the whole disk's count, openers of each partition)
    for (left, parts, unexplained) in [
        (0, &[][..], 0),
        (2, &[], 2),
        (1, &[1], 0),
        (1, &[2], 0),
        (2, &[2], 0),
        (2, &[1, 1], 0),
        (3, &[1], 2),
        (4, &[2], 2),
        (0, &[0, 0], 0),
    ] {
        assert_eq!(whole(left, parts), unexplained, "{left} {parts:?}");
    }
}

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

#[test]
fn without_all_that_a_verdict_needs_there_is_none() {
    use crate::evidence::loader::{RQ_COMPLETE, SOCK_SENT};
    let program = |name, failure: Option<&str>| Program {
        name,
        hook: "iter x",
        failure: failure.map(str::to_owned),
    };
    let all = [BIO_QUEUE, DESCRIPTORS, MAPPINGS, RQ_COMPLETE, SOCK_SENT];
    for refused in all {
        let programs = all.map(|name| program(name, (name == refused).then_some("EINVAL")));
        let needed = matches!(refused, BIO_QUEUE | DESCRIPTORS | MAPPINGS);
        let why = needed.then(|| "iter x does not run on this kernel: EINVAL".to_owned());
        assert_eq!(blindness(&programs, true), why, "{refused}");
    }
    let programs = all.map(|name| program(name, None));
    assert_eq!(blindness(&programs, true), None);
    let why = blindness(&programs, false).unwrap();
    assert!(why.contains("hostPID: true"), "{why}");
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
    let shared = found(STAGED, false);
    assert!(is_own(&shared, &own, &peers));
    // Ours receives from a group that others receive from as well.
    let ours = found(&STAGED.replace("shared:5", "shared:5 master:8"), true);
    let peers = peers_of_own(&[(1, ours)], &own);
    assert_eq!(peers, HashSet::from([5]));
    let other_slave = found(&STAGED.replace("shared:5", "master:8"), false);
    assert!(!is_own(&other_slave, &own, &peers));
    let private = found(&STAGED.replace("shared:5 ", ""), false);
    assert!(!is_own(&private, &own, &peers));
    let elsewhere = found(&STAGED.replace("/staging/vol", "/mnt"), true);
    assert!(!is_own(&elsewhere, &own, &peers));
    let beside = found(&STAGED.replace("/staging/vol", "/staging-2/vol"), true);
    assert!(!is_own(&beside, &own, &peers));
}

#[test]
fn a_count_that_moved_between_a_file_and_its_device_is_seen() {
    let row = |kind, dev, openers| Held {
        kind,
        dev,
        openers,
        ..Held::default()
    };
    let folders = [row(FOLDER, 7, 1), row(FOLDER, 8, 2)];
    let counts = Counts::of(&folders);
    let (own, part) = (row(DEVICE, 7, 1), row(DEVICE, 8, 2));
    assert!(counts.hold_in(&[own, part, row(drover_ebpf::FILE, 7, 9)]));
    // The reader was open and the writer that hides was counted with it; at
    // the folder the reader was closed.
    assert!(!counts.hold_in(&[own, row(DEVICE, 8, 3)]));
    assert!(!counts.hold_in(&[row(DEVICE, 9, 0)]));
}

#[test]
fn partitions_account_for_their_share_of_the_whole_disk() {
    // (what is left of the whole disk's count, openers of each partition,
    // unexplained where each counts, unexplained where only the first does)
    for (left, parts, each, once) in [
        (0, &[][..], 0, 0),
        (2, &[], 2, 2),
        (1, &[1], 0, 0),
        (1, &[2], 0, 0),
        (2, &[2], 0, 1),
        (2, &[1, 1], 0, 0),
        (3, &[1], 2, 2),
        (4, &[2], 2, 3),
        (0, &[0, 0], 0, 0),
    ] {
        assert_eq!(whole(left, parts, true), each, "{left} {parts:?}");
        assert_eq!(whole(left, parts, false), once, "{left} {parts:?}");
    }
}

#[test]
fn releases_are_told_apart_by_number() {
    for (release, new) in [
        ("6.1.0-56-amd64", false),
        ("6.5.13", false),
        ("6.6.14", true),
        ("6.12.117+deb12-amd64", true),
        ("7.0-rc1", true),
        ("5.15.0", false),
        ("", false),
    ] {
        assert_eq!(is_at_least_6_6(release), new, "{release:?}");
    }
}

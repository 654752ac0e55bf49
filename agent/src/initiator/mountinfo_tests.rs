use super::*;
use proptest::prelude::*;

#[test]
fn this_machines_mounts_are_read() {
    let found = mounts().unwrap();
    assert!(at(&found, Path::new("/")).is_some());
}

#[test]
fn a_line_with_tags_and_one_without_are_read() {
    let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue\n\
                 37 35 7:3 / /a\\040b ro - xfs /dev/loop3 rw\n\
                 38 35 0:6 /nvme0n1//deleted /t rw - devtmpfs devtmpfs rw\n";
    let found = parse(text).unwrap();
    assert_eq!(found[0].root, Path::new("/mnt1"));
    assert_eq!(found[0].fs, "ext3");
    assert!(!found[0].read_only);
    assert_eq!(found[1].point, Path::new("/a b"));
    assert_eq!(found[1].number, DevNumber { major: 7, minor: 3 });
    assert!(found[1].read_only && found[1].is(FsType::Xfs));
    assert!(found[2].is_dead_node());
}

#[test]
fn the_mount_on_top_counts() {
    let text = b"1 0 7:1 / /m rw - ext4 a rw\n2 1 7:2 / /m rw - xfs b rw\n";
    let found = parse(text).unwrap();
    assert_eq!(at(&found, Path::new("/m")).unwrap().fs, "xfs");
    assert!(at(&found, Path::new("/")).is_none());
}

#[test]
fn a_line_that_is_none_is_an_error() {
    for line in [
        "1 0 7:1 / /m rw",
        "x 0 7:1 / /m rw - ext4 a rw",
        "1 0 7-1 / /m rw - ext4 a rw",
        "1 0 7:1 / /m rw -",
    ] {
        assert!(parse(line.as_bytes()).is_err(), "{line:?} was taken");
    }
}

/// As the kernel writes a path (fs/seq_file.c).
fn mangle(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for &b in path {
        if b" \t\n\\#".contains(&b) {
            out.extend(format!("\\{b:03o}").bytes());
        } else {
            out.push(b);
        }
    }
    out
}

proptest! {
    #[test]
    fn every_path_survives_the_kernels_escapes(
        parts in proptest::collection::vec(proptest::collection::vec(1_u8..=255, 0..20), 2)
    ) {
        let paths: Vec<Vec<u8>> = parts
            .into_iter()
            .map(|part| [b"/".to_vec(), part].concat())
            .collect();
        let mut line = b"9 8 259:17 ".to_vec();
        line.extend(mangle(&paths[0]));
        line.push(b' ');
        line.extend(mangle(&paths[1]));
        line.extend(b" rw,relatime shared:3 - xfs /dev/x rw\n");
        let found = parse(&line).unwrap();
        prop_assert_eq!(found.len(), 1);
        prop_assert_eq!(&found[0].root, &OsString::from_vec(paths[0].clone()));
        prop_assert_eq!(&found[0].point, &OsString::from_vec(paths[1].clone()));
        prop_assert_eq!(found[0].number, DevNumber { major: 259, minor: 17 });
    }

    #[test]
    fn no_bytes_make_it_fail_but_by_its_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
    }
}

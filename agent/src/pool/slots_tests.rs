use std::fs::OpenOptions;

use proptest::prelude::*;

use super::*;

fn image(slots: &[(u64, &[u8])]) -> Vec<u8> {
    let mut image = vec![0; 2 * SLOT];
    for (index, (sequence, payload)) in slots.iter().enumerate() {
        encode(*sequence, payload, &mut image[index * SLOT..][..SLOT]).unwrap();
    }
    image
}

proptest! {
    /// A write that a crash cuts at any byte leaves the old record or the new one.
    #[test]
    fn a_torn_write_leaves_the_old_or_the_new(
        older in prop::collection::vec(any::<u8>(), 0..2000),
        old in prop::collection::vec(any::<u8>(), 0..2000),
        new in prop::collection::vec(any::<u8>(), 0..2000),
        cut in 0..=SLOT,
        backwards: bool,
    ) {
        let before = image(&[(7, &older), (8, &old)]);
        let after = image(&[(9, &new), (8, &old)]);
        let mut torn = before.clone();
        let part = if backwards { cut..SLOT } else { 0..cut };
        torn[part.clone()].copy_from_slice(&after[part]);
        let (_, sequence, payload) = newest(&torn).expect("one slot is whole");
        match sequence {
            8 => prop_assert_eq!(payload, &old[..]),
            9 => prop_assert_eq!(payload, &new[..]),
            other => prop_assert!(false, "sequence {other}"),
        }
        prop_assert_eq!(newest(&after).unwrap().1, 9);
    }

    /// So does one whose sectors land in any order.
    #[test]
    fn sectors_in_any_order_leave_the_old_or_the_new(
        old in prop::collection::vec(any::<u8>(), 1000..8000),
        new in prop::collection::vec(any::<u8>(), 1000..8000),
        landed in prop::collection::vec(any::<bool>(), SLOT / 512),
    ) {
        let mut torn = image(&[(7, &new), (8, &old)]);
        let after = image(&[(9, &new), (8, &old)]);
        for sector in landed.iter().enumerate().filter_map(|(n, yes)| yes.then_some(n)) {
            let range = sector * 512..(sector + 1) * 512;
            torn[range.clone()].copy_from_slice(&after[range]);
        }
        let (_, sequence, payload) = newest(&torn).expect("one slot is whole");
        prop_assert_eq!(payload, if sequence == 9 { &new[..] } else { &old[..] });
        prop_assert!(sequence >= 8);
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 2 * SLOT)) {
        prop_assert!(newest(&bytes).is_none());
    }

    #[test]
    fn a_false_length_is_refused(length: u32) {
        let mut one = image(&[(1, b"payload")]);
        one[16..20].copy_from_slice(&length.to_le_bytes());
        prop_assert_eq!(newest(&one).is_some(), length == 7);
    }
}

#[test]
fn what_does_not_fit_a_slot_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let root = Root::open(folder.path()).unwrap();
    let name = Path::new("record");
    let mut file = SlotFile::create(&root, name, &"first".to_owned()).unwrap();
    let error = file.put(&"x".repeat(SLOT)).unwrap_err();
    assert!(matches!(error, PoolError::TooLong { .. }), "{error}");
    file.put(&"second".to_owned()).unwrap();
    drop(file);
    let (_, found) = SlotFile::<String>::open(&root, name).unwrap();
    assert_eq!(found, "second");
}

#[test]
fn each_put_spares_the_newest_slot() {
    let folder = tempfile::tempdir().unwrap();
    let root = Root::open(folder.path()).unwrap();
    let name = Path::new("record");
    let path = folder.path().join(name);
    let mut file = SlotFile::create(&root, name, &0u32).unwrap();
    for n in 1..6u32 {
        let newest_slot = file.slot;
        file.put(&n).unwrap();
        // Whatever the next write may do to its own slot, this one's record stays.
        let mut torn = std::fs::read(&path).unwrap();
        torn[(1 - newest_slot) * SLOT + HEADER] ^= 1;
        let (_, _, payload) = newest(&torn).unwrap();
        assert_eq!(payload, (n - 1).to_string().as_bytes());
    }
}

#[test]
fn one_torn_slot_is_tolerated_and_two_are_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let root = Root::open(folder.path()).unwrap();
    let name = Path::new("record");
    let path = folder.path().join(name);
    let mut file = SlotFile::create(&root, name, &1u32).unwrap();
    file.put(&2).unwrap();
    let newest_slot = file.slot;
    drop(file);
    let spoil = |slot: usize| {
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"spoilt", (slot * SLOT + 12) as u64)
            .unwrap();
        file.sync_all().unwrap();
    };
    spoil(newest_slot);
    let (mut file, found) = SlotFile::<u32>::open(&root, name).unwrap();
    assert_eq!(found, 1);
    file.put(&3).unwrap();
    drop(file);
    assert_eq!(SlotFile::<u32>::open(&root, name).unwrap().1, 3);
    spoil(0);
    spoil(1);
    let error = SlotFile::<u32>::open(&root, name).unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(0)
        .unwrap();
    let error = SlotFile::<u32>::open(&root, name).unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
}

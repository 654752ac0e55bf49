use proptest::prelude::*;

use super::*;

const A: Uuid = Uuid::from_u128(1);
const B: Uuid = Uuid::from_u128(2);
const C: Uuid = Uuid::from_u128(3);
const KINDS: [Kind; 6] = [
    Kind::WriteExclusive,
    Kind::ExclusiveAccess,
    Kind::WriteExclusiveRegistrants,
    Kind::ExclusiveAccessRegistrants,
    Kind::WriteExclusiveAll,
    Kind::ExclusiveAccessAll,
];

/// A and B registered with keys 10 and 20; C is not.
fn registered() -> Record {
    let record = done(&Record::default(), A, Command::Register { key: 10 }).record;
    done(&record, B, Command::Register { key: 20 }).record
}

fn held(kind: Kind) -> Record {
    done(&registered(), A, Command::Acquire { key: 10, kind }).record
}

fn done(record: &Record, host: Uuid, command: Command) -> Change {
    record.apply(host, command).unwrap()
}

fn refused(record: &Record, host: Uuid, command: Command) -> Status {
    record.apply(host, command).unwrap_err()
}

fn preempt(key: u64, preempted: u64, kind: Kind) -> Command {
    Command::Preempt {
        key,
        preempted,
        kind,
        abort: true,
    }
}

/// The table of the base specification's figure "Command Behavior in the
/// Presence of a Reservation": (read, write) of the holder A, the registrant B
/// and the stranger C.
#[test]
fn each_type_lets_in_whom_it_should() {
    let everything = (true, true);
    let (read, nothing) = ((true, false), (false, false));
    let table = [
        (Kind::WriteExclusive, [everything, read, read]),
        (Kind::ExclusiveAccess, [everything, nothing, nothing]),
        (
            Kind::WriteExclusiveRegistrants,
            [everything, everything, read],
        ),
        (
            Kind::ExclusiveAccessRegistrants,
            [everything, everything, nothing],
        ),
        (Kind::WriteExclusiveAll, [everything, everything, read]),
        (Kind::ExclusiveAccessAll, [everything, everything, nothing]),
    ];
    for (kind, expected) in table {
        let record = held(kind);
        assert_eq!(
            [A, B, C].map(|host| record.access(host)),
            expected,
            "{kind:?}"
        );
        assert_eq!(Kind::of(kind as u8), Some(kind));
    }
    assert_eq!(
        [A, B, C].map(|host| registered().access(host)),
        [everything; 3]
    );
    assert_eq!((Kind::of(0), Kind::of(7)), (None, None));
}

#[test]
fn registering_needs_the_key_that_one_has() {
    let record = registered();
    let again = done(&record, A, Command::Register { key: 10 }).record;
    assert_eq!((again.generation, again.registrants.len()), (3, 2));
    for (host, command) in [
        (A, Command::Register { key: 11 }),
        (A, Command::Unregister { key: Some(11) }),
        (
            A,
            Command::Replace {
                key: Some(11),
                new: 12,
            },
        ),
        (C, Command::Unregister { key: None }),
        (C, Command::Replace { key: None, new: 12 }),
        (
            C,
            Command::Acquire {
                key: 0,
                kind: Kind::WriteExclusive,
            },
        ),
        (
            C,
            Command::Release {
                key: 0,
                kind: Kind::WriteExclusive,
            },
        ),
        (C, Command::Clear { key: 0 }),
    ] {
        assert_eq!(
            refused(&record, host, command),
            Status::RESERVATION_CONFLICT,
            "{command:?}"
        );
    }
    let replaced = done(&record, A, Command::Replace { key: None, new: 12 }).record;
    assert_eq!(
        (replaced.key_of(A), replaced.key_of(B)),
        (Some(12), Some(20))
    );
    let mut full = Record::default();
    for host in 0..REGISTRANTS as u128 {
        full = done(&full, Uuid::from_u128(host), Command::Register { key: 1 }).record;
    }
    let one_more = Command::Register { key: 1 };
    assert_eq!(
        refused(&full, Uuid::max(), one_more),
        Status::INTERNAL_ERROR
    );
}

#[test]
fn a_reservation_is_one_holders_or_everyones() {
    for kind in KINDS {
        let record = held(kind);
        let again = done(&record, A, Command::Acquire { key: 10, kind }).record;
        assert_eq!(again, record);
        let other = Command::Acquire { key: 20, kind };
        let all = kind.all_hold();
        assert_eq!(record.apply(B, other).is_ok(), all, "{kind:?}");
        let another = KINDS[(kind as usize) % 6];
        let change = Command::Acquire {
            key: 10,
            kind: another,
        };
        assert_eq!(refused(&record, A, change), Status::RESERVATION_CONFLICT);
        assert_eq!(
            refused(
                &record,
                A,
                Command::Release {
                    key: 10,
                    kind: another
                }
            ),
            Status::INVALID_FIELD
        );
        // Who does not hold it releases nothing, with success.
        let nothing = done(&record, B, Command::Release { key: 20, kind });
        assert_eq!(nothing.record.reservation.is_some(), !all, "{kind:?}");
        let released = done(&record, A, Command::Release { key: 10, kind });
        assert_eq!(released.record.reservation, None);
        let told = match kind.serves_registrants() {
            true => vec![(B, Notice::ReservationReleased)],
            false => vec![],
        };
        assert_eq!(released.notices, told, "{kind:?}");
        // The holder's unregister releases, unless others hold it too.
        let left = done(&record, A, Command::Unregister { key: Some(10) });
        assert_eq!(left.record.reservation.is_some(), all);
        let last = done(&left.record, B, Command::Unregister { key: Some(20) });
        assert_eq!(last.record.reservation, None);
        let cleared = done(&record, B, Command::Clear { key: 20 });
        assert_eq!(cleared.notices, [(A, Notice::ReservationPreempted)]);
        assert!(cleared.record.registrants.is_empty() && cleared.record.reservation.is_none());
    }
}

#[test]
fn preempting_takes_over_or_only_removes() {
    let new = Kind::ExclusiveAccess;
    for kind in KINDS {
        let record = held(kind);
        if kind.all_hold() {
            let over = done(&record, B, preempt(20, 0, new));
            assert_eq!(over.record.reservation, Some((new, B)));
            assert_eq!(
                (over.aborted.as_slice(), over.record.key_of(A)),
                (&[A][..], None)
            );
            let removed = done(&record, B, preempt(20, 10, new));
            assert_eq!(removed.record.reservation.map(|(kind, _)| kind), Some(kind));
            assert_eq!(removed.record.key_of(A), None);
        } else {
            assert_eq!(
                refused(&record, B, preempt(20, 0, new)),
                Status::INVALID_FIELD
            );
            let over = done(&record, B, preempt(20, 10, new));
            assert_eq!(over.record.reservation, Some((new, B)));
            assert_eq!(over.notices, [(A, Notice::RegistrationPreempted)]);
            assert_eq!(over.aborted, [A]);
            assert_eq!(over.record.access(A), (false, false));
            let removed = done(&record, A, preempt(10, 20, new));
            assert_eq!(
                removed.record.reservation,
                Some((kind, A)),
                "it was not the holder's"
            );
            assert_eq!(removed.record.key_of(B), None);
        }
        assert_eq!(
            refused(&record, B, preempt(20, 77, new)),
            Status::RESERVATION_CONFLICT
        );
        assert_eq!(
            refused(&record, B, preempt(21, 10, new)),
            Status::RESERVATION_CONFLICT
        );
    }
    // Without a reservation only registrations go, and none is made.
    let removed = done(&registered(), A, preempt(10, 20, new));
    assert_eq!(
        (removed.record.key_of(B), removed.record.reservation),
        (None, None)
    );
    // A preempt without abort aborts nobody; the holder may preempt itself for another type.
    let record = held(Kind::WriteExclusiveRegistrants);
    let command = Command::Preempt {
        key: 10,
        preempted: 10,
        kind: new,
        abort: false,
    };
    let itself = done(&record, A, command);
    assert_eq!(itself.record.reservation, Some((new, A)));
    assert_eq!(itself.record.key_of(A), Some(10));
    assert_eq!(itself.notices, [(B, Notice::ReservationReleased)]);
    assert!(itself.aborted.is_empty());
}

#[test]
fn a_report_shows_who_holds_what() {
    let record = held(Kind::WriteExclusive).with_persistence(true);
    let page = record.report(|host| if host == A { 7 } else { 0xffff });
    assert_eq!(page.len(), 64 * 3);
    assert_eq!((u32_at(&page, 0), page[4], page[5], page[9]), (2, 1, 2, 1));
    assert_eq!((&page[64..67], u64_at(&page, 72)), (&[7, 0, 1][..], 10));
    assert_eq!(&page[80..96], A.as_bytes());
    assert_eq!(
        (&page[128..131], u64_at(&page, 136)),
        (&[0xff, 0xff, 0][..], 20)
    );
}

fn command() -> impl Strategy<Value = Command> {
    let key = || prop_oneof![Just(0u64), Just(10), Just(20), Just(30)];
    let kind = || (0usize..6).prop_map(|index| KINDS[index]);
    prop_oneof![
        key().prop_map(|key| Command::Register { key }),
        proptest::option::of(key()).prop_map(|key| Command::Unregister { key }),
        (proptest::option::of(key()), key()).prop_map(|(key, new)| Command::Replace { key, new }),
        (key(), kind()).prop_map(|(key, kind)| Command::Acquire { key, kind }),
        (key(), key(), kind(), any::<bool>()).prop_map(|(key, preempted, kind, abort)| {
            Command::Preempt {
                key,
                preempted,
                kind,
                abort,
            }
        }),
        (key(), kind()).prop_map(|(key, kind)| Command::Release { key, kind }),
        key().prop_map(|key| Command::Clear { key }),
    ]
}

proptest! {
    /// Whatever hosts do: a holder is registered, nobody is registered twice,
    /// who is preempted is registered no more, and what is kept comes back.
    #[test]
    fn any_history_leaves_a_sound_record(
        history in proptest::collection::vec((1u128..5, command()), 0..60)
    ) {
        let mut record = Record::default();
        for (host, command) in history {
            let Ok(change) = record.apply(Uuid::from_u128(host), command) else { continue };
            for host in &change.aborted {
                prop_assert_eq!(change.record.key_of(*host), None);
            }
            record = change.record;
            let hosts: std::collections::BTreeSet<_> =
                record.registrants.iter().map(|one| one.host).collect();
            prop_assert_eq!(hosts.len(), record.registrants.len());
            if let Some((kind, holder)) = record.reservation {
                prop_assert!(kind.all_hold() && !hosts.is_empty() || hosts.contains(&holder));
            }
            prop_assert_eq!(Record::from_bytes(&record.to_bytes()), Some(record.clone()));
        }
    }

    #[test]
    fn damage_is_noticed(at in 0usize..78, bit in 0u8..8) {
        let mut bytes = held(Kind::WriteExclusive).to_bytes();
        prop_assert_eq!(bytes.len(), 78);
        bytes[at] ^= 1 << bit;
        prop_assert_eq!(Record::from_bytes(&bytes), None);
    }

    #[test]
    fn anything_is_a_record_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
        let _ = Record::from_bytes(&bytes);
    }
}

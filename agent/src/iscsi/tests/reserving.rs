//! Reservations of both kinds, over several sessions.

use super::*;

const RESERVE: [u8; 6] = [0x16, 0, 0, 0, 0, 0];
const RELEASE: [u8; 6] = [0x17, 0, 0, 0, 0, 0];
const MODE_SENSE: [u8; 6] = [0x1a, 0, 0x3f, 0, 64, 0];
const CAPABILITIES: [u8; 12] = [0xa3, 0x0c, 1, 0x28, 0, 0, 0, 0, 0, 64, 0, 0];

fn out(one: &mut Initiator, action: u8, kind: u8, key: u8, other: u8) -> Pdu {
    let mut list = [0; 24];
    (list[7], list[15]) = (key, other);
    only(one.run(0x20, 24, &[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list))
}

fn status_of(one: &mut Initiator, cdb: &[u8]) -> u8 {
    only(one.run(0x40, 64, cdb, &[])).header[3]
}

#[test]
fn what_one_session_reserves_the_others_may_not_use() {
    let mut one = Initiator::new(OPEN);
    let mut two = one.second(2);
    assert_eq!(only(one.run(0, 0, &RESERVE, &[])).status(), 0);
    assert_eq!(only(one.run(0, 0, &RESERVE, &[])).status(), 0, "again");
    for cdb in [
        &[0; 6][..],
        &MODE_SENSE,
        &RESERVE,
        &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0],
    ] {
        assert_eq!(status_of(&mut two, cdb), 0x18, "{cdb:x?}");
    }
    for cdb in [&[0x12, 0, 0, 0, 64, 0][..], &[3, 0, 0, 0, 18, 0], &RELEASE] {
        assert_eq!(status_of(&mut two, cdb), 0, "{cdb:x?}");
    }
    assert_eq!(
        only(two.ready()).status(),
        0x18,
        "whose release changed nothing"
    );
    assert_eq!(only(one.ready()).status(), 0);
    assert_eq!(only(one.run(0, 0, &RELEASE, &[])).status(), 0);
    assert_eq!(only(two.ready()).status(), 0);
}

/// The second session resets the unit, which the first one must take note of.
fn reset(one: &mut Initiator, two: &mut Initiator, function: u8) {
    assert!(two.manage(function, 0).is_empty());
    assert!(one.nudge().is_empty());
    assert_eq!(only(two.nudge()).header[2], 0);
}

#[test]
fn a_reservation_ends_with_its_session_or_a_reset() {
    type End = fn(&mut Initiator, &mut Initiator);
    let ends: [End; 5] = [
        |one, _| {
            let mut header = one.pdu(0x46, 0x80);
            header[20..24].fill(0);
            only(one.send(header, &[]));
        },
        |one, _| one.line.close(),
        |one, two| reset(one, two, 5),
        |one, two| reset(one, two, 6),
        |one, _| {
            let mut again = one.another(1);
            assert_eq!(only(again.log_in(OPEN)).login_status(), 0);
        },
    ];
    for (number, end) in ends.into_iter().enumerate() {
        let mut one = Initiator::new(OPEN);
        let mut two = one.second(2);
        only(one.run(0, 0, &RESERVE, &[]));
        assert_eq!(only(two.ready()).status(), 0x18, "{number}");
        end(&mut one, &mut two);
        let told = only(two.ready());
        if matches!(number, 2 | 3) {
            assert_eq!(told.sense(), (6, 0x29, 3));
            assert_eq!(only(two.ready()).status(), 0);
        } else {
            assert_eq!(told.status(), 0, "{number}");
        }
    }
    // A cold reset ends the sessions as well.
    let mut one = Initiator::new(OPEN);
    let mut two = one.second(2);
    only(one.run(0, 0, &RESERVE, &[]));
    reset(&mut one, &mut two, 7);
    one.nudge();
    assert!(one.line.end().is_some() && two.line.end().is_some());
    assert_eq!(only(two.second(2).ready()).status(), 0);
}

#[test]
fn a_persistent_reservation_keeps_others_out_as_its_type_says() {
    for (kind, reads, registrants) in [
        (1, true, false),
        (3, false, false),
        (5, true, true),
        (6, false, true),
        (7, true, true),
        (8, false, true),
    ] {
        let mut one = Initiator::new(OPEN);
        let (mut two, mut three) = (one.second(2), one.second(3));
        assert_eq!(out(&mut one, 0, 0, 0, 11).status(), 0);
        assert_eq!(out(&mut two, 0, 0, 0, 12).status(), 0);
        assert_eq!(out(&mut one, 1, kind, 11, 0).status(), 0);
        assert_eq!(out(&mut one, 1, kind, 99, 0).status(), 0x18, "another key");
        let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        let mut block_status = [0; 16];
        (block_status[0], block_status[1], block_status[13]) = (0x9e, 0x12, 24);
        let conflict = |free: bool| if free { 0 } else { 0x18 };
        for (who, registered) in [(&mut two, true), (&mut three, false)] {
            let all = registered && registrants;
            for cdb in [&read[..], &block_status, &CAPABILITIES] {
                assert_eq!(
                    status_of(who, cdb),
                    conflict(reads || all),
                    "{kind} {cdb:x?}"
                );
            }
            assert_eq!(status_of(who, &MODE_SENSE), conflict(all), "{kind}");
            let written = only(who.write(0, 1, &[1; 4096])).status();
            assert_eq!(written, conflict(all), "{kind}");
            assert_eq!(only(who.ready()).status(), 0, "{kind}");
        }
        assert_eq!(only(one.write(0, 1, &[1; 4096])).status(), 0);
        assert_eq!(only(two.run(0, 0, &RESERVE, &[])).status(), 0x18, "{kind}");
    }
}

#[test]
fn a_reservation_that_came_while_data_was_asked_for_keeps_it_out() {
    let mut one = Initiator::new(SUPPRESSED);
    let mut two = one.second(2);
    let asked = only(one.write(0, 1, &[]));
    out(&mut two, 0, 0, 0, 12);
    assert_eq!(out(&mut two, 1, 3, 12, 0).status(), 0);
    let end = only(one.data_out(true, asked.word(20), 0, 0, &[1; 4096]));
    assert_eq!((end.status(), one.stored(0)), (0x18, 0));
}

#[test]
fn who_loses_a_reservation_is_told() {
    let mut one = Initiator::new(OPEN);
    let mut two = one.second(2);
    out(&mut one, 0, 0, 0, 11);
    out(&mut two, 0, 0, 0, 12);
    out(&mut one, 1, 5, 11, 0);
    assert_eq!(out(&mut one, 2, 5, 11, 0).status(), 0);
    assert_eq!(only(two.ready()).sense(), (6, 0x2a, 4), "released");
    out(&mut one, 1, 1, 11, 0);
    assert_eq!(out(&mut two, 4, 1, 12, 11).status(), 0);
    assert_eq!(
        only(one.ready()).sense(),
        (6, 0x2a, 5),
        "registration preempted"
    );
    assert_eq!(only(one.write(0, 1, &[1; 4096])).status(), 0x18);
    out(&mut one, 0, 0, 0, 11);
    assert_eq!(out(&mut two, 3, 0, 12, 0).status(), 0);
    assert_eq!(only(one.ready()).sense(), (6, 0x2a, 3), "cleared");
    assert_eq!(only(one.write(0, 1, &[1; 4096])).status(), 0);
    let keys = only(one.run(0x40, 64, &[0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0], &[]));
    assert_eq!(keys.data[4..8], [0; 4], "no keys");
}

#[test]
fn preempt_and_abort_ends_what_the_other_has_under_way() {
    let mut one = Initiator::new(SUPPRESSED);
    let mut two = one.second(2);
    out_of(&mut one, 11);
    out(&mut two, 0, 0, 0, 12);
    let asked = only(one.write(0, 1, &[]));
    two.line.hold(true);
    let mut list = [0; 24];
    (list[7], list[15]) = (12, 11);
    let cdb = [0x5f, 5, 1, 0, 0, 0, 0, 0, 24, 0];
    assert!(two.run(0x20, 24, &cdb, &list).is_empty());
    // What waits for the other's connection runs on a thread of its own.
    let ended = std::thread::scope(|scope| {
        let waits = scope.spawn(move || {
            two.line.hold(false);
            only(two.nudge())
        });
        while !waits.is_finished() {
            assert!(one.nudge().is_empty(), "no answer to what is aborted");
            std::thread::sleep(Duration::from_millis(1));
        }
        waits.join().unwrap()
    });
    assert_eq!(ended.status(), 0);
    assert!(
        one.data_out(true, asked.word(20), 0, 0, &[1; 4096])
            .is_empty()
    );
    assert_eq!(one.stored(0), 0);
    let mut told = vec![only(one.ready()).sense(), only(one.ready()).sense()];
    told.sort_unstable();
    assert_eq!(told, [(6, 0x2a, 5), (6, 0x2f, 0)]);
}

/// Registers this key; where data may not come by itself.
fn out_of(one: &mut Initiator, key: u8) {
    let mut list = [0; 24];
    list[15] = key;
    let asked = only(one.run(0x20, 24, &[0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0], &[]));
    let end = only(one.data_out(true, asked.word(20), 0, 0, &list));
    assert_eq!(end.status(), 0);
}

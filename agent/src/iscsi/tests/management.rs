//! Task management.

use super::*;

#[test]
fn an_abort_ends_a_command_without_an_answer() {
    let mut one = Initiator::new(SUPPRESSED);
    only(one.write(0, 1, &[]));
    let tag = one.tag;
    let end = only(one.manage(1, tag));
    assert_eq!((end.opcode(), end.header[2]), (0x22, 0));
    assert!(
        one.data_out(true, 0, 0, 0, &[1; 4096]).is_empty(),
        "read over"
    );
    assert_eq!(only(one.manage(1, tag)).header[2], 1, "no such task");
    assert_eq!(only(one.ready()).status(), 0);
}

#[test]
fn an_abort_waits_for_what_the_device_has() {
    let mut one = Initiator::new(OPEN);
    one.line.hold(true);
    assert!(one.write(0, 1, &[1; 4096]).is_empty());
    let tag = one.tag;
    assert!(one.manage(1, tag).is_empty());
    assert!(one.nudge().is_empty());
    one.line.hold(false);
    let end = only(one.nudge());
    assert_eq!((end.opcode(), end.header[2]), (0x22, 0));
}

#[test]
fn functions_that_are_not_there_say_so() {
    let mut one = Initiator::new(OPEN);
    assert_eq!(only(one.manage(8, 1)).header[2], 4);
    assert_eq!(only(one.manage(3, 1)).header[2], 5);
    for function in [2, 4, 5, 6] {
        assert_eq!(only(one.manage(function, 0)).header[2], 0, "{function}");
    }
}

#[test]
fn a_reset_is_told_on_every_path_and_waits_for_the_others() {
    let mut one = Initiator::new(OPEN);
    let mut two = one.second(2);
    two.line.hold(true);
    assert!(two.read(0, 1).is_empty());
    assert!(one.manage(5, 0).is_empty());
    assert!(two.nudge().is_empty());
    assert!(one.nudge().is_empty(), "the other's read has not settled");
    two.line.hold(false);
    assert!(two.nudge().is_empty(), "no answer to what was aborted");
    assert_eq!(only(one.nudge()).header[2], 0);
    for path in [&mut one, &mut two] {
        assert_eq!(only(path.ready()).sense(), (6, 0x29, 3));
        assert_eq!(only(path.ready()).status(), 0);
    }
}

#[test]
fn an_abort_of_what_was_answered_finds_nothing() {
    let mut one = Initiator::new(OPEN);
    assert_eq!(only(one.write(0, 1, &[1; 4096])).status(), 0);
    let tag = one.tag;
    assert_eq!(
        only(one.manage(1, tag)).header[2],
        1,
        "GOOD, and no such task"
    );
}

#[test]
fn an_abort_of_all_leaves_the_other_session_alone_unless_it_says_so() {
    for (function, others) in [(2, false), (4, true)] {
        let mut one = Initiator::new(SUPPRESSED);
        let mut two = one.second(2);
        only(one.write(0, 1, &[]));
        let begun = two.command(0x20, 2 * BLOCK_LENGTH, &write_cdb(5, 2));
        assert!(
            two.send(begun, &[1; 4096]).is_empty(),
            "data is still to come"
        );
        let answered = one.manage(function, 0);
        let rest = two.data_out(true, NO_TAG, 0, 4096, &[1; 4096]);
        if others {
            assert!(answered.is_empty());
            assert!(rest.is_empty(), "aborted, and so not answered");
            assert_eq!(only(one.nudge()).header[2], 0);
            assert_eq!(only(two.ready()).sense(), (6, 0x2f, 0));
        } else {
            assert_eq!(only(answered).header[2], 0);
            assert_eq!(only(rest).status(), 0);
        }
        assert_eq!(two.stored(5 * BLOCK_LENGTH), u8::from(!others));
        assert_eq!(only(one.ready()).status(), 0);
    }
}

#[test]
fn after_a_reset_data_is_not_waited_for() {
    let mut one = Initiator::new(SUPPRESSED);
    let asked = only(one.write(0, 1, &[]));
    assert_eq!(only(one.manage(5, 0)).header[2], 0, "though it never came");
    assert!(
        one.data_out(true, asked.word(20), 0, 0, &[1; 4096])
            .is_empty()
    );
    assert_eq!(only(one.ready()).sense(), (6, 0x29, 3));
    assert_eq!(one.stored(0), 0);
    assert_eq!(only(one.ready()).status(), 0);
}

#[test]
fn a_function_needs_a_lun_that_is_there() {
    let mut one = Initiator::new(OPEN);
    for (function, response) in [(1, 2), (2, 2), (4, 2), (5, 2), (6, 0)] {
        let mut header = one.pdu(0x42, 0x80 | function);
        header[9] = 1;
        assert_eq!(
            only(one.send(header, &[])).header[2],
            response,
            "{function}"
        );
    }
}

//! Command and status numbers.

use super::*;

#[test]
fn commands_beyond_the_window_are_ignored_and_gaps_end_the_connection() {
    let mut one = Initiator::new(OPEN);
    let expected = one.number;
    one.number += WINDOW;
    assert!(one.ready().is_empty());
    one.number = expected - 1;
    assert!(one.ready().is_empty());
    one.number = expected;
    assert_eq!(only(one.ready()).status(), 0);
    one.number += 1;
    assert_eq!(only(one.ready()).opcode(), 0x3f);
    assert!(one.line.end().is_some());
}

#[test]
fn the_window_closes_while_commands_are_outstanding() {
    let mut one = Initiator::new(OPEN);
    let first = one.number;
    one.line.hold(true);
    for _ in 0..WINDOW {
        assert!(one.read(0, 1).is_empty());
    }
    assert_eq!(one.line.held(), WINDOW as usize);
    assert!(one.read(0, 1).is_empty());
    assert_eq!(one.line.held(), WINDOW as usize, "ignored");
    one.line.hold(false);
    let pdus = one.nudge();
    assert_eq!(pdus.len(), WINDOW as usize);
    let last = pdus.last().unwrap();
    assert_eq!(last.word(32), first + WINDOW + WINDOW - 1, "MaxCmdSN");
}

#[test]
fn status_numbers_count_what_has_a_status() {
    let mut one = Initiator::new(SUPPRESSED);
    let first = only(one.ready()).word(24);
    let asked = only(one.write(0, 1, &[]));
    assert_eq!(
        (asked.opcode(), asked.word(24)),
        (0x31, first + 1),
        "R2T shows the next"
    );
    let end = only(one.data_out(true, asked.word(20), 0, 0, &[1; 4096]));
    assert_eq!(end.word(24), first + 1);
    let read = only(one.read(0, 1));
    assert_eq!((read.opcode(), read.word(24)), (0x25, first + 2));
    let said = one.line.wait(Duration::from_secs(31));
    let ping = only(one.take(said));
    assert_eq!(
        (ping.opcode(), ping.word(24)),
        (0x20, first + 3),
        "and takes none"
    );
    let snack = one.pdu(0x10, 0x80);
    assert_eq!(
        only(one.send(snack, &[])).word(24),
        first + 3,
        "a Reject has one"
    );
    assert_eq!(only(one.manage(2, 0)).word(24), first + 4);
    let mut event_then = one.second(2);
    event_then.target.unit().announce_resize();
    let event = only(one.nudge());
    assert_eq!((event.opcode(), event.word(24)), (0x32, first + 5));
    assert_eq!(only(event_then.nudge()).opcode(), 0x32);
    assert_eq!(only(one.ready()).word(24), first + 6);
}

#[test]
fn immediate_commands_have_no_number_and_an_end() {
    let mut one = Initiator::new(OPEN);
    let before = only(one.ready());
    let immediate = |one: &mut Initiator| {
        let mut header = one.command(0xc0, 4096, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        header[0] |= 0x40;
        one.number -= 1;
        one.send(header, &[])
    };
    let pdu = only(immediate(&mut one));
    assert_eq!(
        [pdu.word(28), pdu.word(32)],
        [before.word(28), before.word(32)]
    );
    one.line.hold(true);
    for _ in 0..IMMEDIATE {
        assert!(immediate(&mut one).is_empty());
    }
    assert_eq!(only(immediate(&mut one)).reject(), 6);
    assert!(one.line.end().is_none());
    one.line.hold(false);
    assert_eq!(one.nudge().len(), IMMEDIATE);
    assert_eq!(only(one.ready()).status(), 0);
}

//! What breaks the rules.

use super::*;

const DIGESTS: &[(&str, &str)] = &[("DataDigest", "CRC32C"), ("HeaderDigest", "CRC32C")];

#[test]
fn a_wrong_digest_ends_the_connection() {
    for (at, reason) in [(20, "header-digest"), (BHS + 4 + 100, "data-digest")] {
        let mut one = Initiator::new(&[OPEN, DIGESTS].concat());
        let header = one.command(0xa0, 4096, &write_cdb(0, 1));
        let mut bytes = one.bytes(header, &[1; 4096]);
        bytes[at] ^= 1;
        let said = one.line.send(&bytes);
        let said = one.take(said);
        if at < BHS {
            assert!(
                said.is_empty(),
                "what came cannot be told from anything else"
            );
        } else {
            assert_eq!(only(said).reject(), 2);
        }
        assert!(one.line.end().is_some());
        assert_eq!((one.malformed(reason), one.stored(0)), (1, 0));
    }
}

#[test]
fn the_digest_covers_the_padding() {
    let mut one = Initiator::new(&[OPEN, DIGESTS].concat());
    let header = one.command(0xa0, 201, &write_cdb(0, 1));
    let sound = one.bytes(header, &[1; 201]);
    let said = one.line.send(&sound);
    assert_eq!(only(one.take(said)).status(), 0);
    let header = one.command(0xa0, 201, &write_cdb(0, 1));
    let mut bytes = one.bytes(header, &[1; 201]);
    bytes[BHS + 4 + 202] = 1;
    let said = one.line.send(&bytes);
    assert_eq!(only(one.take(said)).reject(), 2);
}

/// What a session is sent, the reason of the Reject that answers it, its name
/// in metrics, and whether the session goes on.
type Case = (fn(&mut Initiator) -> Vec<Pdu>, u8, &'static str, bool);

const CASES: [Case; 18] = [
    // An opcode that initiators do not have.
    (|one| raw(one, 0x1f, 0x80, &[]), 5, "opcode", false),
    (|one| raw(one, 0x21, 0x80, &[]), 5, "opcode", false),
    // More data than was declared; more additional headers than there are.
    (
        |one| cut(one, |header| header[5..8].fill(0xff)),
        9,
        "too-long",
        false,
    ),
    (
        |one| cut(one, |header| header[4] = 0xff),
        9,
        "too-long",
        false,
    ),
    // A login in a session.
    (|one| raw(one, 0x43, 0x87, &[]), 4, "phase", false),
    // A retransmission that error recovery level 0 has not.
    (|one| raw(one, 0x10, 0x80, &[]), 3, "snack", true),
    // Text that is none; a tag that was not given out; C beside F.
    (|one| raw(one, 0x44, 0x80, b"no pair"), 9, "text", false),
    (|one| transfer(one, 0x44, 0x80, 7), 9, "field", false),
    (
        |one| raw(one, 0x44, 0xc0, b"SendTargets=All"),
        9,
        "field",
        false,
    ),
    // A logout for a reason that there is not.
    (|one| raw(one, 0x46, 0x83, &[]), 9, "field", false),
    // A number that leaves one out.
    (
        |one| {
            one.number += 1;
            one.ready()
        },
        4,
        "order",
        false,
    ),
    // A tag that is in use, and the one that names nothing.
    (tag_in_use, 7, "tag-in-use", false),
    (
        |one| {
            one.tag = NO_TAG - 1;
            one.ready()
        },
        7,
        "tag-in-use",
        false,
    ),
    // More immediate data than may come by itself, or with a command that takes none.
    (
        |one| one.run(0x20, 4096, &write_cdb(0, 1), &[0; 4097]),
        4,
        "unexpected-data",
        false,
    ),
    (
        |one| one.run(0x20, 1 << 20, &write_cdb(0, 128), &[0; (64 << 10) + 1]),
        4,
        "unexpected-data",
        false,
    ),
    (
        |one| one.run(0x40, 4096, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 4096]),
        4,
        "unexpected-data",
        false,
    ),
    // Data beyond what may come unasked, and out of its order.
    (
        |one| unasked(one, 0, 4096 + 512),
        4,
        "unexpected-data",
        true,
    ),
    (|one| unasked(one, 1, 512), 4, "order", true),
];

fn raw(one: &mut Initiator, opcode: u8, flags: u8, data: &[u8]) -> Vec<Pdu> {
    let header = one.pdu(opcode, flags);
    one.send(header, data)
}

fn transfer(one: &mut Initiator, opcode: u8, flags: u8, tag: u32) -> Vec<Pdu> {
    let mut header = one.pdu(opcode, flags);
    header[20..24].copy_from_slice(&tag.to_be_bytes());
    one.send(header, &[])
}

/// A header that is changed behind its length.
fn cut(one: &mut Initiator, change: fn(&mut [u8; BHS])) -> Vec<Pdu> {
    let mut header = one.pdu(0x40, 0x80);
    change(&mut header);
    let said = one.line.send(&header);
    one.take(said)
}

/// A tag that a command has which is under way.
fn tag_in_use(one: &mut Initiator) -> Vec<Pdu> {
    one.line.hold(true);
    assert!(one.read(0, 1).is_empty());
    one.tag -= 1;
    one.ready()
}

fn unasked(one: &mut Initiator, number: u32, length: usize) -> Vec<Pdu> {
    let header = one.command(0x20, 4096, &write_cdb(0, 1));
    assert!(one.send(header, &[]).is_empty());
    let mut said = one.data_out(true, NO_TAG, number, 0, &vec![9; length]);
    let end = said.pop().unwrap();
    assert_eq!(
        (end.sense().0, end.data[14]),
        (0xb, 0x0c),
        "its command ends too"
    );
    said
}

#[test]
fn what_is_malformed_is_rejected_and_counted_and_concerns_nobody_else() {
    for (number, (send, reason, name, goes_on)) in CASES.into_iter().enumerate() {
        let mut one = Initiator::new(OPEN);
        let mut two = one.second(2);
        two.line.hold(true);
        assert!(
            two.write(9, 1, &[4; 4096]).is_empty(),
            "under way beside it"
        );
        assert_eq!(only(send(&mut one)).reject(), reason, "{number} {name}");
        assert_eq!(one.malformed(name), 1, "{number} {name}");
        assert_eq!(one.line.end().is_none(), goes_on, "{number} {name}");
        if goes_on {
            assert_eq!(only(one.ready()).status(), 0, "{number}");
        }
        two.line.hold(false);
        assert_eq!(only(two.nudge()).status(), 0, "{number} {name}");
        assert_eq!(
            (two.stored(9 * BLOCK_LENGTH), two.stored(0)),
            (4, 0),
            "{number}"
        );
        assert_eq!(only(two.ready()).status(), 0);
        let mut three = two.another(3);
        assert_eq!(only(three.log_in(&[])).login_status(), 0);
    }
}

#[test]
fn a_first_pdu_that_is_no_login_is_refused() {
    let one = Initiator::new(OPEN);
    for opcode in [0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x10, 0x1f] {
        let mut other = one.another(2);
        let answer = only(raw(&mut other, opcode | 0x40, 0x80, &[]));
        assert_eq!(answer.login_status(), 0x020b, "{opcode:#x}");
        assert!(other.line.end().is_some());
        assert_eq!(other.malformed("phase"), 1);
    }
    let mut other = one.another(2);
    let mut header = other.pdu(0x43, 0x87);
    header[5..8].copy_from_slice(&[0, 0x20, 1]);
    let said = other.line.send(&header);
    let answer = only(other.take(said));
    assert_eq!(answer.login_status(), 0x0200, "more than 8192 bytes");
    assert!(other.line.end().is_some());
    assert_eq!(other.malformed("too-long"), 1);
}

mod any {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever comes: it is answered or ends the connection, nothing else.
        #[test]
        fn bytes_are_survived(logged_in: bool, opcode in 0_u8..0x20, bytes in prop::collection::vec(any::<u8>(), 47..400)) {
            let mut one = Initiator::new(OPEN);
            if !logged_in {
                one.line = line(&one.target, &one.metrics);
            }
            let mut likely = vec![opcode | 0x40];
            likely.extend(&bytes);
            likely[4..7].fill(0);
            one.line.send(&likely);
            one.line.send(&bytes);
            one.line.close();
            prop_assert!(one.line.end().is_some());
        }
    }
}

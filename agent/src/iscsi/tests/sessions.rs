//! Sessions: how they begin, are kept alive and end.

use super::*;

#[test]
fn a_fence_answers_what_is_outstanding_and_keeps_the_session() {
    let mut one = Initiator::new(OPEN);
    one.line.hold(true);
    assert!(one.read(0, 1).is_empty());
    let gate = Arc::clone(one.target.gate());
    assert_eq!(gate.close(), 1);
    assert_eq!(only(one.read(0, 1)).status(), 0x18);
    one.target.take_away();
    assert_eq!(only(one.nudge()).status(), 0x18, "what the device has");
    assert!(one.target.knows_the_end());
    one.line.hold(false);
    assert!(one.nudge().is_empty(), "answered once");
    assert_eq!(gate.inside(), 0);
    assert_eq!(only(one.write(0, 1, &[1; 4096])).status(), 0x18);
    assert_eq!(one.stored(0), 0);
    let inquiry = only(one.run(0x40, 96, &[0x12, 0, 0, 0, 96, 0], &[]));
    assert_eq!((inquiry.status(), inquiry.data.len()), (0, 96));
    assert_eq!(gate.late(), 2);
    assert!(one.line.end().is_none());
    one.target.disconnect();
    one.nudge();
    assert!(one.line.end().is_some());
    let mut again = Initiator::of(&one.target, &one.device, 1);
    assert_eq!(only(again.log_in(&[])).login_status(), 0x0204);
}

#[test]
fn what_a_fence_answers_early_makes_room_once() {
    let window = |pdu: &Pdu| pdu.word(32).wrapping_sub(pdu.word(28)).wrapping_add(1);
    let mut one = Initiator::new(OPEN);
    one.line.hold(true);
    for _ in 0..WINDOW {
        assert!(one.read(0, 1).is_empty());
    }
    one.target.gate().close();
    one.target.take_away();
    let told = one.nudge();
    assert_eq!(told.len(), WINDOW as usize);
    assert!(told.iter().all(|pdu| pdu.status() == 0x18));
    assert_eq!(only(one.read(0, 1)).status(), 0x18, "the window is open");
    one.line.hold(false);
    assert!(one.nudge().is_empty());
    assert_eq!(window(&only(one.read(0, 1))), WINDOW);
}

#[test]
fn a_session_that_comes_again_waits_for_the_one_before() {
    let mut one = Initiator::new(OPEN);
    one.line.hold(true);
    assert!(one.write(0, 1, &[1; 4096]).is_empty());
    let mut again = Initiator::of(&one.target, &one.device, 1);
    assert!(again.log_in(&[]).is_empty(), "it waits");
    assert!(one.nudge().is_empty());
    assert!(one.line.end().is_some(), "the one before has ended");
    let said = again.line.wait(Duration::from_secs(1));
    assert_eq!(only(again.take(said)).login_status(), 0x0301);
    let mut third = Initiator::of(&one.target, &one.device, 1);
    assert!(third.log_in(&[]).is_empty());
    one.line.hold(false);
    one.nudge();
    let answer = only(third.nudge());
    assert_eq!((answer.login_status(), answer.header[15] > 0), (0, true));
    assert_eq!(only(third.ready()).sense(), (6, 0x29, 7));
    assert_eq!(only(third.ready()).status(), 0);
}

#[test]
fn pings_are_answered_with_their_data() {
    let mut one = Initiator::new(OPEN);
    let mut header = [0; BHS];
    header[0] = 0x40;
    header[1] = 0x80;
    header[19] = 5;
    header[20..24].fill(0xff);
    header[24..28].copy_from_slice(&one.number.to_be_bytes());
    let pong = only(one.send(header, b"ping!"));
    assert_eq!((pong.opcode(), pong.word(16)), (0x20, 5));
    assert_eq!((pong.word(20), &pong.data[..]), (NO_TAG, &b"ping!"[..]));
}

#[test]
fn a_silent_initiator_is_asked_and_then_gone() {
    let mut one = Initiator::new(OPEN);
    let said = one.line.wait(Duration::from_secs(31));
    let ping = only(one.take(said));
    assert_eq!((ping.opcode(), ping.word(16)), (0x20, NO_TAG));
    assert_ne!(ping.word(20), NO_TAG);
    assert!(one.line.end().is_none());
    one.line.wait(Duration::from_secs(30));
    assert!(matches!(one.line.end(), Some(End::Late(_))));
}

#[test]
fn a_login_that_never_ends_is_ended() {
    let device = MemoryDevice::new(8);
    let mut line = line(&target(device, None, None, 1), &Metrics::default());
    line.wait(Duration::from_secs(9));
    assert!(line.end().is_none());
    line.wait(Duration::from_secs(2));
    assert!(matches!(line.end(), Some(End::Late(_))));
}

#[test]
fn a_logout_is_answered_and_ends_the_session() {
    let mut one = Initiator::new(OPEN);
    let mut header = [0; BHS];
    header[0] = 0x46;
    header[1] = 0x80;
    header[24..28].copy_from_slice(&one.number.to_be_bytes());
    let answer = only(one.send(header, &[]));
    assert_eq!((answer.opcode(), answer.header[2]), (0x26, 0));
    assert!(one.line.end().is_some());
    assert!(one.target.unit().sessions().is_empty());
}

#[test]
fn growth_is_announced() {
    let mut one = Initiator::new(OPEN);
    one.device
        .bytes
        .lock()
        .unwrap()
        .resize(2048 * BLOCK_LENGTH, 0);
    one.target.unit().announce_resize();
    let event = only(one.nudge());
    assert_eq!((event.opcode(), event.header[36]), (0x32, 0));
    assert_eq!(event.data[14..16], [0x2a, 0x09]);
    assert_eq!(only(one.ready()).sense(), (6, 0x2a, 9));
    let capacity = only(one.run(0x40, 8, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]));
    assert_eq!(capacity.data[..4], [0, 0, 7, 0xff]);
}

#[test]
fn who_proves_nothing_ends_nobody_s_session() {
    let device = MemoryDevice::new(64);
    let served = Arc::clone(&device) as Arc<dyn crate::block::BlockDevice>;
    let target = target(served, Some(CHAP), None, 4);
    let mut one = Initiator::of(&target, &device, 1);
    assert_eq!(only(one.log_in_by_chap(CHAP.1)).login_status(), 0);
    assert_eq!(only(one.ready()).sense(), (6, 0x29, 0));
    let mut thief = one.another(1);
    assert_eq!(
        only(thief.log_in_by_chap("a wrong one, and long")).login_status(),
        0x0201
    );
    assert!(thief.line.end().is_some());
    let mut bare = one.another(1);
    assert_eq!(only(bare.log_in(&[])).login_status(), 0x0201);
    assert!(one.nudge().is_empty());
    assert_eq!(only(one.ready()).status(), 0, "its session goes on");
    let mut again = one.another(1);
    let answer = only(again.log_in_by_chap(CHAP.1));
    assert_eq!(answer.login_status(), 0);
    one.nudge();
    assert!(one.line.end().is_some(), "who proves it takes its place");
    assert_eq!(only(again.ready()).sense(), (6, 0x29, 7));
}

#[test]
fn a_session_has_one_connection_and_a_target_so_many_sessions() {
    let mut one = Initiator::new(OPEN);
    let mut more = one.another(9);
    let answer = only(more.log_in(&[]));
    more.tsih = u16::try_from(answer.word(12) & 0xffff).unwrap();
    let _first = std::mem::replace(&mut more.line, line(&one.target, &one.metrics));
    assert_eq!(
        only(more.log_in(&[])).login_status(),
        0x0206,
        "one more connection"
    );
    more = one.another(9);
    more.tsih = 0x7777;
    assert_eq!(only(more.log_in(&[])).login_status(), 0x020a);
    let _others = [2, 3].map(|isid| one.second(isid));
    let mut fifth = one.another(5);
    assert_eq!(only(fifth.log_in(&[])).login_status(), 0x0302);
    assert_eq!(only(one.ready()).status(), 0);
}

#[test]
fn a_logout_says_what_it_ends() {
    for (reason, connection, response, ends) in [
        (0, 0, 0, true),
        (1, CONNECTION, 0, true),
        (1, CONNECTION + 1, 1, false),
        (2, CONNECTION, 2, false),
    ] {
        let mut one = Initiator::new(OPEN);
        let mut header = one.pdu(0x46, 0x80 | reason);
        header[20..22].copy_from_slice(&connection.to_be_bytes());
        header[22..24].fill(0);
        let answer = only(one.send(header, &[]));
        assert_eq!(
            (answer.opcode(), answer.header[2]),
            (0x26, response),
            "{reason}"
        );
        assert_eq!(one.line.end().is_some(), ends, "{reason}");
    }
}

#[test]
fn a_discovery_session_is_for_discovery() {
    let one = Initiator::new(OPEN);
    let discover = |one: &Initiator| {
        let mut this = one.another(7);
        let keys = [("InitiatorName", INITIATOR), ("SessionType", "Discovery")];
        assert_eq!(only(this.login(1, Some(3), &keys)).login_status(), 0);
        this
    };
    let targets = format!("TargetName={TARGET}\0TargetAddress=127.0.0.1:3260,1\0");
    let mut this = discover(&one);
    let ask = this.pdu(0x44, 0x80);
    let answer = only(this.send(ask, b"SendTargets=All\0"));
    assert_eq!((answer.opcode(), answer.header[1]), (0x24, 0x80));
    assert_eq!(
        (answer.word(20), answer.data),
        (NO_TAG, targets.clone().into_bytes())
    );
    let ping = this.pdu(0x40, 0x80);
    assert_eq!(only(this.send(ping, &[])).opcode(), 0x20);
    assert_eq!(only(this.ready()).reject(), 4, "no commands");
    assert!(this.line.end().is_some());
    let mut this = discover(&one);
    assert_eq!(only(this.manage(5, 0)).reject(), 4);
    let mut this = discover(&one);
    let mut logout = this.pdu(0x46, 0x80);
    logout[20..24].fill(0);
    assert_eq!(only(this.send(logout, &[])).header[2], 0);
    let mut normal = one.second(2);
    for value in ["SendTargets=All\0", "SendTargets=\0"] {
        let ask = normal.pdu(0x44, 0x80);
        let answer = only(normal.send(ask, value.as_bytes()));
        assert_eq!(answer.data, targets.as_bytes(), "in a normal session");
    }
    let ask = normal.pdu(0x44, 0x80);
    let answer = only(normal.send(ask, b"X-what=1\0MaxRecvDataSegmentLength=512\0"));
    assert_eq!(answer.data, b"X-what=NotUnderstood\0");
    assert_eq!(normal.read(0, 1).len(), 8, "from now on");
}

#[test]
fn a_ping_that_wants_no_answer_gets_none() {
    let mut one = Initiator::new(OPEN);
    let said = one.line.wait(Duration::from_secs(31));
    let asked = only(one.take(said));
    let mut pong = one.pdu(0x40, 0x80);
    pong[16..20].fill(0xff);
    pong[20..24].copy_from_slice(&asked.word(20).to_be_bytes());
    assert!(one.send(pong, &[]).is_empty());
    one.line.wait(Duration::from_secs(29));
    assert!(one.line.end().is_none(), "it is there");
    pong[20..24].fill(0xff);
    assert!(one.send(pong, b"noise").is_empty());
    assert_eq!(only(one.ready()).status(), 0);
}

#[test]
fn a_fence_refuses_what_was_asked_for_and_all_that_comes() {
    let mut one = Initiator::new(SUPPRESSED);
    let asked = only(one.write(0, 1, &[]));
    one.target.gate().close();
    let end = only(one.data_out(true, asked.word(20), 0, 0, &[1; 4096]));
    assert_eq!(end.status(), 0x18, "data that was asked for before");
    let conflict = |one: &mut Initiator, cdb: &[u8]| only(one.run(0, 0, cdb, &[])).status();
    for cdb in [
        &[0; 6][..],
        &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0x16, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(conflict(&mut one, cdb), 0x18, "{cdb:x?}");
    }
    let sense = only(one.run(0x40, 18, &[3, 0, 0, 0, 18, 0], &[]));
    assert_eq!(sense.status(), 0);
    assert_eq!(only(one.manage(5, 0)).header[2], 0, "a reset is answered");
    assert_eq!(one.stored(0), 0);
}

#[test]
fn nothing_is_left_of_initiators_that_vanish() {
    let device = MemoryDevice::new(8);
    let watched = Arc::downgrade(&device);
    let served = Arc::clone(&device) as Arc<dyn crate::block::BlockDevice>;
    let target = target(served, None, None, 2);
    let session = |isid| {
        let mut one = Initiator::of(&target, &device, isid);
        assert_eq!(only(one.log_in(&[])).word(36) >> 16, 0);
        one
    };
    // One closes and one is cut off, each with a command at the device, which
    // settles when nobody asks any more.
    let inside: Vec<_> = [session(1), session(2)]
        .into_iter()
        .map(|mut one| {
            let mut sessions = target.unit().sessions();
            sessions.retain(|session| session.nexus().isid[5] == one.isid);
            let inside = sessions[0].gate().enter().unwrap();
            if one.isid == 1 {
                one.line.close();
            }
            inside
        })
        .collect();
    let sessions = target.unit().sessions();
    assert_eq!(sessions.len(), 2, "their commands have not settled");
    let sessions: Vec<_> = sessions
        .into_iter()
        .map(|one| Arc::downgrade(&one))
        .collect();
    drop(inside);
    drop((target, device));
    assert!(sessions.iter().all(|one| one.upgrade().is_none()));
    assert!(
        watched.upgrade().is_none(),
        "the export lets go of its device"
    );
}

#[test]
fn a_session_that_ended_answers_nothing_that_is_final() {
    let ends: [fn(&Initiator) -> Option<Initiator>; 2] = [
        |one| {
            one.target.disconnect();
            None
        },
        |one| {
            // One that takes over.
            let mut again = one.another(1);
            assert_eq!(only(again.log_in(&[])).login_status(), 0);
            Some(again)
        },
    ];
    for end in ends {
        let mut one = Initiator::new(OPEN);
        one.line.deafen(true);
        let _successor = end(&one);
        assert!(one.write(0, 1, &[1; 4096]).is_empty(), "it is sent again");
        assert!(matches!(one.line.end(), Some(End::Protocol(_))));
        assert_eq!(one.stored(0), 0);
    }
    // The export's own end is final, whatever becomes of the session.
    let mut one = Initiator::new(OPEN);
    one.line.deafen(true);
    one.target.gate().close();
    one.target.disconnect();
    assert_eq!(only(one.write(0, 1, &[1; 4096])).status(), 0x18);
    // A cold reset ends the others.
    let mut one = Initiator::new(OPEN);
    let mut other = one.second(2);
    assert!(
        one.manage(7, 0).is_empty(),
        "it waits for the other's tasks"
    );
    assert!(other.nudge().is_empty());
    other.line.deafen(true);
    assert_eq!(only(one.nudge()).header[2], 0);
    assert_eq!(only(other.ready()).sense(), (6, 0x29, 3), "it was reset");
    assert!(other.write(0, 1, &[1; 4096]).is_empty());
    assert!(matches!(other.line.end(), Some(End::Protocol(_))));
}

//! A host in the test proves itself, or does not, over whole connections.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::nvme_tcp::bench_for_tests::*;
use crate::reactor::End;

const HOST: &str = "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
const OTHER: &str = "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
const REQUIRED: u16 = 0x4191;

fn bench(hash: Hash, group: Group, mutual: bool) -> Bench {
    Bench::secret(Secrets {
        host: HOST.parse().unwrap(),
        controller: mutual.then(|| OTHER.parse().unwrap()),
        hash,
        group,
    })
}

fn send(wire: &mut Wire, message: &[u8]) -> u16 {
    let mut entry = command(0x7f, 1, message.len() as u32, [0; 3]);
    entry[4] = SEND;
    entry[41..44].copy_from_slice(&PROTOCOL);
    entry[44..48].copy_from_slice(&(message.len() as u32).to_le_bytes());
    wire.run(entry, message).1.status
}

fn receive(wire: &mut Wire, length: u32) -> Result<Vec<u8>, u16> {
    let mut entry = command(0x7f, 0x5a, length, [0; 3]);
    entry[4] = RECEIVE;
    entry[41..44].copy_from_slice(&PROTOCOL);
    entry[44..48].copy_from_slice(&length.to_le_bytes());
    let (data, done) = wire.run(entry, &[]);
    match done.status {
        0 => Ok(data),
        status => Err(status),
    }
}

fn negotiate(hashes: &[u8], groups: &[u8]) -> Vec<u8> {
    let mut message = vec![0, 0, 0, 0, 7, 0, 0, 1];
    let mut offer = [0; 64];
    (offer[0], offer[2], offer[3]) = (1, hashes.len() as u8, groups.len() as u8);
    offer[4..4 + hashes.len()].copy_from_slice(hashes);
    offer[34..34 + groups.len()].copy_from_slice(groups);
    message.extend_from_slice(&offer);
    message
}

/// The host's part, with its secret; what the target says last.
fn prove(
    wire: &mut Wire,
    of: &crate::nvme_tcp::subsystem::Subsystem,
    secret: &str,
    mutual: bool,
) -> Vec<u8> {
    assert_eq!(send(wire, &negotiate(&[1, 2, 3], &[0, 1, 2, 3, 4, 5])), 0);
    let challenge = receive(wire, 4096).unwrap();
    assert_eq!((challenge[0], challenge[1], challenge[4]), (1, 1, 7));
    let hash = Hash::of(challenge[8]).unwrap();
    let group = Group::of(challenge[9]).unwrap();
    let length = hash.length();
    let value = usize::from(u16_at(&challenge, 10));
    assert_eq!((usize::from(challenge[6]), value), (length, group.length()));
    let theirs = &challenge[16 + length..16 + length + value];
    let exchange = Exchange::new(group);
    let shared = exchange.as_ref().map(|ours| ours.shared(theirs).unwrap());
    let exchanged = Exchanged {
        hash,
        shared: shared.as_deref(),
        challenge: &challenge[16..16 + length],
        sequence: u32_at(&challenge, 12),
        transaction: 7,
        channel: 0,
        host: &of.host().nqn,
        subsystem: of.nqn(),
    };
    let counter = vec![9; length];
    let public = exchange.map(|ours| ours.public).unwrap_or_default();
    let mut reply = vec![1, 2, 0, 0, 7, 0, length as u8, 0, mutual.into(), 0];
    reply.extend_from_slice(&(public.len() as u16).to_le_bytes());
    reply.extend_from_slice(&33u32.to_le_bytes());
    reply.extend(exchanged.of_host(&secret.parse().unwrap()));
    reply.extend_from_slice(&counter);
    reply.extend_from_slice(&public);
    assert_eq!(send(wire, &reply), 0);
    let last = receive(wire, 256).unwrap();
    if mutual && last[1] == SUCCESS1.1 {
        assert_eq!(last[8], 1, "it proves itself");
        let of_target = Exchanged {
            challenge: &counter,
            sequence: 33,
            ..exchanged
        };
        assert_eq!(
            last[16..16 + length],
            of_target.of_controller(&OTHER.parse().unwrap())
        );
        assert_eq!(
            wire.status(property(false, 0x1c, 0)),
            REQUIRED,
            "the host has the last word"
        );
        let mut success2 = vec![1, 4, 0, 0, 7, 0];
        success2.resize(16, 0);
        assert_eq!(send(wire, &success2), 0);
    }
    last
}

#[test]
fn every_hash_and_group_lets_in_who_knows_the_secret() {
    let cases = [
        (Hash::Sha256, Group::Null, false),
        (Hash::Sha384, Group::Ffdhe2048, true),
        (Hash::Sha512, Group::Ffdhe3072, true),
        (Hash::Sha256, Group::Ffdhe4096, false),
        (Hash::Sha512, Group::Ffdhe6144, false),
        (Hash::Sha384, Group::Ffdhe8192, true),
        (Hash::Sha512, Group::Null, true),
    ];
    for (hash, group, mutual) in cases {
        let bench = bench(hash, group, mutual);
        let mut admin = bench.open();
        admin.agree(NONE);
        let done = admin.connect(&bench.a, 0, 0xffff, 0);
        assert_eq!((done.status, done.result >> 16), (0, 0b10), "ATR");
        assert_eq!(admin.status(property(false, 0, 0)), REQUIRED);
        let last = prove(&mut admin, &bench.a, HOST, mutual);
        assert_eq!((last[0], last[1]), SUCCESS1, "{hash:?} {group:?}");
        assert_eq!(admin.status(property(true, 0x14, 0x0046_0001)), 0);
        // Every queue for itself.
        let mut io = bench.open();
        io.agree(NONE);
        assert_eq!(io.connect(&bench.a, 1, done.result as u16, 0).status, 0);
        assert_eq!(io.status(read(0, 1)), REQUIRED);
        prove(&mut io, &bench.a, HOST, mutual);
        assert_eq!(io.status(read(0, 1)), 0);
        io.wait(Duration::from_secs(11));
        assert_eq!(io.end(), None);
    }
}

#[test]
fn who_does_not_know_it_ends_nobodys_association() {
    let bench = bench(Hash::Sha256, Group::Null, false);
    let connect = || {
        let mut admin = bench.open();
        admin.agree(NONE);
        assert_eq!(admin.connect(&bench.a, 0, 0xffff, 0).status, 0);
        admin
    };
    let mut owner = connect();
    prove(&mut owner, &bench.a, HOST, false);
    let current = bench.a.current().unwrap();
    let mut stranger = connect();
    let last = prove(&mut stranger, &bench.a, OTHER, false);
    assert_eq!(((last[0], last[1]), last[6], last[7]), (FAILURE1, 1, 1));
    assert_eq!(stranger.status(property(false, 0, 0)), REQUIRED);
    stranger.wait(Duration::from_secs(10));
    assert_eq!(stranger.end(), Some(&End::Late("authentication")));
    assert!(Arc::ptr_eq(&current, &bench.a.current().unwrap()) && !current.has_ended());
    assert_eq!(owner.status(property(false, 0x1c, 0)), 0);
    // Who knows it takes over.
    let mut again = connect();
    prove(&mut again, &bench.a, HOST, false);
    owner.wait(Duration::ZERO);
    assert!(owner.end().is_some() && current.has_ended());
}

#[test]
fn a_queue_is_whose_host_has_proved_itself_for_it() {
    let bench = bench(Hash::Sha256, Group::Null, false);
    let mut admin = bench.open();
    admin.agree(NONE);
    let done = admin.connect(&bench.a, 0, 0xffff, 5000);
    let controller = done.result as u16;
    prove(&mut admin, &bench.a, HOST, false);
    assert_eq!(admin.status(property(true, 0x14, 0x0046_0001)), 0);
    let connect = |queue| {
        let mut io = bench.open();
        io.agree(NONE);
        let status = io.connect(&bench.a, queue, controller, 0).status;
        (io, status)
    };
    // Strangers are there first, on each queue, and wait.
    let mut strangers: Vec<_> = (1..=16).map(|queue| connect(queue).0).collect();
    for queue in 1..=16 {
        let (mut io, status) = connect(queue);
        assert_eq!(status, 0);
        prove(&mut io, &bench.a, HOST, false);
        assert_eq!(io.status(read(0, 1)), 0);
        // From now on it is taken, though not for good.
        assert_eq!(connect(queue).1, 0x000c);
        if queue == 16 {
            // Two at once: the second to prove itself has nothing.
            prove(&mut strangers[15], &bench.a, HOST, false);
            assert!(matches!(strangers[15].end(), Some(End::Protocol(_))));
            // Its connection hears of the association's end, whoever came beside it.
            bench.a.current().unwrap().end();
            io.wait(Duration::ZERO);
            assert!(io.end().is_some());
        }
    }
}

#[test]
fn a_stranger_does_not_keep_a_silent_host_alive() {
    let bench = bench(Hash::Sha256, Group::Null, false);
    let mut admin = bench.open();
    admin.agree(NONE);
    let controller = admin.connect(&bench.a, 0, 0xffff, 2000).result as u16;
    prove(&mut admin, &bench.a, HOST, false);
    assert_eq!(admin.status(property(true, 0x14, 0x0046_0001)), 0);
    let mut stranger = bench.open();
    stranger.agree(NONE);
    stranger.connect(&bench.a, 1, controller, 0);
    for _ in 0..3 {
        stranger.wait(Duration::from_secs(1));
        send(&mut stranger, &negotiate(&[1], &[0]));
        assert_eq!(admin.end(), None);
        admin.wait(Duration::from_secs(1));
    }
    admin.wait(Duration::from_millis(100));
    assert_eq!(admin.end(), Some(&End::Late("keep alive")));
}

#[test]
fn a_controller_that_has_ended_is_installed_no_more() {
    let bench = bench(Hash::Sha256, Group::Null, false);
    let connect = || {
        let mut admin = bench.open();
        admin.agree(NONE);
        assert_eq!(admin.connect(&bench.a, 0, 0xffff, 0).status, 0);
        admin
    };
    let mut owner = connect();
    prove(&mut owner, &bench.a, HOST, false);
    let host = bench.a.host().clone();
    let late = bench.a.admit(&host, 0, std::time::Instant::now());
    let late = late.unwrap().unwrap();
    late.end();
    assert_eq!(bench.a.install(&late), Err(Status::COMMAND_SEQUENCE_ERROR));
    owner.wait(Duration::ZERO);
    assert_eq!(owner.end(), None);
}

#[test]
fn messages_out_of_order_or_shape_fail() {
    let bench = bench(Hash::Sha256, Group::Null, false);
    let mut wire = bench.open();
    wire.agree(NONE);
    assert_eq!(wire.connect(&bench.a, 0, 0xffff, 0).status, 0);
    assert_eq!(receive(&mut wire, 4096), Err(0x400c), "nothing to say");
    let mut bad = |message: &[u8], why: Why| {
        assert_eq!(send(&mut wire, message), 0);
        let answer = receive(&mut wire, 256).unwrap();
        assert_eq!(
            (answer[0], answer[1], answer[7]),
            (0, 0xf0, why as u8),
            "{message:?}"
        );
        receive(&mut wire, 16).unwrap_err()
    };
    bad(&[1, 2, 0, 0, 7, 0, 0, 0], Why::Message);
    bad(&[1, 4], Why::Message);
    bad(&[0], Why::Message);
    bad(&[0, 0, 0, 0, 7], Why::Payload);
    bad(&[0, 0, 0, 0, 7, 0, 0, 1, 1], Why::Payload);
    bad(&[0, 0, 0, 0, 7, 0, 1, 0], Why::Channel);
    bad(&[0, 0, 0, 0, 7, 0, 0, 0], Why::Protocol);
    bad(&negotiate(&[9], &[0]), Why::Hash);
    bad(&negotiate(&[1], &[9]), Why::Group);
    bad(&negotiate(&[1], &[1, 5]), Why::Group);
    let mut long = negotiate(&[1], &[0]);
    long[10] = 200;
    bad(&long, Why::Payload);
    // A reply that is too short, of another transaction, or with a value that no group has.
    for change in [(4usize, 8u8), (6, 48), (10, 1)] {
        assert_eq!(send(&mut wire, &negotiate(&[1], &[0])), 0);
        assert_eq!(receive(&mut wire, 8), Err(0x4002), "no room for it");
        assert_eq!(send(&mut wire, &negotiate(&[1], &[0])), 0);
        receive(&mut wire, 256).unwrap();
        let mut reply = vec![1, 2, 0, 0, 7, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        reply.resize(80, 0);
        reply[change.0] = change.1;
        assert_eq!(send(&mut wire, &reply), 0);
        assert_eq!(receive(&mut wire, 256).unwrap()[7], Why::Payload as u8);
    }
    let mut entry = command(0x7f, 1, 8, [0; 3]);
    entry[4] = SEND;
    assert_eq!(
        wire.run(entry, &[0; 8]).1.status,
        0x4002,
        "another security protocol"
    );
}

#[test]
fn a_queue_has_one_job_at_a_time() {
    let bench = bench(Hash::Sha256, Group::Ffdhe8192, false);
    let mut wire = bench.open();
    wire.agree(NONE);
    assert_eq!(wire.connect(&bench.a, 0, 0xffff, 0).status, 0);
    wire.inline.hold(true);
    let message = negotiate(&[1], &[0, 5]);
    let mut entry = command(0x7f, 1, message.len() as u32, [0; 3]);
    entry[4] = SEND;
    entry[41..44].copy_from_slice(&PROTOCOL);
    entry[44..48].copy_from_slice(&(message.len() as u32).to_le_bytes());
    let first = wire.send(entry, &message);
    assert_eq!((wire.inline.held(), wire.answers.len()), (1, 0));
    let again = wire.run(entry, &message).1;
    assert_eq!((again.status, wire.inline.held()), (0x400c, 1));
    assert_eq!(receive(&mut wire, 4096), Err(0x400c), "not ready");
    wire.inline.hold(false);
    wire.wait(Duration::ZERO);
    let done = wire.answer().completion();
    assert_eq!((done.command, done.status), (first, 0));
    assert_eq!(receive(&mut wire, 4096).unwrap()[9], Group::Ffdhe8192 as u8);
}

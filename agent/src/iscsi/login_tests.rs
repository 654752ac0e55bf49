//! Logins, step by step.

use proptest::prelude::*;

use super::super::for_tests::{CLOSED, INITIATOR, MemoryDevice, OneTarget, TARGET, target};
use super::*;

const ISID: [u8; 6] = [0x80, 1, 2, 3, 4, 5];

fn random() -> Option<(u8, [u8; CHALLENGE])> {
    Some((9, [0x5a; CHALLENGE]))
}

fn request(current: u8, next: Option<u8>) -> LoginRequest {
    LoginRequest {
        transit: next.is_some(),
        goes_on: false,
        current,
        next: next.unwrap_or(0),
        max_version: 0,
        min_version: 0,
        isid: ISID,
        tsih: 0,
        task: 1,
        connection: 1,
        command_number: 1,
    }
}

fn keys(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut text = Vec::new();
    pairs
        .iter()
        .for_each(|(key, value)| text::put(&mut text, key, value));
    text
}

const WHO: [(&str, &str); 2] = [("InitiatorName", INITIATOR), ("TargetName", TARGET)];

struct Attempt {
    login: Login,
    directory: OneTarget,
}

impl Attempt {
    fn new(incoming: Option<(&str, &str)>, outgoing: Option<(&str, &str)>) -> Self {
        Self {
            login: Login::new(random),
            directory: OneTarget(target(MemoryDevice::new(8), incoming, outgoing, 1)),
        }
    }

    fn open() -> Self {
        Self::new(None, None)
    }

    fn step(
        &mut self,
        request: &LoginRequest,
        pairs: &[(&str, &str)],
    ) -> Result<(Reply, Vec<(String, String)>), Status> {
        let reply = self.login.step(request, &keys(pairs), &self.directory)?;
        let text = text::parse(&reply.text).unwrap();
        let owned = text.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let owned = owned.collect();
        Ok((reply, owned))
    }

    fn refused(&mut self, request: &LoginRequest, pairs: &[(&str, &str)]) -> Status {
        self.step(request, pairs).map(|_| ()).unwrap_err()
    }
}

fn said<'a>(text: &'a [(String, String)], key: &str) -> Option<&'a str> {
    let pair = text.iter().find(|(other, _)| other == key);
    pair.map(|(_, value)| value.as_str())
}

#[test]
fn a_login_without_proof_goes_through_both_stages() {
    let mut attempt = Attempt::open();
    let first = [&WHO[..], &[("AuthMethod", "None")]].concat();
    let (reply, text) = attempt.step(&request(0, Some(1)), &first).unwrap();
    assert!(reply.answer.transit && reply.agreed.is_none());
    assert_eq!(said(&text, "TargetPortalGroupTag"), Some("1"));
    assert_eq!(said(&text, "AuthMethod"), Some("None"));
    let keys = [
        ("HeaderDigest", "CRC32C,None"),
        ("MaxRecvDataSegmentLength", "65536"),
        ("X-unknown", "1"),
    ];
    let (reply, text) = attempt.step(&request(1, Some(3)), &keys).unwrap();
    let agreed = reply.agreed.unwrap();
    assert!(agreed.parameters.digests.header && !agreed.parameters.digests.data);
    assert_eq!(agreed.parameters.max_send, 65536);
    assert_eq!(agreed.parameters.max_receive, MAX_RECEIVE);
    assert_eq!(said(&text, "MaxRecvDataSegmentLength"), Some("262144"));
    assert_eq!(said(&text, "X-unknown"), Some("NotUnderstood"));
    assert_eq!(
        (agreed.nexus.initiator.as_str(), agreed.nexus.isid),
        (INITIATOR, ISID)
    );
}

#[test]
fn one_request_is_enough_where_nothing_must_be_proved() {
    let (reply, _) = Attempt::open().step(&request(1, Some(3)), &WHO).unwrap();
    assert!(reply.agreed.is_some());
}

#[test]
fn text_may_go_on_in_the_next_request() {
    let mut attempt = Attempt::open();
    let mut cut = request(1, None);
    cut.goes_on = true;
    let text = keys(&WHO);
    let (head, tail) = text.split_at(20);
    let reply = attempt.login.step(&cut, head, &attempt.directory).unwrap();
    assert!(reply.text.is_empty() && !reply.answer.transit);
    let reply = attempt
        .login
        .step(&request(1, Some(3)), tail, &attempt.directory);
    assert!(reply.unwrap().agreed.is_some());
    let mut attempt = Attempt::open();
    let much = vec![b'x'; text::LONGEST];
    assert!(attempt.login.step(&cut, &much, &attempt.directory).is_ok());
    let more = attempt.login.step(&cut, b"x", &attempt.directory);
    assert_eq!(more.map(|_| ()).unwrap_err(), Status::INITIATOR_ERROR);
}

#[test]
fn an_answer_longer_than_an_initiator_takes_is_not_given() {
    let names: Vec<_> = (0..126).map(|at| format!("X-{at:060}")).collect();
    let mut pairs = WHO.to_vec();
    pairs.extend(names.iter().take(90).map(|name| (name.as_str(), "1")));
    let (reply, _) = Attempt::open().step(&request(1, Some(3)), &pairs).unwrap();
    assert!((6000..=8192).contains(&reply.text.len()));
    pairs.extend(names.iter().skip(90).map(|name| (name.as_str(), "1")));
    let refused = Attempt::open().refused(&request(1, Some(3)), &pairs);
    assert_eq!(refused, Status::INITIATOR_ERROR);
}

#[test]
fn who_may_not_is_told_why() {
    let now = request(1, Some(3));
    let cases: [(&[(&str, &str)], Status); 8] = [
        (&[], Status::MISSING_PARAMETER),
        (&[("TargetName", TARGET)], Status::MISSING_PARAMETER),
        (&[("InitiatorName", INITIATOR)], Status::MISSING_PARAMETER),
        (
            &[("InitiatorName", "iqn.other"), ("TargetName", TARGET)],
            Status::FORBIDDEN,
        ),
        (
            &[("InitiatorName", INITIATOR), ("TargetName", "iqn.none")],
            Status::NOT_FOUND,
        ),
        (
            &[("InitiatorName", INITIATOR), ("TargetName", CLOSED)],
            Status::REMOVED,
        ),
        (
            &[("InitiatorName", INITIATOR), ("SessionType", "Other")],
            Status::SESSION_TYPE,
        ),
        (&[("A", "1"), ("A", "1")], Status::MISSING_PARAMETER),
    ];
    for (pairs, status) in cases.iter().take(7) {
        assert_eq!(Attempt::open().refused(&now, pairs), *status, "{pairs:?}");
    }
    let twice = Attempt::open().refused(&now, cases[7].0);
    assert_eq!(twice, Status::INITIATOR_ERROR);
    let mut attempt = Attempt::open();
    attempt.directory.0.gate().close();
    assert_eq!(attempt.refused(&now, &WHO), Status::REMOVED);
}

#[test]
fn what_breaks_the_order_of_things_is_refused() {
    let whole = request(1, Some(3));
    let wrong = [
        LoginRequest {
            goes_on: true,
            ..whole
        },
        request(3, None),
        request(2, None),
        request(1, Some(1)),
        request(0, Some(0)),
        request(1, Some(2)),
    ];
    for request in wrong {
        let status = Attempt::open().refused(&request, &WHO);
        assert_eq!(status, Status::INITIATOR_ERROR, "{request:?}");
    }
    let newer = LoginRequest {
        min_version: 1,
        ..whole
    };
    assert_eq!(Attempt::open().refused(&newer, &WHO), Status::VERSION);
    type Change = fn(&mut LoginRequest);
    let changes: [Change; 7] = [
        |r| r.max_version ^= 1,
        |r| (r.max_version, r.min_version) = (1, 0),
        |r| r.isid[0] ^= 1,
        |r| r.task ^= 1,
        |r| r.connection ^= 1,
        |r| r.tsih ^= 1,
        |r| r.current = 0,
    ];
    for change in changes {
        let mut attempt = Attempt::open();
        attempt.step(&request(1, None), &WHO).unwrap();
        let mut second = whole;
        change(&mut second);
        assert_eq!(attempt.refused(&second, &[]), Status::INITIATOR_ERROR);
    }
}

#[test]
fn a_key_is_negotiated_once() {
    let mut attempt = Attempt::open();
    let first = [&WHO[..], &[("MaxBurstLength", "8192"), ("X-a", "1")]].concat();
    attempt.step(&request(1, None), &first).unwrap();
    // Who it is may be said again, and what is not understood.
    let again = [&WHO[..], &[("X-a", "2"), ("HeaderDigest", "None")]].concat();
    attempt.step(&request(1, None), &again).unwrap();
    let twice = attempt.refused(&request(1, Some(3)), &[("MaxBurstLength", "4096")]);
    assert_eq!(twice, Status::INITIATOR_ERROR);
}

#[test]
fn a_second_connection_is_not_taken() {
    let again = LoginRequest {
        tsih: 5,
        ..request(1, Some(3))
    };
    assert_eq!(Attempt::open().refused(&again, &WHO), Status::NO_SESSION);
}

const SECRET: (&str, &str) = ("user", "a secret of sixteen");

/// Goes through the steps up to the challenge; the algorithm that was chosen.
fn challenged(attempt: &mut Attempt, algorithms: &str) -> Result<Algorithm, Status> {
    let first = [&WHO[..], &[("AuthMethod", "CHAP,None")]].concat();
    let (_, text) = attempt.step(&request(0, None), &first)?;
    assert_eq!(said(&text, "AuthMethod"), Some("CHAP"));
    let (reply, text) = attempt.step(&request(0, None), &[("CHAP_A", algorithms)])?;
    assert!(!reply.answer.transit);
    assert_eq!(said(&text, "CHAP_I"), Some("9"));
    let challenge = chap::decode(said(&text, "CHAP_C").unwrap()).unwrap();
    assert_eq!(challenge, [0x5a; CHALLENGE]);
    Ok(Algorithm::choose(said(&text, "CHAP_A").unwrap()).unwrap())
}

fn response(algorithm: Algorithm, secret: &str) -> String {
    let response = algorithm.response(9, secret.as_bytes(), &[0x5a; CHALLENGE]);
    chap::encode(&response)
}

#[test]
fn chap_lets_in_who_knows_the_secret_with_each_algorithm() {
    for (list, algorithm) in [
        ("5", Algorithm::Md5),
        ("6,7", Algorithm::Sha256),
        ("8,5", Algorithm::Sha3),
    ] {
        let mut attempt = Attempt::new(Some(SECRET), None);
        assert_eq!(challenged(&mut attempt, list), Ok(algorithm));
        let right = response(algorithm, SECRET.1);
        let keys = [("CHAP_N", SECRET.0), ("CHAP_R", &right)];
        let (reply, _) = attempt.step(&request(0, Some(1)), &keys).unwrap();
        assert!(reply.answer.transit);
        let (reply, _) = attempt.step(&request(1, Some(3)), &[]).unwrap();
        assert!(reply.agreed.is_some());
    }
}

#[test]
fn chap_keeps_out_who_does_not() {
    let wrong = response(Algorithm::Md5, "another");
    let right = response(Algorithm::Md5, SECRET.1);
    for keys in [
        [("CHAP_N", "user"), ("CHAP_R", &*wrong)],
        [("CHAP_N", "0x75736572"), ("CHAP_R", &right)],
        [("CHAP_N", "user"), ("CHAP_R", "0x00")],
        [("CHAP_N", "user"), ("CHAP_R", "garbage")],
        [("CHAP_N", "user"), ("CHAP_X", &right)],
    ] {
        let mut attempt = Attempt::new(Some(SECRET), None);
        challenged(&mut attempt, "5").unwrap();
        let status = attempt.refused(&request(0, Some(1)), &keys);
        assert_eq!(status, Status::AUTHENTICATION_FAILED, "{keys:?}");
    }
    for list in ["56", "", "6"] {
        let mut attempt = Attempt::new(Some(SECRET), None);
        let status = challenged(&mut attempt, list);
        assert_eq!(status, Err(Status::AUTHENTICATION_FAILED), "{list}");
    }
}

#[test]
fn proof_cannot_be_walked_around() {
    for (request, method) in [
        (request(1, Some(3)), None),
        (request(0, Some(3)), None),
        (request(0, Some(3)), Some("None")),
        (request(0, Some(1)), Some("None,SRP")),
    ] {
        let method = method.map(|method| ("AuthMethod", method));
        let pairs: Vec<_> = WHO.into_iter().chain(method).collect();
        let status = Attempt::new(Some(SECRET), None).refused(&request, &pairs);
        assert_eq!(status, Status::AUTHENTICATION_FAILED, "{request:?}");
    }
    // The transit bit changes nothing as long as the proof is open.
    let mut attempt = Attempt::new(Some(SECRET), None);
    let first = [&WHO[..], &[("AuthMethod", "CHAP")]].concat();
    let (reply, _) = attempt.step(&request(0, Some(3)), &first).unwrap();
    assert!(!reply.answer.transit && reply.agreed.is_none());
    let (reply, _) = attempt
        .step(&request(0, Some(3)), &[("CHAP_A", "5")])
        .unwrap();
    assert!(!reply.answer.transit && reply.agreed.is_none());
    // An initiator that wants proof of its own, where there is none to give.
    let wants = [&WHO[..], &[("AuthMethod", "CHAP")]].concat();
    let status = Attempt::open().refused(&request(0, None), &wants);
    assert_eq!(status, Status::AUTHENTICATION_FAILED);
}

#[test]
fn the_target_proves_itself_with_another_secret() {
    let own = ("target", "quite another secret");
    let right = response(Algorithm::Md5, SECRET.1);
    let asked = chap::encode(&[1, 2, 3]);
    let keys = [
        ("CHAP_N", SECRET.0),
        ("CHAP_R", &right),
        ("CHAP_I", "77"),
        ("CHAP_C", &asked),
    ];
    let mut attempt = Attempt::new(Some(SECRET), Some(own));
    challenged(&mut attempt, "5").unwrap();
    let (_, text) = attempt.step(&request(0, Some(1)), &keys).unwrap();
    let expected = Algorithm::Md5.response(77, own.1.as_bytes(), &[1, 2, 3]);
    assert_eq!(said(&text, "CHAP_N"), Some(own.0));
    assert_eq!(said(&text, "CHAP_R"), Some(&*chap::encode(&expected)));

    let reflected = chap::encode(&[0x5a; CHALLENGE]);
    let mirror = [keys[0], keys[1], keys[2], ("CHAP_C", &*reflected)];
    let same = Some(("target", SECRET.1));
    for (own, keys) in [(Some(own), mirror), (same, keys), (None, keys)] {
        let mut attempt = Attempt::new(Some(SECRET), own);
        challenged(&mut attempt, "5").unwrap();
        let status = attempt.refused(&request(0, Some(1)), &keys);
        assert_eq!(status, Status::AUTHENTICATION_FAILED);
    }
}

#[test]
fn discovery_needs_a_name_and_nothing_else() {
    let pairs = [("InitiatorName", INITIATOR), ("SessionType", "Discovery")];
    let (reply, text) = Attempt::new(Some(SECRET), None)
        .step(&request(1, Some(3)), &pairs)
        .unwrap();
    assert!(matches!(reply.agreed.unwrap().purpose, Purpose::Discovery));
    assert_eq!(said(&text, "TargetPortalGroupTag"), None);
}

proptest! {
    #[test]
    fn any_requests_are_answered_or_refused(steps in prop::collection::vec((any::<[bool; 2]>(), 0_u8..4, 0_u8..4, prop::collection::vec(any::<u8>(), 0..60)), 1..6)) {
        let mut attempt = Attempt::new(Some(SECRET), None);
        for ([transit, goes_on], current, next, data) in steps {
            let step = LoginRequest { transit, goes_on, next, ..request(current, None) };
            if let Ok(reply) = attempt.login.step(&step, &data, &attempt.directory) {
                prop_assert!(reply.agreed.is_none(), "nobody proved anything");
            }
        }
    }
}

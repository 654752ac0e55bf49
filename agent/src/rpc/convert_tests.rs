//! Messages come back as what they were, and bad ones name their field.

use super::*;
use crate::attach::ports::{
    Chap, Disclosure, ExportRequest, Exported, GateLayer, GateReport, Holder, Judgement,
    NodeAnswer, Pod, SettledBy, Settlement, Target, Verdict,
};

#[test]
fn a_settlement_comes_back_as_itself() {
    let settlement = Settlement {
        volume: "vol-1".parse().unwrap(),
        epoch: Epoch(4),
        node: Some("a".parse().unwrap()),
        sessions_ended: 3,
        inside_at_close: 32,
        settled_by: SettledBy::Drained,
        unsettled: 1,
        settle_time: Duration::from_micros(1234),
        late_refused: 5,
        last_write: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(9)),
    };
    let back = Settlement::try_from(pb::FenceAnswer::from(&settlement)).unwrap();
    assert_eq!(back, settlement);
}

#[test]
fn what_the_old_node_answered_comes_back_as_itself() {
    let gate = GateReport {
        layers: vec![GateLayer::Files, GateLayer::Removal],
        shut_in: Duration::from_micros(80),
        took: Duration::from_millis(400),
    };
    let holder = Holder {
        pid: 7,
        name: "postgres".to_owned(),
        cgroup: "/kubepods/pod1/2".to_owned(),
        pod: Some(Pod {
            uid: "1".to_owned(),
            container: Some("2".to_owned()),
        }),
        writable: true,
        registered: false,
        last_read_ms: None,
        last_write_ms: Some(3),
        read_bytes: 0,
        written_bytes: 4096,
    };
    let held = NodeAnswer::Shut {
        gate: gate.clone(),
        judgement: Some(Box::new(Judgement {
            verdict: Verdict::Live,
            reason: "it can write".to_owned(),
            holders: vec![holder],
        })),
        held: Some("a mount".to_owned()),
    };
    let shut = NodeAnswer::Shut {
        gate,
        judgement: None,
        held: None,
    };
    let still = NodeAnswer::Held("a mount".to_owned());
    for answer in [NodeAnswer::Clean, still, shut.clone(), held] {
        let message = pb::ReleaseAnswer::from(answer.clone());
        assert_eq!(NodeAnswer::try_from(message).unwrap(), answer);
    }
    let mut message = pb::ReleaseAnswer::from(shut.clone());
    let layers = &mut message.gate.as_mut().unwrap().layers;
    layers.push("of a newer node".to_owned());
    assert_eq!(NodeAnswer::try_from(message).unwrap(), shut);
}

#[test]
fn a_bad_field_is_named() {
    let request = pb::ExportRequest {
        volume: "../x".into(),
        ..Default::default()
    };
    let error = ExportRequest::try_from(request).unwrap_err().to_string();
    assert!(
        error.contains("volume") && error.contains("../x"),
        "{error}"
    );
    let error = protocol("protocol", "fibre").unwrap_err().to_string();
    assert!(
        error.contains("fibre") && error.contains("nvme-tcp"),
        "{error}"
    );
    let request = pb::RegisterRequest {
        incarnation: "x".into(),
        node: "a".into(),
        ..Default::default()
    };
    assert!(
        Registration::try_from(request)
            .unwrap_err()
            .to_string()
            .contains("host")
    );
}

#[test]
fn a_heartbeat_says_what_came_late() {
    let late = LateCommands {
        volume: "v".parse().unwrap(),
        epoch: Epoch(4),
        commands: 7,
    };
    let said = Registration {
        node: "a".parse().unwrap(),
        incarnation: "boot".into(),
        host: HostIdentity::of("nqn.a", uuid::Uuid::nil()),
        agent: "127.0.0.1:1".parse().unwrap(),
        has_pool: true,
        attached: vec![("w".parse().unwrap(), Epoch(2))],
        late: vec![late.clone()],
    };
    let heard = Registration::try_from(pb::RegisterRequest::from(&said)).unwrap();
    assert_eq!((heard.late, heard.attached), (vec![late], said.attached));
}

/// The sender's and the taker's clocks may differ: no moment of one goes to the other.
#[test]
fn a_lease_is_a_length_of_time_on_the_way() {
    let lease = Duration::from_secs(60);
    let ticket = Ticket {
        id: "t".parse().unwrap(),
        kind: TicketKind::Backup,
        node: "a".parse().unwrap(),
        owner: "pid 7".into(),
        interruptible: true,
        home_side: false,
        lease_ends: Some(SystemTime::now() + lease),
    };
    let message = pb::Ticket::from(&ticket);
    let sent: Duration = message.lease.unwrap().try_into().unwrap();
    assert!(sent <= lease && sent > lease - Duration::from_secs(5));
    // However long it was on the way, it begins where it is taken.
    let later = SystemTime::now();
    let taken = Ticket::try_from(message).unwrap().lease_ends.unwrap();
    assert!(taken >= later + sent);
}

#[test]
fn an_export_keeps_its_protocol_and_its_secrets() {
    let exported = Exported {
        epoch: Epoch(3),
        target: Target {
            protocol: Protocol::Iscsi,
            name: "iqn.2026-11.io.drover:vol-1:3:ab".into(),
            unit: uuid::Uuid::from_u128(5),
            address: "[fd00::1]:3260".parse().unwrap(),
            proves: true,
            chap: Some(Chap::fresh("iqn.i", "iqn.t")),
        },
        ever_written: true,
    };
    let message = pb::ExportAnswer::from(&exported);
    assert_eq!(Exported::try_from(message.clone()).unwrap(), exported);
    let mut halved = message.clone();
    halved.chap.as_mut().unwrap().target = None;
    let error = Exported::try_from(halved).unwrap_err().to_string();
    assert!(error.contains("chap"), "{error}");
    let before_iscsi = pb::ExportAnswer {
        protocol: String::new(),
        chap: None,
        ..message
    };
    let exported = Exported::try_from(before_iscsi).unwrap();
    assert_eq!(exported.target.protocol, Protocol::NvmeTcp);
}

#[test]
fn what_a_home_discloses_comes_back_and_an_older_homes_volume_counts_as_written() {
    for chap in [None, Some(Chap::fresh("iqn.i", "iqn.t"))] {
        for ever_written in [false, true] {
            let told = Disclosure {
                chap: chap.clone(),
                ever_written,
            };
            let message = pb::SecretsAnswer::from(&told);
            assert_eq!(Disclosure::try_from(message).unwrap(), told);
        }
    }
    let silent = Disclosure::try_from(pb::SecretsAnswer::default()).unwrap();
    assert!(silent.ever_written);
}

#[test]
fn a_node_from_before_iscsi_has_an_initiator_name() {
    let mut host = HostIdentity::of("nqn.x", uuid::Uuid::from_u128(9));
    host.proves = true;
    let mut message = pb::Host::from(&host);
    assert_eq!(HostIdentity::try_from(message.clone()).unwrap(), host);
    message.iqn.clear();
    assert_eq!(HostIdentity::try_from(message.clone()).unwrap(), host);
    message.iqn = "IQN.x".into();
    let error = HostIdentity::try_from(message).unwrap_err().to_string();
    assert!(error.contains("host.iqn"), "{error}");
}

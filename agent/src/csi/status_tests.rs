use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::ids::{NodeId, VolumeId};

fn volume() -> VolumeId {
    "vol-1".parse().unwrap()
}

fn node() -> NodeId {
    "node-b".parse().unwrap()
}

fn impossible() -> RequestError {
    "../x".parse::<VolumeId>().unwrap_err().into()
}

/// Every error and its code, as CSI 1.12's tables of errors have them.
fn table() -> Vec<(Refusal, Code)> {
    let text = || "why".to_owned();
    let path = || PathBuf::from("/staging");
    vec![
        (RequestError::Missing("name").into(), Code::InvalidArgument),
        (
            RequestError::Field {
                field: "name",
                why: text(),
            }
            .into(),
            Code::InvalidArgument,
        ),
        (
            RequestError::Parameter {
                key: text(),
                why: text(),
            }
            .into(),
            Code::InvalidArgument,
        ),
        (
            RequestError::Capability(text()).into(),
            Code::InvalidArgument,
        ),
        (RequestError::Size(text()).into(), Code::OutOfRange),
        (impossible().into(), Code::NotFound),
        (
            RequestError::NowhereAt {
                volume: volume(),
                path: text(),
                why: "is not",
            }
            .into(),
            Code::NotFound,
        ),
        (RequestError::NotStaged.into(), Code::FailedPrecondition),
        (RequestError::Token(text()).into(), Code::Aborted),
        (ArbiterError::NoVolume(volume()).into(), Code::NotFound),
        (
            ArbiterError::NoSnapshot("snap-1".parse().unwrap()).into(),
            Code::NotFound,
        ),
        (ArbiterError::NoNode(node()).into(), Code::NotFound),
        (
            ArbiterError::NoTicket {
                volume: volume(),
                ticket: "t".parse().unwrap(),
            }
            .into(),
            Code::NotFound,
        ),
        (
            ArbiterError::HeldBy {
                volume: volume(),
                node: node(),
            }
            .into(),
            Code::FailedPrecondition,
        ),
        (
            ArbiterError::NotPublished {
                volume: volume(),
                node: node(),
            }
            .into(),
            Code::FailedPrecondition,
        ),
        (
            ArbiterError::Incompatible(text()).into(),
            Code::AlreadyExists,
        ),
        (ArbiterError::InUse(text()).into(), Code::FailedPrecondition),
        (ArbiterError::OutOfRange(text()).into(), Code::OutOfRange),
        (
            ArbiterError::NoSpace(text()).into(),
            Code::ResourceExhausted,
        ),
        (
            ArbiterError::Unsupported(text()).into(),
            Code::FailedPrecondition,
        ),
        (ArbiterError::NodeLost(node()).into(), Code::Unavailable),
        (ArbiterError::NotYet(text()).into(), Code::Aborted),
        (ArbiterError::Unavailable(text()).into(), Code::Unavailable),
        (ArbiterError::Failed(text()).into(), Code::Internal),
        (
            NodeError::Control(ControlError::Unreachable(text())).into(),
            Code::Unavailable,
        ),
        (
            NodeError::Control(ControlError::NotPublished {
                volume: volume(),
                node: node(),
            })
            .into(),
            Code::FailedPrecondition,
        ),
        (
            NodeError::Control(ControlError::NoVolume(volume())).into(),
            Code::NotFound,
        ),
        (
            NodeError::Control(ControlError::Failed(text())).into(),
            Code::Internal,
        ),
        (
            NodeError::NotStaged {
                volume: volume(),
                path: path(),
            }
            .into(),
            Code::FailedPrecondition,
        ),
        (
            NodeError::NotThere {
                volume: volume(),
                path: path(),
            }
            .into(),
            Code::NotFound,
        ),
        (NodeError::Incompatible(text()).into(), Code::AlreadyExists),
        (NodeError::Busy(text()).into(), Code::FailedPrecondition),
        (
            NodeError::Deadline {
                what: text(),
                deadline: Duration::from_secs(1),
            }
            .into(),
            Code::DeadlineExceeded,
        ),
        (NodeError::Unusable(text()).into(), Code::FailedPrecondition),
        (NodeError::Failed(text()).into(), Code::Internal),
        (Refusal::NotServed("GetSnapshot"), Code::Unimplemented),
        (
            Refusal::Lost {
                method: "Probe",
                detail: text(),
            },
            Code::Internal,
        ),
    ]
}

#[test]
fn every_error_has_its_code_and_keeps_its_words() {
    for (refusal, code) in table() {
        let words = refusal.to_string();
        let status = Status::from(refusal);
        assert_eq!(status.code(), code, "{words}");
        assert_eq!(status.message(), words);
        assert!(!words.is_empty());
    }
}

#[test]
fn who_holds_a_volume_is_named() {
    let held = ArbiterError::HeldBy {
        volume: volume(),
        node: node(),
    };
    let status = Status::from(Refusal::from(held));
    assert!(status.message().contains("node-b"), "{}", status.message());
}

#[test]
fn codes_have_grpcs_names() {
    let names: Vec<&str> = (0..17).map(|n| code_name(Code::from_i32(n))).collect();
    assert_eq!(names[0], "OK");
    assert_eq!(names[9], "FAILED_PRECONDITION");
    assert_eq!(names[14], "UNAVAILABLE");
    let distinct: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(distinct.len(), 17);
}

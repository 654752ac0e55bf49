//! A home's and the controller's refusals as gRPC statuses, and back.
//!
//! The code tells what any client should do; the details hold a
//! [`pb::Refusal`] for a caller that acts on the reason.

use prost::Message;
use tonic::{Code, Status};

use super::pb;
use super::pb::refusal::{Behind, NoSpace, Reason, Stale, StillInside, Unsettled};
use crate::attach::ArbiterError;
use crate::attach::ports::{ControlError, HomeError};
use crate::ids::{Bytes, Epoch, NodeId};

/// The status for a home's refusal.
pub fn home_status(error: &HomeError) -> Status {
    let text = error.to_string();
    let (code, reason) = match error {
        HomeError::Unreachable { .. } => return Status::unavailable(text),
        HomeError::StaleEpoch { home } => (
            Code::FailedPrecondition,
            Reason::StaleEpoch(Stale { home_epoch: home.0 }),
        ),
        HomeError::RecordBehind { home, recorded } => {
            let behind = Behind {
                home_epoch: home.0,
                recorded_epoch: recorded.0,
            };
            (Code::DataLoss, Reason::RecordBehind(behind))
        }
        HomeError::Unsettled { inside } => (
            Code::Unavailable,
            Reason::Unsettled(Unsettled { inside: *inside }),
        ),
        HomeError::StillInside {
            volume,
            epoch,
            inside,
        } => {
            let still = StillInside {
                volume: volume.to_string(),
                epoch: epoch.0,
                inside: *inside,
            };
            (Code::Unavailable, Reason::StillInside(still))
        }
        HomeError::NotYet(why) => (Code::Unavailable, Reason::NotYet(why.clone())),
        HomeError::NoVolume(volume) => (Code::NotFound, Reason::NoVolume(volume.to_string())),
        HomeError::NoSnapshot(id) => (Code::NotFound, Reason::NoSnapshot(id.to_string())),
        HomeError::Used(volume) => (
            Code::FailedPrecondition,
            Reason::UsedVolume(volume.to_string()),
        ),
        HomeError::NoSpace {
            pool,
            needed,
            available,
        } => {
            let pool = pool.to_string_lossy().into_owned();
            let space = NoSpace {
                pool,
                needed: needed.0,
                available: available.0,
            };
            (Code::ResourceExhausted, Reason::NoSpace(space))
        }
        HomeError::Unsupported(why) => (Code::Unimplemented, Reason::Unsupported(why.clone())),
        HomeError::Failed(why) => (Code::Internal, Reason::Failed(why.clone())),
    };
    with_reason(code, text, reason)
}

/// The refusal that `node` answered with; whatever is not one of its own
/// means that the home could not be asked.
pub fn home_error(node: &NodeId, status: &Status) -> HomeError {
    let unreachable = || HomeError::Unreachable {
        node: node.clone(),
        detail: format!("{}: {}", status.code(), status.message()),
    };
    let Some(reason) = reason(status) else {
        return unreachable();
    };
    match reason {
        Reason::StaleEpoch(stale) => HomeError::StaleEpoch {
            home: Epoch(stale.home_epoch),
        },
        Reason::RecordBehind(behind) => HomeError::RecordBehind {
            home: Epoch(behind.home_epoch),
            recorded: Epoch(behind.recorded_epoch),
        },
        Reason::Unsettled(unsettled) => HomeError::Unsettled {
            inside: unsettled.inside,
        },
        Reason::StillInside(still) => match still.volume.parse() {
            Ok(volume) => HomeError::StillInside {
                volume,
                epoch: Epoch(still.epoch),
                inside: still.inside,
            },
            Err(_) => unreachable(),
        },
        Reason::NotYet(why) => HomeError::NotYet(why),
        Reason::NoVolume(id) => id
            .parse()
            .map_or_else(|_| unreachable(), HomeError::NoVolume),
        Reason::NoSnapshot(id) => id
            .parse()
            .map_or_else(|_| unreachable(), HomeError::NoSnapshot),
        Reason::UsedVolume(id) => id.parse().map_or_else(|_| unreachable(), HomeError::Used),
        Reason::NoSpace(space) => HomeError::NoSpace {
            pool: space.pool.into(),
            needed: Bytes(space.needed),
            available: Bytes(space.available),
        },
        Reason::Unsupported(why) => HomeError::Unsupported(why),
        Reason::Failed(why) => HomeError::Failed(why),
        Reason::NotPublished(_) => unreachable(),
    }
}

/// The status for a node that asks for what it may use.
pub fn attachment_status(error: &ArbiterError) -> Option<Status> {
    let reason = match error {
        ArbiterError::NotPublished { volume, node } => {
            let (volume, node) = (volume.to_string(), node.to_string());
            Reason::NotPublished(pb::AttachmentRequest { volume, node })
        }
        ArbiterError::NoVolume(volume) => Reason::NoVolume(volume.to_string()),
        _ => return None,
    };
    let code = match reason {
        Reason::NoVolume(_) => Code::NotFound,
        _ => Code::FailedPrecondition,
    };
    Some(with_reason(code, error.to_string(), reason))
}

/// What the controller's status means to a node.
pub fn control_error(status: &Status) -> ControlError {
    let text = format!("{}: {}", status.code(), status.message());
    match reason(status) {
        Some(Reason::NotPublished(asked)) => match (asked.volume.parse(), asked.node.parse()) {
            (Ok(volume), Ok(node)) => ControlError::NotPublished { volume, node },
            _ => ControlError::Failed(text),
        },
        Some(Reason::NoVolume(id)) => id
            .parse()
            .map_or(ControlError::Failed(text), ControlError::NoVolume),
        _ => match status.code() {
            // ABORTED is the arbiter's "not yet": as with silence, ask again.
            Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Aborted => ControlError::Unreachable(text),
            _ => ControlError::Failed(text),
        },
    }
}

fn with_reason(code: Code, text: String, reason: Reason) -> Status {
    let details = pb::Refusal {
        reason: Some(reason),
    }
    .encode_to_vec();
    Status::with_details(code, text, details.into())
}

fn reason(status: &Status) -> Option<Reason> {
    if status.details().is_empty() {
        return None;
    }
    pb::Refusal::decode(status.details()).ok()?.reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_comes_back_as_itself() {
        let node: NodeId = "a".parse().unwrap();
        let errors = [
            HomeError::StaleEpoch { home: Epoch(7) },
            HomeError::RecordBehind {
                home: Epoch(3),
                recorded: Epoch(9),
            },
            HomeError::Unsettled { inside: 32 },
            HomeError::StillInside {
                volume: "vol-1".parse().unwrap(),
                epoch: Epoch(4),
                inside: 3,
            },
            HomeError::NotYet("volume vol-1 is being made".into()),
            HomeError::NoVolume("vol-1".parse().unwrap()),
            HomeError::NoSnapshot("snap-1".parse().unwrap()),
            HomeError::Used("vol-1".parse().unwrap()),
            HomeError::NoSpace {
                pool: "/p".into(),
                needed: Bytes(2),
                available: Bytes(1),
            },
            HomeError::Unsupported("no reflink".into()),
            HomeError::Failed("open /p/x: EIO".into()),
        ];
        for error in errors {
            assert_eq!(home_error(&node, &home_status(&error)), error);
        }
    }

    #[test]
    fn a_strange_status_means_that_the_home_was_not_asked() {
        let node: NodeId = "a".parse().unwrap();
        let status = Status::with_details(Code::NotFound, "x", vec![0xff_u8, 1, 2].into());
        assert!(matches!(
            home_error(&node, &status),
            HomeError::Unreachable { .. }
        ));
    }

    #[test]
    fn a_node_learns_that_nothing_is_published_to_it() {
        let error = ArbiterError::NotPublished {
            volume: "vol-1".parse().unwrap(),
            node: "a".parse().unwrap(),
        };
        let status = attachment_status(&error).unwrap();
        assert!(matches!(
            control_error(&status),
            ControlError::NotPublished { .. }
        ));
    }
}

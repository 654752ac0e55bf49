//! The one place where an error becomes a gRPC status. Every error has its
//! line here; there is no "otherwise".
//!
//! Callers act on the code alone: on UNAVAILABLE, ABORTED, RESOURCE_EXHAUSTED
//! and DEADLINE_EXCEEDED kubelet and the sidecars hold the outcome for unknown
//! and repeat the call; other codes they take as final for this attempt.

use tonic::{Code, Status};

use crate::attach::ArbiterError;
use crate::attach::ports::{ControlError, NodeError};

use super::request::RequestError;

/// Why a CSI call was not done.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request cannot be done as it was sent.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The arbiter refused.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// The node's side refused.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The call is in the protocol and drover does not serve it.
    #[error("{0} is not served by drover")]
    NotServed(&'static str),
    /// The call's own task ended without an answer, by a fault of drover's.
    #[error("{method}: the task that worked on it ended without an answer: {detail}")]
    Lost {
        /// The call.
        method: &'static str,
        /// What the runtime says of it.
        detail: String,
    },
}

impl Refusal {
    /// The gRPC code that CSI 1.12 gives this refusal.
    pub fn code(&self) -> Code {
        match self {
            Self::Request(error) => request_code(error),
            Self::Arbiter(error) => arbiter_code(error),
            Self::Node(error) => node_code(error),
            Self::NotServed(_) => Code::Unimplemented,
            Self::Lost { .. } => Code::Internal,
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Status::new(refusal.code(), refusal.to_string())
    }
}

fn request_code(error: &RequestError) -> Code {
    match error {
        RequestError::Missing(_)
        | RequestError::Field { .. }
        | RequestError::Parameter { .. }
        | RequestError::Capability(_) => Code::InvalidArgument,
        RequestError::Size(_) => Code::OutOfRange,
        RequestError::Impossible(_) | RequestError::NowhereAt { .. } => Code::NotFound,
        // CSI, NodePublishVolume: "Staging target path not set".
        RequestError::NotStaged => Code::FailedPrecondition,
        // CSI, ListVolumes and ListSnapshots: "Invalid starting_token".
        RequestError::Token(_) => Code::Aborted,
    }
}

fn arbiter_code(error: &ArbiterError) -> Code {
    match error {
        ArbiterError::NoVolume(_)
        | ArbiterError::NoSnapshot(_)
        | ArbiterError::NoNode(_)
        | ArbiterError::NoTicket { .. } => Code::NotFound,
        ArbiterError::HeldBy { .. }
        | ArbiterError::NotPublished { .. }
        | ArbiterError::InUse(_)
        | ArbiterError::Unsupported(_) => Code::FailedPrecondition,
        ArbiterError::Incompatible(_) => Code::AlreadyExists,
        ArbiterError::OutOfRange(_) => Code::OutOfRange,
        // The provisioner then has the scheduler choose another node.
        ArbiterError::NoSpace(_) => Code::ResourceExhausted,
        // CSI: "Operation pending for volume"; the caller comes again.
        ArbiterError::NotYet(_) => Code::Aborted,
        ArbiterError::NodeLost(_) | ArbiterError::Unavailable(_) => Code::Unavailable,
        ArbiterError::Failed(_) => Code::Internal,
    }
}

fn node_code(error: &NodeError) -> Code {
    match error {
        NodeError::Control(error) => control_code(error),
        NodeError::NotStaged { .. } | NodeError::Busy(_) | NodeError::Unusable(_) => {
            Code::FailedPrecondition
        }
        NodeError::NotThere { .. } => Code::NotFound,
        NodeError::Incompatible(_) => Code::AlreadyExists,
        NodeError::Deadline { .. } => Code::DeadlineExceeded,
        NodeError::Failed(_) => Code::Internal,
    }
}

fn control_code(error: &ControlError) -> Code {
    match error {
        ControlError::Unreachable(_) => Code::Unavailable,
        ControlError::NotPublished { .. } => Code::FailedPrecondition,
        ControlError::NoVolume(_) => Code::NotFound,
        ControlError::Failed(_) => Code::Internal,
    }
}

/// A code's name as gRPC spells it, for logs and metrics.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;

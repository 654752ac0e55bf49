//! drover's own gRPC: how controller, agents and the command line talk
//! (`proto/drover.proto`).
//!
//! [`convert`] is the only place where messages become types and back; what
//! does not convert is refused with the field's name. The clients implement
//! the arbiter's ports, so that neither the arbiter nor the initiator knows
//! whether the other side is in another process. Every call has a deadline.
//!
//! Connections are plain TCP and belong on loopback or a trusted network.

pub mod agent_client;
pub mod agent_service;
pub mod controller_client;
pub mod controller_service;
pub mod convert;
pub mod refusal;

/// The messages and services of `proto/drover.proto`, generated.
#[expect(
    missing_docs,
    clippy::allow_attributes,
    reason = "generated; proto/drover.proto has the comments"
)]
pub mod pb {
    tonic::include_proto!("drover.v1");
}

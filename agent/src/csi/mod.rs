//! CSI 1.12 over a unix socket, and the node's registration with kubelet.
//!
//! ```text
//!   kubelet, sidecars ── unix socket ──> identity, controller, node   thin handlers
//!                                            │ request: what was sent, checked
//!                                            │ calls: run to the end, logged, counted
//!                                            v
//!                                 attach::Arbiter, attach::ports::Staging
//!                                            │ status: error -> gRPC code
//! ```
//!
//! Owns the protocol, its codes and its sockets; decides nothing about volumes.
//! Refuses what it cannot promise with the field's name, and a socket behind
//! which somebody lives. GroupController and SnapshotMetadata are not served.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tracing::{info, warn};

use crate::attach::Arbiter;
use crate::attach::ports::Staging;
use crate::ids::NodeId;

mod calls;
mod controller;
mod identity;
mod node;
mod registration;
pub mod request;
mod socket;
pub mod status;

pub use registration::register;

/// The protocol's messages and services, from `proto/csi.proto`.
#[expect(clippy::allow_attributes, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("csi.v1");
}

/// The name under which drover is known, where the configuration says no other.
pub const DEFAULT_DRIVER: &str = "drover.io";

/// How long calls that are still at work when the service stops may go on.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why the service could not be had, or ended.
#[derive(Debug, thiserror::Error)]
pub enum CsiError {
    /// The driver's name is not one that CSI allows.
    #[error(
        "driver name {0:?} is not valid: 1 to 63 of a-z, A-Z, 0-9, - and ., beginning and ending \
         with a letter or digit"
    )]
    DriverName(String),
    /// The socket's path cannot be used.
    #[error("socket {}: {why}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Another server lives behind the socket.
    #[error(
        "socket {} is in use by a server that is running: stop it, or name another socket",
        .0.display()
    )]
    InUse(PathBuf),
    /// A system call about the socket failed.
    #[error("{call} {}: {source}", path.display())]
    Socket {
        /// The call.
        call: &'static str,
        /// The socket, or the file or folder beside it.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The gRPC server ended by itself.
    #[error("serve {}: {source}", path.display())]
    Serve {
        /// The socket.
        path: PathBuf,
        /// Its reason.
        source: tonic::transport::Error,
    },
}

/// A CSI driver's name (CSI, GetPluginInfoResponse: a domain name of at most 63
/// characters). Also a part of its registration socket's file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverName(String);

impl DriverName {
    /// The name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DriverName {
    type Err = CsiError;

    fn from_str(text: &str) -> Result<Self, CsiError> {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        let sound = text.len() <= 63
            && edge(text.chars().next())
            && edge(text.chars().last())
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.'));
        if sound {
            Ok(Self(text.to_owned()))
        } else {
            Err(CsiError::DriverName(text.chars().take(80).collect()))
        }
    }
}

/// What a process serves: Identity always, Controller and Node as it has them.
pub struct Services {
    driver: DriverName,
    controller: Option<Arc<Arbiter>>,
    node: Option<(NodeId, Arc<dyn Staging>)>,
    calls: calls::Calls,
}

impl Services {
    /// Identity alone, in the name of `driver`.
    pub fn new(driver: DriverName) -> Self {
        Self {
            driver,
            controller: None,
            node: None,
            calls: calls::Calls::default(),
        }
    }

    /// Controller, too.
    #[must_use]
    pub fn with_controller(mut self, arbiter: Arc<Arbiter>) -> Self {
        self.controller = Some(arbiter);
        self
    }

    /// Node, too, for the node of that name.
    #[must_use]
    pub fn with_node(mut self, node: NodeId, staging: Arc<dyn Staging>) -> Self {
        self.node = Some((node, staging));
        self
    }

    /// Puts the counts of calls into `registry`: `drover_csi_requests_total`
    /// by method and code, `drover_csi_request_seconds` by method.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.calls.register(registry);
    }
}

/// Serves CSI on the unix socket at `socket` (a path, or `unix://` and a path)
/// until `stop` says true or its sender is gone; calls at work then have five
/// seconds more. The socket is for root alone and is removed at the end.
///
/// Errors: [`CsiError::InUse`] where another server lives behind the socket;
/// the socket file of a dead one is replaced.
pub async fn serve(
    socket: &Path,
    services: Services,
    stop: watch::Receiver<bool>,
) -> Result<(), CsiError> {
    let socket = socket::bare(socket);
    let (listener, _claim) = socket::listen(socket).await?;
    let Services {
        driver,
        controller,
        node,
        calls,
    } = services;
    let identity = identity::Identity::new(driver.clone(), calls.clone());
    let controller = controller.map(|arbiter| {
        let controller = controller::Controller::new(arbiter, calls.clone());
        proto::controller_server::ControllerServer::new(controller)
    });
    let node = node.map(|(name, staging)| {
        proto::node_server::NodeServer::new(node::Node::new(name, staging, calls.clone()))
    });
    info!(
        driver = driver.as_str(),
        socket = %socket.display(),
        controller = controller.is_some(),
        node = node.is_some(),
        "serving CSI"
    );
    let server = Server::builder()
        .add_service(proto::identity_server::IdentityServer::new(identity))
        .add_optional_service(controller)
        .add_optional_service(node)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped(stop.clone()));
    tokio::select! {
        ended = server => ended.map_err(|source| CsiError::Serve { path: socket.to_owned(), source }),
        () = async { stopped(stop).await; tokio::time::sleep(FAREWELL).await } => {
            warn!(socket = %socket.display(), "calls were still at work when CSI stopped");
            Ok(())
        }
    }
}

/// Ends when `stop` says true, or can say nothing any more.
async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is as good as a stop.
    let _ = stop.wait_for(|stop| *stop).await;
}

#[cfg(test)]
#[path = "serve_tests.rs"]
mod tests;

#[cfg(test)]
mod wire_tests;

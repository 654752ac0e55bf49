//! The node's registration with kubelet (plugin registration v1).
//!
//! ```text
//!   waiting ──CSI socket and kubelet's folder are there──> listening
//!   listening ──kubelet removed the socket──> waiting
//!   listening ──kubelet says it did not register──> waiting
//!   any ──stop──> gone
//! ```
//!
//! Kubelet watches its folder `plugins_registry` for sockets and asks each who
//! is behind it. It empties the folder when it starts, so the socket is looked
//! after every few seconds and made anew. The folder is never made here: where
//! there is none, there is no kubelet (yet).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use tracing::{debug, info, warn};

use super::{CsiError, DriverName, socket, stopped};
use proto::registration_server;

/// The protocol's messages and service, from `proto/pluginregistration.proto`.
#[expect(clippy::allow_attributes, reason = "generated code")]
mod proto {
    tonic::include_proto!("pluginregistration");
}

/// How often the socket is looked after.
const LOOK: Duration = Duration::from_secs(2);

/// The CSI version told to kubelet, which accepts any 1.x.
const VERSION: &str = "1.0.0";

struct Registration {
    driver: DriverName,
    endpoint: String,
    /// Told when kubelet says that the registration failed.
    failed: Arc<Notify>,
}

#[tonic::async_trait]
impl registration_server::Registration for Registration {
    async fn get_info(
        &self,
        _: Request<proto::InfoRequest>,
    ) -> Result<Response<proto::PluginInfo>, Status> {
        Ok(Response::new(proto::PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: self.driver.as_str().to_owned(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec![VERSION.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        sent: Request<proto::RegistrationStatus>,
    ) -> Result<Response<proto::RegistrationStatusResponse>, Status> {
        let sent = sent.into_inner();
        if sent.plugin_registered {
            info!(
                driver = self.driver.as_str(),
                "kubelet has registered the driver"
            );
        } else {
            warn!(
                driver = self.driver.as_str(),
                error = sent.error,
                "kubelet refused the driver"
            );
            self.failed.notify_one();
        }
        Ok(Response::new(proto::RegistrationStatusResponse {}))
    }
}

/// Keeps `driver`, which serves CSI at `endpoint`, registered with the kubelet
/// whose folder for plugin sockets is `folder` (`/var/lib/kubelet/plugins_registry`),
/// until `stop` says true or its sender is gone.
///
/// Errors: [`CsiError::InUse`] where another process registers a driver of the
/// same name on this node; [`CsiError::Path`] where a path cannot be used.
/// Whatever may mend itself is waited for.
pub async fn register(
    folder: &Path,
    driver: &DriverName,
    endpoint: &Path,
    stop: watch::Receiver<bool>,
) -> Result<(), CsiError> {
    register_every(LOOK, folder, driver, endpoint, stop).await
}

async fn register_every(
    every: Duration,
    folder: &Path,
    driver: &DriverName,
    endpoint: &Path,
    stop: watch::Receiver<bool>,
) -> Result<(), CsiError> {
    let endpoint = socket::bare(endpoint);
    let Some(text) = endpoint.to_str().filter(|_| endpoint.is_absolute()) else {
        let why = "is not an absolute path in UTF-8, so kubelet cannot be told of it";
        return Err(CsiError::Path {
            path: endpoint.to_owned(),
            why,
        });
    };
    let offer = Offer {
        every,
        folder,
        path: folder.join(format!("{}-reg.sock", driver.as_str())),
        driver,
        endpoint: text,
    };
    tokio::select! {
        () = stopped(stop) => Ok(()),
        ended = offer.keep() => ended,
    }
}

/// What is offered to kubelet, and where.
struct Offer<'a> {
    /// How often the socket is looked after.
    every: Duration,
    folder: &'a Path,
    /// The registration's own socket.
    path: PathBuf,
    driver: &'a DriverName,
    endpoint: &'a str,
}

impl Offer<'_> {
    async fn keep(&self) -> Result<(), CsiError> {
        let mut silent = false;
        loop {
            // Kubelet calls the endpoint as soon as it has seen the socket.
            if self.folder.is_dir() && Path::new(self.endpoint).exists() {
                silent = false;
                match self.once().await {
                    Ok(()) => {}
                    Err(error @ (CsiError::Path { .. } | CsiError::InUse(_))) => return Err(error),
                    Err(error) => warn!(%error, "registration with kubelet is interrupted"),
                }
            } else if !silent {
                let (folder, endpoint) = (self.folder.display(), self.endpoint);
                info!(%folder, endpoint, "waiting for kubelet's folder and CSI's socket");
                silent = true;
            }
            sleep(self.every).await;
        }
    }

    /// Listens until the socket is gone or kubelet says that it did not register.
    async fn once(&self) -> Result<(), CsiError> {
        let (listener, claim) = socket::listen(&self.path).await?;
        let failed = Arc::new(Notify::new());
        let registration = Registration {
            driver: self.driver.clone(),
            endpoint: self.endpoint.to_owned(),
            failed: Arc::clone(&failed),
        };
        let service = registration_server::RegistrationServer::new(registration);
        let server = Server::builder()
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(listener));
        let gone = async {
            while claim.stands() {
                sleep(self.every).await;
            }
        };
        debug!(socket = %self.path.display(), "registration with kubelet offered");
        tokio::select! {
            ended = server => {
                ended.map_err(|source| CsiError::Serve { path: self.path.clone(), source })
            }
            () = gone => Ok(()),
            // A little later, so that kubelet has our answer first.
            () = async { failed.notified().await; sleep(self.every).await } => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "registration_tests.rs"]
mod tests;

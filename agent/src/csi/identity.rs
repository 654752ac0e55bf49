//! CSI Identity: who drover is and what it can do as a whole.
//!
//! Every process of the plugin gives the same answers, also one that serves
//! only the node's part: CSI asks for the plugin, not for the process.

use tonic::{Request, Response, Status};

use super::DriverName;
use super::calls::{Calls, Kind};
use super::proto::plugin_capability::{
    Service, Type, VolumeExpansion, service::Type as ServiceType,
    volume_expansion::Type as ExpansionType,
};
use super::proto::{self, identity_server};

/// The Identity service.
pub struct Identity {
    driver: DriverName,
    calls: Calls,
}

impl Identity {
    /// Answers in the name of `driver`.
    pub fn new(driver: DriverName, calls: Calls) -> Self {
        Self { driver, calls }
    }
}

#[tonic::async_trait]
impl identity_server::Identity for Identity {
    async fn get_plugin_info(
        &self,
        _: Request<proto::GetPluginInfoRequest>,
    ) -> Result<Response<proto::GetPluginInfoResponse>, Status> {
        let answer = proto::GetPluginInfoResponse {
            name: self.driver.as_str().to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: Default::default(),
        };
        self.calls
            .run("GetPluginInfo", Kind::Looks, "", async move { Ok(answer) })
            .await
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<proto::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<proto::GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: ServiceType| {
            Type::Service(Service {
                r#type: kind.into(),
            })
        };
        let capabilities = [
            service(ServiceType::ControllerService),
            service(ServiceType::VolumeAccessibilityConstraints),
            Type::VolumeExpansion(VolumeExpansion {
                r#type: ExpansionType::Online.into(),
            }),
        ]
        .map(|kind| proto::PluginCapability { r#type: Some(kind) })
        .to_vec();
        let answer = proto::GetPluginCapabilitiesResponse { capabilities };
        self.calls
            .run("GetPluginCapabilities", Kind::Looks, "", async move {
                Ok(answer)
            })
            .await
    }

    /// Ready as soon as it answers: nothing is served before all of it can be.
    async fn probe(
        &self,
        _: Request<proto::ProbeRequest>,
    ) -> Result<Response<proto::ProbeResponse>, Status> {
        let answer = proto::ProbeResponse { ready: Some(true) };
        self.calls
            .run("Probe", Kind::Looks, "", async move { Ok(answer) })
            .await
    }
}

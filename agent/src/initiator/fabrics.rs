//! Both protocols as one: each export's name says which one it is.

use std::time::Duration;

use async_trait::async_trait;

use super::fabric::{Attached, DevNumber, Device, ExportName, Fabric};
use super::iscsi::Iscsi;
use super::nvme::Nvme;
use crate::attach::ports::{NodeError, Protocol, Target};
use crate::ids::VolumeId;

/// The kernel's initiators.
#[derive(Debug)]
pub struct Fabrics {
    /// Of NVMe/TCP.
    pub nvme: Nvme,
    /// Of iSCSI.
    pub iscsi: Iscsi,
}

impl Fabrics {
    fn of(&self, protocol: Protocol) -> &dyn Fabric {
        match protocol {
            Protocol::NvmeTcp => &self.nvme,
            Protocol::Iscsi => &self.iscsi,
        }
    }
}

#[async_trait]
impl Fabric for Fabrics {
    fn attached(&self) -> Result<Vec<Attached>, NodeError> {
        let mut all = self.nvme.attached()?;
        all.extend(self.iscsi.attached()?);
        all.sort_by(|a, b| a.name.as_str().cmp(b.name.as_str()));
        Ok(all)
    }

    async fn proves(&self) -> bool {
        self.nvme.proves().await
    }

    async fn connect(&self, target: &Target) -> Result<Duration, NodeError> {
        let name: Result<ExportName, _> = target.name.parse();
        match name {
            Ok(name) if name.protocol == target.protocol => {
                self.of(name.protocol).connect(target).await
            }
            Ok(name) => Err(NodeError::Failed(format!(
                "export {name} is said to be reached by {}",
                target.protocol.name()
            ))),
            Err(error) => Err(NodeError::Failed(error.to_string())),
        }
    }

    async fn disconnect(&self, name: &ExportName) -> Result<Duration, NodeError> {
        self.of(name.protocol).disconnect(name).await
    }

    fn tidy(&self, volume: Option<&VolumeId>) -> Result<(), NodeError> {
        self.nvme.tidy(volume)?;
        self.iscsi.tidy(volume)
    }

    fn try_without_end(&self, name: &ExportName, device: &Device) -> Result<(), NodeError> {
        self.of(name.protocol).try_without_end(name, device)
    }

    async fn rescan(&self, name: &ExportName) -> Result<(), NodeError> {
        self.of(name.protocol).rescan(name).await
    }

    fn is_there(&self, number: DevNumber) -> bool {
        // Both look at the one list of block devices.
        self.nvme.is_there(number)
    }
}

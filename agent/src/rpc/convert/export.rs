//! An export: what is asked of a home, and what a node attaches by.

use super::{Malformed, protocol, set, text};
use crate::attach::ports::{Chap, Credentials, Disclosure, ExportRequest, Exported, Target};
use crate::ids::Epoch;
use crate::rpc::pb;

impl From<&Credentials> for pb::Credentials {
    fn from(credentials: &Credentials) -> Self {
        Self {
            name: credentials.name.clone(),
            secret: credentials.secret.clone(),
        }
    }
}

impl TryFrom<Option<pb::Credentials>> for Credentials {
    type Error = Malformed;
    fn try_from(credentials: Option<pb::Credentials>) -> Result<Self, Malformed> {
        let credentials = set("chap", credentials)?;
        if credentials.name.is_empty() || credentials.secret.is_empty() {
            return Err(Malformed {
                field: "chap",
                why: "has no name or no secret".into(),
            });
        }
        Ok(Self {
            name: credentials.name,
            secret: credentials.secret,
        })
    }
}

impl From<&Chap> for pb::Chap {
    fn from(chap: &Chap) -> Self {
        Self {
            initiator: Some((&chap.initiator).into()),
            target: Some((&chap.target).into()),
        }
    }
}

impl TryFrom<pb::Chap> for Chap {
    type Error = Malformed;
    fn try_from(chap: pb::Chap) -> Result<Self, Malformed> {
        Ok(Self {
            initiator: chap.initiator.try_into()?,
            target: chap.target.try_into()?,
        })
    }
}

impl From<&Disclosure> for pb::SecretsAnswer {
    fn from(told: &Disclosure) -> Self {
        let chap = told.chap.as_ref().map(pb::Chap::from).unwrap_or_default();
        Self {
            initiator: chap.initiator,
            target: chap.target,
            never_written: !told.ever_written,
        }
    }
}

impl TryFrom<pb::SecretsAnswer> for Disclosure {
    type Error = Malformed;
    fn try_from(answer: pb::SecretsAnswer) -> Result<Self, Malformed> {
        let chap = match (answer.initiator, answer.target) {
            (None, None) => None,
            (initiator, target) => Some(pb::Chap { initiator, target }.try_into()?),
        };
        Ok(Self {
            chap,
            ever_written: !answer.never_written,
        })
    }
}

impl From<&ExportRequest> for pb::ExportRequest {
    fn from(request: &ExportRequest) -> Self {
        Self {
            volume: request.volume.to_string(),
            epoch: request.epoch.0,
            node: request.node.to_string(),
            host: Some((&request.host).into()),
            read_only: request.read_only,
            protocol: request.protocol.name().into(),
        }
    }
}

impl TryFrom<pb::ExportRequest> for ExportRequest {
    type Error = Malformed;
    fn try_from(request: pb::ExportRequest) -> Result<Self, Malformed> {
        Ok(Self {
            volume: text("volume", &request.volume)?,
            epoch: Epoch(request.epoch),
            node: text("node", &request.node)?,
            host: set("host", request.host)?.try_into()?,
            protocol: protocol("protocol", &request.protocol)?,
            read_only: request.read_only,
        })
    }
}

impl From<&Exported> for pb::ExportAnswer {
    fn from(exported: &Exported) -> Self {
        Self {
            epoch: exported.epoch.0,
            name: exported.target.name.clone(),
            unit: exported.target.unit.to_string(),
            address: exported.target.address.to_string(),
            ever_written: exported.ever_written,
            protocol: exported.target.protocol.name().into(),
            chap: exported.target.chap.as_ref().map(Into::into),
            proves: exported.target.proves,
        }
    }
}

impl TryFrom<pb::ExportAnswer> for Exported {
    type Error = Malformed;
    fn try_from(answer: pb::ExportAnswer) -> Result<Self, Malformed> {
        Ok(Self {
            epoch: Epoch(answer.epoch),
            target: Target {
                protocol: protocol("protocol", &answer.protocol)?,
                name: answer.name,
                unit: text("unit", &answer.unit)?,
                address: text("address", &answer.address)?,
                chap: answer.chap.map(TryInto::try_into).transpose()?,
                proves: answer.proves,
            },
            ever_written: answer.ever_written,
        })
    }
}

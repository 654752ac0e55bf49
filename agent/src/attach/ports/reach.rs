//! Who may reach an export, over which protocol, and what both sides prove.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The protocol a volume is exported over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// NVMe over TCP. What records from before there was a choice mean.
    #[default]
    NvmeTcp,
    /// iSCSI.
    Iscsi,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::NvmeTcp, Self::Iscsi];

    /// Its name in messages, StorageClass parameters and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::NvmeTcp => "nvme-tcp",
            Self::Iscsi => "iscsi",
        }
    }

    /// The protocol of this name, if there is one.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|protocol| protocol.name() == name)
    }
}

/// What an NQN and an IQN may be long, in bytes (NVMe base specification 2.0,
/// section 4.5; RFC 7143, section 4.2.7.2).
pub const NAME_MAX: usize = 223;

/// Who a node is to targets: its NVMe host NQN and host identifier, and its
/// iSCSI initiator name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredHost")]
pub struct HostIdentity {
    /// Host NQN, `nqn.…`.
    pub nqn: String,
    /// Host identifier; Linux 6.12 demands one per host NQN.
    pub id: Uuid,
    /// iSCSI initiator name, `iqn.…`, in lower case.
    pub iqn: String,
    /// Whether its kernel can prove itself over NVMe/TCP (DH-HMAC-CHAP).
    pub proves: bool,
}

/// As it is stored; agents from before iSCSI stored no initiator name.
#[derive(Deserialize)]
struct StoredHost {
    nqn: String,
    id: Uuid,
    iqn: Option<String>,
    #[serde(default)]
    proves: bool,
}

impl From<StoredHost> for HostIdentity {
    fn from(stored: StoredHost) -> Self {
        let derived = Self::of(stored.nqn, stored.id);
        Self {
            iqn: stored.iqn.unwrap_or(derived.iqn),
            proves: stored.proves,
            ..derived
        }
    }
}

impl HostIdentity {
    /// An identity whose initiator name follows from its host identifier, of a
    /// kernel that proves nothing over NVMe/TCP.
    pub fn of(nqn: impl Into<String>, id: Uuid) -> Self {
        Self {
            nqn: nqn.into(),
            id,
            iqn: format!("iqn.2026-11.io.drover.node:{id}"),
            proves: false,
        }
    }

    /// Whether targets know both by the same names. What their kernels can
    /// prove is no part of it: a node whose kernel could not be asked for a
    /// moment is the host that it was, and so are its workloads.
    pub fn is_same_host(&self, other: &Self) -> bool {
        self.nqn == other.nqn && self.id == other.id && self.iqn == other.iqn
    }
}

/// Whether a text is an iSCSI name of the iqn. kind, in the one spelling that
/// needs no normalisation (RFC 7143, section 4.2.7.2; RFC 3722).
pub fn is_iqn(name: &str) -> bool {
    name.len() <= NAME_MAX
        && name.strip_prefix("iqn.").is_some_and(|rest| {
            !rest.is_empty()
                && rest
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || ".:-".contains(c))
        })
}

/// A name and the secret that proves it. Never shown: Debug leaves the secret out.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// CHAP_N.
    pub name: String,
    /// The secret.
    pub secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.name)
    }
}

/// What the two sides of an export prove to each other: by CHAP over iSCSI, by
/// DH-HMAC-CHAP over NVMe/TCP. Made for one export alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chap {
    /// What the initiator proves.
    pub initiator: Credentials,
    /// What the target proves.
    pub target: Credentials,
}

impl Chap {
    /// Fresh secrets, one for each direction, which CHAP demands to be
    /// different (RFC 7143, section 12.1.3): 122 random bits each, where 96 are
    /// demanded. Each is 32 characters long, so that its bytes are a key of
    /// DH-HMAC-CHAP too (32, 48 or 64 bytes).
    pub fn fresh(initiator: &str, target: &str) -> Self {
        let credentials = |name: &str| Credentials {
            name: name.to_owned(),
            secret: Uuid::new_v4().simple().to_string(),
        };
        Self {
            initiator: credentials(initiator),
            target: credentials(target),
        }
    }
}

/// How to reach an export. Made by the home for one epoch, never used again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The protocol it speaks.
    #[serde(default)]
    pub protocol: Protocol,
    /// Its name: a subsystem NQN or a target IQN.
    #[serde(alias = "subsystem")]
    pub name: String,
    /// Identity of the one namespace (its UUID, and with the same bytes its
    /// NGUID) or of LUN 0 (its unit serial number).
    #[serde(alias = "namespace")]
    pub unit: Uuid,
    /// Where the home listens.
    pub address: SocketAddr,
    /// Whether its host must prove itself.
    #[serde(default)]
    pub proves: bool,
    /// What is proved; none: not told here, or nothing is. Only a node that
    /// asks for its own attachment is told; the home's record keeps it, and the
    /// control plane's store never does.
    #[serde(skip)]
    pub chap: Option<Chap>,
}

/// What a home says of an export that is open, for the node that may use it, at
/// the moment it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disclosure {
    /// What both sides prove to each other; none: nothing is proved.
    pub chap: Option<Chap>,
    /// Whether any host has ever written to the volume, by now.
    pub ever_written: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stored_before_iscsi_reads_on() {
        let id = Uuid::from_u128(7);
        let host: HostIdentity =
            serde_json::from_str(&format!(r#"{{"nqn":"nqn.x","id":"{id}"}}"#)).unwrap();
        assert_eq!(host, HostIdentity::of("nqn.x", id));
        assert!(is_iqn(&host.iqn), "{}", host.iqn);
        let again = serde_json::to_string(&host).unwrap();
        assert_eq!(serde_json::from_str::<HostIdentity>(&again).unwrap(), host);

        let target: Target = serde_json::from_str(&format!(
            r#"{{"subsystem":"nqn.s","namespace":"{id}","address":"10.0.0.1:4420"}}"#
        ))
        .unwrap();
        assert_eq!((target.protocol, target.unit), (Protocol::NvmeTcp, id));
        assert_eq!(target.name, "nqn.s");
    }

    #[test]
    fn secrets_are_fresh_and_never_shown_or_stored_with_a_target() {
        let (one, two) = (Chap::fresh("iqn.i", "iqn.t"), Chap::fresh("iqn.i", "iqn.t"));
        let secrets = [&one.initiator, &one.target, &two.initiator, &two.target];
        for (at, credentials) in secrets.iter().enumerate() {
            assert_eq!(credentials.secret.len(), 32);
            let others = secrets.iter().skip(at + 1);
            assert!(others.clone().all(|o| o.secret != credentials.secret));
        }
        let target = Target {
            protocol: Protocol::Iscsi,
            name: "iqn.t".into(),
            unit: Uuid::nil(),
            address: "10.0.0.1:3260".parse().unwrap(),
            proves: true,
            chap: Some(one.clone()),
        };
        let shown = format!("{target:?} {}", serde_json::to_string(&target).unwrap());
        for credentials in [&one.initiator, &one.target] {
            assert!(!shown.contains(&credentials.secret), "{shown}");
        }
    }

    #[test]
    fn names_are_taken_in_one_spelling_only() {
        assert!(is_iqn("iqn.2026-11.io.drover:vol-1:7:ab"));
        let long = format!("iqn.{}", "x".repeat(NAME_MAX));
        for wrong in ["", "iqn.", "nqn.x", "iqn.A", "iqn.a b", "iqn.a,b", &long] {
            assert!(!is_iqn(wrong), "{wrong}");
        }
    }
}

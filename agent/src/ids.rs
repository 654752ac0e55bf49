//! The identifiers and quantities that every module speaks in, one type each.
//!
//! Each is checked where it is made, so that whoever holds one need not check
//! again: a `VolumeId` is a safe file name, a `NodeId` a valid Kubernetes node
//! name, a `Bytes` is bytes and never blocks.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {text:?} is not valid: {rule}")]
pub struct InvalidId {
    kind: &'static str,
    text: String,
    rule: &'static str,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:literal, $rule:literal, $extra:pat) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier's text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let edge = |c: Option<char>| {
                    c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
                };
                let inner = |c: char| {
                    c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, $extra)
                };
                let sound = text.len() <= $max
                    && edge(text.chars().next())
                    && edge(text.chars().last())
                    && text.chars().all(inner);
                if sound {
                    Ok(Self(text.to_owned()))
                } else {
                    let text = text.chars().take(80).collect();
                    Err(InvalidId { kind: $kind, text, rule: $rule })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id!(
    /// A volume. Also a file name in its pool and a part of its exports' NQNs.
    VolumeId, "volume id", 63,
    "1 to 63 of a-z, 0-9 and -, beginning and ending with a letter or digit", '-'
);
text_id!(
    /// A snapshot of a volume. Also a file name in its pool.
    SnapshotId, "snapshot id", 63,
    "1 to 63 of a-z, 0-9 and -, beginning and ending with a letter or digit", '-'
);
text_id!(
    /// A node: the name Kubernetes gives it (RFC 1123 subdomain).
    NodeId, "node name", 253,
    "1 to 253 of a-z, 0-9, - and ., beginning and ending with a letter or digit", '-' | '.'
);
text_id!(
    /// A ticket: one claim on one volume.
    TicketId, "ticket id", 63,
    "1 to 63 of a-z, 0-9 and -, beginning and ending with a letter or digit", '-'
);

impl VolumeId {
    /// A new id that no other volume has (`vol-` and a random UUID).
    pub fn random() -> Self {
        Self(format!("vol-{}", uuid::Uuid::new_v4()))
    }
}

impl SnapshotId {
    /// A new id that no other snapshot has (`snap-` and a random UUID).
    pub fn random() -> Self {
        Self(format!("snap-{}", uuid::Uuid::new_v4()))
    }
}

impl TicketId {
    /// A new id that no other ticket has (`ticket-` and a random UUID).
    pub fn random() -> Self {
        Self(format!("ticket-{}", uuid::Uuid::new_v4()))
    }
}

/// Where a service is reached: `10.0.0.1:9750`, `[fd00::1]:9750`, or a DNS name
/// and a port. A name is looked up at each new connection, so that what it
/// stands for may move.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct HostPort(String);

impl HostPort {
    /// The address's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is a name, which can be connected to but not listened on.
    pub fn is_name(&self) -> bool {
        self.0.parse::<SocketAddr>().is_err()
    }
}

impl From<SocketAddr> for HostPort {
    fn from(address: SocketAddr) -> Self {
        Self(address.to_string())
    }
}

impl FromStr for HostPort {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let named = || {
            let (host, port) = text.rsplit_once(':')?;
            let port = port.parse::<u16>().ok()?;
            (is_dns_name(host) && port != 0).then_some(())
        };
        if text.parse::<SocketAddr>().is_ok() || named().is_some() {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidId {
                kind: "address",
                text: text.chars().take(80).collect(),
                rule: "an IP address or a DNS name, a colon and a port, as in 10.0.0.1:9750",
            })
        }
    }
}

impl TryFrom<String> for HostPort {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// RFC 1123 2.1: labels of letters, digits and hyphens, the last of them not
/// all digits, so that a mistyped IP address is no name. A dot may end it.
fn is_dns_name(host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let number = |label: &str| label.bytes().all(|b| b.is_ascii_digit());
    host.len() <= 253 && host.split('.').all(label) && !host.rsplit('.').next().is_some_and(number)
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $format:literal) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
    };
}

number!(
    /// A volume's fencing token: grows at every change of holder. 0 is before the first.
    Epoch, "{}"
);
number!(
    /// One intent of the arbiter for one volume. A result names the intent it is of.
    ActionId, "{}"
);
number!(
    /// A whole disk's sequence number, never used again while the kernel runs
    /// (`/sys/block/DISK/diskseq`), unlike its device number.
    Diskseq, "{}"
);
number!(
    /// A count of bytes.
    Bytes, "{} bytes"
);
number!(
    /// A logical block address, in blocks of [`crate::block::BLOCK`] bytes.
    Lba, "{}"
);

impl Epoch {
    /// The epoch after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl FromStr for Bytes {
    type Err = InvalidId;
    /// Reads `1048576`, `512M`, `10G`, `10Gi` or `10GiB`; every unit is a power of 1024.
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let refuse = || InvalidId {
            kind: "size",
            text: text.chars().take(80).collect(),
            rule: "a whole number with an optional unit K, M, G or T (powers of 1024), as in 10G",
        };
        let unit_at = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let shift = match unit.trim_end_matches('B').trim_end_matches('i') {
            "" if unit.is_empty() || unit == "B" => 0,
            "K" | "k" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(refuse()),
        };
        let number: u64 = number.parse().map_err(|_| refuse())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(refuse)
    }
}

impl ActionId {
    /// The intent after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_no_volume_id() {
        for text in [
            "",
            "../x",
            "a/b",
            "a..b/",
            "-a",
            "a-",
            "A",
            "a b",
            "é",
            ".",
            &"a".repeat(64),
        ] {
            assert!(text.parse::<VolumeId>().is_err(), "{text:?} was taken");
        }
        assert_eq!("vol-1".parse::<VolumeId>().unwrap().as_str(), "vol-1");
    }

    #[test]
    fn an_address_is_an_ip_or_a_name_with_a_port() {
        let read = |text: &str| text.parse::<HostPort>().map(|a| a.is_name());
        for address in ["127.0.0.1:9750", "[::1]:9750", "0.0.0.0:1", "[fe80::1%3]:1"] {
            assert_eq!(read(address), Ok(false), "{address}");
        }
        let long = format!("{}:1", ["a".repeat(63).as_str(); 3].join("."));
        for name in [
            "localhost:1",
            "drover-controller.drover.svc:9750",
            "n.:1",
            "1a:1",
            &long,
        ] {
            assert_eq!(read(name), Ok(true), "{name}");
        }
        let long = format!("{}:1", "a".repeat(64));
        for text in [
            "",
            ":",
            ":1",
            "a",
            "a:",
            "a:0",
            "a:x",
            "a:70000",
            "a b:1",
            "http://a:1",
            "a:1/x",
            "-a:1",
            "a-:1",
            "a..b:1",
            ".:1",
            "a_b:1",
            "u@a:1",
            "10.0.0:1",
            "10.0.0.300:1",
            "10.0.0.1",
            "::1:1",
            "[a]:1",
            "é:1",
            &long,
        ] {
            assert!(read(text).is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let size = |text: &str| text.parse::<Bytes>().map(|b| b.0);
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("10Gi"), Ok(10 << 30));
        assert_eq!(size("10GiB"), Ok(10 << 30));
        for text in ["", "G", "-1", "1.5G", "1X", "i", "99999999999999T", "1 G"] {
            assert!(size(text).is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn ids_are_checked_when_read_from_disk() {
        assert!(serde_json::from_str::<VolumeId>("\"../etc\"").is_err());
        assert!(serde_json::from_str::<NodeId>("\"a.example\"").is_ok());
    }
}

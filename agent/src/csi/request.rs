//! From protocol messages to checked types. All checking of what a caller
//! sent happens here, purely, before anything acts.
//!
//! A missing or malformed field is refused with its name. An id that no volume,
//! snapshot or node can have (a path, say) is treated as CSI treats an unknown
//! one: what would delete it has nothing to do, everything else finds nothing.

use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::attach::ports::{Access, FsType, Protocol};
use crate::attach::record::AccessMode;
use crate::ids::{Bytes, InvalidId, NodeId, VolumeId};

use super::proto::{self, volume_capability::AccessType, volume_capability::access_mode::Mode};

pub mod controller;
pub mod node;

/// Why a request was refused before anything was done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A field that the call needs is not set.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field's value cannot be used.
    #[error("{field}: {why}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// A StorageClass or VolumeSnapshotClass parameter cannot be used.
    #[error("parameter {key:?}: {why}")]
    Parameter {
        /// The parameter.
        key: String,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// A way to use a volume that drover does not offer.
    #[error("volume_capability: {0}")]
    Capability(String),
    /// A size that cannot be had.
    #[error("capacity_range: {0}")]
    Size(String),
    /// An id that no object can have; so there is none.
    #[error("there is none: {0}")]
    Impossible(#[from] InvalidId),
    /// A path at which nothing can be staged or published.
    #[error("volume {volume} is not at {path:?}: {why}")]
    NowhereAt {
        /// The volume.
        volume: VolumeId,
        /// The path, as it was sent.
        path: String,
        /// Why nothing can be there.
        why: &'static str,
    },
    /// NodePublishVolume without the path where the volume is staged.
    #[error("staging_target_path is missing: a volume is staged before it is published")]
    NotStaged,
    /// A page token that this service did not make.
    #[error("starting_token {0:?} is not one of ours: list again from the first page")]
    Token(String),
}

/// CSI's bound on a name (its section "Size Limits"), in bytes.
const NAME_BYTES: usize = 128;
/// CSI's bound on all mount flags together, in bytes.
const FLAGS_BYTES: usize = 4096;
/// Linux' bound on a path (PATH_MAX, with the closing zero byte).
const PATH_BYTES: usize = 4095;
/// Sizes are whole multiples of this (the arbiter rounds up to it).
const MIB: u64 = 1 << 20;
/// The size of a volume for which none is asked.
pub const DEFAULT_SIZE: Bytes = Bytes(1 << 30);
/// The largest size: what rounds up to a whole MiB within a protocol's int64.
const LARGEST: u64 = i64::MAX as u64 - (MIB - 1);
/// Keys of the cluster's own that ride along in parameters.
const CLUSTER_PREFIX: &str = "csi.storage.k8s.io/";
/// The longest busyDeadline.
const LONGEST_BUSY: Duration = Duration::from_secs(24 * 60 * 60);

/// A field's text, which must not be empty.
fn given<'a>(field: &'static str, text: &'a str) -> Result<&'a str, RequestError> {
    if text.is_empty() {
        return Err(RequestError::Missing(field));
    }
    Ok(text)
}

/// An id of an object that must exist.
fn existing<T>(field: &'static str, text: &str) -> Result<T, RequestError>
where
    T: FromStr<Err = InvalidId>,
{
    Ok(given(field, text)?.parse()?)
}

/// An id of an object that need not exist; none: no object can have it.
fn perhaps<T>(field: &'static str, text: &str) -> Result<Option<T>, RequestError>
where
    T: FromStr<Err = InvalidId>,
{
    Ok(given(field, text)?.parse().ok())
}

/// The volume of a call that needs one.
fn volume_id(text: &str) -> Result<VolumeId, RequestError> {
    existing("volume_id", text)
}

/// A name for a new volume or snapshot: any text that CSI allows.
fn name(text: &str) -> Result<String, RequestError> {
    given("name", text)?;
    if text.len() > NAME_BYTES {
        let why = format!(
            "is {} bytes long; at most {NAME_BYTES} are allowed",
            text.len()
        );
        return Err(RequestError::Field { field: "name", why });
    }
    // CSI bans control characters other than tab, line feed and carriage return.
    let banned = |c: &char| c.is_control() && !matches!(c, '\t' | '\n' | '\r');
    if let Some(c) = text.chars().find(banned) {
        let why = format!("holds the control character {:?}", c);
        return Err(RequestError::Field { field: "name", why });
    }
    Ok(text.to_owned())
}

/// Why a text is no path of a volume's, if it is none.
fn path_fault(text: &str) -> Option<&'static str> {
    let path = Path::new(text);
    if !path.is_absolute() {
        Some("is not an absolute path")
    } else if path.components().any(|c| c == Component::ParentDir) {
        Some("has \"..\" in it")
    } else if path.parent().is_none() {
        Some("is the root of the file system")
    } else if text.len() > PATH_BYTES {
        Some("is longer than a path can be")
    } else if text.contains('\0') {
        Some("has a zero byte in it")
    } else {
        None
    }
}

/// A path that the call acts on.
fn path(field: &'static str, text: &str) -> Result<PathBuf, RequestError> {
    given(field, text)?;
    match path_fault(text) {
        None => Ok(PathBuf::from(text)),
        Some(fault) => {
            let shown: String = text.chars().take(NAME_BYTES).collect();
            Err(RequestError::Field {
                field,
                why: format!("{shown:?} {fault}"),
            })
        }
    }
}

/// A path where a volume is expected to be.
fn place(volume: &VolumeId, text: &str) -> Result<PathBuf, RequestError> {
    given("volume_path", text)?;
    match path_fault(text) {
        None => Ok(PathBuf::from(text)),
        Some(why) => Err(RequestError::NowhereAt {
            volume: volume.clone(),
            path: text.chars().take(NAME_BYTES).collect(),
            why,
        }),
    }
}

/// One way to use a volume, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// As a device or a file system.
    pub access: Access,
    /// By whom at the same time.
    pub mode: AccessMode,
}

/// What a capability means.
fn capability(sent: Option<&proto::VolumeCapability>) -> Result<Use, RequestError> {
    let sent = sent.ok_or(RequestError::Missing("volume_capability"))?;
    let access = match &sent.access_type {
        None => return Err(RequestError::Missing("volume_capability.access_type")),
        Some(AccessType::Block(_)) => Access::Block,
        Some(AccessType::Mount(mount)) => mount_access(mount)?,
    };
    let mode = sent
        .access_mode
        .ok_or(RequestError::Missing("volume_capability.access_mode"))?;
    Ok(Use {
        access,
        mode: access_mode(mode.mode)?,
    })
}

fn mount_access(mount: &proto::volume_capability::MountVolume) -> Result<Access, RequestError> {
    let fs = match mount.fs_type.as_str() {
        "" | "ext4" => FsType::Ext4,
        "xfs" => FsType::Xfs,
        other => {
            let other: String = other.chars().take(NAME_BYTES).collect();
            let text =
                format!("fs_type {other:?} is not known; known are ext4 (the default) and xfs");
            return Err(RequestError::Capability(text));
        }
    };
    if !mount.volume_mount_group.is_empty() {
        let text = "volume_mount_group is not offered; let the pod's fsGroup set the owner";
        return Err(RequestError::Capability(text.to_owned()));
    }
    // The flags' text stays out of the answer: CSI says that it may be secret.
    if mount.mount_flags.iter().map(String::len).sum::<usize>() > FLAGS_BYTES {
        let text = format!("mount_flags are longer than {FLAGS_BYTES} bytes in all");
        return Err(RequestError::Capability(text));
    }
    for (nth, flag) in mount.mount_flags.iter().enumerate() {
        if flag.is_empty() || flag.chars().any(|c| c.is_control() || c.is_whitespace()) {
            let text = format!(
                "mount_flags[{nth}] is empty or has white space or control characters in it"
            );
            return Err(RequestError::Capability(text));
        }
    }
    Ok(Access::Mount {
        fs,
        flags: mount.mount_flags.clone(),
    })
}

fn access_mode(mode: i32) -> Result<AccessMode, RequestError> {
    let refused = |name: &str| {
        RequestError::Capability(format!(
            "access mode {name} is not offered: a volume is used on one node at a time; offered \
             are SINGLE_NODE_WRITER, SINGLE_NODE_SINGLE_WRITER, SINGLE_NODE_MULTI_WRITER and \
             SINGLE_NODE_READER_ONLY"
        ))
    };
    match Mode::try_from(mode) {
        Ok(Mode::SingleNodeWriter | Mode::SingleNodeSingleWriter | Mode::SingleNodeMultiWriter) => {
            Ok(AccessMode::SingleWriter)
        }
        Ok(Mode::SingleNodeReaderOnly) => Ok(AccessMode::SingleReader),
        Ok(
            mode @ (Mode::MultiNodeReaderOnly
            | Mode::MultiNodeSingleWriter
            | Mode::MultiNodeMultiWriter),
        ) => Err(refused(mode.as_str_name())),
        Ok(Mode::Unknown) => Err(RequestError::Missing("volume_capability.access_mode.mode")),
        Err(_) => Err(refused(&mode.to_string())),
    }
}

/// The bounds of a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    /// At least this, where that was said.
    required: Option<Bytes>,
    /// At most this, where that was said.
    limit: Option<Bytes>,
}

/// A capacity range that says something, or the absence of one.
fn range(sent: Option<&proto::CapacityRange>) -> Result<Option<Range>, RequestError> {
    let Some(sent) = sent else { return Ok(None) };
    let bound = |field: &'static str, value: i64| match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(bytes) => Ok(Some(Bytes(bytes))),
        Err(_) => Err(RequestError::Field {
            field,
            why: format!("{value} is negative"),
        }),
    };
    let required = bound("capacity_range.required_bytes", sent.required_bytes)?;
    let limit = bound("capacity_range.limit_bytes", sent.limit_bytes)?;
    match (required, limit) {
        (None, None) => Err(RequestError::Field {
            field: "capacity_range",
            why: "neither required_bytes nor limit_bytes is set: a volume of size 0 cannot be \
                  made"
                .to_owned(),
        }),
        (Some(least), Some(most)) if least > most => Err(RequestError::Size(format!(
            "required_bytes ({least}) is more than limit_bytes ({most})"
        ))),
        (Some(least), _) if least.0 > LARGEST => Err(RequestError::Size(format!(
            "required_bytes ({least}) is more than the largest volume ({LARGEST} bytes)"
        ))),
        _ => Ok(Some(Range { required, limit })),
    }
}

/// What StorageClass parameters say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Class {
    protocol: Protocol,
    home: Option<NodeId>,
    busy_deadline: Duration,
    /// Those of drover's own, as given.
    own: std::collections::BTreeMap<String, String>,
}

fn class(
    sent: &std::collections::HashMap<String, String>,
    busy_default: Duration,
) -> Result<Class, RequestError> {
    let mut class = Class {
        protocol: Protocol::NvmeTcp,
        home: None,
        busy_deadline: busy_default,
        own: Default::default(),
    };
    for (key, value) in sent
        .iter()
        .filter(|(key, _)| !key.starts_with(CLUSTER_PREFIX))
    {
        let refused = |why: String| RequestError::Parameter {
            key: shown(key),
            why,
        };
        match key.as_str() {
            "protocol" => class.protocol = protocol(value).map_err(refused)?,
            "home" => {
                let home = value
                    .parse()
                    .map_err(|e: InvalidId| refused(e.to_string()))?;
                class.home = Some(home);
            }
            "busyDeadline" => class.busy_deadline = duration(value).map_err(refused)?,
            _ => {
                return Err(refused(
                    "is not known; known are protocol, home and busyDeadline".to_owned(),
                ));
            }
        }
        class.own.insert(key.clone(), value.clone());
    }
    Ok(class)
}

fn protocol(text: &str) -> Result<Protocol, String> {
    Protocol::named(text).ok_or_else(|| {
        format!(
            "{:?} is not a protocol; known are {}",
            shown(text),
            Protocol::ALL.map(Protocol::name).join(" and ")
        )
    })
}

/// A caller's text, short enough to be shown.
fn shown(text: &str) -> String {
    text.chars().take(NAME_BYTES).collect()
}

/// A length of time as people write it in Kubernetes: "90s", "2m", "1h30m", "500ms".
fn duration(text: &str) -> Result<Duration, String> {
    let refused = || {
        format!(
            "{:?} is not a length of time; write one like 90s, 2m or 1h30m",
            shown(text)
        )
    };
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit())
            .ok_or_else(refused)?;
        let count: u64 = rest[..digits].parse().map_err(|_| refused())?;
        rest = &rest[digits..];
        let letters = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let millis: u64 = match &rest[..letters] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(refused()),
        };
        rest = &rest[letters..];
        let part = count
            .checked_mul(millis)
            .map(Duration::from_millis)
            .ok_or_else(refused)?;
        total = total.checked_add(part).ok_or_else(refused)?;
    }
    if text.is_empty() {
        return Err(refused());
    }
    if total > LONGEST_BUSY {
        return Err(format!("{:?} is longer than 24h", shown(text)));
    }
    Ok(total)
}

/// How many entries a page may have, and after which id it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// At most this many.
    pub most: usize,
    /// The last id of the page before.
    pub after: Option<T>,
}

/// What a page token begins with: no token of ours looks like a bare id.
const TOKEN_PREFIX: &str = "after/";

fn page<T: FromStr>(max_entries: i32, token: &str) -> Result<Page<T>, RequestError> {
    let most = match usize::try_from(max_entries) {
        Ok(0) => usize::MAX,
        Ok(most) => most,
        Err(_) => {
            let why = format!("{max_entries} is negative");
            return Err(RequestError::Field {
                field: "max_entries",
                why,
            });
        }
    };
    let after = match token {
        "" => None,
        token => {
            let id = token
                .strip_prefix(TOKEN_PREFIX)
                .and_then(|id| id.parse().ok());
            Some(id.ok_or_else(|| RequestError::Token(shown(token)))?)
        }
    };
    Ok(Page { most, after })
}

impl<T: Ord + std::fmt::Display> Page<T> {
    /// The entries of this page, out of all in order of id, and the next page's token.
    pub fn take<E>(&self, all: Vec<E>, id: impl Fn(&E) -> &T) -> (Vec<E>, String) {
        let mut rest = all
            .into_iter()
            .filter(|e| self.after.as_ref().is_none_or(|a| id(e) > a));
        let entries: Vec<E> = rest.by_ref().take(self.most).collect();
        let token = match (rest.next(), entries.last()) {
            (Some(_), Some(last)) => format!("{TOKEN_PREFIX}{}", id(last)),
            _ => String::new(),
        };
        (entries, token)
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;

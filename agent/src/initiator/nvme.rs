//! NVMe over TCP, as Linux offers it: `/dev/nvme-fabrics` and sysfs.
//!
//! The layout (drivers/nvme/host/core.c, multipath.c): every subsystem is a
//! folder of `class/nvme-subsystem`, holds links to its controllers (`nvme0`)
//! and, where it has a multipath head, the head's disk (`nvme0n1`). Without
//! multipath the disk is in the controller's folder; a hidden path
//! (`nvme0c0n1`) is never the disk to use.
//!
//! Several agents can share one kernel (as tests and the demo do), so only
//! controllers with this host's own NQN are its own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::errno::Errno;
use uuid::Uuid;

use super::child::Children;
use super::child_ops::{Answer, Op};
use super::fabric::{Attached, DevNumber, Device, ExportName, Fabric};
use super::sysfs::{self, Roots, is_number, names, read};
use crate::attach::ports::{Credentials, HostIdentity, NodeError, Target};

/// Seconds between a host's keep-alives. A dead connection is noticed after two.
const KEEP_ALIVE: u32 = 5;
/// Seconds between two tries to reconnect.
const RECONNECT_DELAY: u32 = 1;
/// The most I/O queues a volume gets.
const QUEUES: usize = 4;

/// How long the kernel may take over each call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FabricDeadlines {
    /// To connect to a target that answers.
    pub connect: Duration,
    /// To delete a controller.
    pub disconnect: Duration,
}

impl Default for FabricDeadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            disconnect: Duration::from_secs(10),
        }
    }
}

/// The kernel's NVMe/TCP initiator.
#[derive(Debug)]
pub struct Nvme {
    roots: Roots,
    host: HostIdentity,
    children: Children,
    deadlines: FabricDeadlines,
}

impl Nvme {
    /// The initiator of `host` on this kernel.
    pub fn new(
        roots: Roots,
        host: HostIdentity,
        children: Children,
        deadlines: FabricDeadlines,
    ) -> Self {
        Self {
            roots,
            host,
            children,
            deadlines,
        }
    }

    fn controller(&self, name: &str) -> PathBuf {
        self.roots.sys.join("class/nvme").join(name)
    }

    /// The subsystem in `folder`, if it is an export that this host is connected to.
    fn subsystem(&self, folder: &Path) -> Result<Option<Attached>, NodeError> {
        let Some(nqn) = read(&folder.join("subsysnqn"))? else {
            return Ok(None);
        };
        let Ok(name) = nqn.parse::<ExportName>() else {
            return Ok(None);
        };
        let mut controllers = Vec::new();
        let mut disks = Vec::new();
        for entry in names(folder)? {
            if is_disk(&entry) {
                disks.push(entry);
            } else if is_controller(&entry)
                && read(&folder.join(&entry).join("hostnqn"))?.as_deref() == Some(&self.host.nqn)
            {
                let state = read(&folder.join(&entry).join("state"))?.unwrap_or_default();
                let inside = names(&folder.join(&entry))?;
                disks.extend(inside.into_iter().filter(|name| is_disk(name)));
                controllers.push((entry, state));
            }
        }
        if controllers.is_empty() {
            return Ok(None);
        }
        disks.sort();
        disks.dedup();
        let device = match disks.as_slice() {
            [] => None,
            [disk] => self.device(disk)?,
            several => {
                return Err(NodeError::Unusable(format!(
                    "export {name} shows {} disks ({}), where drover exports one",
                    several.len(),
                    several.join(", ")
                )));
            }
        };
        Ok(Some(Attached {
            name,
            links: controllers,
            device,
        }))
    }

    /// A disk as sysfs shows it; none: it is on its way in or out.
    fn device(&self, disk: &str) -> Result<Option<Device>, NodeError> {
        let folder = self.roots.sys.join("block").join(disk);
        // The kernel prefixes the wwid with the kind of the identity.
        let unit = match read(&folder.join("uuid"))? {
            Some(text) => Some(text),
            None => read(&folder.join("wwid"))?
                .and_then(|text| text.strip_prefix("uuid.").map(str::to_owned)),
        };
        sysfs::device(
            &self.roots,
            disk,
            unit.and_then(|text| Uuid::parse_str(&text).ok()),
        )
    }

    /// Whether this kernel can prove itself to a target (DH-HMAC-CHAP).
    ///
    /// That the fabrics device lists the option says little: Debian's Linux 6.1
    /// lists it and has none of the code. So the code is looked for by a function
    /// of the initiator's (drivers/nvme/host/auth.c), module or not.
    pub async fn proves(&self) -> bool {
        let known = match self.options_known().await {
            Ok(options) => options.contains("dhchap_ctrl_secret="),
            Err(error) => {
                tracing::info!(%error, "whether the kernel has DH-HMAC-CHAP is not known");
                false
            }
        };
        known && self.has_code("nvme_auth_negotiate").await
    }

    async fn has_code(&self, function: &str) -> bool {
        let symbols = self.roots.proc.join("kallsyms");
        let arguments = ["-qw".as_ref(), function.as_ref(), symbols.as_os_str()];
        let found = self
            .children
            .tool("grep", &arguments, self.deadlines.connect);
        match found.await {
            Ok(end) => end.code == 0,
            Err(error) => {
                tracing::info!(%error, function, "whether the kernel has this function is not known");
                false
            }
        }
    }

    /// The options of a connect that this kernel knows. To read them waits for
    /// a connect that is under way.
    async fn options_known(&self) -> Result<String, NodeError> {
        let fabrics = self.fabrics().await?;
        let end = self
            .children
            .tool("cat", &[fabrics.as_os_str()], self.deadlines.connect)
            .await?;
        Ok(end.output)
    }

    /// The fabrics device, with its modules loaded where they are not yet.
    async fn fabrics(&self) -> Result<PathBuf, NodeError> {
        let path = self.roots.dev.join("nvme-fabrics");
        if !path.exists() {
            let end = self
                .children
                .tool("modprobe", &["nvme-tcp".as_ref()], self.deadlines.connect)
                .await?;
            if !path.exists() {
                return Err(NodeError::Failed(format!(
                    "{} is not there and modprobe nvme-tcp did not make it (exit {}: {}): this node's kernel needs the nvme-tcp module",
                    path.display(),
                    end.code,
                    end.output
                )));
            }
        }
        Ok(path)
    }
}

#[async_trait]
impl Fabric for Nvme {
    fn attached(&self) -> Result<Vec<Attached>, NodeError> {
        let class = self.roots.sys.join("class/nvme-subsystem");
        let mut found = Vec::new();
        for entry in names(&class)? {
            found.extend(self.subsystem(&class.join(entry))?);
        }
        found.sort_by(|a, b| a.name.as_str().cmp(b.name.as_str()));
        Ok(found)
    }

    async fn connect(&self, target: &Target) -> Result<Duration, NodeError> {
        if target.proves && target.chap.is_none() {
            return Err(NodeError::Failed(format!(
                "the home did not tell the secrets of {}; try again",
                target.name
            )));
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let options = options(target, &self.host, cpus)?;
        let op = Op::Connect {
            fabrics: self.fabrics().await?,
            options,
        };
        match self.children.run(&op, self.deadlines.connect).await {
            Ok((Answer::Connected(said), took)) => {
                let (instance, cntlid) = parse_connected(&said).ok_or_else(|| {
                    NodeError::Failed(format!("the kernel answered a connect with {said:?}"))
                })?;
                tracing::info!(subsystem = target.name, controller = instance, cntlid, address = %target.address, "connected");
                Ok(took)
            }
            Ok((other, _)) => Err(NodeError::Failed(format!(
                "a connect was answered with {other:?}"
            ))),
            // It is connected already: a second call was faster.
            Err(error) if error.errno() == Some(Errno::EALREADY) => Ok(Duration::ZERO),
            Err(error) => match NodeError::from(error) {
                NodeError::Failed(text) => Err(NodeError::Failed(format!(
                    "connect to {} at {}: {text}; the kernel's log says more",
                    target.name, target.address
                ))),
                other => Err(other),
            },
        }
    }

    async fn disconnect(&self, name: &ExportName) -> Result<Duration, NodeError> {
        let mut took = Duration::ZERO;
        for attached in self.attached()? {
            if attached.name != *name {
                continue;
            }
            for (controller, _) in attached.links {
                let op = Op::Delete {
                    controller: self.controller(&controller),
                    subsystem: name.as_str().to_owned(),
                };
                took += self.children.run(&op, self.deadlines.disconnect).await?.1;
            }
        }
        Ok(took)
    }

    async fn rescan(&self, name: &ExportName) -> Result<(), NodeError> {
        for attached in self.attached()? {
            if attached.name != *name {
                continue;
            }
            for (controller, _) in attached.links {
                let op = Op::Rescan {
                    controller: self.controller(&controller),
                    subsystem: name.as_str().to_owned(),
                };
                self.children.run(&op, self.deadlines.connect).await?;
            }
        }
        Ok(())
    }

    fn is_there(&self, number: DevNumber) -> bool {
        self.roots.sys.join(format!("dev/block/{number}")).exists()
    }
}

/// The option string of a connect (drivers/nvme/host/fabrics.c, `opt_tokens`).
///
/// `ctrl_loss_tmo=-1`: a host waits for its home without end; only a fence,
/// whose refusal is final, or an operator ends that.
fn options(target: &Target, host: &HostIdentity, cpus: usize) -> Result<String, NodeError> {
    target
        .name
        .parse::<ExportName>()
        .map_err(|e| NodeError::Failed(e.to_string()))?;
    if !host.nqn.starts_with("nqn.")
        || host.nqn.len() > 223
        || host
            .nqn
            .contains(|c: char| c == ',' || c.is_whitespace() || c.is_control())
    {
        return Err(NodeError::Failed(format!(
            "host NQN {:?} is not valid: it must begin with nqn. and have no comma or space",
            host.nqn
        )));
    }
    let proof = target.chap.as_ref().map(|chap| {
        format!(
            ",dhchap_secret={},dhchap_ctrl_secret={}",
            secret(&chap.initiator),
            secret(&chap.target)
        )
    });
    Ok(format!(
        "transport=tcp,traddr={},trsvcid={},nqn={},hostnqn={},hostid={},nr_io_queues={},keep_alive_tmo={KEEP_ALIVE},reconnect_delay={RECONNECT_DELAY},ctrl_loss_tmo=-1{}",
        target.address.ip(),
        target.address.port(),
        target.name,
        host.nqn,
        host.id,
        cpus.clamp(1, QUEUES),
        proof.unwrap_or_default(),
    ))
}

/// A secret as the kernel takes it: `DHHC-1:00:BASE64:`, where the bytes are
/// the key and their CRC-32, and 00 says that the key is used as it is
/// (NVM Express Base Specification 2.0, 8.13.5.8; drivers/nvme/common/auth.c).
fn secret(of: &Credentials) -> String {
    let mut bytes = of.secret.as_bytes().to_vec();
    let sum = crc32fast::hash(&bytes).to_le_bytes();
    bytes.extend_from_slice(&sum);
    format!("DHHC-1:00:{}:", BASE64.encode(bytes))
}

/// `instance=N,cntlid=M`.
fn parse_connected(said: &str) -> Option<(u32, u32)> {
    let (instance, cntlid) = said.trim().split_once(',')?;
    Some((
        instance.strip_prefix("instance=")?.parse().ok()?,
        cntlid.strip_prefix("cntlid=")?.parse().ok()?,
    ))
}

/// `nvmeX`.
fn is_controller(name: &str) -> bool {
    name.strip_prefix("nvme").is_some_and(is_number)
}

/// `nvmeXnY`, not `nvmeXcYnZ` and not a partition.
fn is_disk(name: &str) -> bool {
    name.strip_prefix("nvme")
        .and_then(|rest| rest.split_once('n'))
        .is_some_and(|(x, y)| is_number(x) && is_number(y))
}

#[cfg(test)]
#[path = "nvme_tests.rs"]
mod tests;

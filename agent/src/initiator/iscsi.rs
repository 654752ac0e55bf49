//! iSCSI, as Linux offers it: open-iscsi logs in, sysfs shows what came of it.
//!
//! The layout (drivers/scsi/scsi_transport_iscsi.c, scsi_sysfs.c): every
//! session is a folder of `class/iscsi_session`, names its target and its
//! initiator, and leads by `device` to the SCSI target and its one disk. A plain
//! disk carries the volume: no I/O of it fails while its session is away, since
//! the session waits for its home without end (`replacement_timeout` -1), and a
//! command is tried again however often that happens (`max_retries` -1).
//!
//! A fence answers every command with RESERVATION CONFLICT, which fails at once
//! and is not tried again. Logging out then takes the disk away first and the
//! session after it; of a session whose target has gone, everything outstanding
//! fails with it.
//!
//! Several agents can share one kernel (as tests and the demo do), so each has
//! an open-iscsi interface of its own, which carries its initiator name, and
//! only sessions with that name are its own.

use std::fs;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use uuid::Uuid;

use super::child::{Children, ToolEnd};
use super::fabric::{Attached, DevNumber, Device, ExportName, Fabric};
use super::open_iscsi::{OpenIscsi, Setting};
use super::sysfs::{self, Roots, is_number, names, read, read_bytes};
use crate::attach::ports::{Chap, HostIdentity, NodeError, Protocol, Target, is_iqn};
use crate::ids::VolumeId;

/// How long iscsid may take to log in, its tries included.
const LOGIN: Duration = Duration::from_secs(40);
/// How long it may take to log out: of a home that hangs it learns so after
/// two times [`PING`], and an answer to a logout is waited for 15 s.
const LOGOUT: Duration = Duration::from_secs(40);
/// How long iscsiadm may take where no target is asked: longer than open-iscsi
/// waits for the lock on its records.
const RECORDS: Duration = Duration::from_secs(40);
/// The tag of a home's one portal group.
const PORTAL_GROUP: u16 = 1;
/// Seconds between two pings, and seconds that an answer may take.
const PING: &str = "5";

// iscsiadm's exit statuses (open-iscsi, include/iscsi_err.h).
const NO_SESSION: i32 = 2;
const SESSION_EXISTS: i32 = 15;
const FATAL_LOGIN: i32 = 19;
const NO_DAEMON: i32 = 20;
const NO_OBJECTS: i32 = 21;
const LOGIN_AUTH: i32 = 24;

/// The kernel's iSCSI initiator, by way of open-iscsi.
#[derive(Debug)]
pub struct Iscsi {
    roots: Roots,
    host: HostIdentity,
    children: Children,
    admin: OpenIscsi,
}

impl Iscsi {
    /// The initiator of `host` on this kernel.
    pub fn new(roots: Roots, host: HostIdentity, children: Children, admin: OpenIscsi) -> Self {
        Self {
            roots,
            host,
            children,
            admin,
        }
    }

    /// The name of this agent's own open-iscsi interface.
    fn interface(&self) -> String {
        format!("drover-{}", self.host.id.simple())
    }

    /// This host's sessions with drover's exports: number, export, state.
    fn sessions(&self) -> Result<Vec<(String, ExportName, String)>, NodeError> {
        let class = self.roots.sys.join("class/iscsi_session");
        let mut found = Vec::new();
        for entry in names(&class)? {
            let Some(number) = entry.strip_prefix("session").filter(|n| is_number(n)) else {
                continue;
            };
            let folder = class.join(&entry);
            let target = read(&folder.join("targetname"))?;
            let Some(Ok(name)) = target.map(|text| text.parse::<ExportName>()) else {
                continue;
            };
            let initiator = read(&folder.join("initiatorname"))?;
            if name.protocol == Protocol::Iscsi && initiator.as_deref() == Some(&*self.host.iqn) {
                let state = read(&folder.join("state"))?.unwrap_or_default();
                found.push((number.to_owned(), name, state));
            }
        }
        Ok(found)
    }

    /// The names of a session's disks.
    fn disks(&self, session: &str) -> Result<Vec<String>, NodeError> {
        let folder = format!("class/iscsi_session/session{session}/device");
        let folder = self.roots.sys.join(folder);
        let mut disks = Vec::new();
        for target in names(&folder)? {
            if !target.starts_with("target") {
                continue;
            }
            for unit in names(&folder.join(&target))? {
                disks.extend(names(&folder.join(&target).join(unit).join("block"))?);
            }
        }
        Ok(disks)
    }

    fn device(&self, disk: &str) -> Result<Option<Device>, NodeError> {
        let folder = self.roots.sys.join("block").join(disk);
        let serial = read_bytes(&folder.join("device/vpd_pg80"))?;
        sysfs::device(&self.roots, disk, serial.and_then(|page| unit(&page)))
    }

    async fn run(&self, args: &[&str], deadline: Duration) -> Result<ToolEnd, NodeError> {
        self.admin.run(&self.children, args, deadline).await
    }

    /// Makes this agent's interface, unless it is there.
    async fn make_interface(&self) -> Result<(), NodeError> {
        let interface = self.interface();
        if self.admin.has_interface(&interface, &self.host.iqn) {
            return Ok(());
        }
        let of = ["--mode", "iface", "--interface", &*interface, "--op"];
        // One that is there already is not made again; the update tells.
        self.run(&[&of[..], &["new"]].concat(), RECORDS).await?;
        let name = ["update", "--name", "iface.initiatorname", "--value"];
        let update = [&of[..], &name, &[&*self.host.iqn]].concat();
        let end = self.run(&update, RECORDS).await?;
        done(&end, &[], &format!("make interface {interface}"))
    }
}

#[async_trait]
impl Fabric for Iscsi {
    fn attached(&self) -> Result<Vec<Attached>, NodeError> {
        let mut found: Vec<(Attached, Vec<String>)> = Vec::new();
        for (session, name, state) in self.sessions()? {
            let link = (format!("session{session}"), state);
            let disks = self.disks(&session)?;
            match found.iter_mut().find(|(attached, _)| attached.name == name) {
                Some((attached, all)) => {
                    attached.links.push(link);
                    all.extend(disks);
                }
                None => {
                    let attached = Attached {
                        name,
                        links: vec![link],
                        device: None,
                    };
                    found.push((attached, disks));
                }
            }
        }
        let mut all = Vec::new();
        for (mut attached, disks) in found {
            attached.device = match disks.as_slice() {
                [] => None,
                [disk] => self.device(disk)?,
                several => {
                    return Err(NodeError::Unusable(format!(
                        "export {} shows {} disks ({}), where drover exports one",
                        attached.name,
                        several.len(),
                        several.join(", ")
                    )));
                }
            };
            all.push(attached);
        }
        all.sort_by(|a, b| a.name.as_str().cmp(b.name.as_str()));
        Ok(all)
    }

    async fn connect(&self, target: &Target) -> Result<Duration, NodeError> {
        let started = Instant::now();
        let name: ExportName = target
            .name
            .parse()
            .map_err(|error| NodeError::Failed(format!("{error}")))?;
        let Some(chap) = &target.chap else {
            return Err(NodeError::Failed(format!(
                "the home of volume {} did not tell the secrets of its export; try again",
                name.volume
            )));
        };
        let values = values(chap)?;
        self.make_interface().await?;
        // Also of this very export: one that iscsiadm was killed over is empty,
        // and iscsiadm neither overwrites nor deletes such a one.
        self.tidy(Some(&name.volume))?;
        // Without its portal group tag a record has no place for an interface.
        let portal = format!("{},{PORTAL_GROUP}", target.address);
        let interface = self.interface();
        let of = [
            "--mode",
            "node",
            "--targetname",
            name.as_str(),
            "--portal",
            &portal,
            "--interface",
            &interface,
        ];
        let end = self
            .run(&[&of[..], &["--op", "new"]].concat(), RECORDS)
            .await?;
        let object = format!("{name} at {portal}");
        done(&end, &[], &format!("make a record of {object}"))?;
        self.admin.set(name.as_str(), &interface, &values)?;
        let end = self.run(&[&of[..], &["--login"]].concat(), LOGIN).await?;
        // It is logged in already: a second call was faster.
        let result = done(&end, &[SESSION_EXISTS], &format!("log in to {object}"));
        if result.is_err()
            && let Err(error) = self.admin.erase(name.as_str(), &interface)
        {
            tracing::warn!(target = name.as_str(), %error, "a record with secrets is left");
        }
        result?;
        tracing::info!(target = name.as_str(), %portal, "logged in");
        Ok(started.elapsed())
    }

    async fn disconnect(&self, name: &ExportName) -> Result<Duration, NodeError> {
        let started = Instant::now();
        for (session, of, state) in self.sessions()? {
            if of != *name {
                continue;
            }
            let args = ["--mode", "session", "--sid", &*session, "--logout"];
            let end = self.run(&args, LOGOUT).await?;
            let what = format!("log out of {name} (session {session}, {state})");
            done(&end, &[NO_SESSION, NO_OBJECTS], &what)?;
        }
        self.admin.erase(name.as_str(), &self.interface())?;
        Ok(started.elapsed())
    }

    fn tidy(&self, volume: Option<&VolumeId>) -> Result<(), NodeError> {
        let sessions = self.sessions()?;
        let interface = self.interface();
        for target in self.admin.targets(&interface)? {
            let Ok(name) = target.parse::<ExportName>() else {
                continue;
            };
            let wanted = volume.is_none_or(|volume| *volume == name.volume);
            if wanted && sessions.iter().all(|(_, live, _)| *live != name) {
                self.admin.erase(&target, &interface)?;
            }
        }
        self.admin.free_dead_lock();
        Ok(())
    }

    /// Without this, a command that met six ends of its home in a row fails with
    /// EIO (drivers/scsi/sd.h, SD_MAX_RETRIES; scsi_error.c, DID_TRANSPORT_DISRUPTED).
    fn try_without_end(&self, _: &ExportName, device: &Device) -> Result<(), NodeError> {
        let disk = self.roots.sys.join("block").join(&device.disk.name);
        let units = disk.join("device/scsi_disk");
        for unit in names(&units)? {
            let path = units.join(unit).join("max_retries");
            fs::write(&path, "-1")
                .map_err(|e| NodeError::Failed(format!("write {}: {e}", path.display())))?;
        }
        Ok(())
    }

    async fn rescan(&self, name: &ExportName) -> Result<(), NodeError> {
        for (session, of, _) in self.sessions()? {
            if of == *name {
                let args = ["--mode", "session", "--sid", &*session, "--rescan"];
                let end = self.run(&args, LOGIN).await?;
                done(&end, &[], &format!("rescan {name}"))?;
            }
        }
        Ok(())
    }

    fn is_there(&self, number: DevNumber) -> bool {
        self.roots.sys.join(format!("dev/block/{number}")).exists()
    }
}

/// What a node record says, beside what iscsid.conf says for all.
fn values(chap: &Chap) -> Result<Vec<Setting<'_>>, NodeError> {
    for credentials in [&chap.initiator, &chap.target] {
        let plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic());
        if !is_iqn(&credentials.name) || !plain(&credentials.secret) {
            return Err(NodeError::Failed(format!(
                "the credentials of {:?} cannot be written into a node record",
                credentials.name
            )));
        }
    }
    let needed = |key, value| Setting {
        key,
        value,
        needed: true,
    };
    let known = |key, value| Setting {
        key,
        value,
        needed: false,
    };
    Ok(vec![
        needed("node.startup", "manual"),
        needed("node.conn[0].startup", "manual"),
        needed("node.session.auth.authmethod", "CHAP"),
        needed("node.session.auth.username", &*chap.initiator.name),
        needed("node.session.auth.password", &*chap.initiator.secret),
        needed("node.session.auth.username_in", &*chap.target.name),
        needed("node.session.auth.password_in", &*chap.target.secret),
        known("node.session.auth.chap_algs", "SHA256,MD5"),
        // A host waits for its home without end; only a fence, whose answer is
        // final, or an operator ends that (open-iscsi's iscsid.conf: less than
        // 0 queues I/O until the session is back or logged out).
        needed("node.session.timeo.replacement_timeout", "-1"),
        known("node.session.reopen_max", "0"),
        // These count for the first login only.
        needed("node.session.initial_login_retry_max", "2"),
        needed("node.conn[0].timeo.login_timeout", "10"),
        needed("node.conn[0].timeo.noop_out_interval", PING),
        needed("node.conn[0].timeo.noop_out_timeout", PING),
        known("node.session.nr_sessions", "1"),
        known("node.session.scan", "auto"),
    ])
}

/// Whether iscsiadm succeeded, or failed in a way that means the same.
fn done(end: &ToolEnd, fine: &[i32], what: &str) -> Result<(), NodeError> {
    if end.code == 0 || fine.contains(&end.code) {
        return Ok(());
    }
    let hint = match end.code {
        FATAL_LOGIN => "; the home refused it",
        LOGIN_AUTH => "; the home refused the credentials",
        NO_DAEMON => "; iscsid does not run on this host",
        _ => "",
    };
    Err(NodeError::Failed(format!(
        "{what}: iscsiadm ended with {}: {}{hint}",
        end.code, end.output
    )))
}

/// The unit serial number (SPC-4, 7.8.15): a UUID is what drover's units have.
fn unit(page: &[u8]) -> Option<Uuid> {
    let length = usize::from(u16::from_be_bytes([*page.get(2)?, *page.get(3)?]));
    let serial = page.get(4..4 + length)?;
    Uuid::parse_str(std::str::from_utf8(serial).ok()?.trim()).ok()
}

#[cfg(test)]
#[path = "iscsi_tests.rs"]
mod tests;

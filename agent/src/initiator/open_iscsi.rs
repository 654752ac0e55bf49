//! open-iscsi on this host: its command, and its files.
//!
//! The kernel's iSCSI initiator has no login of its own: iscsid does it, in the
//! host's mount and network namespaces, and iscsiadm tells it to. A drover in a
//! container enters those of pid 1 for that, and reaches the files of the host
//! through pid 1's root.
//!
//! iscsiadm takes a value only as an argument, which every process of the host
//! can read. So it makes the node record, and what must not be seen is written
//! into the record's file, which is root's alone.
//!
//! An iscsiadm that is killed can leave its records locked ([`records_lock`]).
//! So one runs to its end, whoever has stopped waiting for it, and a lock that
//! a dead one left, as when the whole agent is killed, is removed.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::child::{ChildError, Children, ToolEnd};
use super::records_lock;
use super::sysfs::names;
use crate::attach::ports::NodeError;

/// Where open-iscsi keeps its records: as built by Debian, and by everybody else.
const DATABASES: [&str; 2] = ["etc/iscsi", "var/lib/iscsi"];
/// How long an iscsiadm may run at all: as it waits for nothing but iscsid for
/// so long, it has locked nothing, and may be killed.
const RUN: Duration = Duration::from_secs(300);
/// How often the lock is looked at while one runs.
const LOOK: Duration = Duration::from_secs(1);
/// How nsenter is told to go where iscsid is.
const ENTER: [&str; 5] = ["--target", "1", "--mount", "--net", "--"];

/// open-iscsi, as its clients see it.
#[derive(Debug, Clone)]
pub struct OpenIscsi {
    /// Its command.
    program: String,
    /// Whether its namespaces must be entered.
    apart: bool,
    /// The root of the file system that it sees.
    root: PathBuf,
}

impl OpenIscsi {
    /// The host's, from wherever this process runs.
    pub fn of_this_host() -> Self {
        let differs = |kind: &str| {
            let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{kind}"));
            matches!((of("self"), of("1")), (Ok(own), Ok(host)) if own != host)
        };
        if differs("mnt") || differs("net") {
            Self {
                apart: true,
                ..Self::at("/proc/1/root".into(), "iscsiadm")
            }
        } else {
            Self::at("/".into(), "iscsiadm")
        }
    }

    /// One in this process's namespaces, with this command and its files below `root`.
    pub fn at(root: PathBuf, program: &str) -> Self {
        Self {
            program: program.to_owned(),
            apart: false,
            root,
        }
    }

    /// Runs iscsiadm and waits for its end, whatever its exit status; past the
    /// deadline it goes on by itself. No argument may be a secret.
    pub(super) async fn run(
        &self,
        children: &Children,
        args: &[&str],
        deadline: Duration,
    ) -> Result<ToolEnd, NodeError> {
        let mut all: Vec<OsString> = Vec::new();
        let program = if self.apart {
            all.extend(ENTER.map(OsString::from));
            all.push(self.program.clone().into());
            "nsenter"
        } else {
            &*self.program
        };
        all.extend(args.iter().map(OsString::from));
        let task = {
            let (children, program) = (children.clone(), program.to_owned());
            tokio::spawn(async move {
                let all: Vec<&OsStr> = all.iter().map(OsString::as_os_str).collect();
                children.tool(&program, &all, RUN).await
            })
        };
        let ended = tokio::select! {
            ended = tokio::time::timeout(deadline, task) => ended,
            never = self.keep_unlocked() => match never {},
        };
        let Ok(ended) = ended else {
            let what = format!("{program} {}", args.join(" "));
            return Err(NodeError::Deadline { what, deadline });
        };
        match ended.map_err(|e| NodeError::Failed(format!("run {program}: {e}")))? {
            Err(ChildError::Spawn { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Err(NodeError::Failed(format!(
                    "{program} is not on this host: a volume over iSCSI needs the package open-iscsi (or iscsi-initiator-utils) and its daemon iscsid"
                )))
            }
            ended => Ok(ended?),
        }
    }

    async fn keep_unlocked(&self) -> Infallible {
        loop {
            tokio::time::sleep(LOOK).await;
            self.free_dead_lock();
        }
    }

    /// Removes the lock on the records if its holder is dead.
    pub(super) fn free_dead_lock(&self) {
        match records_lock::free_if_dead(&self.root) {
            Ok(None) => {}
            Ok(Some(age)) => tracing::warn!(
                ?age,
                "removed the lock on open-iscsi's records: who took it has ended"
            ),
            Err(error) => {
                tracing::warn!(%error, "cannot look after the lock on open-iscsi's records");
            }
        }
    }

    fn databases(&self) -> impl Iterator<Item = PathBuf> {
        DATABASES
            .map(|database| self.root.join(database))
            .into_iter()
    }

    /// The names of all targets that have a record made with this interface.
    pub(super) fn targets(&self, interface: &str) -> Result<Vec<String>, NodeError> {
        let mut found = Vec::new();
        for database in self.databases() {
            for target in names(&database.join("nodes"))? {
                if record(&database, &target, interface)?.is_some() {
                    found.push(target);
                }
            }
        }
        Ok(found)
    }

    /// Whether an interface record has this initiator name.
    pub(super) fn has_interface(&self, interface: &str, initiator: &str) -> bool {
        let line = format!("iface.initiatorname = {initiator}");
        self.databases().any(|database| {
            let text = fs::read_to_string(database.join("ifaces").join(interface));
            text.is_ok_and(|text| text.lines().any(|l| l == line))
        })
    }

    /// Removes the node record of a target, and what open-iscsi keeps with it
    /// (usr/idbm.c, idbm_delete_node): iscsiadm finds one by the name in its
    /// text, and so none that is empty, as one that it was killed over.
    pub(super) fn erase(&self, target: &str, interface: &str) -> Result<(), NodeError> {
        for database in self.databases() {
            let folder = database.join("nodes").join(target);
            for portal in names(&folder)? {
                gone(
                    fs::remove_file(folder.join(&portal).join(interface)),
                    &folder,
                )?;
                // Folders stay where others' records are in them, and an empty
                // one is nothing to open-iscsi.
                let _ = fs::remove_dir(folder.join(&portal));
            }
            let _ = fs::remove_dir(&folder);
            gone(fs::remove_file(unfinished(&database, target)), &database)?;
            let links = database.join("static");
            let (first, last) = (format!("{target},"), format!(",{interface}"));
            for link in names(&links)? {
                if link.starts_with(&first) && link.ends_with(&last) {
                    gone(fs::remove_file(links.join(&link)), &links)?;
                }
            }
        }
        Ok(())
    }

    /// Sets values in the node record of a target. A key that is not in it is
    /// added if it is `needed`, and left out otherwise: this open-iscsi does
    /// not know it.
    pub(super) fn set(
        &self,
        target: &str,
        interface: &str,
        values: &[Setting<'_>],
    ) -> Result<(), NodeError> {
        for database in self.databases() {
            let Some(path) = record(&database, target, interface)? else {
                continue;
            };
            let failed = |e: io::Error| {
                NodeError::Failed(format!("write node record {}: {e}", path.display()))
            };
            let text = fs::read_to_string(&path).map_err(failed)?;
            let fresh = unfinished(&database, target);
            let _ = fs::remove_file(&fresh);
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&fresh)
                .map_err(failed)?;
            file.write_all(with(&text, values).as_bytes())
                .and_then(|()| file.sync_all())
                .and_then(|()| fs::rename(&fresh, &path))
                .map_err(failed)?;
            return Ok(());
        }
        Err(NodeError::Failed(format!(
            "iscsiadm made no node record of {target} below {}",
            self.databases()
                .map(|d| d.display().to_string())
                .collect::<Vec<_>>()
                .join(" or ")
        )))
    }
}

/// A value of a node record.
pub(super) struct Setting<'a> {
    pub key: &'static str,
    pub value: &'a str,
    /// Whether it is written even where the record does not have the key.
    pub needed: bool,
}

/// Where a record is written: beside the records, so that nobody takes it for one.
fn unfinished(database: &Path, target: &str) -> PathBuf {
    database.join(format!(".{target}.new"))
}

/// A file is gone, whether or not it was there.
fn gone(removed: io::Result<()>, folder: &Path) -> Result<(), NodeError> {
    match removed {
        Err(e) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err(NodeError::Failed(format!(
                "remove a node record below {}: {e}",
                folder.display()
            )))
        }
        _ => Ok(()),
    }
}

/// The file of a node record: `nodes/TARGET/PORTAL/INTERFACE`.
fn record(database: &Path, target: &str, interface: &str) -> Result<Option<PathBuf>, NodeError> {
    let folder = database.join("nodes").join(target);
    for portal in names(&folder)? {
        let file = folder.join(portal).join(interface);
        if file.is_file() {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// A record's text with these values: lines `key = value` between comments.
fn with(text: &str, values: &[Setting<'_>]) -> String {
    let key_of = |line: &str| line.split_once('=').map(|(key, _)| key.trim().to_owned());
    let known: Vec<String> = text.lines().filter_map(key_of).collect();
    let mut out = String::new();
    let (body, end): (Vec<&str>, Vec<&str>) = text.lines().partition(|l| *l != "# END RECORD");
    for line in body {
        let key = key_of(line);
        if values.iter().all(|v| key.as_deref() != Some(v.key)) {
            out.push_str(line);
            out.push('\n');
        }
    }
    for Setting { key, value, needed } in values {
        if *needed || known.iter().any(|k| k == key) {
            out.push_str(&format!("{key} = {value}\n"));
        }
    }
    for line in end {
        out.push_str(line);
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const RECORD: &str = "# BEGIN RECORD 2.1.8\nnode.name = iqn.t\nnode.startup = automatic\n\
                          node.session.auth.authmethod = None\n# END RECORD\n";

    fn set(key: &'static str, value: &'static str, needed: bool) -> Setting<'static> {
        Setting { key, value, needed }
    }

    #[test]
    fn values_are_replaced_added_or_left_out() {
        let text = with(
            RECORD,
            &[
                set("node.startup", "manual", false),
                set("node.session.auth.password", "s", true),
                set("node.session.auth.chap_algs", "SHA256", false),
            ],
        );
        assert_eq!(
            text,
            "# BEGIN RECORD 2.1.8\nnode.name = iqn.t\nnode.session.auth.authmethod = None\n\
             node.startup = manual\nnode.session.auth.password = s\n# END RECORD\n"
        );
    }

    #[test]
    fn a_secret_goes_into_a_file_that_only_its_owner_reads() {
        let root = tempfile::tempdir().unwrap();
        let admin = OpenIscsi::at(root.path().to_owned(), "iscsiadm");
        let password = [set("node.session.auth.password", "s3cret", true)];
        let none = admin.set("iqn.t", "drover", &password).unwrap_err();
        assert!(none.to_string().contains("iqn.t"), "{none}");

        let folder = root
            .path()
            .join("var/lib/iscsi/nodes/iqn.t/10.0.0.1,3260,1");
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("drover");
        fs::write(&file, RECORD).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(folder.join("default"), RECORD).unwrap();
        admin.set("iqn.t", "drover", &password).unwrap();
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("password = s3cret\n"), "{text}");
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_to_string(folder.join("default")).unwrap(), RECORD);
        assert_eq!(admin.targets("drover").unwrap(), ["iqn.t"]);
        assert_eq!(admin.targets("other").unwrap(), [""; 0]);
    }
}

//! The kernel and its modules, and the tools that drover calls.

use std::fs;
use std::path::{Path, PathBuf};

use super::Check;

/// The oldest Linux on which drover is tested.
const OLDEST: (u32, u32) = (6, 1);
/// Where a host keeps its programs.
const PROGRAMS: [&str; 4] = ["usr/sbin", "usr/bin", "sbin", "bin"];

/// A host, as its files show it.
pub struct Host {
    root: PathBuf,
}

impl Host {
    /// This one.
    pub fn here() -> Self {
        Self::at("/")
    }

    /// The one whose root is there.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// A path of the host's, below its root.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// What is in a file; nothing where it cannot be read.
    pub fn read(&self, path: &str) -> Option<String> {
        let bytes = fs::read(self.path(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Files in a folder whose names end so, in their order; none where there
    /// is no folder.
    pub fn files(&self, folder: &str, ending: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<_> = names
            .filter(|name| name.ends_with(ending))
            .map(|name| format!("{folder}/{name}"))
            .collect();
        names.sort();
        names
    }

    /// Whether a program is installed.
    pub fn has(&self, program: &str) -> bool {
        let mut folders = PROGRAMS.iter();
        folders.any(|folder| self.path(folder).join(program).exists())
    }

    /// All that is looked at here.
    pub fn checks(&self, pool: Option<&Path>) -> Vec<Check> {
        let mut checks = vec![
            self.kernel(),
            self.types(),
            self.bpffs(),
            self.security(),
            self.ring(),
            self.module("nvme_tcp", "nvme-tcp", "volumes over NVMe/TCP"),
            self.module("iscsi_tcp", "iscsi-tcp", "volumes over iSCSI"),
            self.initiator(),
        ];
        checks.extend(pool.map(|pool| self.pool(pool)));
        checks
    }

    fn release(&self) -> String {
        let text = self.read("proc/sys/kernel/osrelease").unwrap_or_default();
        text.trim().to_owned()
    }

    fn kernel(&self) -> Check {
        let release = self.release();
        let mut numbers = release.split(['.', '-']).map(|part| part.parse().ok());
        let version = numbers.next().flatten().zip(numbers.next().flatten());
        match version {
            Some(version) if version >= OLDEST => Check::ok("kernel", release),
            Some(_) => Check::warning(
                "kernel",
                release,
                "drover is tested on Linux 6.1 and newer: use one",
            ),
            None => Check::warning(
                "kernel",
                format!("{release:?} is no version"),
                "look at `uname -r`",
            ),
        }
    }

    fn types(&self) -> Check {
        if self.path("sys/kernel/btf/vmlinux").exists() {
            return Check::ok("btf", "/sys/kernel/btf/vmlinux");
        }
        Check::warning(
            "btf",
            "this kernel does not tell its types",
            "every verdict is `unknown`, and the node has no gate: use a kernel with CONFIG_DEBUG_INFO_BTF",
        )
    }

    fn bpffs(&self) -> Check {
        let mounts = self.read("proc/self/mountinfo").unwrap_or_default();
        let mounted = mounts.lines().any(|line| {
            let at = line.split(' ').nth(4) == Some("/sys/fs/bpf");
            let kind = line.split_once(" - ").map_or("", |(_, rest)| rest);
            at && kind.starts_with("bpf ")
        });
        if mounted {
            return Check::ok("bpffs", "/sys/fs/bpf");
        }
        Check::warning(
            "bpffs",
            "/sys/fs/bpf is not mounted",
            "a gate would not outlive the agent: mount -t bpf bpf /sys/fs/bpf (systemd does)",
        )
    }

    fn security(&self) -> Check {
        const LIST: &str = "sys/kernel/security/lsm";
        let Some(list) = self.read(LIST) else {
            return Check::warning(
                "lsm",
                format!("/{LIST} cannot be read"),
                "mount securityfs, or ask as root",
            );
        };
        let list = list.trim();
        if list.split(',').any(|module| module == "bpf") {
            return Check::ok("lsm", list);
        }
        Check::warning(
            "lsm",
            format!("{list}: bpf is not among them"),
            format!(
                "the node's gate refuses no call: add `lsm={list},bpf` to the kernel's command line"
            ),
        )
    }

    fn ring(&self) -> Check {
        let setting = self.read("proc/sys/kernel/io_uring_disabled");
        match setting.as_deref().map(str::trim) {
            // Linux before 6.6 has no such setting.
            None | Some("0") => Check::ok("io_uring", "allowed"),
            Some(value) => Check::warning(
                "io_uring",
                format!("kernel.io_uring_disabled = {value}"),
                "a home serves volumes by threads, which is slower: sysctl kernel.io_uring_disabled=0",
            ),
        }
    }

    /// A module that is loaded, built in, or there to be loaded.
    fn module(&self, name: &'static str, file: &str, what: &str) -> Check {
        if self.path("sys/module").join(name).exists() {
            return Check::ok(name, "loaded");
        }
        let release = self.release();
        for list in ["modules.builtin", "modules.dep"] {
            let text = self.read(&format!("lib/modules/{release}/{list}"));
            let listed = |line: &str| {
                let path = line.split(':').next().unwrap_or_default();
                let module = path.rsplit('/').next().unwrap_or_default();
                let module = module.split(".ko").next().unwrap_or_default();
                module == file || module == name
            };
            if text.is_some_and(|text| text.lines().any(listed)) {
                return Check::ok(name, format!("in {list}"));
            }
        }
        Check::warning(
            name,
            "not loaded, and not found for this kernel",
            format!("this node attaches no {what}: install it, then `modprobe {name}`"),
        )
    }

    fn initiator(&self) -> Check {
        let missing: Vec<_> = ["iscsiadm", "iscsid"]
            .into_iter()
            .filter(|program| !self.has(program))
            .collect();
        if missing.is_empty() {
            return Check::ok("open-iscsi", "iscsiadm and iscsid");
        }
        Check::warning(
            "open-iscsi",
            format!("no {}", missing.join(", no ")),
            "this node attaches no volumes over iSCSI: install open-iscsi",
        )
    }

    /// The file system under the pool, from the list of mounts: the longest
    /// mount point that the path begins with.
    fn pool(&self, pool: &Path) -> Check {
        let mounts = self.read("proc/self/mountinfo").unwrap_or_default();
        let mut best: Option<(&str, &str)> = None;
        for line in mounts.lines() {
            let Some(at) = line.split(' ').nth(4) else {
                continue;
            };
            let Some((_, rest)) = line.split_once(" - ") else {
                continue;
            };
            let kind = rest.split(' ').next().unwrap_or_default();
            if pool.starts_with(at) && best.is_none_or(|(best, _)| at.len() >= best.len()) {
                best = Some((at, kind));
            }
        }
        match best {
            Some((at, "xfs")) => Check::ok("pool", format!("{} on xfs at {at}", pool.display())),
            Some((at, kind)) => Check::warning(
                "pool",
                format!("{} on {kind} at {at}", pool.display()),
                "snapshots need XFS with reflink: mkfs.xfs -m reflink=1",
            ),
            None => Check::failed(
                "pool",
                format!("{} is on no file system", pool.display()),
                "name a folder that is there",
            ),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::State;
    use super::*;

    /// A host with these files.
    pub fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host::at(folder.path());
        (folder, host)
    }

    const WELL: &[(&str, &str)] = &[
        ("proc/sys/kernel/osrelease", "6.12.1-amd64\n"),
        ("sys/kernel/btf/vmlinux", ""),
        (
            "proc/self/mountinfo",
            "24 1 254:0 / / rw - ext4 /dev/vda rw\n\
             30 24 0:30 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700\n\
             31 24 8:1 / /srv rw - xfs /dev/sda1 rw\n",
        ),
        ("sys/kernel/security/lsm", "lockdown,apparmor,bpf"),
        ("proc/sys/kernel/io_uring_disabled", "0\n"),
        ("sys/module/nvme_tcp/refcnt", "0"),
        (
            "lib/modules/6.12.1-amd64/modules.dep",
            "kernel/drivers/scsi/iscsi_tcp.ko.xz: kernel/x.ko\n",
        ),
        ("usr/sbin/iscsid", ""),
        ("usr/bin/iscsiadm", ""),
    ];

    #[test]
    fn a_host_that_has_all_is_well() {
        let (_folder, host) = host(WELL);
        for check in host.checks(Some(Path::new("/srv/drover"))) {
            assert_eq!(check.state, State::Ok, "{check:?}");
        }
    }

    #[test]
    fn what_is_missing_is_named_with_what_to_do() {
        for (path, changed, name) in [
            ("proc/sys/kernel/osrelease", Some("5.10.0\n"), "kernel"),
            ("proc/sys/kernel/osrelease", Some("unknown"), "kernel"),
            ("sys/kernel/btf/vmlinux", None, "btf"),
            ("proc/self/mountinfo", Some("\u{fffd} - bpf"), "bpffs"),
            ("sys/kernel/security/lsm", Some("lockdown,bpfx"), "lsm"),
            ("sys/kernel/security/lsm", None, "lsm"),
            ("proc/sys/kernel/io_uring_disabled", Some("2\n"), "io_uring"),
            ("sys/module/nvme_tcp/refcnt", None, "nvme_tcp"),
            ("usr/sbin/iscsid", None, "open-iscsi"),
        ] {
            let files: Vec<_> = WELL
                .iter()
                .filter_map(|(known, text)| match *known == path {
                    true => changed.map(|text| (*known, text)),
                    false => Some((*known, *text)),
                })
                .collect();
            let (folder, host) = host(&files);
            if changed.is_none() {
                // The folder of a module is what is looked for.
                let _ = fs::remove_dir_all(folder.path().join("sys/module"));
            }
            let checks = host.checks(None);
            let check = checks.iter().find(|check| check.name == name).unwrap();
            assert_eq!(check.state, State::Warning, "{path}: {check:?}");
            assert!(!check.advice.is_empty() && !check.found.is_empty());
        }
    }

    #[test]
    fn a_pool_is_where_the_longest_mount_point_is() {
        let (_folder, host) = host(WELL);
        let state = |pool: &str| host.pool(Path::new(pool)).state;
        assert_eq!(state("/srv"), State::Ok);
        assert_eq!(state("/srvx"), State::Warning);
        assert_eq!(
            Host::at("/nowhere").pool(Path::new("/srv")).state,
            State::Failed
        );
    }
}

//! Which cgroup hierarchy this host has, and the paths of its groups.
//!
//! A cgroup is known by its 64-bit id, which is the inode number of its
//! folder. On a host with version 1 every controller has a hierarchy of its
//! own, and ids are those of one of them: the first of [`CONTROLLERS`] that is
//! mounted, where container runtimes make a group per container. The unified
//! hierarchy that systemd mounts beside them has all in its root, so it is
//! taken only where no such controller is mounted.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::attach::ports::Pod;

/// Version 1 controllers in order of preference.
pub const CONTROLLERS: [&str; 4] = ["memory", "cpu", "pids", "blkio"];

/// The kind of hierarchy that ids belong to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// The unified hierarchy.
    V2,
    /// The hierarchy of one controller.
    V1 {
        /// Which.
        controller: String,
    },
    /// No hierarchy is mounted where the agent sees it: ids are the unified
    /// hierarchy's, and have no paths.
    Unmounted,
}

/// Which kind to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// Version 1 where one of [`CONTROLLERS`] is mounted, else version 2.
    #[default]
    Found,
    /// The unified hierarchy, whatever else is mounted.
    Unified,
}

/// A hierarchy and where it is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Its kind.
    pub kind: Kind,
    /// Its mount point, if it is mounted.
    pub mount: Option<PathBuf>,
}

impl Hierarchy {
    /// The kind in a word or two, for logs and metrics: `v2`, `v1 memory`, `none`.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::V2 => "v2".to_owned(),
            Kind::V1 { controller } => format!("v1 {controller}"),
            Kind::Unmounted => "none".to_owned(),
        }
    }

    /// Whether the block layer charges I/O to groups of this hierarchy: then a
    /// bio tells its group, whoever submits it.
    pub fn charges_io(&self) -> bool {
        match (&self.kind, &self.mount) {
            (Kind::V1 { controller }, _) => controller == "blkio",
            (Kind::V2, Some(mount)) => {
                let text = fs::read_to_string(mount.join("cgroup.controllers"));
                text.is_ok_and(|text| text.split_whitespace().any(|name| name == "io"))
            }
            _ => false,
        }
    }

    /// Chooses from the text of `/proc/self/mountinfo`.
    pub fn choose(mountinfo: &str, choice: Choice) -> Self {
        let mounts: Vec<_> = super::mounts::parse(mountinfo).collect();
        if choice == Choice::Found {
            for controller in CONTROLLERS {
                let has = |options: &str| options.split(',').any(|option| option == controller);
                if let Some(mount) = mounts
                    .iter()
                    .find(|m| m.fs == "cgroup" && has(&m.super_options))
                {
                    return Self {
                        kind: Kind::V1 {
                            controller: controller.to_owned(),
                        },
                        mount: Some(mount.point.clone()),
                    };
                }
            }
        }
        match mounts.iter().find(|m| m.fs == "cgroup2") {
            Some(mount) => Self {
                kind: Kind::V2,
                mount: Some(mount.point.clone()),
            },
            None => Self {
                kind: Kind::Unmounted,
                mount: None,
            },
        }
    }

    /// The id of the group at `path`: below the mount point, or as
    /// `/proc/PID/cgroup` writes it.
    pub fn id_of(&self, path: &Path) -> std::io::Result<u64> {
        let Some(mount) = &self.mount else {
            return Err(std::io::Error::other("no cgroup hierarchy is mounted"));
        };
        let folder = if path.starts_with(mount) {
            path.to_owned()
        } else {
            mount.join(path.strip_prefix("/").unwrap_or(path))
        };
        let found = fs::metadata(&folder)?;
        if found.is_dir() && found.dev() == fs::metadata(mount)?.dev() {
            Ok(found.ino())
        } else {
            Err(std::io::Error::other(format!(
                "{} is no group of the hierarchy at {} ({})",
                folder.display(),
                mount.display(),
                self.describe()
            )))
        }
    }

    /// The processes in the group at `path` (from the root) and below it.
    pub fn processes(&self, path: &str) -> Vec<u32> {
        let mut found = Vec::new();
        let Some(mount) = &self.mount else {
            return found;
        };
        let mut open = vec![mount.join(path.trim_start_matches('/'))];
        while let Some(folder) = open.pop() {
            // A group may end while it is being looked at.
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    open.push(entry.path());
                }
            }
        }
        found
    }

    /// The paths of all groups, by id, each from the hierarchy's root (`/`).
    pub fn paths(&self) -> HashMap<u64, String> {
        let mut found = HashMap::new();
        let Some(mount) = &self.mount else {
            return found;
        };
        let mut open = vec![mount.clone()];
        while let Some(folder) = open.pop() {
            // A group may end while it is being looked at.
            let Ok(meta) = fs::symlink_metadata(&folder) else {
                continue;
            };
            let path = folder.strip_prefix(mount).unwrap_or(&folder);
            found.insert(meta.ino(), format!("/{}", path.display()));
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    open.push(entry.path());
                }
            }
        }
        found
    }
}

/// Reads a path as kubelet makes it, with systemd as its cgroup driver
/// (`kubepods-burstable-pod1b2c_..._.slice/cri-containerd-9f8e....scope`, with
/// more before it where kubelet has a root of its own) or without
/// (`/kubepods/burstable/pod1b2c-.../9f8e...`). None: no pod's.
pub fn pod(path: &str) -> Option<Pod> {
    if !path.contains("kubepods") {
        return None;
    }
    let mut parts = path.split('/');
    let uid = parts.find_map(|part| {
        let part = part.trim_end_matches(".slice");
        let uid = match part.rsplit_once("-pod") {
            Some((before, uid)) if before.contains("kubepods") => uid,
            _ => part.strip_prefix("pod")?,
        };
        let uid = uid.replace('_', "-");
        let hex = |c: char| c.is_ascii_hexdigit() || c == '-';
        (!uid.is_empty() && uid.chars().all(hex)).then_some(uid)
    })?;
    let container = parts.next().map(|part| {
        let scope = part.trim_end_matches(".scope");
        // The runtime's name stands before the id, which is of hex digits.
        let id = scope.rsplit_once('-').map_or(scope, |(_, id)| id);
        id.to_owned()
    });
    Some(Pod {
        uid,
        container: container.filter(|id| !id.is_empty()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
30 25 0:26 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory
32 25 0:28 / /sys/fs/cgroup/unified rw shared:11 - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn a_mounted_controller_is_preferred_to_an_empty_unified_hierarchy() {
        let found = Hierarchy::choose(V1, Choice::Found);
        assert_eq!(found.describe(), "v1 memory");
        assert_eq!(found.mount, Some("/sys/fs/cgroup/memory".into()));
        let found = Hierarchy::choose(V1, Choice::Unified);
        assert_eq!(found.describe(), "v2");
    }

    #[test]
    fn without_memory_the_next_controller_counts() {
        let text: String = V1.lines().take(1).collect();
        assert_eq!(Hierarchy::choose(&text, Choice::Found).describe(), "v1 cpu");
    }

    #[test]
    fn nothing_mounted_is_said() {
        let found = Hierarchy::choose("", Choice::Found);
        assert_eq!(found.describe(), "none");
        assert!(found.id_of(Path::new("/x")).is_err());
        assert!(found.paths().is_empty());
    }

    #[test]
    fn ids_of_this_host_lead_back_to_their_paths() {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let found = Hierarchy::choose(&text, Choice::Found);
        if found.kind != Kind::Unmounted {
            let root = found.id_of(Path::new("/")).unwrap();
            assert_eq!(found.paths()[&root], "/");
            assert!(found.id_of(Path::new("/no/such/group")).is_err());
        }
    }

    #[test]
    fn a_pod_is_known_by_the_path_that_kubelet_made() {
        let told = |uid: &str, container: Option<&str>| {
            Some(Pod {
                uid: uid.into(),
                container: container.map(Into::into),
            })
        };
        let uid = "1b2c3d4e-0000-1111-2222-333344445555";
        let slice = "/kubepods.slice/kubepods-burstable.slice/\
            kubepods-burstable-pod1b2c3d4e_0000_1111_2222_333344445555.slice";
        assert_eq!(pod(slice), told(uid, None));
        assert_eq!(
            pod(&format!("{slice}/cri-containerd-9f8e7d.scope")),
            told(uid, Some("9f8e7d"))
        );
        assert_eq!(
            pod(&format!("/kubepods/besteffort/pod{uid}/9f8e7d")),
            told(uid, Some("9f8e7d"))
        );
        // A guaranteed pod, and a node's own tree around kubelet's.
        assert_eq!(pod(&format!("/kubelet/kubepods/pod{uid}")), told(uid, None));
        // kubelet with a cgroup root of its own, as kind runs it.
        let nested = "/kubelet.slice/kubelet-kubepods.slice/\
            kubelet-kubepods-besteffort-pod1b2c3d4e_0000_1111_2222_333344445555.slice/\
            crio-9f8e7d.scope";
        assert_eq!(pod(nested), told(uid, Some("9f8e7d")));
        for other in [
            "/",
            "/kubepods/podman",
            "/system.slice/pod1b2c",
            "/system.slice/podman.service",
            "/user.slice",
            "/kubepods.slice",
        ] {
            assert_eq!(pod(other), None, "{other}");
        }
    }
}

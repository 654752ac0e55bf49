//! The folder in bpffs in which the gates outlive the agent.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use drover_ebpf::gate::Hook;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::GateError;
use crate::ids::NodeId;

const BPFFS: &str = "/sys/fs/bpf";

fn failed(call: &'static str, path: &Path, error: impl Into<io::Error>) -> GateError {
    GateError::Pin {
        call,
        path: path.to_owned(),
        error: error.into(),
    }
}

/// The node's folder, made where it is not there; bpffs is mounted where it is not.
///
/// A folder for each node name: on a machine that plays several nodes, each
/// sweeps and replaces its own only.
pub fn folder(node: &NodeId) -> Result<PathBuf, GateError> {
    let root = Path::new(BPFFS);
    let kind = statfs(root)
        .map_err(|e| failed("statfs", root, e))?
        .filesystem_type();
    if kind != BPF_FS_MAGIC {
        let none: Option<&str> = None;
        mount(Some("bpf"), root, Some("bpf"), MsFlags::empty(), none)
            .map_err(|e| failed("mount bpffs on", root, e))?;
        tracing::warn!(
            "gate: there was no bpffs at {BPFFS}, so it was mounted; in a container it goes with that, and closed gates open: mount it on the host, as systemd does, and hand the host's to the agent"
        );
    }
    // bpffs keeps names with dots for itself; a node name has no comma.
    let folder = root.join("drover").join(node.as_str().replace('.', ","));
    fs::create_dir_all(&folder).map_err(|e| failed("make folder", &folder, e))?;
    Ok(folder)
}

/// Where a hook's link is pinned.
pub fn place(folder: &Path, hook: Hook) -> PathBuf {
    folder.join(hook.name())
}

fn doorstep(folder: &Path, hook: Hook) -> PathBuf {
    folder.join(format!("new-{}", hook.name()))
}

/// Where it is pinned before it takes that place; what an agent that was ended
/// in between left there is gone.
pub fn clear_doorstep(folder: &Path, hook: Hook) -> Result<PathBuf, GateError> {
    let path = doorstep(folder, hook);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("unlink", &path, e)),
        _ => Ok(path),
    }
}

/// Puts the link on the doorstep in its place: the one that was there is let
/// go by the kernel after that.
pub fn take_place(folder: &Path, hook: Hook) -> Result<(), GateError> {
    let place = place(folder, hook);
    fs::rename(doorstep(folder, hook), &place).map_err(|e| failed("rename to", &place, e))
}

/// Takes away links of hooks that this version does not have; once its own are
/// in their places. Maps, whose names are capitals, stay.
pub fn tidy(folder: &Path) -> Result<(), GateError> {
    let entries = fs::read_dir(folder).map_err(|e| failed("list", folder, e))?;
    for entry in entries {
        let name = entry.map_err(|e| failed("list", folder, e))?.file_name();
        let name = name.to_string_lossy();
        let is_map = name.chars().all(|c| !c.is_ascii_lowercase());
        if !is_map && !Hook::ALL.iter().any(|hook| hook.name() == name) {
            let path = folder.join(&*name);
            fs::remove_file(&path).map_err(|e| failed("unlink", &path, e))?;
        }
    }
    Ok(())
}

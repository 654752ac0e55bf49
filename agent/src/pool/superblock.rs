//! Whose a pool is: its superblock, raised at every open.

use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::PoolError;
use super::files::Root;
use super::slots::SlotFile;
use crate::ids::NodeId;

/// The format that this program reads and writes.
pub const FORMAT: u32 = 1;
const NAME: &str = "superblock";
const NEW: &str = "superblock.new";
/// What may stand in a folder that is to become a pool: an empty file system's
/// own folder, and what a crash during the first open leaves.
const BEGINNINGS: [&str; 5] = ["lost+found", "lock", NEW, "volumes", "snapshots"];

/// What a pool says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superblock {
    /// The format's version.
    pub format: u32,
    /// The pool's own identity.
    pub pool: Uuid,
    /// The node whose pool it is.
    pub node: NodeId,
    /// How many times it was opened. Raised durably before anything is served.
    pub incarnation: u64,
    /// Whether its file system was found to share blocks when it was last asked.
    pub reflink: bool,
}

/// Reads the superblock, or makes one in an empty folder, and checks whose it is.
pub fn open(root: &Root, node: &NodeId) -> Result<(SlotFile<Superblock>, Superblock), PoolError> {
    if !exists(root, NAME)? {
        make(root, node)?;
    }
    let (file, found) = SlotFile::<Superblock>::open(root, Path::new(NAME))?;
    if found.format != FORMAT {
        return Err(PoolError::Version {
            dir: root.dir().to_owned(),
            found: found.format,
            known: FORMAT,
        });
    }
    if found.node != *node {
        return Err(PoolError::ForeignNode {
            dir: root.dir().to_owned(),
            owner: found.node,
            node: node.clone(),
        });
    }
    Ok((file, found))
}

fn exists(root: &Root, name: &str) -> Result<bool, PoolError> {
    let path = root.path(Path::new(name));
    match std::fs::symlink_metadata(&path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(PoolError::call("stat", &path)(error)),
    }
}

fn make(root: &Root, node: &NodeId) -> Result<(), PoolError> {
    refuse_other_folders(root)?;
    if exists(root, NEW)? {
        let left = root.path(Path::new(NEW));
        std::fs::remove_file(&left).map_err(PoolError::call("unlink", &left))?;
    }
    let first = Superblock {
        format: FORMAT,
        pool: Uuid::new_v4(),
        node: node.clone(),
        incarnation: 0,
        reflink: false,
    };
    SlotFile::create(root, Path::new(NEW), &first)?;
    root.rename(Path::new(NEW), Path::new(NAME))
}

/// Refuses what is no pool and cannot become one: a folder with volumes and no
/// superblock has lost it, one with other files was named by mistake.
pub fn refuse_other_folders(root: &Root) -> Result<(), PoolError> {
    if exists(root, NAME)? {
        return Ok(());
    }
    let not_ours = |found: String| PoolError::NotAPool {
        dir: root.dir().to_owned(),
        found,
    };
    for folder in ["", "volumes", "snapshots"] {
        let path = root.path(Path::new(folder));
        let listing = match std::fs::read_dir(&path) {
            Ok(listing) => listing,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(PoolError::call("list", &path)(error)),
        };
        for entry in listing {
            let name = entry
                .map_err(PoolError::call("list", &path))?
                .file_name()
                .to_string_lossy()
                .into_owned();
            if !folder.is_empty() {
                return Err(not_ours(format!("{folder}/{name}")));
            }
            if !BEGINNINGS.contains(&name.as_str()) {
                return Err(not_ours(name));
            }
        }
    }
    Ok(())
}

//! Where things are: the checkout, the cache folder, the build products.
//!
//! What takes long to make and does not depend on the checkout (tools, the
//! venv, CI's build products) is kept in one cache folder outside of it:
//! `$DROVER_CACHE`, or `~/.cache/drover`.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The checkout's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the checkout")
}

/// The cache folder.
pub fn cache() -> Result<PathBuf> {
    if let Some(folder) = env::var_os("DROVER_CACHE") {
        return std::path::absolute(folder).context("make DROVER_CACHE absolute");
    }
    let home = env::var_os("HOME").context("HOME is not set; set it or DROVER_CACHE")?;
    Ok(PathBuf::from(home).join(".cache/drover"))
}

/// The cache's folder of tools (bpf-linker, csi-sanity).
pub fn tools() -> Result<PathBuf> {
    Ok(cache()?.join("bin"))
}

/// The cache's Python environment (virtme-ng, and Go where the machine has none).
pub fn venv() -> Result<PathBuf> {
    Ok(cache()?.join("venv"))
}

/// The cache's folder of the test kernel: its source, and what was built of it.
pub fn kernel() -> Result<PathBuf> {
    Ok(cache()?.join("kernel"))
}

/// Whether this is a CI run: its build products go to the cache, since its
/// checkout is a fresh one each time.
pub fn in_ci() -> bool {
    env::var("CI").is_ok_and(|value| matches!(value.as_str(), "true" | "1"))
}

/// Where cargo puts its build products: `$CARGO_TARGET_DIR`, in CI the cache's
/// `target`, else the checkout's.
pub fn target() -> Result<PathBuf> {
    if let Some(folder) = env::var_os("CARGO_TARGET_DIR") {
        return std::path::absolute(folder).context("make CARGO_TARGET_DIR absolute");
    }
    if in_ci() {
        Ok(cache()?.join("target"))
    } else {
        Ok(root().join("target"))
    }
}

/// PATH with the cache's tools and venv first.
pub fn path() -> Result<OsString> {
    let mut folders = vec![tools()?, venv()?.join("bin")];
    folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    // A VM and a plain user's shell lack the folders of mkfs, nvme and losetup.
    folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    env::join_paths(folders).context("put PATH together")
}

/// An exclusive lock in the cache folder, held until dropped: two runs at once
/// would write over each other's tools and build products. `waiting` is called
/// when another run holds it.
pub fn lock(name: &str, waiting: impl FnOnce()) -> Result<File> {
    let folder = cache()?;
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let path = folder.join(name);
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    if file.try_lock().is_err() {
        waiting();
        file.lock()
            .with_context(|| format!("lock {}", path.display()))?;
    }
    Ok(file)
}

/// A new folder of this process in the cache, for what a VM writes; it stays,
/// so that logs can be read afterwards, until [`Scratch`] is told to go.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes an empty folder for `purpose`.
    pub fn new(purpose: &str) -> Result<Self> {
        let path = cache()?
            .join("run")
            .join(format!("{purpose}-{}", std::process::id()));
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the folder: all went well, nobody needs its logs.
    pub fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.path).with_context(|| format!("remove {}", self.path.display()))
    }
}

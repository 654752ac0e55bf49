//! What the story finds set up: a pool on XFS with reflink, and its clean-up.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{places, process};

/// The pool's file system; sparse, so only what is written costs anything.
const POOL_BYTES: u64 = 16 << 30;
const LIMIT: Duration = Duration::from_secs(120);

/// The demo's stage. Dropped, it leaves no mount and no loop device.
pub struct Scene {
    /// The drover binary.
    pub drover: PathBuf,
    /// The folder for logs.
    pub results: PathBuf,
    /// The folder for sockets, state and mounts; gone afterwards.
    pub work: PathBuf,
    /// The home's pool: a folder on XFS with reflink.
    pub pool: PathBuf,
    /// Whether the processor is emulated.
    pub emulated: bool,
}

impl Scene {
    /// Sets the stage.
    pub fn set(drover: &Path, results: &Path, emulated: bool) -> Result<Self> {
        let work = std::env::temp_dir().join(format!("drover-demo-{}", std::process::id()));
        let pool = work.join("pool");
        fs::create_dir_all(&pool).with_context(|| format!("create {}", pool.display()))?;
        let scene = Self {
            drover: drover.to_owned(),
            results: results.to_owned(),
            work,
            pool,
            emulated,
        };
        let image = scene.work.join("pool.img");
        File::create(&image)
            .and_then(|file| file.set_len(POOL_BYTES))
            .with_context(|| format!("create {}", image.display()))?;
        run(Command::new("mkfs.xfs")
            .args(["-q", "-K", "-m", "reflink=1"])
            .arg(&image))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&scene.pool))?;
        Ok(scene)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg(&self.pool));
        // A pool that is still mounted keeps its files: whoever holds it is
        // reported by the story, and its data may tell why.
        if run(Command::new("mountpoint").arg("-q").arg(&self.pool)).is_err() {
            let _ = fs::remove_dir_all(&self.work);
        }
    }
}

fn run(command: &mut Command) -> Result<()> {
    process::read(command.env("PATH", places::path()?), LIMIT).map(drop)
}

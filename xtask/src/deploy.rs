//! The check of the manifests in deploy/: each document decodes strictly into
//! the Kubernetes type it names, and what refers to something finds it.
//!
//! The types are Go's, so the check is a small Go program, deploy/check, with
//! its modules pinned; Go's build cache keeps it quick.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{places, process, say, setup};

/// Cold, Go fetches and compiles the Kubernetes types.
const LIMIT: Duration = Duration::from_secs(1200);

/// Checks the manifests.
pub fn check() -> Result<()> {
    say::step("manifests in deploy/", || {
        let folder = places::root().join("deploy");
        let mut go = Command::new(setup::go()?);
        go.current_dir(folder.join("check"))
            .args(["run", "-mod=readonly", "."])
            .arg(folder.join("kubernetes"));
        process::read(&mut go, LIMIT)
            .map(drop)
            .context("check the manifests in deploy/kubernetes")
    })
}

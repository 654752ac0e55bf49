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

/// Checks the manifests, and that the check itself finds mistakes.
pub fn check() -> Result<()> {
    say::step("manifests in deploy/", || {
        let deploy = places::root().join("deploy");
        for arguments in [
            ["test", "-mod=readonly", "."],
            ["run", "-mod=readonly", "."],
        ] {
            let mut go = Command::new(setup::go()?);
            go.current_dir(deploy.join("check")).args(arguments);
            if arguments[0] == "run" {
                go.arg(deploy.join("kubernetes"));
            }
            process::read(&mut go, LIMIT).context("check the manifests in deploy/kubernetes")?;
        }
        Ok(())
    })
}

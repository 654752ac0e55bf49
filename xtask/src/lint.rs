//! `cargo xtask lint`: format, clippy with warnings denied, licences, manifests.

use std::process::{Command, ExitCode, Stdio};

use anyhow::Result;

use crate::{build, deploy, places, say, setup};

/// The command.
pub fn command() -> Result<ExitCode> {
    setup::run()?;
    let mut failures = Vec::new();
    for check in [format, clippy, licences, deploy::check] {
        if let Err(failure) = check() {
            say::error(&failure);
            failures.push(failure);
        }
    }
    Ok(if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// rustfmt finds nothing to change.
pub fn format() -> Result<()> {
    build::cargo_step("cargo fmt --check", &["fmt", "--all", "--check"]).map(drop)
}

/// clippy has nothing to say. The eBPF programs themselves are compiled by
/// another rustc, in the agent's build script; clippy sees their library.
pub fn clippy() -> Result<()> {
    let arguments = [
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ];
    build::cargo_step("cargo clippy", &arguments).map(drop)
}

/// cargo-deny agrees with deny.toml. It takes minutes to compile, so setup does
/// not install it: checked where it is, said where it is not.
pub fn licences() -> Result<()> {
    if !can_check_licences()? {
        say::note("licences not checked: no cargo-deny here (cargo install cargo-deny)");
        return Ok(());
    }
    let arguments = ["deny", "--offline", "check", "licenses", "bans", "sources"];
    build::cargo_step("cargo deny", &arguments).map(drop)
}

/// Whether cargo-deny is here.
pub fn can_check_licences() -> Result<bool> {
    let mut command = Command::new("cargo-deny");
    command.arg("--version").env("PATH", places::path()?);
    Ok(command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success()))
}

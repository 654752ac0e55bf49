//! `cargo xtask setup`: every prerequisite, on a fresh Debian 12 with Rust by rustup.
//!
//! Each part looks first whether its things are there, which costs a moment and
//! no network, and installs only what is missing. [`packages`] is Debian's
//! part; [`tools`] what goes into the cache folder. Two runs at once wait for
//! each other.

mod packages;
mod tools;

pub use tools::{CSI_SANITY, go};

use std::fs::File;

use anyhow::Result;

use crate::{places, say};

/// The command.
pub fn command() -> Result<std::process::ExitCode> {
    run()?;
    Ok(std::process::ExitCode::SUCCESS)
}

/// Makes sure that the test kernel's source and what builds it are there; the
/// source's version. No other command needs them.
///
/// # Errors
/// What could not be had, and how to get it by hand.
pub fn kernel_source() -> Result<String> {
    let _lock = lock()?;
    packages::kernel_source()
}

/// Makes sure that bpftrace is there. `bench trace` alone needs it.
///
/// # Errors
/// What could not be had, and how to get it by hand.
pub fn bpftrace() -> Result<()> {
    let _lock = lock()?;
    packages::bpftrace()
}

/// Makes sure that every prerequisite is there.
///
/// # Errors
/// The prerequisite that could not be had, and how to get it by hand.
pub fn run() -> Result<()> {
    let _lock = lock()?;
    say::step("prerequisites", || {
        packages::install()?;
        tools::install()
    })
}

fn lock() -> Result<File> {
    places::lock("setup.lock", || {
        say::note("another `cargo xtask setup` is at work; waiting for it");
    })
}

//! `cargo xtask bench`: drover beside others, on the same machine, with the same
//! client and the same data.
//!
//! [`plan`] says which figures there are; [`servers`] starts the targets;
//! [`client`] puts one under load; [`nvmet`] runs what needs another kernel;
//! [`report`] turns values into medians and ratios.

mod client;
mod frontends;
mod nvmet;
mod plan;
mod report;
mod servers;

use std::process::ExitCode;

use anyhow::Result;

/// What is measured.
#[derive(clap::Subcommand)]
pub enum Bench {
    /// The iSCSI and NVMe/TCP targets against tgt, the kernel's nvmet, and the machine's limit
    Frontends(frontends::Arguments),
}

/// The command.
pub fn command(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Frontends(arguments) => frontends::command(arguments),
    }
}

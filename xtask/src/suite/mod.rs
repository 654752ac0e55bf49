//! `cargo xtask suite`: conformance suites of others, run against drover.

mod csi_sanity;
mod report;

use std::process::ExitCode;

use anyhow::Result;

/// A suite.
#[derive(clap::Subcommand)]
pub enum Suite {
    /// Kubernetes' own test of a CSI driver, against `drover standalone` in a VM
    CsiSanity(csi_sanity::Arguments),
}

/// The command.
pub fn command(suite: &Suite) -> Result<ExitCode> {
    match suite {
        Suite::CsiSanity(arguments) => csi_sanity::command(arguments),
    }
}

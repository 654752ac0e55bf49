//! `cargo xtask suite`: conformance suites of others, run against drover.

mod csi_sanity;
pub mod libiscsi;
mod report;

use std::process::ExitCode;

use anyhow::Result;

/// A suite.
#[derive(clap::Subcommand)]
pub enum Suite {
    /// Kubernetes' own test of a CSI driver, against `drover standalone` in a VM
    CsiSanity(csi_sanity::Arguments),
    /// libiscsi's test of an iSCSI target, against drover's, on this machine
    Libiscsi(libiscsi::Arguments),
}

/// The command.
pub fn command(suite: &Suite) -> Result<ExitCode> {
    match suite {
        Suite::CsiSanity(arguments) => csi_sanity::command(arguments),
        Suite::Libiscsi(arguments) => libiscsi::command(arguments),
    }
}

//! `cargo xtask bench`: drover beside others, on the same machine, with the same
//! client and the same data.
//!
//! [`plan`] says which figures there are; [`servers`] starts the targets;
//! [`client`] puts one under load; [`nvmet`] runs what needs another kernel;
//! [`report`] turns values into medians and ratios.
//!
//! [`frontends`], [`trace`] and [`fence`] are the three benches.

mod client;
mod fence;
mod frontends;
mod nvmet;
mod plan;
mod report;
mod servers;
mod trace;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

/// What is measured.
#[derive(clap::Subcommand)]
pub enum Bench {
    /// The iSCSI and NVMe/TCP targets against tgt, the kernel's nvmet, and the machine's limit
    Frontends(frontends::Arguments),
    /// What watching costs: with and without drover's eBPF programs, and beside biolatency
    Trace(trace::Arguments),
    /// How fast a holder's access ends, at the home and on the node, beside other means
    Fence(fence::Arguments),
}

/// The command.
pub fn command(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Frontends(arguments) => frontends::command(arguments),
        Bench::Trace(arguments) => trace::command(arguments),
        Bench::Fence(arguments) => fence::command(arguments),
    }
}

/// # Errors
/// When this is not root.
fn as_root(bench: &str, why: &str) -> Result<()> {
    let own = fs::metadata("/proc/self").context("look at /proc/self")?;
    if own.uid() != 0 {
        bail!("{why}; run `cargo xtask bench {bench}` as root");
    }
    Ok(())
}

/// How long each run is.
fn seconds(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if (0.1..=600.0).contains(&number) {
        Ok(number)
    } else {
        Err(format!("{text} is not between 0.1 and 600"))
    }
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn seconds_that_make_no_sense_are_refused() {
        assert_eq!(seconds("2.5"), Ok(2.5));
        for wrong in ["0", "-1", "NaN", "601", "x"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}

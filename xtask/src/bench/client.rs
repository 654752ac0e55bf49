//! One run of the load generator.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::plan::{Load, Side, Unit};
use super::servers::{HOST, HOST_ID, INITIATOR, SUBSYSTEM, Server, TARGET};
use crate::process;

/// Beyond the run itself: connecting, and what is in flight at its end.
const MARGIN: Duration = Duration::from_secs(90);
/// Before what counts, in seconds.
const WARM_UP: f64 = 0.5;

/// What a run came to.
#[derive(Debug, Clone, Deserialize)]
pub struct Report {
    /// Commands a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// Half of the commands took no longer, in microseconds.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1000.
    pub p999_us: f64,
    /// Processor time of the client a command, in microseconds.
    pub client_cpu_us: f64,
    /// And of the server.
    pub server_cpu_us: Option<f64>,
    /// Anonymous memory that the server had resident, in KiB.
    pub server_rss_kib: Option<f64>,
}

impl Report {
    /// The figure's value.
    pub fn value(&self, unit: Unit) -> f64 {
        match unit {
            Unit::Iops => self.iops,
            Unit::MibPerSecond => self.bytes_per_s / f64::from(1 << 20),
        }
    }
}

/// Puts a target under load for some seconds.
///
/// # Errors
/// When a command failed or brought wrong data, or the run is not over in time.
pub fn run(build: &Path, side: Side, server: &Server, load: Load, seconds: f64) -> Result<Report> {
    let name = match side {
        Side::DroverNvme | Side::NullNvme => SUBSYSTEM,
        Side::DroverIscsi | Side::Tgt | Side::NullIscsi | Side::Limit => TARGET,
    };
    let mut command = command(build, side, server.address, name, load);
    command
        .args([
            "--seconds",
            &seconds.to_string(),
            "--warm-up",
            &WARM_UP.to_string(),
        ])
        .args(["--server-pid", &server.id().to_string()]);
    let text = process::read(&mut command, Duration::from_secs_f64(seconds) + MARGIN)?;
    let line = text.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("{} said nothing", process::words(&command)))?;
    serde_json::from_str(line).context("read the load generator's report")
}

/// The load generator on a side's target of this name; how long is to be added.
pub fn command(build: &Path, side: Side, address: SocketAddr, target: &str, load: Load) -> Command {
    let mut command = Command::new(build.join("load"));
    command.args(["run", "--address", &address.to_string()]);
    let sessions = load.sessions.to_string();
    match side {
        Side::DroverIscsi | Side::Tgt | Side::NullIscsi => {
            // tgt keeps LUN 0 for its controller.
            let unit = if side == Side::Tgt { "1" } else { "0" };
            command.args([
                "--wire",
                "iscsi",
                "--target",
                target,
                "--initiator",
                INITIATOR,
            ]);
            command.args(["--unit", unit, "--sessions", &sessions]);
        }
        Side::DroverNvme | Side::NullNvme => {
            command.args(["--wire", "nvme", "--target", target, "--initiator", HOST]);
            command.args(["--host-id", HOST_ID, "--unit", "1", "--queues", &sessions]);
        }
        Side::Limit => {
            command.args(["--wire", "raw", "--sessions", &sessions]);
        }
    }
    command
        .args(["--mix", load.mix, "--size", &load.size.to_string()])
        .args(["--depth", &load.depth.to_string()]);
    command
}

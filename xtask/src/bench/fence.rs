//! `cargo xtask bench fence`: how long it takes to end a holder's access, at the
//! home (from the call to the settlement that a receipt is made of) and on the
//! node (from the call to the first refused read).

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::nvmet::Values;
use super::plan::{Load, Medium, Side};
use super::report::{self, Figure, percentile};
use super::servers::{
    Backing, HOST, HOST_ID, PoolFolder, Stand, TARGET, delete_by_force, free_address,
};
use super::{as_root, client};
use crate::process::{self, Dialogue};
use crate::vm::{self, Kernel, VmSpec};
use crate::{build, places, say, setup};

/// How fences are measured.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print each figure as one JSON object a line, at the end
    #[arg(long)]
    json: bool,
    /// Fences of each kind
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=999))]
    runs: u16,
    /// Only figures whose names begin with this: export or node
    #[arg(long)]
    only: Option<String>,
}

const SCRIPT: &str = "xtask/bench/fence.sh";
/// A gate or a command of the script's, with what it needs, under emulation.
const ROUND: Duration = Duration::from_secs(30);
const BOOT: Duration = Duration::from_secs(300);
/// tgtd takes seconds to end, so it is measured only once in so many fences.
const TGT_EACH: u16 = 5;
/// For an answer of the home's, whose own deadline is 10 s.
const ANSWER: Duration = Duration::from_secs(30);
/// A load has all its commands in flight by then.
const UNDER_WAY: Duration = Duration::from_millis(400);

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    as_root("fence", "tgtd and VMs need it")?;
    setup::run()?;
    let folder = build::programs(true)?;
    let wants = |name: &str| {
        arguments
            .only
            .as_ref()
            .is_none_or(|only| name.starts_with(only.as_str()))
    };
    let mut figures = Vec::new();
    if wants("export") {
        exports(&folder, arguments.runs, &mut figures)?;
    }
    if wants("node") {
        node(&folder, arguments.runs, &mut figures)?;
    }
    report::print(&figures, arguments.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Exports under a load of writes to a disk, ended by drover's home and by tgt.
fn exports(build: &Path, runs: u16, figures: &mut Vec<Figure>) -> Result<()> {
    let logs = places::Scratch::new("bench-fence")?;
    let backing = say::step("write tgt's backing file", || {
        Backing::make(build, Medium::Disk)
    })?;
    let mut home = Home::start(build, logs.path())?;
    for (name, depth, sessions) in [("export_fence", 32, 1), ("export_fence_1024", 64, 16)] {
        let (mut ours, mut theirs, mut inside) = (Vec::new(), Vec::new(), Vec::new());
        let load = Load {
            mix: "write",
            size: 4096,
            depth,
            sessions,
        };
        say::step(
            &format!("{name}: {} writes in flight", depth * sessions),
            || {
                for number in 0..runs {
                    let (took, found) = home.fence(build, load)?;
                    ours.push(took);
                    inside.push(found);
                    if number % TGT_EACH == 0 {
                        let stand = Stand {
                            build,
                            logs: logs.path(),
                        };
                        theirs.push(tgt(&stand, &backing, load)?);
                    }
                }
                Ok(())
            },
        )?;
        let middle = report::median(&inside).unwrap_or_default();
        say::note(&format!(
            "{name}: commands inside as the gate closed: median {middle:.0}"
        ));
        let sides = ours.len().min(theirs.len());
        for (part, quantile) in [("p50", 0.5), ("p99", 0.99)] {
            let (Some(ours), Some(theirs)) =
                (percentile(&ours, quantile), percentile(&theirs, quantile))
            else {
                bail!("{name} has no values");
            };
            let figure = format!("{name}_ms_{part}");
            let peer = "tgtadm delete";
            figures.extend(Figure::between(&figure, "ms", ours, peer, theirs, sides));
        }
    }
    drop(home);
    logs.remove()
}

/// drover's example of a home, with one volume on a disk.
struct Home {
    dialogue: Dialogue,
    address: SocketAddr,
    epoch: u64,
    // Behind the dialogue, so that it goes after the process has.
    _pool: PoolFolder,
}

impl Home {
    fn start(build: &Path, logs: &Path) -> Result<Self> {
        let address = free_address()?;
        let pool = PoolFolder::new();
        let log = File::create(logs.join("home.log")).context("create a log")?;
        let mut command = Command::new(build.join("examples/home"));
        command
            .arg("--pool")
            .arg(&pool.0)
            .args(["--listen", &address.to_string()])
            .args(["--host", HOST, "--host-id", HOST_ID])
            .env("RUST_LOG", "warn");
        let mut dialogue = Dialogue::start(&mut command, log.into())?;
        dialogue.hear("serving", ANSWER)?;
        Ok(Self {
            dialogue,
            address,
            epoch: 0,
            _pool: pool,
        })
    }

    /// Fences an export under load: milliseconds, and commands inside.
    fn fence(&mut self, build: &Path, load: Load) -> Result<(f64, f64)> {
        self.epoch += 1;
        self.dialogue.tell(&format!("export {}", self.epoch))?;
        let exported = self.dialogue.hear("exported ", ANSWER)?;
        let name = exported.split(' ').next().unwrap_or_default();
        let load = client::command(build, Side::DroverNvme, self.address, name, load);
        let mut load = under(load)?;
        self.dialogue.tell(&format!("fence {}", self.epoch))?;
        let fenced = self.dialogue.hear("fenced ", ANSWER);
        process::end(&mut load);
        let fenced = fenced?;
        let mut words = fenced.split(' ');
        let (Some(took), Some(inside)) = (words.next(), words.next()) else {
            bail!("{fenced:?} is no answer");
        };
        Ok((took.parse::<f64>()? / 1000.0, inside.parse()?))
    }
}

/// Deletes a target of tgt's under load: milliseconds of the commands.
fn tgt(stand: &Stand<'_>, backing: &Backing, load: Load) -> Result<f64> {
    let server = stand.start(Side::Tgt, Medium::Disk, backing.path())?;
    let load = client::command(stand.build, Side::Tgt, server.address, TARGET, load);
    let mut load = under(load)?;
    let begin = Instant::now();
    let deleted = delete_by_force(server.address.port());
    let took = begin.elapsed();
    process::end(&mut load);
    deleted.map(|()| took.as_secs_f64() * 1000.0)
}

/// Starts a load, and goes on when it is under way.
fn under(mut load: Command) -> Result<Child> {
    load.args(["--seconds", "10", "--warm-up", "0.1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = load.spawn().context("start the load generator")?;
    thread::sleep(UNDER_WAY);
    if let Some(status) = child.try_wait().context("look at the load generator")? {
        bail!("{} ended too early, with {status}", process::words(&load));
    }
    Ok(child)
}

/// The node's gate beside what operators have, in a VM.
fn node(build: &Path, runs: u16, figures: &mut Vec<Figure>) -> Result<()> {
    let command = vec!["bash".into(), SCRIPT.into()];
    let mut spec = VmSpec::new(Kernel::V6_12, BOOT + ROUND * u32::from(runs), command);
    let build = build.to_str().context("the build's path is not UTF-8")?;
    spec.environment = vec![
        ("BUILD".into(), build.to_owned()),
        ("ROUNDS".into(), runs.to_string()),
    ];
    say::note("booting a VM with Linux 6.12 (emulated): compare its values with each other only");
    let mut values = Values::default();
    let outcome = vm::run(&spec, &mut |line| values.take_or_print(line))?;
    if !outcome.success() {
        bail!("{SCRIPT}: {}", outcome.describe());
    }
    let of = |side: &str| values.of("node_gate", side);
    let gate = of("drover");
    let disconnect = of("nvme-disconnect");
    for (part, quantile) in [("p50", 0.5), ("p99", 0.99)] {
        let (Some(ours), Some(theirs)) = (
            percentile(&gate, quantile),
            percentile(&disconnect, quantile),
        ) else {
            bail!("{SCRIPT} gave no values of the gate or of nvme disconnect");
        };
        let name = format!("node_gate_us_{part}");
        let peer = "nvme disconnect";
        let sides = gate.len().min(disconnect.len());
        figures.extend(Figure::between(&name, "us", ours, peer, theirs, sides));
    }
    // By how often each could be done in a second, so that the ratio says how
    // many times faster the gate is.
    let a_second = |values: &[f64]| values.iter().map(|us| 1e6 / us).collect::<Vec<_>>();
    for (side, peer, name) in [
        (
            "nvme-disconnect",
            "nvme disconnect",
            "node_gate_vs_nvme_disconnect",
        ),
        (
            "iscsiadm-logout",
            "iscsiadm logout",
            "node_gate_vs_iscsiadm_logout",
        ),
        (
            "dmsetup-error",
            "dmsetup error",
            "node_gate_vs_dmsetup_error",
        ),
    ] {
        let theirs = a_second(&of(side));
        figures.extend(Figure::of(name, "1/s", &a_second(&gate), peer, &theirs));
    }
    Ok(())
}

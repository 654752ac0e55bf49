//! `cargo xtask bench fence`: how long it takes to end a holder's access, at the
//! home (from the call to the settlement that a receipt is made of) and on the
//! node (from the call to the first refused read).

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::as_root;
use super::nvmet::Values;
use super::plan::{Medium, Side};
use super::report::{self, Figure, percentile};
use super::servers::{
    Backing, HOST, HOST_ID, INITIATOR, Stand, TARGET, delete_by_force, free_address,
};
use crate::vm::{self, Kernel, VmSpec};
use crate::{build, places, process, say, setup};

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
    for (name, depth, queues) in [("export_fence", 32, 1), ("export_fence_1024", 64, 16)] {
        let (mut ours, mut theirs, mut inside) = (Vec::new(), Vec::new(), Vec::new());
        say::step(
            &format!("{name}: {} writes in flight", depth * queues),
            || {
                for number in 0..runs {
                    let (took, found) = home.fence(build, depth, queues)?;
                    ours.push(took);
                    inside.push(found);
                    if number % TGT_EACH == 0 {
                        let stand = Stand {
                            build,
                            logs: logs.path(),
                        };
                        theirs.push(tgt(&stand, &backing, depth, queues)?);
                    }
                }
                Ok(())
            },
        )?;
        let middle = report::median(&inside).unwrap_or_default();
        say::note(&format!(
            "{name}: commands inside as the gate closed: median {middle:.0}"
        ));
        for (part, quantile) in [("p50", 0.5), ("p99", 0.99)] {
            let (Some(ours), Some(theirs)) =
                (percentile(&ours, quantile), percentile(&theirs, quantile))
            else {
                bail!("{name} has no values");
            };
            let figure = format!("{name}_ms_{part}");
            let peer = "tgtadm delete";
            figures.extend(Figure::between(
                &figure,
                "ms",
                ours,
                peer,
                theirs,
                runs.into(),
            ));
        }
    }
    drop(home);
    logs.remove()
}

/// drover's example of a home, with one volume on a disk.
struct Home {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    address: String,
    epoch: u64,
    pool: PathBuf,
}

impl Home {
    fn start(build: &Path, logs: &Path) -> Result<Self> {
        let address = free_address()?.to_string();
        let pool = Path::new("/var/tmp").join(format!("drover-fence-{}", std::process::id()));
        let log = std::fs::File::create(logs.join("home.log")).context("create a log")?;
        let mut command = Command::new(build.join("examples/home"));
        command
            .arg("--pool")
            .arg(&pool)
            .args(["--listen", &address, "--host", HOST, "--host-id", HOST_ID])
            .env("RUST_LOG", "warn")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        let mut child = command.spawn().context("start drover's home")?;
        let input = child.stdin.take().context("a pipe was asked for")?;
        let output = child.stdout.take().context("a pipe was asked for")?;
        let mut home = Self {
            child,
            input,
            output: BufReader::new(output).lines(),
            address,
            epoch: 0,
            pool,
        };
        home.hears("serving")?;
        Ok(home)
    }

    /// The words of its next line, which begins with `first`.
    fn hears(&mut self, first: &str) -> Result<Vec<String>> {
        let line = self.output.next();
        let line = line
            .context("drover's home ended")?
            .context("read a line")?;
        let rest = line.strip_prefix(first);
        let rest = rest.with_context(|| format!("{line:?} does not begin with {first}"))?;
        Ok(rest.split_whitespace().map(str::to_owned).collect())
    }

    /// Fences an export under load: milliseconds, and commands inside.
    fn fence(&mut self, build: &Path, depth: u16, queues: u16) -> Result<(f64, f64)> {
        self.epoch += 1;
        writeln!(self.input, "export {}", self.epoch).context("tell drover's home")?;
        let exported = self.hears("exported")?;
        let [name, _] = &exported[..] else {
            bail!("drover's home said {exported:?}");
        };
        let mut load = Command::new(build.join("load"));
        load.args(["run", "--address", &self.address, "--wire", "nvme"])
            .args(["--target", name, "--initiator", HOST, "--host-id", HOST_ID])
            .args(["--unit", "1", "--queues", &queues.to_string()]);
        let mut load = under(load, depth)?;
        writeln!(self.input, "fence {}", self.epoch).context("tell drover's home")?;
        let fenced = self.hears("fenced")?;
        process::end(&mut load);
        let [took, inside] = &fenced[..] else {
            bail!("drover's home said {fenced:?}");
        };
        Ok((took.parse::<f64>()? / 1000.0, inside.parse()?))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        process::end(&mut self.child);
        if let Err(error) = std::fs::remove_dir_all(&self.pool) {
            say::note(&format!("{} stays: {error}", self.pool.display()));
        }
    }
}

/// Deletes a target of tgt's under load: milliseconds of the command.
fn tgt(stand: &Stand<'_>, backing: &Backing, depth: u16, sessions: u16) -> Result<f64> {
    let server = stand.start(Side::Tgt, Medium::Disk, backing.path())?;
    let mut load = Command::new(stand.build.join("load"));
    load.args(["run", "--address", &server.address.to_string()])
        .args([
            "--wire",
            "iscsi",
            "--target",
            TARGET,
            "--initiator",
            INITIATOR,
        ])
        .args(["--unit", "1", "--sessions", &sessions.to_string()]);
    let mut load = under(load, depth)?;
    let begin = Instant::now();
    delete_by_force(server.address.port())?;
    let took = begin.elapsed();
    process::end(&mut load);
    Ok(took.as_secs_f64() * 1000.0)
}

/// Starts a load of writes, and goes on when it is under way.
fn under(mut load: Command, depth: u16) -> Result<Child> {
    load.args([
        "--mix",
        "write",
        "--size",
        "4096",
        "--depth",
        &depth.to_string(),
    ])
    .args(["--seconds", "10", "--warm-up", "0.1"])
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
        figures.extend(Figure::between(&name, "us", ours, peer, theirs, gate.len()));
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

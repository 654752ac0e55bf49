//! `cargo xtask bench trace`: what watching costs. The same reads of loop devices
//! with nobody watching, with drover's programs in the kernel, and with
//! bpftrace's biolatency, in turn.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::report::{self, Figure};
use super::{as_root, seconds};
use crate::process::{self, Dialogue};
use crate::{build, places, say, setup};

/// How watching is measured.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print each figure as one JSON object a line, at the end
    #[arg(long)]
    json: bool,
    /// Runs of each side; what is printed is their median
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=99))]
    runs: u16,
    /// Seconds of each run
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
}

const PEER: &str = "xtask/bench/biolatency.bt";
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";
/// Disks of the second setting.
const MANY: usize = 64;
/// Of each disk.
const MIB: u64 = 16;
const MARGIN: Duration = Duration::from_secs(60);

/// Who watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watcher {
    Nobody,
    Drover,
    Biolatency,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    as_root("trace", "eBPF programs and loop devices need it")?;
    setup::run()?;
    setup::bpftrace()?;
    let folder = build::programs(true)?;
    let stand = Stand {
        watch: folder.join("examples/watch"),
        seconds: arguments.seconds,
    };
    let mut figures = Vec::new();
    for disks in [1, MANY] {
        let disks = Loops::new(disks)?;
        stand.iops(&disks, arguments.runs, &mut figures)?;
        if disks.names.len() == 1 {
            stand.cost(&disks, arguments.runs, &mut figures)?;
        }
    }
    report::print(&figures, arguments.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Nanoseconds and runs of programs by their names.
type Cost = BTreeMap<String, (u64, u64)>;

/// What was spent between two looks, by those that ran.
fn spent(before: &Cost, after: &Cost) -> Cost {
    let since = after.iter().map(|(program, (ns, runs))| {
        let (ns_before, runs_before) = before.get(program).copied().unwrap_or_default();
        (
            program.clone(),
            (
                ns.saturating_sub(ns_before),
                runs.saturating_sub(runs_before),
            ),
        )
    });
    since.filter(|(_, (_, runs))| *runs > 0).collect()
}

struct Stand {
    watch: PathBuf,
    seconds: f64,
}

impl Stand {
    /// Reads a second with each who watches.
    fn iops(&self, disks: &Loops, runs: u16, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut without, mut with, mut peer) = (Vec::new(), Vec::new(), Vec::new());
        let count = disks.names.len();
        say::step(&format!("reads of {count} disks"), || {
            for _ in 0..runs {
                for (watcher, values) in [
                    (Watcher::Nobody, &mut without),
                    (Watcher::Drover, &mut with),
                    (Watcher::Biolatency, &mut peer),
                ] {
                    let _watching = self.start(watcher, disks)?;
                    values.push(disks.read(self.seconds)?.iops);
                }
            }
            Ok(())
        })?;
        let name = format!("iops_with_vs_without_{count}");
        figures.extend(Figure::of(&name, "IOPS", &with, "nobody", &without));
        let name = match count {
            1 => "iops_vs_biolatency".to_owned(),
            many => format!("iops_vs_biolatency_{many}"),
        };
        figures.extend(Figure::of(&name, "IOPS", &with, "biolatency", &peer));
        Ok(())
    }

    /// Nanoseconds of all programs for each I/O, by the kernel's own count. It
    /// takes time itself, so these runs stand apart.
    fn cost(&self, disks: &Loops, runs: u16, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut last = BTreeMap::new();
        let _counting = Counting::begin()?;
        say::step("time of the programs", || {
            for _ in 0..runs {
                for (watcher, values) in [
                    (Watcher::Drover, &mut ours),
                    (Watcher::Biolatency, &mut theirs),
                ] {
                    let _watching = self.start(watcher, disks)?;
                    let before = self.cost_so_far()?;
                    let ios = disks.read(self.seconds)?.total_ios as f64;
                    let spent = spent(&before, &self.cost_so_far()?);
                    values.push(spent.values().map(|(ns, _)| *ns as f64).sum::<f64>() / ios);
                    last.insert(format!("{watcher:?}"), (spent, ios));
                }
            }
            Ok(())
        })?;
        for (watcher, (spent, ios)) in last {
            for (program, (ns, runs)) in spent {
                let (ns, runs) = (ns as f64, runs as f64);
                say::note(&format!(
                    "{watcher}: {program} {:.2} runs an I/O, {:.0} ns a run",
                    runs / ios,
                    ns / runs
                ));
            }
        }
        let figure = Figure::of("ebpf_ns_per_io", "ns", &ours, "biolatency", &theirs);
        figures.extend(figure);
        Ok(())
    }

    /// What the programs in the kernel have cost.
    fn cost_so_far(&self) -> Result<Cost> {
        let text = process::read(Command::new(&self.watch).arg("cost"), MARGIN)?;
        let mut cost = Cost::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let mut number = || words.next()?.parse::<u64>().ok();
            let (Some(ns), Some(runs)) = (number(), number()) else {
                bail!("{line:?} is no program's cost");
            };
            let sum = cost.entry(words.collect()).or_insert((0, 0));
            *sum = (sum.0 + ns, sum.1 + runs);
        }
        Ok(cost)
    }

    fn start(&self, watcher: Watcher, disks: &Loops) -> Result<Option<Dialogue>> {
        let (mut command, ready) = match watcher {
            Watcher::Nobody => return Ok(None),
            Watcher::Drover => {
                let mut command = Command::new(&self.watch);
                command.arg("on").args(&disks.names);
                (command, "watching")
            }
            Watcher::Biolatency => {
                let mut command = Command::new("unshare");
                // A tracefs of its own, where none is mounted.
                let script = "mount -t tracefs tracefs /sys/kernel/tracing; exec bpftrace \"$0\"";
                command
                    .args(["--mount", "sh", "-c", script])
                    .arg(places::root().join(PEER));
                (command, "Attaching")
            }
        };
        let mut watching = Dialogue::start(&mut command, Stdio::null())?;
        watching.hear(ready, MARGIN)?;
        if watcher == Watcher::Biolatency {
            // It says so before it does so. What it is late by is in its favour.
            thread::sleep(Duration::from_secs(1));
        }
        Ok(Some(watching))
    }
}

/// The kernel counts its programs' time until this is dropped.
struct Counting(String);

impl Counting {
    fn begin() -> Result<Self> {
        let before = fs::read_to_string(STATS).with_context(|| format!("read {STATS}"))?;
        fs::write(STATS, "1").with_context(|| format!("write {STATS}"))?;
        Ok(Self(before))
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(STATS, self.0.trim()) {
            say::note(&format!("{STATS} stays at 1: {error}"));
        }
    }
}

/// Loop devices over files in memory.
struct Loops {
    folder: PathBuf,
    names: Vec<String>,
}

/// What fio says of a run.
#[derive(Deserialize)]
struct Reads {
    iops: f64,
    total_ios: u64,
}

#[derive(Deserialize)]
struct Job {
    read: Reads,
}

#[derive(Deserialize)]
struct Said {
    jobs: Vec<Job>,
}

impl Loops {
    fn new(count: usize) -> Result<Self> {
        let folder = Path::new("/dev/shm").join(format!("drover-trace-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let mut loops = Self {
            folder,
            names: Vec::new(),
        };
        for number in 0..count {
            let file = loops.folder.join(number.to_string());
            // Written, since a hole is read faster than data.
            let data = vec![1; 1 << 20];
            let output = File::create(&file);
            let mut output = output.with_context(|| format!("create {}", file.display()))?;
            for _ in 0..MIB {
                output
                    .write_all(&data)
                    .with_context(|| format!("write {}", file.display()))?;
            }
            let mut command = Command::new("losetup");
            command.args(["-f", "--show"]).arg(&file);
            let path = process::read(&mut command, MARGIN)?;
            let name = path.trim().strip_prefix("/dev/");
            loops
                .names
                .push(name.context("losetup names no disk")?.to_owned());
        }
        Ok(loops)
    }

    /// Random reads of 4 KiB, 32 at a time, over all of them.
    fn read(&self, seconds: f64) -> Result<Reads> {
        let paths: Vec<String> = self
            .names
            .iter()
            .map(|name| format!("/dev/{name}"))
            .collect();
        let mut command = Command::new("fio");
        command
            .arg("--name=read")
            .arg(format!("--filename={}", paths.join(":")))
            .args(["--readonly", "--rw=randread", "--bs=4k", "--direct=1"])
            .args(["--ioengine=libaio", "--iodepth=32", "--norandommap"])
            .args(["--time_based", "--output-format=json"])
            .arg(format!("--runtime={}ms", (seconds * 1000.0).round()));
        let text = process::read(&mut command, MARGIN + Duration::from_secs_f64(seconds))?;
        let json = text.find('{').map(|at| &text[at..]).unwrap_or_default();
        let said: Said = serde_json::from_str(json).context("read fio's report")?;
        let job = said.jobs.into_iter().next();
        Ok(job.context("fio reports no job")?.read)
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        for name in &self.names {
            let path = format!("/dev/{name}");
            if let Err(error) = process::read(Command::new("losetup").args(["-d", &path]), MARGIN) {
                say::note(&format!("{path} stays: {error:#}"));
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            say::note(&format!("{} stays: {error}", self.folder.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spent_is_the_difference_of_those_that_ran() {
        let cost = |rows: &[(&str, u64, u64)]| -> Cost {
            let rows = rows.iter();
            rows.map(|(name, ns, runs)| ((*name).to_owned(), (*ns, *runs)))
                .collect()
        };
        let before = cost(&[("a", 10, 1), ("b", 5, 5)]);
        let after = cost(&[("a", 30, 3), ("b", 5, 5), ("c", 7, 1)]);
        assert_eq!(spent(&before, &after), cost(&[("a", 20, 2), ("c", 7, 1)]));
    }
}

//! `cargo xtask bench frontends`: all sides of a row in turn, again and again,
//! so that what the machine does meanwhile falls on each of them alike.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use super::client::{self, Report};
use super::nvmet;
use super::plan::{self, IN_VM, Load, MEMORY, Medium, ROWS, Row, Side};
use super::report::{self, Figure, median};
use super::servers::{Backing, Server, Stand};
use super::{as_root, seconds};
use crate::{build, places, say, setup};

/// How the frontends are measured.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print each figure as one JSON object a line, at the end
    #[arg(long)]
    json: bool,
    /// Runs of each side; what is printed is their median
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    runs: u16,
    /// Seconds of each run
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    /// Every mix, size and depth instead, by one session and by eight
    #[arg(long)]
    sweep: bool,
    /// Only figures whose names contain this; may be repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
}

impl Arguments {
    fn wants(&self, figure: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| figure.contains(part.as_str()))
    }
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    as_root("frontends", "tgtd needs root")?;
    let all = if arguments.sweep {
        plan::sweep()
    } else {
        ROWS.to_vec()
    };
    let rows: Vec<&Row> = all
        .iter()
        .filter(|row| row.peers.iter().any(|(_, name)| arguments.wants(name)))
        .collect();
    let memory = !arguments.sweep && arguments.wants(MEMORY);
    let in_vm = !arguments.sweep && IN_VM.iter().any(|(name, _)| arguments.wants(name));
    if rows.is_empty() && !memory && !in_vm {
        bail!("no figure's name contains {}", arguments.only.join(" or "));
    }
    setup::run()?;
    let folder = build::programs(true)?;
    let mut bench = Bench::new(arguments, &folder)?;
    for medium in [Medium::Memory, Medium::Disk] {
        let rows: Vec<&Row> = rows
            .iter()
            .copied()
            .filter(|row| row.medium == medium)
            .collect();
        let memory = memory && medium == Medium::Memory;
        if !rows.is_empty() || memory {
            let measured = bench.on(medium, &rows, memory);
            bench.note(measured);
        }
    }
    if in_vm {
        let measured = nvmet::run(
            &folder,
            arguments.runs,
            arguments.seconds,
            &mut bench.figures,
        );
        bench.note(measured.context("drover and nvmet in a VM"));
    }
    bench.end()
}

struct Bench<'a> {
    arguments: &'a Arguments,
    build: &'a Path,
    logs: places::Scratch,
    figures: Vec<Figure>,
    sound: bool,
}

impl<'a> Bench<'a> {
    fn new(arguments: &'a Arguments, build: &'a Path) -> Result<Self> {
        let logs = places::Scratch::new("bench")?;
        Ok(Self {
            arguments,
            build,
            logs,
            figures: Vec::new(),
            sound: true,
        })
    }

    /// A failure costs its own figures and the exit status; the others go on.
    fn note(&mut self, outcome: Result<()>) {
        if let Err(error) = outcome {
            say::error(&error);
            self.sound = false;
        }
    }

    /// Measures what has its file on one medium.
    fn on(&mut self, medium: Medium, rows: &[&Row], memory: bool) -> Result<()> {
        let backing = say::step(&format!("write the backing file ({medium:?})"), || {
            Backing::make(self.build, medium)
        })?;
        let mut sides: BTreeSet<Side> = rows
            .iter()
            .flat_map(|row| sides(row, self.arguments))
            .collect();
        if memory {
            sides.extend([Side::DroverIscsi, Side::Tgt]);
        }
        let mut servers = BTreeMap::new();
        for side in sides {
            let stand = Stand {
                build: self.build,
                logs: self.logs.path(),
            };
            match stand.start(side, medium, backing.path()) {
                Ok(server) => drop(servers.insert(side, server)),
                Err(error) => self.note(Err(error.context(format!("start {side:?}")))),
            }
        }
        for row in rows {
            let measured = self.row(row, &servers);
            self.note(measured);
        }
        if memory {
            let measured = self.memory(&servers);
            self.note(measured);
        }
        Ok(())
    }

    /// One row: every side in turn, as often as asked for.
    fn row(&mut self, row: &Row, servers: &BTreeMap<Side, Server>) -> Result<()> {
        let name = row.peers.first().map_or("", |(_, name)| name);
        let present: Vec<Side> = sides(row, self.arguments)
            .into_iter()
            .filter(|side| servers.contains_key(side))
            .collect();
        let mut reports: BTreeMap<Side, Vec<Report>> = BTreeMap::new();
        say::step(name, || {
            for _ in 0..self.arguments.runs {
                for side in &present {
                    let server = &servers[side];
                    let seconds = self.arguments.seconds;
                    let report = client::run(self.build, *side, server, row.load, seconds)
                        .with_context(|| format!("{name}: {side:?}"))?;
                    reports.entry(*side).or_default().push(report);
                }
            }
            Ok(())
        })?;
        for side in &present {
            say::note(&detail(*side, &reports[side]));
        }
        let values = |side: Side| -> Vec<f64> {
            let reports = reports.get(&side).into_iter().flatten();
            reports.map(|report| report.value(row.unit)).collect()
        };
        for (peer, name) in row
            .peers
            .iter()
            .filter(|(_, name)| self.arguments.wants(name))
        {
            let (ours, theirs) = (values(row.drover), values(*peer));
            let figure = Figure::of(name, row.unit.name(), &ours, peer.name(), &theirs);
            self.figures.extend(figure);
        }
        Ok(())
    }

    /// What a session adds to what a target has resident: 33 under load, less
    /// one, by 32.
    fn memory(&mut self, servers: &BTreeMap<Side, Server>) -> Result<()> {
        const MANY: u16 = 33;
        let mut values: BTreeMap<Side, Vec<f64>> = BTreeMap::new();
        say::step(MEMORY, || {
            for _ in 0..self.arguments.runs {
                for side in [Side::DroverIscsi, Side::Tgt] {
                    let Some(server) = servers.get(&side) else {
                        continue;
                    };
                    let resident = |sessions| -> Result<f64> {
                        let load = Load {
                            mix: "read",
                            size: 4096,
                            depth: 32,
                            sessions,
                        };
                        let seconds = self.arguments.seconds.min(2.0);
                        let report = client::run(self.build, side, server, load, seconds)?;
                        report
                            .server_rss_kib
                            .context("the target's memory is not known")
                    };
                    let (one, many) = (resident(1)?, resident(MANY)?);
                    let each = (many - one) / f64::from(MANY - 1);
                    values.entry(side).or_default().push(each);
                }
            }
            Ok(())
        })?;
        let of = |side| values.get(&side).map_or(&[][..], Vec::as_slice);
        let figure = Figure::of(MEMORY, "KiB", of(Side::DroverIscsi), "tgt", of(Side::Tgt));
        self.figures.extend(figure);
        Ok(())
    }

    fn end(self) -> Result<ExitCode> {
        let figures = &self.figures;
        if self.sound {
            self.logs.remove()?;
        } else {
            say::note(&format!("logs: {}", self.logs.path().display()));
        }
        report::print(figures, self.arguments.json)?;
        Ok(if self.sound {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// The sides of a row that are to be measured, drover's first. The null target
/// stands beside every one of them, whatever was asked for.
fn sides(row: &Row, arguments: &Arguments) -> Vec<Side> {
    let null = |side: Side| matches!(side, Side::NullIscsi | Side::NullNvme);
    let wanted = row
        .peers
        .iter()
        .filter(|(side, name)| null(*side) || arguments.wants(name));
    std::iter::once(row.drover)
        .chain(wanted.map(|(side, _)| *side))
        .collect()
}

/// Medians of a side's latencies and processor time.
fn detail(side: Side, reports: &[Report]) -> String {
    let middle = |value: fn(&Report) -> f64| {
        let values: Vec<f64> = reports.iter().map(value).collect();
        median(&values).unwrap_or(f64::NAN)
    };
    format!(
        "{:<12} {:>9.0} IOPS  {:>7.0} MiB/s  p50 {:>7.0} us  p99 {:>7.0} us  p99.9 {:>7.0} us  \
         CPU a command: client {:.1} us, server {:.1} us",
        side.name(),
        middle(|report| report.iops),
        middle(|report| report.bytes_per_s / f64::from(1 << 20)),
        middle(|report| report.p50_us),
        middle(|report| report.p99_us),
        middle(|report| report.p999_us),
        middle(|report| report.client_cpu_us),
        middle(|report| report.server_cpu_us.unwrap_or(f64::NAN)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_takes_parts_of_names() {
        let mut arguments = Arguments {
            json: false,
            runs: 1,
            seconds: 1.0,
            sweep: false,
            only: Vec::new(),
        };
        assert!(arguments.wants("iscsi_4k_qd1_read"));
        arguments.only = vec!["nvme".into(), "rss".into()];
        assert!(arguments.wants(MEMORY) && !arguments.wants("iscsi_4k_qd1_read"));
    }
}

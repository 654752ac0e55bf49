//! `cargo xtask fuzz`: the fuzz targets of agent/fuzz, two at a time.
//!
//! They are cargo-fuzz targets, and `cargo fuzz run NAME --fuzz-dir agent/fuzz`
//! runs one as well. This builds them with the same instrumentation and without
//! the address sanitizer: what they run is safe Rust. It needs no nightly
//! compiler. What is found is kept in the cache beside the seeds of agent/fuzz/corpus.
//!
//! A target fails when it crashes or hangs, and when its memory grows: a
//! connection that has gone must leave nothing behind, however many there were.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{build, places, process, say, setup};

const BUILD: Duration = Duration::from_secs(3600);
/// Beyond the time that a target fuzzes for.
const GRACE: Duration = Duration::from_secs(120);
/// A target holds less, whatever it does.
const MEMORY_MIB: u64 = 512;
/// What a target may hold at most in the second half of its time beyond what
/// it held in the first, when it learned most of what it keeps.
const GROWTH_MIB: u64 = 64;
/// How often its memory is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Lines of a failed target's log that are shown.
const SHOWN: usize = 40;
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// What instruments a build for libFuzzer (rustc book, "sanitizer-coverage").
const INSTRUMENTATION: &[&str] = &[
    "--cfg",
    "fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// What is fuzzed, and for how long.
#[derive(clap::Args)]
pub struct Arguments {
    /// Seconds for each target
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Targets at a time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    jobs: u8,
    /// Only the targets whose name contains one of these
    names: Vec<String>,
}

/// A target's name, and what its fuzzing came to.
pub type Outcome = (String, Result<Ran>);

/// What a target did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ran {
    executions: u64,
    seconds: u64,
    /// Edges that some input went over.
    coverage: u64,
    /// The most memory it held.
    peak_mib: u64,
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} executions in {} s, {} edges, {} MiB at most",
            self.executions, self.seconds, self.coverage, self.peak_mib
        )
    }
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    setup::run()?;
    let mut good = true;
    for (name, outcome) in run(arguments.seconds, arguments.jobs, &arguments.names)? {
        if let Err(failure) = outcome {
            println!("{} {name}: {failure:#}", say::bad("FAILED"));
            good = false;
        }
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Fuzzes each target whose name has one of `names` in it, or all, `jobs` at a
/// time; what each came to.
///
/// # Errors
/// When they cannot be built.
pub fn run(seconds: u64, jobs: u8, names: &[String]) -> Result<Vec<Outcome>> {
    let folder = places::root().join("agent/fuzz");
    let targets: VecDeque<_> = targets(&folder)?
        .into_iter()
        .filter(|name| names.is_empty() || names.iter().any(|part| name.contains(part)))
        .collect();
    if targets.is_empty() {
        bail!("no fuzz target is called so; they are in agent/fuzz/fuzz_targets");
    }
    let products = places::cache()?.join("fuzz");
    say::step("build the fuzz targets", || {
        let mut cargo = build::cargo()?;
        cargo
            .args(["build", "--quiet", "--release", "--locked"])
            .args(["--target", TRIPLE, "--manifest-path"])
            .arg(folder.join("Cargo.toml"))
            .env("CARGO_TARGET_DIR", products.join("target"))
            .env("RUSTFLAGS", INSTRUMENTATION.join(" "))
            .env("RUSTC_BOOTSTRAP", "1");
        process::read(&mut cargo, BUILD)
    })?;
    let what = format!(
        "fuzz {} targets for {seconds} s each, {jobs} at a time",
        targets.len()
    );
    let place = Place {
        built: products.join("target").join(TRIPLE).join("release"),
        seeds: folder.join("corpus"),
        products,
    };
    let waiting = Mutex::new(targets);
    let outcomes = Mutex::new(Vec::new());
    // A function of its own, so that nobody waits with the lock in his hands.
    let next = || lock(&waiting).pop_front();
    let work = || {
        while let Some(name) = next() {
            let outcome = place.fuzz(&name, Duration::from_secs(seconds));
            lock(&outcomes).push((name, outcome));
        }
    };
    // That a target fails is in its outcome.
    say::step(&what, || {
        thread::scope(|scope| (0..jobs).for_each(|_| _ = scope.spawn(work)));
        Ok(())
    })?;
    let mut outcomes = outcomes
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    outcomes.sort_by(|(one, _), (other, _)| one.cmp(other));
    for (name, outcome) in &outcomes {
        if let Ok(ran) = outcome {
            say::note(&format!("{name}: {ran}"));
        }
    }
    Ok(outcomes)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What a worker that panicked left is whole: each change is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn targets(folder: &Path) -> Result<Vec<String>> {
    let sources = folder.join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&sources).with_context(|| format!("list {}", sources.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(name) = path.file_stem()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Where things are.
struct Place {
    built: PathBuf,
    seeds: PathBuf,
    products: PathBuf,
}

impl Place {
    fn fuzz(&self, name: &str, time: Duration) -> Result<Ran> {
        let folder = |kind: &str| -> Result<PathBuf> {
            let path = self.products.join(kind).join(name);
            fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
            Ok(path)
        };
        let (corpus, artifacts) = (folder("corpus")?, folder("artifacts")?);
        let log = self.products.join(format!("{name}.log"));
        let output = File::create(&log).with_context(|| format!("make {}", log.display()))?;
        let program = self.built.join(name);
        let mut target = Command::new(&program);
        target
            .arg(&corpus)
            .arg(format!("-max_total_time={}", time.as_secs()))
            .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
            .args(["-timeout=60", "-print_final_stats=1"])
            .arg(format!("-artifact_prefix={}/", artifacts.display()));
        let seeds = self.seeds.join(name);
        if seeds.exists() {
            target.arg(seeds);
        }
        target
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output);
        let child = target
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let (status, memory) = watch(child, time)?;
        let text = fs::read(&log).with_context(|| format!("read {}", log.display()))?;
        let text = String::from_utf8_lossy(&text);
        if !status.is_some_and(|status| status.success()) {
            let lines: Vec<_> = text.lines().collect();
            let end = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
            let how = status.map_or("ended at its limit".to_owned(), |status| status.to_string());
            bail!(
                "{how}; the input that did it is in {}; run {} on it\n{end}",
                artifacts.display(),
                program.display()
            );
        }
        if memory.has_grown() {
            bail!(
                "its memory grows: {} MiB at most in the first half of its time, {} in the second",
                memory.first,
                memory.second
            );
        }
        Ok(ran(&text, &memory))
    }
}

/// The most memory that a target held, in MiB, in each half of its time.
#[derive(Debug, Default)]
struct Memory {
    first: u64,
    second: u64,
}

impl Memory {
    fn has_grown(&self) -> bool {
        self.second > self.first + GROWTH_MIB
    }
}

/// Waits for a target's end; without a status when it had to be ended.
fn watch(mut child: Child, time: Duration) -> Result<(Option<ExitStatus>, Memory)> {
    let begin = Instant::now();
    let mut memory = Memory::default();
    loop {
        if let Some(status) = child.try_wait().context("wait for a fuzz target")? {
            return Ok((Some(status), memory));
        }
        let elapsed = begin.elapsed();
        if elapsed > time + GRACE {
            child.kill().context("end a fuzz target")?;
            child.wait().context("wait for a fuzz target")?;
            return Ok((None, memory));
        }
        // None: it has just ended.
        let now = resident(child.id()).unwrap_or(0);
        let half = if elapsed < time / 2 {
            &mut memory.first
        } else {
            &mut memory.second
        };
        *half = now.max(*half);
        thread::sleep(LOOK);
    }
}

/// A process's memory, in MiB (proc(5), `VmRSS`).
fn resident(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// What libFuzzer says in the end.
fn ran(text: &str, memory: &Memory) -> Ran {
    let number = |text: &str| text.split_whitespace().next()?.parse().ok();
    let after = |name: &str| {
        let line = text.lines().rev().find(|line| line.contains(name))?;
        number(line.split_once(name)?.1)
    };
    Ran {
        executions: after("stat::number_of_executed_units:").unwrap_or(0),
        seconds: after(" runs in ").unwrap_or(0),
        coverage: after(" cov: ").unwrap_or(0),
        peak_mib: memory.first.max(memory.second),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_target_says_is_read() {
        let text = "#1\tINITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 30Mb\n\
            #4096\tpulse  cov: 734 ft: 2000 corp: 90/3Kb lim: 4096 exec/s: 2048 rss: 41Mb\n\
            Done 8211 runs in 31 second(s)\n\
            stat::number_of_executed_units: 8211\n\
            stat::peak_rss_mb:              41\n";
        let memory = Memory {
            first: 30,
            second: 41,
        };
        let expected = Ran {
            executions: 8211,
            seconds: 31,
            coverage: 734,
            peak_mib: 41,
        };
        assert_eq!(ran(text, &memory), expected);
        assert!(!memory.has_grown());
    }

    #[test]
    fn memory_that_grows_is_seen() {
        let first = resident(std::process::id()).expect("this process has a status");
        assert!(first > 0);
        let second = first + GROWTH_MIB;
        assert!(!Memory { first, second }.has_grown());
        let second = second + 1;
        assert!(Memory { first, second }.has_grown());
    }
}

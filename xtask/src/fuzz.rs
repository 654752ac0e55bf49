//! `cargo xtask fuzz`: the fuzz targets of agent/fuzz, one after another.
//!
//! They are cargo-fuzz targets, and `cargo fuzz run NAME --fuzz-dir agent/fuzz`
//! runs one as well. This builds them with the same instrumentation and without
//! the address sanitizer: what they run is safe Rust. It needs no nightly
//! compiler. What is found is kept in the cache beside the seeds of agent/fuzz/corpus.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{build, places, process, say, setup};

const BUILD: Duration = Duration::from_secs(3600);
/// Beyond the time that a target fuzzes for.
const GRACE: Duration = Duration::from_secs(60);
/// A target that holds more has a leak: its device has 256 KiB.
const MEMORY_MIB: u32 = 512;
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
    /// Only the targets whose name contains one of these
    names: Vec<String>,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    setup::run()?;
    let mut good = true;
    for (name, outcome) in run(arguments.seconds, &arguments.names)? {
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

/// Fuzzes each target whose name has one of `names` in it, or all; what each came to.
///
/// # Errors
/// When they cannot be built.
pub fn run(seconds: u64, names: &[String]) -> Result<Vec<(String, Result<()>)>> {
    let folder = places::root().join("agent/fuzz");
    let targets: Vec<_> = targets(&folder)?
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
            .args(["build", "--quiet", "--release", "--target", TRIPLE])
            .arg("--manifest-path")
            .arg(folder.join("Cargo.toml"))
            .env("CARGO_TARGET_DIR", products.join("target"))
            .env("RUSTFLAGS", INSTRUMENTATION.join(" "))
            .env("RUSTC_BOOTSTRAP", "1");
        process::read(&mut cargo, BUILD)
    })?;
    let built = products.join("target").join(TRIPLE).join("release");
    let mut outcomes = Vec::new();
    for name in targets {
        let outcome = say::step(&format!("fuzz {name} for {seconds} s"), || {
            fuzz(&name, &built, &products, &folder, seconds)
        });
        outcomes.push((name, outcome));
    }
    Ok(outcomes)
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

fn fuzz(name: &str, built: &Path, products: &Path, folder: &Path, seconds: u64) -> Result<()> {
    let made = |kind: &str| -> Result<PathBuf> {
        let path = products.join(kind).join(name);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(path)
    };
    let (corpus, artifacts) = (made("corpus")?, made("artifacts")?);
    let mut target = Command::new(built.join(name));
    target
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg("-timeout=10")
        .arg("-print_final_stats=1")
        .arg(format!("-artifact_prefix={}/", artifacts.display()));
    let seeds = folder.join("corpus").join(name);
    if seeds.exists() {
        target.arg(seeds);
    }
    process::read(&mut target, Duration::from_secs(seconds) + GRACE)
        .map(drop)
        .with_context(|| {
            format!(
                "the input that did it is in {}; run {} on it",
                artifacts.display(),
                built.join(name).display()
            )
        })
}

//! `cargo xtask test`: what every change must pass, in one go; what CI runs.
//!
//! Checks of the text first (format, clippy, manifests), then all tests on this
//! machine's own kernel, then one VM a kernel for what this machine's kernel
//! lacks, and the fuzz targets for a moment each, if there is time. With `--all`
//! the VMs also run the long campaigns. A failure never keeps the rest from
//! running. The last line sums up: "N passed, N failed".

mod boot;
mod stages;
mod tally;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};

use crate::vm::Kernel;
use crate::{build, deploy, fuzz, lint, places, process, say, setup, suite};
use stages::Program;
use tally::Tally;

/// All tests on the machine, without their compilation.
const MACHINE: Duration = Duration::from_secs(1800);
/// Fuzzing begins before so much has gone, or not at all: CI ends a run after 90
/// minutes, and where everything was slow so far, so is the build it needs.
const FUZZ_BEFORE: Duration = Duration::from_secs(55 * 60);
/// How long each target is fuzzed: all of them take two minutes.
const FUZZ_SECONDS: u64 = 30;
/// Targets that are fuzzed at a time.
const FUZZ_JOBS: u8 = 2;

/// Which of the tests to run; all, when nothing is said.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only what runs on this machine's own kernel
    #[arg(long, conflicts_with = "vm")]
    machine: bool,
    /// Only what runs in VMs
    #[arg(long)]
    vm: bool,
    /// Only the VMs of this kernel: 6.12, 6.1, or custom (`cargo xtask kernel`),
    /// which runs only when it is asked for
    #[arg(long)]
    kernel: Option<Kernel>,
    /// Also the VM programs that run only when they are asked for
    #[arg(long, conflicts_with = "machine")]
    all: bool,
    /// Only the VM programs whose name contains one of these
    #[arg(requires = "vm")]
    names: Vec<String>,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    let begin = Instant::now();
    setup::run()?;
    let _products = if places::in_ci() {
        Some(shared_products()?)
    } else {
        None
    };
    let mut tally = Tally::default();
    if !arguments.vm {
        machine(&mut tally)?;
    }
    if !arguments.machine {
        vms(arguments, &mut tally)?;
    }
    if !arguments.vm {
        if begin.elapsed() < FUZZ_BEFORE {
            fuzzing(&mut tally);
        } else {
            say::note("nothing was fuzzed, for want of time: cargo xtask fuzz");
        }
    }
    for name in tally.failures() {
        println!("{} {name}", say::bad("FAILED"));
    }
    say::note(&format!("in {}", say::duration(begin.elapsed())));
    println!("{tally}");
    Ok(if tally.good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// CI's checkouts share one folder of build products, so one run at a time uses
/// it; and cargo compares modification times, which in a checkout made before
/// another's build are too old for their difference to be seen.
fn shared_products() -> Result<File> {
    let lock = places::lock("products.lock", || {
        say::note("another CI run uses the build products; waiting for it");
    })?;
    let mut list = Command::new("git");
    list.args(["ls-files", "-z"]).current_dir(places::root());
    let files = process::read(&mut list, Duration::from_secs(60)).context("list the sources")?;
    let now = SystemTime::now();
    for name in files.trim_end().split('\0').filter(|name| !name.is_empty()) {
        let path = places::root().join(name);
        let touched = File::options()
            .append(true)
            .open(&path)
            .and_then(|f| f.set_modified(now));
        touched.with_context(|| format!("touch {}", path.display()))?;
    }
    Ok(lock)
}

fn machine(tally: &mut Tally) -> Result<()> {
    say::title("Checks");
    tally.check("cargo fmt --check", lint::format());
    tally.check("cargo clippy", lint::clippy());
    if lint::can_check_licences()? {
        tally.check("cargo deny", lint::licences());
    }
    tally.check("manifests in deploy/", deploy::check());
    say::title("Tests on this machine");
    if fs::metadata("/proc/self")?.uid() != 0 {
        say::note("not root: tests that need loop devices and mounts will fail");
    }
    if let Err(failure) = build::cargo_step("build the tests", &["test", "--workspace", "--no-run"])
    {
        tally.check("build the tests", Err(failure));
        return Ok(());
    }
    let mut text = String::new();
    let ended = say::step("cargo test --workspace", || {
        let mut cargo = build::cargo()?;
        cargo.args(["test", "--workspace", "--no-fail-fast"]);
        process::stream(&mut cargo, MACHINE, &mut |line| {
            text.push_str(line);
            text.push('\n');
        })
    })?;
    let success = ended.status.is_some_and(|status| status.success());
    if !success {
        println!("{text}");
    }
    tally.libtest("cargo test --workspace", &text, success);
    tally.check("iscsi-test-cu", suite::libiscsi::check());
    Ok(())
}

fn fuzzing(tally: &mut Tally) {
    say::title("Fuzzing");
    match fuzz::run(FUZZ_SECONDS, FUZZ_JOBS, &[]) {
        Ok(outcomes) => {
            for (name, outcome) in outcomes {
                tally.check(&format!("fuzz {name}"), outcome.map(drop));
            }
        }
        Err(failure) => tally.check("build the fuzz targets", Err(failure)),
    }
}

fn vms(arguments: &Arguments, tally: &mut Tally) -> Result<()> {
    let built = build::programs(false).and_then(|_| build::tests());
    let binaries = match built {
        Ok(binaries) => binaries,
        Err(failure) => {
            tally.check("build for the VMs", Err(failure));
            return Ok(());
        }
    };
    let library = stages::library(&binaries)?;
    let wanted = |program: &Program| match &arguments.names[..] {
        [] => arguments.all || !program.asked,
        names => names.iter().any(|part| program.name.contains(part)),
    };
    for (kernel, mut programs) in stages::programs(&binaries)? {
        programs.retain(&wanted);
        if is_asked(arguments.kernel.as_ref(), &kernel) && !programs.is_empty() {
            boot::run(&kernel, &programs, &library, tally)?;
        }
    }
    Ok(())
}

/// Whether the VMs of a kernel are to run, when `only` was asked for.
fn is_asked(only: Option<&Kernel>, kernel: &Kernel) -> bool {
    only.map_or(kernel.is_usual(), |only| only == kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_kernel_boots_only_when_it_is_asked_for() {
        assert!(is_asked(None, &Kernel::V6_1) && is_asked(None, &Kernel::V6_12));
        assert!(!is_asked(None, &Kernel::Custom));
        assert!(is_asked(Some(&Kernel::Custom), &Kernel::Custom));
        assert!(!is_asked(Some(&Kernel::Custom), &Kernel::V6_12));
    }
}

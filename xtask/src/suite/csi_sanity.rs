//! csi-sanity against `drover standalone`, with real attaches, in a VM.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::report::Report;
use crate::vm::{self, Kernel, VmSpec};
use crate::{build, places, say, setup};

/// What the guest does: a pool, drover, csi-sanity.
const SCRIPT: &str = include_str!("../../../agent/tests/vm/csi_sanity.sh");
/// About 80 specs, each with an attach or two, under emulation.
const LIMIT: Duration = Duration::from_secs(1800);
const MEMORY_MIB: u32 = 3072;

/// How csi-sanity runs.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print the totals and the skips as one JSON object on the last line
    #[arg(long)]
    json: bool,
    /// 6.12, 6.1, or the path of a kernel image
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// Run only the specs that match this regular expression
    #[arg(long, value_name = "REGEXP")]
    focus: Option<String>,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    setup::run()?;
    let drover = build::programs(false)?.join("drover");
    say::title(&format!(
        "csi-sanity in a VM with Linux {}",
        arguments.kernel.name()
    ));
    let scratch = places::Scratch::new("csi-sanity")?;
    let results = text(scratch.path())?;
    let script = scratch.path().join("csi_sanity.sh");
    fs::write(&script, SCRIPT).with_context(|| format!("write {}", script.display()))?;
    let command = vec!["bash".to_owned(), text(&script)?];
    let mut spec = VmSpec::new(arguments.kernel.clone(), LIMIT, command);
    spec.memory_mib = MEMORY_MIB;
    spec.writable.push(scratch.path().to_owned());
    spec.environment = vec![
        ("DROVER".into(), text(&drover)?),
        (
            "CSI_SANITY".into(),
            text(&places::tools()?.join(setup::CSI_SANITY))?,
        ),
        ("FOCUS".into(), arguments.focus.clone().unwrap_or_default()),
        ("RESULTS".into(), results),
    ];
    let outcome = vm::run(&spec, &mut |line| println!("{line}"))?;
    let path = scratch.path().join("report.json");
    let Ok(report) = fs::read_to_string(&path) else {
        bail!(
            "csi-sanity left no report: {}; logs: {}",
            outcome.describe(),
            scratch.path().display()
        );
    };
    let report = Report::read(&report).with_context(|| format!("read {}", path.display()))?;
    for failure in &report.failures {
        println!("{} {failure}", say::bad("FAILED"));
    }
    for skip in &report.skips {
        println!("{} {skip}", say::faint("skipped"));
    }
    let (run, passed) = (report.run, report.passed);
    println!(
        "{run} run: {passed} passed, {} failed, {} skipped",
        report.failed, report.skipped
    );
    let good = report.failed == 0 && report.passed > 0 && outcome.success();
    if good {
        scratch.remove()?;
    } else {
        say::note(&format!(
            "{}; logs: {}",
            outcome.describe(),
            scratch.path().display()
        ));
    }
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn text(path: &Path) -> Result<String> {
    Ok(path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?
        .to_owned())
}

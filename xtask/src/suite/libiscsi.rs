//! libiscsi's test tool against drover's iSCSI target, on this machine.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::{build, places, process, say, setup};

const TARGET: &str = "iqn.2026-11.io.drover:suite";
const INITIATORS: [&str; 2] = [
    "iqn.2026-11.io.drover:initiator-1",
    "iqn.2026-11.io.drover:initiator-2",
];
/// Blocks enough for every test, and few enough for those that fill the end of it.
const SIZE: u64 = 100 << 20;
/// 230 tests; some wait for answers that must not come.
const LIMIT: Duration = Duration::from_secs(1200);
const START: Duration = Duration::from_secs(20);

/// What tests say that skip, and how many lines of it there are at most. Each is
/// explained in docs/iscsi-conformance.md; a skip that is none of these fails the run.
const EXPLAINED: [(&str, usize); 13] = [
    ("--allow-sanitize flag is not set", 11),
    ("EXTENDEDCOPY is not implemented", 10),
    ("RECEIVECOPYRESULT is not implemented", 3),
    ("RECEIVE_COPY_RESULTS is not implemented", 3),
    ("WRITEATOMIC16 is not implemented", 11),
    ("LBPPB < 2", 5),
    ("WRITESAME10 does not support 0-blocks", 1),
    ("WRITESAME16 does not support 0-blocks", 1),
    ("Logical unit is not removable", 8),
    ("Media is not removable", 1),
    ("Logical unit is not write-protected", 1),
    ("READDEFECTDATA10 is not implemented", 2),
    ("READDEFECTDATA12 is not implemented", 2),
];

/// How the tool runs.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print the totals and the skips as one JSON object on the last line
    #[arg(long)]
    json: bool,
    /// Run only these: FAMILY[.SUITE[.TEST]]
    #[arg(long, value_name = "NAME", default_value = "ALL")]
    tests: String,
}

/// The sum of a run.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Tests that ran.
    pub run: u64,
    /// Of them, those that passed, as the tool counts: one that skips passes.
    pub passed: u64,
    /// Of them, those that failed.
    pub failed: u64,
    /// Lines that say that something was skipped.
    pub skipped: u64,
    /// Those lines.
    pub skips: Vec<String>,
    /// Of them, those that nobody has explained.
    pub unexplained: Vec<String>,
    /// What the failed ones said.
    pub failures: Vec<String>,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    setup::run()?;
    let report = run(&arguments.tests)?;
    for failure in &report.failures {
        println!("{} {failure}", say::bad("FAILED"));
    }
    for skip in &report.skips {
        println!("{} {skip}", say::faint("skipped"));
    }
    for skip in &report.unexplained {
        println!("{} skipped without a reason: {skip}", say::bad("FAILED"));
    }
    let (run, passed) = (report.run, report.passed);
    println!(
        "{run} run: {passed} passed, {} failed; {} lines say that something was skipped",
        report.failed, report.skipped
    );
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(if report.good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs everything as one check of `cargo xtask test`.
pub fn check() -> Result<()> {
    let report = run("ALL")?;
    if !report.good() {
        bail!(
            "{} of {} tests failed: {}; skipped without a reason: {}",
            report.failed,
            report.run,
            report.failures.join("; "),
            report.unexplained.join("; ")
        );
    }
    Ok(())
}

fn run(tests: &str) -> Result<Report> {
    let folder = build::programs(false)?;
    say::title("libiscsi's test tool");
    let scratch = places::Scratch::new("libiscsi")?;
    let (target, portals) = Target::start(&folder.join("examples/iscsi_target"), scratch.path())?;
    let mut tool = Command::new("iscsi-test-cu");
    tool.args(["--dataloss", "--fail", "--normal", "--test", tests])
        .args(["--initiator-name", INITIATORS[0]])
        .args(["--initiator-name-2", INITIATORS[1]]);
    for portal in &portals {
        tool.arg(format!("iscsi://{portal}/{TARGET}/0"));
    }
    let mut text = String::new();
    let ended = say::step("iscsi-test-cu", || {
        process::stream(&mut tool, LIMIT, &mut |line| {
            text.push_str(line);
            text.push('\n');
        })
    })?;
    drop(target);
    let report = Report::read(&text);
    if let (Some(report), true) = (report, ended.status.is_some()) {
        if report.good() {
            scratch.remove()?;
        }
        return Ok(report);
    }
    bail!(
        "iscsi-test-cu left no summary; logs: {}\n{}",
        scratch.path().display(),
        process::tail(&text)
    );
}

/// The target's process, ended when this is dropped.
struct Target(Child);

impl Target {
    fn start(program: &Path, scratch: &Path) -> Result<(Self, [String; 2])> {
        let disk = scratch.join("disk");
        let file = File::create(&disk).with_context(|| format!("create {}", disk.display()))?;
        file.set_len(SIZE)?;
        let log = File::create(scratch.join("target.log"))?;
        let portals = [portal()?, portal()?];
        let mut command = Command::new(program);
        command.arg("--file").arg(&disk).args(["--iqn", TARGET]);
        for portal in &portals {
            command.args(["--listen", portal]);
        }
        for initiator in INITIATORS {
            command.args(["--initiator", initiator]);
        }
        command
            .arg("--reservations")
            .arg(scratch.join("reservations"));
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut this = Self(child);
        this.wait(&portals[0])?;
        Ok((this, portals))
    }

    fn wait(&mut self, portal: &str) -> Result<()> {
        let output = self.0.stdout.take().context("its output is a pipe")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let begin = Instant::now();
        while TcpStream::connect(portal).is_err() {
            if begin.elapsed() > START || self.0.try_wait()?.is_some() {
                bail!("the target does not listen at {portal}; it said {line:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        process::end(&mut self.0);
    }
}

/// An address of this machine that nobody listens at.
fn portal() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr()?.to_string())
}

impl Report {
    /// Reads what the tool printed; none when it did not come to its summary.
    pub fn read(text: &str) -> Option<Self> {
        let mut report = Self::default();
        let mut summed = false;
        for line in text.lines() {
            if let Some((_, skip)) = line.split_once("[SKIPPED]") {
                report.skips.push(skip.trim().to_owned());
            }
            if line.starts_with("Suite ") && line.ends_with("had failures:") {
                report
                    .failures
                    .push(line.trim_end_matches(" had failures:").to_owned());
            }
            // "  tests    230    230    230      0        0"
            let words: Vec<&str> = line.split_whitespace().collect();
            if let ["tests", _, run, passed, failed, ..] = words[..] {
                report.run = run.parse().ok()?;
                report.passed = passed.parse().ok()?;
                report.failed = failed.parse().ok()?;
                summed = true;
            }
        }
        report.skipped = u64::try_from(report.skips.len()).ok()?;
        report.unexplained = unexplained(&report.skips);
        summed.then_some(report)
    }

    /// Whether something ran, nothing failed, and each skip has its reason.
    pub fn good(&self) -> bool {
        let passed = self.run > 0 && self.failed == 0 && self.passed == self.run;
        passed && self.unexplained.is_empty()
    }
}

/// The skips that are none of [`EXPLAINED`], or more than there are of it.
fn unexplained(skips: &[String]) -> Vec<String> {
    let mut left = EXPLAINED;
    let new = |skip: &&String| {
        let mut known = left.iter_mut();
        match known.find(|(begin, count)| skip.starts_with(begin) && *count > 0) {
            Some((_, count)) => {
                *count -= 1;
                false
            }
            None => true,
        }
    };
    skips.iter().filter(new).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
Suite CompareAndWrite, Test Simple had failures:
    1. test_compareandwrite_simple.c:71  - CU_ASSERT_EQUAL(_r,0)    [SKIPPED] LBPPB < 2. Skipping test
    [SKIPPED] ORWRITE is not implemented.

Run Summary:    Type  Total    Ran Passed Failed Inactive
              suites     51     51    n/a      0        0
               tests    230    230    229      1        0
             asserts   3000   3000   2999      1      n/a
";

    #[test]
    fn totals_skips_and_failures_are_read() {
        let report = Report::read(OUTPUT).unwrap();
        assert_eq!((report.run, report.passed, report.failed), (230, 229, 1));
        assert_eq!(report.skipped, 2);
        assert_eq!(report.skips[1], "ORWRITE is not implemented.");
        assert_eq!(report.failures, ["Suite CompareAndWrite, Test Simple"]);
        assert_eq!(report.unexplained, ["ORWRITE is not implemented."]);
        assert!(!report.good());
    }

    #[test]
    fn a_skip_needs_a_reason_each_time() {
        let passed = |skips: &str| {
            let text = format!("{skips}\n tests 230 230 230 0 0\n");
            Report::read(&text).unwrap()
        };
        let known = "[SKIPPED] Media is not removable. Skipping test";
        assert!(passed(known).good());
        let twice = passed(&format!("{known}\n{known}"));
        assert_eq!(twice.unexplained.len(), 1);
        assert!(!twice.good());
        assert!(!passed("[SKIPPED] something new").good());
    }

    #[test]
    fn a_run_without_a_summary_is_none() {
        assert_eq!(Report::read("Suite"), None);
    }
}

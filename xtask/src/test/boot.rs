//! One VM that runs many programs, one after the other.
//!
//! A driver script in the guest runs each under its own limit, says `ok NAME
//! (ms)` or `FAILED NAME` with what the program printed, and goes on. What
//! counts is the record that it writes to a folder of the machine: a program
//! without an entry there did not run, because the VM went down under it or
//! under one before it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::stages::Program;
use super::tally::Tally;
use crate::vm::{self, Kernel, VmSpec, quoted};
use crate::{places, say};

const DRIVER: &str = include_str!("driver.sh");
const MEMORY_MIB: u32 = 4096;
/// Asks for longer campaigns (docs/testing.md).
const LONG: &str = "DROVER_VM_LONG";

/// Runs the programs in one VM of that kernel and counts them; `library` is the
/// library's test binary, which scripts may use too.
///
/// # Errors
/// When the VM cannot be started at all.
pub fn run(kernel: &Kernel, programs: &[Program], library: &str, tally: &mut Tally) -> Result<()> {
    say::title(&format!("Tests in a VM with Linux {}", kernel.name()));
    let scratch = places::Scratch::new(&format!("test-{}", kernel.name()))?;
    let folder = scratch.path();
    let script = folder.join("driver.sh");
    fs::write(&script, driver(programs)).with_context(|| format!("write {}", script.display()))?;
    let outcome = vm::run(&spec(kernel, programs, library, folder)?, &mut |line| {
        println!("{line}")
    })?;
    let record = Record::read(folder);
    let mut sound = true;
    for (number, program) in programs.iter().enumerate() {
        let name = format!("{} on {}", program.name, kernel.name());
        let Some(code) = record.status(number) else {
            tally.fail(&format!("{name}: did not end ({})", outcome.describe()));
            sound = false;
            continue;
        };
        sound &= code == 0;
        if program.libtest {
            let log = fs::read(folder.join(format!("{number}.log"))).unwrap_or_default();
            tally.libtest(&name, &String::from_utf8_lossy(&log), code == 0);
        } else if code == 0 {
            tally.pass();
        } else {
            tally.fail(&name);
        }
    }
    say::note(&format!("Linux {}: {}", kernel.name(), outcome.describe()));
    if sound && outcome.success() {
        return scratch.remove();
    }
    say::note(&format!("logs: {}", folder.display()));
    Ok(())
}

fn spec(kernel: &Kernel, programs: &[Program], library: &str, folder: &Path) -> Result<VmSpec> {
    let script = path_text(&folder.join("driver.sh"))?;
    let limit: Duration = programs.iter().map(|program| program.timeout).sum();
    let command = vec!["bash".to_owned(), script];
    let mut spec = VmSpec::new(kernel.clone(), limit + Duration::from_secs(60), command);
    spec.memory_mib = MEMORY_MIB;
    spec.writable.push(folder.to_owned());
    let products = places::target()?.join("debug");
    let build = path_text(&products)?;
    spec.environment = vec![
        ("DROVER".into(), format!("{build}/drover")),
        ("DROVER_BUILD".into(), build),
        ("DROVER_TESTS".into(), library.to_owned()),
        ("DROVER_RECORD".into(), path_text(folder)?),
    ];
    // Scripts that can go on for longer do so when they see it.
    if let Ok(long) = std::env::var(LONG) {
        spec.environment.push((LONG.into(), long));
    }
    Ok(spec)
}

fn path_text(path: &Path) -> Result<String> {
    Ok(path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?
        .to_owned())
}

/// The driver script with a line for each program.
fn driver(programs: &[Program]) -> String {
    let mut script = String::from(DRIVER);
    for (number, program) in programs.iter().enumerate() {
        let words: Vec<String> = program.command.iter().map(|word| quoted(word)).collect();
        script.push_str(&format!(
            "run {number} {} {} {}\n",
            quoted(&program.name),
            program.timeout.as_secs(),
            words.join(" ")
        ));
    }
    script.push_str("exit $failed\n");
    script
}

/// The guest's record: a line a program, "number status milliseconds".
struct Record {
    statuses: BTreeMap<usize, i32>,
}

impl Record {
    fn read(folder: &Path) -> Self {
        let text = fs::read_to_string(folder.join("record")).unwrap_or_default();
        let statuses = text.lines().filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
        });
        Self {
            statuses: statuses.collect(),
        }
    }

    /// The exit status of a program; none when it did not run to its end.
    fn status(&self, number: usize) -> Option<i32> {
        self.statuses.get(&number).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn program(name: &str, script: &str) -> Program {
        Program {
            name: name.into(),
            command: vec!["sh".into(), "-c".into(), script.into()],
            timeout: Duration::from_secs(20),
            libtest: false,
            asked: false,
        }
    }

    #[test]
    fn the_driver_goes_on_after_a_failure_and_records_each() {
        let folder = std::env::temp_dir().join(format!("drover-driver-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let programs = [
            program("first", "echo it\\'s \"$RESULTS\""),
            program("breaks", "echo why; exit 7"),
            program("last", "true"),
        ];
        let script = folder.join("driver.sh");
        fs::write(&script, driver(&programs)).unwrap();
        let output = Command::new("bash")
            .arg(&script)
            .env("DROVER_RECORD", &folder)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let record = Record::read(&folder);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(
            [0, 1, 2, 3].map(|n| record.status(n)),
            [Some(0), Some(7), Some(0), None]
        );
        assert_eq!(output.status.code(), Some(1));
        assert!(text.contains("ok first ("), "{text}");
        assert!(
            text.contains("why\n") && text.contains("FAILED breaks (status 7"),
            "{text}"
        );
        assert!(text.contains("ok last ("), "{text}");
    }
}

//! What runs in a VM, and on which kernels.
//!
//! Two sources. [`LIBRARY`] lists parts of drover's own test binary that are
//! worth running on another kernel too. And every script in `agent/tests/vm`
//! runs: it says in comments at its head where, and for how long at most:
//!
//! ```sh
//! # kernels: 6.1 6.12      (6.12 alone, when it does not say; custom: the test kernel)
//! # timeout: 300           (seconds; 600, when it does not say)
//! # asked: 6.1              (kernels on which it runs only by its name, or with --all)
//! ```
//!
//! A script runs as root in the checkout's root, read-only, and finds
//!
//! - `DROVER`: the drover binary; `DROVER_BUILD`: its folder, with the rig and `examples/` in it;
//! - `DROVER_TESTS`: the library's test binary;
//! - `RESULTS`: a folder of its own that outlives the VM;
//! - `TMPDIR`: a folder in the VM's memory (no O_DIRECT there before 6.6);
//! - loop, nvme-tcp, dm-mod and xfs loaded, lo up, tracefs, bpffs and cgroup2 mounted.
//!
//! It passes when it exits with 0. Its output is shown when it does not.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::build::TestBinary;
use crate::places;
use crate::vm::Kernel;

const SCRIPTS: &str = "agent/tests/vm";
const TIMEOUT: Duration = Duration::from_secs(600);

/// (modules of the library's tests, kernels).
const LIBRARY: &[(&str, &[Kernel])] = &[
    ("evidence::", &[Kernel::V6_1, Kernel::V6_12, Kernel::Custom]),
    ("reactor::tests::barrier", &[Kernel::V6_1, Kernel::V6_12]),
];

/// A program that a VM runs.
#[derive(Debug, PartialEq, Eq)]
pub struct Program {
    /// Its name in reports.
    pub name: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// How long it may run.
    pub timeout: Duration,
    /// Whether it is a Rust test binary, whose own tests are counted.
    pub libtest: bool,
    /// Whether it runs only when it is asked for, by its name or with all others.
    pub asked: bool,
}

/// All programs by the kernel they run on, so that each kernel boots once.
pub fn programs(binaries: &[TestBinary]) -> Result<BTreeMap<Kernel, Vec<Program>>> {
    let mut found: BTreeMap<Kernel, Vec<Program>> = BTreeMap::new();
    let library = library(binaries)?;
    for (filter, kernels) in LIBRARY {
        for kernel in *kernels {
            found.entry(kernel.clone()).or_default().push(Program {
                name: format!("tests {filter}"),
                command: vec![library.clone(), (*filter).to_owned()],
                timeout: TIMEOUT,
                libtest: true,
                asked: false,
            });
        }
    }
    for (name, text) in scripts(&places::root().join(SCRIPTS))? {
        let head = Head::read(&text).with_context(|| format!("read {SCRIPTS}/{name}"))?;
        for kernel in head.kernels {
            let asked = head.asked.contains(&kernel);
            found.entry(kernel).or_default().push(Program {
                name: name.clone(),
                command: vec!["bash".into(), format!("{SCRIPTS}/{name}")],
                timeout: head.timeout,
                libtest: false,
                asked,
            });
        }
    }
    Ok(found)
}

/// The path of the library's test binary.
pub fn library(binaries: &[TestBinary]) -> Result<String> {
    let binary = binaries
        .iter()
        .find(|binary| binary.library && binary.name == "drover");
    let binary = binary.context("cargo built no test binary of drover's library")?;
    let path = binary.path.to_str();
    Ok(path
        .with_context(|| format!("{} is not UTF-8", binary.path.display()))?
        .to_owned())
}

/// Names and texts of the scripts, in order.
fn scripts(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    if !folder.exists() {
        return Ok(found);
    }
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    for entry in entries {
        let path = entry
            .with_context(|| format!("list {}", folder.display()))?
            .path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if name.ends_with(".sh") {
            let text = fs::read_to_string(&path);
            let text = text.with_context(|| format!("read {}", path.display()))?;
            found.insert(name.to_owned(), text);
        }
    }
    Ok(found)
}

/// What a script says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    kernels: Vec<Kernel>,
    timeout: Duration,
    asked: Vec<Kernel>,
}

impl Head {
    fn read(text: &str) -> Result<Self> {
        let mut head = Self {
            kernels: vec![Kernel::V6_12],
            timeout: TIMEOUT,
            asked: Vec::new(),
        };
        let kernels = |line: &str, names: &str| -> Result<Vec<Kernel>> {
            let kernels = names.split_whitespace().map(|name| name.parse::<Kernel>());
            let kernels: Vec<_> = kernels
                .collect::<Result<_, _>>()
                .map_err(|wrong| anyhow::anyhow!(wrong))?;
            if kernels.is_empty() {
                bail!("{line:?} names no kernel");
            }
            Ok(kernels)
        };
        for line in text.lines().take_while(|line| line.starts_with('#')) {
            if let Some(names) = line.strip_prefix("# kernels:") {
                head.kernels = kernels(line, names)?;
            } else if let Some(names) = line.strip_prefix("# asked:") {
                head.asked = kernels(line, names)?;
            } else if let Some(seconds) = line.strip_prefix("# timeout:") {
                let seconds = seconds.trim().parse();
                let seconds =
                    seconds.with_context(|| format!("{line:?} is no count of seconds"))?;
                head.timeout = Duration::from_secs(seconds);
            }
        }
        Ok(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_says_where_it_runs_and_for_how_long() {
        let head = Head::read("#!/bin/bash\n# kernels: 6.1 6.12\n# timeout: 30\necho\n").unwrap();
        assert_eq!(head.kernels, [Kernel::V6_1, Kernel::V6_12]);
        assert_eq!(head.timeout, Duration::from_secs(30));
        assert_eq!(Head::read("# asked: 6.1\n").unwrap().asked, [Kernel::V6_1]);
        let plain = Head::read("#!/bin/bash\necho\n# kernels: 6.1\n").unwrap();
        assert_eq!(
            plain,
            Head {
                kernels: vec![Kernel::V6_12],
                timeout: TIMEOUT,
                asked: Vec::new()
            }
        );
    }

    #[test]
    fn a_head_that_makes_no_sense_is_refused() {
        for head in [
            "# kernels:",
            "# kernels: 5.0",
            "# asked: why",
            "# timeout: soon",
        ] {
            assert!(Head::read(head).is_err(), "{head}");
        }
    }
}

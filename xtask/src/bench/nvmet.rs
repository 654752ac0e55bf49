//! drover's NVMe/TCP target beside the kernel's own, in one VM with one kernel
//! initiator: the script does the work, its lines are read here.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::plan::IN_VM;
use super::report::Figure;
use crate::vm::{self, Kernel, VmSpec};
use crate::{places, say};

const SCRIPT: &str = "xtask/bench/nvmet.sh";
/// What a line with a value begins with; then figure, side and value.
const VALUE: &str = "value ";
/// Set-up, and the start of each fio, under emulation.
const MARGIN: Duration = Duration::from_secs(300);
const EACH: Duration = Duration::from_secs(20);
const MEMORY_MIB: u32 = 3072;
/// On a file, beside those on a block device: drover's target and the kernel's.
const ON_FILE: [&str; 2] = ["drover-file", "nvmet-file"];

/// Runs the script in a VM and adds its figures.
///
/// # Errors
/// When the VM or the script failed, or a figure is missing.
pub fn run(build: &Path, runs: u16, seconds: f64, figures: &mut Vec<Figure>) -> Result<()> {
    let measurements = u32::from(runs) * 4 * u32::try_from(IN_VM.len())?;
    let each = EACH + Duration::from_secs_f64(seconds);
    let mut spec = VmSpec::new(
        Kernel::V6_12,
        MARGIN + each * measurements,
        vec!["bash".into(), SCRIPT.into()],
    );
    spec.memory_mib = MEMORY_MIB;
    let depths: Vec<String> = IN_VM
        .iter()
        .map(|(name, depth)| format!("{name}:{depth}"))
        .collect();
    let target = build.join("examples/nvme_target");
    let target = target.to_str().context("the build's path is not UTF-8")?;
    spec.environment = vec![
        ("TARGET".into(), target.to_owned()),
        ("RUNS".into(), runs.to_string()),
        // fio counts whole seconds.
        ("SECONDS_EACH".into(), seconds.ceil().to_string()),
        ("FIGURES".into(), depths.join(" ")),
    ];
    say::note("booting a VM with Linux 6.12 (emulated): compare its values with each other only");
    let mut values = Values::default();
    let outcome = vm::run(&spec, &mut |line| values.take_or_print(line))?;
    for (figure, _) in IN_VM {
        let of = |side: &str| values.of(figure, side);
        let on_file = format!("{figure}_on_file");
        let [drover_file, nvmet_file] = ON_FILE;
        let found = [
            Figure::of(figure, "IOPS", &of("drover"), "nvmet", &of("nvmet")),
            Figure::of(
                &on_file,
                "IOPS",
                &of(drover_file),
                nvmet_file,
                &of(nvmet_file),
            ),
        ];
        if found.iter().any(Option::is_none) {
            bail!("no values for {figure}: {}", outcome.describe());
        }
        figures.extend(found.into_iter().flatten());
    }
    if !outcome.success() {
        bail!(
            "{SCRIPT}: {}; logs of VMs: {}",
            outcome.describe(),
            places::cache()?.display()
        );
    }
    Ok(())
}

/// Values by figure and side.
#[derive(Default)]
pub struct Values(BTreeMap<(String, String), Vec<f64>>);

impl Values {
    /// Takes a script's line with a value, and shows every other.
    pub fn take_or_print(&mut self, line: &str) {
        match line.strip_prefix(VALUE) {
            Some(value) => self.take(value),
            None => println!("  {line}"),
        }
    }

    fn take(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [figure, side, value] = words[..]
            && let Ok(value) = value.parse()
        {
            let key = (figure.to_owned(), side.to_owned());
            self.0.entry(key).or_default().push(value);
        }
    }

    /// The values of a figure's side.
    pub fn of(&self, figure: &str, side: &str) -> Vec<f64> {
        let key = (figure.to_owned(), side.to_owned());
        self.0.get(&key).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_gathered_by_figure_and_side() {
        let mut values = Values::default();
        for line in [
            "a drover 10",
            "a drover 12.5",
            "a nvmet 9",
            "a drover",
            "a drover x",
        ] {
            values.take(line);
        }
        assert_eq!(values.of("a", "drover"), [10.0, 12.5]);
        assert_eq!(values.of("a", "nvmet"), [9.0]);
        assert!(values.of("b", "drover").is_empty());
    }
}

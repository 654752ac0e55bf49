//! What passed and what failed, over all kinds of tests.

use std::fmt;

use anyhow::Result;

use crate::say;

/// The sum of everything that ran.
#[derive(Default)]
pub struct Tally {
    passed: u64,
    failures: Vec<String>,
}

impl Tally {
    /// Counts one check, and says why it failed.
    pub fn check(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => self.passed += 1,
            Err(failure) => {
                say::error(&failure);
                self.fail(name);
            }
        }
    }

    /// Counts one that passed.
    pub fn pass(&mut self) {
        self.passed += 1;
    }

    /// Counts one that failed.
    pub fn fail(&mut self, name: &str) {
        self.failures.push(name.to_owned());
    }

    /// Counts the tests in what Rust test binaries printed. A run that failed
    /// without a failed test (it crashed, or was ended) is a failure of its own;
    /// so is one in which no test ran, since its filter no longer fits.
    pub fn libtest(&mut self, name: &str, output: &str, success: bool) {
        let passed: u64 = output.lines().filter_map(passed_in).sum();
        let failed: Vec<&str> = output.lines().filter_map(failed_test).collect();
        self.passed += passed;
        for test in &failed {
            self.fail(&format!("{name}: {test}"));
        }
        if failed.is_empty() && !success {
            self.fail(name);
        } else if failed.is_empty() && passed == 0 {
            self.fail(&format!("{name}: no test ran"));
        }
    }

    /// The names of what failed.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// Whether something ran, and nothing failed.
    pub fn good(&self) -> bool {
        self.failures.is_empty() && self.passed > 0
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failures.len())
    }
}

/// 12 of "test result: ok. 12 passed; 0 failed; 0 ignored; ...".
fn passed_in(line: &str) -> Option<u64> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    counts.split_once(" passed;")?.0.parse().ok()
}

/// `a::b` of "test a::b ... FAILED".
fn failed_test(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
running 3 tests
test a::fits ... ok
test a::breaks ... FAILED
test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out
test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out
";

    #[test]
    fn tests_are_summed_over_binaries() {
        let mut tally = Tally::default();
        tally.libtest("all", OUTPUT, false);
        assert_eq!(tally.to_string(), "7 passed, 1 failed");
        assert_eq!(tally.failures(), ["all: a::breaks"]);
        assert!(!tally.good());
    }

    #[test]
    fn a_crash_and_an_empty_run_are_failures() {
        let mut tally = Tally::default();
        tally.libtest("crash", "running 3 tests\n", false);
        tally.libtest(
            "empty",
            "test result: ok. 0 passed; 0 failed; 0 ignored\n",
            true,
        );
        assert_eq!(tally.failures(), ["crash", "empty: no test ran"]);
        assert!(!Tally::default().good());
    }
}

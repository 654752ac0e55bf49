//! `drover doctor`: whether this host can do what drover promises, a line for
//! each thing that it must have.
//!
//! It reads files and asks the agent for its metrics, nothing else: no device is
//! opened, no tool is run, nothing is changed, and no root is needed.

mod agent;
mod host;
mod rules;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::ensure;
use serde_json::json;

use super::args::Output;
use super::print::{outln, table};
use host::Host;

/// How well it is with one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// As it must be.
    Ok,
    /// drover works, with less than it promises.
    Warning,
    /// drover does not work here.
    Failed,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do; nothing where it is well.
    pub advice: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            found: found.into(),
            advice: String::new(),
        }
    }

    fn warning(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Warning,
            found: found.into(),
            advice: advice.into(),
        }
    }

    fn failed(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            state: State::Failed,
            ..Self::warning(name, found, advice)
        }
    }
}

/// Looks at this host and at its agent, and prints what was found.
///
/// # Errors
/// When a check has failed; with its name.
pub async fn run(
    metrics: SocketAddr,
    pool: Option<PathBuf>,
    output: &Output,
) -> anyhow::Result<()> {
    let looked = tokio::task::spawn_blocking(move || {
        let host = Host::here();
        let mut checks = host.checks(pool.as_deref());
        checks.extend(rules::checks(&host));
        checks.extend(agent::checks(metrics));
        checks
    });
    let checks = looked.await?;
    if output.json {
        for check in &checks {
            outln!(
                "{}",
                json!({
                    "check": check.name, "state": check.state.name(),
                    "found": check.found, "advice": check.advice,
                })
            );
        }
    } else {
        let row = |check: &Check| {
            vec![
                check.state.name().to_owned(),
                check.name.to_owned(),
                check.found.clone(),
            ]
        };
        let rows: Vec<_> = checks.iter().map(row).collect();
        table(&["STATE", "CHECK", "FOUND"], &rows);
        for check in checks.iter().filter(|check| check.state != State::Ok) {
            outln!("\n{}: {}", check.name, check.advice);
        }
    }
    let failed = checks.iter().filter(|check| check.state == State::Failed);
    let failed: Vec<_> = failed.map(|check| check.name).collect();
    ensure!(
        failed.is_empty(),
        "this host does not do: {}",
        failed.join(", ")
    );
    Ok(())
}

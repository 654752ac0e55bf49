//! `cargo xtask model`: the fence and grant protocol, model-checked.
//!
//! The model is a program of its own (xtask/model), since it is built on the
//! arbiter's code, which xtask is not. This builds and runs it.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::{build, places, process, setup};

/// What is searched.
#[derive(clap::Args)]
pub struct Arguments {
    /// Nodes that may hold the volume, 1 to 3
    #[arg(long, default_value_t = 3)]
    nodes: u8,
    /// The highest epoch that is decided, 1 to 4
    #[arg(long, default_value_t = 3)]
    epochs: u8,
    /// A search that takes longer ends then, and is not complete
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Only the searches whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Print each property of each search as one JSON object a line
    #[arg(long)]
    json: bool,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    setup::run()?;
    build::cargo_step("build the model", &["build", "--package", "model"])?;
    let mut model = Command::new(places::target()?.join("debug/model"));
    model
        .args(["--nodes", &arguments.nodes.to_string()])
        .args(["--epochs", &arguments.epochs.to_string()])
        .args(["--minutes", &arguments.minutes.to_string()])
        .args(arguments.only.iter().flat_map(|part| ["--only", part]))
        .args(arguments.json.then_some("--json"));
    let status = model
        .status()
        .with_context(|| format!("run {}", process::words(&model)))?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

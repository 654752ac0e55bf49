//! `cargo xtask build`, and where the products are.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::Result;
use serde::Deserialize;

use crate::{places, process, say, setup};

/// A cold build of everything on two busy cores stays well under this.
const COMPILE: Duration = Duration::from_secs(3600);

/// How drover is built.
#[derive(clap::Args)]
pub struct Arguments {
    /// With optimisation, for use and for benchmarks
    #[arg(long)]
    release: bool,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    setup::run()?;
    let folder = programs(arguments.release)?;
    say::note(&format!("{}", folder.join("drover").display()));
    Ok(ExitCode::SUCCESS)
}

/// cargo, with drover's PATH and target folder.
pub fn cargo() -> Result<Command> {
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(places::root())
        .env("CARGO_TARGET_DIR", places::target()?)
        .env("CARGO_TERM_COLOR", "never")
        .env("PATH", places::path()?);
    Ok(cargo)
}

/// Runs cargo with `arguments` as a step; what it says is shown when it fails.
pub fn cargo_step(what: &str, arguments: &[&str]) -> Result<String> {
    say::step(what, || process::read(cargo()?.args(arguments), COMPILE))
}

/// Builds drover, its examples and the rig, and gives the folder they are in.
pub fn programs(release: bool) -> Result<PathBuf> {
    // The whole workspace, as the tests: packages apart have other features, and
    // every dependency is compiled once more.
    let mut arguments = vec!["build", "--workspace", "--bins", "--examples"];
    if release {
        arguments.push("--release");
    }
    cargo_step(
        if release {
            "build drover (release)"
        } else {
            "build drover"
        },
        &arguments,
    )?;
    let folder = if release { "release" } else { "debug" };
    Ok(places::target()?.join(folder))
}

/// A test binary of the workspace.
pub struct TestBinary {
    /// Its target's name: `drover` for the library's own tests, else a file's
    /// name in agent/tests.
    pub name: String,
    /// Whether it is the library's.
    pub library: bool,
    /// Where it is.
    pub path: PathBuf,
}

#[derive(Deserialize)]
struct Message {
    reason: String,
    target: Option<Target>,
    executable: Option<PathBuf>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds the test binaries of drover.
pub fn tests() -> Result<Vec<TestBinary>> {
    let arguments = ["test", "--workspace", "--no-run", "--message-format=json"];
    let text = cargo_step("build the tests", &arguments)?;
    let found: Vec<TestBinary> = text.lines().filter_map(test_binary).collect();
    if found.is_empty() {
        anyhow::bail!("cargo test --no-run named no test binary");
    }
    Ok(found)
}

fn test_binary(line: &str) -> Option<TestBinary> {
    // Warnings of the compiler stand between the messages.
    let message: Message = serde_json::from_str(line).ok()?;
    let target = message.target?;
    if message.reason != "compiler-artifact" || !message.profile?.test {
        return None;
    }
    let library = target.kind.iter().any(|kind| kind == "lib");
    Some(TestBinary {
        name: target.name,
        library,
        path: message.executable?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_test_binaries_are_taken_from_cargos_messages() {
        let test = r#"{"reason":"compiler-artifact","target":{"name":"drover","kind":["lib"]},"profile":{"test":true},"executable":"/t/drover-1"}"#;
        let found = test_binary(test).unwrap();
        assert!(found.library);
        assert_eq!(
            (found.name.as_str(), found.path.to_str().unwrap()),
            ("drover", "/t/drover-1")
        );
        assert!(test_binary(&test.replace("true", "false")).is_none());
        assert!(test_binary("warning: unused").is_none());
        assert!(test_binary(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}

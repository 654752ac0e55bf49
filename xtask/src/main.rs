//! drover's developer commands.
//!
//! One file or folder a command. xtask reaches drover as its users do, by the
//! command line and the sockets, so it never waits for drover's own crates to
//! compile; and it needs little itself, so that `cargo xtask` starts at once.
//!
//! Order of reading: [`places`] says where things are, [`say`] how progress
//! looks, [`process`] how a program is run; [`vm`] boots a kernel, and
//! [`test`], [`suite`], [`demo`] and [`bench`] use it.

mod bench;
mod build;
mod demo;
mod deploy;
mod fuzz;
mod kernel;
mod lint;
mod model;
mod places;
mod process;
mod say;
mod setup;
mod suite;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// drover's developer commands.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install every prerequisite that is missing (Debian 12; asks for nothing)
    Setup,
    /// Build drover with its eBPF programs
    Build(build::Arguments),
    /// Check format, clippy, and the manifests in deploy/
    Lint,
    /// Set up, lint, and run every test, on this machine and in VMs; what CI runs
    Test(test::Arguments),
    /// Run a command in a VM with a Debian kernel; its exit status is passed on
    Vm(vm::Arguments),
    /// Build the test kernel that `--kernel custom` boots
    Kernel(kernel::Arguments),
    /// Run a conformance suite of others against drover
    #[command(subcommand)]
    Suite(suite::Suite),
    /// Measure drover beside others
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Fuzz every decoder and whole connections of both targets
    Fuzz(fuzz::Arguments),
    /// Search every state of the fence and grant protocol (model checking)
    Model(model::Arguments),
    /// Show a volume move from node to node while a backup holds it
    Demo(demo::Arguments),
}

fn main() -> ExitCode {
    let verb = Arguments::parse().command;
    let outcome = match verb {
        Verb::Setup => setup::command(),
        Verb::Build(arguments) => build::command(&arguments),
        Verb::Lint => lint::command(),
        Verb::Test(arguments) => test::command(&arguments),
        Verb::Vm(arguments) => vm::command(arguments),
        Verb::Kernel(arguments) => kernel::command(&arguments),
        Verb::Suite(suite) => suite::command(&suite),
        Verb::Bench(bench) => bench::command(&bench),
        Verb::Fuzz(arguments) => fuzz::command(&arguments),
        Verb::Model(arguments) => model::command(&arguments),
        Verb::Demo(arguments) => demo::command(&arguments),
    };
    outcome.unwrap_or_else(|error| {
        say::error(&error);
        ExitCode::FAILURE
    })
}

//! The `drover` binary: arguments, logging, and which part of drover runs.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tracing_subscriber::EnvFilter;

use drover::cli::args::{Command, Drover, Run};
use drover::cli::{backups, doctor, top, trace, verbs};
use drover::config::{Config, Options, Role};
use drover::{backup, daemon, initiator};

fn main() -> ExitCode {
    let drover = Drover::parse();
    match drover.command {
        Command::Child { args } => return initiator::child_main(args.into_iter()),
        Command::BackupWorker => return backup::worker_main(),
        _ => {}
    }
    match run(drover) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("drover: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(drover: Drover) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&drover.log)
        .with_context(|| format!("--log {}: no log filter", drover.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Runtime::new().context("start the runtime")?;
    let outcome = runtime.block_on(async {
        match drover.command {
            Command::Controller(run) => serve(run, Role::Controller).await,
            Command::Agent(run) => serve(run, Role::Agent).await,
            Command::Standalone(run) => serve(run, Role::Standalone).await,
            Command::Backup(verb) => backups::run(verb).await,
            Command::Restore(verb) => backups::restore(verb).await,
            Command::Doctor {
                metrics,
                pool,
                output,
            } => doctor::run(metrics, pool, &output).await,
            Command::Top {
                interval,
                count,
                output,
                agent,
            } => top::run(interval, count, &output, agent).await,
            Command::Trace {
                volume,
                interval,
                lasting,
                output,
                agent,
            } => trace::run(&volume, interval, lasting, &output, &agent).await,
            verb => verbs::run(verb).await,
        }
    });
    // A thread in a call that does not return must not keep the process from ending.
    runtime.shutdown_background();
    outcome
}

async fn serve(run: Run, role: Role) -> anyhow::Result<()> {
    let file = run
        .config
        .as_deref()
        .map(Options::read)
        .transpose()?
        .unwrap_or_default();
    let config = Config::resolve(run.options.over(file), role)?;
    daemon::run(config, role).await
}

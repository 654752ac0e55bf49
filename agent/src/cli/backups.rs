//! The verbs that follow a backup or a restore until it ends.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tonic::{Status, Streaming};

use super::args::{Agent, Backup, Controller, Output, Repository, Restore};
use super::print::{outln, size, table};
use super::verbs::refusal;
use crate::ids::VolumeId;
use crate::rpc::agent_client::{channel, within};
use crate::rpc::convert::span_message;
use crate::rpc::pb;
use crate::rpc::pb::node_client::NodeClient;

/// An ordinary answer is there within this.
const CALL: Duration = Duration::from_secs(10);
/// A backup that is told to stop has so long to reach a point from which it can go on.
const GRACE: Duration = Duration::from_secs(1);

impl Repository {
    fn message(&self, limit_upload: u64) -> anyhow::Result<pb::Repository> {
        let password = match &self.password_file {
            Some(file) => std::fs::read_to_string(file)
                .with_context(|| format!("read password file {}", file.display()))?
                .trim_end_matches(['\r', '\n'])
                .to_owned(),
            None => std::env::var("RESTIC_PASSWORD").map_err(|_| {
                anyhow!("no password: give --password-file or set RESTIC_PASSWORD, as for restic")
            })?,
        };
        if !self.repo.starts_with('/') {
            bail!(
                "--repo {}: give an absolute path on the home's host",
                self.repo
            );
        }
        Ok(pb::Repository {
            path: self.repo.clone(),
            password,
            limit_upload,
        })
    }
}

/// Runs a verb on backups.
///
/// # Errors
/// When it is refused, or the backup it follows failed.
pub async fn run(verb: Backup) -> anyhow::Result<()> {
    match verb {
        Backup::Create {
            volume,
            repository,
            limit_upload,
            detach,
            controller,
        } => {
            let repository = Some(repository.message(limit_upload)?);
            let request = pb::CreateBackupRequest {
                volume: volume.to_string(),
                repository,
            };
            let stream = controller.service().create_backup(request).await;
            let stream = controller.answer(stream)?;
            if detach {
                announce(stream).await
            } else {
                follow(stream, &controller).await
            }
        }
        Backup::Resume {
            ticket,
            detach,
            controller,
        } => {
            let request = pb::ResumeBackupRequest {
                ticket: ticket.to_string(),
            };
            let stream = controller.service().resume_backup(request).await;
            let stream = controller.answer(stream)?;
            if detach {
                announce(stream).await
            } else {
                follow(stream, &controller).await
            }
        }
        Backup::Stop { ticket, controller } => {
            outln!("{}", stop(ticket.as_str(), &controller).await?);
            Ok(())
        }
        Backup::List { output, controller } => list(&output, &controller).await,
        Backup::Register {
            volume,
            pid,
            cgroup,
            agent,
        } => register(&volume, pid, cgroup, &agent).await,
    }
}

/// Runs a restore and follows it.
///
/// # Errors
/// When it is refused or failed.
pub async fn restore(verb: Restore) -> anyhow::Result<()> {
    let request = pb::RestoreRequest {
        name: verb.name,
        repository: Some(verb.repository.message(0)?),
        repository_snapshot: verb.snapshot,
        home: verb.home.map(|h| h.to_string()).unwrap_or_default(),
    };
    let stream = verb.controller.service().restore(request).await;
    follow(verb.controller.answer(stream)?, &verb.controller).await
}

/// Prints the ticket of a stream and leaves it to itself.
async fn announce(mut stream: Streaming<pb::BackupProgress>) -> anyhow::Result<()> {
    let first = stream
        .message()
        .await
        .map_err(|status| anyhow!("{}", status.message()))?;
    let first = first.ok_or_else(|| anyhow!("the agent said nothing of the backup it started"))?;
    outln!("{}", first.ticket);
    Ok(())
}

/// Shows a stream's progress until it ends; Ctrl-C stops it where it can go on.
async fn follow(
    mut stream: Streaming<pb::BackupProgress>,
    controller: &Controller,
) -> anyhow::Result<()> {
    let bar = bar();
    let mut last: Option<pb::BackupProgress> = None;
    loop {
        let next = tokio::select! {
            next = stream.message() => next,
            interrupt = tokio::signal::ctrl_c() => {
                interrupt.context("wait for Ctrl-C")?;
                bar.abandon_with_message("stopping");
                let Some(last) = last else { bail!("interrupted before it began") };
                let outcome = stop(&last.ticket, controller).await?;
                bail!("{outcome}; `drover backup resume {}` lets it go on", last.ticket);
            }
        };
        match next {
            Ok(Some(progress)) => {
                show(&bar, &progress, last.is_none());
                last = Some(progress);
            }
            Ok(None) => break,
            Err(status) => return Err(lost(&bar, last.as_ref(), &status)),
        }
    }
    let Some(last) = last else {
        bail!("the agent said nothing of what it started")
    };
    finish(&bar, &last)
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let template = "{msg:12} [{bar:40}] {bytes}/{total_bytes}  {prefix}";
    let style = ProgressStyle::with_template(template).expect("the template above is valid");
    bar.set_style(style.progress_chars("=> "));
    bar
}

fn show(bar: &ProgressBar, progress: &pb::BackupProgress, first: bool) {
    if first {
        eprintln!("ticket {}", progress.ticket);
    }
    bar.set_length(progress.bytes_total);
    bar.set_position(progress.bytes_done);
    bar.set_message(progress.phase.clone());
    let eta = progress.eta.and_then(|eta| Duration::try_from(eta).ok());
    let eta = eta.map_or_else(
        || "-".into(),
        |eta| humantime::format_duration(Duration::from_secs(eta.as_secs())).to_string(),
    );
    bar.set_prefix(format!("{}/s  ETA {eta}", size(progress.bytes_per_second)));
}

fn finish(bar: &ProgressBar, last: &pb::BackupProgress) -> anyhow::Result<()> {
    bar.finish_and_clear();
    match last.phase.as_str() {
        "done" => {
            outln!(
                "{} {} done: {} read, {} uploaded, {} resumed",
                last.repository_snapshot,
                last.volume,
                size(last.bytes_done.saturating_sub(last.bytes_resumed)),
                size(last.bytes_uploaded),
                size(last.bytes_resumed),
            );
            Ok(())
        }
        "interrupted" => bail!(
            "stopped at {} of {}; `drover backup resume {}` lets it go on",
            size(last.bytes_done),
            size(last.bytes_total),
            last.ticket
        ),
        phase => bail!("{phase}: {}", last.error),
    }
}

fn lost(bar: &ProgressBar, last: Option<&pb::BackupProgress>, status: &Status) -> anyhow::Error {
    bar.finish_and_clear();
    match last {
        Some(last) => anyhow!(
            "lost sight of {}: {}; it goes on by itself, `drover backup resume {}` follows it again",
            last.ticket,
            status.message(),
            last.ticket
        ),
        None => anyhow!("{}", status.message()),
    }
}

async fn stop(ticket: &str, controller: &Controller) -> anyhow::Result<String> {
    let request = pb::InterruptBackupRequest {
        ticket: ticket.into(),
        grace: Some(span_message(GRACE)),
    };
    let answer = controller
        .service()
        .interrupt_backup(within(CALL, request))
        .await;
    Ok(controller.answer(answer)?.outcome)
}

async fn list(output: &Output, controller: &Controller) -> anyhow::Result<()> {
    let answer = controller
        .service()
        .list_streams(within(CALL, pb::Nothing {}))
        .await;
    let streams = controller.answer(answer)?.streams;
    if output.json {
        for s in &streams {
            let eta = s
                .eta
                .and_then(|eta| Duration::try_from(eta).ok())
                .map(|eta| eta.as_secs());
            outln!(
                "{}",
                json!({
                    "ticket": s.ticket, "volume": s.volume, "snapshot": s.snapshot, "phase": s.phase,
                    "bytes_total": s.bytes_total, "bytes_done": s.bytes_done,
                    "bytes_resumed": s.bytes_resumed, "bytes_uploaded": s.bytes_uploaded,
                    "bytes_uncommitted": s.bytes_uncommitted,
                    "bytes_per_second": s.bytes_per_second, "eta_seconds": eta,
                    "repository_snapshot": s.repository_snapshot, "error": s.error,
                })
            );
        }
        return Ok(());
    }
    let row = |s: &pb::BackupProgress| {
        let done = format!("{} of {}", size(s.bytes_done), size(s.bytes_total));
        let rate = format!("{}/s", size(s.bytes_per_second));
        vec![
            s.ticket.clone(),
            s.volume.clone(),
            s.phase.clone(),
            done,
            rate,
            s.error.clone(),
        ]
    };
    let rows: Vec<_> = streams.iter().map(row).collect();
    table(
        &["TICKET", "VOLUME", "PHASE", "DONE", "RATE", "ERROR"],
        &rows,
    );
    Ok(())
}

async fn register(
    volume: &VolumeId,
    pid: Option<u32>,
    cgroup: Option<String>,
    agent: &Agent,
) -> anyhow::Result<()> {
    use pb::register_reader_request::Reader;
    let reader = pid.map(Reader::Pid).or(cgroup.map(Reader::Cgroup));
    let request = pb::RegisterReaderRequest {
        volume: volume.to_string(),
        reader,
    };
    let answer = NodeClient::new(channel(&agent.agent.into()))
        .register_reader(within(CALL, request))
        .await;
    let answer = answer.map_err(|status| refusal("agent", agent.agent, &status))?;
    outln!("{}", answer.into_inner().ticket);
    Ok(())
}

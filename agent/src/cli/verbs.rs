//! The verbs that ask once and print the answer.

use std::fmt::Display;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use serde_json::json;
use tonic::Status;

use super::args::{Agent, Command, Controller, Node, Output, Snapshot, Volume};
use super::print::{ago, moment, outln, size, table};
use crate::ids::VolumeId;
use crate::rpc::agent_client::{channel, within};
use crate::rpc::controller_client::ControllerClient;
use crate::rpc::pb;
use crate::rpc::pb::node_client::NodeClient;

/// An ordinary answer is there within this.
pub(super) const CALL: Duration = Duration::from_secs(10);
/// An answer that clones or waits for a fence is there within this.
const LONG: Duration = Duration::from_secs(90);

/// A refusal as a person reads it: who refused, and its words.
pub fn refusal(who: &str, address: impl Display, status: &Status) -> anyhow::Error {
    match status.code() {
        tonic::Code::Unavailable if status.message().contains("connect") => anyhow!(
            "the {who} at {address} does not answer: is it running? (--{who} or DROVER_{} names another)",
            if who == "agent" {
                "AGENT_ADDRESS"
            } else {
                "CONTROLLER"
            }
        ),
        _ => anyhow!("{}", status.message()),
    }
}

impl Controller {
    /// The controller's service.
    pub fn service(&self) -> pb::controller_client::ControllerClient<tonic::transport::Channel> {
        ControllerClient::new(&self.controller).service()
    }

    /// The answer, or the refusal in words.
    ///
    /// # Errors
    /// When the controller refused or does not answer.
    pub fn answer<T>(&self, answer: Result<tonic::Response<T>, Status>) -> anyhow::Result<T> {
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| refusal("controller", &self.controller, &status))
    }
}

/// Runs a verb that asks once.
///
/// # Errors
/// When it is refused or nobody answers.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Volume(verb) => volume(verb).await,
        Command::Snapshot(verb) => snapshot(verb).await,
        Command::Node(verb) => node(verb).await,
        Command::Attach {
            volume,
            node,
            read_only,
            controller,
        } => {
            let (volume, node) = (volume.to_string(), node.to_string());
            let request = pb::AttachRequest {
                volume,
                node,
                read_only,
            };
            let answer = controller.service().attach(within(LONG, request)).await;
            outln!("epoch {}", controller.answer(answer)?.epoch);
            Ok(())
        }
        Command::Detach {
            volume,
            node,
            controller,
        } => {
            let node = node.map(|n| n.to_string()).unwrap_or_default();
            let request = pb::DetachRequest {
                volume: volume.to_string(),
                node,
            };
            let answer = controller.service().detach(within(CALL, request)).await;
            controller.answer(answer).map(drop)
        }
        Command::Tickets {
            volume,
            output,
            controller,
        } => tickets(volume.as_ref(), &output, &controller).await,
        Command::Events {
            wanted,
            output,
            controller,
        } => super::events::show(wanted, &output, &controller).await,
        Command::Holders {
            volume,
            output,
            agent,
        } => holders(&volume, &output, &agent).await,
        other => Err(anyhow!("{other:?} does not ask once")),
    }
}

async fn volume(verb: Volume) -> anyhow::Result<()> {
    match verb {
        Volume::Create {
            name,
            size,
            home,
            protocol,
            from_snapshot,
            from_volume,
            controller,
        } => {
            use pb::content::Source;
            let source = match (from_snapshot, from_volume) {
                (Some(snapshot), _) => Some(Source::Snapshot(snapshot.to_string())),
                (None, Some(volume)) => Some(Source::Volume(volume.to_string())),
                (None, None) => None,
            };
            let request = pb::NewVolume {
                name,
                size: size.0,
                content: Some(pb::Content { source }),
                home: home.map(|h| h.to_string()).unwrap_or_default(),
                protocol,
                ..Default::default()
            };
            let answer = controller
                .service()
                .create_volume(within(LONG, request))
                .await;
            outln!("{}", controller.answer(answer)?.volume);
        }
        Volume::List { output, controller } => {
            let answer = controller
                .service()
                .list_volumes(within(CALL, pb::Nothing {}))
                .await;
            let volumes = controller.answer(answer)?.volumes;
            let published = |v: &pb::Volume| {
                let workloads = v.tickets.iter().filter(|t| t.kind == "workload");
                workloads.map(|t| t.node.clone()).collect::<Vec<_>>()
            };
            if output.json {
                for v in &volumes {
                    outln!(
                        "{}",
                        json!({
                            "volume": v.volume, "name": v.name, "size": v.size, "home": v.home,
                            "epoch": v.epoch, "protocol": v.protocol, "published": published(v),
                        })
                    );
                }
                return Ok(());
            }
            let row = |v: &pb::Volume| {
                let (size, epoch) = (size(v.size), v.epoch.to_string());
                vec![
                    v.volume.clone(),
                    v.name.clone(),
                    size,
                    v.home.clone(),
                    epoch,
                    published(v).join(","),
                ]
            };
            let rows: Vec<_> = volumes.iter().map(row).collect();
            table(
                &["VOLUME", "NAME", "SIZE", "HOME", "EPOCH", "PUBLISHED"],
                &rows,
            );
        }
        Volume::Expand {
            volume,
            size,
            controller,
        } => {
            let request = pb::ExpandRequest {
                volume: volume.to_string(),
                size: size.0,
            };
            let answer = controller
                .service()
                .expand_volume(within(LONG, request))
                .await;
            outln!("{}", controller.answer(answer)?.size);
        }
        Volume::AcceptOldCopy { volume, controller } => {
            let request = pb::VolumeName {
                volume: volume.to_string(),
            };
            let answer = controller
                .service()
                .accept_old_copy(within(LONG, request))
                .await;
            outln!("closed up to epoch {}", controller.answer(answer)?.epoch);
        }
        Volume::AcceptUnsettled {
            volume,
            epoch,
            inside,
            controller,
        } => {
            let request = pb::AcceptUnsettledRequest {
                volume: volume.to_string(),
                epoch,
                inside,
            };
            let answer = controller
                .service()
                .accept_unsettled(within(LONG, request))
                .await;
            let ended = controller.answer(answer)?;
            outln!(
                "epoch {} has ended; {} commands were not waited for",
                ended.epoch,
                ended.unsettled
            );
        }
        Volume::Delete { volume, controller } => {
            let request = pb::VolumeName {
                volume: volume.to_string(),
            };
            let answer = controller
                .service()
                .delete_volume(within(LONG, request))
                .await;
            controller.answer(answer)?;
        }
    }
    Ok(())
}

async fn snapshot(verb: Snapshot) -> anyhow::Result<()> {
    match verb {
        Snapshot::Create {
            volume,
            name,
            controller,
        } => {
            let request = pb::NewSnapshot {
                volume: volume.to_string(),
                name,
            };
            let answer = controller
                .service()
                .create_snapshot(within(LONG, request))
                .await;
            outln!("{}", controller.answer(answer)?.snapshot);
        }
        Snapshot::List { output, controller } => {
            let answer = controller
                .service()
                .list_snapshots(within(CALL, pb::Nothing {}))
                .await;
            let snapshots = controller.answer(answer)?.snapshots;
            let taken = |s: &pb::SnapshotAnswer| {
                s.taken
                    .and_then(|t| SystemTime::try_from(t).ok())
                    .map(moment)
                    .unwrap_or_default()
            };
            if output.json {
                for s in &snapshots {
                    outln!(
                        "{}",
                        json!({
                            "snapshot": s.snapshot, "name": s.name, "volume": s.volume,
                            "size": s.size, "taken": taken(s), "home": s.home, "ready": s.ready,
                        })
                    );
                }
                return Ok(());
            }
            let row = |s: &pb::SnapshotAnswer| {
                vec![
                    s.snapshot.clone(),
                    s.name.clone(),
                    s.volume.clone(),
                    size(s.size),
                    taken(s),
                ]
            };
            let rows: Vec<_> = snapshots.iter().map(row).collect();
            table(&["SNAPSHOT", "NAME", "VOLUME", "SIZE", "TAKEN"], &rows);
        }
        Snapshot::Delete {
            snapshot,
            controller,
        } => {
            let request = pb::SnapshotName {
                snapshot: snapshot.to_string(),
            };
            let answer = controller
                .service()
                .delete_snapshot(within(LONG, request))
                .await;
            controller.answer(answer)?;
        }
    }
    Ok(())
}

async fn node(verb: Node) -> anyhow::Result<()> {
    match verb {
        Node::List { output, controller } => {
            let answer = controller
                .service()
                .list_nodes(within(CALL, pb::Nothing {}))
                .await;
            let nodes = controller.answer(answer)?.nodes;
            let seen = |n: &pb::NodeView| n.seen.and_then(|t| SystemTime::try_from(t).ok());
            if output.json {
                for n in &nodes {
                    outln!(
                        "{}",
                        json!({
                            "node": n.node, "agent": n.agent, "has_pool": n.has_pool,
                            "incarnation": n.incarnation, "lost": n.lost, "seen": seen(n).map(moment),
                        })
                    );
                }
                return Ok(());
            }
            let row = |n: &pb::NodeView| {
                let state = if n.lost { "lost" } else { "known" };
                let pool = if n.has_pool { "yes" } else { "no" };
                let seen = seen(n).map(ago).unwrap_or_default();
                vec![
                    n.node.clone(),
                    state.into(),
                    pool.into(),
                    n.agent.clone(),
                    seen,
                ]
            };
            let rows: Vec<_> = nodes.iter().map(row).collect();
            table(&["NODE", "STATE", "POOL", "AGENT", "SEEN"], &rows);
        }
        Node::Lost { node, controller } => {
            let request = pb::NodeName {
                node: node.to_string(),
            };
            let answer = controller.service().lose_node(within(LONG, request)).await;
            controller.answer(answer)?;
        }
    }
    Ok(())
}

async fn tickets(
    volume: Option<&VolumeId>,
    output: &Output,
    controller: &Controller,
) -> anyhow::Result<()> {
    let answer = controller
        .service()
        .list_volumes(within(CALL, pb::Nothing {}))
        .await;
    let mut rows = Vec::new();
    for v in controller.answer(answer)?.volumes {
        if volume.is_some_and(|wanted| wanted.as_str() != v.volume) {
            continue;
        }
        for t in v.tickets {
            let lease = t.lease.and_then(|lease| Duration::try_from(lease).ok());
            if output.json {
                outln!(
                    "{}",
                    json!({
                        "volume": v.volume, "ticket": t.ticket, "kind": t.kind, "node": t.node,
                        "owner": t.owner, "interruptible": t.interruptible,
                        "lease_seconds": lease.map(|l| l.as_secs()),
                    })
                );
                continue;
            }
            let lease = lease
                .map(|l| humantime::format_duration(Duration::from_secs(l.as_secs())).to_string());
            rows.push(vec![
                v.volume.clone(),
                t.ticket,
                t.kind,
                t.node,
                t.owner,
                lease.unwrap_or_else(|| "-".into()),
            ]);
        }
    }
    if !output.json {
        table(
            &["VOLUME", "TICKET", "KIND", "NODE", "OWNER", "LEASE"],
            &rows,
        );
    }
    Ok(())
}

async fn holders(volume: &VolumeId, output: &Output, agent: &Agent) -> anyhow::Result<()> {
    let request = pb::VolumeName {
        volume: volume.to_string(),
    };
    let answer = NodeClient::new(channel(&agent.agent.into()))
        .judge(within(CALL, request))
        .await;
    let judged = answer
        .map_err(|status| refusal("agent", agent.agent, &status))?
        .into_inner();
    if output.json {
        let holder = |h: &pb::Holder| {
            json!({
                "pid": h.pid, "name": h.name, "cgroup": h.cgroup, "writable": h.writable,
                "registered": h.registered, "last_read_ms": h.last_read_ms,
                "last_write_ms": h.last_write_ms, "read_bytes": h.read_bytes,
                "written_bytes": h.written_bytes,
            })
        };
        let holders: Vec<_> = judged.holders.iter().map(holder).collect();
        outln!(
            "{}",
            json!({
                "disk": judged.disk, "verdict": judged.verdict, "reason": judged.reason, "holders": holders,
            })
        );
        return Ok(());
    }
    outln!("{}: {}: {}", judged.disk, judged.verdict, judged.reason);
    let since = |ms: Option<u64>| match ms {
        Some(ms) => format!("{}.{} s ago", ms / 1000, ms % 1000 / 100),
        None => "never".into(),
    };
    let row = |h: &pb::Holder| {
        let mode = if h.writable { "writes" } else { "reads" };
        let backup = if h.registered { "backup" } else { "" };
        vec![
            h.pid.to_string(),
            h.name.clone(),
            mode.into(),
            backup.into(),
            since(h.last_read_ms),
            since(h.last_write_ms),
            h.cgroup.clone(),
        ]
    };
    let rows: Vec<_> = judged.holders.iter().map(row).collect();
    if !rows.is_empty() {
        table(
            &[
                "PID",
                "NAME",
                "CAN",
                "KNOWN AS",
                "LAST READ",
                "LAST WRITE",
                "CGROUP",
            ],
            &rows,
        );
    }
    Ok(())
}

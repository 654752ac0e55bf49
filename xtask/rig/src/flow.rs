//! What kubelet and the attach/detach controller do around one pod: the calls
//! in their order, as one step of a story.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, HOME};
use crate::csi::{Use, v1};

/// What must succeed does so within this. A process that was not let run for a
/// moment refuses by its own deadline, and is asked again.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A refused call is made again after this.
const AGAIN: Duration = Duration::from_millis(300);

/// Makes a call again and again until it succeeds, as kubelet and the sidecars do.
///
/// # Errors
/// With the last refusal, when none has succeeded within `deadline`.
pub async fn retried<T>(
    deadline: Duration,
    mut call: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        match call().await {
            Ok(answer) => return Ok(answer),
            Err(error) if start.elapsed() > deadline => {
                return Err(error.context(format!("not within {deadline:?}")));
            }
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
}

/// As [`retried`], within [`PATIENCE`]; tells also how long it took, refusals and all.
///
/// # Errors
/// As [`retried`].
pub async fn asked<T>(
    call: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Duration)> {
    let start = Instant::now();
    let answer = retried(PATIENCE, call).await?;
    Ok((answer, start.elapsed()))
}

/// A volume that a pod on `node` uses.
pub struct Attached {
    /// The volume.
    pub volume: String,
    /// The node.
    pub node: &'static str,
    /// Where it is staged.
    pub staging: PathBuf,
    /// Where the pod finds it.
    pub target: PathBuf,
}

/// Makes a volume on a's pool.
///
/// # Errors
/// When CreateVolume does not succeed.
pub async fn create(
    cluster: &Cluster,
    name: &str,
    mib: i64,
    use_as: Use,
    source: Option<v1::volume_content_source::Type>,
) -> anyhow::Result<String> {
    let controller = cluster.controller()?;
    let home = (HOME, cluster.protocol().name());
    let created = asked(async || {
        let answer = controller.create(name, mib << 20, use_as, home, source.clone());
        Ok(answer.await.ok("CreateVolume")?.0)
    });
    let (created, _) = created.await?;
    Ok(created
        .volume
        .ok_or_else(|| anyhow!("CreateVolume answered no volume"))?
        .volume_id)
}

/// Publishes, stages, and hands to a pod.
///
/// # Errors
/// When a call does not succeed.
pub async fn attach(
    cluster: &Cluster,
    volume: &str,
    node: &'static str,
    use_as: Use,
) -> anyhow::Result<Attached> {
    let (staging, target) = (
        cluster.staging(node, volume)?,
        cluster.target(node, volume)?,
    );
    let (controller, calls) = (cluster.controller()?, cluster.node(node)?);
    asked(async || {
        let answer = controller.publish(volume, node, use_as).await;
        answer.done("ControllerPublishVolume")
    })
    .await?;
    asked(async || {
        let answer = calls.stage(volume, &staging, use_as).await;
        answer.done("NodeStageVolume")
    })
    .await?;
    asked(async || {
        let answer = calls.publish(volume, &staging, &target, use_as).await;
        answer.done("NodePublishVolume")
    })
    .await?;
    Ok(Attached {
        volume: volume.into(),
        node,
        staging,
        target,
    })
}

/// Takes from the pod, unstages, and unpublishes. Returns how long the unpublish
/// took. That is not judged here: the controller itself refuses what takes longer
/// than it promises, and a story shows by order that something is not waited for.
///
/// # Errors
/// When a call does not succeed.
pub async fn detach(cluster: &Cluster, attached: &Attached) -> anyhow::Result<Duration> {
    let calls = cluster.node(attached.node)?;
    asked(async || {
        let answer = calls.unpublish(&attached.volume, &attached.target).await;
        answer.done("NodeUnpublishVolume")
    })
    .await?;
    asked(async || {
        let answer = calls.unstage(&attached.volume, &attached.staging).await;
        answer.done("NodeUnstageVolume")
    })
    .await?;
    // The sidecars are connected all the time: the call's time is its own.
    let (controller, _) = asked(async || cluster.controller()?.connected().await).await?;
    let ((), took) = asked(async || {
        let answer = controller.unpublish(&attached.volume, attached.node).await;
        answer.done("ControllerUnpublishVolume")
    })
    .await?;
    Ok(took)
}

/// Deletes a volume.
///
/// # Errors
/// When DeleteVolume does not succeed.
pub async fn delete(cluster: &Cluster, volume: &str) -> anyhow::Result<()> {
    let controller = cluster.controller()?;
    asked(async || controller.delete(volume).await.done("DeleteVolume"))
        .await
        .map(drop)
}

/// The JSON objects that a verb of drover's printed, one a line.
///
/// # Errors
/// When a line is none.
pub fn objects(lines: &str) -> anyhow::Result<Vec<Value>> {
    let objects = lines.lines().map(serde_json::from_str);
    objects
        .collect::<Result<_, _>>()
        .with_context(|| lines.to_owned())
}

/// A backup stream as `drover backup list` shows it.
///
/// # Errors
/// When it shows none of that ticket.
pub fn stream(cluster: &Cluster, ticket: &str) -> anyhow::Result<Value> {
    let streams = objects(&cluster.cli(["backup", "list", "--json"])?)?;
    let mut of_ticket = streams.iter().filter(|stream| stream["ticket"] == ticket);
    let found = of_ticket.next().cloned();
    found.ok_or_else(|| anyhow!("drover backup list does not show {ticket}: {streams:?}"))
}

/// Waits until a stream is in one of the phases, and returns it.
///
/// # Errors
/// When it is not within `deadline`.
pub async fn await_phase(
    cluster: &Cluster,
    ticket: &str,
    phases: &[&str],
    deadline: Duration,
) -> anyhow::Result<Value> {
    retried(deadline, async || {
        let stream = stream(cluster, ticket)?;
        let phase = stream["phase"].as_str().unwrap_or_default();
        ensure!(
            phases.contains(&phase),
            "the backup is not {phases:?}: {stream}"
        );
        Ok(stream)
    })
    .await
}

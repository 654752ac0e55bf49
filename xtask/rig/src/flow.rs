//! What kubelet and the attach/detach controller do around one pod: the calls
//! in their order, as one step of a story.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::csi::{Use, v1};

/// How long unpublish may take, whatever runs, hangs or is missing.
pub const UNPUBLISH: Duration = Duration::from_secs(1);

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
/// When CreateVolume fails.
pub async fn create(
    cluster: &Cluster,
    name: &str,
    mib: i64,
    use_as: Use,
    source: Option<v1::volume_content_source::Type>,
) -> anyhow::Result<String> {
    let created = cluster
        .controller()?
        .create(
            name,
            mib << 20,
            use_as,
            ("a", cluster.protocol().name()),
            source,
        )
        .await;
    let (created, _) = created.ok("CreateVolume")?;
    Ok(created
        .volume
        .ok_or_else(|| anyhow!("CreateVolume answered no volume"))?
        .volume_id)
}

/// Publishes, stages, and hands to a pod.
///
/// # Errors
/// When a call fails.
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
    cluster
        .controller()?
        .publish(volume, node, use_as)
        .await
        .ok("ControllerPublishVolume")?;
    let calls = cluster.node(node)?;
    calls
        .stage(volume, &staging, use_as)
        .await
        .ok("NodeStageVolume")?;
    calls
        .publish(volume, &staging, &target, use_as)
        .await
        .ok("NodePublishVolume")?;
    Ok(Attached {
        volume: volume.into(),
        node,
        staging,
        target,
    })
}

/// Takes from the pod, unstages, and unpublishes, which must answer within [`UNPUBLISH`].
/// Returns how long the unpublish took.
///
/// # Errors
/// When a call fails or unpublish is late.
pub async fn detach(cluster: &Cluster, attached: &Attached) -> anyhow::Result<Duration> {
    let calls = cluster.node(attached.node)?;
    calls
        .unpublish(&attached.volume, &attached.target)
        .await
        .ok("NodeUnpublishVolume")?;
    calls
        .unstage(&attached.volume, &attached.staging)
        .await
        .ok("NodeUnstageVolume")?;
    let answer = cluster
        .controller()?
        .unpublish(&attached.volume, attached.node)
        .await;
    let (_, took) = answer.ok("ControllerUnpublishVolume")?;
    ensure!(took <= UNPUBLISH, "ControllerUnpublishVolume took {took:?}");
    Ok(took)
}

/// A backup stream as `drover backup list` shows it.
///
/// # Errors
/// When it shows none of that ticket.
pub fn stream(cluster: &Cluster, ticket: &str) -> anyhow::Result<Value> {
    let text = cluster.cli(["backup", "list", "--json"])?;
    let mut streams = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    streams
        .find(|stream| stream["ticket"] == ticket)
        .ok_or_else(|| anyhow!("drover backup list does not show {ticket}: {text}"))
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
    let start = Instant::now();
    loop {
        let stream = stream(cluster, ticket)?;
        if stream["phase"]
            .as_str()
            .is_some_and(|phase| phases.contains(&phase))
        {
            return Ok(stream);
        }
        ensure!(
            start.elapsed() < deadline,
            "the backup is not {phases:?}: {stream}"
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

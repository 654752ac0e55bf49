//! The move itself, call by call, and where its time went.
//!
//! Every operation of a node writes into the journal how long each child of it
//! took in the kernel or in a tool. What remains of a call is drover's own, and
//! so is all of the controller's calls.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde_json::{Value, json};
use tonic::Code;

use super::checks::notes;
use super::{FS, OnA};
use crate::cluster::Cluster;
use crate::flow::{asked, objects, retried};
use crate::roles::now_ns;
use crate::timeline::{Timeline, ms, round};

/// A line of the journal is there so long after its operation, at most.
const WRITTEN: Duration = Duration::from_secs(60);

/// The volume as node b has it, and how it came there.
pub(super) struct Moved {
    /// The volume.
    pub volume: String,
    /// Where the pod on b finds it.
    pub target: PathBuf,
    /// Where it is staged on b.
    pub staging: PathBuf,
    /// ControllerUnpublishVolume from a.
    pub unpublish: Duration,
    /// ControllerPublishVolume to b.
    pub publish: Duration,
    /// NodeStageVolume on b.
    pub stage: Duration,
    /// From the publish to the first write, synced.
    pub publish_to_first_write: Duration,
    /// From the first call to the first write, synced.
    pub total: Duration,
    /// The calls, in order.
    pub steps: Vec<Step>,
    /// When b's grant was answered, on the kernel's monotonic clock.
    pub granted_ns: u64,
    /// The epoch that b has.
    pub granted_epoch: u64,
}

impl Moved {
    /// What of the total was neither the kernel's nor a tool's, in milliseconds.
    pub fn drover_ms(&self) -> f64 {
        ms(self.total) - self.steps.iter().map(Step::theirs_ms).sum::<f64>()
    }
}

/// One call of the move, or the first write after it.
pub(super) struct Step {
    call: &'static str,
    place: &'static str,
    took: Duration,
    /// What it did in the kernel or by a tool, and how many milliseconds that took.
    theirs: Vec<(String, f64)>,
}

impl Step {
    fn theirs_ms(&self) -> f64 {
        self.theirs.iter().map(|(_, ms)| ms).sum()
    }

    fn own_ms(&self) -> f64 {
        ms(self.took) - self.theirs_ms()
    }

    /// For the outcome's `steps`.
    pub fn json(&self) -> Value {
        let theirs = self.theirs.iter();
        let theirs: Vec<Value> = theirs
            .map(|(what, ms)| json!({ "what": what, "ms": round(*ms) }))
            .collect();
        json!({
            "call": self.call,
            "place": self.place,
            "ms": round(ms(self.took)),
            "drover_ms": round(self.own_ms()),
            "kernel_and_tools": theirs,
        })
    }

    /// For a person.
    pub fn tell(&self, line: &Timeline) {
        let theirs = self.theirs.iter();
        let theirs: String = theirs
            .map(|(what, ms)| format!(", {what} {ms:.1}"))
            .collect();
        let text = format!("{}: drover {:.1}{theirs}", self.call, self.own_ms());
        line.step(self.place, &text, self.took);
    }
}

/// The calls as they are made: what each is called, where, and the kind of the
/// journal's line about it.
#[derive(Default)]
struct Calls(Vec<(&'static str, &'static str, Option<&'static str>, Duration)>);

impl Calls {
    fn made(
        &mut self,
        call: &'static str,
        place: &'static str,
        kind: Option<&'static str>,
        took: Duration,
    ) {
        self.0.push((call, place, kind, took));
    }

    /// The steps, once the journal has a line about every call that has one.
    async fn divided(&self, cluster: &Cluster, volume: &str) -> anyhow::Result<Vec<Step>> {
        let divided = retried(WRITTEN, async || {
            let notes = notes(cluster, volume)?;
            let steps = self.0.iter().map(|(call, place, kind, took)| {
                let theirs = match kind {
                    None => Vec::new(),
                    Some(kind) => notes
                        .iter()
                        .rev()
                        .find(|note| note["kind"] == *kind && note["node"] == *place)
                        .map(|note| kernel_and_tools(&note["detail"]))
                        .ok_or_else(|| anyhow!("the journal has no {kind} of node {place}"))?,
                };
                Ok(Step {
                    call,
                    place,
                    took: *took,
                    theirs,
                })
            });
            steps.collect()
        });
        divided.await
    }
}

/// The steps of a line of the journal that were the kernel's or a tool's.
fn kernel_and_tools(detail: &Value) -> Vec<(String, f64)> {
    let steps = detail["steps"].as_array().map(Vec::as_slice);
    let theirs = steps.unwrap_or_default().iter();
    theirs
        .filter(|step| step["kernel_or_tool"] == true)
        .filter_map(|step| Some((step["what"].as_str()?.to_owned(), step["ms"].as_f64()?)))
        .collect()
}

/// Takes the volume from a's pod, rogue and all, and gives it to b's.
pub(super) async fn move_to_b(
    cluster: &Cluster,
    on_a: &OnA,
    line: &Timeline,
) -> anyhow::Result<Moved> {
    let (controller, a, b) = (
        cluster.controller()?.connected().await?,
        cluster.node("a")?.connected().await?,
        cluster.node("b")?.connected().await?,
    );
    let volume = on_a.volume.clone();
    let (staging, target) = (
        cluster.staging("b", &volume)?,
        cluster.target("b", &volume)?,
    );
    let mut calls = Calls::default();
    let begun = Instant::now();
    let ((), took) = asked(async || {
        let answer = a.unpublish(&volume, &on_a.target).await;
        answer.done("NodeUnpublish on a")
    })
    .await?;
    line.step("a", "NodeUnpublishVolume", took);
    calls.made("NodeUnpublishVolume", "a", Some("node-unpublished"), took);
    let unstage = a.unstage(&volume, &on_a.staging).await;
    let took = unstage.took;
    let why = unstage.refused("NodeUnstage on a, with a rogue", Code::FailedPrecondition)?;
    line.step(
        "a",
        "NodeUnstageVolume is refused, as somebody writes:",
        took,
    );
    line.note("", &format!("  {why}"));
    calls.made("NodeUnstageVolume", "a", Some("unstage-refused"), took);
    let ((), unpublish) = asked(async || {
        let answer = controller.unpublish(&volume, "a").await;
        answer.done("ControllerUnpublish from a")
    })
    .await?;
    line.step("controller", "ControllerUnpublishVolume from a", unpublish);
    calls.made("ControllerUnpublishVolume", "controller", None, unpublish);

    let publishing = Instant::now();
    let ((), publish) = asked(async || {
        let answer = controller.publish(&volume, "b", FS).await;
        answer.done("ControllerPublish to b")
    })
    .await?;
    let granted_ns = now_ns()?;
    line.step(
        "controller",
        "ControllerPublishVolume to b: a is fenced, b is granted",
        publish,
    );
    calls.made("ControllerPublishVolume", "controller", None, publish);
    let ((), stage) = asked(async || {
        let answer = b.stage(&volume, &staging, FS).await;
        answer.done("NodeStage on b")
    })
    .await?;
    line.step("b", "NodeStageVolume: connect, fsck, mount", stage);
    calls.made("NodeStageVolume", "b", Some("staged"), stage);
    let ((), took) = asked(async || {
        let answer = b.publish(&volume, &staging, &target, FS).await;
        answer.done("NodePublish on b")
    })
    .await?;
    line.step("b", "NodePublishVolume", took);
    calls.made("NodePublishVolume", "b", Some("node-published"), took);
    let first = Instant::now();
    let mut file = File::create(target.join("first-write"))?;
    file.write_all(b"the workload is here\n")?;
    file.sync_all()?;
    let first_write = first.elapsed();
    let (total, publish_to_first_write) = (begun.elapsed(), publishing.elapsed());
    line.step("b", "first write, synced", first_write);

    let mut steps = calls.divided(cluster, &volume).await?;
    steps.push(Step {
        call: "first write",
        place: "b",
        took: first_write,
        theirs: vec![("write and sync".into(), ms(first_write))],
    });
    let (granted_epoch, _) = asked(async || epoch(cluster, &volume)).await?;
    Ok(Moved {
        volume,
        target,
        staging,
        unpublish,
        publish,
        stage,
        publish_to_first_write,
        total,
        steps,
        granted_ns,
        granted_epoch,
    })
}

/// The epoch that counts, as the controller shows it.
fn epoch(cluster: &Cluster, volume: &str) -> anyhow::Result<u64> {
    let volumes = objects(&cluster.cli(["volume", "list", "--json"])?)?;
    volumes
        .iter()
        .find(|shown| shown["volume"] == volume)
        .and_then(|shown| shown["epoch"].as_u64())
        .context("drover volume list shows no epoch")
}

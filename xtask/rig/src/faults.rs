//! Agents and controllers killed at bad moments, a store from yesterday, a
//! second owner, and what an operator mistypes.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use tonic::Code;

use crate::Place;
use crate::cluster::{Cluster, READY};
use crate::csi::Use;
use crate::flow::{Attached, asked, attach, create, delete, detach, retried};
use crate::roles::{Playing, checksum};
use crate::timeline::Timeline;

const FS: Use = Use::Fs("ext4");
const DATA_MIB: u64 = 4;
const KILLS: u32 = 10;
/// What a fault stopped goes on within this.
const RECOVERED: Duration = Duration::from_secs(30);

/// Tells every story; the first that goes otherwise ends it.
///
/// # Errors
/// When one goes otherwise.
pub async fn tell(place: &Place) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(place).await?;
    let line = Timeline::begin("Faults");
    let told = all(&mut cluster, &line).await;
    told.inspect_err(|_| eprintln!("{}", cluster.logs()))
}

async fn all(cluster: &mut Cluster, line: &Timeline) -> anyhow::Result<()> {
    killed_under_writes(cluster, "b", line)
        .await
        .context("home killed under b's writes")?;
    killed_under_writes(cluster, "a", line)
        .await
        .context("agent killed under its own volume")?;
    controller_killed_between_steps(cluster, line)
        .await
        .context("controller killed in a move")?;
    node_lost(cluster, line)
        .await
        .context("node declared lost")?;
    store_from_yesterday(cluster, line)
        .await
        .context("a store put back from an old copy")?;
    metrics_are_sound(cluster, line).context("metrics")?;
    second_owner(cluster, line).context("a second agent on the same pool")?;
    raw_block(cluster, line)
        .await
        .context("a raw block volume")?;
    mistyped(cluster, line)
        .await
        .context("what an operator mistypes")
}

/// The home's agent is killed ten times in a row while a workload writes: no
/// error reaches it, and its data is whole.
async fn killed_under_writes(
    cluster: &mut Cluster,
    node: &'static str,
    line: &Timeline,
) -> anyhow::Result<()> {
    let volume = create(cluster, &format!("pvc-killed-{node}"), 320, FS, None).await?;
    let attached = attach(cluster, &volume, node, FS).await?;
    let data = attached.target.join("data.bin");
    let workload = Playing::workload(&data, DATA_MIB, 3)?;
    for _ in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(300)).await;
        cluster.kill_agent("a")?;
        cluster.start_agent("a").await?;
    }
    let work = workload.finish()?;
    detach(cluster, &attached).await?;
    let other = if node == "a" { "b" } else { "a" };
    let moved = attach(cluster, &volume, other, FS).await?;
    ensure!(
        checksum(&moved.target.join("data.bin"))? == work.sha256,
        "the data differs"
    );
    detach(cluster, &moved).await?;
    delete(cluster, &volume).await?;
    let text = format!(
        "{KILLS} kills of the home's agent: {} writes, no error, data whole; longest write {} ms",
        work.written, work.longest_ms
    );
    line.note(node, &text);
    Ok(())
}

/// The controller is killed before each step of a move in turn; a retry completes it.
async fn controller_killed_between_steps(
    cluster: &mut Cluster,
    line: &Timeline,
) -> anyhow::Result<()> {
    let volume = create(cluster, "pvc-controller", 320, FS, None).await?;
    let mut here = attach(cluster, &volume, "a", FS).await?;
    let mut expected = {
        let workload = Playing::workload(&here.target.join("data.bin"), DATA_MIB, 4)?;
        workload.finish()?.sha256
    };
    for killed_before in 0..6 {
        let to = if here.node == "a" { "b" } else { "a" };
        here = move_with_a_kill(cluster, &here, to, killed_before).await?;
        let found = checksum(&here.target.join("data.bin"))?;
        ensure!(
            found == expected,
            "the data differs after a kill before step {killed_before}"
        );
        let workload = Playing::workload(&here.target.join("data.bin"), DATA_MIB, 5)?;
        expected = workload.finish()?.sha256;
    }
    detach(cluster, &here).await?;
    delete(cluster, &volume).await?;
    line.note(
        "controller",
        "killed before each of the six steps of a move: a retry completed it",
    );
    Ok(())
}

async fn move_with_a_kill(
    cluster: &mut Cluster,
    from: &Attached,
    to: &'static str,
    killed_before: u32,
) -> anyhow::Result<Attached> {
    let volume = from.volume.clone();
    let (staging, target) = (cluster.staging(to, &volume)?, cluster.target(to, &volume)?);
    for step in 0..6 {
        if step == killed_before {
            cluster.kill_controller()?;
            cluster.start_controller().await?;
        }
        let (old, new) = (cluster.node(from.node)?, cluster.node(to)?);
        let controller = cluster.controller()?;
        let made = retried(RECOVERED, async || match step {
            0 => old.unpublish(&volume, &from.target).await.done("unpublish"),
            1 => old.unstage(&volume, &from.staging).await.done("unstage"),
            2 => {
                let answer = controller.unpublish(&volume, from.node).await;
                answer.done("controller unpublish")
            }
            3 => {
                let answer = controller.publish(&volume, to, FS).await;
                answer.done("controller publish")
            }
            4 => new.stage(&volume, &staging, FS).await.done("stage"),
            _ => {
                let answer = new.publish(&volume, &staging, &target, FS).await;
                answer.done("publish")
            }
        });
        made.await.with_context(|| format!("step {step}"))?;
    }
    Ok(Attached {
        volume,
        node: to,
        staging,
        target,
    })
}

/// A node is declared lost with its volume attached: another node gets it at
/// once, and the lost one gets nothing until it is back clean.
async fn node_lost(cluster: &mut Cluster, line: &Timeline) -> anyhow::Result<()> {
    let volume = create(cluster, "pvc-lost", 320, FS, None).await?;
    let on_b = attach(cluster, &volume, "b", FS).await?;
    fs::write(on_b.target.join("file"), "x")?;
    nix::unistd::sync();
    let controller = cluster.controller()?;
    let held = controller.publish(&volume, "a", FS).await;
    let text = held.refused(
        "ControllerPublish to a, while b has it",
        Code::FailedPrecondition,
    )?;
    ensure!(text.contains('b'), "the refusal does not name b: {text}");
    cluster.kill_agent("b")?;
    cluster.cli(["node", "lost", "b"])?;
    let other = create(cluster, "pvc-lost-2", 320, FS, None).await?;
    let refused = controller.publish(&other, "b", FS).await;
    refused.refused("ControllerPublish to a lost node", Code::Unavailable)?;
    let on_a = attach(cluster, &volume, "a", FS).await?;
    ensure!(
        fs::read_to_string(on_a.target.join("file"))? == "x",
        "the data is not there"
    );
    detach(cluster, &on_a).await?;

    cluster.start_agent("b").await?;
    let node = cluster.node("b")?;
    asked(async || {
        let answer = node.unpublish(&volume, &on_b.target).await;
        answer.done("NodeUnpublish on the returned b")?;
        let answer = node.unstage(&volume, &on_b.staging).await;
        answer.done("NodeUnstage on the returned b")
    })
    .await?;
    let taken_back = retried(RECOVERED, async || {
        let answer = controller.publish(&other, "b", FS).await;
        answer.done("ControllerPublish")
    });
    taken_back.await.context("b is not taken back")?;
    asked(async || {
        let answer = controller.unpublish(&other, "b").await;
        answer.done("ControllerUnpublish from b")
    })
    .await?;
    for volume in [&volume, &other] {
        delete(cluster, volume).await?;
    }
    line.note(
        "b",
        "declared lost: its volume went to a at once; it is taken back once it is clean",
    );
    Ok(())
}

/// The store is put back as it was before two moves: the home's epoch is
/// learned, and the volume moves on.
async fn store_from_yesterday(cluster: &mut Cluster, line: &Timeline) -> anyhow::Result<()> {
    let volume = create(cluster, "pvc-yesterday", 320, FS, None).await?;
    let (state, copy) = (
        cluster.path("controller.redb"),
        cluster.path("yesterday.redb"),
    );
    cluster.kill_controller()?;
    fs::copy(&state, &copy)?;
    cluster.start_controller().await?;
    for node in ["a", "b"] {
        let attached = attach(cluster, &volume, node, FS).await?;
        fs::write(attached.target.join("file"), node)?;
        detach(cluster, &attached).await?;
    }
    cluster.kill_controller()?;
    fs::copy(&copy, &state)?;
    cluster.start_controller().await?;
    let attached = attach(cluster, &volume, "a", FS).await.context("stuck")?;
    ensure!(
        fs::read_to_string(attached.target.join("file"))? == "b",
        "the data is not b's"
    );
    detach(cluster, &attached).await?;
    delete(cluster, &volume).await?;
    line.note(
        "controller",
        "a store from before two moves: it learned the home's epoch and went on",
    );
    Ok(())
}

/// promtool finds no fault in what every process says of itself.
fn metrics_are_sound(cluster: &Cluster, line: &Timeline) -> anyhow::Result<()> {
    for process in ["controller", "a", "b"] {
        let text = cluster.metrics(process)?;
        ensure!(
            text.contains("# TYPE drover_"),
            "{process} has no metrics: {text}"
        );
        let mut promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start promtool")?;
        let stdin = promtool.stdin.take().context("promtool's stdin")?;
        std::io::Write::write_all(&mut { stdin }, text.as_bytes())?;
        let output = promtool.wait_with_output()?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "promtool on {process}: {words}");
    }
    line.note("controller", "promtool finds no fault in anybody's metrics");
    Ok(())
}

/// Another agent on the pool of a, and another on its CSI socket, are refused by name.
fn second_owner(cluster: &Cluster, line: &Timeline) -> anyhow::Result<()> {
    let pool = cluster.path("pool/drover").to_string_lossy().into_owned();
    let state = cluster.path("state-second").to_string_lossy().into_owned();
    let socket = cluster.path("second.sock").to_string_lossy().into_owned();
    let words = [
        "agent",
        "--node",
        "a",
        "--pool",
        &pool,
        "--state-dir",
        &state,
        "--csi-socket",
        &socket,
        "--agent-address",
        "127.0.0.1:9781",
        "--nvme-address",
        "127.0.0.1:4429",
        "--metrics-address",
        "127.0.0.1:9782",
        "--pool-lock-wait",
        "1s",
    ];
    let error = refused(cluster, &words)?;
    ensure!(
        error.contains(&pool),
        "the error does not name the pool: {error}"
    );
    line.note(
        "a",
        &format!("a second agent on the pool: {}", error.trim()),
    );

    let socket = cluster.path("b.sock").to_string_lossy().into_owned();
    let words = [
        "agent",
        "--node",
        "c",
        "--state-dir",
        &state,
        "--csi-socket",
        &socket,
        "--agent-address",
        "127.0.0.1:9781",
        "--metrics-address",
        "127.0.0.1:9782",
    ];
    let error = refused(cluster, &words)?;
    ensure!(
        error.contains("b.sock"),
        "the error does not name the socket: {error}"
    );
    line.note(
        "b",
        &format!("a second agent on the socket: {}", error.trim()),
    );
    Ok(())
}

/// Runs a drover that must refuse, and returns its last words.
fn refused(cluster: &Cluster, words: &[&str]) -> anyhow::Result<String> {
    let mut child = Command::new(cluster.drover())
        .args(words)
        .env("DROVER_LOG", "error")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > READY {
            child.kill()?;
            child.wait()?;
            return Err(anyhow!("drover {} was not refused", words.join(" ")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output()?;
    ensure!(
        !output.status.success(),
        "drover {} ended with success",
        words.join(" ")
    );
    let text = String::from_utf8_lossy(&output.stderr);
    Ok(text.lines().last().unwrap_or_default().to_owned())
}

/// A raw block volume: what a writes to its device, b reads from its own.
async fn raw_block(cluster: &Cluster, line: &Timeline) -> anyhow::Result<()> {
    let volume = create(cluster, "pvc-block", 64, Use::Block, None).await?;
    let on_a = attach(cluster, &volume, "a", Use::Block).await?;
    let device = OpenOptions::new().write(true).open(&on_a.target)?;
    device.write_all_at(b"drover", 1 << 20)?;
    device.sync_all()?;
    drop(device);
    detach(cluster, &on_a).await?;
    let on_b = attach(cluster, &volume, "b", Use::Block).await?;
    let mut found = [0; 6];
    File::open(&on_b.target)?.read_exact_at(&mut found, 1 << 20)?;
    ensure!(&found == b"drover", "b reads {found:?} from its device");
    detach(cluster, &on_b).await?;
    delete(cluster, &volume).await?;
    line.note("b", "a raw block volume moved with what was written to it");
    Ok(())
}

/// Requests that make no sense are refused by name, and lose nothing.
async fn mistyped(cluster: &Cluster, line: &Timeline) -> anyhow::Result<()> {
    let (controller, node) = (cluster.controller()?, cluster.node("b")?);
    let volume = create(cluster, "pvc-mistyped", 320, FS, None).await?;
    let nobody = controller.publish(&volume, "nobody", FS).await;
    nobody.refused("ControllerPublish to an unknown node", Code::NotFound)?;
    let staging = cluster.staging("b", &volume)?;
    let early = node.stage(&volume, &staging, FS).await;
    early.refused(
        "NodeStage before ControllerPublish",
        Code::FailedPrecondition,
    )?;
    controller
        .unpublish("vol-unknown", "b")
        .await
        .ok("ControllerUnpublish of an unknown volume")?;
    controller
        .unpublish(&volume, "nobody")
        .await
        .ok("ControllerUnpublish from an unknown node")?;
    controller
        .delete("../../etc")
        .await
        .ok("DeleteVolume of what cannot exist")?;
    let escaped = controller.publish("../../etc", "b", FS).await;
    escaped.refused("ControllerPublish of a path", Code::NotFound)?;
    let home = ("a", cluster.protocol().name());
    let huge = controller
        .create("pvc-huge", i64::MAX, FS, home, None)
        .await;
    ensure!(
        huge.answer
            .is_err_and(|s| matches!(s.code(), Code::OutOfRange | Code::ResourceExhausted)),
        "a volume beyond all capacity was made"
    );
    let negative = controller.create("pvc-negative", -1, FS, home, None).await;
    negative.refused("CreateVolume of a negative size", Code::InvalidArgument)?;
    delete(cluster, &volume).await?;
    line.note("controller", "what makes no sense was refused by name");
    Ok(())
}

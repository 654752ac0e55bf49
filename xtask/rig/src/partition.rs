//! The link to a node is cut while its workloads write. It is declared lost,
//! its volumes go elsewhere at once; when the link is whole again, what it still
//! had to write is refused, nothing of it hangs, and it is taken back.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use tonic::Code;

use crate::Place;
use crate::cluster::Cluster;
use crate::csi::Use;
use crate::flow::{Attached, asked, attach, create, detach, retried};
use crate::roles::holder::Held;
use crate::roles::{Playing, now_ns, stale};
use crate::timeline::{Timeline, ms};

const FS: Use = Use::Fs("ext4");
const MIB: i64 = 16;
const BLOCKS: u64 = 4096;
const FREE: u64 = 256;
/// The first of the two volumes is granted within this of their node's being
/// declared lost: it is what the controller would wait for that node at the least.
const GRANT: Duration = Duration::from_secs(1);
/// kubelet's call on a node that is cut off is answered within this.
const ANSWER: Duration = Duration::from_secs(20);
/// So long after the link is whole, the node has let go: Linux connects anew
/// each second, but what it sent into the cut it sends again ever more slowly.
const CLEAN: Duration = Duration::from_secs(120);
/// Nothing waits in the kernel for longer, once the node is clean.
const HANG: Duration = Duration::from_secs(5);

/// Tells the story.
///
/// # Errors
/// When it goes otherwise.
pub async fn tell(place: &Place) -> anyhow::Result<()> {
    let mut cluster = Cluster::start_apart(place).await?;
    let line = Timeline::begin("A node behind a cut link");
    let told = story(&mut cluster, &line).await;
    told.inspect_err(|_| eprintln!("{}", cluster.logs()))
}

/// What a holder of the raw volume is started with.
fn holder(cluster: &Cluster, device: &Path, number: u64) -> anyhow::Result<Playing> {
    let ledger = cluster.path("ledger").to_string_lossy().into_owned();
    let [blocks, free, number] = [BLOCKS, FREE, number].map(|number| number.to_string());
    let device = device.to_string_lossy();
    let words = ["holder", &device, "--ledger", &ledger, "--number", &number];
    Playing::start(&[&words[..], &["--blocks", &blocks, "--free", &free]].concat())
}

fn stale_writer(device: &Path, log: &Path) -> anyhow::Result<Playing> {
    let [blocks, free] = [BLOCKS, FREE].map(|number| number.to_string());
    let (device, log) = (device.to_string_lossy(), log.to_string_lossy());
    let words = ["stale", &device, "--log", &log];
    Playing::start(&[&words[..], &["--blocks", &blocks, "--free", &free]].concat())
}

async fn story(cluster: &mut Cluster, line: &Timeline) -> anyhow::Result<()> {
    let raw = create(cluster, "pvc-raw", MIB, Use::Block, None).await?;
    let files = create(cluster, "pvc-files", 320, FS, None).await?;
    let raw_b = attach(cluster, &raw, "b", Use::Block).await?;
    let files_b = attach(cluster, &files, "b", FS).await?;
    fs::write(files_b.target.join("file"), "of b")?;
    nix::unistd::sync();
    let log = cluster.path("stale");
    let stale_b = stale_writer(&raw_b.target, &log)?;
    let holder_b = holder(cluster, &raw_b.target, 1)?;
    tokio::time::sleep(Duration::from_secs(1)).await;

    cluster.link()?.cut()?;
    line.note("b", "its link is cut, under writes");
    tokio::time::sleep(Duration::from_secs(1)).await;
    stale_b.tell(Signal::SIGUSR2)?;

    let granted_ns = lost_and_granted(cluster, [(&raw, Use::Block), (&files, FS)], line).await?;
    // Published again: the same answer, and on to the node.
    let raw_a = attach(cluster, &raw, "a", Use::Block).await?;
    let files_a = attach(cluster, &files, "a", FS).await?;
    let holder_a = holder(cluster, &raw_a.target, 2)?;
    ensure!(
        fs::read_to_string(files_a.target.join("file"))? == "of b",
        "what b had synced is not there"
    );
    line.note(
        "a",
        "reads every block that b was told is written, and writes",
    );
    kubelet_asks(cluster, &raw_b, line).await?;

    cluster.link()?.join()?;
    let joined = Instant::now();
    line.note("b", "its link is whole again");
    comes_clean(cluster, [&raw_b, &files_b], [stale_b, holder_b], line).await?;
    line.step("b", "it has let go of everything", joined.elapsed());
    let late = stale::writes(&log)?;
    for write in &late {
        ensure!(
            write.error.is_some() || write.began_ns < granted_ns,
            "a stale write was taken after the grant: {write:?}"
        );
    }
    let refused = late.iter().filter(|write| write.error.is_some()).count();
    ensure!(refused > 0, "no stale write was refused");
    line.note(
        "b",
        &format!("{refused} late writes were refused, none was taken"),
    );

    let held: Held = holder_a.end().context("the holder on a")?;
    detach(cluster, &raw_a).await?;
    detach(cluster, &files_a).await?;
    let raw_b = retried(CLEAN, async || attach(cluster, &raw, "b", Use::Block).await).await?;
    let again: Held = holder(cluster, &raw_b.target, 3)?
        .end()
        .context("the holder on b again")?;
    detach(cluster, &raw_b).await?;
    let text = format!(
        "taken back; {} and {} blocks found as they must be, after {} and {} writes",
        held.verified, again.verified, held.written, again.written
    );
    line.note("b", &text);
    Ok(())
}

/// Declares b lost; the volumes must be granted to a without waiting for it.
async fn lost_and_granted(
    cluster: &Cluster,
    volumes: [(&str, Use); 2],
    line: &Timeline,
) -> anyhow::Result<u64> {
    let controller = cluster.controller()?.connected().await?;
    cluster.cli(["node", "lost", "b"])?;
    let declared = Instant::now();
    let granted = async |(volume, use_as): (&str, Use)| {
        asked(async || {
            let answer = controller.publish(volume, "a", use_as).await;
            answer.done("ControllerPublish to a")
        })
        .await?;
        let took = declared.elapsed();
        line.step("controller", "ControllerPublishVolume to a", took);
        anyhow::Ok(took)
    };
    // At once, as both are fenced at once: who waited for b would have both wait,
    // but what holds one up beside that is no matter.
    let [one, other] = volumes;
    let (one, other) = tokio::try_join!(granted(one), granted(other))?;
    let first = one.min(other);
    ensure!(first <= GRANT, "the first grant took {:.0} ms", ms(first));
    now_ns()
}

/// kubelet on the node that is cut off is answered, whatever hangs there.
async fn kubelet_asks(
    cluster: &Cluster,
    attached: &Attached,
    line: &Timeline,
) -> anyhow::Result<()> {
    let node = cluster.node("b")?;
    let begun = Instant::now();
    let unpublished = node.unpublish(&attached.volume, &attached.target).await;
    unpublished.ok("NodeUnpublish behind the cut")?;
    let unstaged = node.unstage(&attached.volume, &attached.staging).await;
    let took = begun.elapsed();
    let said = match unstaged.answer {
        Ok(_) => "OK".to_owned(),
        Err(status) => {
            ensure!(
                matches!(status.code(), Code::FailedPrecondition | Code::Unavailable),
                "NodeUnstage behind the cut: {status}"
            );
            status.message().to_owned()
        }
    };
    line.step("b", "kubelet is answered behind the cut", took);
    line.note("", &format!("  {said}"));
    ensure!(took < ANSWER, "that took {:.0} ms", ms(took));
    Ok(())
}

/// Waits until b's host has neither a device nor a process that waits for one.
async fn comes_clean(
    cluster: &Cluster,
    attached: [&Attached; 2],
    [stale, mut holder]: [Playing; 2],
    line: &Timeline,
) -> anyhow::Result<()> {
    retried(CLEAN, async || {
        ensure!(!holder.plays()?, "b's holder still waits");
        Ok(())
    })
    .await?;
    line.note("b", "its holder was told that its writes fail");
    drop(stale);
    retried(CLEAN, async || {
        let node = cluster.node("b")?;
        for attached in attached {
            let answer = node.unpublish(&attached.volume, &attached.target).await;
            answer.done("NodeUnpublish on b")?;
            let answer = node.unstage(&attached.volume, &attached.staging).await;
            answer.done("NodeUnstage on b")?;
        }
        Ok(())
    })
    .await?;
    let waits = waiting()?;
    tokio::time::sleep(HANG).await;
    let still: Vec<_> = waiting()?
        .into_iter()
        .filter(|process| waits.contains(process))
        .collect();
    ensure!(still.is_empty(), "these wait in the kernel: {still:?}");
    Ok(())
}

/// Processes in state D, by id and name (proc(5)); not the kernel's own.
fn waiting() -> anyhow::Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let folder = entry?.path();
        // One that ends meanwhile does not wait.
        let Ok(stat) = fs::read_to_string(folder.join("stat")) else {
            continue;
        };
        let own = fs::read(folder.join("cmdline")).unwrap_or_default();
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        if state == Some('D') && !own.is_empty() {
            found.push((folder, String::from_utf8_lossy(&own).into_owned()));
        }
    }
    Ok(found)
}

//! The home's disk takes writes and never answers them. A move waits for them
//! and says so; an operator says not to, with the line that was told; the next
//! node writes, while what would stop it is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use serde_json::Value;
use tonic::Code;

use crate::Place;
use crate::cluster::{Cluster, POOL_DISK, run};
use crate::csi::Use;
use crate::flow::{Attached, asked, attach, create, delete, detach, retried};
use crate::roles::{BLOCK, Playing, RogueWrite};
use crate::timeline::Timeline;

/// The volume's size. Its first [`HANGING`] blocks are what hangs.
const MIB: i64 = 16;
const HANGING: u64 = 1024;
/// Writers, each with one write at a time.
const WRITERS: u32 = 3;
/// What is waited for comes within this.
const SOON: Duration = Duration::from_secs(60);
/// Linux ends the old device within this: each of its tries of a command that
/// was inside has 30 s (drivers/nvme/host/core.c, nvme_io_timeout).
const LET_GO: Duration = Duration::from_secs(240);
const SECTORS: u64 = BLOCK as u64 / 512;

/// Tells the story.
///
/// # Errors
/// When it goes otherwise.
pub async fn tell(place: &Place) -> anyhow::Result<()> {
    let mut cluster = Cluster::start_mapped(place).await?;
    let line = Timeline::begin("A home's disk that hangs with writes inside");
    let told = story(&mut cluster, &line).await;
    told.inspect_err(|_| eprintln!("{}", cluster.logs()))
}

async fn story(cluster: &mut Cluster, line: &Timeline) -> anyhow::Result<()> {
    let volume = create(cluster, "pvc-unsettled", MIB, Use::Block, None).await?;
    let on_b = attach(cluster, &volume, "b", Use::Block).await?;
    fill(&on_b.target)?;
    let disk = Disk::of(cluster, &volume)?;
    let told = hung(cluster, line, &volume, &on_b, &disk).await;
    // Else an agent with a write inside never ends.
    if told.is_err() {
        disk.free()?;
    }
    told
}

async fn hung(
    cluster: &mut Cluster,
    line: &Timeline,
    volume: &str,
    on_b: &Attached,
    disk: &Disk,
) -> anyhow::Result<()> {
    let controller = cluster.controller()?;
    let mut stuck = Vec::new();
    for writer in 0..WRITERS {
        stuck.push(writer_at(cluster, &on_b.target, "b", u64::from(writer))?);
    }
    disk.hang()?;
    retried(SOON, async || disk.holds(WRITERS)).await?;
    line.note("a", "the home's disk answers no write any more");

    let ((), took) = asked(async || {
        let answer = controller.unpublish(volume, "b").await;
        answer.done("ControllerUnpublishVolume from b")
    })
    .await?;
    line.step("controller", "ControllerUnpublishVolume from b", took);
    // They are inside still, so it did not wait for them.
    disk.holds(WRITERS)?;
    let told = retried(SOON, async || {
        let answer = controller.publish(volume, "a", Use::Block).await;
        let text = answer.refused("ControllerPublishVolume to a", Code::Aborted)?;
        ensure!(text.contains("accept-unsettled"), "it says: {text}");
        Ok(text)
    })
    .await?;
    line.note("controller", &told);
    let (epoch, inside) = told_line(&told, volume)?;
    ensure!(inside == WRITERS, "{inside} are inside, of {WRITERS}");
    copies_are_refused(cluster, volume, inside).await?;

    wrong_words(cluster, volume, epoch, inside)?;
    let answer = say(cluster, volume, epoch, inside)?;
    line.note("operator", answer.trim());
    // Though the disk still hangs.
    let on_a = attach(cluster, volume, "a", Use::Block).await?;
    let next = writer_at(cluster, &on_a.target, "a", HANGING + 1)?;
    writes(cluster, "a", HANGING + 1, SOON).await?;
    line.note("a", "has the volume, and writes beside what hangs");
    receipt(cluster, volume, epoch, inside, line)?;
    copies_are_refused(cluster, volume, inside).await?;
    writes(cluster, "a", HANGING + 1, SOON).await?;
    line.note("a", "a snapshot and a growth are refused, and it writes on");

    disk.free()?;
    let snapshot = retried(SOON, async || {
        let answer = controller.snapshot(volume, "snap-after").await;
        Ok(answer.ok("CreateSnapshot when they have ended")?.0)
    })
    .await?;
    let snapshot = snapshot.snapshot.context("no snapshot in the answer")?;
    line.note("a", "the disk goes on: a snapshot is taken");
    drop((stuck, next));
    detach(cluster, &on_a).await?;
    retried(LET_GO, async || {
        let node = cluster.node("b")?;
        let answer = node.unpublish(volume, &on_b.target).await;
        answer.done("NodeUnpublish on b")?;
        let answer = node.unstage(volume, &on_b.staging).await;
        answer.done("NodeUnstage on b")
    })
    .await?;
    let answer = controller.delete_snapshot(&snapshot.snapshot_id).await;
    answer.done("DeleteSnapshot")?;
    delete(cluster, volume).await
}

/// Gives every block of a raw volume its place on the home's disk.
fn fill(device: &Path) -> anyhow::Result<()> {
    let of = format!("of={}", device.display());
    let count = format!("count={MIB}");
    let how = ["bs=1M", "oflag=direct", "conv=notrunc,fsync", "status=none"];
    let words = ["if=/dev/urandom", &of, &count].into_iter().chain(how);
    run("dd", words, []).map(drop)
}

fn log_of(cluster: &Cluster, node: &str, block: u64) -> PathBuf {
    cluster.path(&format!("writes-{node}-{block}"))
}

/// Writes one block of a node's device again and again, and each time waits for it.
fn writer_at(cluster: &Cluster, device: &Path, node: &str, block: u64) -> anyhow::Result<Playing> {
    let log = log_of(cluster, node, block);
    let (device, log) = (device.to_string_lossy(), log.to_string_lossy());
    let at = (block * BLOCK as u64).to_string();
    let words = ["rogue", &device, "--at", &at, "--blocks", "1", "--log"];
    Playing::start(&[&words[..], &[&log]].concat())
}

/// Waits until that writer has written ten times more, and was never refused.
async fn writes(
    cluster: &Cluster,
    node: &str,
    block: u64,
    deadline: Duration,
) -> anyhow::Result<()> {
    let done = || -> anyhow::Result<usize> {
        let text = fs::read_to_string(log_of(cluster, node, block)).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut count = 0;
        for line in whole.lines() {
            let write: RogueWrite = serde_json::from_str(line)?;
            ensure!(write.error.is_none(), "{write:?}");
            count += 1;
        }
        Ok(count)
    };
    let wanted = done()? + 10;
    retried(deadline, async || {
        let count = done()?;
        ensure!(count >= wanted, "{count} writes, of {wanted}");
        Ok(())
    })
    .await
}

/// The epoch and the number in the line that the refusal says to type.
fn told_line(refusal: &str, volume: &str) -> anyhow::Result<(u64, u32)> {
    let (_, typed) = refusal
        .split_once("drover volume accept-unsettled ")
        .context("no line to type")?;
    match *typed.split_whitespace().collect::<Vec<_>>() {
        [of, "--epoch", epoch, "--inside", inside] if of == volume => {
            Ok((epoch.parse()?, inside.parse()?))
        }
        _ => Err(anyhow!("it says to type {typed:?}")),
    }
}

/// The operator's word, by drover's command line.
fn say(cluster: &Cluster, volume: &str, epoch: u64, inside: u32) -> anyhow::Result<String> {
    let (epoch, inside) = (epoch.to_string(), inside.to_string());
    cluster.cli([
        "volume",
        "accept-unsettled",
        volume,
        "--epoch",
        &epoch,
        "--inside",
        &inside,
    ])
}

/// A word on fewer commands, or on another epoch, ends nothing, and says why.
fn wrong_words(cluster: &Cluster, volume: &str, epoch: u64, inside: u32) -> anyhow::Result<()> {
    let still = format!("{inside} commands are still inside the closed gate");
    let other = epoch + 1;
    let no_fence = format!("no fence of epoch {other} waits for commands here");
    for (epoch, inside, why) in [(epoch, inside - 1, still), (other, inside, no_fence)] {
        match say(cluster, volume, epoch, inside) {
            Ok(said) => return Err(anyhow!("--epoch {epoch} --inside {inside}: {said}")),
            Err(error) => {
                let text = format!("{error:#}");
                ensure!(text.contains(&why), "no {why:?} in {text:?}");
            }
        }
    }
    Ok(())
}

/// A snapshot and a growth are refused, and say why.
async fn copies_are_refused(cluster: &Cluster, volume: &str, inside: u32) -> anyhow::Result<()> {
    let controller = cluster.controller()?;
    let snapshot = controller.snapshot(volume, "snap-during").await;
    let snapshot = snapshot.refused("CreateSnapshot", Code::Aborted)?;
    let growth = controller.expand(volume, (MIB + 1) << 20, Use::Block).await;
    let growth = growth.refused("ControllerExpandVolume", Code::Aborted)?;
    let why = format!("volume {volume}: {inside} commands of epoch");
    for text in [snapshot, growth] {
        ensure!(text.contains(&why), "no {why:?} in {text:?}");
    }
    Ok(())
}

/// The receipt says that it is the operator's, and on how many.
fn receipt(
    cluster: &Cluster,
    volume: &str,
    epoch: u64,
    inside: u32,
    line: &Timeline,
) -> anyhow::Result<()> {
    let text = cluster.cli(["events", "--receipts", "--volume", volume, "--json"])?;
    let receipts = text.lines().map(serde_json::from_str::<Value>);
    let receipts = receipts.collect::<Result<Vec<_>, _>>()?;
    let found = receipts.iter().find(|receipt| {
        let detail = &receipt["detail"];
        detail["closed"] == epoch && detail["settled_by"] == "operator"
    });
    let found =
        found.with_context(|| format!("no receipt of epoch {epoch} by operator: {text}"))?;
    ensure!(
        found["detail"]["unsettled"] == inside && found["detail"]["inside_at_close"] == inside,
        "the receipt says {found}"
    );
    line.note("controller", found["text"].as_str().unwrap_or_default());
    Ok(())
}

/// The pool's disk, of which the first blocks of one volume can be made to
/// take writes and answer none (dm-delay).
struct Disk {
    free: String,
    hanging: String,
}

impl Disk {
    fn of(cluster: &Cluster, volume: &str) -> anyhow::Result<Self> {
        let free = run("dmsetup", ["table", POOL_DISK], [])?.trim().to_owned();
        let [_, sectors, _, below, _] = free.split(' ').collect::<Vec<_>>()[..] else {
            return Err(anyhow!("the pool's disk is {free:?}"));
        };
        let data = cluster.path(&format!("pool/drover/volumes/{volume}/data"));
        let shown = run("filefrag", ["-v", "-b4096"], [&data])?;
        let mut extents: Vec<_> = shown.lines().filter_map(extent).collect();
        extents.sort_unstable();
        ensure!(!extents.is_empty(), "no extents in {shown}");
        let (mut at, end) = (0, sectors.parse::<u64>()?);
        let mut hanging = String::new();
        for (first, count) in extents {
            // Extents that follow each other on the disk have nothing between them.
            if first > at {
                hanging += &format!("{at} {} linear {below} {at}\n", first - at);
            }
            hanging += &format!(
                "{first} {count} delay {below} {first} 0 {below} {first} 3600000 {below} {first} 0\n"
            );
            at = first + count;
        }
        hanging += &format!("{at} {} linear {below} {at}", end - at);
        Ok(Self { free, hanging })
    }

    fn hang(&self) -> anyhow::Result<()> {
        become_table(&self.hanging)
    }

    /// What a delay has in hand goes on as it is taken out.
    fn free(&self) -> anyhow::Result<()> {
        become_table(&self.free)
    }

    /// Whether so many writes are held. A delay tells "START LENGTH delay READS
    /// WRITES FLUSHES" of what it has in hand (drivers/md/dm-delay.c,
    /// delay_status); the disk's own count of what is in flight leaves that out.
    fn holds(&self, count: u32) -> anyhow::Result<()> {
        let text = run("dmsetup", ["status", POOL_DISK], [])?;
        let held = |line: &str| -> Option<u32> {
            let (_, ops) = line.split_once(" delay ")?;
            ops.split(' ').nth(1)?.parse().ok()
        };
        let writes: u32 = text.lines().filter_map(held).sum();
        ensure!(writes >= count, "{writes} writes are held: {text}");
        Ok(())
    }
}

fn become_table(table: &str) -> anyhow::Result<()> {
    run("dmsetup", ["suspend", "--nolockfs", POOL_DISK], [])?;
    run("dmsetup", ["reload", POOL_DISK, "--table", table], [])?;
    run("dmsetup", ["resume", POOL_DISK], []).map(drop)
}

/// Where the first blocks of a file are, in sectors, from a line of filefrag's:
/// "   0:        0..    4095:      24..      4119:   4096:             last,eof".
fn extent(line: &str) -> Option<(u64, u64)> {
    let mut parts = line.split(':');
    let _number = parts.next()?.trim().parse::<u32>().ok()?;
    let mut first = || {
        let (first, _) = parts.next()?.split_once("..")?;
        first.trim().parse::<u64>().ok()
    };
    let (logical, physical) = (first()?, first()?);
    let count = parts.next()?.trim().parse::<u64>().ok()?;
    let hanging = HANGING.saturating_sub(logical).min(count);
    (hanging > 0).then_some((physical * SECTORS, hanging * SECTORS))
}

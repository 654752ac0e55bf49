//! The story that drover is for: a volume moves from node a to node b while a
//! slow backup and a hanging foreign reader hold it, and a rogue on a writes
//! to it and ignores every request to stop.
//!
//! Every figure is measured in the run that prints it, and every claim is
//! checked: the story fails when one is not so.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use serde_json::{Value, json};
use tonic::Code;

use crate::Place;
use crate::cluster::{Cluster, agent, run};
use crate::csi::Use;
use crate::flow::{await_phase, stream};
use crate::roles::{BLOCK, Playing, RogueWrite, Work, checksum, now_ns, rogue_numbers};
use crate::timeline::{Timeline, ms, round};

const FS: Use = Use::Fs("ext4");
const VOLUME_BYTES: i64 = 384 << 20;
const DATA_MIB: u64 = 8;
const ROGUE_BLOCKS: u64 = 64;
/// What the backup may upload, in KiB per second: slow enough to outlast the move.
const SLOW_KIB: &str = "512";

/// Tells the story.
///
/// # Errors
/// When a step fails or a claim is not so.
pub async fn tell(place: &Place, json: bool) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(place).await?;
    let told = story(&mut cluster).await;
    match told {
        Ok(figures) => {
            if json {
                println!("{figures}");
            }
            Ok(())
        }
        Err(error) => {
            eprintln!("{}", cluster.logs());
            if json {
                println!("{}", json!({ "ok": false, "error": format!("{error:#}") }));
            }
            Err(error)
        }
    }
}

/// The volume as node a has it, and who uses it there.
struct OnA {
    volume: String,
    device: PathBuf,
    staging: PathBuf,
    target: PathBuf,
    data_at: u64,
}

async fn story(cluster: &mut Cluster) -> anyhow::Result<Value> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned();
    let emulated = fs::read_to_string("/proc/cpuinfo")?.contains("QEMU TCG");
    let line = Timeline::begin(&format!(
        "drover: a volume moves from a to b, on Linux {kernel}"
    ));
    let mut verdicts = BTreeMap::new();

    line.chapter("On node a: a volume for a pod, and who else holds it");
    let on_a = attach_on_a(cluster, &line).await?;
    let mut reader = start_reader(cluster, &on_a, &mut verdicts, &line)?;
    let workload = Playing::workload(&on_a.target.join("data.bin"), DATA_MIB, 1)?;
    verdicts.insert("pod writes", expect_verdict(cluster, &on_a.volume, "live")?);
    let text = format!("the pod writes, syncs and checks {DATA_MIB} MiB: verdict live");
    line.note("a", &text);
    let repository = cluster.path("repository");
    let ticket = start_backup(cluster, &on_a.volume, &repository)?;
    let text = format!("drover's own backup begins, to a repository at {SLOW_KIB} KiB/s");
    line.note("a", &text);
    let (rogue, rogue_log) = start_rogue(cluster, &on_a, &line)?;
    wait_for_cursor(cluster, &ticket).await?;

    line.chapter("The pod ends; its successor starts on node b");
    let work = workload.finish()?;
    line.note(
        "a",
        &format!(
            "the pod has ended: {} writes, {} checked",
            work.written, work.verified
        ),
    );
    verdicts.insert(
        "pod ended, rogue writes",
        expect_verdict(cluster, &on_a.volume, "live")?,
    );
    let moved = move_to_b(cluster, &on_a, &line).await?;

    line.chapter("What became of everybody's data");
    let judged = judge_rogue(&moved, &rogue_log, &line)?;
    let same = checksum(&moved.target.join("data.bin"))? == work.sha256;
    line.note(
        "b",
        &format!(
            "the pod's data: SHA-256 {} {}…",
            if same { "matches," } else { "DIFFERS," },
            &work.sha256[..16]
        ),
    );
    ensure!(
        reader.plays()?,
        "the foreign reader was killed; it should have been cut off only"
    );
    let receipt = receipt(cluster, &on_a.volume, moved.granted_epoch)?;
    line.note(
        "a",
        &format!("receipt: {}", receipt["text"].as_str().unwrap_or_default()),
    );

    line.chapter("The home's agent is killed; the backup goes on where it was");
    let after = restart_home(cluster, &moved, &ticket, &line).await?;
    let twice = uploaded_twice(cluster, &repository)?;
    line.note(
        "repository",
        &format!("restic: every blob once: {twice} bytes uploaded twice"),
    );
    cluster
        .restic(&repository, ["check", "--read-data"])
        .context("restic check")?;
    line.note("repository", "restic check --read-data: no errors");

    drop((reader, rogue));
    let (_, took) = cluster
        .node("a")?
        .unstage(&on_a.volume, &on_a.staging)
        .await
        .ok("NodeUnstage on a")?;
    line.step("a", "NodeUnstage, now that the rogue is gone", took);

    let (unpublish, publish) = (round(ms(moved.unpublish)), round(ms(moved.publish)));
    let drover_ms = round(ms(moved.total) - moved.kernel_and_tools_ms);
    println!(
        "\n  Moved in {:.0} ms, {drover_ms:.0} ms of them drover's own; unpublish {unpublish:.0} ms, publish {publish:.0} ms.",
        ms(moved.total)
    );
    let ok = same
        && judged.landed == 0
        && judged.refused > 0
        && judged.accepted == 0
        && twice == 0
        && after.resumed > 0;
    let figures = json!({
        "ok": ok,
        "kernel": kernel,
        "emulated": emulated,
        "unpublish_ms": unpublish,
        "publish_ms": publish,
        "stage_ms": round(ms(moved.stage)),
        "publish_to_first_write_ms": round(ms(moved.publish_to_first_write)),
        "move_ms": round(ms(moved.total)),
        "drover_ms": drover_ms,
        "rogue_writes_refused": judged.refused,
        "rogue_writes_landed": judged.landed,
        "rogue_writes_accepted_after_grant": judged.accepted,
        "data_sha256_match": same,
        "backup_resumed": after.resumed > 0,
        "backup_bytes_resumed": after.resumed,
        "backup_bytes_uploaded_twice": twice,
        "longest_write_over_home_restart_ms": after.longest_ms,
        "verdicts": verdicts,
        "receipt": receipt["detail"],
    });
    ensure!(ok, "not every claim of the story is so: {figures}");
    Ok(figures)
}

async fn attach_on_a(cluster: &Cluster, line: &Timeline) -> anyhow::Result<OnA> {
    let (controller, node) = (cluster.controller()?, cluster.node("a")?);
    let created = controller
        .create("pvc-demo", VOLUME_BYTES, FS, "a", None)
        .await;
    let (created, took) = created.ok("CreateVolume")?;
    let volume = created
        .volume
        .ok_or_else(|| anyhow!("CreateVolume answered no volume"))?
        .volume_id;
    line.step("controller", "CreateVolume, 384 MiB on a's pool", took);
    let (staging, target) = (
        cluster.staging("a", &volume)?,
        cluster.target("a", &volume)?,
    );
    let (_, took) = controller
        .publish(&volume, "a", FS)
        .await
        .ok("ControllerPublish to a")?;
    line.step("controller", "ControllerPublishVolume to a", took);
    let (_, took) = node
        .stage(&volume, &staging, FS)
        .await
        .ok("NodeStage on a")?;
    line.step("a", "NodeStageVolume: connect, mkfs.ext4, mount", took);
    let (_, took) = node
        .publish(&volume, &staging, &target, FS)
        .await
        .ok("NodePublish on a")?;
    line.step("a", "NodePublishVolume", took);

    // Blocks of the file system for the rogue, so that what it writes can be read back on b.
    let path = staging.join("rogue.dat");
    let file = File::create(&path)?;
    file.write_all_at(&vec![0; usize::try_from(ROGUE_BLOCKS)? * BLOCK], 0)?;
    file.sync_all()?;
    let data_at = first_block(&path)? * BLOCK as u64;
    let device = PathBuf::from(run("findmnt", ["-n", "-o", "SOURCE"], [&staging])?.trim());
    Ok(OnA {
        volume,
        device,
        staging,
        target,
        data_at,
    })
}

/// The first block of a file on its device, from filefrag; it must be one extent.
fn first_block(file: &PathBuf) -> anyhow::Result<u64> {
    let text = run("filefrag", ["-b4096", "-v"], [file])?;
    let extents: Vec<&str> = text
        .lines()
        .filter(|l| l.trim_start().starts_with(|c: char| c.is_ascii_digit()))
        .collect();
    ensure!(
        extents.len() == 1,
        "the rogue's file is not one extent: {text}"
    );
    let physical = extents[0]
        .split(':')
        .nth(2)
        .and_then(|range| range.split("..").next());
    let physical = physical.ok_or_else(|| anyhow!("filefrag: {text}"))?;
    physical
        .trim()
        .parse()
        .with_context(|| format!("filefrag: {text}"))
}

fn start_backup(cluster: &Cluster, volume: &str, repository: &Path) -> anyhow::Result<String> {
    let repository = repository.to_string_lossy();
    let words = [
        "backup",
        "create",
        volume,
        "--repo",
        &repository,
        "--limit-upload",
        SLOW_KIB,
        "--detach",
    ];
    Ok(cluster.cli(words)?.trim().to_owned())
}

fn verdict(cluster: &Cluster, volume: &str) -> anyhow::Result<Value> {
    let address = agent("a").to_string();
    let text = cluster.cli(["holders", volume, "--json", "--agent", &address])?;
    serde_json::from_str(&text).with_context(|| format!("drover holders: {text}"))
}

fn expect_verdict(cluster: &Cluster, volume: &str, wanted: &str) -> anyhow::Result<Value> {
    let start = Instant::now();
    loop {
        let judged = verdict(cluster, volume)?;
        if judged["verdict"] == wanted {
            return Ok(judged["verdict"].clone());
        }
        ensure!(
            start.elapsed() < Duration::from_secs(20),
            "the verdict is not {wanted}: {judged}"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn start_reader(
    cluster: &Cluster,
    on_a: &OnA,
    verdicts: &mut BTreeMap<&'static str, Value>,
    line: &Timeline,
) -> anyhow::Result<Playing> {
    verdicts.insert(
        "nobody else",
        expect_verdict(cluster, &on_a.volume, "quiet")?,
    );
    let reader = Playing::start(&["reader", &on_a.device.to_string_lossy()])?;
    let (pid, address) = (reader.pid().to_string(), agent("a").to_string());
    cluster.cli([
        "backup",
        "register",
        &on_a.volume,
        "--pid",
        &pid,
        "--agent",
        &address,
    ])?;
    line.note(
        "a",
        "a foreign backup tool reads the device, registered by its pid",
    );
    verdicts.insert(
        "foreign reader reads",
        expect_verdict(cluster, &on_a.volume, "backup-running")?,
    );
    verdicts.insert(
        "foreign reader hangs",
        expect_verdict(cluster, &on_a.volume, "backup-stale")?,
    );
    line.note(
        "a",
        "it hangs; the kernel saw no read for 3 s: verdict backup-stale",
    );
    Ok(reader)
}

fn start_rogue(
    cluster: &Cluster,
    on_a: &OnA,
    line: &Timeline,
) -> anyhow::Result<(Playing, PathBuf)> {
    let log = cluster.path("rogue.log");
    let (at, blocks) = (on_a.data_at.to_string(), ROGUE_BLOCKS.to_string());
    let (device, log_path) = (on_a.device.to_string_lossy(), log.to_string_lossy());
    let words = [
        "rogue", &device, "--at", &at, "--blocks", &blocks, "--log", &log_path,
    ];
    let rogue = Playing::start(&words)?;
    line.note(
        "a",
        "a rogue opens the device and writes, whatever it is told",
    );
    Ok((rogue, log))
}

/// Waits until the backup has something that a resume need not upload again.
async fn wait_for_cursor(cluster: &Cluster, ticket: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let stream = stream(cluster, ticket)?;
        ensure!(
            stream["phase"] == "running" || stream["phase"] == "starting",
            "the backup does not run: {stream}"
        );
        let bytes = |key: &str| stream[key].as_u64().unwrap_or(0);
        if bytes("bytes_uploaded") > bytes("bytes_uncommitted") {
            return Ok(());
        }
        ensure!(
            start.elapsed() < Duration::from_secs(120),
            "the backup commits nothing: {stream}"
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

struct Moved {
    volume: String,
    target: PathBuf,
    staging: PathBuf,
    unpublish: Duration,
    publish: Duration,
    stage: Duration,
    publish_to_first_write: Duration,
    total: Duration,
    kernel_and_tools_ms: f64,
    granted_ns: u64,
    granted_epoch: u64,
}

async fn move_to_b(cluster: &Cluster, on_a: &OnA, line: &Timeline) -> anyhow::Result<Moved> {
    let (controller, a, b) = (
        cluster.controller()?,
        cluster.node("a")?,
        cluster.node("b")?,
    );
    let volume = on_a.volume.clone();
    let (staging, target) = (
        cluster.staging("b", &volume)?,
        cluster.target("b", &volume)?,
    );
    let begun = Instant::now();
    let (_, took) = a
        .unpublish(&volume, &on_a.target)
        .await
        .ok("NodeUnpublish on a")?;
    line.step("a", "NodeUnpublishVolume", took);
    let unstage = a.unstage(&volume, &on_a.staging).await;
    let took = unstage.took;
    let why = unstage.refused("NodeUnstage on a, with a rogue", Code::FailedPrecondition)?;
    line.step(
        "a",
        "NodeUnstageVolume is refused, as somebody writes:",
        took,
    );
    line.note("", &format!("  {why}"));
    let (_, unpublish) = controller
        .unpublish(&volume, "a")
        .await
        .ok("ControllerUnpublish from a")?;
    line.step("controller", "ControllerUnpublishVolume from a", unpublish);

    let publishing = Instant::now();
    let (_, publish) = controller
        .publish(&volume, "b", FS)
        .await
        .ok("ControllerPublish to b")?;
    let granted_ns = now_ns()?;
    line.step(
        "controller",
        "ControllerPublishVolume to b: a is fenced, b is granted",
        publish,
    );
    let (_, stage) = b.stage(&volume, &staging, FS).await.ok("NodeStage on b")?;
    line.step("b", "NodeStageVolume: connect, fsck, mount", stage);
    let (_, took) = b
        .publish(&volume, &staging, &target, FS)
        .await
        .ok("NodePublish on b")?;
    line.step("b", "NodePublishVolume", took);
    let first = Instant::now();
    let mut file = File::create(target.join("first-write"))?;
    file.write_all(b"the workload is here\n")?;
    file.sync_all()?;
    let first_write = first.elapsed();
    let (total, publish_to_first_write) = (begun.elapsed(), publishing.elapsed());
    line.step("b", "first write, synced", first_write);

    let notes = notes(cluster, &volume)?;
    let newest = |kind: &str, node: &str| {
        let steps = notes
            .iter()
            .rev()
            .find(|n| n["kind"] == kind && n["node"] == node);
        steps
            .map(|note| kernel_and_tools(&note["detail"]))
            .unwrap_or_default()
    };
    let kernel_and_tools_ms = newest("node-unpublished", "a")
        + newest("unstage-refused", "a")
        + newest("staged", "b")
        + newest("node-published", "b")
        + ms(first_write);
    let volumes = cluster.cli(["volume", "list", "--json"])?;
    let mut volumes = volumes
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let epoch = volumes
        .find(|v| v["volume"] == volume.as_str())
        .and_then(|v| v["epoch"].as_u64());
    Ok(Moved {
        volume,
        target,
        staging,
        unpublish,
        publish,
        stage,
        publish_to_first_write,
        total,
        kernel_and_tools_ms,
        granted_ns,
        granted_epoch: epoch.ok_or_else(|| anyhow!("drover volume list shows no epoch"))?,
    })
}

fn notes(cluster: &Cluster, volume: &str) -> anyhow::Result<Vec<Value>> {
    let text = cluster.cli(["events", "--volume", volume, "--json"])?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}

fn kernel_and_tools(detail: &Value) -> f64 {
    let steps = detail["steps"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let theirs = steps.iter().filter(|step| step["kernel_or_tool"] == true);
    theirs.filter_map(|step| step["ms"].as_f64()).sum()
}

struct Judged {
    refused: usize,
    landed: usize,
    accepted: usize,
}

fn judge_rogue(moved: &Moved, log: &Path, line: &Timeline) -> anyhow::Result<Judged> {
    // The rogue goes on while b works: give it the time to try.
    std::thread::sleep(Duration::from_millis(500));
    let text = fs::read_to_string(log)?;
    let whole = text
        .rsplit_once('\n')
        .map(|(whole, _)| whole)
        .unwrap_or_default();
    let writes: Vec<RogueWrite> = whole
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let late: Vec<&RogueWrite> = writes
        .iter()
        .filter(|w| w.began_ns > moved.granted_ns)
        .collect();
    let refused = writes.iter().filter(|w| w.error.is_some()).count();
    let accepted = late.iter().filter(|w| w.error.is_none()).count();
    let on_disk = rogue_numbers(&moved.target.join("rogue.dat"))?;
    let first_late = late.iter().map(|w| w.number).min().unwrap_or(u64::MAX);
    let landed = on_disk
        .iter()
        .filter(|number| **number >= first_late)
        .count();
    let before = writes.len() - late.len();
    line.note(
        "a",
        &format!(
            "the rogue: {before} writes before b's grant, {} after it",
            late.len()
        ),
    );
    line.note(
        "a",
        &format!("  {refused} refused, {accepted} accepted after the grant"),
    );
    line.note(
        "b",
        &format!("  {landed} of those after the grant are on the disk"),
    );
    Ok(Judged {
        refused,
        landed,
        accepted,
    })
}

/// The newest receipt that ended an epoch before `epoch`.
fn receipt(cluster: &Cluster, volume: &str, epoch: u64) -> anyhow::Result<Value> {
    let notes = notes(cluster, volume)?;
    let receipts = notes
        .into_iter()
        .rev()
        .filter(|note| note["kind"] == "fenced");
    let mut ended = receipts.filter(|note| {
        note["detail"]["closed"]
            .as_u64()
            .is_some_and(|old| old < epoch)
    });
    ended
        .next()
        .ok_or_else(|| anyhow!("drover events shows no receipt for an epoch before {epoch}"))
}

struct After {
    resumed: u64,
    longest_ms: u64,
}

/// Kills the home's agent under b's workload and a running backup, starts it
/// again, and waits for the backup's end.
async fn restart_home(
    cluster: &mut Cluster,
    moved: &Moved,
    ticket: &str,
    line: &Timeline,
) -> anyhow::Result<After> {
    let workload = Playing::workload(&moved.target.join("data.bin"), DATA_MIB, 2)?;
    let before = stream(cluster, ticket)?;
    ensure!(
        before["phase"] == "running",
        "the backup did not outlast the move: {before}"
    );
    let start = Instant::now();
    cluster.kill_agent("a")?;
    cluster.start_agent("a").await?;
    line.step(
        "a",
        "the agent is killed with SIGKILL, and is back",
        start.elapsed(),
    );
    let done = await_phase(cluster, ticket, &["done"], Duration::from_secs(300)).await?;
    let resumed = done["bytes_resumed"].as_u64().unwrap_or(0);
    line.note(
        "a",
        &format!("the backup is whole: {resumed} bytes were there already and not read again"),
    );
    let work: Work = workload
        .finish()
        .context("b's workload over the home's restart")?;
    let text = format!(
        "no error over the restart; longest write {} ms",
        work.longest_ms
    );
    line.note("b", &text);
    ensure!(
        moved.staging.exists() && !moved.volume.is_empty(),
        "b's staging folder is gone"
    );
    Ok(After {
        resumed,
        longest_ms: work.longest_ms,
    })
}

/// Bytes of blobs that the repository holds more than once, from its own indexes.
fn uploaded_twice(cluster: &Cluster, repository: &Path) -> anyhow::Result<u64> {
    let mut seen = BTreeMap::new();
    for index in cluster.restic(repository, ["list", "index"])?.lines() {
        let text = cluster.restic(repository, ["cat", "index", index.trim()])?;
        let index: Value = serde_json::from_str(&text).context("restic cat index")?;
        let packs = index["packs"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        for blob in packs
            .iter()
            .flat_map(|p| p["blobs"].as_array().map(Vec::as_slice).unwrap_or_default())
        {
            let key = format!("{}/{}", blob["type"], blob["id"]);
            let (count, length) = seen.entry(key).or_insert((0_u64, 0_u64));
            *count += 1;
            *length = blob["length"].as_u64().unwrap_or(0);
        }
    }
    ensure!(!seen.is_empty(), "the repository's indexes name no blob");
    Ok(seen
        .values()
        .map(|(count, length)| (count - 1) * length)
        .sum())
}

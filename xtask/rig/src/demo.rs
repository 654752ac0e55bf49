//! The story that drover is for: a volume moves from node a to node b while a
//! slow backup and a hanging foreign reader hold it, and a rogue on a writes
//! to it and ignores every request to stop.
//!
//! Every figure is measured in the run that prints it, and every claim is
//! checked: the story fails when one is not so.

mod checks;
mod moving;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use self::checks::{
    expect_reader, expect_verdict, first_block, judge_rogue, receipt, uploaded_twice,
    wait_for_cursor, watch,
};
use self::moving::{Moved, Step, move_to_b};
use crate::cluster::{Cluster, run};
use crate::csi::Use;
use crate::flow::{asked, await_phase, create, stream};
use crate::roles::{BLOCK, Playing, Work, checksum};
use crate::timeline::{Timeline, ms, round};
use crate::{Place, Protocol};

const FS: Use = Use::Fs("ext4");
const VOLUME_MIB: i64 = 384;
const DATA_MIB: u64 = 8;
const ROGUE_BLOCKS: u64 = 64;
/// What the backup may upload, in KiB per second: slow enough to outlast the move,
/// also where other things keep the machine busy meanwhile.
const SLOW_KIB: &str = "192";

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
        "drover: a volume moves from a to b over {}, on Linux {kernel}",
        cluster.protocol().name()
    ));
    let mut verdicts = BTreeMap::new();

    line.chapter("On node a: a volume for a pod, and who else holds it");
    let on_a = attach_on_a(cluster, &line).await?;
    let mut reader = start_reader(cluster, &on_a, &mut verdicts, &line).await?;
    let workload = Playing::workload(&on_a.target.join("data.bin"), DATA_MIB, 1)?;
    verdicts.insert(
        "pod writes",
        expect_verdict(cluster, &on_a.volume, "live").await?,
    );
    let text = format!("the pod writes, syncs and checks {DATA_MIB} MiB: verdict live");
    line.note("a", &text);
    line.note("a", &watch(cluster, &on_a.volume).await?);
    let repository = cluster.repository()?;
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
        expect_verdict(cluster, &on_a.volume, "live").await?,
    );
    let moved = move_to_b(cluster, &on_a, &line).await?;

    line.chapter("Where the move's time went, in ms");
    for step in &moved.steps {
        step.tell(&line);
    }

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
    let receipt = receipt(cluster, &on_a.volume, moved.granted_epoch).await?;
    line.note(
        "a",
        &format!("receipt: {}", receipt["text"].as_str().unwrap_or_default()),
    );
    let verdict = &receipt["detail"]["answer"]["shut"]["judgement"]["verdict"];
    ensure!(
        verdict != "quiet",
        "the receipt says that nobody held a's disk; the rogue did"
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
    let node = cluster.node("a")?;
    let ((), took) = asked(async || {
        let answer = node.unstage(&on_a.volume, &on_a.staging).await;
        answer.done("NodeUnstage on a")
    })
    .await?;
    line.step("a", "NodeUnstage, now that the rogue is gone", took);

    let (unpublish, publish) = (round(ms(moved.unpublish)), round(ms(moved.publish)));
    let drover_ms = round(moved.drover_ms());
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
        "protocol": cluster.protocol().name(),
        "emulated": emulated,
        "unpublish_ms": unpublish,
        "publish_ms": publish,
        "stage_ms": round(ms(moved.stage)),
        "publish_to_first_write_ms": round(ms(moved.publish_to_first_write)),
        "move_ms": round(ms(moved.total)),
        "drover_ms": drover_ms,
        "steps": moved.steps.iter().map(Step::json).collect::<Vec<_>>(),
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
    let begun = Instant::now();
    let volume = create(cluster, "pvc-demo", VOLUME_MIB, FS, None).await?;
    let text = format!("CreateVolume, {VOLUME_MIB} MiB on a's pool");
    line.step("controller", &text, begun.elapsed());
    let (controller, node) = (cluster.controller()?, cluster.node("a")?);
    let (staging, target) = (
        cluster.staging("a", &volume)?,
        cluster.target("a", &volume)?,
    );
    let ((), took) = asked(async || {
        let answer = controller.publish(&volume, "a", FS).await;
        answer.done("ControllerPublish to a")
    })
    .await?;
    line.step("controller", "ControllerPublishVolume to a", took);
    let ((), took) = asked(async || {
        let answer = node.stage(&volume, &staging, FS).await;
        answer.done("NodeStage on a")
    })
    .await?;
    line.step("a", "NodeStageVolume: connect, mkfs.ext4, mount", took);
    let ((), took) = asked(async || {
        let answer = node.publish(&volume, &staging, &target, FS).await;
        answer.done("NodePublish on a")
    })
    .await?;
    line.step("a", "NodePublishVolume", took);

    if proves(cluster.protocol())? {
        line.note("a", "host and export have proved themselves to each other");
    }

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

/// Whether a host of this protocol proves itself on this kernel; if it should,
/// it must have.
fn proves(protocol: Protocol) -> anyhow::Result<bool> {
    let (class, secret) = match protocol {
        Protocol::NvmeTcp => ("/sys/class/nvme", "dhchap_secret"),
        Protocol::Iscsi => ("/sys/class/iscsi_session", "password"),
    };
    let mut proved = false;
    for link in fs::read_dir(class)? {
        let path = link?.path().join(secret);
        // A kernel without the code has no such file.
        if path.exists() {
            let text = fs::read_to_string(&path)?;
            let told = !matches!(text.trim(), "" | "none" | "<NULL>" | "(null)");
            ensure!(told, "{} has no secret", path.display());
            proved = true;
        }
    }
    Ok(proved)
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

async fn start_reader(
    cluster: &Cluster,
    on_a: &OnA,
    verdicts: &mut BTreeMap<&'static str, Value>,
    line: &Timeline,
) -> anyhow::Result<Playing> {
    verdicts.insert(
        "nobody else",
        expect_verdict(cluster, &on_a.volume, "quiet").await?,
    );
    let reader = Playing::start(&["reader", &on_a.device.to_string_lossy()])?;
    verdicts.insert(
        "foreign reader reads",
        expect_verdict(cluster, &on_a.volume, "backup-running").await?,
    );
    expect_reader(cluster, &on_a.volume, reader.pid(), false).await?;
    line.note(
        "a",
        "a foreign backup tool reads the device: known by its name",
    );
    let (pid, address) = (reader.pid().to_string(), cluster.agent("a").to_string());
    cluster.cli([
        "backup",
        "register",
        &on_a.volume,
        "--pid",
        &pid,
        "--agent",
        &address,
    ])?;
    expect_reader(cluster, &on_a.volume, reader.pid(), true).await?;
    line.note("a", "it is registered by its pid");
    // It reads until now, so that whoever looks late has seen it read.
    reader.tell(Signal::SIGUSR1)?;
    verdicts.insert(
        "foreign reader hangs",
        expect_verdict(cluster, &on_a.volume, "backup-stale").await?,
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
    let (before, _) = asked(async || stream(cluster, ticket)).await?;
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

//! Long backups: a volume moves while its backup is slow, hangs for ever, has
//! lost its snapshot's file, or meets a repository that fails on every call.
//! In each, unpublish is OK and the move completes; the slow backup still runs and
//! the hanging one still hangs then, so neither was waited for. The backup goes on
//! afterwards or ends with a clear error.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use serde_json::Value;

use crate::Place;
use crate::cluster::{Cluster, run};
use crate::csi::Use;
use crate::flow::{asked, attach, await_phase, create, detach, stream};
use crate::roles::{Playing, checksum};
use crate::timeline::Timeline;

const FS: Use = Use::Fs("ext4");
const DATA_MIB: u64 = 8;

/// Tells the four stories.
///
/// # Errors
/// When one goes otherwise.
pub async fn tell(place: &Place) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(place).await?;
    let line = Timeline::begin("Moves under backups that are slow, hang, or fail");
    for kind in [Kind::Slow, Kind::Hanging, Kind::SnapshotLost, Kind::Failing] {
        let told = one(&mut cluster, kind, &line).await;
        if let Err(error) = told {
            eprintln!("{}", cluster.logs());
            return Err(error.context(format!("{kind:?}")));
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Would take hours.
    Slow,
    /// Its repository's disk answers nothing any more.
    Hanging,
    /// The snapshot it reads is deleted under it.
    SnapshotLost,
    /// Its repository's disk answers every call with an error.
    Failing,
}

async fn one(cluster: &mut Cluster, kind: Kind, line: &Timeline) -> anyhow::Result<()> {
    let name = format!("{kind:?}").to_lowercase();
    line.chapter(&format!("A backup that is {name}"));
    let volume = create(cluster, &format!("pvc-{name}"), 320, FS, None).await?;
    let on_a = attach(cluster, &volume, "a", FS).await?;
    let workload = Playing::workload(&on_a.target.join("data.bin"), DATA_MIB, 7)?;
    let sink = Sink::make(cluster, kind, &name)?;
    let limit = if kind == Kind::Slow { "16" } else { "256" };
    let repository = sink.repository.to_string_lossy().into_owned();
    let words = [
        "backup",
        "create",
        &volume,
        "--repo",
        &repository,
        "--limit-upload",
        limit,
        "--detach",
    ];
    let ticket = cluster.cli(words)?.trim().to_owned();
    await_phase(cluster, &ticket, &["running"], Duration::from_secs(60)).await?;
    sink.spoil(cluster, kind, &volume)?;
    let work = workload.finish()?;

    let unpublish = detach(cluster, &on_a).await?;
    not_waited_for(cluster, kind, &ticket, &sink).await?;
    line.step(
        "controller",
        &format!("ControllerUnpublishVolume with a {name} backup"),
        unpublish,
    );
    let on_b = attach(cluster, &volume, "b", FS).await?;
    ensure!(
        checksum(&on_b.target.join("data.bin"))? == work.sha256,
        "the data on b differs"
    );
    line.note("b", "moved; the data is the same");

    let end = after(cluster, kind, &ticket, &sink).await?;
    line.note("a", &end);
    detach(cluster, &on_b).await?;
    Ok(())
}

/// What becomes of the backup once the volume has moved.
async fn after(
    cluster: &mut Cluster,
    kind: Kind,
    ticket: &str,
    sink: &Sink,
) -> anyhow::Result<String> {
    match kind {
        Kind::Slow => {
            still_runs(cluster, ticket).await?;
            let outcome = stop(cluster, ticket).await?;
            Ok(format!("the slow backup ran on; it was stopped: {outcome}"))
        }
        Kind::Hanging => {
            let outcome = stop(cluster, ticket).await?;
            sink.heal()?;
            cluster.kill_agent("a")?;
            cluster.start_agent("a").await?;
            resume(cluster, ticket).await?;
            let done = await_phase(cluster, ticket, &["done"], Duration::from_secs(180)).await?;
            Ok(format!(
                "told to stop: {outcome}; the disk is back, resumed: {} bytes were there",
                done["bytes_resumed"]
            ))
        }
        Kind::SnapshotLost => {
            let end = await_phase(cluster, ticket, &["failed"], Duration::from_secs(60)).await?;
            let error = end["error"].as_str().unwrap_or_default();
            ensure!(
                error.contains("snapshot"),
                "the error does not name the snapshot: {end}"
            );
            Ok(format!("it ended: {error}"))
        }
        Kind::Failing => {
            let end = await_phase(cluster, ticket, &["failed"], Duration::from_secs(60)).await?;
            let error = end["error"].as_str().unwrap_or_default().to_owned();
            ensure!(
                error.contains("repository"),
                "the error does not name the repository: {end}"
            );
            sink.heal()?;
            resume(cluster, ticket).await?;
            await_phase(cluster, ticket, &["done"], Duration::from_secs(180)).await?;
            Ok(format!(
                "it ended: {error}; the disk is back, and it resumed to its end"
            ))
        }
    }
}

/// A backup that would go on for long has not ended by now: who was answered did
/// not wait for it. The two others may have failed, sooner or later.
async fn not_waited_for(
    cluster: &Cluster,
    kind: Kind,
    ticket: &str,
    sink: &Sink,
) -> anyhow::Result<()> {
    match kind {
        Kind::Slow => still_runs(cluster, ticket).await,
        Kind::Hanging => {
            ensure!(sink.hangs()?, "the repository's disk hangs no longer");
            still_runs(cluster, ticket).await
        }
        Kind::SnapshotLost | Kind::Failing => Ok(()),
    }
}

async fn still_runs(cluster: &Cluster, ticket: &str) -> anyhow::Result<()> {
    let (now, _) = asked(async || stream(cluster, ticket)).await?;
    ensure!(
        now["phase"] == "running",
        "a move should not end a backup that reads a snapshot: {now}"
    );
    Ok(())
}

/// Stops a stream, and returns how it ended.
async fn stop(cluster: &Cluster, ticket: &str) -> anyhow::Result<String> {
    let (outcome, _) = asked(async || cluster.cli(["backup", "stop", ticket])).await?;
    Ok(outcome.trim().to_owned())
}

/// Lets a stream go on without following it.
async fn resume(cluster: &Cluster, ticket: &str) -> anyhow::Result<()> {
    asked(async || cluster.cli(["backup", "resume", ticket, "--detach"]))
        .await
        .map(drop)
}

/// A repository's disk that can be made to hang or to fail: ext4 on device
/// mapper on a loop device.
struct Sink {
    repository: PathBuf,
    /// Its device mapper name and the table that works, where it has one.
    mapped: Option<(String, String)>,
}

impl Sink {
    fn make(cluster: &Cluster, kind: Kind, name: &str) -> anyhow::Result<Self> {
        let mount = cluster.path(&format!("sink-{name}"));
        fs::create_dir_all(&mount)?;
        if matches!(kind, Kind::Slow | Kind::SnapshotLost) {
            return Ok(Self {
                repository: mount.join("repository"),
                mapped: None,
            });
        }
        let image = cluster.path(&format!("sink-{name}.img"));
        fs::File::create(&image)?.set_len(128 << 20)?;
        let device = run("losetup", ["--find", "--show"], [&image])?
            .trim()
            .to_owned();
        let (mapper, table) = (
            format!("rig-{name}"),
            format!("0 {} linear {device} 0", (128 << 20) / 512),
        );
        run("dmsetup", ["create", &mapper, "--table", &table], [])?;
        let device = PathBuf::from(format!("/dev/mapper/{mapper}"));
        run("mkfs.ext4", ["-q"], [&device])?;
        run("mount", [], [&device, &mount])?;
        Ok(Self {
            repository: mount.join("repository"),
            mapped: Some((mapper, table)),
        })
    }

    /// Does to the backup what its kind says.
    fn spoil(&self, cluster: &Cluster, kind: Kind, volume: &str) -> anyhow::Result<()> {
        match (kind, &self.mapped) {
            (Kind::Slow, _) => Ok(()),
            (Kind::SnapshotLost, _) => delete_snapshot_file(&cluster.path("pool"), volume),
            (Kind::Hanging, Some((mapper, _))) => run(
                "dmsetup",
                ["suspend", "--nolockfs", "--noflush", mapper],
                [],
            )
            .map(drop),
            (Kind::Failing, Some((mapper, table))) => {
                let error = format!("0 {} error", table.split(' ').nth(1).unwrap_or_default());
                reload(mapper, &error)
            }
            (kind, None) => Err(anyhow!("{kind:?} needs a mapped disk")),
        }
    }

    /// Whether its disk is suspended, as a hanging one is until it is healed.
    fn hangs(&self) -> anyhow::Result<bool> {
        let Some((mapper, _)) = &self.mapped else {
            return Ok(false);
        };
        let words = ["info", "--columns", "--noheadings", "-o", "suspended"];
        let text = run("dmsetup", [&words[..], &[mapper]].concat(), [])?;
        Ok(text.trim() == "Suspended")
    }

    /// Lets the disk work again.
    fn heal(&self) -> anyhow::Result<()> {
        let Some((mapper, table)) = &self.mapped else {
            return Ok(());
        };
        reload(mapper, table)?;
        let mount = self
            .repository
            .parent()
            .context("a repository has a parent")?
            .to_owned();
        // ext4 shuts itself down after errors; a fresh mount is what an operator would do.
        run("umount", ["-l"], [&mount])?;
        run(
            "mount",
            [],
            [&PathBuf::from(format!("/dev/mapper/{mapper}")), &mount],
        )
        .map(drop)
    }
}

fn reload(mapper: &str, table: &str) -> anyhow::Result<()> {
    run(
        "dmsetup",
        ["suspend", "--nolockfs", "--noflush", mapper],
        [],
    )?;
    run("dmsetup", ["reload", mapper, "--table", table], [])?;
    run("dmsetup", ["resume", mapper], []).map(drop)
}

/// Removes the file of the volume's snapshot from the pool, as an accident would.
fn delete_snapshot_file(pool: &Path, volume: &str) -> anyhow::Result<()> {
    let folders = fs::read_dir(pool.join("drover/snapshots"))?;
    for folder in folders {
        let folder = folder?.path();
        let text = fs::read_to_string(folder.join("meta")).unwrap_or_default();
        let meta: Value = serde_json::from_str(&text).unwrap_or_default();
        if meta.to_string().contains(volume) {
            return fs::remove_file(folder.join("data")).context("remove the snapshot's file");
        }
    }
    Err(anyhow!("the pool has no snapshot of {volume}"))
}

//! Regular moves: a volume goes back and forth, with snapshots, growth,
//! backups and restarts of agents and controller thrown in at random. The data
//! is checked at every stop.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, ensure};
use serde_json::Value;

use crate::Place;
use crate::cluster::Cluster;
use crate::csi::{Use, v1};
use crate::flow::{Attached, asked, attach, create, delete, detach, objects, retried};
use crate::roles::{Dice, Playing, checksum};
use crate::timeline::{Timeline, ms};

const DATA_MIB: u64 = 4;
const FIRST_MIB: i64 = 320;
const GROWTH_MIB: i64 = 32;
/// A backup is whole within this.
const WHOLE: Duration = Duration::from_secs(180);

/// Tells the story.
///
/// # Errors
/// When a move fails, data differs, or a workload met an error.
pub async fn tell(place: &Place, moves: u32, seed: Option<u64>) -> anyhow::Result<()> {
    let seed = match seed {
        Some(seed) => seed,
        None => SystemTime::now()
            .duration_since(UNIX_EPOCH)?
            .subsec_nanos()
            .into(),
    };
    let mut cluster = Cluster::start(place).await?;
    let line = Timeline::begin(&format!("{moves} moves with seed {seed}"));
    let mut tour = Tour {
        dice: Dice(seed),
        volume: String::new(),
        mib: FIRST_MIB,
        use_as: if seed % 2 == 0 {
            Use::Fs("ext4")
        } else {
            Use::Fs("xfs")
        },
        snapshots: Vec::new(),
        backups: Vec::new(),
        repository: cluster.repository()?,
    };
    let told = tour.travel(&mut cluster, moves, &line).await;
    told.map_err(|error| {
        eprintln!("{}", cluster.logs());
        error.context(format!("seed {seed}"))
    })
}

struct Tour {
    dice: Dice,
    volume: String,
    mib: i64,
    use_as: Use,
    /// Snapshots and the checksum of the data in each, where it was quiet.
    snapshots: Vec<(String, String)>,
    backups: Vec<String>,
    repository: PathBuf,
}

impl Tour {
    async fn travel(
        &mut self,
        cluster: &mut Cluster,
        moves: u32,
        line: &Timeline,
    ) -> anyhow::Result<()> {
        self.volume = create(cluster, "pvc-moves", self.mib, self.use_as, None).await?;
        let mut expected: Option<String> = None;
        for round in 0..moves {
            let node = if round % 2 == 0 { "a" } else { "b" };
            let begun = Instant::now();
            let attached = attach(cluster, &self.volume, node, self.use_as).await?;
            let came = begun.elapsed();
            let data = attached.target.join("data.bin");
            if let Some(expected) = &expected {
                let found = checksum(&data)?;
                ensure!(
                    &found == expected,
                    "round {round}: the data on {node} is not what was written"
                );
            }
            let workload = Playing::workload(&data, DATA_MIB, self.dice.roll())?;
            let thrown = self.throw_in(cluster, &attached).await;
            let thrown = thrown.with_context(|| format!("round {round} on {node}"))?;
            let work = workload
                .finish()
                .with_context(|| format!("round {round}: {thrown}"))?;
            let unpublish = detach(cluster, &attached).await?;
            let text = format!(
                "{thrown}; {} writes, came in {:.0} ms, unpublished in",
                work.written,
                ms(came)
            );
            line.step(node, &text, unpublish);
            expected = Some(work.sha256);
        }
        self.check_snapshots(cluster, line).await?;
        self.check_backups(cluster, line).await?;
        match expected {
            Some(expected) => self.check_restore(cluster, &expected, line).await,
            None => Ok(()),
        }
    }

    async fn throw_in(
        &mut self,
        cluster: &mut Cluster,
        attached: &Attached,
    ) -> anyhow::Result<String> {
        match self.dice.below(7) {
            0 => self.take_snapshot(cluster).await,
            1 => self.grow(cluster, attached).await,
            2 => self.begin_backup(cluster),
            3 => {
                cluster.kill_agent("a")?;
                cluster.start_agent("a").await?;
                Ok("home's agent killed and back".into())
            }
            4 => {
                cluster.kill_agent("b")?;
                cluster.start_agent("b").await?;
                Ok("b's agent killed and back".into())
            }
            5 => {
                cluster.kill_controller()?;
                cluster.start_controller().await?;
                Ok("controller killed and back".into())
            }
            _ => {
                tokio::time::sleep(Duration::from_millis(500)).await;
                Ok("nothing thrown in".into())
            }
        }
    }

    async fn take_snapshot(&mut self, cluster: &Cluster) -> anyhow::Result<String> {
        let name = format!("snapshot-{}", self.snapshots.len());
        let taken = cluster.controller()?.snapshot(&self.volume, &name).await;
        let (answer, _) = taken.ok("CreateSnapshot")?;
        let snapshot = answer
            .snapshot
            .ok_or_else(|| anyhow!("CreateSnapshot answered none"))?;
        ensure!(snapshot.ready_to_use, "{name} is not ready");
        self.snapshots.push((snapshot.snapshot_id, name));
        Ok("snapshot".into())
    }

    async fn grow(&mut self, cluster: &Cluster, attached: &Attached) -> anyhow::Result<String> {
        let before = fs_bytes(&attached.target)?;
        self.mib += GROWTH_MIB;
        let bytes = self.mib << 20;
        let grown = cluster
            .controller()?
            .expand(&self.volume, bytes, self.use_as)
            .await;
        grown.ok("ControllerExpandVolume")?;
        let node = cluster.node(attached.node)?;
        let grown = node
            .expand(
                &self.volume,
                &attached.target,
                &attached.staging,
                bytes,
                self.use_as,
            )
            .await;
        grown.ok("NodeExpandVolume")?;
        // Both file systems keep some of the growth for themselves.
        let grown = fs_bytes(&attached.target)?.saturating_sub(before);
        ensure!(
            grown > GROWTH_MIB.unsigned_abs() << 19,
            "the file system grew by {grown} bytes of {GROWTH_MIB} MiB"
        );
        Ok(format!("grown to {} MiB", self.mib))
    }

    fn begin_backup(&mut self, cluster: &Cluster) -> anyhow::Result<String> {
        let repository = self.repository.to_string_lossy();
        let words = [
            "backup",
            "create",
            &self.volume,
            "--repo",
            &repository,
            "--detach",
        ];
        self.backups.push(cluster.cli(words)?.trim().to_owned());
        Ok("backup begun".into())
    }

    /// Every snapshot becomes a volume that mounts and has the data file.
    async fn check_snapshots(&self, cluster: &Cluster, line: &Timeline) -> anyhow::Result<()> {
        for (snapshot, name) in &self.snapshots {
            let source = v1::volume_content_source::SnapshotSource {
                snapshot_id: snapshot.clone(),
            };
            let source = v1::volume_content_source::Type::Snapshot(source);
            let clone = create(
                cluster,
                &format!("clone-of-{name}"),
                self.mib,
                self.use_as,
                Some(source),
            )
            .await?;
            let attached = attach(cluster, &clone, "b", self.use_as).await?;
            checksum(&attached.target.join("data.bin"))
                .with_context(|| format!("clone of {name}"))?;
            detach(cluster, &attached).await?;
            delete(cluster, &clone).await.context("the clone")?;
            cluster
                .controller()?
                .delete_snapshot(snapshot)
                .await
                .ok("DeleteSnapshot")?;
            line.note("b", &format!("{name} became a volume, mounted, and went"));
        }
        Ok(())
    }

    /// Waits until a backup has ended, which must be whole.
    async fn await_whole(&self, cluster: &Cluster, ticket: &str) -> anyhow::Result<()> {
        let failed = retried(WHOLE, async || {
            if let Some(end) = self.journals_end(cluster, ticket)? {
                return Ok((end["kind"] == "backup-failed").then(|| end["text"].clone()));
            }
            // The agent was killed before it told the journal, and the list forgets
            // what is done when an agent starts anew: the repository is left to say so.
            ensure!(!runs(cluster, ticket)?, "{ticket} has not ended");
            ensure!(self.is_whole(cluster, ticket)?, "{ticket} is not whole");
            Ok(None)
        });
        match failed.await? {
            Some(why) => Err(anyhow!("{why}")),
            None => Ok(()),
        }
    }

    /// What the journal says of a backup's end.
    fn journals_end(&self, cluster: &Cluster, ticket: &str) -> anyhow::Result<Option<Value>> {
        let notes = objects(&cluster.cli(["events", "--volume", &self.volume, "--json"])?)?;
        Ok(notes.into_iter().find(|note| {
            note["detail"]["ticket"] == ticket
                && (note["kind"] == "backup-done" || note["kind"] == "backup-failed")
        }))
    }

    /// Whether the repository has the whole of a backup, not only parts of it.
    fn is_whole(&self, cluster: &Cluster, ticket: &str) -> anyhow::Result<bool> {
        let tag = format!("backup={ticket}");
        // Without a lock: other backups may want the repository for themselves.
        let words = ["snapshots", "--no-lock", "--json", "--tag", &tag];
        let text = cluster.restic(&self.repository, words)?;
        let found: Vec<Value> = serde_json::from_str(&text).context("restic snapshots")?;
        let partial = |snapshot: &Value| {
            let mut tags = snapshot["tags"].as_array().into_iter().flatten();
            tags.any(|tag| tag == "drover-partial")
        };
        Ok(found.iter().any(|snapshot| !partial(snapshot)))
    }

    /// Every backup ends whole, and the stock restic finds no fault in them.
    async fn check_backups(&self, cluster: &Cluster, line: &Timeline) -> anyhow::Result<()> {
        for ticket in &self.backups {
            self.await_whole(cluster, ticket).await?;
        }
        if self.backups.is_empty() {
            return Ok(());
        }
        cluster.restic(&self.repository, ["check", "--read-data"])?;
        let text = format!("{} backups whole, by restic check", self.backups.len());
        line.note("a", &text);
        Ok(())
    }

    /// A backup of the volume as it lies becomes a new volume that another node
    /// can have as soon as the restore says that it is done.
    async fn check_restore(
        &self,
        cluster: &Cluster,
        expected: &str,
        line: &Timeline,
    ) -> anyhow::Result<()> {
        let repository = self.repository.to_string_lossy();
        cluster.cli(["backup", "create", &self.volume, "--repo", &repository])?;
        cluster.cli(["restore", "pvc-restored", "--repo", &repository])?;
        let (volumes, _) =
            asked(async || objects(&cluster.cli(["volume", "list", "--json"])?)).await?;
        let restored = volumes
            .iter()
            .find(|volume| volume["name"] == "pvc-restored")
            .and_then(|volume| Some(volume["volume"].as_str()?.to_owned()));
        let restored = restored.ok_or_else(|| anyhow!("no restored volume in {volumes:?}"))?;
        let attached = attach(cluster, &restored, "b", self.use_as)
            .await
            .context("the restored volume")?;
        ensure!(
            checksum(&attached.target.join("data.bin"))? == expected,
            "the restored data is not what was backed up"
        );
        detach(cluster, &attached).await?;
        delete(cluster, &restored)
            .await
            .context("the restored volume")?;
        line.note(
            "b",
            "a backup restored into a new volume: the data is the same",
        );
        Ok(())
    }
}

/// Whether `drover backup list` has a stream that has not ended.
fn runs(cluster: &Cluster, ticket: &str) -> anyhow::Result<bool> {
    let streams = objects(&cluster.cli(["backup", "list", "--json"])?)?;
    Ok(streams.iter().any(|stream| {
        stream["ticket"] == ticket
            && (stream["phase"] == "starting" || stream["phase"] == "running")
    }))
}

/// The size of the file system at a path.
fn fs_bytes(path: &Path) -> anyhow::Result<u64> {
    let found = nix::sys::statvfs::statvfs(path)?;
    Ok(found.blocks() * found.fragment_size())
}

//! A campaign: a raw volume goes from node to node for minutes, under writers
//! that keep the devices of epochs that have ended, while agents and the
//! controller are killed at random. The holders' own ledger tells whether a
//! block was lost, or is somebody else's.

use std::collections::VecDeque;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};

use crate::Place;
use crate::cluster::Cluster;
use crate::csi::Use;
use crate::flow::{Attached, create, retried};
use crate::roles::holder::Held;
use crate::roles::{Dice, Playing, now_ns, stale};
use crate::timeline::Timeline;

const MIB: u64 = 16;
const BLOCKS: u64 = MIB << 20 >> 12;
/// Blocks that a stale writer is at as soon as its holder has ended.
const FREE: u64 = 256;
/// Epochs whose writers write on.
const KEPT: usize = 3;
/// A step succeeds within this, whoever is killed in between.
const STEP: Duration = Duration::from_secs(240);
/// The longest that a holder has the volume for.
const TENURE_MS: u64 = 4000;
/// What can be killed.
const PROCESSES: [&str; 3] = ["controller", "a", "b"];

/// The campaign.
struct Campaign {
    cluster: Cluster,
    dice: Dice,
    volume: String,
    kills: u64,
    held: Held,
    /// The writers of the last epochs, the oldest first.
    writers: VecDeque<Writer>,
    refused: u64,
    /// Stale writes that were answered with success before the next grant.
    before: u64,
}

/// The writer of one epoch.
struct Writer {
    /// Ends it when dropped.
    playing: Playing,
    log: PathBuf,
    /// When the next epoch was granted, on the kernel's monotonic clock.
    granted_ns: Option<u64>,
}

/// Runs the campaign for so many seconds.
///
/// # Errors
/// When a block was lost, a stale write was taken, or a step does not succeed.
pub async fn tell(place: &Place, seconds: u64, seed: Option<u64>) -> anyhow::Result<()> {
    let seed = match seed {
        Some(seed) => seed,
        None => now_ns()?,
    };
    let line = Timeline::begin("Rogues");
    line.note("", &format!("the dice: --seed {seed}"));
    let cluster = Cluster::start(place).await?;
    let volume = create(
        &cluster,
        "pvc-rogues",
        i64::try_from(MIB)?,
        Use::Block,
        None,
    )
    .await?;
    let mut campaign = Campaign {
        cluster,
        dice: Dice(seed),
        volume,
        kills: 0,
        held: Held::default(),
        writers: VecDeque::new(),
        refused: 0,
        before: 0,
    };
    let told = campaign.run(Duration::from_secs(seconds), &line).await;
    told.inspect_err(|_| eprintln!("{}", campaign.cluster.logs()))
}

impl Campaign {
    async fn run(&mut self, time: Duration, line: &Timeline) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut tenures = 0;
        while begun.elapsed() < time || tenures <= KEPT as u64 {
            tenures += 1;
            let node = ["b", "a"][usize::try_from(tenures % 2)?];
            self.tenure(node, tenures)
                .await
                .with_context(|| format!("tenure {tenures}, on {node}"))?;
        }
        while let Some(writer) = self.writers.pop_front() {
            self.account(&writer)?;
        }
        ensure!(self.refused > 0, "no stale write was ever refused");
        let text = format!(
            "{tenures} tenures, {} kills: {} writes acknowledged, {} blocks found as they must be",
            self.kills, self.held.written, self.held.verified
        );
        line.note("", &text);
        let text = format!(
            "writers of ended epochs: {} writes refused, {} taken before the next grant, 0 after it",
            self.refused, self.before
        );
        line.note("", &text);
        Ok(())
    }

    /// A holder has the volume for a while, and leaves a stale writer behind.
    async fn tenure(&mut self, node: &'static str, number: u64) -> anyhow::Result<()> {
        let attached = self.attach(node).await?;
        let device = attached.target.to_string_lossy().into_owned();
        let log = self.cluster.path(&format!("stale-{number}"));
        let ledger = self.cluster.path("ledger").to_string_lossy().into_owned();
        let [blocks, free] = [BLOCKS, FREE].map(|number| number.to_string());
        let of_volume = ["--blocks", &blocks, "--free", &free];
        let (holder, own) = (number.to_string(), log.to_string_lossy().into_owned());
        let words = [&["stale", &device, "--log", &own][..], &of_volume].concat();
        let playing = Playing::start(&words)?;
        let words = ["holder", &device, "--ledger", &ledger, "--number", &holder];
        let mut holder = Playing::start(&[&words[..], &of_volume].concat())?;

        let until = Instant::now() + Duration::from_millis(self.dice.below(TENURE_MS));
        while Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(self.dice.below(1000))).await;
            if self.dice.below(3) == 0 {
                self.kill_one().await?;
            }
        }
        ensure!(holder.plays()?, "the holder met an error");
        // As often as not it ends in the midst of its writes.
        if self.dice.below(2) == 0 {
            let held: Held = holder.end()?;
            self.held.written += held.written;
            self.held.verified += held.verified;
        } else {
            drop(holder);
        }
        let writer = Writer {
            playing,
            log,
            granted_ns: None,
        };
        writer.playing.tell(Signal::SIGUSR1)?;
        self.writers.push_back(writer);
        self.leave(&attached).await
    }

    /// Publishes, stages, and hands to a pod; from the grant on the stale
    /// writers are at every block.
    async fn attach(&mut self, node: &'static str) -> anyhow::Result<Attached> {
        let volume = self.volume.clone();
        self.under_fire(async |cluster| {
            let controller = cluster.controller()?;
            let answer = controller.publish(&volume, node, Use::Block).await;
            answer.done("ControllerPublishVolume")
        })
        .await?;
        let granted_ns = now_ns()?;
        if let Some(writer) = self.writers.back_mut() {
            writer.granted_ns = Some(granted_ns);
            writer.playing.tell(Signal::SIGUSR2)?;
        }
        if self.writers.len() > KEPT
            && let Some(oldest) = self.writers.pop_front()
        {
            self.account(&oldest)?;
        }
        let staging = self.cluster.staging(node, &volume)?;
        let target = self.cluster.target(node, &volume)?;
        self.under_fire(async |cluster| {
            let node = cluster.node(node)?;
            let answer = node.stage(&volume, &staging, Use::Block).await;
            answer.done("NodeStageVolume")
        })
        .await?;
        self.under_fire(async |cluster| {
            let node = cluster.node(node)?;
            let answer = node.publish(&volume, &staging, &target, Use::Block).await;
            answer.done("NodePublishVolume")
        })
        .await?;
        Ok(Attached {
            volume,
            node,
            staging,
            target,
        })
    }

    /// Takes the volume from a node: sometimes as it should be, sometimes with a
    /// node that does not answer. The stale writer keeps the device open.
    async fn leave(&mut self, attached: &Attached) -> anyhow::Result<()> {
        let (volume, node) = (attached.volume.clone(), attached.node);
        if self.dice.below(3) > 0 {
            let calls = self.cluster.node(node)?;
            calls
                .unpublish(&volume, &attached.target)
                .await
                .ok("NodeUnpublishVolume")?;
            // It is refused, since somebody writes, or cuts that one off.
            let _ = calls.unstage(&volume, &attached.staging).await;
        } else {
            self.kill(node).await?;
        }
        self.under_fire(async |cluster| {
            let answer = cluster.controller()?.unpublish(&volume, node).await;
            answer.done("ControllerUnpublishVolume")
        })
        .await?;
        // Kubelet asks until it is done, while the volume is elsewhere already.
        let (cluster, target) = (&self.cluster, &attached.target);
        retried(STEP, async || {
            let calls = cluster.node(node)?;
            let answer = calls.unpublish(&volume, target).await;
            answer.done("NodeUnpublishVolume")?;
            let answer = calls.unstage(&volume, &attached.staging).await;
            answer.done("NodeUnstageVolume")
        })
        .await
    }

    /// Makes a call, perhaps with a process killed in its midst, until it succeeds.
    async fn under_fire(
        &mut self,
        call: impl AsyncFn(&Cluster) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if self.dice.below(3) > 0 {
            return retried(STEP, async || call(&self.cluster).await).await;
        }
        let victim = PROCESSES[usize::try_from(self.dice.below(3))?];
        let pid = self.cluster.pid(victim)?;
        let wait = Duration::from_millis(self.dice.below(120));
        let shot = async {
            tokio::time::sleep(wait).await;
            kill(pid, Signal::SIGKILL)
        };
        // Whether it succeeded is seen from the call that is made again.
        let (_, shot) = tokio::join!(call(&self.cluster), shot);
        shot.with_context(|| format!("kill {victim}"))?;
        self.kill(victim).await?;
        retried(STEP, async || call(&self.cluster).await).await
    }

    async fn kill_one(&mut self) -> anyhow::Result<()> {
        let process = PROCESSES[usize::try_from(self.dice.below(3))?];
        self.kill(process).await
    }

    async fn kill(&mut self, process: &'static str) -> anyhow::Result<()> {
        self.kills += 1;
        match process {
            "controller" => {
                self.cluster.kill_controller()?;
                self.cluster.start_controller().await
            }
            node => {
                self.cluster.kill_agent(node)?;
                self.cluster.start_agent(node).await
            }
        }
    }

    /// Counts what a writer's writes came to: none that began after the next
    /// grant may have been taken.
    fn account(&mut self, writer: &Writer) -> anyhow::Result<()> {
        for write in stale::writes(&writer.log)? {
            let after = writer
                .granted_ns
                .is_some_and(|granted| write.began_ns > granted);
            match (&write.error, after) {
                (Some(_), _) => self.refused += 1,
                (None, false) => self.before += 1,
                (None, true) => anyhow::bail!("a stale write was taken after the grant: {write:?}"),
            }
        }
        fs::remove_file(&writer.log).context("remove a stale writer's log")
    }
}

//! What the story claims, looked up where it can be seen: verdicts, the
//! rogue's writes on the disk, the receipt, the repository's own indexes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use serde_json::Value;

use super::moving::Moved;
use crate::cluster::{Cluster, run};
use crate::flow::{asked, objects, retried, stream};
use crate::roles::{RogueWrite, rogue_numbers};
use crate::timeline::Timeline;

/// The backup's first part is in the repository within this: a segment of 4 MiB,
/// at what it may upload.
const CURSOR: Duration = Duration::from_secs(120);

/// The first block of a file on its device, from filefrag; it must be one extent.
pub(super) fn first_block(file: &PathBuf) -> anyhow::Result<u64> {
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

fn verdict(cluster: &Cluster, volume: &str) -> anyhow::Result<Value> {
    let address = cluster.agent("a").to_string();
    let text = cluster.cli(["holders", volume, "--json", "--agent", &address])?;
    serde_json::from_str(&text).with_context(|| format!("drover holders: {text}"))
}

/// Waits until the verdict on who holds the volume on a is `wanted`.
pub(super) async fn expect_verdict(
    cluster: &Cluster,
    volume: &str,
    wanted: &str,
) -> anyhow::Result<Value> {
    let judged = asked(async || {
        let judged = verdict(cluster, volume)?;
        ensure!(
            judged["verdict"] == wanted,
            "the verdict is not {wanted}: {judged}"
        );
        Ok(judged["verdict"].clone())
    });
    Ok(judged.await?.0)
}

/// The volume on a, as `drover top` tells it.
fn top(cluster: &Cluster, volume: &str) -> anyhow::Result<Value> {
    let address = cluster.agent("a").to_string();
    let words = ["top", "--json", "--count", "1", "--agent", &address];
    let looks = objects(&cluster.cli(words)?)?;
    let mut found = looks.iter().filter(|look| look["volume"] == volume);
    let look = found.next().cloned();
    look.ok_or_else(|| anyhow!("drover top has no {volume}: {looks:?}"))
}

/// Waits until an operator sees the reader on a: `ticketed` tells whether
/// it has been registered, or is known by its name alone.
pub(super) async fn expect_reader(
    cluster: &Cluster,
    volume: &str,
    pid: u32,
    ticketed: bool,
) -> anyhow::Result<()> {
    let shown = asked(async || {
        let look = top(cluster, volume)?;
        let readers = look["readers"].as_array();
        let is_it = |reader: &&Value| {
            let who = reader["who"].as_str().unwrap_or_default();
            who.split(' ').nth(1) == Some(&pid.to_string())
        };
        let found: Vec<_> = readers.into_iter().flatten().filter(is_it).collect();
        let [reader] = found[..] else {
            bail!("drover top does not show the reader {pid} once: {look}");
        };
        ensure!(
            reader["ticket"].is_string() == ticketed && reader["read"]["bytes"].as_u64() > Some(0),
            "drover top does not show what the reader {pid} is: {look}"
        );
        Ok(())
    });
    shown.await.map(drop)
}

/// Watches the volume on a, under the pod's writes, as an operator does: who
/// looks while nothing was let run sees no write, and looks again.
pub(super) async fn watch(cluster: &Cluster, volume: &str) -> anyhow::Result<String> {
    let (written, _) = asked(async || written(cluster, volume)).await?;
    let (lines, _) = asked(async || traced(cluster, volume)).await?;
    Ok(format!(
        "drover top sees {:.1} MiB/s written, drover trace tells it in {lines} lines",
        written / f64::from(1 << 20),
    ))
}

/// Bytes written a second, as `drover top` sees them under the pod's writes.
fn written(cluster: &Cluster, volume: &str) -> anyhow::Result<f64> {
    let look = top(cluster, volume)?;
    let written = look["written_bytes_per_second"].as_f64().unwrap_or(0.0);
    ensure!(
        look["holders"] == serde_json::json!(["a"])
            && look["verdict"] == "live"
            && look["writes_in_flight"].is_u64()
            && written > 0.0,
        "drover top: {look}"
    );
    Ok(written)
}

/// The lines in which `drover trace` tells of the pod's writes.
fn traced(cluster: &Cluster, volume: &str) -> anyhow::Result<usize> {
    let address = cluster.agent("a").to_string();
    let words = [
        "trace", volume, "--json", "--for", "4s", "--agent", &address,
    ];
    let lines = objects(&cluster.cli(words)?)?;
    let has = |kind: &str, part: &str| {
        let mut lines = lines.iter().filter(|line| line["kind"] == kind);
        lines.any(|line| line["text"].as_str().is_some_and(|t| t.contains(part)))
    };
    ensure!(
        has("verdict", "live") && has("device", "epoch 1") && has("io", "writes"),
        "drover trace: {lines:?}"
    );
    Ok(lines.len())
}

/// Waits until the backup has something that a resume need not upload again.
pub(super) async fn wait_for_cursor(cluster: &Cluster, ticket: &str) -> anyhow::Result<()> {
    let last = retried(CURSOR, async || {
        let stream = stream(cluster, ticket)?;
        let bytes = |key: &str| stream[key].as_u64().unwrap_or(0);
        let runs = stream["phase"] == "running" || stream["phase"] == "starting";
        ensure!(
            !runs || bytes("bytes_uploaded") > bytes("bytes_uncommitted"),
            "the backup commits nothing: {stream}"
        );
        Ok((runs, stream))
    });
    let (runs, stream) = last.await?;
    ensure!(runs, "the backup does not run: {stream}");
    Ok(())
}

/// The journal of a volume, oldest first.
pub(super) fn notes(cluster: &Cluster, volume: &str) -> anyhow::Result<Vec<Value>> {
    objects(&cluster.cli(["events", "--volume", volume, "--json"])?)
}

/// What became of the rogue.
pub(super) struct Judged {
    /// Its writes that were answered with an error.
    pub(super) refused: usize,
    /// Its writes after b's grant that are on the disk.
    pub(super) landed: usize,
    /// Its writes after b's grant that were answered with success.
    pub(super) accepted: usize,
}

/// Compares what the rogue was told with what is on the disk.
pub(super) fn judge_rogue(moved: &Moved, log: &Path, line: &Timeline) -> anyhow::Result<Judged> {
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
pub(super) async fn receipt(cluster: &Cluster, volume: &str, epoch: u64) -> anyhow::Result<Value> {
    let (notes, _) = asked(async || notes(cluster, volume)).await?;
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

/// Bytes of blobs that the repository holds more than once, from its own indexes.
pub(super) fn uploaded_twice(cluster: &Cluster, repository: &Path) -> anyhow::Result<u64> {
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

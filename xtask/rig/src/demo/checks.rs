//! What the story claims, looked up where it can be seen: verdicts, the
//! rogue's writes on the disk, the receipt, the repository's own indexes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use serde_json::Value;

use super::moving::Moved;
use crate::cluster::{Cluster, run};
use crate::flow::stream;
use crate::roles::{RogueWrite, rogue_numbers};
use crate::timeline::Timeline;

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
pub(super) fn expect_verdict(
    cluster: &Cluster,
    volume: &str,
    wanted: &str,
) -> anyhow::Result<Value> {
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

fn objects(lines: &str) -> anyhow::Result<Vec<Value>> {
    let objects = lines.lines().map(serde_json::from_str);
    objects.collect::<Result<_, _>>().context(lines.to_owned())
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
pub(super) fn expect_reader(
    cluster: &Cluster,
    volume: &str,
    pid: u32,
    ticketed: bool,
) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let look = top(cluster, volume)?;
        let readers = look["readers"].as_array();
        let is_it = |reader: &&Value| {
            let who = reader["who"].as_str().unwrap_or_default();
            who.split(' ').nth(1) == Some(&pid.to_string())
        };
        let found: Vec<_> = readers.into_iter().flatten().filter(is_it).collect();
        if let [reader] = found[..]
            && reader["ticket"].is_string() == ticketed
            && reader["read"]["bytes"].as_u64() > Some(0)
        {
            return Ok(());
        }
        ensure!(
            start.elapsed() < Duration::from_secs(20),
            "drover top does not show the reader {pid}: {look}"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Watches the volume on a, under the pod's writes, as an operator does.
pub(super) fn watch(cluster: &Cluster, volume: &str) -> anyhow::Result<String> {
    let address = cluster.agent("a").to_string();
    let look = top(cluster, volume)?;
    let written = look["written_bytes_per_second"].as_f64().unwrap_or(0.0);
    ensure!(
        look["holders"] == serde_json::json!(["a"])
            && look["verdict"] == "live"
            && look["writes_in_flight"].is_u64()
            && written > 0.0,
        "drover top: {look}"
    );
    let trace = [
        "trace", volume, "--json", "--for", "4s", "--agent", &address,
    ];
    let lines = objects(&cluster.cli(trace)?)?;
    let has = |kind: &str, part: &str| {
        let mut lines = lines.iter().filter(|line| line["kind"] == kind);
        lines.any(|line| line["text"].as_str().is_some_and(|t| t.contains(part)))
    };
    ensure!(
        has("verdict", "live") && has("device", "epoch 1") && has("io", "writes"),
        "drover trace: {lines:?}"
    );
    Ok(format!(
        "drover top sees {:.1} MiB/s written, drover trace tells it in {} lines",
        written / f64::from(1 << 20),
        lines.len()
    ))
}

/// Waits until the backup has something that a resume need not upload again.
pub(super) async fn wait_for_cursor(cluster: &Cluster, ticket: &str) -> anyhow::Result<()> {
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

/// The journal of a volume, oldest first.
pub(super) fn notes(cluster: &Cluster, volume: &str) -> anyhow::Result<Vec<Value>> {
    let text = cluster.cli(["events", "--volume", volume, "--json"])?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
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
pub(super) fn receipt(cluster: &Cluster, volume: &str, epoch: u64) -> anyhow::Result<Value> {
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

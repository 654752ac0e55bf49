//! What a node knows of its volumes at one moment, for `drover top` and
//! `drover trace`: the controller's word, the kernel's counts of its own
//! devices, and the streams.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use drover_ebpf::{DISCARD, FLUSH, IoCount, READ, WRITE};
use tonic::Status;

use super::workload::Workload;
use crate::attach::ports::{Disk, Witness as _};
use crate::backup::keeper::KeptStream;
use crate::evidence::cgroups::pod;
use crate::evidence::readers::{Flow, ReaderStatus};
use crate::evidence::{DiskFigures, DiskIo, Evidence, EvidenceError};
use crate::ids::{Epoch, VolumeId};
use crate::rpc::agent_service::progress_message;
use crate::rpc::convert::judgement_message;
use crate::rpc::pb;

/// More processes than these are not listed: the busiest are.
const PROCESSES: usize = 16;

impl Workload {
    /// All that is known here of one volume, or of every one that this node has
    /// to do with.
    pub(super) async fn look_at(
        &self,
        wanted: Option<VolumeId>,
        notes_since: Option<SystemTime>,
    ) -> Result<pb::LookAnswer, Status> {
        let mut answer = pb::LookAnswer {
            node: self.node.to_string(),
            time: Some(SystemTime::now().into()),
            ..Default::default()
        };
        let mut looks = Looks::default();
        let here = |volume: &str| wanted.as_ref().is_none_or(|w| w.as_str() == volume);
        match self.control.volumes().await {
            Ok(volumes) => {
                for record in volumes.into_iter().filter(|v| here(&v.volume)) {
                    let look = looks.of(&record.volume);
                    look.record = Some(record);
                }
            }
            Err(error) => answer.controller_silent = error.to_string(),
        }
        if let (Some(volume), Some(since)) = (&wanted, notes_since) {
            match self.control.notes(volume, since).await {
                Ok(notes) => answer.notes = notes,
                Err(error) => answer.controller_silent = error.to_string(),
            }
        }
        for KeptStream { job, progress, .. } in self.keeper.list() {
            if here(job.volume().as_str()) {
                let message = progress_message(&job, progress.as_ref());
                looks.of(job.volume().as_str()).streams.push(message);
            }
        }
        for reader in self.readers().await {
            if here(reader.volume.as_str()) {
                let window = self.evidence.window_ms();
                let look = reader_look(&reader, reader.motion(window).name());
                looks.of(reader.volume.as_str()).readers.push(look);
            }
        }
        let disks = self.initiator.disks();
        for (volume, epoch, disk) in disks.map_err(|e| Status::unavailable(e.to_string()))? {
            if here(volume.as_str()) {
                let device = self.device(&volume, epoch, &disk).await;
                let look = looks.of(volume.as_str());
                // While one export is followed by another, the newer one counts.
                if look.device.as_ref().is_none_or(|d| d.epoch < epoch.0) {
                    look.device = Some(device);
                }
            }
        }
        answer.volumes = looks.0.into_values().collect();
        match &wanted {
            // Of those that only the controller knows, this node's own.
            None => answer.volumes.retain(|look| {
                let record = look.record.as_ref();
                look.device.is_some()
                    || !look.streams.is_empty()
                    || !look.readers.is_empty()
                    || record.is_some_and(|r| r.home == self.node.as_str())
            }),
            Some(volume) if answer.volumes.is_empty() => {
                let why = match answer.controller_silent.as_str() {
                    "" => format!("there is no volume {volume}"),
                    silent => format!("volume {volume} is not on node {}; {silent}", self.node),
                };
                return Err(Status::not_found(why));
            }
            Some(_) => {}
        }
        Ok(answer)
    }

    async fn readers(&self) -> Vec<ReaderStatus> {
        let evidence = Arc::clone(&self.evidence);
        let readers = tokio::task::spawn_blocking(move || evidence.readers());
        readers.await.unwrap_or_default()
    }

    async fn device(&self, volume: &VolumeId, epoch: Epoch, disk: &Disk) -> pb::DeviceLook {
        let mounts = match self.disk(volume) {
            Ok((_, mounts)) => mounts,
            Err(_) => Vec::new(),
        };
        let judgement = self.evidence.judge(disk, &mounts).await;
        let (evidence, of) = (Arc::clone(&self.evidence), disk.clone());
        let counted = tokio::task::spawn_blocking(move || counted(&evidence, &of)).await;
        let mut look = pb::DeviceLook {
            disk: disk.name.clone(),
            epoch: epoch.0,
            judgement: Some(judgement_message(&judgement, &disk.name)),
            ..Default::default()
        };
        match counted {
            Ok(Ok((figures, io))) => fill(&mut look, &figures, &io),
            Ok(Err(error)) => look.uncounted = error.to_string(),
            Err(panic) => look.uncounted = panic.to_string(),
        }
        look
    }
}

/// Looks by volume.
#[derive(Default)]
struct Looks(BTreeMap<String, pb::VolumeLook>);

impl Looks {
    fn of(&mut self, volume: &str) -> &mut pb::VolumeLook {
        self.0
            .entry(volume.to_owned())
            .or_insert_with(|| pb::VolumeLook {
                volume: volume.to_owned(),
                ..Default::default()
            })
    }
}

fn counted(evidence: &Evidence, disk: &Disk) -> Result<(DiskFigures, DiskIo), EvidenceError> {
    Ok((evidence.figures(disk)?, evidence.io(disk)?))
}

fn fill(look: &mut pb::DeviceLook, figures: &DiskFigures, io: &DiskIo) {
    look.io = Some(counts(&figures.io));
    let mut latency = HashMap::new();
    for (direction, histogram) in &figures.latency {
        let name = match *direction {
            READ => "read",
            WRITE => "write",
            FLUSH => "flush",
            DISCARD => "discard",
            _ => continue,
        };
        let times = pb::Latencies {
            buckets: histogram.buckets.to_vec(),
            errors: histogram.errors,
        };
        latency.insert(name.to_owned(), times);
    }
    look.latency = latency;
    if let Some(queue) = figures.queue {
        look.reads_in_flight = queue.in_flight.map(|flight| flight.reads);
        look.writes_in_flight = queue.in_flight.map(|flight| flight.writes);
        look.timed = queue.timed.name().into();
    }
    let processes = io.processes.iter().take(PROCESSES).map(|process| {
        let pod = pod(&process.cgroup);
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", process.pid));
        pb::ProcessLook {
            pid: process.pid,
            name: comm.unwrap_or_default().trim_end().to_owned(),
            cgroup: process.cgroup.clone(),
            pod: pod.as_ref().map(|p| p.uid.clone()).unwrap_or_default(),
            container: pod.and_then(|p| p.container).unwrap_or_default(),
            io: Some(counts(&process.count)),
        }
    });
    look.processes = processes.collect();
}

fn counts(count: &IoCount) -> pb::IoCounts {
    pb::IoCounts {
        reads: count.reads,
        read_bytes: count.read_bytes,
        writes: count.writes,
        written_bytes: count.written_bytes,
        flushes: count.flushes,
        discards: count.discards,
    }
}

fn reader_look(reader: &ReaderStatus, motion: &str) -> pb::ReaderLook {
    let flow = |flow: Flow| pb::Flow {
        bytes: flow.bytes.0,
        last_ms: flow.last_ms,
    };
    pb::ReaderLook {
        ticket: reader.ticket.to_string(),
        who: reader.who.clone(),
        read: Some(flow(reader.read)),
        sent: reader.sent.map(flow),
        wrote: Some(flow(reader.wrote)),
        motion: motion.into(),
    }
}

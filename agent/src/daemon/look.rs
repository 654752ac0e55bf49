//! What a node knows of its volumes at one moment, for `drover top` and
//! `drover trace`: the controller's word, the kernel's counts of its own
//! devices, and the streams.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use drover_ebpf::{DISCARD, FLUSH, IoCount, READ, WRITE};
use tonic::Status;

use super::workload::Workload;
use crate::attach::ports::Witness as _;
use crate::backup::keeper::KeptStream;
use crate::evidence::DiskIo;
use crate::evidence::cgroups::pod;
use crate::evidence::streams::{Flow, ReaderStatus};
use crate::ids::VolumeId;
use crate::initiator::AttachedDisk;
use crate::rpc::agent_service::progress_message;
use crate::rpc::convert::judgement_message;
use crate::rpc::pb;

/// The controller is waited for so long: less than who asks for a look waits.
const CONTROLLER: Duration = Duration::from_secs(2);
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
        // Both at once, and not for long: what this node itself knows is worth
        // showing all the more when the controller is silent.
        let notes = async {
            match (&wanted, notes_since) {
                (Some(volume), Some(since)) => self.control.notes(volume, since).await,
                _ => Ok(Vec::new()),
            }
        };
        let asked = async { tokio::try_join!(self.control.volumes(), notes) };
        match tokio::time::timeout(CONTROLLER, asked).await {
            Ok(Ok((volumes, notes))) => {
                answer.notes = notes;
                for record in volumes.into_iter().filter(|v| here(&v.volume)) {
                    let look = looks.of(&record.volume);
                    look.record = Some(record);
                }
            }
            Ok(Err(error)) => answer.controller_silent = error.to_string(),
            Err(_) => {
                answer.controller_silent =
                    format!("the controller has not answered within {CONTROLLER:?}");
            }
        }
        for KeptStream { job, progress, .. } in self.keeper.list() {
            if here(job.volume().as_str()) {
                let message = progress_message(&job, progress.as_ref());
                looks.of(job.volume().as_str()).streams.push(message);
            }
        }
        match self.readers().await {
            Ok(mut readers) => {
                let window = self.evidence.window_ms();
                readers.retain(|reader| here(reader.volume.as_str()));
                for reader in &readers {
                    let look = reader_look(reader, reader.motion(window).name());
                    looks.of(reader.volume.as_str()).readers.push(look);
                }
            }
            Err(why) => answer.readers_silent = why,
        }
        let disks = self.initiator.disks();
        let mut disks = disks.map_err(|e| Status::unavailable(e.to_string()))?;
        disks.retain(|disk| here(disk.volume.as_str()));
        // Side by side: who holds a disk is counted again after a pause where
        // the counts do not add up.
        let devices = futures::future::join_all(disks.iter().map(|disk| self.device(disk)));
        for (disk, device) in disks.iter().zip(devices.await) {
            let look = looks.of(disk.volume.as_str());
            // While one export is followed by another, the newer one counts.
            if look.device.as_ref().is_none_or(|d| d.epoch < device.epoch) {
                look.device = Some(device);
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

    async fn device(&self, attached: &AttachedDisk) -> pb::DeviceLook {
        let AttachedDisk { disk, mounts, .. } = attached;
        let judgement = self.evidence.judge(disk, mounts).await;
        let (evidence, of) = (Arc::clone(&self.evidence), disk.clone());
        let counted = tokio::task::spawn_blocking(move || evidence.io(&of)).await;
        let mut look = pb::DeviceLook {
            disk: disk.name.clone(),
            epoch: attached.epoch.0,
            judgement: Some(judgement_message(&judgement, &disk.name)),
            ..Default::default()
        };
        match counted {
            Ok(Ok(io)) => fill(&mut look, &io),
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

fn fill(look: &mut pb::DeviceLook, io: &DiskIo) {
    look.io = Some(counts(&io.total));
    let mut latency = HashMap::new();
    for (direction, histogram) in &io.latency {
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
    if let Some(queue) = io.queue {
        look.reads_in_flight = Some(queue.in_flight.reads);
        look.writes_in_flight = Some(queue.in_flight.writes);
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
        ticket: reader
            .owner
            .ticket()
            .map(ToString::to_string)
            .unwrap_or_default(),
        who: reader.who.clone(),
        read: Some(flow(reader.read)),
        sent: reader.sent.map(flow),
        wrote: Some(flow(reader.wrote)),
        motion: motion.into(),
    }
}

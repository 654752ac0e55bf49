//! The workload's side of a node, wired: the initiator that attaches, the
//! evidence that judges, and the controller that keeps the tickets.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::Semaphore;
use tonic::Status;

use crate::attach::ports::{Disk, Judgement, Node as _, NodeAnswer, Witness as _};
use crate::attach::record::{Ticket, TicketKind};
use crate::backup::keeper::Keeper;
use crate::evidence::readers::{Reader, Who};
use crate::evidence::streams::{Owner, ReaderStatus};
use crate::evidence::{Evidence, Label};
use crate::ids::{Epoch, NodeId, TicketId, VolumeId};
use crate::initiator::{AttachedDisk, Initiator};
use crate::rpc::agent_service;
use crate::rpc::controller_client::ControllerClient;
use crate::rpc::pb;
use crate::rpc::pb::register_reader_request::Reader as Asked;

/// A foreign reader's ticket ends so long after its last progress.
const LEASE: Duration = Duration::from_secs(60);
/// A reader that moved a byte within this is progressing: its lease is renewed.
const PROGRESS_MS: u64 = 10_000;
/// How backup streams are doing is waited for so long.
const READERS: Duration = Duration::from_secs(2);

/// The workload's side of a node.
pub(super) struct Workload {
    pub(super) node: NodeId,
    pub(super) initiator: Arc<Initiator>,
    pub(super) evidence: Arc<Evidence>,
    pub(super) control: ControllerClient,
    pub(super) keeper: Arc<Keeper>,
    /// The claim that each volume was made for, and its namespace, of those
    /// that were attached at the last look.
    claims: Mutex<HashMap<VolumeId, (String, String)>>,
    /// One thread asks for the streams at a time.
    turn: Arc<Semaphore>,
}

impl Workload {
    pub(super) fn new(
        node: NodeId,
        initiator: Arc<Initiator>,
        evidence: Arc<Evidence>,
        control: ControllerClient,
        keeper: Arc<Keeper>,
    ) -> Self {
        Self {
            node,
            initiator,
            evidence,
            control,
            keeper,
            claims: Mutex::default(),
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    /// The volume's disk here, with drover's own mounts of it.
    fn disk(&self, volume: &VolumeId) -> Result<(Disk, Vec<PathBuf>), Status> {
        let found = self
            .initiator
            .disk(volume)
            .map_err(|e| Status::unavailable(e.to_string()))?;
        found.ok_or_else(|| {
            Status::failed_precondition(format!(
                "volume {volume} is not attached to node {}",
                self.node
            ))
        })
    }

    /// Says whose volumes the disks here are, so that metrics tell.
    pub(super) async fn label_disks(&self) {
        let disks = match self.initiator.disks() {
            Ok(disks) => disks,
            Err(error) => {
                tracing::debug!(%error, "disks keep the labels they have");
                return;
            }
        };
        let known = self.claims().clone();
        let strange = disks.iter().any(|d| !known.contains_key(&d.volume));
        // None: the controller cannot be asked now.
        let listed = match strange {
            true => self.control.volumes().await.ok(),
            false => None,
        };
        let mut claims = HashMap::new();
        let mut labels = HashMap::new();
        for AttachedDisk { volume, disk, .. } in disks {
            let claim = known.get(&volume).cloned().or_else(|| {
                // A volume that the controller does not know has no claim.
                let mut listed = listed.as_ref()?.iter();
                let record = listed.find(|v| v.volume == volume.as_str());
                Some(record.map_or_else(Default::default, |v| (v.pvc.clone(), v.namespace.clone())))
            });
            let (pvc, namespace) = claim.clone().unwrap_or_default();
            let label = Label {
                volume: volume.clone(),
                pvc,
                namespace,
                node: self.node.to_string(),
            };
            labels.insert(disk.diskseq, label);
            claims.extend(claim.map(|claim| (volume, claim)));
        }
        *self.claims() = claims;
        self.evidence.label(labels);
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<VolumeId, (String, String)>> {
        // It is replaced as a whole.
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How backup streams of other people's tools are doing, or why that is not told. It
    /// looks through /proc and cgroups, for which no worker waits.
    pub(super) async fn readers(&self) -> Result<Vec<ReaderStatus>, String> {
        let asked = async {
            let turn = Arc::clone(&self.turn).acquire_owned().await;
            let evidence = Arc::clone(&self.evidence);
            let told = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                evidence.readers()
            });
            let told = told.await;
            told.map_err(|error| format!("the look at backup streams failed: {error}"))
        };
        let readers = tokio::time::timeout(READERS, asked).await;
        let readers = readers.unwrap_or_else(|_| {
            Err(format!(
                "how backup streams are doing was not told within {READERS:?}"
            ))
        });
        readers.inspect_err(|why| tracing::warn!("{why}"))
    }

    /// Renews the leases of registered readers that the kernel saw reading, and ends the
    /// tickets of those that are gone.
    pub(super) async fn look_after_readers(&self) {
        // What is not told now is with the next look.
        for reader in self.readers().await.unwrap_or_default() {
            let last_progress_ms = reader.last_progress_ms();
            let ReaderStatus {
                owner,
                volume,
                alive,
                who,
                ..
            } = reader;
            // A tool known by its name has no claim to look after.
            let Owner::Ticket(ticket) = owner else {
                continue;
            };
            if !alive {
                let why = format!("{who} has ended");
                match self.control.end_ticket(&volume, &ticket, &why).await {
                    Ok(()) => self.evidence.unregister(&ticket),
                    Err(error) => tracing::debug!(%ticket, %error, "a ticket's end was not told"),
                }
            } else if last_progress_ms.is_some_and(|ms| ms < PROGRESS_MS)
                && let Err(error) = self.control.renew_ticket(&volume, &ticket, LEASE).await
            {
                tracing::debug!(%ticket, %error, "a ticket was not renewed");
            }
        }
    }
}

#[tonic::async_trait]
impl agent_service::Workload for Workload {
    async fn release(&self, volume: &VolumeId, epoch: Epoch) -> NodeAnswer {
        self.initiator.release(volume, epoch).await
    }

    async fn interrupt(&self, volume: &VolumeId, ticket: &TicketId, grace: Duration) -> bool {
        self.initiator.interrupt(volume, ticket, grace).await
    }

    async fn register_reader(&self, volume: &VolumeId, asked: Asked) -> Result<TicketId, Status> {
        let (disk, _) = self.disk(volume)?;
        let (who, owner) = match asked {
            Asked::Pid(pid) => (Who::Process(pid), format!("pid {pid}")),
            Asked::Cgroup(path) => (Who::Cgroup(path.clone().into()), format!("cgroup {path}")),
        };
        let ticket = TicketId::random();
        let reader = Reader {
            who,
            volume: volume.clone(),
            ticket: ticket.clone(),
            disk,
        };
        self.evidence
            .register(reader)
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        let claim = Ticket {
            id: ticket.clone(),
            kind: TicketKind::Backup,
            node: self.node.clone(),
            owner,
            interruptible: true,
            home_side: false,
            lease_ends: Some(SystemTime::now() + LEASE),
        };
        if let Err(error) = self.control.take_ticket(volume, &claim).await {
            self.evidence.unregister(&ticket);
            return Err(Status::unavailable(error.to_string()));
        }
        Ok(ticket)
    }

    async fn judge(&self, volume: &VolumeId) -> Result<(Disk, Judgement), Status> {
        let (disk, mounts) = self.disk(volume)?;
        let judgement = self.evidence.judge(&disk, &mounts).await;
        Ok((disk, judgement))
    }

    async fn look(
        &self,
        volume: Option<VolumeId>,
        notes_since: Option<SystemTime>,
    ) -> Result<pb::LookAnswer, Status> {
        self.look_at(volume, notes_since).await
    }
}

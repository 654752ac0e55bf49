//! Proofs: a [`Receipt`] that an epoch has ended, and the [`Grant`] that needs one.
//!
//! Both can only be made here. A receipt is made of a home's [`Settlement`]
//! that answers the very fence it was asked for; a grant is made of a receipt,
//! or of the fact that no epoch came before. An export is asked for with a
//! grant and nothing else, so "no receipt, no grant" holds by construction.
//! A receipt may also be read back from where the arbiter kept it.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::moment;
use super::ports::{ExportRequest, FenceRequest, NodeAnswer, Note, SettledBy, Settlement, micros};
use crate::ids::{Epoch, NodeId, VolumeId};

/// The first epoch that is ever granted; before it nothing was exported.
const FIRST: Epoch = Epoch(1);

/// How many digits of an id are its time.
const STAMP: usize = 20;

/// What an id says after its time.
fn tail(volume: &VolumeId, closed: Epoch) -> String {
    format!("-{volume}-{closed}")
}

/// Why a settlement or a receipt proves nothing here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoProof {
    /// The home answered for another volume or epoch than it was asked about.
    #[error(
        "fence of volume {volume} up to epoch {epoch} was answered for volume {answered_volume} epoch {answered_epoch}"
    )]
    OtherFence {
        /// The volume asked about.
        volume: VolumeId,
        /// The epoch asked about.
        epoch: Epoch,
        /// The volume in the answer.
        answered_volume: VolumeId,
        /// The epoch in the answer.
        answered_epoch: Epoch,
    },
    /// The receipt does not cover what came before the epoch to grant.
    #[error("volume {volume} epoch {epoch}: no receipt for what came before it")]
    NotCovered {
        /// The volume.
        volume: VolumeId,
        /// The epoch that was to be granted.
        epoch: Epoch,
    },
}

/// The proof that an epoch of a volume, and all before it, has ended for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    id: String,
    #[serde(with = "moment")]
    time: SystemTime,
    volume: VolumeId,
    closed: Epoch,
    node: Option<NodeId>,
    sessions_ended: u32,
    inside_at_close: u32,
    settled_by: SettledBy,
    #[serde(default)]
    unsettled: u32,
    #[serde(with = "micros")]
    settle_time: Duration,
    late_refused: u64,
    #[serde(default)]
    late_since: u64,
    #[serde(with = "moment::optional")]
    last_write: Option<SystemTime>,
    #[serde(with = "micros")]
    asked_to_settled: Duration,
    evidence: String,
    answer: Option<NodeAnswer>,
}

impl Receipt {
    /// Makes the receipt of a fence. `took` is the time from asking to the answer.
    ///
    /// # Errors
    /// [`NoProof::OtherFence`] when the settlement is of something else.
    pub fn new(
        asked: &FenceRequest,
        settlement: Settlement,
        took: Duration,
        now: SystemTime,
    ) -> Result<Self, NoProof> {
        if settlement.volume != asked.volume || settlement.epoch != asked.epoch {
            return Err(NoProof::OtherFence {
                volume: asked.volume.clone(),
                epoch: asked.epoch,
                answered_volume: settlement.volume,
                answered_epoch: settlement.epoch,
            });
        }
        let stamp = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_micros();
        Ok(Self {
            // By time first, so that ids sort as they came.
            id: format!(
                "{stamp:0STAMP$}{}",
                tail(&settlement.volume, settlement.epoch)
            ),
            time: now,
            evidence: evidence(&settlement, now),
            volume: settlement.volume,
            closed: settlement.epoch,
            node: settlement.node,
            sessions_ended: settlement.sessions_ended,
            inside_at_close: settlement.inside_at_close,
            settled_by: settlement.settled_by,
            unsettled: settlement.unsettled,
            settle_time: settlement.settle_time,
            late_refused: settlement.late_refused,
            late_since: 0,
            last_write: settlement.last_write,
            asked_to_settled: took,
            answer: None,
        })
    }

    /// Tells whether an id is of a receipt of this epoch's end.
    pub fn is_of(volume: &VolumeId, closed: Epoch) -> impl Fn(&str) -> bool {
        let tail = tail(volume, closed);
        move |id| id.get(STAMP..) == Some(&tail)
    }

    /// Its id; ids sort by time.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The volume.
    pub fn volume(&self) -> &VolumeId {
        &self.volume
    }

    /// The epoch that has ended, with all before it.
    pub fn closed(&self) -> Epoch {
        self.closed
    }

    /// From asking the home until its answer.
    pub fn took(&self) -> Duration {
        self.asked_to_settled
    }

    /// From the closing of the gate until the last command inside had ended.
    pub fn settle_time(&self) -> Duration {
        self.settle_time
    }

    /// Commands that came after the gate had closed, up to the receipt.
    pub fn late_refused(&self) -> u64 {
        self.late_refused
    }

    /// How the commands inside came to their end.
    pub fn settled_by(&self) -> SettledBy {
        self.settled_by
    }

    /// The same receipt with what the old node answered; nothing else depends on it.
    #[must_use]
    pub fn with_answer(self, answer: NodeAnswer) -> Self {
        Self {
            answer: Some(answer),
            ..self
        }
    }

    /// The same receipt when so many commands have come late by now, since the
    /// gate closed. A number lower than before is an older one, and is let be.
    #[must_use]
    pub fn with_late(self, commands: u64) -> Self {
        let since = commands.saturating_sub(self.late_refused);
        Self {
            late_since: self.late_since.max(since),
            ..self
        }
    }

    /// The receipt as a line of the journal. Its kind is `fenced`, or
    /// `nothing-open` where there was no export to end.
    pub fn to_note(&self) -> Note {
        let held = match &self.node {
            Some(node) => format!("node {node}"),
            None => "nobody".to_owned(),
        };
        let (kind, how) = match self.settled_by {
            SettledBy::NothingOpen => ("nothing-open", "no export was open".to_owned()),
            SettledBy::Drained => ("fenced", self.settling("each ended by itself")),
            SettledBy::ExitBarrier => (
                "fenced",
                self.settling("their process had died, and the pool's lock came free after them"),
            ),
            SettledBy::Operator => (
                "fenced",
                format!(
                    "{} sessions ended, {} commands inside when the gate closed, and by the \
                     operator's word {} were not waited for: they may still land",
                    self.sessions_ended, self.inside_at_close, self.unsettled
                ),
            ),
        };
        let answer = match &self.answer {
            None => "the old node has not answered".to_owned(),
            Some(NodeAnswer::Clean) => "the old node is clean".to_owned(),
            Some(NodeAnswer::Held(by)) => format!("on the old node {by} holds the dead device"),
            Some(NodeAnswer::Silent(why)) => format!("the old node was silent ({why})"),
            Some(NodeAnswer::Shut {
                gate,
                judgement,
                held,
            }) => {
                let held = match held {
                    None => " and is clean".to_owned(),
                    Some(by) => format!("; {by} holds the dead device"),
                };
                let saw = judgement.as_ref().map_or_else(String::new, |judgement| {
                    format!("; who held it there: {}", judgement.describe())
                });
                format!("the old node shut {}{held}{saw}", gate.describe())
            }
        };
        Note {
            time: self.time,
            volume: Some(self.volume.clone()),
            node: self.node.clone(),
            kind: kind.to_owned(),
            text: format!(
                "epoch {} of {held} has ended: {how}; {} late commands refused until then, {} since; {answer}; {}",
                self.closed, self.late_refused, self.late_since, self.evidence
            ),
            detail: serde_json::to_value(self).unwrap_or_default(),
        }
    }

    fn settling(&self, how: &str) -> String {
        let sessions = self.sessions_ended;
        match self.inside_at_close {
            0 => format!("{sessions} sessions ended, no command inside when the gate closed"),
            inside => format!(
                "{sessions} sessions ended, {inside} commands inside when the gate closed, {how}, in {:?}",
                self.settle_time
            ),
        }
    }
}

fn evidence(settlement: &Settlement, now: SystemTime) -> String {
    match settlement.last_write {
        None => "the home saw no write of it".to_owned(),
        Some(last) => match now.duration_since(last) {
            Ok(ago) => format!("the home saw its last write {} ms before", ago.as_millis()),
            Err(_) => "the home saw its last write just now".to_owned(),
        },
    }
}

/// Why the way to an epoch is clear.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cleared {
    /// No epoch came before: nothing was ever exported.
    First,
    /// All that came before has ended.
    By(Box<Receipt>),
}

/// The right to ask a home for one export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    request: ExportRequest,
}

impl Grant {
    /// Grants what `request` says.
    ///
    /// # Errors
    /// [`NoProof::NotCovered`] when `cleared` is of another volume, or does not
    /// end right before the epoch, or claims to be the first and is not.
    pub fn new(cleared: &Cleared, request: ExportRequest) -> Result<Self, NoProof> {
        let covered = match cleared {
            Cleared::First => request.epoch == FIRST,
            Cleared::By(receipt) => {
                receipt.volume == request.volume && receipt.closed.next() == request.epoch
            }
        };
        if covered {
            Ok(Self { request })
        } else {
            Err(NoProof::NotCovered {
                volume: request.volume,
                epoch: request.epoch,
            })
        }
    }

    /// What may be asked of the home.
    pub fn request(&self) -> &ExportRequest {
        &self.request
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::super::ports::{
        GateLayer, GateReport, HostIdentity, Judgement, Protocol, Recorded, Verdict,
    };
    use super::*;

    fn asked(epoch: u64) -> FenceRequest {
        FenceRequest {
            volume: "v".parse().unwrap(),
            epoch: Epoch(epoch),
            recorded: Recorded::default(),
        }
    }

    fn settlement(volume: &str, epoch: u64) -> Settlement {
        Settlement {
            volume: volume.parse().unwrap(),
            epoch: Epoch(epoch),
            node: Some("a".parse().unwrap()),
            sessions_ended: 3,
            inside_at_close: 2,
            settled_by: SettledBy::Drained,
            unsettled: 0,
            settle_time: Duration::from_millis(4),
            late_refused: 1,
            last_write: None,
        }
    }

    fn request(volume: &str, epoch: u64) -> ExportRequest {
        ExportRequest {
            volume: volume.parse().unwrap(),
            epoch: Epoch(epoch),
            node: "b".parse().unwrap(),
            host: HostIdentity::of("nqn.b", Uuid::nil()),
            protocol: Protocol::NvmeTcp,
            read_only: false,
        }
    }

    fn receipt(epoch: u64) -> Receipt {
        let took = Duration::from_millis(5);
        Receipt::new(
            &asked(epoch),
            settlement("v", epoch),
            took,
            SystemTime::now(),
        )
        .unwrap()
    }

    #[test]
    fn a_settlement_of_another_fence_is_no_receipt() {
        for wrong in [settlement("v", 3), settlement("v", 5), settlement("w", 4)] {
            let made = Receipt::new(&asked(4), wrong, Duration::ZERO, SystemTime::now());
            assert!(matches!(made, Err(NoProof::OtherFence { .. })));
        }
    }

    #[test]
    fn a_grant_needs_what_came_before_it_to_have_ended() {
        let by = Cleared::By(Box::new(receipt(4)));
        assert!(Grant::new(&by, request("v", 5)).is_ok());
        for wrong in [
            request("v", 4),
            request("v", 3),
            request("v", 6),
            request("w", 5),
        ] {
            assert!(matches!(
                Grant::new(&by, wrong),
                Err(NoProof::NotCovered { .. })
            ));
        }
        assert!(Grant::new(&Cleared::First, request("v", 1)).is_ok());
        assert!(Grant::new(&Cleared::First, request("v", 2)).is_err());
    }

    #[test]
    fn a_receipt_says_what_the_old_node_shut() {
        let gate = GateReport {
            layers: vec![GateLayer::Files, GateLayer::Opens, GateLayer::Removal],
            shut_in: Duration::from_micros(80),
            took: Duration::from_millis(12),
        };
        let judgement = Judgement {
            verdict: Verdict::Quiet,
            reason: "nobody holds it".to_owned(),
            holders: Vec::new(),
        };
        let receipt = receipt(4).with_answer(NodeAnswer::Shut {
            gate,
            judgement: Some(Box::new(judgement)),
            held: None,
        });
        let text = serde_json::to_string(&receipt).unwrap();
        assert_eq!(serde_json::from_str::<Receipt>(&text).unwrap(), receipt);
        let note = receipt.to_note();
        let said = "the old node shut its gate (files, opens, removal) in 12ms, the eBPF part of it in 80µs and is clean; who held it there: quiet (nobody holds it)";
        assert!(note.text.contains(said), "{}", note.text);
        assert_eq!(note.detail["answer"]["shut"]["gate"]["shut_in"], 80);
    }

    #[test]
    fn a_receipt_tells_what_came_late_since() {
        let mut receipt = receipt(4);
        for (by_now, since) in [(1, 0), (7, 6), (3, 6), (0, 6), (8, 7)] {
            receipt = receipt.with_late(by_now);
            let note = receipt.to_note();
            assert_eq!(note.detail["late_since"], since);
            let said = format!("1 late commands refused until then, {since} since");
            assert!(note.text.contains(&said), "{}", note.text);
        }
        let (v, w) = ("v".parse().unwrap(), "w-4".parse().unwrap());
        assert!(Receipt::is_of(&v, Epoch(4))(receipt.id()));
        assert!(!Receipt::is_of(&v, Epoch(5))(receipt.id()));
        assert!(!Receipt::is_of(&w, Epoch(4))(receipt.id()));
        assert!(!Receipt::is_of(&v, Epoch(4))(""));
    }

    #[test]
    fn a_receipt_reads_back_as_it_was_and_says_who_answered() {
        let receipt = receipt(4).with_answer(NodeAnswer::Silent("connect refused".to_owned()));
        let text = serde_json::to_string(&receipt).unwrap();
        assert_eq!(serde_json::from_str::<Receipt>(&text).unwrap(), receipt);
        let note = receipt.to_note();
        assert_eq!(note.kind, "fenced");
        assert!(note.text.contains("connect refused"), "{}", note.text);
        assert_eq!(note.detail["sessions_ended"], 3);
    }
}

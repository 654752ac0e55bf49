//! A fence: what is asked of a home and of the old node, and what they answer.

use super::{Malformed, judgement_message, moment, optional, span, span_message, text};
use crate::attach::ports::{
    FenceRequest, GateLayer, GateReport, NodeAnswer, Recorded, SettledBy, Settlement,
};
use crate::ids::Epoch;
use crate::rpc::pb;

impl From<&FenceRequest> for pb::FenceRequest {
    fn from(request: &FenceRequest) -> Self {
        Self {
            volume: request.volume.to_string(),
            epoch: request.epoch.0,
            recorded_epoch: request.recorded.epoch.0,
            recorded_end: request.recorded.ended,
        }
    }
}

impl TryFrom<pb::FenceRequest> for FenceRequest {
    type Error = Malformed;
    fn try_from(request: pb::FenceRequest) -> Result<Self, Malformed> {
        Ok(Self {
            volume: text("volume", &request.volume)?,
            epoch: Epoch(request.epoch),
            recorded: Recorded {
                epoch: Epoch(request.recorded_epoch),
                ended: request.recorded_end,
            },
        })
    }
}

impl From<NodeAnswer> for pb::ReleaseAnswer {
    fn from(answer: NodeAnswer) -> Self {
        let (clean, held_by, shut) = match answer {
            NodeAnswer::Clean => (true, String::new(), None),
            NodeAnswer::Held(what) | NodeAnswer::Silent(what) => (false, what, None),
            NodeAnswer::Shut {
                gate,
                judgement,
                held,
            } => (
                held.is_none(),
                held.unwrap_or_default(),
                Some((gate, judgement)),
            ),
        };
        Self {
            clean,
            held_by,
            gate: shut.map(|(gate, judgement)| pb::ShutGate {
                layers: gate.layers.iter().map(|l| l.name().to_owned()).collect(),
                shut_in: Some(span_message(gate.shut_in)),
                took: Some(span_message(gate.took)),
                judgement: judgement.map(|judgement| judgement_message(&judgement, "")),
            }),
        }
    }
}

impl TryFrom<pb::ReleaseAnswer> for NodeAnswer {
    type Error = Malformed;
    fn try_from(message: pb::ReleaseAnswer) -> Result<Self, Malformed> {
        let held = (!message.clean).then_some(message.held_by);
        let Some(shut) = message.gate else {
            return Ok(held.map_or(Self::Clean, Self::Held));
        };
        // A layer that only a newer node knows is left out.
        let layers = shut.layers.iter().filter_map(|name| GateLayer::named(name));
        let gate = GateReport {
            layers: layers.collect(),
            shut_in: span("gate.shut_in", shut.shut_in)?,
            took: span("gate.took", shut.took)?,
        };
        Ok(Self::Shut {
            gate,
            judgement: shut.judgement.map(|judgement| Box::new(judgement.into())),
            held,
        })
    }
}

impl From<&Settlement> for pb::FenceAnswer {
    fn from(settlement: &Settlement) -> Self {
        use pb::fence_answer::SettledBy as Wire;
        let settled_by = match settlement.settled_by {
            SettledBy::NothingOpen => Wire::NothingOpen,
            SettledBy::Drained => Wire::Drained,
            SettledBy::ExitBarrier => Wire::ExitBarrier,
            SettledBy::Operator => Wire::Operator,
        };
        Self {
            volume: settlement.volume.to_string(),
            epoch: settlement.epoch.0,
            node: settlement
                .node
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            sessions_ended: settlement.sessions_ended,
            inside_at_close: settlement.inside_at_close,
            settled_by: settled_by.into(),
            unsettled: settlement.unsettled,
            settle_time: Some(span_message(settlement.settle_time)),
            late_refused: settlement.late_refused,
            last_write: settlement.last_write.map(Into::into),
        }
    }
}

impl TryFrom<pb::FenceAnswer> for Settlement {
    type Error = Malformed;
    fn try_from(answer: pb::FenceAnswer) -> Result<Self, Malformed> {
        use pb::fence_answer::SettledBy as Wire;
        let settled_by = match Wire::try_from(answer.settled_by) {
            Ok(Wire::NothingOpen) => SettledBy::NothingOpen,
            Ok(Wire::Drained) => SettledBy::Drained,
            Ok(Wire::ExitBarrier) => SettledBy::ExitBarrier,
            Ok(Wire::Operator) => SettledBy::Operator,
            Err(unknown) => {
                return Err(Malformed {
                    field: "settled_by",
                    why: unknown.to_string(),
                });
            }
        };
        Ok(Self {
            volume: text("volume", &answer.volume)?,
            epoch: Epoch(answer.epoch),
            node: optional("node", &answer.node)?,
            sessions_ended: answer.sessions_ended,
            inside_at_close: answer.inside_at_close,
            settled_by,
            unsettled: answer.unsettled,
            settle_time: span("settle_time", answer.settle_time)?,
            late_refused: answer.late_refused,
            last_write: answer
                .last_write
                .map(|t| moment("last_write", Some(t)))
                .transpose()?,
        })
    }
}

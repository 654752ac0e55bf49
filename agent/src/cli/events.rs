//! `drover events`: what happened, with the receipts of every fence.

use std::time::SystemTime;

use anyhow::Context;
use serde_json::{Value, json};

use super::args::{Controller, Output, Wanted};
use super::print::{moment, outln};
use super::verbs::CALL;
use crate::config::Span;
use crate::rpc::agent_client::within;
use crate::rpc::pb;

/// Shows the events that are asked for, the oldest first.
///
/// # Errors
/// When the controller refuses or does not answer.
pub async fn show(wanted: Wanted, output: &Output, controller: &Controller) -> anyhow::Result<()> {
    let since = match wanted.since {
        None => None,
        // Longer than there is time: all of it.
        Some(Span(ago)) => SystemTime::now().checked_sub(ago),
    };
    let name = |name: Option<String>| name.unwrap_or_default();
    let request = pb::ListNotesRequest {
        volume: name(wanted.volume.map(|volume| volume.to_string())),
        node: name(wanted.node.map(|node| node.to_string())),
        receipts: wanted.receipts,
        since: since.map(Into::into),
    };
    let answer = controller.service().list_notes(within(CALL, request)).await;
    for note in controller.answer(answer)?.notes {
        if output.json {
            outln!("{}", line(&note)?);
        } else {
            outln!("{}  {:16}  {}", time(&note), note.kind, note.text);
        }
    }
    Ok(())
}

fn time(note: &pb::Note) -> String {
    let time = note.time.and_then(|time| SystemTime::try_from(time).ok());
    moment(time.unwrap_or(SystemTime::UNIX_EPOCH))
}

/// An event as `--json` prints it. Of a receipt docs/receipt.schema.json says
/// what is in it.
fn line(note: &pb::Note) -> anyhow::Result<Value> {
    let detail: Value =
        serde_json::from_str(&note.detail).context("an event's detail is no JSON")?;
    Ok(json!({
        "time": time(note), "volume": note.volume, "node": note.node,
        "kind": note.kind, "text": note.text, "detail": detail,
    }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::attach::ports::{
        FenceRequest, GateLayer, GateReport, Holder, Judgement, NodeAnswer, Pod, Recorded,
        SettledBy, Settlement, Verdict,
    };
    use crate::attach::proof::Receipt;
    use crate::ids::Epoch;

    const SCHEMA: &str = include_str!("../../../docs/receipt.schema.json");

    fn receipt(settled_by: SettledBy, known: bool) -> Receipt {
        let asked = FenceRequest {
            volume: "pvc-1".parse().unwrap(),
            epoch: Epoch(7),
            recorded: Recorded::default(),
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let settlement = Settlement {
            volume: asked.volume.clone(),
            epoch: asked.epoch,
            node: known.then(|| "a".parse().unwrap()),
            sessions_ended: 2,
            inside_at_close: 32,
            settled_by,
            unsettled: 0,
            settle_time: Duration::from_micros(1_500),
            late_refused: 3,
            last_write: known.then(|| now - Duration::from_millis(20)),
        };
        Receipt::new(&asked, settlement, Duration::from_millis(4), now).unwrap()
    }

    fn judgement() -> Judgement {
        let holder = |pod| Holder {
            pid: 7,
            name: "postgres".into(),
            cgroup: "/kubepods/pod1/2".into(),
            pod,
            writable: true,
            registered: false,
            last_read_ms: None,
            last_write_ms: Some(3),
            read_bytes: 0,
            written_bytes: 4096,
        };
        let pod = |container| {
            Some(Pod {
                uid: "1".into(),
                container,
            })
        };
        Judgement {
            verdict: Verdict::Live,
            reason: "postgres can write".into(),
            holders: [None, pod(None), pod(Some("2".into()))].map(holder).into(),
        }
    }

    fn receipts() -> Vec<Receipt> {
        let gate = |layers| GateReport {
            layers,
            shut_in: Duration::from_micros(90),
            took: Duration::from_millis(12),
        };
        let answers = [
            NodeAnswer::Clean,
            NodeAnswer::Held("pid 7 (restic)".into()),
            NodeAnswer::Silent("no answer within 2s".into()),
            NodeAnswer::Shut {
                gate: gate(GateLayer::ALL.to_vec()),
                judgement: Some(Box::new(judgement())),
                held: None,
            },
            NodeAnswer::Shut {
                gate: gate(Vec::new()),
                judgement: None,
                held: Some("still mounted".into()),
            },
        ];
        let mut all: Vec<_> = answers
            .into_iter()
            .map(|answer| receipt(SettledBy::Drained, true).with_answer(answer))
            .collect();
        all.push(receipt(SettledBy::ExitBarrier, true));
        all.push(receipt(SettledBy::NothingOpen, false));
        all
    }

    fn schema() -> jsonschema::Validator {
        let schema: Value = serde_json::from_str(SCHEMA).expect("docs/receipt.schema.json is JSON");
        jsonschema::meta::validate(&schema).expect("it is a schema of its draft");
        jsonschema::validator_for(&schema).expect("a validator")
    }

    #[test]
    fn every_receipt_is_as_its_schema_says() {
        let schema = schema();
        for receipt in receipts() {
            let line = line(&pb::Note::from(&receipt.to_note())).unwrap();
            let faults: Vec<_> = schema
                .iter_errors(&line)
                .map(|fault| format!("{}: {fault}", fault.instance_path))
                .collect();
            assert!(faults.is_empty(), "{faults:?} in {line:#}");
        }
    }

    #[test]
    fn what_the_schema_does_not_know_is_a_fault() {
        let schema = schema();
        let whole = line(&pb::Note::from(&receipts()[3].to_note())).unwrap();
        let fields = whole["detail"].as_object().unwrap().keys();
        for field in fields {
            let mut changed = whole.clone();
            changed["detail"].as_object_mut().unwrap().remove(field);
            assert!(!schema.is_valid(&changed), "{field} may be missing");
        }
        let mut changed = whole.clone();
        changed["detail"]["unheard_of"] = json!(1);
        assert!(!schema.is_valid(&changed));
        let mut changed = whole;
        changed["detail"]["settled_by"] = json!("luck");
        assert!(!schema.is_valid(&changed));
    }
}

//! The transition table, cell by cell, and random histories against a home
//! that keeps its own record.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::attach::ports::{Content, Protocol, SettledBy, Settlement, Target};
use crate::attach::proof::Receipt;
use crate::home::decide::{self, ExportMove, FenceMove};
use crate::ids::Bytes;
use crate::pool::record::{ExportState, OpenExport, Record};

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

fn holder(name: &str) -> Holder {
    Holder {
        node: node(name),
        host: HostIdentity::of(format!("nqn.{name}"), Uuid::nil()),
        mode: AccessMode::SingleWriter,
    }
}

fn publish(name: &str) -> Event {
    Event::Publish {
        holder: holder(name),
        lost: BTreeSet::new(),
    }
}

fn publish_while_lost(name: &str, lost: &str) -> Event {
    Event::Publish {
        holder: holder(name),
        lost: BTreeSet::from([node(lost)]),
    }
}

fn fresh() -> VolumeState {
    VolumeState::new(VolumeSpec {
        id: "v".parse().unwrap(),
        name: "pvc".to_owned(),
        size: Bytes(1 << 20),
        content: Content::Empty,
        protocol: Protocol::NvmeTcp,
        home: node("h"),
        busy_deadline: Duration::from_secs(120),
        parameters: BTreeMap::new(),
    })
}

fn receipt(closing: Epoch) -> Receipt {
    let asked = FenceRequest {
        volume: "v".parse().unwrap(),
        epoch: closing,
        recorded: Recorded::default(),
    };
    let settlement = Settlement {
        volume: asked.volume.clone(),
        epoch: closing,
        node: None,
        sessions_ended: 0,
        inside_at_close: 0,
        settled_by: SettledBy::Drained,
        unsettled: 0,
        settle_time: Duration::ZERO,
        late_refused: 0,
        last_write: None,
    };
    Receipt::new(&asked, settlement, Duration::ZERO, NOW).unwrap()
}

fn exported(epoch: Epoch) -> Exported {
    Exported {
        epoch,
        target: Target {
            protocol: Protocol::NvmeTcp,
            name: format!("nqn.v:{epoch}"),
            unit: Uuid::nil(),
            address: "127.0.0.1:4420".parse().unwrap(),
            proves: false,
            chap: None,
        },
        ever_written: false,
    }
}

/// The result of what the state waits for.
fn done(state: &VolumeState) -> Event {
    let intent = state.intent().unwrap();
    result(
        &intent,
        match &intent.task {
            Task::Create { .. } => Outcome::Created,
            Task::Fence { request, .. } => Outcome::Fenced(receipt(request.epoch)),
            Task::Export(grant) => Outcome::Exported(exported(grant.request().epoch)),
            Task::Delete { .. } => Outcome::Deleted,
        },
    )
}

fn result(intent: &Intent, outcome: Outcome) -> Event {
    Event::Result {
        action: intent.id,
        epoch: intent.epoch,
        outcome,
    }
}

fn refused(state: &VolumeState, error: HomeError) -> Event {
    match state.intent() {
        Some(intent) => result(&intent, Outcome::Refused(error)),
        // Nobody waits: whatever comes is late.
        None => Event::Result {
            action: ActionId(1),
            epoch: state.epoch,
            outcome: Outcome::Refused(error),
        },
    }
}

fn go(state: &VolumeState, event: Event) -> VolumeState {
    state.step(event, NOW).unwrap().0
}

/// A state at each stage; where there is a holder, it is node a.
fn at(stage: Stage) -> VolumeState {
    let idle = go(&fresh(), done(&fresh()));
    let exporting = go(&idle, publish("a"));
    let attached = go(&exporting, done(&exporting));
    let closing = go(&attached, Event::Unpublish(None));
    let rested = go(&closing, done(&closing));
    let ending = go(&rested, Event::Delete);
    let deleting = go(&ending, done(&ending));
    let gone = go(&deleting, done(&deleting));
    let state = match stage {
        Stage::Creating => fresh(),
        Stage::Idle => rested,
        Stage::Closing => closing,
        Stage::Handing => go(&rested, publish("a")),
        Stage::Exporting => exporting,
        Stage::Attached => attached,
        Stage::Ending => ending,
        Stage::Deleting => deleting,
        Stage::Gone => gone,
    };
    assert_eq!(state.stage(), stage);
    state
}

fn ticket(id: &str, kind: TicketKind, on: &str, interruptible: bool, home_side: bool) -> Ticket {
    Ticket {
        id: id.parse().unwrap(),
        kind,
        node: node(on),
        owner: "test".to_owned(),
        interruptible,
        home_side,
        lease_ends: None,
    }
}

fn take(ticket: Ticket) -> Event {
    Event::Take {
        ticket,
        lease: Some(Duration::from_secs(60)),
    }
}

fn fail_restore(id: &str) -> Event {
    Event::FailRestore {
        ticket: id.parse().unwrap(),
        why: "no space".to_owned(),
    }
}

/// A volume that is being made for restore r.
fn for_restore() -> VolumeState {
    let lease = Duration::from_secs(60);
    VolumeState::for_restore(fresh().spec, "r".parse().unwrap(), lease, NOW)
}

fn backup(on: &str) -> Ticket {
    ticket("backup", TicketKind::Backup, on, true, false)
}

/// What a cell of the table says: a stage, or the first word of a refusal.
fn cell(state: &VolumeState, event: Event) -> String {
    match state.step(event, NOW) {
        Ok((next, _)) => next.stage().name().to_owned(),
        Err(refusal) => match refusal {
            Refusal::HeldBy(_) => "HELD",
            Refusal::NodeLost(_) => "LOST",
            Refusal::InUse(_) => "INUSE",
            Refusal::Incompatible(_) => "INCOMPATIBLE",
            Refusal::NoVolume => "NOVOLUME",
            Refusal::NoTicket(_) => "NOTICKET",
            Refusal::NotYet(_) => "NOTYET",
        }
        .to_owned(),
    }
}

type Row = (&'static str, fn(&VolumeState) -> Event, [&'static str; 9]);

/// Columns: creating, idle, closing, handing, exporting, attached, ending, deleting, gone.
/// "." is: the phase stays.
const TABLE: &[Row] = &[
    (
        "publish to a",
        |_| publish("a"),
        [
            "NOTYET", "handing", "handing", ".", ".", ".", "NOVOLUME", "NOVOLUME", "NOVOLUME",
        ],
    ),
    (
        "publish to b",
        |_| publish("b"),
        [
            "NOTYET", "handing", "handing", "HELD", "HELD", "HELD", "NOVOLUME", "NOVOLUME",
            "NOVOLUME",
        ],
    ),
    (
        "publish to b, a lost",
        |_| publish_while_lost("b", "a"),
        [
            "NOTYET", "handing", "handing", "handing", "handing", "handing", "NOVOLUME",
            "NOVOLUME", "NOVOLUME",
        ],
    ),
    (
        "publish to b, b lost",
        |_| publish_while_lost("b", "b"),
        [
            "NOTYET", "LOST", "LOST", "LOST", "LOST", "LOST", "NOVOLUME", "NOVOLUME", "NOVOLUME",
        ],
    ),
    (
        "unpublish from a",
        |_| Event::Unpublish(Some(node("a"))),
        [
            ".", ".", ".", "closing", "closing", "closing", ".", ".", ".",
        ],
    ),
    (
        "unpublish from b",
        |_| Event::Unpublish(Some(node("b"))),
        [".", ".", ".", ".", ".", ".", ".", ".", "."],
    ),
    (
        "unpublish from all",
        |_| Event::Unpublish(None),
        [
            ".", ".", ".", "closing", "closing", "closing", ".", ".", ".",
        ],
    ),
    (
        "node a lost",
        |_| Event::NodeLost(node("a")),
        [
            ".", ".", ".", "closing", "closing", "closing", ".", ".", ".",
        ],
    ),
    (
        "node b lost",
        |_| Event::NodeLost(node("b")),
        [".", ".", ".", ".", ".", ".", ".", ".", "."],
    ),
    (
        "delete",
        |_| Event::Delete,
        [
            "NOTYET", "ending", "ending", "INUSE", "INUSE", "INUSE", ".", ".", ".",
        ],
    ),
    (
        "take a backup's ticket",
        |_| take(backup("b")),
        [
            "NOTYET", ".", ".", ".", ".", ".", "NOVOLUME", "NOVOLUME", "NOVOLUME",
        ],
    ),
    (
        "take a restore's ticket",
        |_| take(ticket("r", TicketKind::Restore, "h", false, true)),
        [
            "NOTYET", ".", "NOTYET", "INUSE", "INUSE", "INUSE", "NOVOLUME", "NOVOLUME", "NOVOLUME",
        ],
    ),
    (
        "take a maintenance ticket",
        |_| take(ticket("m", TicketKind::Maintenance, "b", false, false)),
        [
            "NOTYET", ".", ".", ".", ".", ".", "NOVOLUME", "NOVOLUME", "NOVOLUME",
        ],
    ),
    (
        "take a workload's ticket",
        |_| take(ticket("w", TicketKind::Workload, "b", false, false)),
        [
            "NOTYET",
            "INCOMPATIBLE",
            "INCOMPATIBLE",
            "INCOMPATIBLE",
            "INCOMPATIBLE",
            "INCOMPATIBLE",
            "NOVOLUME",
            "NOVOLUME",
            "NOVOLUME",
        ],
    ),
    (
        "renew an unknown ticket",
        |_| Event::Renew {
            ticket: "x".parse().unwrap(),
            lease: Duration::from_secs(1),
        },
        ["NOTICKET"; 9],
    ),
    (
        "end an unknown ticket",
        |_| Event::End {
            ticket: "x".parse().unwrap(),
            why: String::new(),
        },
        ["."; 9],
    ),
    (
        "expiry of an unknown ticket",
        |_| Event::Expired("x".parse().unwrap()),
        ["."; 9],
    ),
    (
        "failure of an unknown restore",
        |_| fail_restore("x"),
        ["."; 9],
    ),
    ("resized", |_| Event::Resized(Bytes(1 << 30)), ["."; 9]),
    (
        "resume",
        |_| Event::Resume,
        [".", ".", ".", ".", "handing", ".", ".", ".", "."],
    ),
    (
        "the result waited for",
        |state| match state.intent() {
            Some(_) => done(state),
            None => Event::Resume,
        },
        [
            "idle",
            ".",
            "idle",
            "exporting",
            "attached",
            ".",
            "deleting",
            "gone",
            ".",
        ],
    ),
    (
        "the same result of an earlier intent",
        |state| match state.intent() {
            Some(intent) => match done(state) {
                Event::Result { epoch, outcome, .. } => Event::Result {
                    action: ActionId(intent.id.0 - 1),
                    epoch,
                    outcome,
                },
                other => other,
            },
            None => Event::Resume,
        },
        ["."; 9],
    ),
    (
        "the same result of another epoch",
        |state| match state.intent() {
            Some(intent) => match done(state) {
                Event::Result {
                    action, outcome, ..
                } => Event::Result {
                    action,
                    epoch: intent.epoch.next(),
                    outcome,
                },
                other => other,
            },
            None => Event::Resume,
        },
        ["."; 9],
    ),
    (
        "a receipt of another epoch",
        |state| match state.intent() {
            Some(intent) => result(&intent, Outcome::Fenced(receipt(Epoch(77)))),
            None => Event::Resume,
        },
        ["."; 9],
    ),
    (
        "refused: stale epoch, home at 9",
        |state| refused(state, HomeError::StaleEpoch { home: Epoch(9) }),
        [
            ".", ".", "closing", "handing", "handing", ".", "ending", "ending", ".",
        ],
    ),
    (
        "refused: stale epoch, home at 0",
        |state| refused(state, HomeError::StaleEpoch { home: Epoch(0) }),
        ["."; 9],
    ),
    (
        "refused: failed",
        |state| refused(state, HomeError::Failed("pwrite".to_owned())),
        ["deleting", ".", ".", ".", ".", ".", ".", ".", "."],
    ),
    (
        "refused: no such volume",
        |state| refused(state, HomeError::NoVolume("v".parse().unwrap())),
        ["deleting", ".", ".", ".", ".", ".", "deleting", ".", "."],
    ),
    (
        "refused: record behind",
        |state| {
            refused(
                state,
                HomeError::RecordBehind {
                    home: Epoch(0),
                    recorded: Epoch(1),
                },
            )
        },
        [".", ".", ".", ".", ".", ".", "deleting", ".", "."],
    ),
    (
        "refused: unsettled",
        |state| refused(state, HomeError::Unsettled { inside: 1 }),
        ["."; 9],
    ),
    (
        "refused: not yet",
        |state| refused(state, HomeError::NotYet("being made".to_owned())),
        ["."; 9],
    ),
    (
        "refused: unreachable",
        |state| {
            refused(
                state,
                HomeError::Unreachable {
                    node: node("h"),
                    detail: String::new(),
                },
            )
        },
        ["."; 9],
    ),
];

#[test]
fn every_cell_of_the_table() {
    for (name, event, row) in TABLE {
        for (stage, expected) in Stage::ALL.into_iter().zip(row) {
            let state = at(stage);
            let expected = if *expected == "." {
                stage.name()
            } else {
                expected
            };
            let found = cell(&state, event(&state));
            assert_eq!(found, expected, "{name} while {}", stage.name());
        }
    }
    let first = go(&fresh(), done(&fresh()));
    assert_eq!(
        cell(&first, publish("a")),
        "exporting",
        "nothing came before"
    );
}

#[test]
fn every_legal_move_happens_and_no_other() {
    let mut seen = BTreeSet::new();
    for (_, event, _) in TABLE {
        let starts = Stage::ALL.into_iter().map(at);
        let discarded = go(&go(&for_restore(), done(&for_restore())), fail_restore("r"));
        for state in starts.chain([go(&fresh(), done(&fresh())), discarded, unmade()]) {
            if let Ok((next, _)) = state.step(event(&state), NOW)
                && next.stage() != state.stage()
            {
                seen.insert((state.stage(), next.stage()));
            }
        }
    }
    for from in Stage::ALL {
        for to in Stage::ALL {
            if from != to {
                let pair = (from, to);
                assert_eq!(seen.contains(&pair), from.may_become(to), "{pair:?}");
            }
        }
    }
}

#[test]
fn a_refused_intent_keeps_its_id_and_a_resumed_one_gets_another() {
    for stage in [
        Stage::Closing,
        Stage::Handing,
        Stage::Exporting,
        Stage::Deleting,
    ] {
        let state = at(stage);
        let again = go(&state, refused(&state, HomeError::Unsettled { inside: 2 }));
        assert_eq!(again, state);
        let resumed = go(&state, Event::Resume);
        assert_ne!(resumed.pending, state.pending);
        let (after, _) = resumed.step(done(&state), NOW).unwrap();
        assert_eq!(after, resumed, "the old intent's result was taken");
    }
}

#[test]
fn the_epoch_is_decided_before_the_fence_and_the_fence_goes_on() {
    let closing = at(Stage::Closing);
    let (handing, actions) = closing.step(publish("b"), NOW).unwrap();
    assert_eq!(handing.epoch, closing.epoch.next());
    assert_eq!(handing.pending, closing.pending);
    assert!(
        !actions
            .iter()
            .any(|action| matches!(action, Action::Intent(_)))
    );
    let back = go(&handing, Event::Unpublish(None));
    assert_eq!(back.pending, closing.pending);
    assert_eq!(back.epoch, handing.epoch, "an epoch is not used twice");
    let again = go(&back, publish("a"));
    assert_eq!(again.epoch, handing.epoch.next());
}

#[test]
fn a_fence_says_what_the_home_must_have_recorded() {
    let asked = |state: &VolumeState| match state.intent().unwrap().task {
        Task::Fence { request, .. } => {
            let Recorded { epoch, ended } = request.recorded;
            (request.epoch.0, epoch.0, ended)
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(asked(&at(Stage::Closing)), (1, 1, false));
    let handing = at(Stage::Handing);
    assert_eq!(asked(&handing), (1, 1, true));
    let unknown = go(&at(Stage::Exporting), Event::Unpublish(None));
    assert_eq!(asked(&unknown), (1, 0, false));
    let never = go(&go(&fresh(), done(&fresh())), Event::Delete);
    assert_eq!(asked(&never), (0, 0, false));
    // Ahead of what was recorded: an epoch decided and not needed, and a
    // controller that started in the middle of an export.
    let rested = go(&handing, Event::Unpublish(None));
    let rested = go(&rested, done(&rested));
    assert_eq!(
        (rested.epoch, rested.recorded),
        (Epoch(2), Recorded::end_of(Epoch(1)))
    );
    assert_eq!(asked(&go(&rested, publish("c"))), (2, 1, true));
    let exporting = go(&handing, done(&handing));
    assert_eq!(asked(&go(&exporting, Event::Resume)), (2, 1, true));
}

/// One that could not be made.
fn unmade() -> VolumeState {
    let error = HomeError::NoVolume("source".parse().unwrap());
    let unmade = go(&fresh(), refused(&fresh(), error));
    assert_eq!(unmade.stage(), Stage::Deleting);
    unmade
}

#[test]
fn a_clone_that_would_stop_its_source_is_refused_at_once() {
    let error = HomeError::StillInside {
        volume: "source".parse().unwrap(),
        epoch: Epoch(4),
        inside: 3,
    };
    let unmade = go(&fresh(), refused(&fresh(), error));
    assert_eq!(unmade.stage(), Stage::Deleting);
}

/// A store put back from an old copy asks again for what was made long ago.
#[test]
fn what_could_not_be_made_and_was_used_is_kept() {
    let unmade = unmade();
    let task = unmade.intent().unwrap().task;
    assert_eq!(task, Task::Delete { unused: true });
    for home in [Epoch(0), Epoch(4)] {
        let closing = go(&unmade, refused(&unmade, HomeError::StaleEpoch { home }));
        assert_eq!(closing.stage(), Stage::Closing);
        assert_eq!(closing.intent().unwrap().epoch, home);
        let rested = go(&closing, done(&closing));
        assert_eq!((rested.stage(), rested.epoch), (Stage::Idle, home));
        check(&rested);
    }
    let deleting = at(Stage::Deleting).intent().unwrap().task;
    assert_eq!(deleting, Task::Delete { unused: false });
}

#[test]
fn what_is_being_made_is_waited_for() {
    let mut state = fresh();
    for _ in 0..2 {
        let late = HomeError::NotYet("volume v is being made; ask again".to_owned());
        state = go(&state, refused(&state, late));
        assert_eq!(state, fresh());
    }
    assert_eq!(go(&state, done(&state)).stage(), Stage::Idle);
}

#[test]
fn tickets_in_the_way_and_tickets_that_make_way() {
    let idle = at(Stage::Idle);
    let with = |ticket: Ticket| go(&idle, take(ticket));
    use TicketKind::{Backup, Maintenance, Restore};
    for (name, state, expected) in [
        (
            "backup elsewhere, interruptible",
            with(ticket("t", Backup, "a", true, false)),
            "handing",
        ),
        (
            "backup elsewhere, not",
            with(ticket("t", Backup, "a", false, false)),
            "INUSE",
        ),
        (
            "backup here, not",
            with(ticket("t", Backup, "b", false, false)),
            "handing",
        ),
        (
            "backup at home",
            with(ticket("t", Backup, "h", false, true)),
            "handing",
        ),
        (
            "restore",
            with(ticket("t", Restore, "h", false, true)),
            "INUSE",
        ),
        (
            "restore, interruptible",
            with(ticket("t", Restore, "h", true, false)),
            "INUSE",
        ),
        (
            "maintenance",
            with(ticket("t", Maintenance, "b", false, false)),
            "INUSE",
        ),
        (
            "maintenance, interruptible",
            with(ticket("t", Maintenance, "a", true, false)),
            "handing",
        ),
    ] {
        assert_eq!(cell(&state, publish("b")), expected, "{name}");
    }
    let (next, actions) = with(backup("a")).step(publish("b"), NOW).unwrap();
    let told = actions.iter().any(|action| {
        matches!(action, Action::Interrupt { node: on, grace, .. }
            if *on == node("a") && *grace == Duration::from_secs(1))
    });
    assert!(told, "{actions:?}");
    assert_eq!(next.claims.len(), 1, "the interrupted ticket has ended");
    let home_side = with(ticket("t", Backup, "h", true, true));
    let (next, actions) = home_side.step(publish("b"), NOW).unwrap();
    assert_eq!(next.claims.len(), 2, "a stream at home goes on");
    assert!(
        !actions
            .iter()
            .any(|action| matches!(action, Action::Interrupt { .. }))
    );
    assert_eq!(
        cell(&with(ticket("t", Backup, "a", false, false)), Event::Delete),
        "INUSE"
    );
    assert_eq!(
        cell(&with(ticket("t", Backup, "h", false, true)), Event::Delete),
        "ending"
    );
}

#[test]
fn a_failed_restore_takes_its_own_volume_with_it_and_no_other() {
    let made = go(&for_restore(), done(&for_restore()));
    assert_eq!((made.stage(), made.claims.len()), (Stage::Idle, 1));
    for event in [publish("a"), Event::Delete] {
        assert_eq!(cell(&made, event), "INUSE");
    }
    let second = take(ticket("s", TicketKind::Restore, "h", false, true));
    assert_eq!(cell(&made, second), "INUSE", "two restores of one volume");

    let expired = || Event::Expired("r".parse().unwrap());
    for event in [fail_restore("r"), expired()] {
        assert_eq!(
            cell(&for_restore(), event.clone()),
            "NOTYET",
            "would be made after its deletion"
        );
        // Half a volume is nobody's: a claim beside the restore's goes with it.
        let beside = ticket("m", TicketKind::Maintenance, "b", false, false);
        let claimed = go(&made, take(beside));
        let ending = go(&claimed, event.clone());
        assert_eq!((ending.stage(), ending.claims.len()), (Stage::Ending, 0));
        assert_eq!(go(&ending, event), ending, "told twice");
    }

    // An old copy of the store has the claim, and the home the epochs since.
    let ending = go(&made, expired());
    let stale = HomeError::StaleEpoch { home: Epoch(2) };
    let lives = go(&ending, refused(&ending, stale));
    assert_eq!((lives.stage(), lives.epoch), (Stage::Closing, Epoch(2)));
    assert_eq!(go(&lives, done(&lives)).stage(), Stage::Idle);

    // It was whole: its ticket has ended, and somebody uses the volume.
    let end = Event::End {
        ticket: "r".parse().unwrap(),
        why: "restore is whole".to_owned(),
    };
    let whole = go(&made, end);
    let attached = go(&go(&whole, publish("a")), done(&go(&whole, publish("a"))));
    let closing = go(&attached, Event::Unpublish(None));
    let rested = go(&closing, done(&closing));
    for state in [whole, attached, closing, rested.clone()] {
        assert_eq!(go(&state, fail_restore("r")), state, "told late");
        assert_eq!(go(&state, expired()), state, "reaped late");
    }
    // A claim of another kind, or on what a node was offered, takes no volume.
    let claimed = go(&rested, take(backup("b")));
    assert_eq!(go(&claimed, fail_restore("backup")), claimed);
    let used = go(
        &rested,
        take(ticket("r", TicketKind::Restore, "h", false, true)),
    );
    let freed = go(&used, fail_restore("r"));
    assert_eq!((freed.stage(), freed.claims.len()), (Stage::Idle, 0));
}

#[test]
fn a_ticket_is_idempotent_renewed_and_reaped() {
    let idle = at(Stage::Idle);
    let one = go(&idle, take(backup("a")));
    assert_eq!(go(&one, take(backup("a"))), one);
    assert_eq!(cell(&one, take(backup("b"))), "INCOMPATIBLE");
    let renewed = go(
        &one,
        Event::Renew {
            ticket: "backup".parse().unwrap(),
            lease: Duration::from_secs(90),
        },
    );
    assert_eq!(
        renewed.claims[0].ticket.lease_ends,
        Some(NOW + Duration::from_secs(90))
    );
    let (reaped, actions) = renewed
        .step(Event::Expired("backup".parse().unwrap()), NOW)
        .unwrap();
    assert!(reaped.claims.is_empty());
    let Some(Action::Note(note)) = actions.first() else {
        panic!("{actions:?}")
    };
    assert_eq!(note.kind, "lease-expired");
    assert!(
        note.text.contains("not renewed within 90s"),
        "{}",
        note.text
    );
    let endless = Event::Take {
        ticket: ticket("m", TicketKind::Maintenance, "a", false, false),
        lease: None,
    };
    assert_eq!(cell(&idle, endless), "INCOMPATIBLE");
    let endless = Event::Take {
        ticket: ticket("r", TicketKind::Restore, "h", false, true),
        lease: None,
    };
    assert_eq!(cell(&idle, endless), "INCOMPATIBLE");
    // A workload's claim has no lease, whatever the reaper is told.
    let attached = at(Stage::Attached);
    let workload = attached.workload().unwrap().ticket.id.clone();
    assert_eq!(go(&attached, Event::Expired(workload.clone())), attached);
    let renew = Event::Renew {
        ticket: workload.clone(),
        lease: Duration::ZERO,
    };
    assert_eq!(cell(&attached, renew), "INCOMPATIBLE");
    let end = Event::End {
        ticket: workload,
        why: "operator".to_owned(),
    };
    assert_eq!(cell(&attached, end), "closing");
}

#[test]
fn the_same_node_otherwise_is_incompatible_and_as_another_host_gets_a_new_epoch() {
    let attached = at(Stage::Attached);
    let mut reader = holder("a");
    reader.mode = AccessMode::SingleReader;
    let event = |holder| Event::Publish {
        holder,
        lost: BTreeSet::new(),
    };
    assert_eq!(cell(&attached, event(reader)), "INCOMPATIBLE");
    let mut other = holder("a");
    other.host.nqn = "nqn.reinstalled".to_owned();
    let next = go(&attached, event(other));
    assert_eq!(next.stage(), Stage::Handing);
    assert_eq!(next.epoch, attached.epoch.next());
    assert_eq!(next.claims.len(), 1);
}

/// An agent that starts while a connect hangs cannot read what its kernel knows.
#[test]
fn the_same_host_keeps_its_epoch_whatever_its_kernel_proves_now() {
    let event = |proves| {
        let mut holder = holder("a");
        holder.host.proves = proves;
        Event::Publish {
            holder,
            lost: BTreeSet::new(),
        }
    };
    let handing = go(&at(Stage::Idle), event(true));
    let exporting = go(&handing, done(&handing));
    let attached = go(&exporting, done(&exporting));
    assert_eq!(attached.stage(), Stage::Attached);
    assert_eq!(go(&attached, event(false)), attached);
    // What is registered by then counts for the next epoch.
    let closing = go(&attached, Event::Unpublish(None));
    let next = go(&closing, event(false));
    assert_eq!(next.epoch, attached.epoch.next());
    assert!(!next.holder().unwrap().host.proves);
}

#[test]
fn a_learned_epoch_is_fenced_and_passed() {
    let stale = HomeError::StaleEpoch { home: Epoch(9) };
    let handing = go(
        &at(Stage::Exporting),
        refused(&at(Stage::Exporting), stale.clone()),
    );
    assert_eq!((handing.epoch, handing.offered), (Epoch(10), Epoch(9)));
    assert_eq!(handing.intent().unwrap().epoch, Epoch(9));
    let closing = go(&at(Stage::Closing), refused(&at(Stage::Closing), stale));
    assert_eq!(
        (closing.epoch, closing.intent().unwrap().epoch),
        (Epoch(9), Epoch(9))
    );
}

/// The model found it: a store put back from an old copy decides an epoch for c
/// that a late request opens for b.
#[test]
fn an_epoch_that_another_got_is_passed() {
    let handing = go(&at(Stage::Closing), publish("c"));
    let exporting = go(&handing, done(&handing));
    assert_eq!(
        (exporting.stage(), exporting.epoch),
        (Stage::Exporting, Epoch(2))
    );
    let stale = HomeError::StaleEpoch { home: Epoch(2) };
    let passed = go(&exporting, refused(&exporting, stale));
    assert_eq!((passed.stage(), passed.epoch), (Stage::Handing, Epoch(3)));
    let Task::Fence { request, .. } = passed.intent().unwrap().task else {
        panic!("not fenced");
    };
    assert_eq!(
        (request.epoch, request.recorded),
        (Epoch(2), Recorded::end_of(Epoch(1))),
        "the 2 may be of a fence that the home has not recorded"
    );
    let mut record = Record::new("v".parse().unwrap(), true);
    record.highest = Epoch(1);
    let moved = decide::fence(&record, &request);
    assert_eq!(moved, FenceMove::Note { highest: Epoch(2) });
}

#[test]
fn the_record_reads_back_as_it_was() {
    for stage in Stage::ALL {
        let state = go_with_tickets(at(stage));
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<VolumeState>(&text).unwrap(), state);
        // Stores that were written before ends were noted.
        let mut older: serde_json::Value = serde_json::from_str(&text).unwrap();
        older.as_object_mut().unwrap().remove("recorded_end");
        let read: VolumeState = serde_json::from_value(older).unwrap();
        assert_eq!(read.recorded, Recorded::begin_of(state.recorded.epoch));
    }
}

fn go_with_tickets(state: VolumeState) -> VolumeState {
    match state.step(take(backup("c")), NOW) {
        Ok((next, _)) => next,
        Err(_) => state,
    }
}

/// A home that keeps its own record, and decides by it as homes do.
#[derive(Debug, Clone)]
struct ModelHome {
    record: Record,
    /// Whether the pool was ever put back from an old copy.
    put_back: bool,
}

impl ModelHome {
    fn new() -> Self {
        Self {
            record: Record::new("v".parse().unwrap(), false),
            put_back: false,
        }
    }

    fn open(&self) -> Option<(u64, NodeId)> {
        match &self.record.export {
            ExportState::Open { export } => Some((export.epoch.0, export.node.clone())),
            _ => None,
        }
    }

    /// The operator's word that the old copy counts from now on.
    fn accept(&mut self) {
        if let Some(recorded) = self.record.behind.take() {
            self.record.highest = recorded;
        }
    }

    fn behind(&mut self, recorded: Epoch) -> Outcome {
        assert!(self.put_back, "no record was lost here");
        self.record.behind = Some(recorded);
        self.record.export = ExportState::Closed;
        Outcome::Refused(HomeError::RecordBehind {
            home: self.record.highest,
            recorded,
        })
    }

    /// `known`: what the arbiter knows to be recorded when it is asked.
    fn perform(&mut self, task: &Task, known: Recorded) -> Outcome {
        match task {
            Task::Create { .. } => Outcome::Created,
            Task::Delete { .. } if self.open().is_some() => {
                Outcome::Refused(HomeError::Failed("an export is open".to_owned()))
            }
            Task::Delete { .. } => Outcome::Deleted,
            Task::Fence { request, .. } => match decide::fence(&self.record, request) {
                FenceMove::Refuse(error) => Outcome::Refused(error),
                FenceMove::Behind { recorded } => self.behind(recorded),
                FenceMove::Close { highest, .. } | FenceMove::Note { highest } => {
                    self.record.highest = highest;
                    self.record.export = ExportState::Closed;
                    Outcome::Fenced(receipt(request.epoch))
                }
                FenceMove::Repeat(_) => unreachable!("it keeps no settlements"),
            },
            Task::Export(grant) => {
                let request = grant.request();
                match decide::export(&self.record, Epoch(0), request) {
                    ExportMove::Refuse(error) => Outcome::Refused(error),
                    ExportMove::Behind { recorded } => self.behind(recorded),
                    ExportMove::Repeat(_) => Outcome::Exported(exported(request.epoch)),
                    ExportMove::Open => {
                        let reached = Recorded::end_of(self.record.highest);
                        assert!(known <= reached, "an old copy is served");
                        self.record.highest = request.epoch;
                        self.record.export = ExportState::Open {
                            export: OpenExport {
                                epoch: request.epoch,
                                node: request.node.clone(),
                                host: request.host.clone(),
                                protocol: request.protocol,
                                name: String::new(),
                                unit: Uuid::nil(),
                                chap: None,
                                read_only: request.read_only,
                                failed_flush: None,
                            },
                        };
                        Outcome::Exported(exported(request.epoch))
                    }
                }
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Move {
    Publish(usize, Option<usize>),
    Unpublish(Option<usize>),
    Lost(usize),
    Take(usize, bool, bool),
    Resume,
    /// The n-th of the intents ever decided reaches the home; its answer may be lost.
    Reach(usize, bool),
    /// The n-th of the answers ever given arrives (again).
    Answer(usize),
    /// The store is put back to the n-th state there ever was.
    OldStore(usize),
    /// The pool is put back to the n-th record there ever was.
    OldPool(usize),
    /// The operator accepts an old copy of the pool.
    Accept,
}

fn moves(old_stores: u32, old_pools: u32) -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        6 => (0..3usize, prop::option::weighted(0.2, 0..3usize)).prop_map(|(n, lost)| Move::Publish(n, lost)),
        4 => prop::option::of(0..3usize).prop_map(Move::Unpublish),
        1 => (0..3usize).prop_map(Move::Lost),
        1 => (0..3usize, any::<bool>(), any::<bool>()).prop_map(|(n, i, h)| Move::Take(n, i, h)),
        1 => Just(Move::Resume),
        8 => (0..40usize, prop::bool::weighted(0.8)).prop_map(|(n, back)| Move::Reach(n, back)),
        6 => (0..40usize).prop_map(Move::Answer),
        old_stores => (0..200usize).prop_map(Move::OldStore),
        old_pools => (0..200usize).prop_map(Move::OldPool),
        old_pools => Just(Move::Accept),
    ];
    prop::collection::vec(one, 1..120)
}

const NODES: [&str; 3] = ["a", "b", "c"];

fn check(state: &VolumeState) {
    assert_eq!(
        state.workload().map(|claim| &claim.ticket.node),
        state.holder().map(|holder| &holder.node),
        "the workload's ticket and the holder differ"
    );
    let workloads = state
        .claims
        .iter()
        .filter(|claim| claim.ticket.kind == TicketKind::Workload);
    assert!(workloads.count() <= 1);
    assert!(state.offered <= state.epoch && state.recorded.epoch <= state.offered);
    assert_eq!(state.pending.is_some(), state.intent().is_some());
}

/// Runs a history; at the end the home answers everything, and a publish must succeed.
fn live(history: Vec<Move>, old_stores: bool) {
    let mut home = ModelHome::new();
    let mut homes = vec![home.clone()];
    let mut state = go(&fresh(), done(&fresh()));
    let mut states = vec![state.clone()];
    let mut intents: Vec<Intent> = Vec::new();
    let mut answers: Vec<Event> = Vec::new();
    let recent = |len: usize, n: usize| len.checked_sub(1 + n % len.clamp(1, 6));
    for step in history {
        let event = match step {
            Move::Publish(n, lost) => Event::Publish {
                holder: holder(NODES[n]),
                lost: lost.map(|n| node(NODES[n])).into_iter().collect(),
            },
            Move::Unpublish(n) => Event::Unpublish(n.map(|n| node(NODES[n]))),
            Move::Lost(n) => Event::NodeLost(node(NODES[n])),
            Move::Take(n, interruptible, home_side) => take(ticket(
                &format!("t{n}"),
                TicketKind::Backup,
                NODES[n],
                interruptible,
                home_side,
            )),
            Move::Resume => Event::Resume,
            Move::Reach(n, back) => {
                // Any of the last few, so late and doubled requests too.
                if let Some(place) = recent(intents.len(), n) {
                    let intent = intents[place].clone();
                    let outcome = home.perform(&intent.task, state.recorded);
                    homes.push(home.clone());
                    if back {
                        answers.push(result(&intent, outcome));
                    }
                }
                continue;
            }
            Move::Answer(n) => match recent(answers.len(), n) {
                Some(place) => answers[place].clone(),
                None => continue,
            },
            // A shrunken history may have what its strategy never gave.
            Move::OldStore(_) if !old_stores => continue,
            Move::OldStore(n) => {
                state = states[n % states.len()].clone();
                intents.clear();
                answers.clear();
                Event::Resume
            }
            // Its agent was stopped for that: what was asked of it before has ended.
            Move::OldPool(n) => {
                home = homes[n % homes.len()].clone();
                home.put_back = true;
                intents = state.intent().into_iter().collect();
                answers.clear();
                continue;
            }
            Move::Accept => {
                home.accept();
                continue;
            }
        };
        let idempotent = matches!(
            event,
            Event::Publish { .. } | Event::Unpublish(_) | Event::NodeLost(_) | Event::Take { .. }
        );
        let unpublish = matches!(event, Event::Unpublish(_));
        match state.step(event.clone(), NOW) {
            Ok((next, actions)) => {
                check(&next);
                if !old_stores {
                    assert!(next.epoch >= state.epoch);
                }
                if idempotent {
                    assert_eq!(go(&next, event), next, "the same again changed something");
                }
                for action in actions {
                    if let Action::Intent(intent) = action {
                        intents.push(intent);
                    }
                }
                state = next;
                states.push(state.clone());
            }
            Err(refusal) => assert!(!unpublish, "unpublish was refused: {refusal:?}"),
        }
    }
    state = go(&state, Event::Unpublish(None));
    state.claims.clear();
    for _ in 0..2 {
        settle(&mut state, &mut home);
        assert!(
            matches!(state.stage(), Stage::Idle | Stage::Attached),
            "{state:?}"
        );
        if state.holder().is_none() {
            state = go(&state, publish("c"));
        }
    }
    let holder = state
        .holder()
        .map(|holder| (state.epoch.0, holder.node.clone()));
    assert_eq!(home.open(), holder);
}

fn settle(state: &mut VolumeState, home: &mut ModelHome) {
    for _ in 0..20 {
        let Some(intent) = state.intent() else { return };
        let outcome = home.perform(&intent.task, state.recorded);
        home.accept();
        *state = go(state, result(&intent, outcome));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn one_writer_and_nothing_stuck(history in moves(0, 0)) {
        live(history, false);
    }

    #[test]
    fn one_writer_and_nothing_stuck_with_old_copies_of_the_store(history in moves(1, 0)) {
        live(history, true);
    }

    #[test]
    fn no_old_copy_of_the_pool_is_served_and_nothing_stuck(history in moves(0, 1)) {
        live(history, false);
    }
}

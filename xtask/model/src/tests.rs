//! The small searches, complete; and the planted faults, each found: a model
//! that could not fail would prove nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use stateright::HasDiscoveries;

use crate::bounds::{Bounds, Planted, small};
use crate::search::{self, Found, Verdict, named};

/// Against hanging; each takes a few seconds.
const LIMIT: Duration = Duration::from_secs(600);

fn all(bounds: Bounds) -> Found {
    search::run(bounds, HasDiscoveries::AllFailures, 2, LIMIT)
}

fn must_hold(bounds: Bounds) {
    let found = all(bounds);
    crate::report::text(&bounds, &found);
    assert!(found.complete, "{}: a state was left out", bounds.name);
    for (property, verdict) in &found.properties {
        let good = matches!(verdict, Verdict::Holds | Verdict::Reached);
        assert!(good, "{}: {property}: {verdict:?}", bounds.name);
    }
}

#[test]
fn every_small_search_is_complete_and_everything_holds() {
    for bounds in small() {
        must_hold(bounds);
    }
}

/// Plants a fault; the steps by which `property` is then broken.
fn broken(planted: Planted, property: &'static str) -> Vec<String> {
    let restores = planted == Planted::RestoreUnrecorded;
    let bounds = Bounds {
        name: "planted",
        planted: Some(planted),
        restores,
        ..small()[0]
    };
    let until = HasDiscoveries::AnyOf(BTreeSet::from([property]));
    let found = search::run(bounds, until, 2, LIMIT);
    let verdict = found.properties.iter().find(|(name, _)| *name == property);
    match verdict {
        Some((_, Verdict::Broken(way))) => {
            println!("{planted:?}, {} states: {property}: {way:?}", found.states);
            way.clone()
        }
        other => panic!("{planted:?} was not found: {other:?}"),
    }
}

#[test]
fn a_grant_without_a_receipt_is_found() {
    let way = broken(Planted::GrantWithoutReceipt, named::CLEARED);
    assert!(
        !way.iter().any(|step| step.contains("RecordsClosed")),
        "{way:?}"
    );
}

#[test]
fn a_fence_that_does_not_wait_for_the_commands_inside_is_found() {
    broken(Planted::FenceDoesNotWait, named::TRUE_RECEIPT);
    let way = broken(Planted::FenceDoesNotWait, named::OLDER_WRITE);
    assert!(way.iter().any(|step| step.starts_with("Lands")), "{way:?}");
}

#[test]
fn a_home_that_forgets_its_record_when_it_is_killed_is_found() {
    broken(Planted::HomeForgets, named::EPOCH);
    broken(Planted::HomeForgets, named::OLDER_WRITE);
}

#[test]
fn a_successor_that_serves_before_the_dead_owners_write_has_landed_is_found() {
    broken(Planted::NoExitBarrier, named::OLDER_WRITE);
    broken(Planted::NoExitBarrier, named::UNDONE);
}

#[test]
fn a_host_let_in_again_beside_its_old_commands_is_found() {
    broken(Planted::NoBusyAnswer, named::UNDONE);
}

#[test]
fn a_fence_that_answers_before_its_gate_is_closed_is_found() {
    broken(Planted::GateClosesLast, named::TRUE_RECEIPT);
    broken(Planted::GateClosesLast, named::OLDER_WRITE);
}

#[test]
fn a_late_result_that_counts_is_found() {
    broken(Planted::AnyResultCounts, named::ONE_GRANT);
    broken(Planted::AnyResultCounts, named::CLEARED);
}

#[test]
fn a_restores_claim_that_is_not_on_disk_is_found() {
    broken(Planted::RestoreUnrecorded, named::RESTORE);
}

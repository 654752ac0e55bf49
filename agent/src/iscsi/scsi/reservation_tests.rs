//! Orders and what follows them, for every type.

use proptest::prelude::*;

use super::*;

fn port(name: u8) -> Nexus {
    Nexus {
        initiator: format!("iqn.test:{name}"),
        isid: [name; 6],
    }
}

fn order(action: u8, kind: u8, key: u64, other: u64) -> Order {
    Order {
        action,
        scope: 0,
        kind,
        key,
        other,
        persists: false,
    }
}

fn follow(state: &mut State, who: u8, order: Order) -> Result<Effects, Refused> {
    let (next, effects) = state.apply(&port(who), &order)?;
    *state = next;
    Ok(effects)
}

/// Ports 1, 2 and 3 are registered with keys 11, 12 and 13; port 1 holds `kind`.
fn held(kind: u8) -> State {
    let mut state = State::default();
    for who in 1..=3 {
        follow(&mut state, who, order(REGISTER, 0, 0, 10 + u64::from(who))).unwrap();
    }
    follow(&mut state, 1, order(RESERVE, kind, 11, 0)).unwrap();
    state
}

const TYPES: [u8; 6] = [1, 3, 5, 6, 7, 8];

#[test]
fn each_type_lets_in_whom_it_should() {
    for kind in TYPES {
        let state = held(kind);
        let reads_stay = matches!(kind, 1 | 5 | 7);
        let registered_may = kind >= 5;
        for (who, read, write) in [
            (1, true, true),
            (2, reads_stay || registered_may, registered_may),
            (9, reads_stay, false),
        ] {
            assert_eq!(state.allows(&port(who), Use::Read), read, "{kind} {who}");
            assert_eq!(state.allows(&port(who), Use::Write), write, "{kind} {who}");
            assert!(state.allows(&port(who), Use::Nothing));
        }
    }
}

#[test]
fn only_who_knows_the_key_registers_anew() {
    let mut state = held(1);
    let wrong = follow(&mut state, 2, order(REGISTER, 0, 99, 5));
    assert_eq!(wrong, Err(Refused::Conflict));
    follow(&mut state, 2, order(REGISTER, 0, 12, 5)).unwrap();
    assert_eq!(state.key_of(&port(2)), Some(5));
    follow(&mut state, 2, order(REGISTER_AND_IGNORE, 0, 99, 6)).unwrap();
    assert_eq!(state.key_of(&port(2)), Some(6));
    let unknown = follow(&mut state, 9, order(RESERVE, 1, 0, 0));
    assert_eq!(unknown, Err(Refused::Conflict));
}

#[test]
fn reserving_again_changes_nothing_and_otherwise_conflicts() {
    for kind in TYPES {
        let mut state = held(kind);
        let before = state.clone();
        follow(&mut state, 1, order(RESERVE, kind, 11, 0)).unwrap();
        assert_eq!(state, before);
        let other = if kind == 1 { 3 } else { 1 };
        let refused = follow(&mut state, 1, order(RESERVE, other, 11, 0));
        assert_eq!(refused, Err(Refused::Conflict));
        let second = follow(&mut state, 2, order(RESERVE, kind, 12, 0));
        assert_eq!(second.is_ok(), kind >= 7);
    }
    let mut state = held(1);
    for wrong in [0, 2, 4, 9] {
        let refused = follow(&mut state, 1, order(RESERVE, wrong, 11, 0));
        assert_eq!(refused, Err(Refused::Sense(Sense::cdb(2))));
    }
}

#[test]
fn a_release_tells_registrants_where_they_held_on_to_it() {
    for kind in TYPES {
        let mut state = held(kind);
        let mismatch = order(RELEASE, if kind == 1 { 3 } else { 1 }, 11, 0);
        let refused = follow(&mut state, 1, mismatch);
        assert_eq!(refused, Err(Refused::Sense(Sense::INVALID_RELEASE)));
        if kind < 7 {
            follow(&mut state, 2, order(RELEASE, kind, 12, 0)).unwrap();
            assert!(state.held.is_some(), "it is not port 2's to release");
        }
        let effects = follow(&mut state, 1, order(RELEASE, kind, 11, 0)).unwrap();
        assert!(state.held.is_none());
        let told: Vec<_> = [2, 3]
            .map(|who| (port(who), Sense::RESERVATIONS_RELEASED))
            .into();
        assert_eq!(effects.attentions, if kind >= 5 { told } else { vec![] });
        follow(&mut state, 1, order(RELEASE, kind, 11, 0)).unwrap();
    }
}

#[test]
fn the_holder_s_unregistering_frees_the_reservation() {
    for kind in TYPES {
        let mut state = held(kind);
        let effects = follow(&mut state, 1, order(REGISTER, 0, 11, 0)).unwrap();
        assert_eq!(state.held.is_some(), kind >= 7, "all registrants hold it");
        assert_eq!(
            effects.attentions.len(),
            if kind == 5 || kind == 6 { 2 } else { 0 }
        );
        follow(&mut state, 2, order(REGISTER, 0, 12, 0)).unwrap();
        follow(&mut state, 3, order(REGISTER, 0, 13, 0)).unwrap();
        assert!(state.held.is_none() && !state.is_used());
    }
}

#[test]
fn clearing_removes_everything_and_tells_the_others() {
    let mut state = held(3);
    let generation = state.generation;
    let effects = follow(&mut state, 2, order(CLEAR, 0, 12, 0)).unwrap();
    assert!(!state.is_used() && state.held.is_none());
    assert_eq!(state.generation, generation + 1);
    let told = [1, 3].map(|who| (port(who), Sense::RESERVATIONS_PREEMPTED));
    assert_eq!(effects.attentions, told);
}

#[test]
fn preempting_the_holder_takes_the_reservation() {
    let mut state = held(1);
    let generation = state.generation;
    let effects = follow(&mut state, 2, order(PREEMPT_AND_ABORT, 3, 12, 11)).unwrap();
    assert_eq!(state.generation, generation + 1);
    assert_eq!(state.key_of(&port(1)), None);
    let now = state.held.clone().unwrap();
    assert_eq!((now.kind.code(), now.holder), (3, port(2)));
    assert_eq!(
        effects.attentions,
        [
            (port(1), Sense::REGISTRATIONS_PREEMPTED),
            (port(3), Sense::RESERVATIONS_RELEASED)
        ]
    );
    assert_eq!(effects.aborts, [port(1)]);
}

#[test]
fn preempting_another_removes_only_its_registration() {
    let mut state = held(1);
    let effects = follow(&mut state, 2, order(PREEMPT, 1, 12, 13)).unwrap();
    assert_eq!(state.registrants.len(), 2);
    assert!(state.holds(&port(1)));
    assert!(effects.aborts.is_empty(), "plain PREEMPT aborts nothing");
    let nobody = follow(&mut state, 2, order(PREEMPT, 1, 12, 99));
    assert_eq!(nobody, Err(Refused::Conflict));
    let zero = follow(&mut state, 2, order(PREEMPT, 1, 12, 0));
    assert_eq!(zero, Err(Refused::Sense(Sense::parameter(8))));
}

#[test]
fn of_all_registrants_key_zero_takes_it_from_all() {
    for kind in [7, 8] {
        let mut state = held(kind);
        follow(&mut state, 2, order(PREEMPT, 1, 12, 0)).unwrap();
        assert_eq!(state.registrants.len(), 1);
        assert_eq!(state.held.clone().unwrap().kind.code(), 1);
        assert!(state.holds(&port(2)));
    }
}

#[test]
fn a_holder_may_preempt_itself_to_change_the_type() {
    let mut state = held(1);
    follow(&mut state, 1, order(PREEMPT, 6, 11, 11)).unwrap();
    assert_eq!(state.key_of(&port(1)), Some(11));
    assert_eq!(state.held.unwrap().kind.code(), 6);
}

#[test]
fn parameter_lists_are_checked() {
    let list = |flags: u8| {
        let mut list = [0; PARAMETERS as usize];
        list[7] = 1;
        list[15] = 2;
        list[20] = flags;
        list
    };
    let decode = |list: &[u8], persistent| Order::decode(REGISTER, 0, 0, list, persistent);
    let sound = decode(&list(1), true).unwrap();
    assert_eq!((sound.key, sound.other, sound.persists), (1, 2, true));
    assert_eq!(decode(&list(1), false), Err(Sense::parameter(20)));
    assert_eq!(decode(&list(4), true), Err(Sense::parameter(20)));
    assert_eq!(decode(&list(8), true), Err(Sense::parameter(20)));
    assert_eq!(decode(&[0; 23], true), Err(Sense::LIST_LENGTH));
}

proptest! {
    /// Whatever is ordered: a holder is registered, no key is 0, no port is
    /// registered twice.
    #[test]
    fn states_stay_sound(orders in prop::collection::vec((1_u8..4, 0_u8..8, 0_u8..10, 0_u64..4, 0_u64..4), 1..60)) {
        let mut state = State::default();
        for (who, action, kind, key, other) in orders {
            let _ = follow(&mut state, who, order(action, kind, key, other));
            let mut ports: Vec<_> = state.registrants.iter().map(|one| one.nexus.isid).collect();
            ports.sort_unstable();
            ports.dedup();
            prop_assert_eq!(ports.len(), state.registrants.len());
            prop_assert!(state.registrants.iter().all(|one| one.key != 0));
            if let Some(held) = &state.held {
                let registered = state.key_of(&held.holder).is_some();
                prop_assert!(registered || held.kind.all_registrants() && state.is_used());
            }
        }
    }
}

//! What PERSISTENT RESERVE IN tells (SPC-4, 6.15).

use super::reservation::State;
use crate::iscsi::session::Nexus;

/// The parameter data of a service action, whole; `persistent`: states can be
/// kept over a restart.
pub fn report(state: &State, action: u8, persistent: bool) -> Vec<u8> {
    match action {
        0 => with_header(state, keys(state)),
        1 => with_header(state, reservation(state)),
        2 => capabilities(state, persistent),
        _ => with_header(state, full_status(state)),
    }
}

fn with_header(state: &State, body: Vec<u8>) -> Vec<u8> {
    let mut data = Vec::with_capacity(8 + body.len());
    data.extend_from_slice(&state.generation.to_be_bytes());
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    data.extend_from_slice(&length.to_be_bytes());
    data.extend(body);
    data
}

fn keys(state: &State) -> Vec<u8> {
    let keys = state.registrants.iter().map(|one| one.key.to_be_bytes());
    keys.flatten().collect()
}

fn reservation(state: &State) -> Vec<u8> {
    let Some(held) = &state.held else {
        return Vec::new();
    };
    let key = match state.key_of(&held.holder) {
        Some(key) if !held.kind.all_registrants() => key,
        _ => 0,
    };
    let mut data = key.to_be_bytes().to_vec();
    data.extend_from_slice(&[0, 0, 0, 0, 0, held.kind.code(), 0, 0]);
    data
}

/// Types 1, 3, 5, 6, 7 and 8; neither SPEC_I_PT nor ALL_TG_PT.
fn capabilities(state: &State, persistent: bool) -> Vec<u8> {
    let activated = u8::from(state.persists);
    vec![
        0,
        8,
        u8::from(persistent),
        0x80 | activated,
        0xea,
        0x01,
        0,
        0,
    ]
}

fn full_status(state: &State) -> Vec<u8> {
    let mut data = Vec::new();
    for one in &state.registrants {
        let held = state.held.as_ref().filter(|_| state.holds(&one.nexus));
        let transport = transport_id(&one.nexus);
        data.extend_from_slice(&one.key.to_be_bytes());
        data.extend_from_slice(&[0; 4]);
        data.extend_from_slice(&[
            u8::from(held.is_some()),
            held.map_or(0, |held| held.kind.code()),
        ]);
        // Reserved, and the relative target port: the one there is.
        data.extend_from_slice(&[0, 0, 0, 0, 0, 1]);
        let length = u32::try_from(transport.len()).unwrap_or(u32::MAX);
        data.extend_from_slice(&length.to_be_bytes());
        data.extend(transport);
    }
    data
}

/// An initiator port's name and session part (SPC-4, 7.6.4.6).
fn transport_id(nexus: &Nexus) -> Vec<u8> {
    let isid = nexus.isid.map(|byte| format!("{byte:02x}")).concat();
    let mut name = format!("{},i,0x{isid}", nexus.initiator).into_bytes();
    name.push(0);
    name.resize(name.len().next_multiple_of(4), 0);
    let length = u16::try_from(name.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut data = vec![0x45, 0, length[0], length[1]];
    data.extend(name);
    data
}

#[cfg(test)]
mod tests {
    use super::super::reservation::{Held, Registrant, Type};
    use super::*;

    fn state(kind: Type) -> State {
        let nexus = |last| Nexus {
            initiator: "iqn.a".into(),
            isid: [0, 0, 0, 0, 0, last],
        };
        State {
            generation: 3,
            registrants: vec![
                Registrant {
                    nexus: nexus(1),
                    key: 7,
                },
                Registrant {
                    nexus: nexus(2),
                    key: 8,
                },
            ],
            held: Some(Held {
                kind,
                holder: nexus(2),
            }),
            persists: false,
        }
    }

    #[test]
    fn keys_are_those_of_all_registrants() {
        let data = report(&state(Type::WriteExclusive), 0, false);
        assert_eq!(data[..8], [0, 0, 0, 3, 0, 0, 0, 16]);
        assert_eq!((data[15], data[23], data.len()), (7, 8, 24));
    }

    #[test]
    fn the_reservation_has_its_holder_s_key_unless_all_hold_it() {
        let data = report(&state(Type::WriteExclusive), 1, false);
        assert_eq!((data[7], data[15], data[21]), (16, 8, 1));
        let data = report(&state(Type::ExclusiveAccessAllRegistrants), 1, false);
        assert_eq!((data[7], data[15], data[21]), (16, 0, 8));
        assert_eq!(report(&State::default(), 1, false), [0; 8]);
    }

    #[test]
    fn capabilities_tell_whether_states_are_kept() {
        let data = report(&State::default(), 2, true);
        assert_eq!(data, [0, 8, 1, 0x80, 0xea, 1, 0, 0]);
        assert_eq!(report(&State::default(), 2, false)[2], 0);
    }

    #[test]
    fn full_status_names_each_initiator_port() {
        let data = report(&state(Type::WriteExclusive), 3, false);
        let id = b"iqn.a,i,0x000000000001\0\0";
        assert_eq!(data[8 + 12..8 + 14], [0, 0]);
        assert_eq!(data[8 + 20..8 + 28], [0, 0, 0, 28, 0x45, 0, 0, 24]);
        assert_eq!(data[8 + 28..8 + 52], id[..]);
        assert_eq!(data[8 + 52 + 12..8 + 52 + 14], [1, 1]);
    }
}

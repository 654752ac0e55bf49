//! The decoders of this room, for the fuzzer (see `crate::doors`).

use super::chap::{self, Algorithm};
use super::negotiate::Parameters;
use super::scsi::command::Command;
use super::scsi::mode::{self, Asked, Settings};
use super::scsi::reservation::{Order, State, Use};
use super::scsi::{opcodes, reservation_report, unmap};
use super::session::Nexus;
use super::text;
use super::wire::{BHS, DataOut, Digests, Header, LoginRequest, ScsiCommand, TaskManagement};
use crate::doors::{self, Door};

/// Each of them.
pub const ALL: [Door; 8] = [
    header,
    texts,
    proof,
    cdb,
    unmapped,
    selected,
    ordered,
    reservations,
];

const BLOCKS: u64 = 64;

/// A basic header segment.
fn header(bytes: &[u8]) -> bool {
    let Some(header) = bytes.first_chunk::<BHS>() else {
        return false;
    };
    let header = Header::new(*header);
    let mut taken = false;
    for (head, data) in [(false, false), (true, true)] {
        let digests = Digests { header: head, data };
        if let Ok(frame) = header.frame(digests, 8192) {
            taken = true;
            assert!(frame.data <= 8192 && frame.ahs <= 4 * 255);
            assert_eq!((frame.data + frame.padding()) % 4, 0);
            assert!(frame.head() >= BHS && frame.trailer() <= 7);
        }
    }
    let _ = (header.opcode(), ScsiCommand::decode(&header));
    let _ = (DataOut::decode(&header), LoginRequest::decode(&header));
    let _ = TaskManagement::decode(&header);
    taken
}

/// Keys and values, and what is agreed on by them.
fn texts(bytes: &[u8]) -> bool {
    let Ok(pairs) = text::parse(bytes) else {
        return false;
    };
    let mut parameters = Parameters::default();
    for (key, value) in &pairs {
        let _ = parameters.take(key, value);
    }
    parameters.settle();
    assert!(parameters.first_burst <= parameters.max_burst);
    assert!(parameters.max_send >= 512);
    !pairs.is_empty()
}

/// CHAP's values.
fn proof(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let _ = text::number(text);
    let Some(decoded) = chap::decode(text) else {
        return Algorithm::choose(text).is_some();
    };
    assert_eq!(chap::decode(&chap::encode(&decoded)), Some(decoded.clone()));
    for number in ["5", "7", "8"] {
        if let Some(algorithm) = Algorithm::choose(number) {
            let response = algorithm.response(1, b"secret", &decoded);
            assert!(chap::equal(&response, &response));
        }
    }
    true
}

/// A command descriptor block, and what is reported of commands like it.
fn cdb(bytes: &[u8]) -> bool {
    let Some(cdb) = bytes.first_chunk::<16>() else {
        return false;
    };
    let _ = opcodes::report(cdb);
    let Ok(form) = opcodes::form(cdb) else {
        return false;
    };
    let mut taken = false;
    for blocks in [BLOCKS, 1 << 40] {
        let Ok(command) = Command::decode(form, cdb, blocks) else {
            continue;
        };
        taken = true;
        let most = command.data_out();
        let _ = (command.writes(), command.usage(), command.always_allowed());
        if command.in_parts() {
            let _ = command.part(0, u32::try_from(most.min(4096)).unwrap_or(0));
        }
    }
    if let Some(asked) = bytes.get(16..20) {
        let asked = Asked {
            ten: asked[0] & 1 != 0,
            no_descriptor: asked[0] & 2 != 0,
            long_lba: asked[0] & 4 != 0,
            control: asked[1] & 3,
            page: asked[2],
            subpage: asked[3],
        };
        let _ = mode::sense(&asked, Settings::default(), false, BLOCKS);
    }
    taken
}

/// UNMAP's parameter list.
fn unmapped(bytes: &[u8]) -> bool {
    let ranges = unmap::ranges(bytes, BLOCKS).unwrap_or_default();
    for range in &ranges {
        assert!(range.blocks > 0 && range.lba.0 + u64::from(range.blocks) <= BLOCKS);
    }
    !ranges.is_empty()
}

/// MODE SELECT's parameter list.
fn selected(bytes: &[u8]) -> bool {
    let select = |ten| mode::select(bytes, ten, Settings::default()).is_ok();
    select(false) | select(true)
}

/// PERSISTENT RESERVE OUT's parameter list, on whatever is reserved.
fn ordered(bytes: &[u8]) -> bool {
    let Some(([action, scope, kind, who], rest)) = bytes.split_first_chunk() else {
        return false;
    };
    let (list, kept) = rest.split_at(rest.len().min(24));
    let Ok(order) = Order::decode(*action, *scope, *kind, list, true) else {
        return false;
    };
    let state: State = serde_json::from_slice(kept).unwrap_or_default();
    let nexus = state.registrants.get(usize::from(*who)).map_or_else(
        || Nexus {
            initiator: "iqn.a".to_owned(),
            isid: [0; 6],
        },
        |registrant| registrant.nexus.clone(),
    );
    let Ok((next, effects)) = state.apply(&nexus, &order) else {
        return false;
    };
    assert!(!effects.aborts.contains(&nexus) || *action == 5);
    for action in 0..4 {
        let _ = reservation_report::report(&next, action, true);
    }
    let _ = (next.allows(&nexus, Use::Write), next.holds(&nexus));
    true
}

/// Reservations as they are kept.
fn reservations(bytes: &[u8]) -> bool {
    doors::json::<State>(bytes)
}

//! The decoders of this room, for the fuzzer (see `crate::doors`).

use std::str::FromStr;

use uuid::Uuid;

use super::administer::{is_auth, transfer_of};
use super::command::{Entry, Io, MAX_TRANSFER};
use super::connect::Request;
use super::dhchap::Secret;
use super::reservation::{Command, Kind, Record};
use super::wire::{Completion, Data, Digests, Frame, IcReq, c2h_term};
use super::{log, perform};
use crate::doors::Door;
use crate::ids::Bytes;

/// Each of them.
pub const ALL: [Door; 6] = [frame, entry, connect, reservations, sealed, secret];

/// A PDU's first bytes, whatever the digests, and an ICReq.
fn frame(bytes: &[u8]) -> bool {
    let Some(common) = bytes.first_chunk::<8>() else {
        return false;
    };
    let mut taken = false;
    for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
        match Frame::check(common, Digests { header, data }) {
            Ok(frame) => {
                taken = true;
                assert!(frame.header >= 8 && frame.header <= 128 && frame.pad <= 128);
                assert!(frame.data <= 1 << 20);
            }
            Err(malformed) => {
                let told = c2h_term(malformed, bytes);
                let frame = told.first_chunk().expect("a header");
                let frame = Frame::check(frame, Digests::default()).expect("it is well-formed");
                assert_eq!(frame.header + frame.data, told.len());
                assert!(told.len() <= 152 && (1..=6).contains(&malformed.fes()));
            }
        }
    }
    if let Some(request) = bytes.first_chunk::<128>() {
        let _ = IcReq::decode(request);
    }
    if let Some(header) = bytes.first_chunk::<24>() {
        let data = Data::decode(header);
        assert_eq!(Data::decode(&data.encode(*common)), data);
        let _ = Completion::decode(header);
    }
    taken
}

/// A submission queue entry, with data behind it.
fn entry(bytes: &[u8]) -> bool {
    let Some((entry, data)) = bytes.split_first_chunk::<64>() else {
        return false;
    };
    let entry = Entry::new(*entry);
    let _ = (is_auth(&entry), transfer_of(&entry), entry.descriptor());
    let mut taken = false;
    for read_only in [false, true] {
        let Ok(io) = Io::decode(&entry, read_only) else {
            continue;
        };
        assert!(!read_only || !io.writes());
        let Ok(incoming) = io.incoming(&entry) else {
            continue;
        };
        let Ok(outgoing) = io.outgoing(&entry) else {
            continue;
        };
        let length = incoming.map_or(0, |(_, length)| length);
        assert!(length <= MAX_TRANSFER && outgoing <= MAX_TRANSFER);
        assert!(io.scratch() <= MAX_TRANSFER);
        if let Some(data) = data.get(..length as usize) {
            taken |= perform::check(io, data, Bytes(64 << 12)).is_ok();
        }
    }
    let page = [0; 64];
    let offset = u64::from(entry.dword(12)) | u64::from(entry.dword(13)) << 32;
    let length = (entry.dword(10) >> 16) + 1;
    if let Some(part) = log::part(&page, offset, length) {
        assert_eq!(part.len(), length as usize);
    }
    taken
}

/// A Connect's entry and data.
fn connect(bytes: &[u8]) -> bool {
    let Some((entry, data)) = bytes.split_first_chunk::<64>() else {
        return false;
    };
    let Ok(request) = Request::decode(&Entry::new(*entry), data) else {
        return false;
    };
    assert!(request.entries > 1 && !request.subsystem.is_empty());
    assert!(request.subsystem.len() < 256 && request.host.nqn.len() < 256);
    true
}

/// Reservations as they are kept, with their checksum.
fn sealed(bytes: &[u8]) -> bool {
    let mut sealed = bytes.to_vec();
    sealed.extend_from_slice(&crc32c::crc32c(bytes).to_le_bytes());
    reservations(&sealed)
}

/// Reservations as they are kept, and every command upon them.
fn reservations(bytes: &[u8]) -> bool {
    let Some(record) = Record::from_bytes(bytes) else {
        return false;
    };
    assert_eq!(
        Record::from_bytes(&record.to_bytes()).as_ref(),
        Some(&record)
    );
    let host = bytes.get(26..42).and_then(|id| Uuid::from_slice(id).ok());
    let host = host.unwrap_or_default();
    let key = u64::from(bytes[bytes.len() / 2]);
    let kind = Kind::of(1 + bytes[0] % 6).expect("there are six");
    let commands = [
        Command::Register { key },
        Command::Unregister { key: Some(key) },
        Command::Unregister { key: None },
        Command::Replace {
            key: None,
            new: key,
        },
        Command::Acquire { key, kind },
        Command::Preempt {
            key,
            preempted: key ^ 1,
            kind,
            abort: true,
        },
        Command::Preempt {
            key,
            preempted: 0,
            kind,
            abort: false,
        },
        Command::Release { key, kind },
        Command::Clear { key },
    ];
    for command in commands {
        if let Ok(change) = record.apply(host, command) {
            let _ = change.record.report(|_| 1);
            let _ = change.record.access(host);
            assert!(!change.aborted.contains(&host), "nobody aborts itself");
        }
    }
    let _ = record.without(host);
    true
}

/// A DH-HMAC-CHAP secret.
fn secret(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| Secret::from_str(text).is_ok())
}

//! An iSCSI initiator for the fuzzer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use drover::iscsi::chap::Credentials;
use drover::iscsi::connection::{Iscsi, Shared};
use drover::iscsi::metrics::Metrics;
use drover::iscsi::scsi::inquiry::Identity;
use drover::iscsi::target::{Access, Directory, Found, Spec, Target};
use drover::iscsi::unit::Unit;
use drover::reactor::inline::Inline;
use uuid::Uuid;

use crate::{Input, Memory};

const TARGET: &str = "iqn.2026-11.io.drover:fuzz:1:a";
const INITIATOR: &str = "iqn.2026-11.org.example:fuzz";

struct One(Arc<Target>);

impl Directory for One {
    fn find(&self, target: &str) -> Found {
        if target == TARGET {
            Found::Live(Arc::clone(&self.0))
        } else {
            Found::Unknown
        }
    }

    fn visible(&self, initiator: &str) -> Vec<String> {
        let visible = self.0.access(initiator).map(|_| TARGET.to_owned());
        visible.into_iter().collect()
    }
}

/// One target of a device in memory, which wants CHAP or not.
pub fn target(chap: bool) -> Arc<Shared> {
    let identity = Identity {
        uuid: Uuid::from_u128(7),
        target: TARGET.to_owned(),
    };
    let unit = Unit::new(Arc::new(Memory::default()), identity, false, None);
    let unit = unit.expect("nothing is kept of reservations");
    let credentials = |name: &str| Credentials {
        name: name.to_owned(),
        secret: "a secret of some length".to_owned(),
    };
    let spec = Spec {
        name: TARGET.to_owned(),
        access: vec![Access {
            initiator: INITIATOR.to_owned(),
            incoming: chap.then(|| credentials("in")),
            outgoing: chap.then(|| credentials("out")),
        }],
        max_sessions: 4,
    };
    Shared::new(
        Arc::new(One(Target::new(spec, unit))),
        Metrics::default(),
    )
}

/// A new connection to it.
pub fn connection(shared: &Arc<Shared>) -> Inline {
    let peer = ([127, 0, 0, 1], 1).into();
    let portal = ([127, 0, 0, 1], 3260).into();
    let protocol = Iscsi::new(Arc::clone(shared), peer, portal, None, Instant::now());
    Inline::new(Box::new(protocol))
}

/// Logs in to a normal session.
pub fn log_in(connection: &mut Inline) {
    let mut text = Vec::new();
    for (key, value) in [
        ("InitiatorName", INITIATOR),
        ("TargetName", TARGET),
        ("SessionType", "Normal"),
        ("AuthMethod", "None"),
        ("InitialR2T", "No"),
        ("ImmediateData", "Yes"),
        ("MaxRecvDataSegmentLength", "8192"),
        ("MaxBurstLength", "65536"),
        ("FirstBurstLength", "8192"),
    ] {
        text.extend_from_slice(format!("{key}={value}\0").as_bytes());
    }
    // Immediate login, transit from operational negotiation to full feature.
    let mut header = [0; 48];
    (header[0], header[1]) = (0x43, 0x87);
    header[8] = 0x40;
    header[16] = 1;
    connection.send(&pdu(header, &text));
}

fn pdu(mut header: [u8; 48], data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("a few bytes").to_be_bytes();
    header[4] = 0;
    header[5..8].copy_from_slice(&length[1..]);
    let mut pdu = header.to_vec();
    pdu.extend_from_slice(data);
    pdu.resize(pdu.len().next_multiple_of(4), 0);
    pdu
}

/// Sends the rest of the input: as it is, or framed as PDUs and time.
pub fn play(connection: &mut Inline, input: &mut Input) {
    let mut number = 0u32;
    while !input.0.is_empty() && connection.end().is_none() {
        match input.byte() % 8 {
            0 => {
                let length = input.byte().into();
                connection.send(input.take(length));
            }
            // A PDU as the fuzzer made it.
            1 | 2 => {
                let mut header = [0; 48];
                let from = input.take(48);
                header[..from.len()].copy_from_slice(from);
                let length = usize::from(input.byte()) * 5;
                connection.send(&pdu(header, input.take(length)));
            }
            // A SCSI command in its turn.
            3..=5 => {
                let mut header = [0; 48];
                (header[0], header[1]) = (0x01, input.byte() | 0x80);
                header[16..20].copy_from_slice(&number.to_be_bytes());
                header[20..24].copy_from_slice(&(u32::from(input.byte()) * 256).to_be_bytes());
                header[24..28].copy_from_slice(&number.to_be_bytes());
                let cdb = input.take(16);
                header[32..32 + cdb.len()].copy_from_slice(cdb);
                let length = usize::from(input.byte()) * 33;
                connection.send(&pdu(header, input.take(length)));
                number = number.wrapping_add(1);
            }
            6 => connection.hold(input.byte() & 1 == 1),
            _ => {
                connection.wait(Duration::from_millis(u64::from(input.byte()) * 100));
            }
        }
    }
    connection.hold(false);
    connection.wait(Duration::ZERO);
}

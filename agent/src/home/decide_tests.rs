//! Every cell of the two tables.

use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::attach::ports::{HostIdentity, Protocol, Recorded, SettledBy};
use crate::ids::NodeId;

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

fn host() -> HostIdentity {
    HostIdentity::of("nqn.2014-08.org.nvmexpress:uuid:a", Uuid::nil())
}

fn open_at(epoch: u64) -> OpenExport {
    OpenExport {
        epoch: Epoch(epoch),
        node: node("a"),
        host: host(),
        protocol: Protocol::NvmeTcp,
        name: "nqn.x".into(),
        unit: Uuid::nil(),
        chap: None,
        read_only: false,
        failed_flush: None,
    }
}

fn settlement() -> Settlement {
    Settlement {
        volume: "vol-1".parse().unwrap(),
        epoch: Epoch(5),
        node: Some(node("a")),
        sessions_ended: 3,
        inside_at_close: 2,
        settled_by: SettledBy::Drained,
        unsettled: 0,
        settle_time: Duration::from_millis(3),
        late_refused: 1,
        last_write: None,
    }
}

/// Records at epoch 5: closed, open, closing, behind 9.
fn records() -> [Record; 4] {
    let mut closed = Record::new("vol-1".parse().unwrap(), true);
    closed.highest = Epoch(5);
    closed.settlement = Some(settlement());
    let mut open = closed.clone();
    open.settlement = None;
    open.export = ExportState::Open { export: open_at(5) };
    let mut closing = open.clone();
    closing.export = ExportState::Closing {
        export: open_at(5),
        inside: 4,
    };
    let mut old_copy = open.clone();
    old_copy.behind = Some(Epoch(9));
    [closed, open, closing, old_copy]
}

fn ask(epoch: u64) -> ExportRequest {
    ExportRequest {
        volume: "vol-1".parse().unwrap(),
        epoch: Epoch(epoch),
        node: node("a"),
        host: host(),
        protocol: Protocol::NvmeTcp,
        read_only: false,
    }
}

fn end(epoch: u64, recorded: u64) -> FenceRequest {
    knowing(epoch, Recorded::begin_of(Epoch(recorded)))
}

fn knowing(epoch: u64, recorded: Recorded) -> FenceRequest {
    FenceRequest {
        volume: "vol-1".parse().unwrap(),
        epoch: Epoch(epoch),
        recorded,
    }
}

fn stale(home: u64) -> HomeError {
    HomeError::StaleEpoch { home: Epoch(home) }
}

#[test]
fn every_export() {
    let none = Epoch(0);
    let refuse = ExportMove::Refuse;
    let [closed, open, closing, old_copy] = records();
    for record in [&closed, &open, &closing] {
        assert_eq!(export(record, none, &ask(4)), refuse(stale(5)));
    }
    assert_eq!(export(&closed, none, &ask(5)), refuse(stale(5)));
    assert_eq!(export(&closing, none, &ask(5)), refuse(stale(5)));
    assert_eq!(
        export(&open, none, &ask(5)),
        ExportMove::Repeat(Box::new(open_at(5)))
    );
    assert_eq!(export(&closed, none, &ask(6)), ExportMove::Open);
    for record in [&open, &closing] {
        let recorded = Epoch(5);
        let moved = export(record, none, &ask(6));
        assert_eq!(moved, ExportMove::Behind { recorded });
    }
    for record in [&closed, &open, &closing] {
        for epoch in [7, 60] {
            let recorded = Epoch(epoch - 1);
            let moved = export(record, none, &ask(epoch));
            assert_eq!(moved, ExportMove::Behind { recorded });
        }
    }
    for (epoch, known) in [(4, 9), (5, 9), (6, 9), (10, 9), (12, 11)] {
        let recorded = Epoch(known);
        let moved = export(&old_copy, none, &ask(epoch));
        assert_eq!(moved, ExportMove::Behind { recorded });
    }
}

#[test]
fn what_a_restore_writes_or_has_written_half_is_not_opened() {
    let [mut closed, ..] = records();
    closed.restoring = true;
    let ExportMove::Refuse(HomeError::Failed(why)) = export(&closed, Epoch(0), &ask(6)) else {
        panic!("opened beside a restore");
    };
    assert!(why.contains("half restored"), "{why}");
    assert_eq!(fence(&closed, &end(5, 5)), FenceMove::Repeat(settlement()));
}

#[test]
fn an_epoch_has_one_holder() {
    let [_, open, ..] = records();
    let mut other_node = ask(5);
    other_node.node = node("b");
    let mut other_host = ask(5);
    other_host.host.id = Uuid::max();
    let mut other_right = ask(5);
    other_right.read_only = true;
    for request in [other_node, other_host, other_right] {
        let moved = export(&open, Epoch(0), &request);
        assert_eq!(moved, ExportMove::Refuse(stale(5)));
    }
}

#[test]
fn an_epoch_that_a_fence_has_named_is_not_opened() {
    let [closed, open, ..] = records();
    let refuse = ExportMove::Refuse;
    assert_eq!(export(&closed, Epoch(7), &ask(6)), refuse(stale(7)));
    assert_eq!(export(&closed, Epoch(7), &ask(7)), refuse(stale(7)));
    assert_eq!(export(&open, Epoch(5), &ask(5)), refuse(stale(5)));
}

#[test]
fn every_fence() {
    let [closed, open, closing, old_copy] = records();
    for record in [&closed, &open, &closing] {
        for recorded in [0, 4] {
            let moved = fence(record, &end(4, recorded));
            assert_eq!(moved, FenceMove::Refuse(stale(5)));
        }
        for epoch in [6, 9] {
            let recorded = Epoch(6);
            assert_eq!(
                fence(record, &end(epoch, 6)),
                FenceMove::Behind { recorded }
            );
        }
    }
    for recorded in [0, 5] {
        assert_eq!(
            fence(&closed, &end(5, recorded)),
            FenceMove::Repeat(settlement())
        );
    }
    for recorded in [0, 5] {
        assert_eq!(
            fence(&closed, &end(6, recorded)),
            FenceMove::Note { highest: Epoch(6) }
        );
    }
    for (record, inside) in [(&open, 0), (&closing, 4)] {
        for (epoch, recorded) in [(5, 5), (5, 0), (6, 5), (6, 0)] {
            assert_eq!(
                fence(record, &end(epoch, recorded)),
                FenceMove::Close {
                    export: open_at(5),
                    inside,
                    highest: Epoch(epoch)
                }
            );
        }
    }
    let ended = Recorded::end_of(Epoch(5));
    for epoch in [5, 6] {
        for record in [&open, &closing] {
            let recorded = Epoch(5);
            let moved = fence(record, &knowing(epoch, ended));
            assert_eq!(moved, FenceMove::Behind { recorded });
        }
    }
    let moved = fence(&closed, &knowing(5, ended));
    assert_eq!(moved, FenceMove::Repeat(settlement()));
    for (epoch, recorded, known) in [(4, 4, 9), (5, 0, 9), (12, 8, 9), (12, 11, 11)] {
        assert_eq!(
            fence(&old_copy, &end(epoch, recorded)),
            FenceMove::Behind {
                recorded: Epoch(known)
            }
        );
    }
}

#[test]
fn a_volume_that_was_never_exported_is_fenced_with_nothing_open() {
    let fresh = Record::new("vol-1".parse().unwrap(), false);
    assert_eq!(
        fence(&fresh, &end(0, 0)),
        FenceMove::Note { highest: Epoch(0) }
    );
}

//! What the Controller service decides and translates by itself.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::*;
use crate::attach::ports::{HostIdentity, Protocol, SnapshotInfo};
use crate::attach::record::VolumeSpec;
use crate::ids::Epoch;

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

fn record(name: &str, has_pool: bool, lost: bool) -> NodeRecord {
    NodeRecord {
        node: node(name),
        incarnation: "boot-1".to_owned(),
        host: HostIdentity::of("nqn.x", uuid::Uuid::nil()),
        agent: "127.0.0.1:1".parse().unwrap(),
        has_pool,
        seen: SystemTime::UNIX_EPOCH,
        lost: lost.then(|| "boot-1".to_owned()),
    }
}

fn view(content: Content) -> VolumeView {
    VolumeView {
        spec: VolumeSpec {
            id: "vol-1".parse().unwrap(),
            name: "pvc-1".to_owned(),
            size: Bytes(3 << 20),
            content,
            protocol: Protocol::NvmeTcp,
            home: node("a"),
            busy_deadline: Duration::from_secs(120),
            parameters: BTreeMap::from([("home".to_owned(), "a".to_owned())]),
        },
        epoch: Epoch(7),
        tickets: Vec::new(),
        published: vec![node("b")],
    }
}

#[test]
fn a_home_is_the_nearest_node_that_can_be_one() {
    let nodes = [
        record("a", false, false),
        record("b", true, true),
        record("c", true, false),
        record("d", true, false),
    ];
    let near = |names: &[&str]| names.iter().map(|name| node(name)).collect::<Vec<_>>();
    assert_eq!(choose_home(&near(&["d", "c"]), &nodes), Some(node("d")));
    // No pool, lost, never seen: the next.
    assert_eq!(
        choose_home(&near(&["a", "b", "z", "c"]), &nodes),
        Some(node("c"))
    );
    // A wish that cannot be met is no error: every node can attach every volume.
    assert_eq!(choose_home(&near(&["a", "b"]), &nodes), None);
    assert_eq!(choose_home(&[], &nodes), None);
}

#[test]
fn a_publish_ends_before_its_caller_gives_up() {
    assert_eq!(publish_deadline(None), PUBLISH_DEADLINE);
    assert_eq!(
        publish_deadline(Some(Duration::from_secs(600))),
        PUBLISH_DEADLINE
    );
    let waits = Duration::from_secs(5);
    assert!(publish_deadline(Some(waits)) < waits);
    assert_eq!(publish_deadline(Some(Duration::ZERO)), Duration::ZERO);
}

#[test]
fn a_volume_says_neither_where_nor_in_which_epoch_it_is() {
    let told = volume(&view(Content::Empty));
    assert_eq!(told.volume_id, "vol-1");
    assert_eq!(told.capacity_bytes, 3 << 20);
    assert!(told.volume_context.is_empty() && told.accessible_topology.is_empty());
    assert_eq!(told.content_source, None);
    assert_eq!(published(&view(Content::Empty)), ["b"]);
}

#[test]
fn a_copy_names_its_source() {
    let source = |content| {
        volume(&view(content))
            .content_source
            .unwrap()
            .r#type
            .unwrap()
    };
    let snapshot_id = "snap-1".to_owned();
    assert_eq!(
        source(Content::Snapshot("snap-1".parse().unwrap())),
        Source::Snapshot(SnapshotSource { snapshot_id })
    );
    let volume_id = "vol-0".to_owned();
    assert_eq!(
        source(Content::Volume("vol-0".parse().unwrap())),
        Source::Volume(VolumeSource { volume_id })
    );
}

#[test]
fn a_snapshot_tells_its_instant() {
    let taken = SystemTime::UNIX_EPOCH + Duration::from_millis(1500);
    let told = snapshot(&SnapshotRecord {
        info: SnapshotInfo {
            id: "snap-1".parse().unwrap(),
            volume: "vol-1".parse().unwrap(),
            size: Bytes(u64::MAX),
            taken,
        },
        name: "s".to_owned(),
        home: node("a"),
        ready: true,
    });
    let time = told.creation_time.unwrap();
    assert_eq!((time.seconds, time.nanos), (1, 500_000_000));
    assert_eq!(told.size_bytes, i64::MAX);
    assert!(told.ready_to_use && told.source_volume_id == "vol-1");
}

#[test]
fn only_what_holds_is_confirmed() {
    let ask = |parameters: &[(&str, &str)]| {
        let capability = proto::VolumeCapability {
            access_type: Some(proto::volume_capability::AccessType::Block(
                proto::volume_capability::BlockVolume {},
            )),
            access_mode: Some(proto::volume_capability::AccessMode { mode: 1 }),
        };
        let sent = proto::ValidateVolumeCapabilitiesRequest {
            volume_id: "vol-1".into(),
            volume_capabilities: vec![capability],
            parameters: parameters
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect(),
            ..Default::default()
        };
        let asked = request::validate(&sent).unwrap();
        confirm(sent, &asked, &view(Content::Empty))
    };
    let good = ask(&[("home", "a")]);
    assert_eq!(good.confirmed.unwrap().volume_capabilities.len(), 1);
    assert!(good.message.is_empty());
    for wrong in [
        [("home", "b")],
        [("busyDeadline", "1m")],
        [("colour", "red")],
    ] {
        let answer = ask(&wrong);
        assert_eq!(answer.confirmed, None);
        assert!(answer.message.contains(wrong[0].0), "{}", answer.message);
    }
}

use std::collections::HashMap;

use proptest::prelude::*;

use super::controller as c;
use super::node as n;
use super::*;
use crate::attach::ports::Content;
use crate::ids::SnapshotId;
use proto::volume_capability::{AccessMode as WireMode, BlockVolume, MountVolume};

fn mount(fs: &str, mode: Mode) -> proto::VolumeCapability {
    proto::VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: fs.to_owned(),
            ..Default::default()
        })),
        access_mode: Some(WireMode { mode: mode.into() }),
    }
}

fn block() -> proto::VolumeCapability {
    proto::VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        access_mode: Some(WireMode {
            mode: Mode::SingleNodeWriter.into(),
        }),
    }
}

fn create() -> proto::CreateVolumeRequest {
    proto::CreateVolumeRequest {
        name: "pvc-1".to_owned(),
        volume_capabilities: vec![mount("", Mode::SingleNodeWriter)],
        ..Default::default()
    }
}

fn with_range(required_bytes: i64, limit_bytes: i64) -> proto::CreateVolumeRequest {
    proto::CreateVolumeRequest {
        capacity_range: Some(proto::CapacityRange {
            required_bytes,
            limit_bytes,
        }),
        ..create()
    }
}

fn with_parameter(key: &str, value: &str) -> proto::CreateVolumeRequest {
    proto::CreateVolumeRequest {
        parameters: [(key.to_owned(), value.to_owned())].into(),
        ..create()
    }
}

fn text(error: RequestError) -> String {
    error.to_string()
}

#[test]
fn a_plain_request_gets_the_defaults() {
    let asked = c::create(&create()).unwrap();
    assert_eq!(asked.volume.name, "pvc-1");
    assert_eq!(asked.volume.at_least, DEFAULT_SIZE);
    assert_eq!(asked.volume.at_most, None);
    assert_eq!(asked.volume.content, Content::Empty);
    assert_eq!(asked.volume.home, None);
    assert_eq!(asked.volume.busy_deadline, Duration::from_secs(120));
    assert!(asked.near.is_empty() && !asked.sized);
}

#[test]
fn a_name_and_a_capability_must_be_given() {
    let mut sent = create();
    sent.name.clear();
    assert_eq!(c::create(&sent), Err(RequestError::Missing("name")));
    let mut sent = create();
    sent.volume_capabilities.clear();
    assert_eq!(
        c::create(&sent),
        Err(RequestError::Missing("volume_capabilities"))
    );
    let mut sent = create();
    sent.volume_capabilities[0].access_mode = None;
    assert!(matches!(c::create(&sent), Err(RequestError::Missing(_))));
    let mut sent = create();
    sent.volume_capabilities[0].access_type = None;
    assert!(matches!(c::create(&sent), Err(RequestError::Missing(_))));
}

#[test]
fn names_are_bounded_as_csi_bounds_them() {
    for (name, good) in [
        ("a".repeat(128), true),
        ("a".repeat(129), false),
        ("ü/..\t\n".to_owned(), true),
        ("a\0".to_owned(), false),
        ("a\u{7f}".to_owned(), false),
        ("a\u{85}".to_owned(), false),
    ] {
        let sent = proto::CreateVolumeRequest {
            name: name.clone(),
            ..create()
        };
        assert_eq!(c::create(&sent).is_ok(), good, "{name:?}");
    }
}

#[test]
fn sizes_are_checked() {
    let size = |required, limit| {
        c::create(&with_range(required, limit)).map(|asked| asked.volume.at_least)
    };
    assert_eq!(size(5, 0), Ok(Bytes(5)));
    assert_eq!(size(MIB as i64, MIB as i64), Ok(Bytes(MIB)));
    // Only a limit: the default, or as much of it as fits in whole MiB.
    assert_eq!(size(0, 1 << 40), Ok(DEFAULT_SIZE));
    assert_eq!(size(0, (3 * MIB + 5) as i64), Ok(Bytes(3 * MIB)));
    assert!(matches!(size(0, 5), Err(RequestError::Size(_))));
    assert!(matches!(size(6, 5), Err(RequestError::Size(_))));
    assert!(matches!(size(i64::MAX, 0), Err(RequestError::Size(_))));
    assert_eq!(size(LARGEST as i64, 0), Ok(Bytes(LARGEST)));
    for (required, limit) in [(-1, 0), (0, -1), (i64::MIN, i64::MIN), (0, 0)] {
        let refused = size(required, limit);
        assert!(
            matches!(refused, Err(RequestError::Field { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn parameters_are_known_by_name() {
    let asked = c::create(&with_parameter("protocol", "nvme-tcp")).unwrap();
    assert_eq!(asked.volume.protocol, Protocol::NvmeTcp);
    let asked = c::create(&with_parameter("protocol", "iscsi")).unwrap();
    assert_eq!(asked.volume.protocol, Protocol::Iscsi);
    assert_eq!(asked.volume.parameters.len(), 1);
    let asked = c::create(&with_parameter("home", "node-a.example")).unwrap();
    assert_eq!(asked.volume.home, Some("node-a.example".parse().unwrap()));
    let asked = c::create(&with_parameter("busyDeadline", "1m30s")).unwrap();
    assert_eq!(asked.volume.busy_deadline, Duration::from_secs(90));
    let asked = c::create(&with_parameter("csi.storage.k8s.io/pvc/name", "x")).unwrap();
    assert!(asked.volume.parameters.is_empty());

    let refused = |key, value| text(c::create(&with_parameter(key, value)).unwrap_err());
    let unknown = refused("protocol", "nbd");
    assert!(
        unknown.contains("nbd") && unknown.contains("nvme-tcp and iscsi"),
        "{unknown}"
    );
    assert!(refused("Home", "a").contains("\"Home\""));
    assert!(refused("home", "../a").contains("home"));
    for wrong in [
        "",
        "2",
        "m",
        "2 m",
        "-2m",
        "2d",
        "25h",
        "1.5h",
        "99999999999999999999s",
    ] {
        assert!(
            refused("busyDeadline", wrong).contains("busyDeadline"),
            "{wrong:?}"
        );
    }
    let sent = proto::CreateVolumeRequest {
        mutable_parameters: [("iops".to_owned(), "5".to_owned())].into(),
        ..create()
    };
    assert!(text(c::create(&sent).unwrap_err()).contains("\"iops\""));
}

#[test]
fn file_systems_and_modes_are_known_by_name() {
    let read = |one: proto::VolumeCapability| capability(Some(&one));
    let fs = |name: &str| read(mount(name, Mode::SingleNodeWriter)).map(|wanted| wanted.access);
    let flags = Vec::new();
    let ext4 = Access::Mount {
        fs: FsType::Ext4,
        flags: flags.clone(),
    };
    assert_eq!(fs(""), Ok(ext4.clone()));
    assert_eq!(fs("ext4"), Ok(ext4));
    assert_eq!(
        fs("xfs"),
        Ok(Access::Mount {
            fs: FsType::Xfs,
            flags
        })
    );
    assert!(text(fs("btrfs").unwrap_err()).contains("btrfs"));
    assert_eq!(read(block()).unwrap().access, Access::Block);
    for (mode, meant) in [
        (Mode::SingleNodeWriter, Some(AccessMode::SingleWriter)),
        (Mode::SingleNodeSingleWriter, Some(AccessMode::SingleWriter)),
        (Mode::SingleNodeMultiWriter, Some(AccessMode::SingleWriter)),
        (Mode::SingleNodeReaderOnly, Some(AccessMode::SingleReader)),
        (Mode::MultiNodeReaderOnly, None),
        (Mode::MultiNodeSingleWriter, None),
        (Mode::MultiNodeMultiWriter, None),
        (Mode::Unknown, None),
    ] {
        match (read(mount("xfs", mode)), meant) {
            (Ok(wanted), Some(meant)) => assert_eq!(wanted.mode, meant),
            (Err(RequestError::Capability(why)), None) => {
                assert!(why.contains(mode.as_str_name()), "{why}");
            }
            (Err(RequestError::Missing(_)), None) => assert_eq!(mode, Mode::Unknown),
            (other, _) => panic!("{mode:?}: {other:?}"),
        }
    }
}

#[test]
fn mount_flags_are_bounded_and_never_shown() {
    let with = |flags: &[&str]| {
        mount_access(&MountVolume {
            mount_flags: flags.iter().map(ToString::to_string).collect(),
            ..Default::default()
        })
    };
    assert!(with(&["noatime", "discard"]).is_ok());
    for wrong in ["", "pass word", "pass\nword"] {
        let why = text(with(&["noatime", wrong]).unwrap_err());
        assert!(
            why.contains("mount_flags[1]") && !why.contains("word"),
            "{why}"
        );
    }
    assert!(with(&[&"x".repeat(4097)]).is_err());
    let group = mount_access(&MountVolume {
        volume_mount_group: "5".into(),
        ..Default::default()
    });
    assert!(text(group.unwrap_err()).contains("volume_mount_group"));
}

#[test]
fn the_nearest_places_come_first() {
    let place = |name: &str| proto::Topology {
        segments: [(c::TOPOLOGY_KEY.to_owned(), name.to_owned())].into(),
    };
    let sent = proto::CreateVolumeRequest {
        accessibility_requirements: Some(proto::TopologyRequirement {
            requisite: vec![place("a"), place("b")],
            preferred: vec![place("b"), place("NOT A NODE"), proto::Topology::default()],
        }),
        ..create()
    };
    let near = c::create(&sent).unwrap().near;
    assert_eq!(
        near.iter().map(NodeId::as_str).collect::<Vec<_>>(),
        ["b", "a", "b"]
    );
}

#[test]
fn an_impossible_id_is_an_unknown_one() {
    for id in ["../x", "a/b", "A", "-", "vol\0", &"a".repeat(64)] {
        let volume_id = id.to_owned();
        let deleted = c::delete(&proto::DeleteVolumeRequest {
            volume_id: volume_id.clone(),
            ..Default::default()
        });
        assert_eq!(deleted, Ok(None));
        let sent = proto::ControllerUnpublishVolumeRequest {
            volume_id: volume_id.clone(),
            ..Default::default()
        };
        assert_eq!(c::unpublish(&sent), Ok(None));
        let sent = proto::ControllerPublishVolumeRequest {
            volume_id: volume_id.clone(),
            node_id: "a".into(),
            volume_capability: Some(block()),
            ..Default::default()
        };
        assert!(matches!(
            c::publish(&sent),
            Err(RequestError::Impossible(_))
        ));
        let sent = proto::NodeUnpublishVolumeRequest {
            volume_id: volume_id.clone(),
            target_path: "/t".into(),
        };
        assert_eq!(n::unpublish(&sent), Ok(None));
        let sent = proto::NodeStageVolumeRequest {
            volume_id,
            staging_target_path: "/s".into(),
            volume_capability: Some(block()),
            ..Default::default()
        };
        assert!(matches!(n::stage(&sent), Err(RequestError::Impossible(_))));
        let sent = proto::ListSnapshotsRequest {
            source_volume_id: id.to_owned(),
            ..Default::default()
        };
        assert_eq!(c::list_snapshots(&sent), Ok(None));
    }
    // An empty one is missing everywhere.
    assert_eq!(
        c::delete(&Default::default()),
        Err(RequestError::Missing("volume_id"))
    );
    assert_eq!(
        c::unpublish(&Default::default()),
        Err(RequestError::Missing("volume_id"))
    );
    assert_eq!(
        c::delete_snapshot(&Default::default()),
        Err(RequestError::Missing("snapshot_id"))
    );
    assert_eq!(
        n::unstage(&Default::default()),
        Err(RequestError::Missing("volume_id"))
    );
}

#[test]
fn an_empty_node_means_all_and_an_impossible_one_none() {
    let ask = |node: &str| {
        let sent = proto::ControllerUnpublishVolumeRequest {
            volume_id: "vol-1".into(),
            node_id: node.into(),
            ..Default::default()
        };
        c::unpublish(&sent).unwrap()
    };
    assert_eq!(ask("").unwrap().node, None);
    assert_eq!(ask("a").unwrap().node, Some("a".parse().unwrap()));
    assert_eq!(ask("../a"), None);
}

#[test]
fn reading_only_is_asked_for_in_two_ways() {
    let ask = |readonly, mode| {
        let sent = proto::ControllerPublishVolumeRequest {
            volume_id: "vol-1".into(),
            node_id: "a".into(),
            volume_capability: Some(mount("", mode)),
            readonly,
            ..Default::default()
        };
        c::publish(&sent).unwrap().mode
    };
    assert_eq!(ask(false, Mode::SingleNodeWriter), AccessMode::SingleWriter);
    assert_eq!(ask(true, Mode::SingleNodeWriter), AccessMode::SingleReader);
    assert_eq!(
        ask(false, Mode::SingleNodeReaderOnly),
        AccessMode::SingleReader
    );
}

#[test]
fn what_is_not_offered_is_not_confirmed_and_no_error() {
    let mut sent = proto::ValidateVolumeCapabilitiesRequest {
        volume_id: "vol-1".into(),
        volume_capabilities: vec![mount("xfs", Mode::MultiNodeMultiWriter)],
        ..Default::default()
    };
    assert!(c::validate(&sent).unwrap().refusal.is_some());
    sent.volume_capabilities = vec![block()];
    assert_eq!(c::validate(&sent).unwrap().refusal, None);
    sent.parameters = [("protocol".to_owned(), "nbd".to_owned())].into();
    assert!(c::validate(&sent).unwrap().refusal.is_some());
    sent.volume_capabilities.clear();
    assert_eq!(
        c::validate(&sent),
        Err(RequestError::Missing("volume_capabilities"))
    );
}

#[test]
fn capacity_is_asked_for_a_place() {
    let ask = |parameters: &[(&str, &str)], place: &[(&str, &str)]| {
        let own = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect()
        };
        let sent = proto::GetCapacityRequest {
            parameters: own(parameters),
            accessible_topology: Some(proto::Topology {
                segments: own(place),
            }),
            ..Default::default()
        };
        c::get_capacity(&sent).unwrap()
    };
    let on = |name: &str| c::Room::On(name.parse().unwrap());
    assert_eq!(c::get_capacity(&Default::default()), Ok(c::Room::Anywhere));
    assert_eq!(ask(&[], &[]), c::Room::Anywhere);
    assert_eq!(ask(&[], &[(c::TOPOLOGY_KEY, "a")]), on("a"));
    assert_eq!(ask(&[("home", "b")], &[]), on("b"));
    assert_eq!(
        ask(&[("home", "b")], &[(c::TOPOLOGY_KEY, "a")]),
        c::Room::None
    );
    assert_eq!(ask(&[], &[("zone", "a")]), c::Room::None);
    assert_eq!(ask(&[], &[(c::TOPOLOGY_KEY, "../a")]), c::Room::None);
    let shared = proto::GetCapacityRequest {
        volume_capabilities: vec![mount("", Mode::MultiNodeMultiWriter)],
        ..Default::default()
    };
    assert_eq!(c::get_capacity(&shared), Ok(c::Room::None));
}

#[test]
fn paths_are_absolute_and_lead_nowhere_else() {
    for wrong in [
        "some/path",
        "/a/../b",
        "/..",
        "/",
        "/a\0",
        &format!("/{}", "a".repeat(4095)),
    ] {
        let refused = path("target_path", wrong).unwrap_err();
        assert!(
            matches!(
                refused,
                RequestError::Field {
                    field: "target_path",
                    ..
                }
            ),
            "{wrong:?}"
        );
        let volume: VolumeId = "vol-1".parse().unwrap();
        assert!(matches!(
            place(&volume, wrong),
            Err(RequestError::NowhereAt { .. })
        ));
    }
    assert_eq!(path("p", ""), Err(RequestError::Missing("p")));
    assert_eq!(
        path("p", "/var/lib/x..y"),
        Ok(PathBuf::from("/var/lib/x..y"))
    );
}

#[test]
fn publish_looks_at_its_fields_in_csis_order() {
    let mut sent = proto::NodePublishVolumeRequest::default();
    assert_eq!(n::publish(&sent), Err(RequestError::Missing("volume_id")));
    sent.volume_id = "vol-1".into();
    assert_eq!(n::publish(&sent), Err(RequestError::Missing("target_path")));
    sent.target_path = "/t".into();
    assert_eq!(
        n::publish(&sent),
        Err(RequestError::Missing("volume_capability"))
    );
    sent.volume_capability = Some(mount("xfs", Mode::SingleNodeReaderOnly));
    assert_eq!(n::publish(&sent), Err(RequestError::NotStaged));
    sent.staging_target_path = "/s".into();
    assert!(n::publish(&sent).unwrap().read_only);
}

#[test]
fn a_snapshot_class_has_no_parameters() {
    let mut sent = proto::CreateSnapshotRequest {
        name: "snap".into(),
        source_volume_id: "vol-1".into(),
        ..Default::default()
    };
    sent.parameters = [(
        "csi.storage.k8s.io/volumesnapshot/name".to_owned(),
        "x".to_owned(),
    )]
    .into();
    assert_eq!(c::create_snapshot(&sent).unwrap().volume.as_str(), "vol-1");
    sent.parameters = [("speed".to_owned(), "x".to_owned())].into();
    assert!(text(c::create_snapshot(&sent).unwrap_err()).contains("\"speed\""));
}

#[test]
fn a_token_of_somebody_elses_is_refused() {
    for wrong in ["invalid-token", "after/", "after/../x", "after", "0"] {
        let sent = proto::ListVolumesRequest {
            starting_token: wrong.into(),
            ..Default::default()
        };
        assert_eq!(
            c::list_volumes(&sent),
            Err(RequestError::Token(wrong.into()))
        );
    }
    let sent = proto::ListVolumesRequest {
        max_entries: -1,
        ..Default::default()
    };
    assert!(matches!(
        c::list_volumes(&sent),
        Err(RequestError::Field { .. })
    ));
}

proptest! {
    /// Pages, one after another, give every entry once and in order, whatever
    /// is deleted between them.
    #[test]
    fn pages_give_every_entry_once(count in 0_usize..40, most in 0_i32..12, gone in any::<u64>()) {
        let all: Vec<SnapshotId> =
            (0..count).map(|n| format!("snap-{n:03}").parse().unwrap()).collect();
        let (mut seen, mut token) = (Vec::new(), String::new());
        let mut left = all.clone();
        for _ in 0..=count {
            let wanted: Page<SnapshotId> = page(most, &token).unwrap();
            let (entries, next) = wanted.take(left.clone(), |id| id);
            prop_assert!(most == 0 || entries.len() <= most as usize);
            seen.extend(entries);
            // Some of those already listed go away: the token must still hold.
            left.retain(|id| !seen.contains(id) || gone & (1 << (id.as_str().len() % 64)) == 0);
            token = next;
            if token.is_empty() { break; }
        }
        prop_assert!(token.is_empty());
        prop_assert_eq!(seen, all);
    }

    /// No path that is taken leads out of where it says.
    #[test]
    fn a_path_that_is_taken_is_absolute_and_straight(text in "[/.a\\x00é]{0,12}") {
        if let Ok(path) = path("p", &text) {
            prop_assert!(path.is_absolute() && path != Path::new("/"));
            prop_assert!(!text.split('/').any(|part| part == ".."));
            prop_assert!(!text.contains('\0'));
        }
    }

    /// Nothing that can be sent makes the checks panic, and what they let pass is sound.
    #[test]
    fn no_request_makes_the_checks_panic(
        name in any::<String>(),
        id in any::<String>(),
        where_to in any::<String>(),
        required_bytes in any::<i64>(),
        limit_bytes in any::<i64>(),
        mode in any::<i32>(),
        max_entries in any::<i32>(),
        parameters in proptest::collection::hash_map("protocol|home|busyDeadline|.{0,8}", ".{0,12}", 0..4),
    ) {
        let range = Some(proto::CapacityRange { required_bytes, limit_bytes });
        let mut one = mount(&name, Mode::SingleNodeWriter);
        one.access_mode = Some(WireMode { mode });
        let sent = proto::CreateVolumeRequest {
            name: name.clone(), capacity_range: range, parameters: parameters.clone(),
            volume_capabilities: vec![block()], ..Default::default()
        };
        if let Ok(asked) = c::create(&sent) {
            prop_assert!(asked.volume.at_least.0 > 0 && asked.volume.at_least.0 <= LARGEST);
            prop_assert!(asked.volume.at_most.is_none_or(|most| most >= asked.volume.at_least));
            prop_assert!(asked.volume.busy_deadline <= LONGEST_BUSY);
        }
        let _ = c::publish(&proto::ControllerPublishVolumeRequest {
            volume_id: id.clone(), node_id: name.clone(), volume_capability: Some(one.clone()),
            ..Default::default()
        });
        let _ = c::expand(&proto::ControllerExpandVolumeRequest {
            volume_id: id.clone(), capacity_range: range, ..Default::default()
        });
        let _ = c::list_volumes(&proto::ListVolumesRequest { max_entries, starting_token: name.clone() });
        let _ = c::get_capacity(&proto::GetCapacityRequest { parameters, ..Default::default() });
        let _ = n::stage(&proto::NodeStageVolumeRequest {
            volume_id: id.clone(), staging_target_path: where_to.clone(),
            volume_capability: Some(one.clone()), ..Default::default()
        });
        let _ = n::publish(&proto::NodePublishVolumeRequest {
            volume_id: id.clone(), staging_target_path: where_to.clone(), target_path: where_to.clone(),
            volume_capability: Some(one), ..Default::default()
        });
        let _ = n::expand(&proto::NodeExpandVolumeRequest {
            volume_id: id, volume_path: where_to, capacity_range: range, ..Default::default()
        });
    }

    /// A length of time reads back as it was written.
    #[test]
    fn durations_read_back(hours in 0_u64..23, minutes in 0_u64..60, seconds in 0_u64..60) {
        let wanted = Duration::from_secs(hours * 3600 + minutes * 60 + seconds);
        prop_assert_eq!(duration(&format!("{hours}h{minutes}m{seconds}s")), Ok(wanted));
    }
}

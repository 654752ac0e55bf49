//! The sysfs reader on trees laid out as 6.12's, and what iscsiadm is told.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::*;
use crate::ids::{Bytes, Diskseq};
use crate::initiator::POLL;
use crate::initiator::child::tests::children;

const IQN: &str = "iqn.2026-11.io.drover:vol-1:7:ab12";
const UUID: &str = "2d8e38c45b1e4e4f9a520d3c6f1d0001";

/// An iscsiadm that notes its arguments, keeps records, and ends as told.
const FAKE: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >> said
case "$*" in
*"--mode iface"*update*) mkdir -p etc/iscsi/ifaces
    echo "iface.initiatorname = ${10}" > "etc/iscsi/ifaces/$4" ;;
*"--op new") mkdir -p "etc/iscsi/nodes/$4/$6"
    echo "node.startup = automatic" > "etc/iscsi/nodes/$4/$6/$8" ;;
*--login*) exit "$(cat login)" ;;
esac
"#;

struct Tree {
    folder: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        let tree = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        tree.put("iscsiadm", FAKE.trim_end()).put("login", "0");
        let fake = tree.path("iscsiadm");
        fs::set_permissions(fake, fs::Permissions::from_mode(0o755)).unwrap();
        tree
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn put(&self, path: &str, text: &str) -> &Self {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
        self
    }

    fn session(&self, number: u32, target: &str, initiator: &str) -> &Self {
        let folder = format!("sys/class/iscsi_session/session{number}");
        self.put(&format!("{folder}/targetname"), target)
            .put(&format!("{folder}/initiatorname"), initiator)
            .put(&format!("{folder}/state"), "LOGGED_IN")
    }

    fn disk(&self, session: u32, name: &str) -> &Self {
        let unit = format!("target{session}:0:0/{session}:0:0:0/block/{name}/x");
        let at = |attribute: &str| format!("sys/block/{name}/{attribute}");
        self.put(
            &format!("sys/class/iscsi_session/session{session}/device/{unit}"),
            "",
        )
        .put(&at("dev"), "8:16")
        .put(&at("diskseq"), "41")
        .put(&at("size"), "2097152")
        .put(&at("ro"), "0")
        .put(&at("device/vpd_pg80"), &format!("\0\u{8}\0\u{20}{UUID}"))
        .put(&format!("dev/{name}"), "")
    }

    fn iscsi(&self) -> Iscsi {
        let roots = Roots {
            sys: self.path("sys"),
            dev: self.path("dev"),
            proc: self.path("proc"),
        };
        let program = self.path("iscsiadm");
        let root = self.folder.path().to_owned();
        let admin = OpenIscsi::at(root, program.to_str().unwrap());
        Iscsi::new(roots, host(), children(), admin)
    }

    fn said(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("said")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

fn host() -> HostIdentity {
    HostIdentity::of("nqn.x", Uuid::from_u128(1))
}

fn target() -> Target {
    Target {
        protocol: Protocol::Iscsi,
        name: IQN.to_owned(),
        unit: Uuid::nil(),
        address: "[fd00::1]:3260".parse().unwrap(),
        proves: true,
        chap: Some(Chap::fresh(&host().iqn, IQN)),
    }
}

#[test]
fn a_session_and_its_disk_are_found() {
    let tree = Tree::new();
    assert_eq!(tree.iscsi().attached().unwrap(), []);
    tree.session(3, IQN, &host().iqn).disk(3, "sdb");
    let found = tree.iscsi().attached().unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name.as_str(), IQN);
    let link = ("session3".to_owned(), "LOGGED_IN".to_owned());
    assert_eq!(found[0].links, [link]);
    let device = found[0].device.as_ref().unwrap();
    assert_eq!(
        (&*device.disk.name, device.disk.diskseq),
        ("sdb", Diskseq(41))
    );
    assert_eq!(device.size, Bytes(1 << 30));
    assert_eq!(device.unit, Some(Uuid::parse_str(UUID).unwrap()));
}

#[test]
fn another_initiators_and_foreign_targets_are_left_alone() {
    let tree = Tree::new();
    tree.session(1, IQN, "iqn.other")
        .session(2, "iqn.2019-08.com.vendor:disk", &host().iqn)
        .session(4, "nqn.2026-11.io.drover:vol-1:7:ab12", &host().iqn)
        .put("sys/class/iscsi_session/session5/state", "FREE");
    assert_eq!(tree.iscsi().attached().unwrap(), []);
}

#[test]
fn a_disk_on_its_way_is_not_there_yet_and_several_are_refused() {
    let tree = Tree::new();
    tree.session(3, IQN, &host().iqn).disk(3, "sdb");
    fs::remove_file(tree.path("dev/sdb")).unwrap();
    assert_eq!(tree.iscsi().attached().unwrap()[0].device, None);
    tree.disk(3, "sdb").disk(3, "sdc");
    let error = tree.iscsi().attached().unwrap_err().to_string();
    assert!(error.contains("sdb") && error.contains("sdc"), "{error}");
}

#[test]
fn a_serial_number_is_read_within_its_page() {
    let page = |length: u8, text: &str| [&[0, 0x80, 0, length], text.as_bytes()].concat();
    assert_eq!(unit(&page(32, UUID)), Some(Uuid::parse_str(UUID).unwrap()));
    let padded = page(36, &format!("{UUID}    "));
    assert_eq!(unit(&padded), Some(Uuid::parse_str(UUID).unwrap()));
    for wrong in [vec![], vec![0, 0x80, 0], page(33, UUID), page(3, "abc")] {
        assert_eq!(unit(&wrong), None, "{wrong:?}");
    }
}

#[tokio::test]
async fn secrets_are_in_the_record_and_in_no_argument() {
    let tree = Tree::new();
    let (iscsi, target) = (tree.iscsi(), target());
    iscsi.connect(&target).await.unwrap();
    let chap = target.chap.as_ref().unwrap();
    let interface = iscsi.interface();
    let record = tree.path(&format!(
        "etc/iscsi/nodes/{IQN}/[fd00::1]:3260,1/{interface}"
    ));
    let record = fs::read_to_string(record).unwrap();
    for line in [
        format!("node.session.auth.password = {}", chap.initiator.secret),
        format!("node.session.auth.password_in = {}", chap.target.secret),
        "node.session.timeo.replacement_timeout = -1".to_owned(),
        "node.startup = manual".to_owned(),
    ] {
        assert!(record.lines().any(|l| l == line), "{line}: {record}");
    }
    let said = tree.said();
    assert!(said.last().unwrap().ends_with("--login"), "{said:?}");
    for secret in [&chap.initiator.secret, &chap.target.secret] {
        assert!(!said.iter().any(|line| line.contains(secret)), "{said:?}");
    }
    let calls = said.len();
    iscsi.connect(&target).await.unwrap();
    assert_eq!(tree.said().len(), calls + 2, "the interface is there");
}

#[test]
fn commands_of_a_new_disk_are_tried_without_end() {
    let tree = Tree::new();
    let retries = "sys/block/sdb/device/scsi_disk/3:0:0:0/max_retries";
    tree.session(3, IQN, &host().iqn)
        .disk(3, "sdb")
        .put(retries, "5");
    let iscsi = tree.iscsi();
    let attached = iscsi.attached().unwrap().remove(0);
    let device = attached.device.unwrap();
    iscsi.try_without_end(&attached.name, &device).unwrap();
    assert_eq!(fs::read_to_string(tree.path(retries)).unwrap(), "-1");
}

#[tokio::test]
async fn a_refused_login_leaves_no_record_and_says_why() {
    let tree = Tree::new();
    tree.put("login", "24");
    let error = tree.iscsi().connect(&target()).await.unwrap_err();
    assert!(error.to_string().contains("credentials"), "{error}");
    assert!(!tree.path(&format!("etc/iscsi/nodes/{IQN}")).exists());
    let untold = Target {
        chap: None,
        ..target()
    };
    let error = tree.iscsi().connect(&untold).await.unwrap_err();
    assert!(error.to_string().contains("vol-1"), "{error}");
}

#[tokio::test]
async fn records_of_ended_exports_of_the_volume_go() {
    let tree = Tree::new();
    let interface = tree.iscsi().interface();
    let record = |name: &str| format!("etc/iscsi/nodes/{name}/p/{interface}");
    let (ended, other) = (
        "iqn.2026-11.io.drover:vol-1:6:aa",
        "iqn.2026-11.io.drover:vol-2:6:aa",
    );
    tree.put(&record(ended), "").put(&record(other), "");
    tree.iscsi().connect(&target()).await.unwrap();
    assert!(!tree.path(&record(ended)).exists());
    assert!(tree.path(&record(other)).exists());
}

#[tokio::test]
async fn a_record_that_its_maker_was_killed_over_is_made_anew() {
    let tree = Tree::new();
    let iscsi = tree.iscsi();
    let record = format!(
        "etc/iscsi/nodes/{IQN}/[fd00::1]:3260,1/{}",
        iscsi.interface()
    );
    tree.put(&record, "");
    // An iscsiadm that, like the real one, does not overwrite such a record.
    let strict = FAKE.replace(
        "--op new\") mkdir",
        "--op new\") [ -e etc/iscsi/nodes/$4 ] && exit 6; mkdir",
    );
    assert_ne!(strict, FAKE);
    tree.put("iscsiadm", strict.trim_end());
    iscsi.connect(&target()).await.unwrap();
    let text = fs::read_to_string(tree.path(&record)).unwrap();
    assert!(text.contains("node.session.auth.password = "), "{text}");
}

#[test]
fn what_leads_to_no_session_is_tidied_up() {
    let tree = Tree::new();
    let iscsi = tree.iscsi();
    let interface = iscsi.interface();
    let (live, dead) = (IQN, "iqn.2026-11.io.drover:vol-2:6:aa");
    let foreign = "iqn.2019-08.com.vendor:disk";
    let record = |name: &str| format!("var/lib/iscsi/nodes/{name}/p,3260,1/{interface}");
    let link = |name: &str| format!("var/lib/iscsi/static/{name},p,3260,1,{interface}");
    for name in [live, dead, foreign] {
        tree.put(&record(name), "").put(&link(name), "");
    }
    let shared = format!("var/lib/iscsi/nodes/{dead}/p,3260,1/default");
    let half = format!("var/lib/iscsi/.{dead}.new");
    tree.put(&shared, "").put(&half, "a secret");
    tree.session(3, live, &host().iqn);
    iscsi.tidy(Some(&"vol-1".parse().unwrap())).unwrap();
    assert!(tree.path(&record(dead)).exists(), "it is another volume's");
    iscsi.tidy(None).unwrap();
    for name in [live, foreign] {
        assert!(tree.path(&record(name)).exists() && tree.path(&link(name)).exists());
    }
    assert!(!tree.path(&record(dead)).exists() && !tree.path(&link(dead)).exists());
    assert!(!tree.path(&half).exists());
    assert!(tree.path(&shared).exists(), "another interface's");
    fs::remove_file(tree.path(&shared)).unwrap();
    tree.put(&record(dead), "");
    iscsi.tidy(None).unwrap();
    assert!(!tree.path(&format!("var/lib/iscsi/nodes/{dead}")).exists());
}

#[tokio::test]
async fn every_session_of_an_export_is_logged_out_of_and_no_other() {
    let tree = Tree::new();
    tree.session(1, IQN, &host().iqn)
        .session(2, IQN, "iqn.other")
        .session(3, "iqn.2026-11.io.drover:vol-1:8:cd", &host().iqn)
        .session(4, IQN, &host().iqn);
    tree.iscsi()
        .disconnect(&IQN.parse().unwrap())
        .await
        .unwrap();
    let out = |sid: u32| format!("--mode session --sid {sid} --logout");
    assert_eq!(tree.said(), [out(1), out(4)]);
}

#[tokio::test]
async fn an_iscsiadm_past_its_deadline_runs_to_its_end() {
    let tree = Tree::new();
    let slow = "#!/bin/sh\nsleep 0.5\necho late\necho \"$*\" > \"$(dirname \"$0\")/said\"";
    tree.put("iscsiadm", slow);
    let iscsi = tree.iscsi();
    let error = iscsi.run(&["--mode", "node"], Duration::ZERO).await;
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("iscsiadm --mode node did not end"),
        "{error}"
    );
    let deadline = Instant::now() + Duration::from_secs(30);
    while tree.said().is_empty() {
        assert!(Instant::now() < deadline, "it was killed");
        tokio::time::sleep(POLL).await;
    }
    assert_eq!(tree.said(), ["--mode node"]);
}

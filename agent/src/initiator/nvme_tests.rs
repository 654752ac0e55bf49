//! The sysfs reader, on trees laid out as 6.12's.

use std::fs;

use super::*;
use crate::attach::ports::{Chap, Protocol};
use crate::ids::{Bytes, Diskseq};
use crate::initiator::child::tests::children;
use crate::nvme_tcp::dhchap::Secret;

const OURS: &str = "nqn.2014-08.org.nvmexpress:uuid:a";
const NQN: &str = "nqn.2026-11.io.drover:vol-1:7:ab12";
const UUID: &str = "2d8e38c4-5b1e-4e4f-9a52-0d3c6f1d0001";

struct Tree {
    folder: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn put(&self, path: &str, text: &str) -> &Self {
        let path = self.folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
        self
    }

    fn disk(&self, name: &str) -> &Self {
        let at = |attribute: &str| format!("sys/block/{name}/{attribute}");
        self.put(&at("dev"), "259:3")
            .put(&at("diskseq"), "41")
            .put(&at("size"), "2097152")
            .put(&at("uuid"), UUID)
            .put(&at("ro"), "0")
            .put(&format!("dev/{name}"), "")
    }

    fn controller(&self, subsystem: &str, name: &str, nqn: &str, host: &str) -> &Self {
        let folder = format!("sys/class/nvme-subsystem/{subsystem}");
        self.put(&format!("{folder}/subsysnqn"), nqn)
            .put(&format!("{folder}/{name}/hostnqn"), host)
            .put(&format!("{folder}/{name}/state"), "live")
            .put(&format!("sys/class/nvme/{name}/subsysnqn"), nqn)
    }

    fn nvme(&self) -> Nvme {
        let roots = Roots {
            sys: self.folder.path().join("sys"),
            dev: self.folder.path().join("dev"),
            proc: self.folder.path().join("proc"),
        };
        let host = HostIdentity::of(OURS, Uuid::nil());
        Nvme::new(roots, host, children(), FabricDeadlines::default())
    }
}

#[test]
fn a_node_without_nvme_has_nothing_attached() {
    assert_eq!(Tree::new().nvme().attached().unwrap(), []);
}

#[test]
fn a_multipath_head_is_found_and_its_hidden_path_is_not() {
    let tree = Tree::new();
    tree.controller("nvme-subsys3", "nvme3", NQN, OURS)
        .put("sys/class/nvme-subsystem/nvme-subsys3/nvme3n1/x", "")
        .put(
            "sys/class/nvme-subsystem/nvme-subsys3/nvme3/nvme3c3n1/x",
            "",
        )
        .disk("nvme3n1");
    let found = tree.nvme().attached().unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name.as_str(), NQN);
    assert_eq!(found[0].links, [("nvme3".to_owned(), "live".to_owned())]);
    let device = found[0].device.as_ref().unwrap();
    assert_eq!(device.disk.name, "nvme3n1");
    assert_eq!(device.disk.diskseq, Diskseq(41));
    assert_eq!(device.size, Bytes(1 << 30));
    assert_eq!(device.unit, Some(Uuid::parse_str(UUID).unwrap()));
}

#[test]
fn a_disk_without_multipath_is_found_below_its_controller() {
    let tree = Tree::new();
    tree.controller("nvme-subsys0", "nvme5", NQN, OURS)
        .put("sys/class/nvme-subsystem/nvme-subsys0/nvme5/nvme5n1/x", "")
        .disk("nvme5n1");
    fs::remove_file(tree.folder.path().join("sys/block/nvme5n1/uuid")).unwrap();
    tree.put("sys/block/nvme5n1/wwid", &format!("uuid.{UUID}"));
    let found = tree.nvme().attached().unwrap();
    let device = found[0].device.as_ref().unwrap();
    assert_eq!(device.disk.name, "nvme5n1");
    assert_eq!(device.unit, Some(Uuid::parse_str(UUID).unwrap()));
}

#[test]
fn another_hosts_and_foreign_subsystems_are_left_alone() {
    let tree = Tree::new();
    tree.controller("nvme-subsys0", "nvme0", NQN, "nqn.other")
        .controller("nvme-subsys1", "nvme1", "nqn.2019-08.com.vendor:disk", OURS)
        .put("sys/class/nvme-subsystem/nvme-subsys2/subsysnqn", NQN);
    assert_eq!(tree.nvme().attached().unwrap(), []);
}

#[test]
fn a_disk_on_its_way_in_is_not_there_yet() {
    let tree = Tree::new();
    tree.controller("nvme-subsys0", "nvme0", NQN, OURS)
        .put("sys/class/nvme-subsystem/nvme-subsys0/nvme0n1/x", "")
        .put("sys/block/nvme0n1/dev", "259:3");
    assert_eq!(tree.nvme().attached().unwrap()[0].device, None);
}

#[test]
fn several_disks_in_one_export_are_refused() {
    let tree = Tree::new();
    tree.controller("nvme-subsys0", "nvme0", NQN, OURS)
        .put("sys/class/nvme-subsystem/nvme-subsys0/nvme0n1/x", "")
        .put("sys/class/nvme-subsystem/nvme-subsys0/nvme0n2/x", "")
        .disk("nvme0n1")
        .disk("nvme0n2");
    let error = tree.nvme().attached().unwrap_err();
    assert!(error.to_string().contains("nvme0n1, nvme0n2"), "{error}");
}

#[tokio::test]
async fn every_controller_of_this_host_is_deleted_and_no_other() {
    let tree = Tree::new();
    tree.controller("nvme-subsys0", "nvme0", NQN, OURS)
        .controller("nvme-subsys0", "nvme1", NQN, OURS)
        .controller("nvme-subsys0", "nvme2", NQN, "nqn.other")
        // sysfs names this one of the subsystem, but the name has been given
        // to another since.
        .controller("nvme-subsys0", "nvme4", NQN, OURS)
        .put(
            "sys/class/nvme/nvme4/subsysnqn",
            "nqn.2019-08.com.vendor:disk",
        );
    for n in [0, 1, 2, 4] {
        tree.put(&format!("sys/class/nvme/nvme{n}/delete_controller"), "");
    }
    let nvme = tree.nvme();
    nvme.disconnect(&NQN.parse().unwrap()).await.unwrap();
    let deleted = |n: u32| {
        let path = format!("sys/class/nvme/nvme{n}/delete_controller");
        fs::read_to_string(tree.folder.path().join(path))
            .unwrap()
            .starts_with('1')
    };
    assert_eq!([0, 1, 2, 4].map(deleted), [true, true, false, false]);
}

#[test]
fn the_option_string_is_as_the_kernel_takes_it() {
    let host = HostIdentity::of(OURS, Uuid::nil());
    let mut target = Target {
        protocol: Protocol::NvmeTcp,
        name: NQN.to_owned(),
        unit: Uuid::nil(),
        address: "[fd00::1]:4420".parse().unwrap(),
        proves: false,
        chap: None,
    };
    let text = options(&target, &host, 64).unwrap();
    assert_eq!(
        text,
        "transport=tcp,traddr=fd00::1,trsvcid=4420,nqn=nqn.2026-11.io.drover:vol-1:7:ab12,\
         hostnqn=nqn.2014-08.org.nvmexpress:uuid:a,hostid=00000000-0000-0000-0000-000000000000,\
         nr_io_queues=4,keep_alive_tmo=5,reconnect_delay=1,ctrl_loss_tmo=-1"
    );
    assert!(
        options(&target, &host, 1)
            .unwrap()
            .contains("nr_io_queues=1,")
    );
    target.name += ",ctrl_loss_tmo=0";
    assert!(options(&target, &host, 1).is_err());
    target.name = NQN.to_owned();
    let sly = HostIdentity::of(format!("{OURS},hostid=x"), Uuid::nil());
    assert!(options(&target, &sly, 1).is_err());
}

#[test]
fn secrets_are_as_the_kernel_and_the_target_take_them() {
    let chap = Chap::fresh(OURS, NQN);
    let target = Target {
        protocol: Protocol::NvmeTcp,
        name: NQN.to_owned(),
        unit: Uuid::nil(),
        address: "127.0.0.1:4420".parse().unwrap(),
        proves: true,
        chap: Some(chap.clone()),
    };
    let host = HostIdentity::of(OURS, Uuid::nil());
    let text = options(&target, &host, 1).unwrap();
    let value = |key: &str| {
        let mut options = text.split(',');
        options.find_map(|option| option.strip_prefix(key)).unwrap()
    };
    for (key, of) in [
        ("dhchap_secret=", &chap.initiator),
        ("dhchap_ctrl_secret=", &chap.target),
    ] {
        let told: Secret = value(key).parse().unwrap();
        assert_eq!(Some(told), Secret::of_key(of.secret.as_bytes()));
    }
}

#[tokio::test]
async fn without_the_secrets_it_must_know_it_does_not_connect() {
    let tree = Tree::new();
    tree.put("dev/nvme-fabrics", "");
    let target = Target {
        protocol: Protocol::NvmeTcp,
        name: NQN.to_owned(),
        unit: Uuid::nil(),
        address: "127.0.0.1:4420".parse().unwrap(),
        proves: true,
        chap: None,
    };
    let error = tree.nvme().connect(&target).await.unwrap_err();
    assert!(error.to_string().contains("secrets"), "{error}");
    let wrote = fs::read_to_string(tree.folder.path().join("dev/nvme-fabrics")).unwrap();
    assert_eq!(wrote.trim(), "");
}

#[tokio::test]
async fn a_kernel_proves_itself_when_it_has_the_option_and_the_code() {
    let tree = Tree::new();
    let known = "transport=%s,discovery,dhchap_secret=%s,dhchap_ctrl_secret=%s";
    tree.put("dev/nvme-fabrics", known);
    assert!(!tree.nvme().proves().await, "Debian's 6.1 lists it");
    let symbols = "0000000000000000 t nvmet_auth_negotiate\t[nvmet]\n";
    tree.put("proc/kallsyms", symbols);
    assert!(!tree.nvme().proves().await, "only the target has the code");
    let symbols = format!("{symbols}0000000000000000 T nvme_auth_negotiate\t[nvme_core]\n");
    tree.put("proc/kallsyms", &symbols);
    assert!(tree.nvme().proves().await);
    tree.put("dev/nvme-fabrics", "transport=%s,discovery");
    assert!(!tree.nvme().proves().await);
}

#[test]
fn the_kernels_answer_to_a_connect_is_parsed() {
    assert_eq!(parse_connected("instance=12,cntlid=3\n"), Some((12, 3)));
    for text in [
        "",
        "instance=1",
        "instance=x,cntlid=1",
        "cntlid=1,instance=2",
    ] {
        assert_eq!(parse_connected(text), None, "{text:?}");
    }
}

#[tokio::test]
async fn a_connect_writes_the_options_and_names_its_target_when_it_fails() {
    // A plain file takes the write, and gives no answer to the read after it.
    let tree = Tree::new();
    tree.put("dev/nvme-fabrics", "");
    let target = Target {
        protocol: Protocol::NvmeTcp,
        name: NQN.to_owned(),
        unit: Uuid::nil(),
        address: "127.0.0.1:4420".parse().unwrap(),
        proves: false,
        chap: None,
    };
    let error = tree.nvme().connect(&target).await.unwrap_err();
    assert!(matches!(error, NodeError::Failed(_)), "{error}");
    let wrote = fs::read_to_string(tree.folder.path().join("dev/nvme-fabrics")).unwrap();
    assert!(
        wrote.starts_with("transport=tcp,traddr=127.0.0.1,"),
        "{wrote}"
    );
}

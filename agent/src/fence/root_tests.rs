//! Real programs on real loop devices. Needs root.
//!
//! Which layers a kernel offers differs: new opens are refused on every one,
//! what `files` refuses is checked where that layer is up. `gate_node.sh` is the
//! proof for each kind of writer, on kernels that have it.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use super::exempt::Pass;
use super::shutdown::{Shut, shut_down};
use super::*;
use crate::ids::Diskseq;

fn sh(script: &str) -> String {
    let out = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(out.status.success(), "{script}: {out:?}");
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

/// A node of its own, whose pins go with it.
struct Scene {
    node: NodeId,
    folder: tempfile::TempDir,
    disks: Vec<String>,
}

impl Scene {
    fn new(name: &str) -> Self {
        Self {
            node: format!("gate-{name}.{}", std::process::id())
                .parse()
                .unwrap(),
            folder: tempfile::tempdir().unwrap(),
            disks: Vec::new(),
        }
    }

    fn gates(&self) -> Arc<Gates> {
        let gates = Gates::start(&self.node);
        let report = gates.layers();
        eprintln!("{report:?}");
        let opens = report.iter().find(|r| r.layer == GateLayer::Opens);
        assert_eq!(opens.unwrap().failure, None, "{:?}", gates.hooks());
        gates
    }

    fn disk(&mut self, mib: u64) -> Disk {
        let backing = self.folder.path().join(self.disks.len().to_string());
        File::create(&backing).unwrap().set_len(mib << 20).unwrap();
        let node = sh(&format!("losetup -f --show {}", backing.display()));
        let name = node.strip_prefix("/dev/").unwrap().to_owned();
        let diskseq = fs::read_to_string(format!("/sys/block/{name}/diskseq")).unwrap();
        self.disks.push(name.clone());
        Disk {
            name,
            diskseq: Diskseq(diskseq.trim().parse().unwrap()),
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // bpffs: what is unlinked is let go of by the kernel.
        if let Ok(pins) = pins::folder(&self.node) {
            let _ = fs::remove_dir_all(pins);
        }
        for disk in &self.disks {
            let _ = Command::new("losetup")
                .args(["-d", &format!("/dev/{disk}")])
                .status();
        }
    }
}

fn open(disk: &Disk, write: bool) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(write).open(disk.path())
}

fn refused(result: std::io::Result<impl Sized>) {
    let error = result.err().expect("a closed gate lets nobody through");
    assert!(
        matches!(error.raw_os_error(), Some(libc::EPERM | libc::EIO)),
        "{error}"
    );
}

fn volume() -> VolumeId {
    "vol-1".parse().unwrap()
}

#[test]
fn root_a_gate_stays_closed_over_its_agents_and_is_forgotten_with_its_disk() {
    let mut scene = Scene::new("stays");
    let (disk, other) = (scene.disk(8), scene.disk(8));
    let gates = scene.gates();
    assert!(gates.closed().is_empty() && !gates.is_closed(&disk).unwrap());
    let before = open(&disk, true).unwrap();
    let layers = gates.close(&disk, &volume(), Epoch(7)).unwrap();
    assert!(layers.contains(&GateLayer::Opens), "{layers:?}");

    refused(open(&disk, false));
    refused(open(&disk, true));
    drop(open(&other, true).unwrap());
    if layers.contains(&GateLayer::Files) {
        refused(before.write_at(&[1; 512], 0));
        refused(before.read_at(&mut [0; 512], 0));
    }
    let count: u64 = gates.refused().unwrap().iter().map(|(_, n)| n).sum();
    assert!(count >= 2, "{:?}", gates.refused());

    // The agent has gone; its successor finds the gate, and puts programs of
    // its own in the place of the others.
    drop(gates);
    refused(open(&disk, false));
    let gates = scene.gates();
    refused(open(&disk, false));
    let closed = gates.closed();
    assert_eq!(closed.len(), 1, "{closed:?}");
    assert_eq!(
        (closed[0].volume.as_str(), closed[0].epoch),
        ("vol-1", Epoch(7))
    );
    assert_eq!(closed[0].diskseq, disk.diskseq.0);
    assert!(gates.is_closed(&disk).unwrap() && !gates.is_closed(&other).unwrap());
    let names: Vec<_> = fs::read_dir(gates.pins()).unwrap().flatten().collect();
    let left = names.iter().map(|e| e.file_name().into_string().unwrap());
    assert_eq!(left.filter(|n| n.starts_with("new-")).count(), 0);

    // A disk that is there is not forgotten; one that has gone is.
    gates.sweep();
    refused(open(&disk, false));
    const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
    let cleared = {
        let _pass = Pass::take(&gates.exemptions().unwrap()).unwrap();
        // SAFETY: the descriptor is open, and the call takes no more.
        unsafe { libc::ioctl(before.as_raw_fd(), LOOP_CLR_FD) }
    };
    assert_eq!(cleared, 0, "{}", std::io::Error::last_os_error());
    drop(before);
    let begun = std::time::Instant::now();
    while !gates.closed().is_empty() {
        assert!(begun.elapsed().as_secs() < 20, "{:?}", gates.closed());
        gates.sweep();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    drop(open(&disk, false).unwrap());
}

fn a_shutdown(name: &str, mkfs: &str) {
    let mut scene = Scene::new(name);
    let disk = scene.disk(320);
    let point = scene.folder.path().join("point");
    fs::create_dir(&point).unwrap();
    let (path, at) = (disk.path(), point.display());
    sh(&format!(
        "{mkfs} {} && mount {} {at}",
        path.display(),
        path.display()
    ));
    let file = File::create(point.join("data")).unwrap();
    file.write_at(b"kept", 0).unwrap();
    file.sync_all().unwrap();
    // Seen in no namespace any more, and alive all the same.
    sh(&format!("umount -l {at}"));

    let gates = scene.gates();
    gates.close(&disk, &volume(), Epoch(1)).unwrap();
    let wrong = Diskseq(disk.diskseq.0 + 1);
    let pass: PathBuf = gates.exemptions().unwrap();
    let error = shut_down(&path, wrong, None, Some(&pass)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENODEV), "{error}");
    let shut = shut_down(&path, disk.diskseq, None, Some(&pass)).unwrap();
    assert_eq!(shut, Shut::Down);
    refused(file.write_at(b"late", 0));
    refused(file.sync_all());
    drop(file);
    let begun = std::time::Instant::now();
    while shut_down(&path, disk.diskseq, None, Some(&pass)).unwrap() == Shut::Down {
        assert!(
            begun.elapsed().as_secs() < 20,
            "the super block does not go"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let data = fs::read(scene.folder.path().join("0")).unwrap();
    assert!(data.windows(4).any(|w| w == b"kept"));
    assert!(!data.windows(4).any(|w| w == b"late"));
}

/// As one does whose journal or log cannot be written any more.
fn one_that_is_down_already(name: &str, mkfs: &str) {
    let mut scene = Scene::new(name);
    let disk = scene.disk(320);
    let point = scene.folder.path().join("point");
    fs::create_dir(&point).unwrap();
    let (path, at) = (disk.path(), point.display());
    sh(&format!(
        "{mkfs} {} && mount {} {at}",
        path.display(),
        path.display()
    ));
    let file = File::create(point.join("data")).unwrap();
    for _ in 0..2 {
        let shut = shut_down(&path, disk.diskseq, Some(&point), None).unwrap();
        assert_eq!(shut, Shut::Down);
    }
    sh(&format!("umount -l {at}"));
    let shut = shut_down(&path, disk.diskseq, None, None).unwrap();
    assert_eq!(shut, Shut::Down);
    drop(file);
}

#[test]
fn root_an_ext4_that_is_down_already_is_found_so() {
    one_that_is_down_already("down-ext4", "mkfs.ext4 -q");
}

#[test]
fn root_an_xfs_that_is_down_already_is_found_so() {
    one_that_is_down_already("down-xfs", "mkfs.xfs -q");
}

#[test]
fn root_an_ext4_that_no_namespace_shows_is_shut_down() {
    a_shutdown("ext4", "mkfs.ext4 -q");
}

#[test]
fn root_an_xfs_that_no_namespace_shows_is_shut_down() {
    a_shutdown("xfs", "mkfs.xfs -q");
}

#[test]
fn root_a_pass_is_to_be_had_among_those_of_killed_children() {
    use aya::maps::{HashMap, Map, MapData};
    use drover_ebpf::gate::Exempt;

    let mut scene = Scene::new("full");
    let disk = scene.disk(8);
    let gates = scene.gates();
    let pin = gates.exemptions().unwrap();
    let map = Map::HashMap(MapData::from_pin(&pin).unwrap());
    let mut map: HashMap<MapData, u32, maps::Raw<Exempt>> = map.try_into().unwrap();
    for n in 0..64 {
        let dead = maps::Raw(Exempt { began: 1 });
        map.insert(u32::MAX - n, dead, 0).unwrap();
    }
    drop(Pass::take(&pin).unwrap());
    // And without one it is tried all the same.
    let nowhere = scene.folder.path().join("no-pin");
    let shut = shut_down(&disk.path(), disk.diskseq, None, Some(&nowhere)).unwrap();
    assert_eq!(shut, Shut::NoneMounted);
}

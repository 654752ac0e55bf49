//! A node over loop devices: real mkfs, fsck, mount, bind, growth and children;
//! only the fabric, the controller and the witness are stand-ins. Needs root.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use super::child::tests::children;
use super::*;
use crate::attach::ports::{
    Access, Disk, Exported, FsType, GateLayer, Holder, Judgement, Protocol, PublishRequest,
    StageRequest, Staging, Target, Verdict,
};
use crate::ids::{Bytes, Diskseq};

pub(super) fn sh(script: &str) -> String {
    let out = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(out.status.success(), "{script}: {out:?}");
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

/// A loop device keeps its mode for the next who gets it; an NVMe disk does not.
fn let_go(disk: &str) {
    for tool in ["blockdev --setrw", "losetup -d"] {
        let script = format!("{tool} /dev/{disk}");
        let status = Command::new("sh").args(["-c", &script]).status();
        assert!(
            status.is_ok_and(|s| s.success()) || std::thread::panicking(),
            "{script}"
        );
    }
}

/// What stands in for target and kernel: each export is a loop device.
pub(super) struct Loops {
    backing: PathBuf,
    /// The kernel does not let go of what is disconnected.
    pub(super) stuck: AtomicBool,
    live: Mutex<BTreeMap<String, (String, Uuid)>>,
}

#[async_trait]
impl Fabric for Loops {
    fn attached(&self) -> Result<Vec<Attached>, NodeError> {
        let live = self.live.lock().unwrap();
        let read = |disk: &str, what: &str| {
            let text = fs::read_to_string(format!("/sys/block/{disk}/{what}")).unwrap();
            text.trim().to_owned()
        };
        Ok(live
            .iter()
            .map(|(nqn, (disk, namespace))| Attached {
                name: nqn.parse().unwrap(),
                links: vec![("nvme0".to_owned(), "live".to_owned())],
                device: Some(Device {
                    disk: Disk {
                        name: disk.clone(),
                        diskseq: Diskseq(read(disk, "diskseq").parse().unwrap()),
                    },
                    number: read(disk, "dev").parse().unwrap(),
                    size: Bytes(read(disk, "size").parse::<u64>().unwrap() * 512),
                    unit: Some(*namespace),
                    read_only: read(disk, "ro") == "1",
                }),
            })
            .collect())
    }
    async fn connect(&self, target: &Target) -> Result<Duration, NodeError> {
        let backing = self.backing.display();
        let node = sh(&format!("losetup --direct-io=off -f --show {backing}"));
        let disk = node.strip_prefix("/dev/").unwrap().to_owned();
        let mut live = self.live.lock().unwrap();
        live.insert(target.name.clone(), (disk, target.unit));
        Ok(Duration::ZERO)
    }
    async fn disconnect(&self, name: &ExportName) -> Result<Duration, NodeError> {
        if self.stuck.load(Relaxed) {
            return Ok(Duration::ZERO);
        }
        if let Some((disk, _)) = self.live.lock().unwrap().remove(name.as_str()) {
            let_go(&disk);
        }
        Ok(Duration::ZERO)
    }
    async fn rescan(&self, name: &ExportName) -> Result<(), NodeError> {
        if let Some((disk, _)) = self.live.lock().unwrap().get(name.as_str()) {
            sh(&format!("losetup -c /dev/{disk}"));
        }
        Ok(())
    }
    fn is_there(&self, number: DevNumber) -> bool {
        let live = self.live.lock().unwrap();
        live.values().any(|(disk, _)| {
            let path = format!("/sys/block/{disk}/dev");
            fs::read_to_string(path).is_ok_and(|text| text.parse() == Ok(number))
        }) || !number.to_string().starts_with("7:")
    }
}

impl Loops {
    /// Every export comes as another disk, as one does that is staged anew.
    pub(super) fn reconnect(&self) {
        let old = self.live.lock().unwrap().clone();
        for (name, (disk, unit)) in old {
            // The old disk's name is not free before the new one has its own.
            let backing = self.backing.display();
            let node = sh(&format!("losetup --direct-io=off -f --show {backing}"));
            let new = node.strip_prefix("/dev/").unwrap().to_owned();
            self.live.lock().unwrap().insert(name, (new, unit));
            let_go(&disk);
        }
    }
}

pub(super) struct Controller {
    answer: Mutex<Result<Attachment, ControlError>>,
    pub(super) notes: Mutex<Vec<Note>>,
}

#[async_trait]
impl Control for Controller {
    async fn attachment(&self, _: &VolumeId, _: &NodeId) -> Result<Attachment, ControlError> {
        self.answer.lock().unwrap().clone()
    }
    async fn note(&self, note: Note) {
        self.notes.lock().unwrap().push(note);
    }
}

pub(super) struct Eye(
    pub(super) Mutex<Verdict>,
    /// What it was last told to be drover's own.
    pub(super) Mutex<Vec<PathBuf>>,
);

#[async_trait]
impl Witness for Eye {
    async fn judge(&self, _: &Disk, own: &[PathBuf]) -> Judgement {
        *self.1.lock().unwrap() = own.to_vec();
        let verdict = *self.0.lock().unwrap();
        let stranger = Holder {
            pid: 4711,
            name: "(udev-worker)".to_owned(),
            cgroup: String::new(),
            pod: None,
            writable: false,
            registered: false,
            last_read_ms: Some(1),
            last_write_ms: None,
            read_bytes: 4096,
            written_bytes: 0,
        };
        let unknown = verdict == Verdict::Unknown;
        Judgement {
            verdict,
            reason: "as the test says".to_owned(),
            holders: unknown.then_some(stranger).into_iter().collect(),
        }
    }
}

/// Gates that only remember what was closed.
#[derive(Default)]
pub(super) struct Shut(
    pub(super) Mutex<Vec<(Disk, Epoch)>>,
    /// How often disks that have gone were forgotten.
    pub(super) AtomicUsize,
);

impl NodeGate for Shut {
    fn close(&self, disk: &Disk, _: &VolumeId, epoch: Epoch) -> Result<Vec<GateLayer>, NodeError> {
        let mut closed = self.0.lock().unwrap();
        if !closed.iter().any(|(known, _)| known == disk) {
            closed.push((disk.clone(), epoch));
        }
        Ok(vec![GateLayer::Files, GateLayer::Opens])
    }
    fn is_closed(&self, disk: &Disk) -> Result<bool, NodeError> {
        let closed = self.0.lock().unwrap();
        Ok(closed.iter().any(|(known, _)| known == disk))
    }
    fn sweep(&self) {
        self.1.fetch_add(1, Relaxed);
    }
    fn exemptions(&self) -> Option<PathBuf> {
        None
    }
}

pub(super) struct Bench {
    folder: tempfile::TempDir,
    pub(super) fabric: Arc<Loops>,
    pub(super) control: Arc<Controller>,
    pub(super) eye: Arc<Eye>,
    pub(super) shut: Arc<Shut>,
    pub(super) node: Arc<Initiator>,
    pub(super) volume: VolumeId,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let root = self.folder.path().canonicalize().unwrap();
        let mounts = fs::read("/proc/self/mountinfo").unwrap();
        for mount in mountinfo::parse(&mounts).unwrap().iter().rev() {
            if mount.point.starts_with(&root) {
                let _ = Command::new("umount").arg("-l").arg(&mount.point).status();
            }
        }
        for (disk, _) in self.fabric.live.lock().unwrap().values() {
            let_go(disk);
        }
    }
}

impl Bench {
    pub(super) fn new(mib: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let backing = folder.path().join("backing");
        fs::File::create(&backing)
            .unwrap()
            .set_len(mib << 20)
            .unwrap();
        let fabric = Arc::new(Loops {
            backing,
            stuck: AtomicBool::new(false),
            live: Mutex::default(),
        });
        let volume: VolumeId = "vol-1".parse().unwrap();
        let control = Arc::new(Controller {
            answer: Mutex::new(Err(ControlError::NoVolume(volume.clone()))),
            notes: Mutex::default(),
        });
        let eye = Arc::new(Eye(Mutex::new(Verdict::Quiet), Mutex::default()));
        let shut = Arc::new(Shut::default());
        let node = node(|_| {}, &fabric, &control, &eye, &shut);
        let bench = Self {
            folder,
            fabric,
            control,
            eye,
            shut,
            node,
            volume,
        };
        bench.grant(1, false);
        bench
    }

    /// Goes on with another agent, whose settings differ.
    pub(super) fn restart(&mut self, change: impl FnOnce(&mut Settings)) {
        self.node = node(change, &self.fabric, &self.control, &self.eye, &self.shut);
    }

    /// The controller answers with this epoch from now on.
    pub(super) fn grant(&self, epoch: u64, ever_written: bool) {
        self.answer(Ok(Attachment {
            volume: self.volume.clone(),
            size: Bytes(0),
            exported: Exported {
                epoch: Epoch(epoch),
                target: Target {
                    protocol: Protocol::NvmeTcp,
                    name: format!("{NQN_PREFIX}{}:{epoch}:r{epoch}", self.volume),
                    unit: Uuid::from_u128(u128::from(epoch)),
                    address: "127.0.0.1:4420".parse().unwrap(),
                    proves: false,
                    chap: None,
                },
                ever_written,
            },
            read_only: false,
            busy_deadline: Duration::from_secs(120),
        }));
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Attachment)) {
        change(self.control.answer.lock().unwrap().as_mut().unwrap());
    }

    pub(super) fn answer(&self, answer: Result<Attachment, ControlError>) {
        *self.control.answer.lock().unwrap() = answer;
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) async fn stage(&self, access: Access) -> Result<(), NodeError> {
        let request = StageRequest {
            volume: self.volume.clone(),
            staging: self.path("staging"),
            access,
        };
        self.node.stage(&request).await
    }

    pub(super) async fn publish(
        &self,
        access: Access,
        name: &str,
        read_only: bool,
    ) -> Result<(), NodeError> {
        let request = PublishRequest {
            volume: self.volume.clone(),
            staging: self.path("staging"),
            target: self.path(name),
            access,
            read_only,
        };
        self.node.publish(&request).await
    }

    pub(super) async fn unstage(&self) -> Result<(), NodeError> {
        self.node.unstage(&self.volume, &self.path("staging")).await
    }

    pub(super) fn backing(&self) -> fs::File {
        let mut options = fs::OpenOptions::new();
        options
            .read(true)
            .write(true)
            .open(self.path("backing"))
            .unwrap()
    }

    pub(super) fn is_mounted(&self, name: &str) -> bool {
        let path = resolve(&self.path(name)).unwrap().unwrap();
        mountinfo::at(&mountinfo::mounts().unwrap(), &path).is_some()
    }

    pub(super) fn live(&self) -> Vec<String> {
        self.fabric.live.lock().unwrap().keys().cloned().collect()
    }
}

fn node(
    change: impl FnOnce(&mut Settings),
    fabric: &Arc<Loops>,
    control: &Arc<Controller>,
    eye: &Arc<Eye>,
    shut: &Arc<Shut>,
) -> Arc<Initiator> {
    let mut settings = Settings::of("node-a".parse().unwrap());
    settings.device.appear = Duration::from_secs(2);
    change(&mut settings);
    let (fabric, control) = (Arc::clone(fabric), Arc::clone(control));
    let (eye, shut) = (Arc::clone(eye), Arc::clone(shut));
    Initiator::new(settings, fabric, children(), control, eye, shut)
}

pub(super) fn mount(fs: FsType) -> Access {
    Access::Mount {
        fs,
        flags: vec!["noatime".to_owned()],
    }
}

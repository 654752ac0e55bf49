//! Proves the initiator on a kernel with nvme-tcp: real connects to the
//! kernel's own target (nvmet, through configfs), both file systems and raw
//! block, a fence by the target, and a restart of the agent in between.
//!
//! Run it in a VM: `agent/tests/vm/initiator.sh`. Needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use drover::attach::ports::{
    Access, Attachment, Control, ControlError, Disk, Exported, FsType, HostIdentity, Judgement,
    Node, NodeAnswer, NodeError, Note, Protocol, PublishRequest, StageRequest, Staging, Target,
    Verdict, Witness,
};
use drover::ids::{Bytes, Epoch, NodeId, VolumeId};
use drover::initiator::{Initiator, NQN_PREFIX, Settings, child_main};
use uuid::Uuid;

const NVMET: &str = "/sys/kernel/config/nvmet";

/// What the controller answers, and what it was told.
struct Controller {
    answer: Mutex<Option<Attachment>>,
}

#[async_trait]
impl Control for Controller {
    async fn attachment(
        &self,
        volume: &VolumeId,
        node: &NodeId,
    ) -> Result<Attachment, ControlError> {
        let answer = self
            .answer
            .lock()
            .map_err(|e| ControlError::Failed(e.to_string()))?;
        answer.clone().ok_or_else(|| ControlError::NotPublished {
            volume: volume.clone(),
            node: node.clone(),
        })
    }
    async fn note(&self, note: Note) {
        println!("  {}: {} {}", note.kind, note.text, note.detail);
    }
}

/// Sees nobody; who is there all the same, the kernel must say.
struct Nobody;

#[async_trait]
impl Witness for Nobody {
    async fn judge(&self, _: &Disk, _: &[PathBuf]) -> Judgement {
        Judgement {
            verdict: Verdict::Quiet,
            reason: "nobody looked".to_owned(),
            holders: Vec::new(),
        }
    }
}

fn put(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    fs::write(path, text).with_context(|| format!("write {text:?} to {}", path.display()))
}

/// One export of the kernel's target.
struct Export {
    nqn: String,
    namespace: Uuid,
}

impl Export {
    fn open(volume: &VolumeId, epoch: u64, backing: &Path) -> Result<Self> {
        let nqn = format!("{NQN_PREFIX}{volume}:{epoch}:r{epoch}");
        let namespace = Uuid::new_v4();
        let subsystem = Path::new(NVMET).join("subsystems").join(&nqn);
        let space = subsystem.join("namespaces/1");
        fs::create_dir(&subsystem)?;
        put(subsystem.join("attr_allow_any_host"), "1")?;
        fs::create_dir(&space)?;
        put(space.join("buffered_io"), "1")?;
        put(space.join("device_path"), &backing.to_string_lossy())?;
        put(space.join("device_uuid"), &namespace.to_string())?;
        put(space.join("enable"), "1")?;
        std::os::unix::fs::symlink(&subsystem, Self::link(&nqn))?;
        Ok(Self { nqn, namespace })
    }

    fn link(nqn: &str) -> PathBuf {
        Path::new(NVMET).join("ports/1/subsystems").join(nqn)
    }

    fn resized(&self) -> Result<()> {
        let space = Path::new(NVMET)
            .join("subsystems")
            .join(&self.nqn)
            .join("namespaces/1");
        put(space.join("revalidate_size"), "1")
    }

    /// No command enters any more, and no host can connect.
    fn fence(&self) -> Result<()> {
        let subsystem = Path::new(NVMET).join("subsystems").join(&self.nqn);
        fs::remove_file(Self::link(&self.nqn))?;
        put(subsystem.join("namespaces/1/enable"), "0")
    }
}

fn port() -> Result<()> {
    let port = Path::new(NVMET).join("ports/1");
    fs::create_dir(&port)?;
    for (name, value) in [
        ("addr_trtype", "tcp"),
        ("addr_adrfam", "ipv4"),
        ("addr_traddr", "127.0.0.1"),
        ("addr_trsvcid", "4420"),
    ] {
        put(port.join(name), value)?;
    }
    Ok(())
}

fn initiator(control: &Arc<Controller>) -> Result<Arc<Initiator>> {
    let mut settings = Settings::of("node-a".parse()?);
    // The VM is emulated.
    settings.device.appear = Duration::from_secs(60);
    let host = HostIdentity::of(
        "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-00000000000a",
        Uuid::from_u128(0xa),
    );
    Ok(Initiator::of_this_kernel(
        settings,
        host,
        control.clone(),
        Arc::new(Nobody),
    ))
}

struct Scene {
    folder: PathBuf,
    control: Arc<Controller>,
    volume: VolumeId,
}

impl Scene {
    fn grant(&self, epoch: u64, export: &Export, ever_written: bool) -> Result<()> {
        let attachment = Attachment {
            volume: self.volume.clone(),
            size: Bytes(0),
            exported: Exported {
                epoch: Epoch(epoch),
                target: Target {
                    protocol: Protocol::NvmeTcp,
                    name: export.nqn.clone(),
                    unit: export.namespace,
                    address: "127.0.0.1:4420".parse()?,
                    chap: None,
                },
                ever_written,
            },
            read_only: false,
            busy_deadline: Duration::from_secs(120),
        };
        match self.control.answer.lock() {
            Ok(mut answer) => *answer = Some(attachment),
            Err(error) => bail!("{error}"),
        }
        Ok(())
    }

    fn stage(&self, access: &Access) -> StageRequest {
        StageRequest {
            volume: self.volume.clone(),
            staging: self.folder.join("staging"),
            access: access.clone(),
        }
    }

    fn publish(&self, access: &Access) -> PublishRequest {
        PublishRequest {
            volume: self.volume.clone(),
            staging: self.folder.join("staging"),
            target: self.folder.join("pod/target"),
            access: access.clone(),
            read_only: false,
        }
    }
}

async fn life(name: &str, access: Access, mib: u64) -> Result<()> {
    println!("{name}");
    let folder = Path::new("/run/initiator").join(name);
    fs::create_dir_all(&folder)?;
    let backing = folder.join("backing");
    let file = fs::File::create(&backing)?;
    file.set_len(mib << 20)?;
    let volume: VolumeId = format!("vol-{name}").parse()?;
    let control = Arc::new(Controller {
        answer: Mutex::default(),
    });
    let scene = Scene {
        folder: folder.clone(),
        control: control.clone(),
        volume: volume.clone(),
    };
    let (staging, target) = (folder.join("staging"), folder.join("pod/target"));
    let data = match access {
        Access::Block => target.clone(),
        Access::Mount { .. } => target.join("data"),
    };

    let first = Export::open(&volume, 1, &backing)?;
    scene.grant(1, &first, false)?;
    let node = initiator(&control)?;
    node.stage(&scene.stage(&access)).await?;
    node.stage(&scene.stage(&access)).await?;
    node.publish(&scene.publish(&access)).await?;
    ensure!(
        node.attached()? == [(volume.clone(), Epoch(1))],
        "attached: {:?}",
        node.attached()
    );
    {
        use std::io::Write;
        let mut out = fs::OpenOptions::new()
            .write(true)
            .create(matches!(access, Access::Mount { .. }))
            .truncate(false)
            .open(&data)?;
        out.write_all(b"acknowledged at epoch 1")?;
        out.sync_all()?;
    }

    // The agent restarts: everything is found again, nothing is disturbed.
    drop(node);
    let node = initiator(&control)?;
    ensure!(node.adopt()?.len() == 1);
    node.stage(&scene.stage(&access)).await?;
    node.publish(&scene.publish(&access)).await?;

    let before = node.stats(&volume, &target).await?.bytes[0];
    file.set_len((mib + 128) << 20)?;
    first.resized()?;
    let wanted = Bytes((mib + 128) << 20);
    let size = node.expand(&volume, &target, wanted).await?;
    let after = node.stats(&volume, &target).await?.bytes[0];
    ensure!(
        size == wanted && after > before + (96 << 20),
        "{before} -> {after}, {size}"
    );

    node.unpublish(&volume, &target).await?;
    node.unstage(&volume, &staging).await?;
    node.unstage(&volume, &staging).await?;
    ensure!(node.attached()?.is_empty() && !target.exists());
    first.fence()?;

    // The next epoch has the data; then its home fences it while it is in use.
    let second = Export::open(&volume, 2, &backing)?;
    scene.grant(2, &second, true)?;
    node.stage(&scene.stage(&access)).await?;
    node.publish(&scene.publish(&access)).await?;
    let read = fs::read(&data).map(|b| b.starts_with(b"acknowledged at epoch 1"));
    ensure!(read?, "the data of epoch 1 is not there");
    second.fence()?;
    let answer = node.release(&volume, Epoch(2)).await;
    println!("  released: {answer:?}");
    ensure!(!matches!(answer, NodeAnswer::Silent(_)) && node.attached()?.is_empty());

    // Stale mounts of the dead epoch are in the way of nothing.
    let third = Export::open(&volume, 3, &backing)?;
    scene.grant(3, &third, true)?;
    node.unpublish(&volume, &target).await?;
    node.stage(&scene.stage(&access)).await?;
    node.publish(&scene.publish(&access)).await?;
    let read = fs::read(&data).map(|b| b.starts_with(b"acknowledged at epoch 1"));
    ensure!(read?, "the data is not there after the fence");
    node.unpublish(&volume, &target).await?;
    node.unstage(&volume, &staging).await?;
    ensure!(node.attached()?.is_empty());
    third.fence()?;

    // A closed identity is refused, and says so with its name.
    let error = node.stage(&scene.stage(&access)).await;
    match error {
        Err(NodeError::Failed(text)) if text.contains(&third.nqn) => println!("  refused: {text}"),
        other => bail!("a fenced export was staged: {other:?}"),
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    Ok(())
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some("child") {
        return child_main(args);
    }
    let run = || -> Result<()> {
        port()?;
        tokio::runtime::Runtime::new()?.block_on(async {
            let fs = |fs| Access::Mount {
                fs,
                flags: Vec::new(),
            };
            life("ext4", fs(FsType::Ext4), 160).await.context("ext4")?;
            life("xfs", fs(FsType::Xfs), 320).await.context("xfs")?;
            life("block", Access::Block, 16).await.context("block")
        })
    };
    match run() {
        Ok(()) => {
            println!("initiator: all passed");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("initiator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

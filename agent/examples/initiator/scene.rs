//! What stands in for controller and witness, and the life of a volume on a node.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use async_trait::async_trait;
use drover::attach::ports::{
    Access, Attachment, Control, ControlError, Disk, Exported, HostIdentity, Judgement, Node,
    NodeAnswer, NodeError, NodeGate, Note, PublishRequest, StageRequest, Staging, Target, Verdict,
    Witness,
};
use drover::fence::Gates;
use drover::ids::{Bytes, Epoch, NodeId, VolumeId};
use drover::initiator::{Initiator, Settings};
use uuid::Uuid;

/// The initiator name that follows from the host's identity.
pub const HOST_IQN: &str = "iqn.2026-11.io.drover.node:00000000-0000-0000-0000-00000000000a";

/// One export of a target.
pub trait Export {
    /// How to reach it.
    fn target(&self) -> Target;
    /// Its backing file has this size now.
    fn resized(&mut self, size: Bytes) -> Result<()>;
    /// No command enters any more, and no host can connect.
    fn fence(&mut self) -> Result<()>;
}

/// Opens an export of a volume at an epoch over a file.
pub type Open = fn(&VolumeId, u64, &Path) -> Result<Box<dyn Export>>;

/// What the controller answers, and what it was told.
pub struct Controller {
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

/// An agent's initiator on this kernel.
pub fn initiator(control: &Arc<Controller>) -> Result<Arc<Initiator>> {
    initiator_with(control, Gates::start(&"node-a".parse()?))
}

/// The same with gates that are kept.
pub fn initiator_with(
    control: &Arc<Controller>,
    gates: Arc<dyn NodeGate>,
) -> Result<Arc<Initiator>> {
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
        gates,
    ))
}

pub struct Scene {
    pub folder: PathBuf,
    pub control: Arc<Controller>,
    pub volume: VolumeId,
}

impl Scene {
    /// One of a volume of this name and size.
    pub fn new(name: &str, mib: u64) -> Result<(Self, PathBuf, fs::File)> {
        let folder = Path::new("/run/initiator").join(name);
        fs::create_dir_all(&folder)?;
        let backing = folder.join("backing");
        let file = fs::File::create(&backing)?;
        file.set_len(mib << 20)?;
        let scene = Self {
            folder,
            control: Arc::new(Controller {
                answer: Mutex::default(),
            }),
            volume: format!("vol-{name}").parse()?,
        };
        Ok((scene, backing, file))
    }

    pub fn grant(&self, epoch: u64, export: &dyn Export, ever_written: bool) -> Result<()> {
        let attachment = Attachment {
            volume: self.volume.clone(),
            size: Bytes(0),
            exported: Exported {
                epoch: Epoch(epoch),
                target: export.target(),
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

    pub fn stage(&self, access: &Access) -> StageRequest {
        StageRequest {
            volume: self.volume.clone(),
            staging: self.folder.join("staging"),
            access: access.clone(),
        }
    }

    pub fn publish(&self, access: &Access) -> PublishRequest {
        PublishRequest {
            volume: self.volume.clone(),
            staging: self.folder.join("staging"),
            target: self.folder.join("pod/target"),
            access: access.clone(),
            read_only: false,
        }
    }
}

/// A volume's whole life on a node, with a restart of its agent and a fence.
pub async fn life(name: &str, access: Access, mib: u64, open: Open) -> Result<()> {
    println!("{name}");
    let (scene, backing, file) = Scene::new(name, mib)?;
    let (folder, volume, control) = (&scene.folder, &scene.volume, &scene.control);
    let (staging, target) = (folder.join("staging"), folder.join("pod/target"));
    let data = match access {
        Access::Block => target.clone(),
        Access::Mount { .. } => target.join("data"),
    };

    let mut first = open(volume, 1, &backing)?;
    scene.grant(1, &*first, false)?;
    let node = initiator(control)?;
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
    let node = initiator(control)?;
    ensure!(node.adopt()?.len() == 1);
    node.stage(&scene.stage(&access)).await?;
    node.publish(&scene.publish(&access)).await?;

    let before = node.stats(volume, &target).await?.bytes[0];
    file.set_len((mib + 128) << 20)?;
    let wanted = Bytes((mib + 128) << 20);
    first.resized(wanted)?;
    let size = node.expand(volume, &target, wanted).await?;
    let after = node.stats(volume, &target).await?.bytes[0];
    ensure!(
        size == wanted && after > before + (96 << 20),
        "{before} -> {after}, {size}"
    );

    node.unpublish(volume, &target).await?;
    node.unstage(volume, &staging).await?;
    node.unstage(volume, &staging).await?;
    ensure!(node.attached()?.is_empty() && !target.exists());
    first.fence()?;

    // The next epoch has the data; then its home fences it while it is in use.
    let mut second = open(volume, 2, &backing)?;
    scene.grant(2, &*second, true)?;
    node.stage(&scene.stage(&access)).await?;
    node.publish(&scene.publish(&access)).await?;
    let read = fs::read(&data).map(|b| b.starts_with(b"acknowledged at epoch 1"));
    ensure!(read?, "the data of epoch 1 is not there");
    second.fence()?;
    let answer = node.release(volume, Epoch(2)).await;
    println!("  released: {answer:?}");
    ensure!(!matches!(answer, NodeAnswer::Silent(_)) && node.attached()?.is_empty());

    // Stale mounts of the dead epoch are in the way of nothing.
    let mut third = open(volume, 3, &backing)?;
    scene.grant(3, &*third, true)?;
    node.unpublish(volume, &target).await?;
    node.stage(&scene.stage(&access)).await?;
    node.publish(&scene.publish(&access)).await?;
    let read = fs::read(&data).map(|b| b.starts_with(b"acknowledged at epoch 1"));
    ensure!(read?, "the data is not there after the fence");
    node.unpublish(volume, &target).await?;
    node.unstage(volume, &staging).await?;
    ensure!(node.attached()?.is_empty());
    third.fence()?;

    // A closed identity is refused, and says so with its name.
    let error = node.stage(&scene.stage(&access)).await;
    match error {
        Err(NodeError::Failed(text)) if text.contains(&third.target().name) => {
            println!("  refused: {text}")
        }
        other => bail!("a fenced export was staged: {other:?}"),
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    Ok(())
}

//! The kernel's own NVMe/TCP target, through configfs.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use drover::attach::ports::{Protocol, Target};
use drover::ids::{Bytes, VolumeId};
use drover::initiator::NQN_PREFIX;
use uuid::Uuid;

use crate::scene::{Export, Open};

const NVMET: &str = "/sys/kernel/config/nvmet";

fn put(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    fs::write(path, text).with_context(|| format!("write {text:?} to {}", path.display()))
}

/// One export of the kernel's target.
struct Nvmet {
    nqn: String,
    namespace: Uuid,
}

impl Nvmet {
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
}

impl Export for Nvmet {
    fn target(&self) -> Target {
        Target {
            protocol: Protocol::NvmeTcp,
            name: self.nqn.clone(),
            unit: self.namespace,
            address: SocketAddr::from(([127, 0, 0, 1], 4420)),
            proves: false,
            chap: None,
        }
    }

    fn resized(&mut self, _: Bytes) -> Result<()> {
        let space = Path::new(NVMET)
            .join("subsystems")
            .join(&self.nqn)
            .join("namespaces/1");
        put(space.join("revalidate_size"), "1")
    }

    fn fence(&mut self) -> Result<()> {
        let subsystem = Path::new(NVMET).join("subsystems").join(&self.nqn);
        fs::remove_file(Self::link(&self.nqn))?;
        put(subsystem.join("namespaces/1/enable"), "0")
    }
}

/// Makes the port, and tells how to open exports on it.
pub fn exports() -> Result<Open> {
    port()?;
    Ok(|volume, epoch, backing| Ok(Box::new(Nvmet::open(volume, epoch, backing)?)))
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

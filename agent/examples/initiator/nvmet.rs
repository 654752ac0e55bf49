//! The kernel's own NVMe/TCP target, through configfs.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::{fs, io};

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

/// Removes an entry of configfs; one that is gone already is as good.
fn removed(path: &Path) {
    let removed = match path.is_symlink() {
        true => fs::remove_file(path),
        false => fs::remove_dir(path),
    };
    if let Err(error) = removed
        && error.kind() != io::ErrorKind::NotFound
    {
        eprintln!("  left behind: {}: {error}", path.display());
    }
}

/// One export of the kernel's target, until it is dropped.
struct Nvmet {
    nqn: String,
    namespace: Uuid,
}

impl Nvmet {
    fn open(volume: &VolumeId, epoch: u64, backing: &Path) -> Result<Self> {
        let nqn = format!("{NQN_PREFIX}{volume}:{epoch}:r{epoch}");
        let namespace = Uuid::new_v4();
        let export = Self { nqn, namespace };
        let (subsystem, space) = (export.subsystem(), export.space());
        fs::create_dir(&subsystem)?;
        put(subsystem.join("attr_allow_any_host"), "1")?;
        fs::create_dir(&space)?;
        put(space.join("buffered_io"), "1")?;
        put(space.join("device_path"), &backing.to_string_lossy())?;
        put(space.join("device_uuid"), &namespace.to_string())?;
        put(space.join("enable"), "1")?;
        std::os::unix::fs::symlink(&subsystem, export.link())?;
        Ok(export)
    }

    fn subsystem(&self) -> PathBuf {
        Path::new(NVMET).join("subsystems").join(&self.nqn)
    }

    fn space(&self) -> PathBuf {
        self.subsystem().join("namespaces/1")
    }

    fn link(&self) -> PathBuf {
        Path::new(NVMET).join("ports/1/subsystems").join(&self.nqn)
    }
}

impl Drop for Nvmet {
    fn drop(&mut self) {
        for entry in [self.link(), self.space(), self.subsystem()] {
            removed(&entry);
        }
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
        put(self.space().join("revalidate_size"), "1")
    }

    fn fence(&mut self) -> Result<()> {
        fs::remove_file(self.link())?;
        put(self.space().join("enable"), "0")
    }
}

/// The port that the exports are on, until it is dropped: another test in the
/// same boot makes its own.
pub struct Port;

impl Port {
    pub fn open() -> Result<Self> {
        let port = Path::new(NVMET).join("ports/1");
        fs::create_dir(&port).with_context(|| format!("make {}", port.display()))?;
        let opened = Self;
        for (name, value) in [
            ("addr_trtype", "tcp"),
            ("addr_adrfam", "ipv4"),
            ("addr_traddr", "127.0.0.1"),
            ("addr_trsvcid", "4420"),
        ] {
            put(port.join(name), value)?;
        }
        Ok(opened)
    }

    /// How to open exports on it.
    pub fn exports(&self) -> Open {
        |volume, epoch, backing| Ok(Box::new(Nvmet::open(volume, epoch, backing)?))
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        removed(&Path::new(NVMET).join("ports/1"));
    }
}

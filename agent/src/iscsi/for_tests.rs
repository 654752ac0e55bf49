//! A target on a device in memory, for tests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use super::chap::Credentials;
use super::scsi::inquiry::Identity;
use super::target::{Access, Directory, Found, Spec, Target};
use super::unit::Unit;
use crate::block::{BLOCK, BlockDevice, DeviceError, Extent};
use crate::ids::{Bytes, Lba};

/// The target's name.
pub const TARGET: &str = "iqn.2026-11.io.drover:t1";
/// The initiator that may log in.
pub const INITIATOR: &str = "iqn.2026-11.org.example:host";

/// A device in memory.
pub struct MemoryDevice {
    /// What is stored.
    pub bytes: Mutex<Vec<u8>>,
    /// What every write answers, if it is to fail.
    pub failure: Mutex<Option<DeviceError>>,
    /// Whether reads fail.
    pub unreadable: AtomicBool,
    /// Flushes so far, and writes with FUA.
    pub flushes: Mutex<(u32, u32)>,
}

impl MemoryDevice {
    pub fn new(blocks: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; blocks * BLOCK as usize]),
            failure: Mutex::default(),
            unreadable: AtomicBool::new(false),
            flushes: Mutex::default(),
        })
    }

    fn at(&self, lba: Lba, length: usize) -> Result<std::ops::Range<usize>, DeviceError> {
        let start = usize::try_from(lba.0 * BLOCK).unwrap();
        let size = self.size();
        if (start + length) as u64 > size.0 {
            let blocks = length as u64 / BLOCK;
            return Err(DeviceError::OutOfRange { lba, blocks, size });
        }
        Ok(start..start + length)
    }

    fn fails(&self) -> Result<(), DeviceError> {
        self.failure.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

impl BlockDevice for MemoryDevice {
    fn size(&self) -> Bytes {
        Bytes(self.bytes.lock().unwrap().len() as u64)
    }

    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        let at = self.at(lba, buffer.len())?;
        if self.unreadable.load(Ordering::Relaxed) {
            return Err(DeviceError::Io {
                call: "read".to_owned(),
                errno: nix::errno::Errno::EIO,
            });
        }
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[at]);
        Ok(())
    }

    fn write(&self, lba: Lba, data: &[u8], fua: bool) -> Result<(), DeviceError> {
        self.fails()?;
        let at = self.at(lba, data.len())?;
        self.bytes.lock().unwrap()[at].copy_from_slice(data);
        self.flushes.lock().unwrap().1 += u32::from(fua);
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.fails()?;
        self.flushes.lock().unwrap().0 += 1;
        Ok(())
    }

    fn write_zeroes(&self, lba: Lba, blocks: u64, _unmap: bool) -> Result<(), DeviceError> {
        self.write(
            lba,
            &vec![0; usize::try_from(blocks * BLOCK).unwrap()],
            false,
        )
    }

    /// What is zero counts as unmapped.
    fn mapping(&self, lba: Lba, blocks: u64) -> Result<Extent, DeviceError> {
        self.fails()?;
        let at = self.at(lba, usize::try_from(blocks * BLOCK).unwrap())?;
        let bytes = self.bytes.lock().unwrap();
        let each = bytes[at].chunks(BLOCK as usize);
        let mut each = each
            .map(|block| block.iter().any(|byte| *byte != 0))
            .peekable();
        let mapped = each.peek().copied().unwrap_or_default();
        let blocks = each.take_while(|one| *one == mapped).count() as u64;
        Ok(Extent { blocks, mapped })
    }

    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.write_zeroes(lba, blocks, true)
    }
}

/// One target, and one name that was closed.
pub struct OneTarget(pub Arc<Target>);

/// The name that was closed.
pub const CLOSED: &str = "iqn.2026-11.io.drover:closed";

impl Directory for OneTarget {
    fn find(&self, target: &str) -> Found {
        match target {
            CLOSED => Found::Closed,
            name if name == self.0.name() => Found::Live(Arc::clone(&self.0)),
            _ => Found::Unknown,
        }
    }

    fn visible(&self, initiator: &str) -> Vec<String> {
        let mine = self.0.access(initiator).is_some();
        mine.then(|| self.0.name().to_owned()).into_iter().collect()
    }
}

/// A target for [`INITIATOR`], with these credentials in each direction.
pub fn target(
    device: Arc<dyn BlockDevice>,
    incoming: Option<(&str, &str)>,
    outgoing: Option<(&str, &str)>,
    max_sessions: usize,
) -> Arc<Target> {
    let unit = unit(device, false);
    target_of(unit, incoming, outgoing, max_sessions)
}

/// A unit on this device.
pub fn unit(device: Arc<dyn BlockDevice>, read_only: bool) -> Arc<Unit> {
    let identity = Identity {
        uuid: Uuid::from_u128(7),
        target: TARGET.to_owned(),
    };
    Unit::new(device, identity, read_only, None).unwrap()
}

/// A target for [`INITIATOR`] that serves this unit.
pub fn target_of(
    unit: Arc<Unit>,
    incoming: Option<(&str, &str)>,
    outgoing: Option<(&str, &str)>,
    max_sessions: usize,
) -> Arc<Target> {
    let credentials = |(name, secret): (&str, &str)| Credentials {
        name: name.to_owned(),
        secret: secret.to_owned(),
    };
    let spec = Spec {
        name: TARGET.to_owned(),
        access: vec![Access {
            initiator: INITIATOR.to_owned(),
            incoming: incoming.map(credentials),
            outgoing: outgoing.map(credentials),
        }],
        max_sessions,
    };
    Target::new(spec, unit)
}

//! How the two example targets are put to the test: they can stay in memory and
//! hold a lock as an agent does, and they can break a promise, so that the proof
//! of that promise is seen to fail.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use drover::block::file::FileDevice;
use drover::block::{BlockDevice, DeviceError, Direct};
use drover::ids::{Bytes, Lba};

/// What both targets take for it.
#[derive(clap::Args)]
pub struct Trial {
    /// Stay in memory, and be ended last, as an agent with a pool does
    #[arg(long)]
    resident: bool,
    /// Serve when this file's lock is had, and hold it as an agent holds its pool's
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Break a promise: the lock ends with the process, whatever its rings have in hand
    #[arg(long, requires = "lock")]
    unregistered: bool,
    /// Break a promise: nothing is made durable, whatever is answered
    #[arg(long)]
    lose_flushes: bool,
}

/// What the data path's threads hold, and what the process does.
#[derive(Default)]
pub struct Held {
    /// For [`drover::reactor::Settings::held`].
    pub by_rings: Vec<OwnedFd>,
    _by_process: Option<File>,
}

impl Trial {
    /// Goes on when the lock is had; it is kept as long as what is returned.
    pub fn begin(&self) -> anyhow::Result<Held> {
        if self.resident {
            drover::daemon::memory::keep();
        }
        let Some(path) = &self.lock else {
            return Ok(Held::default());
        };
        let open = File::options().append(true).create(true).open(path);
        let file = open.with_context(|| format!("open {}", path.display()))?;
        file.lock()
            .with_context(|| format!("lock {}", path.display()))?;
        let by_rings = if self.unregistered {
            Vec::new()
        } else {
            vec![file.try_clone()?.into()]
        };
        Ok(Held {
            by_rings,
            _by_process: Some(file),
        })
    }

    /// The device to serve.
    pub fn device(&self, device: &Arc<FileDevice>) -> Arc<dyn BlockDevice> {
        let device = Arc::clone(device);
        if self.lose_flushes {
            Arc::new(Careless(device))
        } else {
            device
        }
    }
}

/// Answers that writes are durable, and leaves that to chance.
struct Careless(Arc<FileDevice>);

impl BlockDevice for Careless {
    fn size(&self) -> Bytes {
        self.0.size()
    }

    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read(lba, buffer)
    }

    fn write(&self, lba: Lba, data: &[u8], _fua: bool) -> Result<(), DeviceError> {
        self.0.write(lba, data, false)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn write_zeroes(&self, lba: Lba, blocks: u64, unmap: bool) -> Result<(), DeviceError> {
        self.0.write_zeroes(lba, blocks, unmap)
    }

    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.0.deallocate(lba, blocks)
    }

    /// Of reads only: a ring would make durable what is to be.
    fn direct(&self, lba: Lba, length: usize, write: bool) -> Option<Direct> {
        (!write).then(|| self.0.direct(lba, length, write))?
    }

    fn in_memory(&self) -> bool {
        self.0.in_memory()
    }
}

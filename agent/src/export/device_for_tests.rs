//! What the tests of both protocols serve: a device in memory that can be made
//! to wait, on the real data path.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;

use super::Exports;
use crate::block::{BLOCK, BlockDevice, DeviceError};
use crate::ids::{Bytes, Lba};
use crate::reactor::{POLL, Reactors, Settings};

pub const BLOCKS: u64 = 1024;
pub const BLOCK_BYTES: usize = BLOCK as usize;

/// A device in memory whose writes wait while `hold` has no permit.
pub struct Memory {
    pub bytes: Mutex<Vec<u8>>,
    pub hold: Semaphore,
    pub waiting: AtomicUsize,
    pub flushes: AtomicUsize,
}

impl Memory {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; (BLOCKS * BLOCK) as usize]),
            hold: Semaphore::new(Semaphore::MAX_PERMITS),
            waiting: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
        })
    }

    /// Makes writes wait from now on.
    pub fn block(&self) {
        self.hold.forget_permits(Semaphore::MAX_PERMITS);
    }

    pub fn release(&self) {
        self.hold.add_permits(1 << 20);
    }

    pub async fn until_waiting(&self, count: usize) {
        until(|| self.waiting.load(Ordering::SeqCst) == count).await;
    }
}

impl BlockDevice for Memory {
    fn size(&self) -> Bytes {
        Bytes(self.bytes.lock().unwrap().len() as u64)
    }
    fn read(&self, lba: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        let bytes = self.bytes.lock().unwrap();
        let start = lba.0.saturating_mul(BLOCK) as usize;
        let part = start
            .checked_add(buffer.len())
            .and_then(|end| bytes.get(start..end));
        let size = Bytes(bytes.len() as u64);
        let blocks = buffer.len() as u64 / BLOCK;
        buffer.copy_from_slice(part.ok_or(DeviceError::OutOfRange { lba, blocks, size })?);
        Ok(())
    }
    fn write(&self, lba: Lba, data: &[u8], _fua: bool) -> Result<(), DeviceError> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // Closed: the test is over.
        let held = futures::executor::block_on(self.hold.acquire());
        held.map_err(|_| DeviceError::NoSpace)?.forget();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        let start = (lba.0 * BLOCK) as usize;
        self.bytes.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn flush(&self) -> Result<(), DeviceError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn write_zeroes(&self, lba: Lba, blocks: u64, _unmap: bool) -> Result<(), DeviceError> {
        self.write(lba, &vec![0; (blocks * BLOCK) as usize], false)
    }
    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        self.write_zeroes(lba, blocks, true)
    }
}

pub async fn until(mut condition: impl FnMut() -> bool) {
    let looking = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), looking)
        .await
        .expect("it came about in time");
}

/// The data path on this machine's best engine.
pub fn reactors() -> Arc<Reactors> {
    let settings = Settings {
        threads: 2,
        engine: None,
        poll: POLL,
        held: Vec::new(),
    };
    Reactors::start(settings).unwrap()
}

/// What the exports say of themselves.
pub fn metrics(exports: &Exports) -> String {
    let mut registry = Registry::default();
    exports.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text
}

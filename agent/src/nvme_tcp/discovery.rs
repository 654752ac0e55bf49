//! The discovery controller: tells a host which subsystems it may connect to
//! (NVM Express Base Specification 2.0, 3.1.2.3 and 5.16.1.23).
//!
//! Every association with it has a subsystem of its own that has no namespace,
//! so all that associations have in common is served by the same code.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use uuid::Uuid;

use super::controller::{Controller, Event};
use super::identify::{self, DISCOVERY_NOTICES, Page, QUEUE_ENTRIES};
use super::reserve::Reservations;
use super::subsystem::{Host, Parts, Subsystem};
use crate::block::{BlockDevice, DeviceError};
use crate::ids::{Bytes, Lba};

/// The NQN that all discovery controllers have.
pub const NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// The log page with what can be discovered.
pub const LOG: u8 = 0x70;
/// Bytes of the log's header, and of each of its entries.
const RECORD: usize = 1024;
/// The port that NVMe/TCP I/O controllers have when nobody says otherwise.
const IO_PORT: u16 = 4420;

/// What can be discovered, and by whom.
pub struct Discovery {
    shown: Mutex<Vec<Shown>>,
    /// Counts the changes.
    generation: AtomicU64,
    /// Associations, to be told of changes.
    told: Mutex<Vec<Weak<Subsystem>>>,
    /// Where I/O controllers listen.
    port: AtomicU16,
    reservations: Arc<Reservations>,
}

/// One subsystem, and the host that may know of it.
struct Shown {
    subsystem: String,
    host: String,
}

/// An association's view: who asks, and at which address of ours.
#[derive(Clone)]
pub struct View {
    discovery: Arc<Discovery>,
    address: IpAddr,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of the locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Discovery {
    fn default() -> Self {
        Self {
            shown: Mutex::default(),
            generation: AtomicU64::new(1),
            told: Mutex::default(),
            port: AtomicU16::new(IO_PORT),
            reservations: Reservations::volatile(),
        }
    }
}

impl Discovery {
    /// Says on which port I/O controllers listen.
    pub fn listens_on(&self, port: u16) {
        self.port.store(port, Ordering::Release);
    }

    /// Shows `subsystem` to `host` from now on.
    pub fn show(&self, subsystem: &str, host: &str) {
        lock(&self.shown).push(Shown {
            subsystem: subsystem.to_owned(),
            host: host.to_owned(),
        });
        self.changed(host);
    }

    /// Shows `subsystem` to nobody any more.
    pub fn hide(&self, subsystem: &str) {
        let mut shown = lock(&self.shown);
        let found = shown.iter().position(|one| one.subsystem == subsystem);
        let hidden = found.map(|at| shown.remove(at));
        drop(shown);
        if let Some(hidden) = hidden {
            self.changed(&hidden.host);
        }
    }

    /// Counts a change and tells the host that it concerns.
    fn changed(&self, host: &str) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        for subsystem in lock(&self.told).iter().filter_map(Weak::upgrade) {
            if subsystem.host().nqn == host
                && let Some(controller) = subsystem.current()
            {
                controller.announce(Event::Discovery);
            }
        }
    }

    /// A subsystem for an association of `host`, which reached this target at `address`.
    pub fn subsystem(self: &Arc<Self>, host: &Host, address: IpAddr) -> Arc<Subsystem> {
        let subsystem = Subsystem::new(Parts {
            nqn: NQN.to_owned(),
            namespace: Uuid::nil(),
            host: host.clone(),
            read_only: true,
            device: Arc::new(Nothing),
            reservations: Arc::clone(&self.reservations),
            secrets: None,
            discovery: Some(View {
                discovery: Arc::clone(self),
                address,
            }),
        });
        let mut told = lock(&self.told);
        told.retain(|one| one.strong_count() > 0);
        told.push(Arc::downgrade(&subsystem));
        subsystem
    }
}

impl View {
    /// The whole log for `host`.
    pub fn log(&self, host: &str) -> Vec<u8> {
        let shown = lock(&self.discovery.shown);
        // Read under the lock, so that it counts what is shown.
        let generation = self.discovery.generation.load(Ordering::Acquire);
        let mut log = vec![0; RECORD];
        let port = self.discovery.port.load(Ordering::Acquire);
        for one in shown.iter().filter(|one| one.host == host) {
            log.extend_from_slice(&record(&one.subsystem, self.address, port));
        }
        let count = log.len() as u64 / RECORD as u64 - 1;
        log[..8].copy_from_slice(&generation.to_le_bytes());
        log[8..16].copy_from_slice(&count.to_le_bytes());
        log
    }
}

/// An entry of the log: an NVM subsystem over TCP, without TLS.
fn record(subsystem: &str, address: IpAddr, port: u16) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[0] = 3; // TRTYPE: TCP
    record[1] = match address.to_canonical() {
        IpAddr::V4(_) => 1,
        IpAddr::V6(_) => 2,
    };
    record[2] = 2; // SUBTYPE: an NVM subsystem
    record[3] = 0b10; // TREQ: no secure channel is required
    record[4..6].copy_from_slice(&1u16.to_le_bytes());
    record[6..8].copy_from_slice(&u16::MAX.to_le_bytes()); // any controller
    record[8..10].copy_from_slice(&QUEUE_ENTRIES.to_le_bytes());
    identify::text(&mut record[32..64], &port.to_string());
    let length = subsystem.len().min(255);
    record[256..256 + length].copy_from_slice(&subsystem.as_bytes()[..length]);
    identify::text(&mut record[512..768], &address.to_canonical().to_string());
    record
}

/// CNS 01 of a discovery controller.
pub fn controller(controller: &Controller) -> Page {
    let mut page = identify::controller(controller.id(), NQN, Uuid::nil());
    page[76] = 0;
    page[92..96].copy_from_slice(&DISCOVERY_NOTICES.to_le_bytes());
    page[111] = 2; // CNTRLTYPE: discovery
    // Log pages: offsets; no namespaces, no I/O commands, no write cache.
    page[261] = 1 << 2;
    page[512..536].fill(0);
    page[514..516].copy_from_slice(&QUEUE_ENTRIES.to_le_bytes());
    page[540..544].fill(0);
    page
}

/// The device of a subsystem without a namespace.
struct Nothing;

impl Nothing {
    fn refuse(lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        let size = Bytes(0);
        Err(DeviceError::OutOfRange { lba, blocks, size })
    }
}

impl BlockDevice for Nothing {
    fn size(&self) -> Bytes {
        Bytes(0)
    }
    fn read(&self, lba: Lba, _: &mut [u8]) -> Result<(), DeviceError> {
        Self::refuse(lba, 1)
    }
    fn write(&self, lba: Lba, _: &[u8], _: bool) -> Result<(), DeviceError> {
        Self::refuse(lba, 1)
    }
    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn write_zeroes(&self, lba: Lba, blocks: u64, _: bool) -> Result<(), DeviceError> {
        Self::refuse(lba, blocks)
    }
    fn deallocate(&self, lba: Lba, blocks: u64) -> Result<(), DeviceError> {
        Self::refuse(lba, blocks)
    }
}

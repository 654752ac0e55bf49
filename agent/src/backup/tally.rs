//! What a worker has done so far: counted where it happens, read by whoever reports it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::sink::Meter;
use super::source::Given;
use super::spec::Counts;

/// Counters of one job.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// All there is to do.
    pub(super) total: AtomicU64,
    /// Bytes read from the snapshot's file.
    pub(super) read: Arc<AtomicU64>,
    /// Bytes done for good.
    done: AtomicU64,
    resumed: AtomicU64,
    meter: Mutex<Option<Arc<Meter>>>,
    slice: Mutex<Option<Arc<Given>>>,
}

impl Tally {
    /// Counts what is written through this meter.
    pub(super) fn watch(&self, meter: &Arc<Meter>) {
        let mut watched = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        *watched = Some(meter.clone());
    }

    /// So much was there at the beginning.
    pub(super) fn resumed(&self, bytes: u64) {
        self.resumed.store(bytes, Ordering::SeqCst);
        self.done.store(bytes, Ordering::SeqCst);
    }

    /// So much is done in all.
    pub(super) fn done(&self, bytes: u64) {
        self.done.store(bytes, Ordering::SeqCst);
    }

    /// A slice is being read.
    pub(super) fn begin_slice(&self, given: Arc<Given>) {
        let mut slice = self.slice.lock().unwrap_or_else(PoisonError::into_inner);
        *slice = Some(given);
    }

    /// It is committed, and so much is done in all.
    pub(super) fn end_slice(&self, done: u64) {
        let mut slice = self.slice.lock().unwrap_or_else(PoisonError::into_inner);
        *slice = None;
        self.done.store(done, Ordering::SeqCst);
    }

    /// The numbers now.
    pub(super) fn counts(&self) -> Counts {
        let slice = self.slice.lock().unwrap_or_else(PoisonError::into_inner);
        let in_work = slice
            .as_ref()
            .map_or(0, |given| given.volume.load(Ordering::Relaxed));
        let meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        let (committed, uploaded) = meter.as_ref().map_or((0, 0), |meter| {
            let committed = meter.committed.load(Ordering::SeqCst);
            (committed, meter.uploaded.load(Ordering::SeqCst))
        });
        let total = self.total.load(Ordering::SeqCst);
        let held = self.done.load(Ordering::SeqCst);
        Counts {
            total,
            done: (held + in_work).min(total),
            held,
            resumed: self.resumed.load(Ordering::SeqCst),
            read: self.read.load(Ordering::SeqCst),
            uploaded,
            uncommitted: uploaded - committed,
        }
    }
}

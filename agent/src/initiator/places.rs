//! Which mounts are drover's own: where it staged and published, and no other.
//!
//! A disk that somebody else mounts is held by that mount, however it looks. The
//! kernel does not say who made one, so this is kept in memory; what is mounted
//! when an agent starts counts as made by the one before it.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::fabric::Device;
use super::mountinfo::Mount;
use crate::ids::VolumeId;

/// Where each volume is, as mountinfo writes it.
#[derive(Debug, Default)]
pub(super) struct Places(Mutex<HashMap<VolumeId, BTreeSet<PathBuf>>>);

impl Places {
    fn all(&self) -> MutexGuard<'_, HashMap<VolumeId, BTreeSet<PathBuf>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// drover has mounted the volume here.
    pub(super) fn add(&self, volume: &VolumeId, place: &Path) {
        let mut all = self.all();
        all.entry(volume.clone())
            .or_default()
            .insert(place.to_owned());
    }

    /// It has taken it away again.
    pub(super) fn remove(&self, volume: &VolumeId, place: &Path) {
        let mut all = self.all();
        if let Some(places) = all.get_mut(volume) {
            places.remove(place);
            if places.is_empty() {
                all.remove(volume);
            }
        }
    }

    /// Those of a disk's mounts that are drover's own.
    pub(super) fn of(&self, volume: &VolumeId, mounts: &[Mount], device: &Device) -> Vec<PathBuf> {
        let all = self.all();
        let Some(places) = all.get(volume) else {
            return Vec::new();
        };
        let shown = mounts.iter().filter(|mount| mount.shows(device));
        let own = shown.filter(|mount| places.contains(&mount.point));
        own.map(|mount| mount.point.clone()).collect()
    }
}

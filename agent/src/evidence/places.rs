//! The arrays that the programs count in: whose each place is, and the freeing
//! of those whose keys are gone.
//!
//! A program takes a place and writes into its own CPU's counts; the agent alone
//! frees one, in two steps. It says that the place is [`LEAVING`], so that no
//! program finds it. What had found it before then has ended a [`WHILE`] later
//! (a program runs for microseconds, and nothing on its CPU interrupts it for
//! longer); only then are the counts made 0 and the place free.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{Map, PerCpuArray};
use drover_ebpf::{FREE, Key, LEAVING, Place, TAKING};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::EvidenceError;
use super::loader::{Raw, failed, map, no_map, per_cpu};

/// How long a place stays out of use before it is free.
const WHILE: Duration = Duration::from_secs(1);

/// An array of keys, and the array of what is counted for each.
pub struct Places<K> {
    counts: &'static str,
    keys: Keys<K>,
    /// Since when, the longest first.
    leaving: VecDeque<(u32, Instant)>,
}

impl<K: Key + Hash> Places<K> {
    /// Those of the maps `keys` and `counts`, the first of which holds `len`.
    pub fn of(
        ebpf: &Ebpf,
        keys: &'static str,
        counts: &'static str,
        len: u32,
    ) -> Result<Self, EvidenceError> {
        Ok(Self {
            counts,
            keys: Keys::of(ebpf, keys, len)?,
            leaving: VecDeque::new(),
        })
    }

    /// What was counted, folded over CPUs and over the places that one key has.
    pub fn rows<V: Copy>(
        &self,
        ebpf: &Ebpf,
        none: V,
        add: impl Fn(V, &V) -> V,
    ) -> Result<HashMap<K, V>, EvidenceError>
    where
        Raw<V>: aya::Pod,
    {
        let wrong = |e| failed(self.counts, &e);
        let counts = PerCpuArray::<_, Raw<V>>::try_from(map(ebpf, self.counts)?).map_err(wrong)?;
        let mut rows = HashMap::new();
        for (index, key) in self.keys.taken() {
            let values = counts.get(&index, 0).map_err(wrong)?;
            let sum = rows.entry(key).or_insert(none);
            *sum = values.iter().fold(*sum, |sum, v| add(sum, &v.0));
        }
        Ok(rows)
    }

    /// Takes the places of these keys out of use, and frees those that were taken
    /// out a [`WHILE`] ago: their counts are `none` again.
    pub fn forget<V: Copy>(
        &mut self,
        ebpf: &mut Ebpf,
        gone: &HashSet<K>,
        none: V,
    ) -> Result<(), EvidenceError>
    where
        Raw<V>: aya::Pod,
    {
        if !gone.is_empty() {
            let now = Instant::now();
            for (index, _) in self.keys.taken().filter(|(_, key)| gone.contains(key)) {
                self.keys.mark(index, LEAVING);
                self.leaving.push_back((index, now));
            }
        }
        let wrong = |e| failed(self.counts, &e);
        let map = ebpf.map_mut(self.counts);
        let map = map.ok_or_else(|| no_map(self.counts))?;
        let mut counts = PerCpuArray::<_, Raw<V>>::try_from(map).map_err(wrong)?;
        while let Some((index, left)) = self.leaving.front().copied()
            && left.elapsed() >= WHILE
        {
            // One that cannot be freed now is tried again.
            counts.set(index, per_cpu(none)?, 0).map_err(wrong)?;
            self.keys.mark(index, FREE);
            self.leaving.pop_front();
        }
        Ok(())
    }
}

/// The array of keys, as the kernel shares it.
struct Keys<K> {
    places: NonNull<Place<K>>,
    len: u32,
}

// SAFETY: the array is memory of the kernel's, mapped for as long as this lives.
unsafe impl<K: Send> Send for Keys<K> {}

impl<K: Key> Keys<K> {
    fn of(ebpf: &Ebpf, name: &'static str, len: u32) -> Result<Self, EvidenceError> {
        let wrong = |why: String| EvidenceError::Map { map: name, why };
        let Map::Array(array) = map(ebpf, name)? else {
            return Err(wrong("it is no array".to_owned()));
        };
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let bytes = Self::bytes(len);
        let bytes = bytes.ok_or_else(|| wrong(format!("{len} places do not fit")))?;
        // SAFETY: a new mapping, at an address that the kernel chooses. The map is
        // BPF_F_MMAPABLE and so long: the kernel refuses a longer one.
        let at = unsafe {
            mmap(
                None,
                bytes,
                both,
                MapFlags::MAP_SHARED,
                array.fd().as_fd(),
                0,
            )
        };
        let at = at.map_err(|errno| wrong(format!("mmap: {errno}")))?;
        Ok(Self {
            places: at.cast(),
            len,
        })
    }

    fn bytes(len: u32) -> Option<NonZeroUsize> {
        NonZeroUsize::new(size_of::<Place<K>>().checked_mul(len as usize)?)
    }

    fn print(&self, index: u32) -> &AtomicU64 {
        assert!(index < self.len, "place {index} of {}", self.len);
        // SAFETY: inside the mapping, and aligned, as each place is; only atomics
        // write to it, here and in the programs.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.places.as_ptr().add(index as usize)).print) }
    }

    fn mark(&self, index: u32, as_what: u64) {
        self.print(index).store(as_what, Ordering::Release);
    }

    /// Places with their keys. A key is never written to again before the
    /// agent frees its place.
    fn taken(&self) -> impl Iterator<Item = (u32, K)> + '_ {
        let taken = |index: &u32| {
            let print = self.print(*index).load(Ordering::Acquire);
            !matches!(print, FREE | TAKING | LEAVING)
        };
        (0..self.len).filter(taken).map(|index| {
            // SAFETY: inside the mapping; see above for why nobody writes to it.
            let key = unsafe { (*self.places.as_ptr().add(index as usize)).key };
            (index, key)
        })
    }
}

impl<K> Drop for Keys<K> {
    fn drop(&mut self) {
        let bytes = size_of::<Place<K>>() * self.len as usize;
        // SAFETY: the mapping that `of` made, which nothing refers to any more.
        let _ = unsafe { munmap(self.places.cast(), bytes) };
    }
}

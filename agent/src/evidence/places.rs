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

    /// The keys that have places.
    pub fn keys(&self) -> HashSet<K> {
        self.keys.taken().map(|(_, key)| key).collect()
    }

    /// Takes the places of keys that are gone out of use, and frees those that were
    /// taken out a [`WHILE`] ago: their counts are `none` again.
    pub fn forget<V: Copy>(
        &mut self,
        ebpf: &mut Ebpf,
        gone: impl Fn(&K) -> bool,
        none: V,
    ) -> Result<(), EvidenceError>
    where
        Raw<V>: aya::Pod,
    {
        for (index, _) in self.keys.taken().filter(|(_, key)| gone(key)) {
            self.keys.mark(index, LEAVING);
            self.leaving.push_back((index, Instant::now()));
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
        // It fails for no mapping that there is.
        // SAFETY: the mapping that `of` made, which nothing refers to any more.
        let _ = unsafe { munmap(self.places.cast(), bytes) };
    }
}

#[cfg(test)]
mod tests {
    use drover_ebpf::{IoKey, LATENCIES, LatencyKey, PROBES, place_of};

    use super::*;

    /// How many of these keys find no place among so many.
    fn homeless<K: Key>(keys: impl Iterator<Item = K>, places: u32) -> usize {
        let mut taken = vec![false; places as usize];
        let finds = |key: K| {
            let places = (0..PROBES).map(|probe| place_of(key.print(), probe, places - 1));
            let found = { places }.find(|place| !taken[*place as usize]);
            found.map(|place| taken[place as usize] = true).is_some()
        };
        keys.map(finds).filter(|found| !found).count()
    }

    #[test]
    fn keys_that_differ_little_find_places() {
        let key = IoKey {
            diskseq: 9,
            cgroup: 4711,
            start_ns: 86_400_000_000_000,
            tgid: 1000,
            pad: 0,
        };
        type Change = fn(&mut IoKey, u32);
        let vary: [(&str, Change); 5] = [
            ("process ids", |key, n| key.tgid += n),
            ("starts", |key, n| key.start_ns += u64::from(n) * 10_000_000),
            ("cgroups", |key, n| key.cgroup += u64::from(n)),
            ("disks", |key, n| key.diskseq += u64::from(n)),
            ("processes and disks", |key, n| {
                key.tgid += n / 64;
                key.start_ns += u64::from(n / 64) * 1_234_567;
                key.diskseq += u64::from(n % 64);
            }),
        ];
        for (what, change) in vary {
            let keys = (0..8192 * 2 / 3).map(|n| {
                let mut key = key;
                change(&mut key, n);
                key
            });
            assert_eq!(homeless(keys, 8192), 0, "{what}");
        }
    }

    #[test]
    fn disks_that_follow_each_other_fill_every_place() {
        let keys = (0..LATENCIES).map(|n| LatencyKey {
            diskseq: u64::from(77 + n / 4),
            direction: n % 4,
            pad: 0,
        });
        assert_eq!(homeless(keys, LATENCIES), 0);
    }
}

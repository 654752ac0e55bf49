//! Counts by key, in arrays: each key takes a place, and keeps it until the agent
//! frees it. To find it takes a few loads, where a hash map of the kernel's would
//! cost as much as all else that an I/O is counted with.
//!
//! All CPUs share the places, and each has counts of its own. Two CPUs may take
//! two places for one key at the same moment, and a key may take a second place
//! nearer to where it is looked for first: the agent adds them up.

// The bpf targets have no atomics but these, though the kernel has them since 5.12.
use core::intrinsics::AtomicOrdering::SeqCst;
use core::intrinsics::{atomic_cxchg, atomic_xchg};

use aya_ebpf::maps::{Array, PerCpuArray};
use drover_ebpf::{FREE, Key, PROBES, Place, TAKING, place_of};

/// An array of keys and one of counts.
pub struct Places<K: 'static, V: 'static> {
    pub keys: &'static Array<Place<K>>,
    pub counts: &'static PerCpuArray<V>,
    /// Their length less 1; it is a power of two.
    pub mask: u32,
}

impl<K: Key, V> Places<K, V> {
    /// This CPU's counts for the key; none: there is no room. The pointer is good
    /// for as long as the program runs.
    #[inline(always)]
    pub fn of(&self, key: K) -> Option<*mut V> {
        let print = key.print();
        for probe in 0..PROBES {
            let index = place_of(print, probe, self.mask);
            let place = self.keys.get_ptr_mut(index)?;
            // SAFETY: the place lies in the map, which lives as long as the program.
            let (print_of, key_of) = unsafe { (&raw mut (*place).print, &raw mut (*place).key) };
            // SAFETY: as above. A print that is read together with an older key
            // is no other key's: it is of the one that is there by then.
            let (kept, kept_key) = unsafe { (print_of.read_volatile(), key_of.read_volatile()) };
            if kept == print && kept_key == key {
                return self.counts.get_ptr_mut(index);
            }
            // SAFETY: as above.
            if kept == FREE && unsafe { take(print_of) } {
                // SAFETY: as above; nobody else writes to it or reads the key
                // before it shows a print.
                unsafe {
                    key_of.write_volatile(key);
                    atomic_xchg::<_, { SeqCst }>(print_of, print);
                }
                return self.counts.get_ptr_mut(index);
            }
        }
        None
    }
}

/// Whether a free place is this program's now.
///
/// # Safety
/// The print of a place of the map.
#[inline(always)]
unsafe fn take(print: *mut u64) -> bool {
    // SAFETY: the caller's.
    unsafe { atomic_cxchg::<_, { SeqCst }, { SeqCst }>(print, FREE, TAKING).1 }
}
